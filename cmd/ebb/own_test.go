package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"ebb/event"
	"ebb/internal/natstest"
	"ebb/internal/pgtest"
)

// ready is one of the mappings of docs/own-tables.md, and how to use it.
type ready struct {
	title string
	// all says that the mapping has start: all.
	all bool
	// insert inserts the $1-th row.
	insert string
	// left counts the rows that are not recorded as delivered, and total all of them.
	left string
	// topic, contentType and body are what is expected of the n-th row; key may be "".
	topic, key, contentType string
	body                    func(n int) string
	// id returns the id of a row, or nil where the position is the id.
	id func(n int) string
}

func uuid(n int) string { return fmt.Sprintf("00000000-0000-4000-8000-%012d", n) }

var readyMappings = []ready{
	{
		title: "The article's own table", all: true,
		insert: `INSERT INTO membership (app, "group", time) VALUES ('A' || $1, 'G1', timestamptz '2026-01-01 00:00Z' + $1 * interval '1 second')`,
		left:   "SELECT count(*) FROM membership WHERE recorded IS NULL",
		topic:  "membership.changed", key: "A%d", contentType: "application/json",
		body: func(n int) string {
			at := time.Date(2026, 1, 1, 0, 0, n, 0, time.UTC).Format("2006-01-02T15:04:05+00:00")
			return fmt.Sprintf(`{"app":"A%d","group":"G1","time":%q,"recorded":null}`, n, at)
		},
	},
	{
		title:  "Debezium's outbox",
		insert: `INSERT INTO outbox VALUES (('00000000-0000-4000-8000-' || lpad($1::text, 12, '0'))::uuid, 'order', 'o' || $1, 'OrderPaid', jsonb_build_object('n', $1::int))`,
		left:   "SELECT count(*) FROM outbox",
		topic:  "OrderPaid", key: "o%d", contentType: "application/json",
		body: func(n int) string { return fmt.Sprintf(`{"n": %d}`, n) }, id: uuid,
	},
	{
		title: "Watermill's messages", all: true,
		insert: `INSERT INTO watermill_orders (uuid, payload, metadata, transaction_id)
			VALUES ('00000000-0000-4000-8000-' || lpad($1::text, 12, '0'), json_build_object('n', $1::int), '{"correlation_id":"c"}', pg_current_xact_id())`,
		left:  "SELECT count(*) FROM watermill_orders",
		topic: "orders", contentType: "application/json",
		body: func(n int) string { return fmt.Sprintf(`{"n" : %d}`, n) }, id: uuid,
	},
	{
		title: "A plain table with bytes",
		insert: `INSERT INTO app.messages (id, topic, key, body) VALUES (('00000000-0000-4000-8000-' || lpad($1::text, 12, '0'))::uuid, 'raw', 'k' || $1,
			decode('00ff5c78', 'hex') || int4send($1::int))`,
		left:  "SELECT count(*) FROM app.messages WHERE sent_at IS NULL",
		topic: "raw", key: "k%d", contentType: "application/x-protobuf",
		body: func(n int) string { return "\x00\xff\\x" + string([]byte{0, 0, byte(n >> 8), byte(n)}) }, id: uuid,
	},
}

