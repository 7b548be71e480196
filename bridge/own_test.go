package bridge_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"ebb/bridge"
	"ebb/decode"
	"ebb/event"
	"ebb/internal/natstest"
	"ebb/internal/pgtest"
	"ebb/internal/postgres"
	"ebb/sink"
	"ebb/sql"
)

// ownFixture is a fixture with tables of one's own.
type ownFixture struct {
	*fixture
	buffers []bridge.Buffer
}

func newOwnFixture(t *testing.T, db *pgtest.Database, buffers ...bridge.Buffer) *ownFixture {
	t.Helper()
	return &ownFixture{&fixture{t: t, db: db, slot: db.Name, log: logTo(t)}, buffers}
}

// setup does what ebb setup does, and returns its error.
func (f *ownFixture) setup() error {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), patience)
	defer cancel()
	db, err := sql.Connect(ctx, f.db.URL, f.slot)
	if err != nil {
		f.t.Fatal(err)
	}
	defer db.Close(ctx)
	if _, err := sql.Apply(ctx, db, sql.Setup{Publication: "ebb", Slot: f.slot, Tables: bridge.Tables(f.buffers), Keep: time.Hour}); err != nil {
		return err
	}
	_, err = bridge.EnsureSlot(ctx, db, f.config(nil))
	return err
}

func (f *ownFixture) mustSetup() {
	f.t.Helper()
	if err := f.setup(); err != nil {
		f.t.Fatal(err)
	}
}

func (f *ownFixture) config(s sink.Sink) bridge.Config {
	cfg := f.fixture.config(s)
	cfg.Buffers = f.buffers
	return cfg
}

func (f *ownFixture) run(s sink.Sink) *running { return f.runWith(f.config(s)) }

// own is a mapping of a table in schema public whose topic is its name.
func own(table string, delivered sql.Delivered, adjust ...func(*bridge.Buffer)) bridge.Buffer {
	b := bridge.Buffer{Buffer: decode.Buffer{Schema: "public", Table: table, ID: "id", TopicValue: table, Payload: "doc"}, Delivered: delivered}
	if delivered == sql.Mark {
		b.Recorded = "done_at"
	}
	for _, f := range adjust {
		f(&b)
	}
	return b
}

func startAll(b *bridge.Buffer) { b.StartAll = true }
func wholeRow(b *bridge.Buffer) { b.Payload = "" }
func noID(b *bridge.Buffer)     { b.ID = "" }

const ownTable = "CREATE TABLE %s (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), doc jsonb NOT NULL DEFAULT '{}', done_at timestamptz, n int)"

func (f *ownFixture) create(tables ...string) {
	f.t.Helper()
	for _, table := range tables {
		f.db.Exec(f.t, fmt.Sprintf(ownTable, table))
	}
}

// insert inserts n rows, in one transaction.
func (f *ownFixture) insert(table string, n int) {
	f.t.Helper()
	f.db.Exec(f.t, fmt.Sprintf("INSERT INTO %s (n) SELECT generate_series(1, %d)", table, n))
}

// left waits until a query counts n rows.
func (f *ownFixture) left(n int64, query string) {
	f.t.Helper()
	pgtest.Eventually(f.t, patience, func() (bool, string) {
		have := pgtest.Value[int64](f.t, f.db, "SELECT count(*) FROM "+query)
		return have == n, fmt.Sprintf("%d rows in %s, want %d", have, query, n)
	})
}

// eachOnce checks that the events of a topic have as many ids as there should be, and each once.
func eachOnce(t *testing.T, events []event.Event, topic string, n int) {
	t.Helper()
	seen := map[string]bool{}
	for _, e := range events {
		if string(e.Topic) != topic {
			continue
		}
		if seen[string(e.ID)] {
			t.Fatalf("event %s of %s was delivered twice", e.ID, topic)
		}
		seen[string(e.ID)] = true
	}
	if len(seen) != n {
		t.Fatalf("%d events of %s were delivered, want %d", len(seen), topic, n)
	}
}

var errKilled = errors.New("killed by the test")

