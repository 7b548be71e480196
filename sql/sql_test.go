package sql_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"ebb/event"
	"ebb/internal/pgtest"
	"ebb/sql"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

var setup = sql.Setup{Publication: "ebb", Keep: time.Hour}

func apply(t *testing.T, db *pgtest.Database, s sql.Setup) []string {
	t.Helper()
	done, err := sql.Apply(t.Context(), db.Connect(t), s)
	if err != nil {
		t.Fatal(err)
	}
	return done
}

// migrations is how many there are.
func migrations(t *testing.T) int {
	t.Helper()
	files, err := filepath.Glob("migrations/*.sql")
	if err != nil || len(files) == 0 {
		t.Fatalf("found migrations %q, %v", files, err)
	}
	return len(files)
}

func TestApplyIsIdempotentAndMends(t *testing.T) {
	db := pgtest.New(t)
	conn := db.Connect(t)
	if err := sql.Check(t.Context(), conn); !errors.Is(err, sql.ErrNoSchema) || !strings.Contains(err.Error(), "run ebb setup") {
		t.Fatalf("before setup: %v", err)
	}
	if done := apply(t, db, setup); len(done) != migrations(t)+1 {
		t.Fatalf("first setup did %q", done)
	}
	if err := sql.Check(t.Context(), conn); err != nil {
		t.Fatal(err)
	}
	if done := apply(t, db, setup); len(done) != 0 {
		t.Fatalf("second setup did %q", done)
	}
	if done := apply(t, db, sql.Setup{Publication: "ebb", Keep: 24 * time.Hour}); len(done) != 1 {
		t.Fatalf("setup with another keep did %q", done)
	}
	if done := apply(t, db, sql.Setup{Publication: "ebb", Keep: 24 * time.Hour}); len(done) != 0 {
		t.Fatalf("setup with the same keep did %q", done)
	}

	for _, damage := range []struct{ sql, finding string }{
		{"DROP PUBLICATION ebb", "does not exist"},
		{"ALTER PUBLICATION ebb SET (publish = 'update')", "does not publish inserts"},
		{"DROP PUBLICATION ebb; CREATE PUBLICATION ebb FOR TABLE ebb.buffer", "partition root"},
		{"ALTER PUBLICATION ebb DROP TABLE ebb.buffer", "does not hold table"},
		{"ALTER PUBLICATION ebb SET TABLE ebb.buffer (id, topic)", `lacks column "key"`},
		{"ALTER PUBLICATION ebb SET TABLE ebb.buffer WHERE (id > 7)", "row filter"},
	} {
		db.Exec(t, damage.sql)
		_, err := sql.CheckPublication(t.Context(), conn, "ebb")
		if !errors.Is(err, sql.ErrPublication) || !strings.Contains(err.Error(), damage.finding) || !strings.Contains(err.Error(), "run ebb setup") {
			t.Errorf("after %s: %v", damage.sql, err)
		}
		apply(t, db, setup)
		if _, err := sql.CheckPublication(t.Context(), conn, "ebb"); err != nil {
			t.Errorf("setup after %s: %v", damage.sql, err)
		}
	}

	db.Exec(t, "CREATE TABLE theirs (id int PRIMARY KEY)", "CREATE PUBLICATION other FOR TABLE theirs")
	if _, err := sql.Apply(t.Context(), conn, sql.Setup{Publication: "other", Keep: time.Hour}); !errors.Is(err, sql.ErrPublication) ||
		!strings.Contains(err.Error(), "public.theirs") {
		t.Errorf("setup over somebody else's publication: %v", err)
	}
}

func TestScriptIsWhatApplyRuns(t *testing.T) {
	script, err := sql.Script(setup, 150000)
	if err != nil {
		t.Fatal(err)
	}
	db := pgtest.New(t)
	db.Exec(t, script)
	if done := apply(t, db, setup); len(done) != 0 {
		t.Fatalf("setup after the script did %q", done)
	}
}

func TestSetupsAtOnce(t *testing.T) {
	db := pgtest.New(t)
	errs := make(chan error)
	for range 4 {
		conn := db.Connect(t)
		go func() {
			_, err := sql.Apply(context.Background(), conn, setup)
			errs <- err
		}()
	}
	for range 4 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}

