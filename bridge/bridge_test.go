package bridge_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"ebb/bridge"
	"ebb/event"
	"ebb/internal/pgtest"
	"ebb/internal/postgres"
	"ebb/sink"
	"ebb/sql"
)

// What was handed to the sink when the bridge is told to stop is delivered and confirmed: a sink that cannot be asked gets
// nothing twice.
func TestStopDrains(t *testing.T) {
	f := newFixture(t, pgtest.New(t))
	s := newTestSink()
	s.block()
	r := f.run(s)
	f.put(10_000)
	pgtest.Eventually(t, patience, func() (bool, string) { return s.taken() > 0, "the sink has taken nothing" })
	r.cancel()
	s.unblock()
	r.stop()
	if n := s.count(); n < s.taken() {
		t.Errorf("%d events were delivered of %d that the sink had taken", n, s.taken())
	}

	restarted := f.run(s)
	f.put(10)
	s.await(t, 10_010)
	restarted.stop()
	sameOrder(t, ids(t, s.all()), f.rows())
}

// A sink that does not answer keeps no bridge from stopping, whatever it waits for.
func TestStopWhileTheSinkIsDown(t *testing.T) {
	t.Run("in the middle", func(t *testing.T) {
		f := newFixture(t, pgtest.New(t))
		s := newExactSink()
		s.block()
		r := f.run(s)
		f.db.Exec(t, "INSERT INTO ebb.buffer (topic, payload) SELECT 't', to_json(repeat('x', 1000)) FROM generate_series(1, 20000)")
		pgtest.Eventually(t, patience, func() (bool, string) {
			waits := pgtest.Value[string](t, f.db, "SELECT coalesce(max(wait_event), '') FROM pg_stat_activity WHERE backend_type = 'walsender' "+
				"AND application_name = $1", f.slot)
			return waits == "WalSenderWriteData", "the walsender waits for " + waits
		})
		if d := r.stop(); d > 12*time.Second {
			t.Errorf("took %s", d)
		}
		s.unblock()
		r = f.run(s)
		s.await(t, 20_000)
		r.stop()
		sameOrder(t, ids(t, s.all()), f.rows())
	})
	t.Run("at the start", func(t *testing.T) {
		f := newFixture(t, pgtest.New(t))
		s := newTestSink()
		s.resume = make(chan struct{})
		r := f.run(s)
		s.resume <- struct{}{} // for the recovery, which has nothing to do
		pgtest.Eventually(t, patience, func() (bool, string) { return s.timesAsked() == 2, "the sink is not asked where to go on" })
		if d := r.stop(); d > 5*time.Second {
			t.Errorf("took %s", d)
		}
	})
}

// Sessions of the bridge that are ended under load, of whatever kind, make it start over, and nothing is lost, doubled or out
// of order.
func TestTerminatedSessions(t *testing.T) {
	f := newFixture(t, pgtest.New(t))
	s := newExactSink()
	s.slow = 20 * time.Microsecond
	r := f.run(s)
	rounds, each := 6, 3000
	if testing.Short() {
		rounds = 3
	}
	db := f.db.Connect(t)
	for i := range rounds {
		f.put(each)
		s.await(t, i*each+100)
		r.await(bridge.RoleLeader)
		victims := []string{
			"pid IN (SELECT pid FROM pg_locks WHERE locktype = 'advisory')",            // the lock's session
			"backend_type = 'walsender'",                                               // the stream
			"backend_type = 'client backend' AND query LIKE '%pg_publication_tables%'", // that of the ticks
		}
		var ended int
		pgtest.Eventually(t, patience, func() (bool, string) {
			if err := db.QueryRow(t.Context(), `SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
				WHERE application_name = $1 AND `+victims[i%len(victims)], f.slot).Scan(&ended); err != nil {
				t.Fatal(err)
			}
			return ended > 0 || s.count() >= (i+1)*each && i%len(victims) == 2, "nothing was terminated: " + victims[i%len(victims)]
		})
	}
	s.await(t, rounds*each)
	f.awaitBacklog(0)
	r.stop()
	sameOrder(t, ids(t, s.all()), f.rows())
}