// Rows from before the slot are delivered once, and recorded, wherever that is interrupted.
func TestOwnRecoveryIsInterrupted(t *testing.T) {
	t.Parallel()
	f := newOwnFixture(t, pgtest.New(t), own("marked", sql.Mark, startAll), own("gone", sql.Delete, startAll), own("kept", sql.Keep, startAll),
		own("keyed", sql.Mark, startAll, noID, wholeRow), bridge.Managed())
	f.create("marked", "gone", "kept", "keyed")
	tables := []string{"marked", "gone", "kept", "keyed"}
	for _, table := range tables {
		f.insert(table, 40)
	}
	f.mustSetup()
	f.put(40)
	s := newExactSink()
	places := map[string]int{}
	for killed := 0; ; killed++ {
		cfg := f.config(s)
		n := 0
		var at atomic.Value
		cfg.InterruptAt(func(place string) error {
			if n++; n > 2+killed%29 {
				at.Store(place)
				return errKilled
			}
			return nil
		})
		if killed == 40 {
			break
		}
		r := f.runWith(cfg)
		pgtest.Eventually(t, patience, func() (bool, string) {
			select {
			case <-r.done:
				return true, ""
			default:
			}
			return at.Load() != nil || pgtest.Value[bool](t, f.db, "SELECT recovered_at IS NOT NULL FROM ebb.slot"), "neither killed nor done"
		})
		if place, ok := at.Load().(string); ok {
			places[place]++
		}
		r.cancel()
		<-r.done
		if killed%10 == 9 {
			f.insert("marked", 1)
			f.insert("keyed", 1)
			f.db.Exec(t, "UPDATE gone SET n = n + 1") // rows are read as they were, and rewriting them changes nothing
		}
		if pgtest.Value[bool](t, f.db, "SELECT recovered_at IS NOT NULL FROM ebb.slot") {
			break
		}
	}
	t.Logf("killed at %v", places)
	r := f.run(s)
	for _, table := range tables {
		f.insert(table, 1)
	}
	f.left(0, "marked WHERE done_at IS NULL")
	f.left(0, "gone")
	f.left(0, "keyed WHERE done_at IS NULL")
	f.awaitBacklog(0)
	total := 0
	for _, table := range []string{"marked", "kept", "keyed"} {
		total += int(pgtest.Value[int64](t, f.db, "SELECT count(*) FROM "+table))
	}
	s.await(t, total+41+40)
	r.stop()
	eachOnce(t, s.all(), "marked", int(pgtest.Value[int64](t, f.db, "SELECT count(*) FROM marked")))
	eachOnce(t, s.all(), "keyed", int(pgtest.Value[int64](t, f.db, "SELECT count(*) FROM keyed")))
	eachOnce(t, s.all(), "kept", 41)
	eachOnce(t, s.all(), "gone", 41)
	eachOnce(t, s.all(), "t", 40)
	if places["page"] == 0 || places["delivered page"] == 0 {
		t.Errorf("it was never interrupted in the middle: %v", places)
	}
	// In the order of the primary key.
	var keys []string
	for _, e := range s.all() {
		if string(e.Topic) == "kept" && e.Origin == event.Recovered {
			keys = append(keys, string(e.ID))
		}
	}
	if len(keys) != 40 || !slices.IsSorted(keys) && places["delivered page"] == 0 {
		t.Errorf("%d recovered rows, in order: %v", len(keys), slices.IsSorted(keys))
	}
}

// A row whose transaction waits for a synchronous standby is delivered before any query sees it. It is recorded once one does.
func TestRowIsRecordedOnceItIsSeen(t *testing.T) {
	t.Parallel()
	server := pgtest.NewServer(t, postgres.Config{})
	f := newOwnFixture(t, server.New(t), own("marked", sql.Mark), own("gone", sql.Delete))
	f.create("marked", "gone")
	f.mustSetup()
	s := newExactSink()
	r := f.run(s)
	standby := syncStandby{t, server}
	standby.hang()
	done := f.waits("BEGIN; INSERT INTO marked DEFAULT VALUES; SAVEPOINT a; INSERT INTO gone DEFAULT VALUES; COMMIT")
	s.await(t, 2)
	f.db.Exec(t, "SET synchronous_commit = local; INSERT INTO marked DEFAULT VALUES; INSERT INTO gone DEFAULT VALUES")
	s.await(t, 4)
	f.left(1, "marked WHERE done_at IS NOT NULL")
	f.left(0, "gone")
	standby.release()
	<-done
	f.left(2, "marked WHERE done_at IS NOT NULL")
	f.left(0, "gone")
	r.stop()
}