func TestPut(t *testing.T) {
	db := pgtest.New(t)
	apply(t, db, setup)
	producer := asProducer(t, db)
	const payload = `{ "b": 1,  "a": "\u0000" }`
	for _, call := range []struct {
		sql  string
		args []any
		want string
	}{
		{`SELECT ebb.put('t', '{ "b": 1,  "a": "\u0000" }')`, nil, payload},
		{`SELECT ebb.put('t', $1::json, 'k', '{"h":"v"}')`, []any{payload}, payload},
		{`SELECT ebb.put('t', $1::text, key => 'k')`, []any{payload}, payload},
		{`SELECT ebb.put('t', $1::jsonb)`, []any{`{ "b": 1,  "a": 2 }`}, `{"a": 2, "b": 1}`},
		{`SELECT ebb.put('t', $1, $2, NULL)`, []any{payload, "k"}, payload},
	} {
		var id int64
		if err := producer.QueryRow(t.Context(), call.sql, call.args...).Scan(&id); err != nil {
			t.Errorf("%s: %v", call.sql, err)
			continue
		}
		if got := pgtest.Value[string](t, db, "SELECT payload::text FROM ebb.buffer WHERE id = $1", id); got != call.want {
			t.Errorf("%s: stored %s, want %s", call.sql, got, call.want)
		}
	}
	if _, err := producer.Exec(t.Context(), `INSERT INTO ebb.buffer (topic, payload) VALUES ('t', '{}')`); err != nil {
		t.Errorf("plain insert: %v", err)
	}
	for _, refused := range []string{
		`INSERT INTO ebb.buffer (topic, payload, xid) VALUES ('t', '{}', '3')`,
		`INSERT INTO ebb.buffer (topic, payload, bucket) VALUES ('t', '{}', 3)`,
		`INSERT INTO ebb.buffer (id, topic, payload) OVERRIDING SYSTEM VALUE VALUES (1, 't', '{}')`,
		`SELECT payload FROM ebb.buffer`,
		`DELETE FROM ebb.buffer`,
		`UPDATE ebb.slot SET recovered_at = now()`,
	} {
		_, err := producer.Exec(t.Context(), refused)
		var pg *pgconn.PgError
		if !errors.As(err, &pg) || pg.Code != "42501" {
			t.Errorf("%s: %v, want insufficient_privilege", refused, err)
		}
	}
	if _, err := producer.Exec(t.Context(), `SELECT ebb.put('t', '{}', NULL, '[1]')`); err == nil {
		t.Error("headers that are no object were accepted")
	}
}

// asProducer returns a session of a role that is a member of ebb_producer and nothing else.
func asProducer(t *testing.T, db *pgtest.Database) *pgx.Conn {
	conn := db.Connect(t)
	role := "producer_" + db.Name
	if len(role) > 63 {
		role = role[:63]
	}
	db.Exec(t, "CREATE ROLE "+role+" IN ROLE ebb_producer")
	t.Cleanup(func() { db.Exec(t, "DROP ROLE "+role) })
	if _, err := conn.Exec(t.Context(), "SET ROLE "+role); err != nil {
		t.Fatal(err)
	}
	return conn
}

func TestDropRemovesEverything(t *testing.T) {
	db := pgtest.New(t)
	apply(t, db, setup)
	done, err := sql.Drop(t.Context(), db.Connect(t), "ebb")
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains(done, "dropped schema ebb") {
		t.Errorf("did %q", done)
	}
	if n := pgtest.Value[int64](t, db, "SELECT count(*) FROM pg_namespace WHERE nspname = 'ebb'"); n != 0 {
		t.Error("the schema is still there")
	}
	if done := apply(t, db, setup); len(done) != migrations(t)+1 {
		t.Errorf("setup after teardown did %q", done)
	}
}

