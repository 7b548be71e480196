package sql_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"ebb/event"
	"ebb/internal/pgtest"
	"ebb/sql"
)

// deadFixture is a database with a slot, and a session.
func deadFixture(t *testing.T) (*pgtest.Database, *pgx.Conn, sql.SlotRecord) {
	t.Helper()
	db := pgtest.New(t)
	apply(t, db, setup)
	return db, db.Connect(t), slot(t, db, "s", pgtest.Value[string](t, db, "SELECT system_identifier::text FROM pg_control_system()"))
}

// letterAt is one of a key, "" for none, at an index of the only transaction of an epoch.
func letterAt(epoch uint32, index uint64, key string) sql.Letter {
	l := sql.Letter{ID: fmt.Sprint(index), Topic: "t", Payload: []byte("{}"), ContentType: "application/json", Time: time.Unix(0, 0).UTC(),
		Position: event.Position{Epoch: epoch, Commit: 100, Index: index}, Reason: "queued"}
	if key != "" {
		l.Key = &key
	}
	return l
}

func store(t *testing.T, conn *pgx.Conn, r sql.SlotRecord, letters ...sql.Letter) {
	t.Helper()
	if err := sql.StoreLetters(t.Context(), conn, r, letters); err != nil {
		t.Fatal(err)
	}
}

// queue returns what is kept: for each row state, id, epoch and reason, in order.
func queue(t *testing.T, db *pgtest.Database) []string {
	t.Helper()
	return pgtest.Value[[]string](t, db, "SELECT coalesce(array_agg(concat_ws(' ', state, event_id, epoch, reason) ORDER BY number), '{}') FROM ebb.dead_letter")
}