// A stream that forgot events of own tables cannot be filled in again from their rows.
func TestForgottenEventsOfOwnTables(t *testing.T) {
	t.Parallel()
	server := natstest.New(t)
	f := newOwnFixture(t, pgtest.New(t), own("marked", sql.Mark))
	f.create("marked")
	f.mustSetup()
	r := f.run(f.stream(server))
	f.insert("marked", 10)
	f.left(0, "marked WHERE done_at IS NULL")
	pgtest.Eventually(t, patience, func() (bool, string) {
		return pgtest.Value[bool](t, f.db, `SELECT confirmed_flush_lsn >= (SELECT max(lsn) FROM ebb.tick) AND (SELECT max(events) FROM ebb.tick) = 10
			FROM pg_replication_slots WHERE slot_name = $1`, f.slot), "the slot still holds it"
	})
	r.stop()
	if err := server.JetStream(t).DeleteStream(t.Context(), "EBB"); err != nil {
		t.Fatal(err)
	}
	if err := f.run(f.stream(server)).wait(); !errors.Is(err, bridge.ErrGap) || !strings.Contains(err.Error(), "10 messages are forgotten") {
		t.Fatalf("the bridge ended with %v", err)
	}
	cfg := f.config(f.stream(server))
	cfg.AcceptGap = true
	r = f.runWith(cfg)
	f.insert("marked", 1)
	f.left(0, "marked WHERE done_at IS NULL")
	r.stop()
	if n := len(server.Messages(t, "EBB")); n != 1 {
		t.Errorf("the stream holds %d messages, want 1", n)
	}
}