// A tick that is stored marks exactly the rows that its snapshot sees.
func TestTickRecordsWhatItsSnapshotSees(t *testing.T) {
	db := pgtest.New(t)
	apply(t, db, setup)
	conn, open := db.Connect(t), db.Connect(t)
	db.Exec(t, `SELECT ebb.put('seen', '{}')`)
	tx, err := open.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), `SELECT ebb.put('open', '{}')`); err != nil {
		t.Fatal(err)
	}
	tick, _, err := sql.BeginTick(t.Context(), conn, "ebb")
	if err != nil {
		t.Fatal(err)
	}
	db.Exec(t, `SELECT ebb.put('later', '{}')`)
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	system := pgtest.Value[string](t, db, "SELECT system_identifier::text FROM pg_control_system()")
	record := slot(t, db, "s", system)
	tick.Events = 1
	if _, err := sql.StoreTick(t.Context(), conn, record, tick, time.Hour); err != nil {
		t.Fatal(err)
	}
	recorded := pgtest.Value[[]string](t, db, "SELECT array_agg(topic ORDER BY id) FROM ebb.events WHERE recorded_at IS NOT NULL")
	backlog := pgtest.Value[[]string](t, db, "SELECT array_agg(topic ORDER BY id) FROM ebb.backlog")
	if !slices.Equal(recorded, []string{"seen"}) || !slices.Equal(backlog, []string{"open", "later"}) {
		t.Errorf("recorded %q, backlog %q", recorded, backlog)
	}
	got, ok, err := sql.LastTick(t.Context(), conn, record)
	if err != nil || !ok || got.Snapshot != tick.Snapshot || got.LSN != tick.LSN || got.Events != 1 {
		t.Errorf("read back %+v, %v, %v; stored %+v", got, ok, err, tick)
	}
}

// slot records a slot without one, and returns its record.
func slot(t *testing.T, db *pgtest.Database, name, system string) sql.SlotRecord {
	t.Helper()
	conn := db.Connect(t)
	before, err := sql.ReadSlot(t.Context(), conn, name)
	if err != nil && !errors.Is(err, sql.ErrNoRecord) {
		t.Fatal(err)
	}
	prepared, err := sql.PrepareSlot(t.Context(), conn, name, system, 1, before.Term, "mark", "a test")
	if err != nil {
		t.Fatal(err)
	}
	if prepared.Made || prepared.Done || prepared.Publication != "mark" || prepared.MadeBecause != "a test" {
		t.Errorf("a slot that is being made is %+v", prepared)
	}
	snapshot := pgtest.Value[string](t, db, "SELECT pg_current_snapshot()::text")
	if err := sql.RecordSlot(t.Context(), conn, prepared, snapshot, 1); err != nil {
		t.Fatal(err)
	}
	r := read(t, conn, name)
	if !r.Made || r.Done || r.RecoveredID != 0 || r.Recovered != 0 {
		t.Errorf("a slot that was made is %+v", r)
	}
	return r
}