// next returns the next events of a key.
func next(t *testing.T, conn *pgx.Conn, key string, most int) sql.Next {
	t.Helper()
	n, err := sql.NextLetters(t.Context(), conn, "s", []sql.Queue{{Key: &key}}, []int{most}, 1<<20, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	return n[0]
}

// A bridge that has lost the lead, and does not know yet, writes nothing.
func TestDeadLettersOfALaterTerm(t *testing.T) {
	db, conn, r := deadFixture(t)
	store(t, conn, r, letterAt(1, 1, "a"))
	later, err := sql.TakeTerm(t.Context(), conn, "s")
	if err != nil {
		t.Fatal(err)
	}
	before := queue(t, db)
	number := pgtest.Value[int64](t, db, "SELECT number FROM ebb.dead_letter")
	for what, err := range map[string]error{
		"letters":   sql.StoreLetters(t.Context(), conn, r, []sql.Letter{letterAt(1, 2, "b"), letterAt(2, 1, "a")}),
		"attempts":  sql.StoreAttempts(t.Context(), conn, r, "d", []sql.Attempt{{Number: number, Delivered: true}}),
		"found":     sql.MarkRetried(t.Context(), conn, r, "d", []sql.Retried{{ID: "1", Epoch: 1, Seq: 1}}),
		"forgotten": sql.RetryForgotten(t.Context(), conn, r, "d", 0),
	} {
		if !errors.Is(err, sql.ErrSuperseded) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if got := queue(t, db); !slices.Equal(got, before) {
		t.Errorf("%q, and there was %q", got, before)
	}
	// And one that is about to write when the lead is taken has written when it is.
	tx, err := db.Connect(t).Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := sql.StoreLetters(t.Context(), tx.Conn(), later, []sql.Letter{letterAt(1, 3, "a")}); err != nil {
		t.Fatal(err)
	}
	taken := make(chan error)
	go func() {
		_, err := sql.TakeTerm(t.Context(), conn, "s")
		taken <- err
	}()
	pgtest.Eventually(t, time.Minute, func() (bool, string) {
		return pgtest.Value[bool](t, db, "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND pid = $1)", conn.PgConn().PID()), "the lead does not wait"
	})
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := <-taken; err != nil {
		t.Fatal(err)
	}
	if held, err := sql.HeldKeys(t.Context(), conn, "s"); err != nil || len(held) != 1 {
		t.Errorf("%v, %v", held, err)
	}
}

// Whatever an event holds comes back as it was.
func TestDeadLettersComeBackAsTheyWere(t *testing.T) {
	encodings := map[string]func(t *testing.T) *pgtest.Database{
		"UTF8": func(t *testing.T) *pgtest.Database { return pgtest.New(t) },
		"LATIN1": func(t *testing.T) *pgtest.Database {
			server := pgtest.New(t)
			name := server.Name + "_l1"
			server.Exec(t, "CREATE DATABASE "+name+" ENCODING 'LATIN1' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'")
			t.Cleanup(func() { server.Exec(t, "DROP DATABASE "+name+" WITH (FORCE)") })
			return &pgtest.Database{Name: name, URL: strings.Replace(server.URL, "/"+server.Name, "/"+name, 1)}
		},
	}
	for encoding, open := range encodings {
		t.Run(encoding, func(t *testing.T) {
			db := open(t)
			apply(t, db, setup)
			r := slot(t, db, "s", "1")
			conn, err := sql.Connect(t.Context(), db.URL, "test")
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close(t.Context())
			key, empty := "kéy", ""
			h := func(name, value string) event.Header { return event.Header{Name: []byte(name), Value: []byte(value)} }
			const js = "application/json"
			letters := []sql.Letter{
				{Payload: []byte("{ \"b\" :1,\n\t\"a\":  [ ] , \"b\": 2 }"), ContentType: js},
				{Payload: []byte(`{"nul": "\u0000", "half": "\ud800"}`), ContentType: js, Key: &empty},
				{Payload: []byte(`"中 😀"`), ContentType: js}, // LATIN1 has no such characters
				{Payload: []byte(strings.Repeat("[", 9000) + strings.Repeat("]", 9000)), ContentType: js},
				{Payload: []byte(strings.Repeat("[", 200_000) + strings.Repeat("]", 200_000)), ContentType: js},
				{Payload: []byte(`{"not": json`), ContentType: js},
				{Payload: []byte("\"\xff\""), ContentType: js},
				{Payload: []byte("{\"a\":\x00}"), ContentType: js},
				{Payload: []byte("1e999999999"), ContentType: js},
				{Payload: []byte{}, ContentType: js},
				{Payload: []byte("plain \x00 \xff bytes"), ContentType: "application/octet-stream"},
				{Payload: []byte(`{"json": "as text"}`), ContentType: "text/plain; charset=utf-8"},
				{Payload: []byte{}, Topic: "", ContentType: ""},
				{Fault: "there is no payload", ContentType: js},
				{Payload: []byte("{}"), ContentType: js, Key: &key, Topic: "tøpic", Reason: "ä", Detail: "中 \x00 \xff",
					Headers: sql.HeadersJSON([]event.Header{h("z", "1"), h("a", "é\"\\<&>\n"), h("z", "2"), h("", "")})},
				{Payload: []byte("{}"), ContentType: js, Headers: sql.HeadersJSON([]event.Header{h("h", "\x00 中 😀")})},
			}
			var queues []sql.Queue
			var most []int
			for i := range letters {
				l := &letters[i]
				l.ID, l.Time = fmt.Sprint("ïd", i), time.Unix(1, 234567000).UTC()
				l.Position, l.Replay, l.Retry = event.Position{Epoch: 3, Commit: event.LSN(i), Index: 1 << 60}, int64(i), true
			}
			store(t, conn, r, letters...)
			numbers := pgtest.Value[[]int64](t, db, "SELECT array_agg(number ORDER BY number) FROM ebb.dead_letter")
			for i, n := range numbers {
				queues, most = append(queues, sql.Queue{Key: letters[i].Key, Number: n}), append(most, 100)
			}
			got, err := sql.NextLetters(t.Context(), conn, "s", queues, most, 1<<20, 1<<30)
			if err != nil {
				t.Fatal(err)
			}
			for i := range letters {
				if len(got[i].Letters) != 1 {
					t.Errorf("%d letters came back of number %d", len(got[i].Letters), i)
					continue
				}
				back, want := got[i].Letters[0].Letter, letters[i]
				back.Time = back.Time.UTC()
				want.Reason, want.Detail, want.Retry = "", "", false // of these, what is read says nothing
				if encoding == "LATIN1" && back.Headers != nil && want.Headers != nil {
					back.Headers, want.Headers = unescaped(t, back.Headers), unescaped(t, want.Headers)
				}
				if diff := cmp.Diff(want, back); diff != "" {
					t.Errorf("number %d: %.2000s", i, diff)
				}
			}
			// JSON can be read as such.
			if n := pgtest.Value[int64](t, db, "SELECT count(payload) FROM ebb.dead_letter WHERE content_type = 'application/json'"); n < 5 || encoding == "UTF8" && n < 6 {
				t.Errorf("%d payloads are JSON", n)
			}
		})
	}
}

// unescaped is a JSON object of strings, with characters instead of escapes.
func unescaped(t *testing.T, object []byte) []byte {
	t.Helper()
	var out []byte
	decoder := json.NewDecoder(bytes.NewReader(object))
	for {
		token, err := decoder.Token()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		out = fmt.Appendf(out, "%q ", token)
	}
}

// An event that comes by again stays where it is, unless that was in an earlier epoch and it is not discarded.
func TestDeadLettersComeByAgain(t *testing.T) {
	db, conn, r := deadFixture(t)
	bad := letterAt(1, 1, "a")
	bad.Reason, bad.Attempts = "status 400", 2
	store(t, conn, r, bad, letterAt(1, 2, "a"), letterAt(1, 3, "a"), letterAt(1, 4, "b"), letterAt(1, 5, "c"))
	store(t, conn, r, letterAt(1, 1, "a"), letterAt(1, 6, "a"), letterAt(1, 2, "a"), letterAt(1, 6, "a"))
	db.Exec(t, "UPDATE ebb.dead_letter SET state = 'delivered' WHERE event_id = '4'; UPDATE ebb.dead_letter SET state = 'discarded' WHERE event_id = '5'")
	store(t, conn, r, letterAt(1, 4, "b"), letterAt(1, 5, "c"))
	want := []string{"parked 1 1 status 400", "parked 2 1 queued", "parked 3 1 queued", "delivered 4 1 queued", "discarded 5 1 queued", "parked 6 1 queued"}
	if diff := cmp.Diff(want, queue(t, db)); diff != "" {
		t.Errorf("in the same epoch: %s", diff)
	}
	again := letterAt(2, 4, "b")
	again.Retry, again.Replay = true, 7
	alone := letterAt(1, 7, "")
	store(t, conn, r, alone)
	alone.Position.Epoch, alone.Retry = 2, true
	store(t, conn, r, letterAt(2, 1, "a"), letterAt(2, 2, "a"), again, letterAt(2, 5, "c"), alone)
	want = []string{"parked 3 1 queued", "discarded 5 1 queued", "parked 6 1 queued", "parked 1 2 status 400", "parked 2 2 queued", "retrying 4 2 queued",
		"parked 7 2 queued"}
	if diff := cmp.Diff(want, queue(t, db)); diff != "" {
		t.Errorf("in a later epoch: %s", diff)
	}
	if got := pgtest.Value[string](t, db, "SELECT concat_ws(' ', attempts, position, replay) FROM ebb.dead_letter WHERE event_id = '1'"); got != "2 2:0/64:1 0" {
		t.Errorf("the first one is %s", got)
	}
	if got := pgtest.Value[string](t, db, "SELECT concat_ws(' ', attempts, position, replay) FROM ebb.dead_letter WHERE event_id = '4'"); got != "0 2:0/64:4 7" {
		t.Errorf("the one that had been delivered is %s", got)
	}
}

// What was mended in an event stays when that comes by again, with the fault that it has in the log.
func TestMendedLettersStay(t *testing.T) {
	db, conn, r := deadFixture(t)
	faulty := func(epoch uint32, index uint64, key string) sql.Letter {
		l := letterAt(epoch, index, key)
		l.Topic, l.Payload, l.Fault, l.Reason, l.Detail = "", nil, "topic is NULL", "impossible event", "topic is NULL"
		return l
	}
	for i, name := range []string{"1 a", "2 b", "3 ", "4 ", "5 c", "6 ", "7 d"} { // all but "5" are mended
		_, key, _ := strings.Cut(name, " ")
		store(t, conn, r, faulty(1, uint64(i+1), key))
	}
	db.Exec(t, "UPDATE ebb.dead_letter SET fault = CASE WHEN event_id = '1' THEN '' END, topic = 't', payload = '\"mended\"', headers = '{\"h\": \"v\"}', content_type = 'text/json' WHERE event_id <> '5'",
		"UPDATE ebb.dead_letter SET state = 'delivered' WHERE event_id IN ('2', '3')", "UPDATE ebb.dead_letter SET state = 'retrying' WHERE event_id = '4'",
		"UPDATE ebb.dead_letter SET key = 'other' WHERE event_id IN ('6', '7')") // which does not last
	later := faulty(2, 1, "a")
	later.Reason = "queued"
	passed, passedKeyed := faulty(2, 6, ""), faulty(2, 7, "d")
	passed.Reason, passed.Retry, passedKeyed.Reason, passedKeyed.Retry = "queued", true, "queued", true
	store(t, conn, r, later, faulty(2, 2, "b"), faulty(2, 3, ""), faulty(2, 4, ""), faulty(2, 5, "c"), passed, passedKeyed)
	got := pgtest.Value[[]string](t, db, "SELECT array_agg(concat_ws(' ', event_id, state, topic, key, coalesce(payload::text, '-'), headers, content_type, coalesce(nullif(fault, ''), '-'), "+
		"epoch, reason, detail) ORDER BY number) FROM ebb.dead_letter")
	const content, again = `"mended" {"h": "v"} text/json - 2 impossible event `, "what is kept here is not what the row says, and can be retried as it is"
	want := []string{"1 parked t a " + content + "topic is NULL", "2 parked t b " + content + again, "3 parked t " + content + again, "4 retrying t " + content + again,
		"5 parked  c - application/json topic is NULL 2 impossible event topic is NULL", "6 parked t " + content + "topic is NULL", "7 parked t d " + content + "topic is NULL"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// What comes of attempts at one key changes nothing of others.
func TestAttemptsAtDeadLetters(t *testing.T) {
	db, conn, r := deadFixture(t)
	long := strings.Repeat("é", 5000)
	for i, key := range []string{"a", "b", long, long + "x", ""} {
		first := letterAt(1, uint64(i)*10, key)
		first.Retry = true
		store(t, conn, r, first, letterAt(1, uint64(i)*10+1, key), letterAt(1, uint64(i)*10+2, key))
	}
	db.Exec(t, "UPDATE ebb.dead_letter SET state = 'retrying'")
	held, err := sql.HeldKeys(t.Context(), conn, "s")
	if err != nil || len(held) != 4 || slices.ContainsFunc(held, func(h sql.Held) bool { return !h.Retrying }) {
		t.Fatalf("%d keys are held, %v", len(held), err)
	}
	number := func(id int) int64 {
		return pgtest.Value[int64](t, db, "SELECT number FROM ebb.dead_letter WHERE event_id = $1", fmt.Sprint(id))
	}
	a, b := "a", "b"
	if err := sql.StoreAttempts(t.Context(), conn, r, "d", []sql.Attempt{
		{Number: number(0), Delivered: true, Seq: 17},
		{Number: number(1), Key: &a, Rejected: true, Reason: "status 400", Detail: "no\x00", Attempts: 1},
		{Number: number(10), Key: &b, Reason: "status 500", Attempts: 1},
		{Number: number(20), Key: &long, Rejected: true, Reason: "status 400", Attempts: 1},
		{Number: number(40), Rejected: true, Reason: "status 400", Attempts: 1},
		{Number: number(41), Delivered: true},
	}); err != nil {
		t.Fatal(err)
	}
	want := []string{"delivered 0 1 queued", "parked 1 1 status 400", "parked 2 1 queued", "retrying 10 1 status 500", "retrying 11 1 queued", "retrying 12 1 queued",
		"parked 20 1 status 400", "parked 21 1 queued", "parked 22 1 queued", "retrying 30 1 queued", "retrying 31 1 queued", "retrying 32 1 queued",
		"parked 40 1 status 400", "delivered 41 1 queued", "retrying 42 1 queued"}
	if diff := cmp.Diff(want, queue(t, db)); diff != "" {
		t.Error(diff)
	}
	for key, n := range map[string]int{"a": 0, "b": 3, long: 0, long + "x": 3} {
		if got := next(t, conn, key, 100); len(got.Letters) != n || got.Parked != (n == 0) || !got.Read {
			t.Errorf("%d letters of key %.10q come next, parked %v, want %d", len(got.Letters), key, got.Parked, n)
		}
	}
	// A letter gets the state of its queue.
	store(t, conn, r, letterAt(1, 3, "a"), letterAt(1, 13, "b"), letterAt(1, 23, long))
	if got := queue(t, db)[15:]; !slices.Equal(got, []string{"parked 3 1 queued", "retrying 13 1 queued", "parked 23 1 queued"}) {
		t.Errorf("behind their queues are %q", got)
	}
	// What is found, and what is forgotten.
	if err := sql.MarkRetried(t.Context(), conn, r, "d", []sql.Retried{{ID: "10", Seq: 20, Epoch: 1}, {ID: "11", Seq: 21, Epoch: 2}, {ID: "0", Seq: 22, Epoch: 1}}); err != nil {
		t.Fatal(err)
	}
	if err := sql.RetryForgotten(t.Context(), conn, r, "d", 20); err != nil {
		t.Fatal(err)
	}
	if got := queue(t, db)[:5]; !slices.Equal(got, []string{"delivered 0 1 queued", "parked 1 1 status 400", "parked 2 1 queued", "delivered 10 1 status 500", "retrying 11 1 queued"}) {
		t.Errorf("then %q", got)
	}
	if err := sql.RetryForgotten(t.Context(), conn, r, "other", 0); err != nil {
		t.Fatal(err)
	}
	if n := pgtest.Value[int64](t, db, "SELECT count(*) FROM ebb.dead_letter WHERE state = 'delivered' AND stream_seq IS NOT NULL"); n != 2 {
		t.Errorf("%d are delivered after another destination has forgotten everything, want 2", n)
	}
	// What is parked in the middle of a queue holds up what is behind it.
	db.Exec(t, "UPDATE ebb.dead_letter SET state = 'parked' WHERE event_id = '31'")
	if got := next(t, conn, long+"x", 100); len(got.Letters) != 1 || got.Parked {
		t.Errorf("%d letters come before one that is parked", len(got.Letters))
	}
}

// What is read at once is bounded, for each queue and for all of them.
func TestDeadLettersAreReadInBatches(t *testing.T) {
	db, conn, r := deadFixture(t)
	x, y := "x", "y"
	for i := range 8 {
		l := letterAt(1, uint64(i), x)
		if l.Payload = []byte(`"` + strings.Repeat("p", 998) + `"`); i%4 == 3 {
			l.Payload, l.ContentType = l.Payload[1:999], "text/plain"
		}
		if l.Retry = true; i >= 4 {
			l.Key = &y
		}
		store(t, conn, r, l)
	}
	store(t, conn, r, letterAt(1, 9, ""))
	gone, alone := "gone", pgtest.Value[int64](t, db, "SELECT max(number) FROM ebb.dead_letter")
	for _, c := range []struct {
		most, each, all int
		want            string
	}{
		{100, 1 << 20, 1 << 20, "4 4 empty parked"},
		{3, 1 << 20, 1 << 20, "3 3 empty parked"},
		{1, 1 << 20, 1 << 20, "1 1 empty parked"},
		{100, 1500, 1 << 20, "2 2 empty parked"},
		{100, 1, 1 << 20, "1 1 empty parked"},
		{100, 1500, 4500, "2 1 unread unread"},
		{100, 1500, 1, "1 unread unread unread"},
	} {
		queues := []sql.Queue{{Key: &x}, {Key: &y}, {Key: &gone}, {Number: alone}}
		got, err := sql.NextLetters(t.Context(), conn, "s", queues, []int{c.most, c.most, c.most, c.most}, c.each, c.all)
		if err != nil {
			t.Fatal(err)
		}
		var words []string
		for _, n := range got {
			switch {
			case !n.Read:
				words = append(words, "unread")
			case n.Parked:
				words = append(words, "parked")
			case len(n.Letters) == 0:
				words = append(words, "empty")
			default:
				words = append(words, fmt.Sprint(len(n.Letters)))
			}
		}
		if got := strings.Join(words, " "); got != c.want {
			t.Errorf("at most %d, %d bytes and %d in all: %s, want %s", c.most, c.each, c.all, got, c.want)
		}
	}
}

// Delivered letters are removed, but for those that may be needed.
func TestDeadLettersAreCollected(t *testing.T) {
	db, conn, r := deadFixture(t)
	for i := range 8 {
		store(t, conn, r, letterAt(1, uint64(i), ""))
	}
	late := letterAt(1, 8, "")
	late.Position.Commit = 200
	store(t, conn, r, late)
	db.Exec(t, `UPDATE ebb.dead_letter SET state = 'delivered', last_at = now() - interval '2 hours' WHERE event_id <> '0';
		UPDATE ebb.dead_letter SET state = 'discarded' WHERE event_id = '1';
		UPDATE ebb.dead_letter SET last_at = now() WHERE event_id = '2';
		UPDATE ebb.dead_letter SET stream_seq = 10, destination = 'd' WHERE event_id = '3';
		UPDATE ebb.dead_letter SET stream_seq = 11, destination = 'd' WHERE event_id = '4'`)
	if _, err := sql.StoreTick(t.Context(), conn, r, sql.Tick{LSN: 1, Snapshot: "1:1:", StreamSeq: 10, Destination: "d"}, time.Hour); err != nil {
		t.Fatal(err)
	}
	db.Exec(t, "UPDATE ebb.tick SET delivered_at = now() - interval '90 minutes'")
	collect := func(limit int, want int64) {
		t.Helper()
		if n, err := sql.CollectLetters(t.Context(), conn, r, 150, time.Hour, limit); n != want || err != nil {
			t.Errorf("removed %d of at most %d, %v; want %d", n, limit, err, want)
		}
	}
	collect(3, 3)
	collect(100, 1)
	collect(100, 0)
	want := []string{"parked 0", "discarded 1", "delivered 2", "delivered 4", "delivered 8"}
	got := pgtest.Value[[]string](t, db, "SELECT array_agg(state || ' ' || event_id ORDER BY number) FROM ebb.dead_letter")
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// Many letters, of one key and of many, take no time that grows with them.
func TestManyDeadLetters(t *testing.T) {
	db, conn, r := deadFixture(t)
	db.Exec(t, `INSERT INTO ebb.dead_letter (slot, event_id, topic, key, payload, content_type, event_time, position, place, epoch, reason, attempts, first_at, last_at, state)
		SELECT 's', i, 't', CASE WHEN i <= 100000 THEN 'hot' ELSE 'k' || i END, '{}', 'application/json', now(), '1:0/64:' || i, '0/64:' || i, 1, 'queued', 0, now(), now(),
			CASE WHEN i % 2 = 0 AND i > 100000 THEN 'parked' ELSE 'retrying' END
		FROM generate_series(1, 110000) i`, "ANALYZE ebb.dead_letter")
	fast := func(what string, limit time.Duration, do func() error) {
		t.Helper()
		began := time.Now()
		if err := do(); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		took := time.Since(began)
		t.Logf("%s: %s", what, took.Round(time.Microsecond))
		if took > limit {
			t.Errorf("%s takes %s", what, took)
		}
	}
	statistics := func() int64 {
		t.Helper()
		if _, err := conn.Exec(t.Context(), "SELECT pg_stat_force_next_flush()"); err != nil {
			t.Fatal(err)
		}
		return pgtest.Value[int64](t, db, "SELECT seq_scan FROM pg_stat_user_tables WHERE relname = 'dead_letter'")
	}
	before := statistics()
	fast("the keys", 5*time.Second, func() error {
		held, err := sql.HeldKeys(t.Context(), conn, "s")
		if len(held) != 10_001 {
			t.Errorf("%d keys are held", len(held))
		}
		return err
	})
	var queues []sql.Queue
	var most []int
	for i := range 32 {
		key := fmt.Sprint("k", 100_001+i*2)
		queues, most = append(queues, sql.Queue{Key: &key}), append(most, 100)
	}
	fast("the next ones of 32 queues", time.Second, func() error {
		n, err := sql.NextLetters(t.Context(), conn, "s", queues, most, 1<<20, 1<<20)
		if len(n) != 32 || len(n[31].Letters) != 1 {
			t.Errorf("%d queues", len(n))
		}
		return err
	})
	fast("the next ones of one queue", time.Second, func() error {
		if n := next(t, conn, "hot", 100); len(n.Letters) != 100 || n.Letters[99].ID != "100" {
			t.Errorf("%d letters come next", len(n.Letters))
		}
		return nil
	})
	var letters []sql.Letter
	for i := range 1000 {
		letters = append(letters, letterAt(1, uint64(200_000+i), "hot"))
	}
	fast("a thousand more", 5*time.Second, func() error { return sql.StoreLetters(t.Context(), conn, r, letters) })
	fast("the same once more", 5*time.Second, func() error { return sql.StoreLetters(t.Context(), conn, r, letters) })
	var attempts []sql.Attempt
	for i := range 1000 {
		attempts = append(attempts, sql.Attempt{Number: int64(i + 1), Delivered: true})
	}
	fast("a thousand delivered", 5*time.Second, func() error { return sql.StoreAttempts(t.Context(), conn, r, "d", attempts) })
	fast("those that come by again", time.Second, func() error {
		return sql.PassedLetters(t.Context(), conn, "s", 101, false, func(p sql.PassedLetter) { t.Errorf("%v", p) })
	})
	fast("those without a key", time.Second, func() error {
		_, err := sql.AloneToRetry(t.Context(), conn, "s", 0, 100)
		return err
	})
	// No statement that runs again and again reads the table from its beginning to its end.
	if after := statistics(); after != before {
		t.Errorf("the table was read from its beginning %d times", after-before)
	}
}