// Two bridges on one slot: one leads, the other stands by, takes over when the first ends, and goes on where it was.
func TestStandbyTakesOver(t *testing.T) {
	f := newFixture(t, pgtest.New(t))
	s := newExactSink()
	first := f.run(s)
	first.await(bridge.RoleLeader)
	second := f.run(s)
	second.await(bridge.RoleStandby)
	f.put(100)
	s.await(t, 100)
	if first.role() != bridge.RoleLeader || second.role() != bridge.RoleStandby {
		t.Fatalf("roles are %s and %s", first.role(), second.role())
	}
	first.stop()
	if first.role() != bridge.RoleNone {
		t.Errorf("a bridge that stopped is %s", first.role())
	}
	began := time.Now()
	second.await(bridge.RoleLeader)
	f.put(100)
	s.await(t, 200)
	if d := time.Since(began); d > 15*time.Second {
		t.Errorf("the second one took over after %s", d)
	}
	second.stop()
	sameOrder(t, ids(t, s.all()), f.rows())
}

// A server that is told to stop does not wait for a bridge whose sink is down, and all is delivered after its start.
func TestFastStopOfPostgres(t *testing.T) {
	server := pgtest.NewServer(t, postgres.Config{})
	f := newFixture(t, server.New(t))
	s := newExactSink()
	f.put(1)
	r := f.run(s)
	s.await(t, 1)
	s.block()
	f.put(20_000)
	pgtest.Eventually(t, patience, func() (bool, string) { return s.taken() > 1, "the sink has taken nothing" })
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	began := time.Now()
	if err := server.Stop(ctx, postgres.Fast); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(began); d > 10*time.Second {
		t.Errorf("the server took %s to stop", d)
	}
	if err := server.Start(ctx); err != nil {
		t.Fatal(err)
	}
	s.unblock()
	s.await(t, 20_001)
	f.put(10)
	s.await(t, 20_011)
	f.awaitBacklog(0)
	r.stop()
	sameOrder(t, ids(t, s.all()), f.rows())
}

// What is delivered is recorded, all of it and nothing else, also after a restart; then nothing more is written.
func TestTicks(t *testing.T) {
	f := newFixture(t, pgtest.New(t))
	s := newTestSink()
	r := f.run(s)
	for range 20 {
		f.put(50)
	}
	s.await(t, 1000)
	f.settle()
	unrecorded := func() int64 {
		return pgtest.Value[int64](t, f.db, "SELECT count(*) FROM ebb.events WHERE recorded_at IS NULL")
	}
	if n := unrecorded(); n != 0 {
		t.Errorf("%d events are not recorded", n)
	}

	s.block()
	f.put(10)
	pgtest.Eventually(t, patience, func() (bool, string) { return s.taken() > 1000, "the sink has taken nothing" })
	ticks := pgtest.Value[int64](t, f.db, "SELECT coalesce(max(id), 0) FROM ebb.tick")
	began := time.Now()
	pgtest.Eventually(t, patience, func() (bool, string) {
		if n := unrecorded(); n != 10 {
			t.Fatalf("%d of 10 events that are not delivered are not recorded", n)
		}
		return time.Since(began) > 500*time.Millisecond, "watched for less than five ticks"
	})
	if now := pgtest.Value[int64](t, f.db, "SELECT coalesce(max(id), 0) FROM ebb.tick"); now != ticks {
		t.Errorf("%d ticks were stored while nothing was delivered", now-ticks)
	}

	// Delivered by a bridge that ends before it can record it.
	r.cancel()
	s.unblock()
	r.stop()
	if n := unrecorded(); n != 10 {
		t.Fatalf("%d events are not recorded by a bridge that had stopped, want 10", n)
	}
	r = f.run(s)
	s.await(t, 1010)
	f.settle()
	if n := unrecorded(); n != 0 {
		t.Errorf("%d events that were delivered before the restart are not recorded", n)
	}
	r.stop()
	sameOrder(t, ids(t, s.all()), f.rows())
}

// A publication that no longer publishes stops the bridge. What was passed over meanwhile is delivered after it was mended.
func TestDamagedPublication(t *testing.T) {
	for _, damage := range []struct{ name, sql string }{
		{"table", "ALTER PUBLICATION ebb DROP TABLE ebb.buffer"},
		{"dropped", "DROP PUBLICATION ebb"},
		{"inserts", "ALTER PUBLICATION ebb SET (publish = 'update')"},
	} {
		t.Run(damage.name, func(t *testing.T) {
			f := newFixture(t, pgtest.New(t))
			s := newExactSink()
			r := f.run(s)
			f.put(10)
			s.await(t, 10)
			f.settle()
			f.db.Exec(t, damage.sql)
			err := r.wait()
			if damage.name != "dropped" && !errors.Is(err, sql.ErrPublication) {
				t.Errorf("ended with %v, want ErrPublication", err)
			}
			if err == nil || errors.Is(err, context.Canceled) {
				t.Errorf("ended with %v", err)
			}
			f.put(5)
			f.setup()
			f.put(5)
			r = f.run(s)
			s.await(t, 20)
			f.awaitBacklog(0)
			r.stop()
			sameOrder(t, ids(t, s.all()), f.rows())
		})
	}
}