// Where nothing tells what the destination holds, the slot holds what is not marked, and it is delivered again and marked.
func TestUnmarkedRowsAreNotConfirmed(t *testing.T) {
	t.Parallel()
	f := newOwnFixture(t, pgtest.New(t), own("marked", sql.Mark), own("kept", sql.Keep))
	f.create("marked", "kept")
	f.mustSetup()
	conn := f.db.Connect(t)
	first := newTestSink()
	r := f.run(first)
	r.await(bridge.RoleLeader)
	f.db.Exec(t, "INSERT INTO marked (n) VALUES (1)")
	f.left(0, "marked WHERE done_at IS NULL")
	r.stop()
	f.db.Exec(t, "INSERT INTO marked (n) VALUES (2)")
	if _, err := conn.Exec(t.Context(), "BEGIN; SELECT FROM marked WHERE n = 2 FOR UPDATE"); err != nil {
		t.Fatal(err)
	}
	r = f.run(first)
	f.insert("kept", 3)
	first.await(t, 5)
	time.Sleep(500 * time.Millisecond) // time for more than one attempt to mark it
	r.stop()
	if _, err := conn.Exec(t.Context(), "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	f.left(1, "marked WHERE done_at IS NULL")
	second := newTestSink()
	r = f.run(second)
	f.left(0, "marked WHERE done_at IS NULL")
	second.await(t, 4)
	r.stop()
	if string(second.all()[0].Topic) != "marked" {
		t.Errorf("delivered again: %v", second.all())
	}
}

// A column that is added follows; one that is renamed or changed stops the bridge, and nothing is lost once the mapping is mended.
func TestSchemaChanges(t *testing.T) {
	t.Parallel()
	f := newOwnFixture(t, pgtest.New(t), own("kept", sql.Mark, wholeRow), own("mapped", sql.Delete))
	f.create("kept", "mapped")
	f.mustSetup()
	s := newExactSink()
	r := f.run(s)
	load, stop := context.WithCancel(t.Context())
	loaded := make(chan error, 1)
	inserted := 0
	go func() {
		loaded <- func() error {
			conn, err := sql.Connect(context.Background(), f.db.URL, "load")
			if err != nil {
				return err
			}
			defer conn.Close(context.Background())
			for ; load.Err() == nil; inserted++ {
				if _, err := conn.Exec(context.Background(), "WITH a AS (INSERT INTO kept (n) VALUES (1)) INSERT INTO mapped (n) VALUES (1)"); err != nil {
					return err
				}
			}
			return nil
		}()
	}()
	s.await(t, 20)
	f.db.Exec(t, "ALTER TABLE kept ADD COLUMN added text DEFAULT 'new'")
	pgtest.Eventually(t, patience, func() (bool, string) {
		events := s.all()
		return slices.ContainsFunc(events, func(e event.Event) bool { return strings.Contains(string(e.Payload), `"added":"new"`) }), "no row has the new column"
	})
	f.db.Exec(t, "ALTER TABLE kept ALTER COLUMN n TYPE text USING 'n' || n")
	pgtest.Eventually(t, patience, func() (bool, string) {
		events := s.all()
		return slices.ContainsFunc(events, func(e event.Event) bool { return strings.Contains(string(e.Payload), `"n":"1"`) }), "no row has the new type"
	})
	// The type of the key by which rows are deleted.
	f.db.Exec(t, "ALTER TABLE mapped ALTER COLUMN id TYPE text", "ALTER TABLE mapped ALTER COLUMN doc TYPE json")
	n := len(s.all())
	s.await(t, n+100)
	f.db.Exec(t, "ALTER TABLE mapped RENAME COLUMN doc TO body")
	err := r.wait()
	if !errors.Is(err, decode.ErrMapping) && !errors.Is(err, sql.ErrPublication) && !errors.Is(err, sql.ErrTable) || !strings.Contains(err.Error(), `"doc"`) {
		t.Fatalf("the bridge ended with %v", err)
	}
	if err := f.run(s).wait(); !errors.Is(err, sql.ErrTable) || !strings.Contains(err.Error(), `no column "doc"`) {
		t.Fatalf("started again, the bridge ended with %v", err)
	}
	f.buffers[1].Payload = "body"
	f.mustSetup()
	r = f.run(s)
	time.Sleep(200 * time.Millisecond)
	stop()
	if err := <-loaded; err != nil {
		t.Fatal(err)
	}
	f.left(0, "mapped")
	f.left(0, "kept WHERE done_at IS NULL")
	s.await(t, 2*inserted)
	r.stop()
	eachOnce(t, s.all(), "kept", inserted)
	eachOnce(t, s.all(), "mapped", inserted)

	// A type that does not fit.
	r = f.run(s)
	f.db.Exec(t, "ALTER TABLE mapped ALTER COLUMN body DROP DEFAULT, ALTER COLUMN body TYPE int USING 1", "INSERT INTO mapped (body) VALUES (1)")
	if err := r.wait(); !errors.Is(err, decode.ErrMapping) || !strings.Contains(err.Error(), `column "body" has type`) {
		t.Fatalf("the bridge ended with %v", err)
	}
	f.left(1, "mapped")
	f.db.Exec(t, "ALTER TABLE mapped ALTER COLUMN body TYPE json USING '1'", "SELECT pg_drop_replication_slot('"+f.slot+"')")
	r = f.run(s)
	f.left(0, "mapped")
	r.stop()
	eachOnce(t, s.all(), "mapped", inserted+1)
}

// Rows that were in the slot when a column got another name are delivered from the table.
func TestRenameWithABacklog(t *testing.T) {
	t.Parallel()
	f := newOwnFixture(t, pgtest.New(t), own("mapped", sql.Mark), own("gone", sql.Delete))
	f.create("mapped", "gone", "kept")
	f.mustSetup()
	s := newExactSink()
	r := f.run(s)
	f.insert("mapped", 2)
	s.await(t, 2)
	r.stop()
	f.insert("gone", 2)
	f.insert("mapped", 2)
	f.db.Exec(t, "ALTER TABLE mapped RENAME COLUMN doc TO body")
	f.insert("mapped", 2)
	f.buffers[0].Payload = "body"
	f.mustSetup()
	r = f.run(s)
	f.left(0, "mapped WHERE done_at IS NULL")
	f.left(0, "gone")
	r.stop()
	eachOnce(t, s.all(), "mapped", 6)
	eachOnce(t, s.all(), "gone", 2)

	// With a table of which nobody would know, they are not given up.
	f.buffers = append(f.buffers, own("kept", sql.Keep))
	f.mustSetup()
	f.run(s).stop()
	r = f.run(s)
	f.insert("kept", 1)
	s.await(t, 9)
	r.stop()
	f.insert("kept", 1)
	f.insert("mapped", 1)
	f.db.Exec(t, "ALTER TABLE mapped RENAME COLUMN body TO content")
	f.buffers[0].Payload = "content"
	f.mustSetup()
	if err := f.run(s).wait(); !errors.Is(err, decode.ErrMapping) || !strings.Contains(err.Error(), "give the column its old name back") {
		t.Fatalf("the bridge ended with %v", err)
	}
	f.db.Exec(t, "ALTER TABLE mapped RENAME COLUMN content TO body")
	f.buffers[0].Payload = "body"
	r = f.run(s)
	s.await(t, 11)
	f.left(0, "mapped WHERE done_at IS NULL")
	r.stop()
	eachOnce(t, s.all(), "kept", 2)
	eachOnce(t, s.all(), "mapped", 7)
}

// What can never work is refused by setup and by a bridge, with what to do.
func TestOwnTablesThatCannotBe(t *testing.T) {
	t.Parallel()
	f := newOwnFixture(t, pgtest.New(t))
	f.db.Exec(t, "CREATE TABLE a (id int PRIMARY KEY, doc json)", "CREATE TABLE b (id bigserial, doc json, done_at date)",
		"CREATE TABLE c (id text PRIMARY KEY, doc json NOT NULL, done_at text)", "CREATE VIEW v AS SELECT * FROM a", "CREATE UNLOGGED TABLE u (id int, doc json)",
		"CREATE TABLE g (id uuid PRIMARY KEY, doc json GENERATED ALWAYS AS ('{}') STORED)",
		"CREATE TABLE gk (n int, id uuid GENERATED ALWAYS AS (md5(n::text)::uuid) STORED PRIMARY KEY, doc json NOT NULL)",
		"CREATE TABLE gm (id uuid PRIMARY KEY, doc json NOT NULL, done_at timestamptz GENERATED ALWAYS AS (NULL) STORED)")
	for _, tt := range []struct {
		want    string
		buffers []bridge.Buffer
	}{
		{"there is no table public.nothing", []bridge.Buffer{own("nothing", sql.Keep)}},
		{"is no table whose changes", []bridge.Buffer{own("v", sql.Keep)}},
		{"SET LOGGED", []bridge.Buffer{own("u", sql.Keep)}},
		{`has no column "other"`, []bridge.Buffer{own("a", sql.Keep, func(b *bridge.Buffer) { b.Key = "other" })}},
		{"is generated", []bridge.Buffer{own("g", sql.Keep)}},
		{"in the primary key of public.gk is generated", []bridge.Buffer{own("gk", sql.Delete, noID)}},
		{"which a mark sets, is generated", []bridge.Buffer{own("gm", sql.Mark)}},
		{"has no primary key", []bridge.Buffer{own("b", sql.Mark)}},
		{"neither an id column nor a primary key", []bridge.Buffer{own("b", sql.Keep, noID, startAll)}},
		{"a type of time or boolean", []bridge.Buffer{own("c", sql.Mark)}},
		{"the ids of public.a and of public.b are numbers", []bridge.Buffer{own("a", sql.Keep), own("b", sql.Keep)}},
		{"the ids of ebb.buffer and of public.a are numbers", []bridge.Buffer{bridge.Managed(), own("a", sql.Keep)}},
	} {
		f.buffers = tt.buffers
		if err := f.setup(); !errors.Is(err, sql.ErrTable) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("want … %s: %v", tt.want, err)
		}
	}
}