func read(t *testing.T, conn *pgx.Conn, name string) sql.SlotRecord {
	t.Helper()
	r, err := sql.ReadSlot(t.Context(), conn, name)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func second[T any](_ T, err error) error { return err }

// recordAll stores a tick that covers all rows, and returns its id.
func recordAll(t *testing.T, conn *pgx.Conn, r sql.SlotRecord, seq uint64) int64 {
	t.Helper()
	tick, _, err := sql.BeginTick(t.Context(), conn, "ebb")
	if err != nil {
		t.Fatal(err)
	}
	tick.StreamSeq = seq
	if _, err := sql.StoreTick(t.Context(), conn, r, tick, time.Hour); err != nil {
		t.Fatal(err)
	}
	last, ok, err := sql.LastTick(t.Context(), conn, r)
	if err != nil || !ok || last.StreamSeq != seq {
		t.Fatalf("stored a tick at %d and read %+v, %v, %v", seq, last, ok, err)
	}
	return last.ID
}

func TestRecordOfASlot(t *testing.T) {
	db := pgtest.New(t)
	apply(t, db, setup)
	conn := db.Connect(t)
	if _, err := sql.ReadSlot(t.Context(), conn, "s"); !errors.Is(err, sql.ErrNoRecord) {
		t.Fatalf("before: %v", err)
	}
	if r := slot(t, db, "s", "1"); r.Epochs.Last() != 1 || r.RecoveredAfter != 0 {
		t.Errorf("first: %+v", r)
	}
	r := read(t, conn, "s")
	if err := sql.BeginRecovery(t.Context(), conn, r, "there", 3); err != nil {
		t.Fatal(err)
	}
	if err := sql.Recovered(t.Context(), conn, r, 7, 5, 8); err != nil {
		t.Fatal(err)
	}
	if r := read(t, conn, "s"); r.RecoveredID != 7 || r.Recovered != 5 || r.RecoveredSeq != 8 || r.Destination != "there" || r.Done {
		t.Errorf("in the middle: %+v", r)
	}
	position := event.Position{Epoch: 1, Commit: 5, Index: 2}
	if err := sql.RecoveryDone(t.Context(), conn, r, "there", position, 8); err != nil {
		t.Fatal(err)
	}
	if r = read(t, conn, "s"); !r.Done {
		t.Errorf("after it: %+v", r)
	}
	if last, ok, err := sql.LastTick(t.Context(), conn, r); err != nil || !ok || last.Position != position || last.StreamSeq != 8 || last.Events != 5 {
		t.Errorf("the tick of the recovery is %+v, %v, %v", last, ok, err)
	}
	// Whoever leads next ends the term of the one before, which can record nothing any more.
	next, err := sql.TakeTerm(t.Context(), conn, "s")
	if err != nil || next.Term <= r.Term {
		t.Errorf("the next term is %+v, %v, after %+v", next, err, r)
	}
	late, _, err := sql.BeginTick(t.Context(), conn, "ebb")
	if err != nil {
		t.Fatal(err)
	}
	for step, err := range map[string]error{
		"tick":     second(sql.StoreTick(t.Context(), conn, r, late, time.Hour)),
		"prepare":  second(sql.PrepareSlot(t.Context(), conn, "s", "1", 1, r.Term, "mark", "x")),
		"page":     sql.Recovered(t.Context(), conn, r, 9, 1, 9),
		"done":     sql.RecoveryDone(t.Context(), conn, r, "there", position, 9),
		"rewind":   sql.Rewind(t.Context(), conn, r, 0, false, false, "x"),
		"raise":    sql.RaiseEpoch(t.Context(), conn, r, sql.Raise{Epoch: event.Epoch{Number: 9}}),
		"remake":   sql.RemakeSlot(t.Context(), conn, r, "x", true),
		"recorded": sql.RecordSlot(t.Context(), conn, r, "1:1:", 1),
	} {
		if !errors.Is(err, sql.ErrSuperseded) {
			t.Errorf("%s in a term that is over: %v, want ErrSuperseded", step, err)
		}
	}
	r = next
	tick := recordAll(t, conn, r, 1)
	if r := slot(t, db, "s", "1"); r.Epochs.Last() != 1 || r.RecoveredAfter != tick {
		t.Errorf("made anew: %+v, want the tick %d", r, tick)
	}
	if r := slot(t, db, "s", "2"); r.Epochs.Last() != 2 || r.RecoveredAfter != 0 {
		t.Errorf("on another cluster, whose ticks are others: %+v", r)
	}
	if r := slot(t, db, "other", "2"); r.Epochs.Last() != 1 || r.RecoveredAfter != 0 {
		t.Errorf("another slot: %+v", r)
	}
	if err := sql.RecordSlot(t.Context(), conn, sql.SlotRecord{Name: "unprepared"}, "1:1:", 1); !errors.Is(err, sql.ErrSuperseded) {
		t.Errorf("recorded without being prepared: %v", err)
	}
}

// Pages hold rows in order of their ids, no more of them than fit, and at least one.
func TestRowsToRecoverComeInPages(t *testing.T) {
	db := pgtest.New(t)
	apply(t, db, setup)
	conn := db.Connect(t)
	db.Exec(t, "SELECT ebb.put('recorded', '{}')")
	r := slot(t, db, "s", "1")
	recordAll(t, conn, r, 1)
	const payload = 100 // bytes
	db.Exec(t, `SELECT ebb.put('t', to_json(repeat('x', 98)), 'k', '{"h": 1}') FROM generate_series(1, 2500)`)
	tx, err := db.Connect(t).Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), "SELECT ebb.put('open', '{}')"); err != nil {
		t.Fatal(err)
	}
	slot(t, db, "s", "1")
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	db.Exec(t, "SELECT ebb.put('later', '{}')")

	for _, c := range []struct{ size, page int }{{1, 1}, {payload, 1}, {payload + 1, 2}, {10 * payload, 10}, {1 << 30, 1000}} {
		rows, err := sql.RowsToRecover(t.Context(), conn, "s", 0, c.size)
		if err != nil || len(rows) != c.page {
			t.Errorf("%d bytes: %d rows, want %d; %v", c.size, len(rows), c.page, err)
		}
	}
	var got []int64
	for after := int64(0); ; {
		rows, err := sql.RowsToRecover(t.Context(), conn, "s", after, 37_000)
		if err != nil {
			t.Fatal(err)
		}
		if len(rows) == 0 {
			break
		}
		for _, row := range rows {
			if string(row.Topic) != "t" || string(row.Key) != "k" || len(row.Payload) != payload || string(row.Headers) != `{"h": 1}` || row.CreatedAt.IsZero() {
				t.Fatalf("row is %s", row.Topic)
			}
			got = append(got, row.ID)
		}
		after = rows[len(rows)-1].ID
	}
	if want := pgtest.Value[[]int64](t, db, "SELECT array_agg(id ORDER BY id) FROM ebb.buffer WHERE topic = 't'"); !slices.Equal(got, want) {
		t.Errorf("%d rows are to be recovered, want %d", len(got), len(want))
	}
}