// A mended publication in the moment in which the bridge has not noticed: rows that were passed over are not taken for delivered.
func TestPublicationDamagedAndMendedInAMoment(t *testing.T) {
	f := newFixture(t, pgtest.New(t))
	s := newExactSink()
	cfg := f.config(s)
	cfg.TickEvery = 1500 * time.Millisecond
	r := f.runWith(cfg)
	f.put(10)
	s.await(t, 10)
	f.settle()
	f.db.Exec(t, "ALTER PUBLICATION ebb DROP TABLE ebb.buffer")
	f.put(5)
	db := f.db.Connect(t)
	if _, err := sql.Apply(t.Context(), db, sql.Setup{Publication: "ebb", Keep: time.Hour}); err != nil {
		t.Fatal(err)
	}
	f.put(5)
	s.await(t, 20)
	f.awaitBacklog(0)
	r.stop()
	sameSet(t, ids(t, s.all()), f.rows())
}

// With a quiet buffer and much other log, the slot lets go of the log, and ebb writes nothing.
func TestQuietBufferPinsNoLog(t *testing.T) {
	f := newFixture(t, pgtest.New(t))
	s := newExactSink()
	f.run(s)
	f.put(1)
	s.await(t, 1)
	f.settle()
	db := f.db.Connect(t)
	before := f.inspect(db)
	const written = "SELECT coalesce(sum(n_tup_ins + n_tup_upd + n_tup_del), 0)::bigint FROM pg_stat_user_tables WHERE schemaname = 'ebb'"
	ticks := pgtest.Value[int64](t, f.db, "SELECT count(*) FROM ebb.tick")
	pgtest.Eventually(t, patience, func() (bool, string) {
		counted := pgtest.Value[int64](t, f.db, "SELECT n_tup_ins FROM pg_stat_user_tables WHERE relid = 'ebb.tick'::regclass")
		return counted == ticks, "the statistics are behind"
	})
	writes := pgtest.Value[int64](t, f.db, written)

	megabytes := 200
	if testing.Short() {
		megabytes = 32
	}
	f.db.Exec(t, "CREATE TABLE other (v text)", "ALTER TABLE other ALTER v SET STORAGE EXTERNAL")
	for range megabytes / 4 {
		f.db.Exec(t, "INSERT INTO other SELECT repeat(md5(i::text), 1024) FROM generate_series(1, 128) i")
	}
	f.db.Exec(t, "CHECKPOINT")
	end := f.inspect(db).Current
	if grown := int64(end - before.Current); grown < int64(megabytes)<<20 {
		t.Fatalf("only %d bytes of log were written", grown)
	}
	pgtest.Eventually(t, patience, func() (bool, string) {
		now := f.inspect(db)
		if now.ConfirmedFlush >= end && now.Restart > before.Current {
			return true, ""
		}
		f.db.Exec(t, "CHECKPOINT") // logs the running transactions, by which a restart position is found
		return false, fmt.Sprintf("confirmed %s, restart %s; were %s, %s; log ends at %s", now.ConfirmedFlush, now.Restart, before.ConfirmedFlush,
			before.Restart, end)
	})
	if now := pgtest.Value[int64](t, f.db, "SELECT count(*) FROM ebb.tick"); now != ticks {
		t.Errorf("%d ticks were stored", now-ticks)
	}
	if now := pgtest.Value[int64](t, f.db, written); now != writes {
		t.Errorf("%d rows of schema ebb were written", now-writes)
	}
}

// Columns come and go while events flow.
func TestColumnsChangeWhileRunning(t *testing.T) {
	f := newFixture(t, pgtest.New(t))
	s := newExactSink()
	r := f.run(s)
	producing := make(chan struct{})
	finish := make(chan struct{})
	errs := make(chan error, 1)
	producer := f.db.Connect(t)
	go func() {
		defer close(producing)
		for {
			select {
			case <-finish:
				return
			default:
			}
			if err := pgx.BeginFunc(context.Background(), producer, func(tx pgx.Tx) error {
				_, err := tx.Exec(context.Background(), "SELECT ebb.put('t', '{}') FROM generate_series(1, 5)")
				return err
			}); err != nil {
				errs <- err
				return
			}
		}
	}()
	for range 10 {
		for _, ddl := range []string{
			"ALTER TABLE ebb.buffer ADD COLUMN extra text DEFAULT 'x'",
			"ALTER TABLE ebb.buffer DROP COLUMN extra",
		} {
			n := s.count()
			f.db.Exec(t, ddl)
			s.await(t, n+20)
		}
	}
	close(finish)
	<-producing
	select {
	case err := <-errs:
		t.Fatal(err)
	default:
	}
	want := f.rows()
	s.await(t, len(want))
	r.stop()
	sameOrder(t, ids(t, s.all()), want)
}