// Tables come and go; nothing can be put into the managed one while it is not carried.
func TestTablesComeAndGo(t *testing.T) {
	t.Parallel()
	f := newOwnFixture(t, pgtest.New(t), bridge.Managed())
	f.create("marked", "gone")
	f.mustSetup()
	s := newExactSink()
	f.put(1)
	f.buffers = []bridge.Buffer{own("marked", sql.Mark)}
	if err := f.setup(); !errors.Is(err, sql.ErrTable) || !strings.Contains(err.Error(), "1 events that are not delivered") {
		t.Fatalf("the managed table was given up with a backlog: %v", err)
	}
	f.buffers = []bridge.Buffer{bridge.Managed(), own("marked", sql.Mark)}
	f.mustSetup()
	r := f.run(s)
	f.insert("marked", 3)
	s.await(t, 4)
	f.left(0, "marked WHERE done_at IS NULL")
	f.settle()
	r.stop()

	f.insert("gone", 5)
	f.buffers = []bridge.Buffer{own("marked", sql.Mark), own("gone", sql.Delete, startAll)}
	f.mustSetup()
	if _, err := f.db.Connect(t).Exec(t.Context(), "SELECT ebb.put('t', '{}')"); err == nil || !strings.Contains(err.Error(), "not among the buffers") {
		t.Errorf("put into a table that is not carried: %v", err)
	}
	r = f.run(s)
	f.insert("marked", 1)
	s.await(t, 10)
	f.left(0, "gone")
	f.left(0, "ebb.slot WHERE recovered_at IS NULL") // a recovery that is interrupted is done again, with another slot
	r.stop()

	made := pgtest.Value[int64](t, f.db, "SELECT made FROM ebb.slot")
	f.buffers = []bridge.Buffer{own("gone", sql.Delete)}
	f.mustSetup()
	if tables := pgtest.Value[[]string](t, f.db, "SELECT array_agg(tablename::text) FROM pg_publication_tables"); !slices.Equal(tables, []string{"gone"}) {
		t.Errorf("published are %v", tables)
	}
	r = f.run(s)
	f.insert("marked", 1) // nobody's
	f.insert("gone", 1)
	s.await(t, 11)
	f.left(0, "gone")
	r.stop()
	if now := pgtest.Value[int64](t, f.db, "SELECT made FROM ebb.slot"); now != made {
		t.Errorf("the slot was made anew because a table was given up: %d times, before that %d", now, made)
	}
	eachOnce(t, s.all(), "marked", 4)
	eachOnce(t, s.all(), "gone", 6)
	if n := pgtest.Value[int64](t, f.db, "SELECT count(*) FROM information_schema.role_table_grants WHERE table_name = 'marked' AND grantee = 'ebb_bridge'"); n != 0 {
		t.Errorf("%d rights are left on a table that was given up", n)
	}
}