// letter makes a dead letter of an event.
func letter(t *testing.T, db *pgtest.Database, id, key, position, state string, more ...string) {
	t.Helper()
	columns, values := "", ""
	for i := 0; i < len(more); i += 2 {
		columns, values = columns+", "+more[i], values+", "+more[i+1]
	}
	db.Exec(t, fmt.Sprintf(`INSERT INTO ebb.dead_letter (slot, event_id, topic, key, payload, content_type, event_time, position, place, epoch, reason, attempts,
		first_at, last_at, state%s) VALUES ('s', '%s', 't', nullif('%s', ''), '{"a":  1}', 'application/json', now(), '%s', split_part('%[4]s', ':', 2) || ':' || split_part('%[4]s', ':', 3),
		split_part('%[4]s', ':', 1)::integer, 'x', 1, now(), now(), '%[5]s'%[6]s)`, columns, id, key, position, state, values))
}

// What is among the dead letters is not recovered, nor missed, whatever has become of it.
func TestDeadLettersAreNotRecovered(t *testing.T) {
	db := pgtest.New(t)
	apply(t, db, setup)
	conn := db.Connect(t)
	db.Exec(t, "SELECT ebb.put('t', '{}') FROM generate_series(1, 8)")
	for i, state := range []string{"parked", "retrying", "delivered", "discarded"} {
		letter(t, db, fmt.Sprint(2*i+1), "k", fmt.Sprintf("1:0/%X:1", 16*i), state)
	}
	slot(t, db, "s", "1")
	rows, err := sql.RowsToRecover(t.Context(), conn, "s", 0, 1<<20)
	var got, between []int64
	for _, row := range rows {
		got = append(got, row.ID)
	}
	want := []int64{2, 4, 6, 8}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("to recover are %v, want %v: %v", got, want, err)
	}
	last := pgtest.Value[string](t, db, "SELECT pg_current_snapshot()::text")
	if err := sql.RowsBetween(t.Context(), conn, "s", "", last, func(id int64) { between = append(between, id) }); err != nil || len(between) != 4 {
		t.Errorf("to come by are %v, want %v: %v", between, want, err)
	}
	if kept, err := sql.KeptOf(t.Context(), conn, "s", []string{"1", "2", "3", "x"}); err != nil || len(kept) != 2 || !kept["1"] || !kept["3"] {
		t.Errorf("kept are %v: %v", kept, err)
	}
	var left []sql.PassedLetter
	if err := sql.PassedLetters(t.Context(), conn, "s", 0x20, false, func(p sql.PassedLetter) { left = append(left, p) }); err != nil {
		t.Fatal(err)
	}
	slices.SortFunc(left, func(a, b sql.PassedLetter) int { return strings.Compare(a.ID, b.ID) })
	if want := []sql.PassedLetter{{ID: "5", Position: event.Position{Epoch: 1, Commit: 0x20, Index: 1}},
		{ID: "7", Position: event.Position{Epoch: 1, Commit: 0x30, Index: 1}, Discarded: true}}; !slices.Equal(left, want) {
		t.Errorf("left out are %+v, want %+v", left, want)
	}
	letter(t, db, "1:0/70:1", "k", "1:0/70:1", "parked")
	var payloads []string
	if err := sql.PositionedPayloads(t.Context(), conn, "s", func(p []byte) { payloads = append(payloads, string(p)) }); err != nil ||
		!slices.Equal(payloads, []string{`{"a":  1}`}) {
		t.Errorf("payloads are %q: %v", payloads, err)
	}
}