// A database in another encoding: what the bridge delivers is UTF-8.
func TestLatin1Database(t *testing.T) {
	server := pgtest.New(t)
	server.Exec(t, "CREATE DATABASE "+server.Name+"_l1 ENCODING 'LATIN1' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'")
	t.Cleanup(func() {
		server.Exec(t, "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = '"+server.Name+"_l1'")
		server.Exec(t, "DROP DATABASE "+server.Name+"_l1 WITH (FORCE)")
	})
	cfg, err := pgx.ParseConfig(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	url := fmt.Sprintf("postgres://%s@%s:%d/%s_l1", cfg.User, cfg.Host, cfg.Port, server.Name)
	f := newFixture(t, &pgtest.Database{Name: server.Name + "_l1", URL: url})
	s := newExactSink()
	const utf8, put = "SET client_encoding = 'UTF8'", `SELECT ebb.put('tøpic', '{"ä": "ÿ"}', 'kéy')`
	f.db.Exec(t, "SELECT pg_drop_replication_slot('"+f.slot+"')", utf8, put)
	f.setup() // the first row comes by recovery, the second by the slot
	f.db.Exec(t, utf8, put, strings.ReplaceAll(put, "ebb.put", "ebb.emit"))
	r := f.run(s)
	s.await(t, 3)
	r.stop()
	for i, e := range s.all() {
		if string(e.Topic) != "tøpic" || string(e.Key) != "kéy" || string(e.Payload) != `{"ä": "ÿ"}` {
			t.Errorf("event %d has topic %q, key %q, payload %q", i, e.Topic, e.Key, e.Payload)
		}
	}
}

// lastGaspSink takes some batches, waits until its Run is ended, and then takes all that it can still get.
type lastGaspSink struct {
	*exactSink
	took chan []event.Event
}

func (s *lastGaspSink) Run(ctx context.Context, in <-chan *event.Batch, _ sink.Outcome) error {
	var took []event.Event
	for n := 0; ; n++ {
		if n == 20 { // the socket is full by now, and the reader has several batches at hand
			<-ctx.Done()
		}
		b, ok := <-in
		if !ok {
			break
		}
		for _, e := range b.Events {
			took = append(took, event.Event{ID: bytes.Clone(e.ID)})
		}
		b.Release()
	}
	s.took <- took
	return ctx.Err()
}

// When a bridge is interrupted while it waits for its sink, the batch in its hand is the last one: a sink that got those behind
// it would publish them in its place, and the stream's tail would then say that it had been delivered.
func TestNothingFollowsABatchThatWasNotHandedOver(t *testing.T) {
	f := newFixture(t, pgtest.New(t))
	s := &lastGaspSink{exactSink: newExactSink(), took: make(chan []event.Event, 1)}
	f.db.Exec(t, "INSERT INTO ebb.buffer (topic, payload) SELECT 't', '{}' FROM generate_series(1, 200000)") // small: several batches a gulp
	want := f.rows()
	r := f.run(s)
	db := f.db.Connect(t)
	var walsender int32
	for range 6 {
		pgtest.Eventually(t, patience, func() (bool, string) {
			err := db.QueryRow(t.Context(), `SELECT pid FROM pg_stat_activity
				WHERE application_name = $1 AND backend_type = 'walsender' AND wait_event = 'WalSenderWriteData' AND pid <> $2`, f.slot, walsender).
				Scan(&walsender)
			if err != nil && !errors.Is(err, pgx.ErrNoRows) {
				t.Fatal(err)
			}
			return err == nil, "the walsender does not wait"
		})
		f.db.Exec(t, "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND "+
			"database = (SELECT oid FROM pg_database WHERE datname = current_database())")
		select {
		case events := <-s.took:
			took := ids(t, events)
			sameOrder(t, took, want[:len(took)])
		case <-r.done:
			t.Fatalf("the bridge ended with %v", r.err)
		}
	}
	r.stop()
}