// documented returns the SQL and the configuration of a mapping in docs/own-tables.md.
func documented(t *testing.T, title string) (sql, yaml string) {
	t.Helper()
	data, err := os.ReadFile("../../docs/own-tables.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(data), "\n### "+title+"\n")
	if !ok {
		t.Fatalf("docs/own-tables.md has no section %q", title)
	}
	section, _, _ = strings.Cut(section, "\n### ")
	block := func(kind string) string {
		_, rest, ok := strings.Cut(section, "```"+kind+"\n")
		text, _, closed := strings.Cut(rest, "```")
		if !ok || !closed {
			t.Fatalf("section %q has no %s", title, kind)
		}
		return text
	}
	return block("sql"), block("yaml")
}

// ownSite is a site with one of the ready mappings.
type ownSite struct {
	*site
	ready
	t    *testing.T
	next int
}

func newOwnSite(t *testing.T, r ready, sink string, adjust ...string) *ownSite {
	t.Helper()
	sql, yaml := documented(t, r.title)
	yaml = strings.NewReplacer(adjust...).Replace(yaml)
	db := pgtest.New(t)
	db.Exec(t, sql)
	return &ownSite{site: newSite(t, db, sink, yaml), ready: r, t: t, next: 1}
}

// add inserts n rows, each in a transaction of its own.
func (s *ownSite) add(n int) {
	s.t.Helper()
	conn := s.db.Connect(s.t)
	for range n {
		if _, err := conn.Exec(s.t.Context(), s.row(s.next)); err != nil {
			s.t.Fatal(err)
		}
		s.next++
	}
}

// row is the statement that inserts the n-th row.
func (r *ready) row(n int) string { return strings.ReplaceAll(r.insert, "$1", strconv.Itoa(n)) }

// recorded waits until all but n rows are recorded as delivered.
func (s *ownSite) recorded(n int64) {
	s.t.Helper()
	pgtest.Eventually(s.t, 30*time.Second, func() (bool, string) {
		left := pgtest.Value[int64](s.t, s.db, s.left)
		return left == n, fmt.Sprintf("%d rows are not recorded, want %d", left, n)
	})
}

// check compares a message with the row that it is of, and returns the number of that.
func (s *ownSite) check(m natstest.Msg, n int) {
	s.t.Helper()
	want := map[string]string{"ce-type": s.topic, "content-type": s.contentType}
	if s.key != "" {
		want["ce-subject"] = fmt.Sprintf(s.key, n)
	}
	if s.id != nil {
		want["ce-id"] = s.id(n)
	}
	for name, value := range want {
		if got := m.Header.Get(name); got != value {
			s.t.Errorf("row %d: %s is %q, want %q", n, name, got, value)
		}
	}
	if string(m.Data) != s.body(n) {
		s.t.Errorf("row %d: the payload is %q, want %q", n, m.Data, s.body(n))
	}
}

// numbers are the numbers of the rows whose messages the stream holds, in its order.
func (s *ownSite) numbers(server *natstest.Server) []int {
	s.t.Helper()
	byBody := map[string]int{}
	for n := 1; n < s.next; n++ {
		byBody[s.body(n)] = n
	}
	var numbers []int
	for _, m := range server.Messages(s.t, "EBB") {
		n, ok := byBody[string(m.Data)]
		if !ok {
			s.t.Fatalf("a message of no row: %q", m.Data)
		}
		numbers = append(numbers, n)
	}
	return numbers
}

// once checks that the stream holds every row exactly once.
func (s *ownSite) once(server *natstest.Server) {
	s.t.Helper()
	numbers := s.numbers(server)
	slices.Sort(numbers)
	for i, n := range numbers {
		if n != i+1 {
			s.t.Fatalf("the stream does not hold every row once: at %d it has row %d", i+1, n)
		}
	}
	if len(numbers) != s.next-1 {
		s.t.Fatalf("the stream holds %d rows, want %d", len(numbers), s.next-1)
	}
}

// forEach runs a test with each ready mapping.
func forEach(t *testing.T, test func(t *testing.T, r ready, server *natstest.Server)) {
	for _, r := range readyMappings {
		t.Run(r.title, func(t *testing.T) {
			t.Parallel()
			test(t, r, natstest.New(t))
		})
	}
}

// Rows come as the mapping says, those from before the slot as well where it says so, and are marked or deleted.
func TestReadyMappings(t *testing.T) {
	forEach(t, func(t *testing.T, r ready, server *natstest.Server) {
		s := newOwnSite(t, r, server.URL())
		before := 0
		if r.all {
			before = 3
			s.add(before)
		}
		s.setup(t)
		bridge := s.streaming(t)
		delivered(t, server, 40*time.Second, before)
		s.add(4)
		delivered(t, server, 40*time.Second, before+4)
		s.recorded(0)
		bridge.stop(t)
		for i, m := range server.Messages(t, "EBB") {
			s.check(m, i+1)
			position := m.Header.Get("Ebb-Position")
			if _, err := event.ParsePosition(position); err != nil {
				t.Error(err)
			}
			switch origin := m.Header.Get("Ebb-Origin"); {
			case i < before && origin != "recovered", i >= before && origin != "":
				t.Errorf("row %d has origin %q", i+1, origin)
			case i >= before && r.id == nil && m.Header.Get("ce-id") != position:
				t.Errorf("row %d has id %q and position %q", i+1, m.Header.Get("ce-id"), position)
			}
		}
	})
}

// A lost slot loses no row and doubles none.
func TestOwnTableSurvivesTheLossOfItsSlot(t *testing.T) {
	forEach(t, func(t *testing.T, r ready, server *natstest.Server) {
		s := newOwnSite(t, r, server.URL())
		s.setup(t)
		bridge := s.streaming(t)
		s.add(5)
		delivered(t, server, 40*time.Second, 5)
		bridge.kill() // some may not be marked
		s.add(5)
		s.dropSlot()
		s.add(5)
		bridge = s.run(t)
		delivered(t, server, 30*time.Second, 15)
		s.recorded(0)
		s.add(1)
		delivered(t, server, 40*time.Second, 16)
		bridge.stop(t)
		s.once(server)
	})
}

// dropSlot drops the slot, and the trailing one, from which it would come back.
func (s *ownSite) dropSlot() {
	s.t.Helper()
	pgtest.Eventually(s.t, 30*time.Second, func() (bool, string) {
		return pgtest.Value[int64](s.t, s.db, "SELECT count(*) FROM pg_replication_slots WHERE slot_name = $1 AND NOT active", s.db.Name) == 1, "the slot is active"
	})
	s.db.Exec(s.t, fmt.Sprintf("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name IN ('%[1]s', '%[1]s_trail')", s.db.Name))
}

// Kills in the middle of delivery, marking and recovery: every row is in the stream once, and all are recorded in the end.
func TestOwnTableSurvivesKills(t *testing.T) {
	forEach(t, func(t *testing.T, r ready, server *natstest.Server) {
		s := newOwnSite(t, r, server.URL())
		s.setup(t)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		added := make(chan error, 1)
		go func() {
			added <- func() error {
				conn, err := pgx.Connect(t.Context(), s.db.URL)
				if err != nil {
					return err
				}
				defer conn.Close(t.Context())
				for ctx.Err() == nil {
					for range 1 + s.next%7 {
						if _, err := conn.Exec(t.Context(), s.row(s.next)); err != nil {
							return err
						}
						s.next++
					}
					time.Sleep(time.Millisecond)
				}
				return nil
			}()
		}()
		for i := range 9 {
			bridge := s.run(t)
			time.Sleep(time.Duration(250+70*i) * time.Millisecond)
			bridge.kill()
			if i%3 == 2 {
				s.dropSlot()
			}
		}
		bridge := s.streaming(t)
		cancel()
		if err := <-added; err != nil {
			t.Fatal(err)
		}
		t.Logf("%d rows", s.next-1)
		delivered(t, server, 60*time.Second, s.next-1)
		s.recorded(0)
		bridge.stop(t)
		s.once(server)
	})
}

// start: now leaves rows that are there, where they can never be taken for undelivered ones; where they can, setup refuses.
func TestOwnTableStart(t *testing.T) {
	r := readyMappings[1]
	server := natstest.New(t)
	s := newOwnSite(t, r, server.URL())
	s.add(1)
	s.ebb(t, "setup").fails(t, 1, "public.outbox", "start: all", "delete them yourself")

	s = newOwnSite(t, r, server.URL(), "delivered: delete", "delivered: keep")
	s.add(2)
	s.setup(t)
	bridge := s.streaming(t)
	s.add(1)
	delivered(t, server, 40*time.Second, 1)
	bridge.stop(t)
	s.check(server.Messages(t, "EBB")[0], 3)

	server = natstest.New(t)
	s = newOwnSite(t, r, server.URL(), "delivered: delete", "start: all")
	s.add(2)
	s.setup(t)
	bridge = s.streaming(t)
	s.add(1)
	delivered(t, server, 40*time.Second, 3)
	bridge.stop(t)
	s.once(server)
	// It has started: a slot that is made anew has nothing to tell of rows that are kept.
	s.dropSlot()
	bridge = s.streaming(t)
	s.add(1)
	delivered(t, server, 40*time.Second, 4)
	bridge.stop(t)
	if !strings.Contains(bridge.stderr.String(), "events of a table were lost") {
		t.Error("it was not said that events may be lost")
	}
}

// Several tables and the managed one: in commit order, whatever they are of.
func TestSeveralTables(t *testing.T) {
	server := natstest.New(t)
	db := pgtest.New(t)
	db.Exec(t, `CREATE TABLE marked (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), n int NOT NULL, done boolean)`,
		`CREATE TABLE gone (n int, part int, PRIMARY KEY (n, part)) PARTITION BY LIST (part)`,
		`CREATE TABLE gone_1 PARTITION OF gone FOR VALUES IN (1)`, `CREATE TABLE gone_0 PARTITION OF gone DEFAULT`,
		`CREATE SCHEMA "Other"`, `CREATE TABLE "Other"."Kept" (n int)`)
	s := newSite(t, db, server.URL(), "buffers:", "  - table: ebb.buffer",
		"  - {table: marked, id: id, topic: {value: marked}, delivered: mark, recorded: done}",
		"  - {table: gone, topic: {value: gone}, delivered: delete}",
		`  - {table: '"Other"."Kept"', topic: {value: kept}}`)
	s.setup(t)
	if r := s.ebb(t, "setup").must(t); r.stdout != "everything is set up already\n" {
		t.Errorf("a second setup did: %s", r.stdout)
	}
	bridge := s.streaming(t)
	const rounds = 50
	for n := range rounds {
		db.Exec(t, fmt.Sprintf(`BEGIN; INSERT INTO marked (n) VALUES (%d); INSERT INTO gone VALUES (%[1]d, 1), (%[1]d, 2);
			SELECT ebb.put('managed', '{"n":%[1]d}'); INSERT INTO "Other"."Kept" VALUES (%[1]d); COMMIT`, n))
	}
	delivered(t, server, 40*time.Second, 5*rounds)
	pgtest.Eventually(t, 30*time.Second, func() (bool, string) {
		left := pgtest.Value[int64](t, db, "SELECT (SELECT count(*) FROM marked WHERE done IS NOT TRUE) + (SELECT count(*) FROM gone)")
		return left == 0, fmt.Sprintf("%d rows are left", left)
	})
	bridge.stop(t)
	topics := []string{"marked", "gone", "gone", "managed", "kept"}
	for i, m := range server.Messages(t, "EBB") {
		var payload struct{ N int }
		if err := json.Unmarshal(m.Data, &payload); err != nil {
			t.Fatal(err)
		}
		if m.Header.Get("ce-type") != topics[i%5] || payload.N != i/5 {
			t.Fatalf("message %d is %s of round %d", i+1, m.Header.Get("ce-type"), payload.N)
		}
	}
}

// A locked row holds up neither delivery nor other rows.
func TestLockedRow(t *testing.T) {
	for _, r := range readyMappings[:2] {
		server := natstest.New(t)
		s := newOwnSite(t, r, server.URL())
		s.setup(t)
		s.add(1)
		conn := s.db.Connect(t)
		table := map[bool]string{true: "membership", false: "outbox"}[r.id == nil]
		if _, err := conn.Exec(t.Context(), "BEGIN; SELECT FROM "+table+" FOR UPDATE"); err != nil {
			t.Fatal(err)
		}
		bridge := s.streaming(t)
		delivered(t, server, 40*time.Second, 1)
		before := s.confirmed(t)
		s.add(20)
		delivered(t, server, 40*time.Second, 21)
		s.recorded(1)
		if now := s.confirmed(t); now != before {
			t.Errorf("confirmed %s while a delivered row is not recorded, before that %s", now, before)
		}
		if _, err := conn.Exec(t.Context(), "ROLLBACK"); err != nil {
			t.Fatal(err)
		}
		s.recorded(0)
		s.confirms(t, 40*time.Second)
		bridge.stop(t)
		s.once(server)
	}
}

// A bridge that is told to stop records what it has delivered before it ends.
func TestOwnTableIsRecordedAtTheEnd(t *testing.T) {
	forEach(t, func(t *testing.T, r ready, server *natstest.Server) {
		s := newOwnSite(t, r, server.URL())
		data, err := os.ReadFile(s.config)
		if err != nil {
			t.Fatal(err)
		}
		// No tick is to come in time.
		if err := os.WriteFile(s.config, bytes.ReplaceAll(data, []byte("every: 100ms"), []byte("every: 1m")), 0o644); err != nil {
			t.Fatal(err)
		}
		s.setup(t)
		bridge := s.streaming(t)
		s.add(1200)
		delivered(t, server, 40*time.Second, 1200)
		bridge.stop(t)
		if left := pgtest.Value[int64](t, s.db, s.left); left != 0 {
			t.Errorf("%d rows are not recorded", left)
		}
	})
}

// Over HTTP, whoever is killed between delivery and mark sends again what is not marked, and marks it.
func TestOwnTableOverHTTP(t *testing.T) {
	var mu sync.Mutex
	got := map[string]int{}
	receiver := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		got[r.Header.Get("ce-id")]++
	}))
	defer receiver.Close()
	s := newOwnSite(t, readyMappings[3], receiver.URL)
	s.setup(t)
	for i := range 6 {
		bridge := s.streaming(t)
		s.add(50)
		time.Sleep(time.Duration(i*30) * time.Millisecond)
		bridge.kill()
	}
	bridge := s.streaming(t)
	s.recorded(0)
	s.confirms(t, 40*time.Second)
	bridge.stop(t)
	mu.Lock()
	defer mu.Unlock()
	for n := 1; n < s.next; n++ {
		if got[s.id(n)] == 0 {
			t.Errorf("row %d was not delivered", n)
		}
	}
}