// A destination that has forgotten what it was given from the dead letters is given it again, and in order.
func TestForgottenRetries(t *testing.T) {
	db := pgtest.New(t)
	apply(t, db, setup)
	conn := db.Connect(t)
	slot(t, db, "s", "1")
	r := read(t, conn, "s")
	at := func(seq int) []string { return []string{"stream_seq", fmt.Sprint(seq), "destination", "'there'"} }
	letter(t, db, "1", "a", "1:0/10:1", "delivered", at(5)...)
	letter(t, db, "2", "a", "1:0/10:2", "delivered", at(7)...)
	letter(t, db, "3", "a", "1:0/10:3", "parked")
	letter(t, db, "4", "b", "1:0/10:4", "parked", "decided_at", "now()")
	letter(t, db, "5", "", "2:0/10:5", "retrying")
	letter(t, db, "6", "", "1:0/10:6", "delivered", "stream_seq", "9", "destination", "'elsewhere'")
	states := func() string {
		return pgtest.Value[string](t, db, "SELECT string_agg(event_id || state, ' ' ORDER BY event_id) FROM ebb.dead_letter")
	}
	if n, err := sql.RetriedBehind(t.Context(), conn, "s", "there", 6); err != nil || n != 1 {
		t.Errorf("%d are behind the end: %v", n, err)
	}
	if n, err := sql.Retriable(t.Context(), conn, "s", "there", 4, time.Now().Add(-time.Hour)); err != nil || n != 4 {
		t.Errorf("%d may have been retried: %v", n, err)
	}
	if n, err := sql.Retriable(t.Context(), conn, "s", "there", 5, time.Now().Add(time.Hour)); err != nil || n != 2 {
		t.Errorf("%d may have been retried: %v", n, err)
	}
	if err := sql.RetryForgotten(t.Context(), conn, r, "there", 6); err != nil {
		t.Fatal(err)
	}
	if got, want := states(), "1delivered 2retrying 3retrying 4parked 5retrying 6delivered"; got != want {
		t.Errorf("the letters are %s, want %s", got, want)
	}
	// What the destination holds is marked, but for what has come by again in a later epoch.
	found := []sql.Retried{{ID: "2", Seq: 8, Epoch: 1}, {ID: "4", Seq: 9, Epoch: 3}, {ID: "5", Seq: 10, Epoch: 1}}
	if err := sql.MarkRetried(t.Context(), conn, r, "there", found); err != nil {
		t.Fatal(err)
	}
	if got, want := states(), "1delivered 2delivered 3retrying 4delivered 5retrying 6delivered"; got != want {
		t.Errorf("the letters are %s, want %s", got, want)
	}
	if _, err := sql.TakeTerm(t.Context(), conn, "s"); err != nil {
		t.Fatal(err)
	}
	if err := sql.RetryForgotten(t.Context(), conn, r, "there", 0); !errors.Is(err, sql.ErrSuperseded) {
		t.Errorf("in a term that is over: %v", err)
	}
	if err := sql.MarkRetried(t.Context(), conn, r, "there", found); !errors.Is(err, sql.ErrSuperseded) {
		t.Errorf("in a term that is over: %v", err)
	}
}

