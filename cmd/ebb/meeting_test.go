package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"ebb/internal/natstest"
	"ebb/internal/pgtest"
)

const meetingTables = `
buffers:
  - table: ebb.buffer
  - table: marked
    id: id
    topic: {value: marked}
    payload: doc
    delivered: mark
  - table: whole
    topic: {value: whole}
    delivered: mark
  - table: gone
    id: id
    topic: {value: gone}
    payload: doc
    delivered: delete
`

// meeting is a site whose transactions write into everything that makes events.
type meeting struct {
	*site
	t *testing.T
	// next is the number of the next one.
	next int
}

const meetingEvents = 6

func newMeeting(t *testing.T, sink string) *meeting {
	t.Helper()
	db := pgtest.New(t)
	for _, table := range []string{"marked", "gone"} {
		db.Exec(t, fmt.Sprintf("CREATE TABLE %s (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), doc json NOT NULL, recorded timestamptz)", table))
	}
	db.Exec(t, "CREATE TABLE whole (n int, part int, note text, recorded timestamptz, PRIMARY KEY (n, part))")
	s := &meeting{site: newSite(t, db, sink, meetingTables), t: t}
	s.setup(t)
	return s
}

// write writes transactions until ctx ends. Some are rolled back, and some rows change or vanish before they are delivered.
func (s *meeting) write(ctx context.Context) error {
	conn, err := pgx.Connect(s.t.Context(), s.db.URL)
	if err != nil {
		return err
	}
	defer conn.Close(s.t.Context())
	for i := 0; ctx.Err() == nil; i++ {
		end := "COMMIT"
		if i%5 == 4 {
			end = "ROLLBACK"
		}
		if _, err := conn.Exec(s.t.Context(), fmt.Sprintf(`BEGIN;
			INSERT INTO marked (doc) VALUES ('{"n": %[1]d}');
			SELECT ebb.put('put', '{"n": %[2]d}'::json);
			SELECT ebb.emit('emit', '{"n": %[3]d}'::json);
			INSERT INTO whole (n, part) VALUES (%[4]d, 0);
			INSERT INTO gone (doc) VALUES ('{"n": %[5]d}');
			INSERT INTO gone (id, doc) VALUES (('00000000-0000-4000-8000-' || lpad('%[6]d', 12, '0'))::uuid, '{"n": %[6]d}');
			DELETE FROM gone WHERE id = ('00000000-0000-4000-8000-' || lpad('%[6]d', 12, '0'))::uuid;
			UPDATE whole SET note = 'changed' WHERE n = %[4]d;
			UPDATE marked SET doc = '{"n": -2}' WHERE recorded IS NULL; %[7]s`,
			s.next, s.next+1, s.next+2, s.next+3, s.next+4, s.next+5, end)); err != nil {
			return err
		}
		if end == "COMMIT" {
			s.next += meetingEvents
		}
		time.Sleep(2 * time.Millisecond)
	}
	return nil
}

// left waits until all rows are recorded.
func (s *meeting) left() {
	s.t.Helper()
	pgtest.Eventually(s.t, 60*time.Second, func() (bool, string) {
		left := pgtest.Value[string](s.t, s.db, `SELECT concat_ws(' ', (SELECT count(*) FROM marked WHERE recorded IS NULL),
			(SELECT count(*) FROM whole WHERE recorded IS NULL), (SELECT count(*) FROM gone), (SELECT count(*) FROM ebb.backlog))`)
		return left == "0 0 0 0", "rows are not recorded: " + left
	})
}

// killed writes while bridges are killed, and lets the last one deliver all.
func (s *meeting) killed() {
	s.t.Helper()
	ctx, cancel := context.WithCancel(s.t.Context())
	defer cancel()
	written := make(chan error, 1)
	go func() { written <- s.write(ctx) }()
	for i := range 12 {
		bridge := s.run(s.t)
		time.Sleep(time.Duration(200+60*i) * time.Millisecond)
		bridge.kill()
	}
	bridge := s.streaming(s.t)
	cancel()
	if err := <-written; err != nil {
		s.t.Fatal(err)
	}
	s.left()
	s.confirms(s.t, 30*time.Second)
	bridge.stop(s.t)
}

// Rows that are kept, marked and deleted, and messages, in the same transactions, with kills: the stream holds all of them once and in order.
func TestEverythingInATransactionSurvivesKills(t *testing.T) {
	t.Parallel()
	server := natstest.New(t)
	s := newMeeting(t, server.URL())
	s.killed()
	messages := server.Messages(t, "EBB")
	for i, m := range messages {
		if got := number(t, m.Data); got != i {
			t.Fatalf("message %d is event %d", i, got)
		}
	}
	if len(messages) != s.next || s.next == 0 {
		t.Fatalf("the stream holds %d events, want %d", len(messages), s.next)
	}
}

// The same over HTTP, at least once.
func TestEverythingOverHTTPSurvivesKills(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	got := map[int]int{}
	receiver := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		n := numberFrom(t, r)
		if n == cutShort {
			return
		}
		mu.Lock()
		defer mu.Unlock()
		got[n]++
	}))
	defer receiver.Close()
	s := newMeeting(t, receiver.URL)
	s.killed()
	mu.Lock()
	defer mu.Unlock()
	for n := range s.next {
		if got[n] == 0 {
			t.Errorf("event %d was not delivered", n)
		}
	}
	for n := range got {
		if n < 0 || n >= s.next {
			t.Errorf("event %s was delivered, which was not committed", strconv.Itoa(n))
		}
	}
}

// number is that of an event.
func number(t *testing.T, payload []byte) int {
	t.Helper()
	var doc struct{ N *int }
	if err := json.Unmarshal(payload, &doc); err != nil || doc.N == nil {
		t.Errorf("a payload of no event: %q", payload)
		return -1
	}
	return *doc.N
}

// cutShort is the number of a request whose bridge was killed while it sent it.
const cutShort = -1

func numberFrom(t *testing.T, r *http.Request) int {
	body, err := io.ReadAll(r.Body)
	if err != nil {
		return cutShort
	}
	return number(t, body)
}