// setup --print says what it cannot know without the database, and teardown leaves nothing behind.
func TestOwnTablesSetUpAndTornDown(t *testing.T) {
	s := newOwnSite(t, readyMappings[3], "stdout")
	if r := s.ebb(t, "setup", "--print").must(t); !strings.Contains(r.stdout, `Setup looks up "app"."messages"`) || strings.Contains(r.stdout, "CREATE PUBLICATION") {
		t.Errorf("printed %s", r.stdout)
	}
	s.setup(t)
	s.ebb(t, "teardown", "--yes").must(t)
	if n := pgtest.Value[int64](t, s.db, "SELECT count(*) FROM information_schema.role_table_grants WHERE grantee = 'ebb_bridge'"); n != 0 {
		t.Errorf("%d rights are left", n)
	}
	s.add(1)
}

// Doctor finds what a bridge would end with, and a table that is given up is limited no more.
func TestDoctorAndFlowOfOwnTables(t *testing.T) {
	t.Parallel()
	s := newOwnSite(t, readyMappings[3], "stdout")
	s.setup(t)
	found(t, s.doctor(t, exitOK), "tables", stateOK, "app.messages")
	name := s.db.Name + "_r"
	s.db.Exec(t, "CREATE ROLE "+name+" LOGIN REPLICATION IN ROLE ebb_bridge", "REVOKE UPDATE (sent_at) ON app.messages FROM ebb_bridge")
	findings := s.doctor(t, exitCheck, "--postgres", s.urlOf(name))
	found(t, findings, "tables", stateFail, "app.messages", `GRANT UPDATE ("sent_at")`)
	if f := findings["publication"]; f.State != stateSkipped {
		t.Errorf("publication: %+v", f)
	}
	s.setup(t)
	found(t, s.doctor(t, exitOK, "--postgres", s.urlOf(name)), "tables", stateOK)
	s.db.Exec(t, "ALTER TABLE app.messages DROP COLUMN sent_at")
	found(t, s.doctor(t, exitCheck), "tables", stateFail, `no column "sent_at"`)
	s.db.Exec(t, "ALTER TABLE app.messages ADD COLUMN sent_at timestamptz")

	s.db.Exec(t, "SELECT ebb.limit_inserts(true, 'app.messages')", "UPDATE ebb.flow SET limit_bytes = 1")
	pgtest.Eventually(t, 30*time.Second, func() (bool, string) {
		_, err := s.db.Connect(t).Exec(t.Context(), s.row(1))
		return err != nil && strings.Contains(err.Error(), "the event buffer is full"), fmt.Sprintf("the insert ended with %v", err)
	})
	site := newSite(t, s.db, "stdout")
	site.setup(t)
	s.db.Exec(t, "UPDATE ebb.flow SET limit_bytes = 1")
	s.add(1)
}