// The session that holds the leader's lock shows that it is alive however often it is notified.
func TestHoldWhileNotified(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	lock, err := sql.Connect(t.Context(), db.URL, "lock")
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close(context.WithoutCancel(t.Context()))
	if _, err := lock.Exec(t.Context(), "LISTEN x; SET idle_session_timeout = '3s'"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second)
	defer cancel()
	notifying := make(chan struct{})
	other := db.Connect(t)
	go func() {
		defer close(notifying)
		for ctx.Err() == nil {
			if _, err := other.Exec(t.Context(), "NOTIFY x"); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	n := 0
	if err := sql.Hold(ctx, lock, func(string, string) { n++ }); !errors.Is(err, context.DeadlineExceeded) || n == 0 {
		t.Errorf("it ended after %d notifications with %v", n, err)
	}
	<-notifying
}

// Where to look in the stream for what need not be recovered: behind the newest tick that had ended before the one that
// counts began, of the same slot.
func TestRecoveryFloor(t *testing.T) {
	db := pgtest.New(t)
	apply(t, db, setup)
	conn := db.Connect(t)
	floor := func() uint64 {
		t.Helper()
		n, err := sql.RecoveryFloor(t.Context(), conn, "s", "")
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	r, other := slot(t, db, "s", "1"), slot(t, db, "other", "1")
	if n := floor(); n != 0 {
		t.Errorf("without a tick: %d", n)
	}
	recordAll(t, conn, r, 10)
	tx, err := db.Connect(t).Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), "SELECT pg_current_xact_id()"); err != nil {
		t.Fatal(err)
	}
	db.Exec(t, "SELECT pg_current_xact_id()")
	recordAll(t, conn, r, 20) // sees a transaction in progress that the one before has not seen end
	recordAll(t, conn, other, 900)
	r = slot(t, db, "s", "1")
	if n := floor(); n != 10 {
		t.Errorf("with a transaction open: %d, want 10", n)
	}
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	recordAll(t, conn, other, 950)
	recordAll(t, conn, r, 30)
	slot(t, db, "s", "1")
	if n := floor(); n != 20 {
		t.Errorf("with none open: %d, want 20, stored before the newest one", n)
	}
}

// Ticks are forgotten when they are old, but for the one that a recovery needs, and those of other slots.
func TestOldTicksAreForgotten(t *testing.T) {
	db := pgtest.New(t)
	apply(t, db, setup)
	conn := db.Connect(t)
	r, other := slot(t, db, "s", "1"), slot(t, db, "other", "1")
	recordAll(t, conn, r, 1)
	recordAll(t, conn, r, 2)
	recordAll(t, conn, other, 3)
	r = slot(t, db, "s", "1") // refers to the tick at 2
	recordAll(t, conn, r, 4)
	db.Exec(t, "UPDATE ebb.tick SET delivered_at = delivered_at - interval '2 hours'")
	recordAll(t, conn, r, 5)
	if got := pgtest.Value[[]int64](t, db, "SELECT array_agg(stream_seq ORDER BY id) FROM ebb.tick"); !slices.Equal(got, []int64{2, 3, 4, 5}) {
		t.Errorf("ticks at %d are left, want 2 (referred to), 3 (of another slot), 4 (the newest of the old ones) and 5", got)
	}

	// A slot that is to be made anew gets no ticks: what it passed over would count as delivered.
	db.Exec(t, "ALTER PUBLICATION ebb DROP TABLE ebb.buffer")
	apply(t, db, setup)
	if r := read(t, conn, "s"); r.Made || r.Epochs.Last() != 1 {
		t.Errorf("after its publication was mended, the slot is %+v", r)
	}
	tick, _, err := sql.BeginTick(t.Context(), conn, "ebb")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := sql.StoreTick(t.Context(), conn, r, tick, time.Hour); !errors.Is(err, sql.ErrNotMade) {
		t.Errorf("stored a tick: %v, want ErrNotMade", err)
	}
}

// What the view of the status says of a slot that is there, and of one that is not.
func TestStatusView(t *testing.T) {
	db := pgtest.New(t)
	apply(t, db, setup)
	conn := db.Connect(t)
	slot(t, db, db.Name, "1")
	db.Exec(t, "SELECT ebb.put('t', '{}')", "SELECT ebb.put('t', '{}')")
	type status struct {
		Slot           string
		Active, Leader bool
		Lag, Retained  *int64
		Backlog        int64
		Flow           string
		DeadLetters    int64
	}
	read := func() status {
		t.Helper()
		rows, err := conn.Query(t.Context(), `SELECT slot, active, leader, lag_bytes AS lag, retained_wal_bytes AS retained, backlog, flow, dead_letters
			FROM ebb.status WHERE oldest_age > interval '0'`)
		if err != nil {
			t.Fatal(err)
		}
		s, err := pgx.CollectExactlyOneRow(rows, pgx.RowToStructByName[status])
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	if s := read(); s != (status{Slot: db.Name, Backlog: 2, Flow: "open"}) {
		t.Errorf("without a slot: %+v", s)
	}
	db.Exec(t, "SELECT pg_create_logical_replication_slot('"+db.Name+"', 'pgoutput')")
	leader := db.Connect(t)
	if ok, err := sql.TryLead(t.Context(), leader, db.Name); err != nil || !ok {
		t.Fatalf("took the lead: %v, %v", ok, err)
	}
	if s := read(); s.Active || !s.Leader || s.Lag == nil || s.Retained == nil || *s.Retained < *s.Lag {
		t.Errorf("with a slot and a leader: %+v", s)
	}
}

// What was removed from the buffer is noted, up to the newest transaction of it, whoever removed it and how.
func TestRemovalsAreNoted(t *testing.T) {
	db := pgtest.New(t)
	apply(t, db, setup)
	conn := db.Connect(t)
	system := pgtest.Value[string](t, db, "SELECT system_identifier::text FROM pg_control_system()")
	r := slot(t, db, "s", system)
	reach := func(tick int64) bool {
		t.Helper()
		ok, err := sql.Reach(t.Context(), conn, r, tick)
		if err != nil {
			t.Fatal(err)
		}
		return ok
	}
	put := func() { db.Exec(t, "SELECT ebb.put('t', '{}')") }
	put()
	first := recordAll(t, conn, r, 1)
	put()
	put()
	second := recordAll(t, conn, r, 3)
	put()
	db.Exec(t, "DELETE FROM ebb.buffer WHERE id = 77") // none
	if !reach(0) || !reach(first) {
		t.Error("before anything was removed, something is out of reach")
	}
	db.Exec(t, "DELETE FROM ebb.buffer WHERE id = 1")
	if reach(0) || !reach(first) || !reach(second) {
		t.Errorf("with the first row removed: %v, %v, %v", reach(0), reach(first), reach(second))
	}
	empty := pgtest.Value[string](t, db, "SELECT 'ebb.buffer_' || to_char((bucket + 8) % 16, 'FM00') FROM ebb.buffer WHERE id = 4")
	db.Exec(t, "TRUNCATE "+empty)
	db.Exec(t, "DELETE FROM ebb.buffer WHERE id = 3")
	if reach(first) || !reach(second) {
		t.Errorf("with one removed that the second tick saw: %v, %v", reach(first), reach(second))
	}
	partition := pgtest.Value[string](t, db, "SELECT tableoid::regclass::text FROM ebb.buffer WHERE id = 4")
	db.Exec(t, "TRUNCATE "+partition)
	if reach(second) {
		t.Error("with one removed that no tick saw, the second one is in reach")
	}
	if third := recordAll(t, conn, r, 4); !reach(third) {
		t.Error("a later tick is out of reach")
	}
}

// A bridge that has lost the lead takes back ticks although its term is over.
func TestRewindOfALaterTerm(t *testing.T) {
	db := pgtest.New(t)
	ctx := t.Context()
	conn := db.Connect(t)
	if _, err := sql.Apply(ctx, conn, sql.Setup{Publication: "ebb", Keep: time.Hour}); err != nil {
		t.Fatal(err)
	}
	r, err := sql.PrepareSlot(ctx, conn, "s", "1", 1, 0, "", "test")
	if err != nil {
		t.Fatal(err)
	}
	if err := sql.RecordSlot(ctx, conn, r, "10:10:", 16); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if _, err := sql.StoreTick(ctx, conn, r, sql.Tick{LSN: 16, Snapshot: "10:10:", Epoch: 1}, time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	other := db.Connect(t)
	if _, err := other.Exec(ctx, "BEGIN; UPDATE ebb.slot SET term = term + 1"); err != nil { // TakeTerm of the next leader, about to commit
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- sql.Rewind(context.WithoutCancel(ctx), conn, r, 1, true, false, "test") }()
	pgtest.Eventually(t, time.Minute, func() (bool, string) {
		return pgtest.Value[bool](t, db, "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"), "it does not wait"
	})
	if _, err := other.Exec(ctx, "COMMIT"); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, sql.ErrSuperseded) {
		t.Fatal(err)
	}
	if n := pgtest.Value[int64](t, db, "SELECT count(*) FROM ebb.tick"); n != 3 {
		t.Errorf("%d of 3 ticks are left", n)
	}
}