// Marking that fails for good ends the bridge.
func TestMarkingFails(t *testing.T) {
	t.Parallel()
	f := newOwnFixture(t, pgtest.New(t), own("marked", sql.Mark), own("gone", sql.Delete))
	f.create("marked", "gone")
	f.db.Exec(t, "CREATE TABLE child (of uuid REFERENCES gone)")
	f.mustSetup()
	s := newExactSink()
	r := f.run(s)
	f.db.Exec(t, "WITH i AS (INSERT INTO gone DEFAULT VALUES RETURNING id) SELECT FROM i")
	f.left(0, "gone")
	f.db.Exec(t, "BEGIN; INSERT INTO gone (id) VALUES ('00000000-0000-4000-8000-000000000001'); INSERT INTO child VALUES ('00000000-0000-4000-8000-000000000001'); COMMIT")
	if err := r.wait(); !errors.Is(err, sql.ErrMark) || !strings.Contains(err.Error(), "delete delivered rows of public.gone") {
		t.Fatalf("the bridge ended with %v", err)
	}
	f.db.Exec(t, "DELETE FROM child")
	r = f.run(s)
	f.left(0, "gone")
	f.db.Exec(t, "ALTER TABLE marked DROP COLUMN done_at; INSERT INTO marked DEFAULT VALUES")
	if err := r.wait(); !errors.Is(err, sql.ErrTable) || !strings.Contains(err.Error(), `no column "done_at"`) {
		t.Fatalf("the bridge ended with %v", err)
	}
	f.db.Exec(t, "ALTER TABLE marked ADD COLUMN done_at timestamptz")
	r = f.run(s)
	f.left(0, "marked WHERE done_at IS NULL")
	r.stop()
	eachOnce(t, s.all(), "gone", 2)
	eachOnce(t, s.all(), "marked", 1)
}
