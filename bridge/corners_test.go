package bridge_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats.go"
	natsjs "github.com/nats-io/nats.go/jetstream"

	"ebb/bridge"
	"ebb/internal/natstest"
	"ebb/internal/pgtest"
	"ebb/internal/postgres"
	"ebb/sink"
	"ebb/sink/jetstream"
	"ebb/sql"
)

// syncStandby is a server whose synchronous standby can be made to hang.
type syncStandby struct {
	t      *testing.T
	server *pgtest.Server
}

func (s syncStandby) hang() {
	s.t.Helper()
	if err := s.server.SetSetting(s.t.Context(), "synchronous_standby_names", "nobody"); err != nil {
		s.t.Fatal(err)
	}
}

func (s syncStandby) release() {
	s.t.Helper()
	if err := s.server.ResetSetting(s.t.Context(), "synchronous_standby_names"); err != nil {
		s.t.Fatal(err)
	}
}

// putLocal inserts without waiting for the standby.
func (f *fixture) putLocal(n int) {
	f.t.Helper()
	f.db.Exec(f.t, fmt.Sprintf("SET synchronous_commit = local; INSERT INTO ebb.buffer (topic, payload) SELECT 't', json_build_object('n', i) FROM generate_series(1, %d) i", n))
}

// waits runs a statement that hangs at its commit, and returns when it does. The channel is closed when it has ended.
func (f *fixture) waits(statement string) <-chan struct{} {
	f.t.Helper()
	n := pgtest.Value[int64](f.t, f.db, "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'")
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := pgx.Connect(context.Background(), f.db.URL)
		if err != nil {
			f.t.Error(err)
			return
		}
		defer conn.Close(context.Background())
		if _, err := conn.Exec(context.Background(), statement); err != nil {
			f.t.Error(err)
		}
	}()
	pgtest.Eventually(f.t, patience, func() (bool, string) {
		return pgtest.Value[int64](f.t, f.db, "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'") > n, "it does not wait for the standby"
	})
	return done
}

const putOne = `INSERT INTO ebb.buffer (topic, payload) VALUES ('t', '{"waits": true}')`

// A transaction that waits for a synchronous standby is in the slot's snapshot, but no query sees its rows yet.
func TestSlotMadeWhileACommitWaits(t *testing.T) {
	t.Parallel()
	server := pgtest.NewServer(t, postgres.Config{})
	f := newFixture(t, server.New(t))
	standby := syncStandby{t, server}
	f.db.Exec(t, "SELECT pg_drop_replication_slot('"+f.slot+"')")
	begin := func() (*pgx.Conn, string) {
		conn := f.db.Connect(t)
		var xid string
		if _, err := conn.Exec(t.Context(), "SET synchronous_commit = local"); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Exec(t.Context(), "BEGIN"); err != nil {
			t.Fatal(err)
		}
		if err := conn.QueryRow(t.Context(), "SELECT pg_current_xact_id()::text").Scan(&xid); err != nil {
			t.Fatal(err)
		}
		return conn, xid
	}
	awaited := func(xid string) {
		t.Helper()
		pgtest.Eventually(t, patience, func() (bool, string) {
			return pgtest.Value[bool](t, f.db, "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND transactionid::text = $1)", xid), "nobody waits for " + xid
		})
	}
	standby.hang()
	x0, id0 := begin()
	s := newExactSink()
	r := f.run(s)
	awaited(id0)
	x1, id1 := begin()
	if _, err := x0.Exec(t.Context(), "COMMIT"); err != nil {
		t.Fatal(err)
	}
	awaited(id1)
	done := f.waits(putOne)
	if _, err := x1.Exec(t.Context(), "COMMIT"); err != nil {
		t.Fatal(err)
	}
	pgtest.Eventually(t, patience, func() (bool, string) {
		return pgtest.Value[bool](t, f.db, "SELECT snapshot IS NOT NULL FROM ebb.slot"), "the slot is not made"
	})
	f.putLocal(1)
	if pgtest.Value[bool](t, f.db, "SELECT recovered_at IS NOT NULL FROM ebb.slot") {
		t.Error("the recovery is done before all that belongs to it can be seen")
	}
	standby.release()
	<-done
	f.put(1)
	s.await(t, 3)
	f.awaitBacklog(0)
	r.stop()
	sameSet(t, ids(t, s.all()), f.rows())
}

// A change of the publication that waits for a synchronous standby is decoded before any query sees it.
func TestPublicationChangeWaits(t *testing.T) {
	t.Parallel()
	server := pgtest.NewServer(t, postgres.Config{})
	f := newFixture(t, server.New(t))
	standby := syncStandby{t, server}
	s := newExactSink()
	cfg := f.config(s)
	cfg.TickEvery = time.Second
	r := f.runWith(cfg)
	f.put(5)
	s.await(t, 5)
	f.awaitBacklog(0)
	standby.hang()
	f.putLocal(1)
	s.await(t, 6)
	done := f.waits("ALTER PUBLICATION ebb DROP TABLE ebb.buffer")
	f.putLocal(3)
	f.awaitBacklog(0) // the ticks say that these are delivered
	t.Logf("recorded with %d of 9 delivered", s.count())
	standby.release()
	<-done
	if err := r.wait(); !errors.Is(err, sql.ErrPublication) {
		t.Fatalf("ended with %v", err)
	}
	f.setup()
	r = f.run(s)
	f.put(1)
	f.awaitBacklog(0)
	r.stop()
	sameSet(t, ids(t, s.all()), f.rows())
}

// The tick from which ids are looked for in the stream may have been stored after an event that the newest tick does not see.
func TestRecoveryFloor(t *testing.T) {
	t.Parallel()
	server := pgtest.NewServer(t, postgres.Config{})
	f := newFixture(t, server.New(t))
	standby := syncStandby{t, server}
	s := newExactSink()
	r := f.run(s)
	f.put(5)
	s.await(t, 5)
	f.settle()
	standby.hang()
	s.block()
	f.putLocal(1)
	time.Sleep(500 * time.Millisecond) // a tick has been begun
	done := f.waits(putOne)
	time.Sleep(500 * time.Millisecond)
	s.unblock()
	s.await(t, 7)
	time.Sleep(time.Second) // two ticks are stored
	r.stop()
	f.db.Exec(t, "SELECT pg_drop_replication_slot('"+f.slot+"')")
	standby.release()
	<-done
	r = f.run(s)
	f.put(1)
	f.awaitBacklog(0)
	r.stop()
	sameSet(t, ids(t, s.all()), f.rows())
}

// What a commit that waits had put is recorded once it can be seen, and a restart finds nothing to make the slot anew for.
func TestNeverRecorded(t *testing.T) {
	t.Parallel()
	server := pgtest.NewServer(t, postgres.Config{})
	f := newFixture(t, server.New(t))
	standby := syncStandby{t, server}
	s := newExactSink()
	r := f.run(s)
	f.put(5)
	s.await(t, 5)
	f.settle()
	standby.hang()
	done := f.waits(putOne)
	s.await(t, 6)
	f.settle()
	standby.release()
	<-done
	time.Sleep(3 * time.Second)
	if n := pgtest.Value[int64](t, f.db, "SELECT count(*) FROM ebb.backlog"); n != 0 {
		t.Errorf("3 s later, %d delivered events are in the backlog", n)
	}
	made := pgtest.Value[int](t, f.db, "SELECT made FROM ebb.slot")
	r.stop()
	r = f.run(s)
	f.put(1)
	f.awaitBacklog(0)
	r.stop()
	if n := pgtest.Value[int](t, f.db, "SELECT made FROM ebb.slot"); n != made {
		t.Errorf("the slot was made anew: %s", pgtest.Value[string](t, f.db, "SELECT made_because FROM ebb.slot"))
	}
	t.Log(pgtest.Value[string](t, f.db, "SELECT string_agg(format('%s lsn %s snapshot %s seq %s', id, lsn, snapshot, stream_seq), E'\\n' ORDER BY id) FROM ebb.tick"))
	t.Log(pgtest.Value[string](t, f.db, "SELECT string_agg(format('%s xid %s', id, xid), ', ' ORDER BY id) FROM ebb.buffer"))
	sameSet(t, ids(t, s.all()), f.rows())
}

// wokenSink is a stream into which a leader that was frozen publishes what it had pending, after the scan of the one that follows it.
type wokenSink struct {
	*jetstream.Sink
	once sync.Once
	wake func()
}

func (s *wokenSink) Scan(ctx context.Context, after uint64, fn func(sink.Stored) error) error {
	err := s.Sink.Scan(ctx, after, fn)
	s.once.Do(s.wake)
	return err
}

// A leader that was frozen during a recovery and wakes up.
func TestFrozenLeaderWakesDuringRecovery(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	server := natstest.New(t)
	f.put(10)
	f.delivered(server, 10)
	// The leader that is frozen has this from the slot, and has not published it.
	f.put(1)
	id := f.rows()[10]
	f.db.Exec(t, "SELECT pg_drop_replication_slot('"+f.slot+"')")
	js := server.JetStream(t)
	s := &wokenSink{Sink: f.stream(server), wake: func() {
		_, err := js.PublishMsg(t.Context(), &nats.Msg{Subject: "ebb.t", Data: []byte(`{"n" : 1}`), Header: nats.Header{
			"Nats-Expected-Last-Sequence": {"10"}, "ce-id": {fmt.Sprint(id)}, "Ebb-Position": {"1:FF/0:1"}}})
		if err != nil {
			t.Error(err)
		}
	}}
	r := f.run(s)
	f.awaitBacklog(0)
	r.stop()
	got, _ := f.streamed(server, 11)
	sameSet(t, got, f.rows())
}

// A stream that its limits have emptied; the slot is lost, and the bridge is killed while it recovers.
func TestKilledWhileRecoveringIntoAnEmptiedStream(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	server := natstest.New(t)
	f.put(10)
	f.delivered(server, 10)
	if err := stream(t, server).Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.db.Exec(t, "SELECT pg_drop_replication_slot('"+f.slot+"')")
	f.put(5)
	cfg := f.config(f.stream(server))
	killed := false
	cfg.InterruptAt(func(place string) error {
		if place == "delivered page" && !killed {
			killed = true
			return errors.New("killed")
		}
		return nil
	})
	r := f.runWith(cfg)
	done := make(chan struct{})
	go func() {
		<-r.done
		close(done)
	}()
	pgtest.Eventually(t, patience, func() (bool, string) {
		select {
		case <-done:
			t.Fatalf("ended with %v", r.err)
		default:
		}
		return pgtest.Value[int64](t, f.db, "SELECT count(*) FROM ebb.backlog") == 0, "backlog"
	})
	r.stop()
}

// The permission to go on with a stream of another source goes with a copy of the database.
func TestCopyOfADatabaseThatHasAdopted(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	server := natstest.New(t)
	js := server.JetStream(t)
	if _, err := js.CreateStream(t.Context(), natsjs.StreamConfig{Name: "EBB", Subjects: []string{"ebb.>"}, Metadata: map[string]string{
		"ebb-system-identifier": "1111", "ebb-database": "old", "ebb-slot": "ebb", "ebb-buffer": "x"}}); err != nil {
		t.Fatal(err)
	}
	f.put(5)
	cfg := f.config(f.stream(server))
	cfg.Adopt = true
	r := f.runWith(cfg) // production has moved to a new cluster
	f.awaitBacklog(0)
	r.stop()
	// Staging is a dump of production, restored elsewhere: what it holds is of another cluster.
	f.db.Exec(t, "SELECT pg_drop_replication_slot('"+f.slot+"')",
		"UPDATE ebb.slot SET system_identifier = '2222'", "UPDATE ebb.tick SET system_identifier = '2222'", "UPDATE ebb.epoch SET system_identifier = '2222'")
	f.setup()
	f.put(1)
	r = f.run(f.stream(server))
	pgtest.Eventually(t, patience, func() (bool, string) {
		select {
		case <-r.done:
			return true, ""
		default:
		}
		if n := stream(t, server).CachedInfo().State.LastSeq; n > 5 {
			t.Fatalf("staging has published into production's stream: it ends at %d", n)
		}
		return false, "it neither halts nor publishes"
	})
	if !errors.Is(r.err, bridge.ErrOtherSource) {
		t.Fatal(r.err)
	}
}

// In a stream that others publish to, an event that is refused is passed over at the next start.
func TestRefusedEventOfASharedStream(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	server := natstest.New(t)
	js := server.JetStream(t)
	cfg := natsjs.StreamConfig{Name: "EBB", Subjects: []string{"ebb.>"}, MaxMsgSize: 2000}
	if _, err := js.CreateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	f.put(3)
	blocking := f.config(f.sharedStream(server))
	blocking.Block = true
	r := f.runWith(blocking)
	f.streamed(server, 3)
	f.settle()
	f.db.Exec(t, `INSERT INTO ebb.buffer (topic, payload) SELECT 't', to_json(repeat('x', n)) FROM unnest(ARRAY[10, 5000, 10, 10]) n`)
	if err := r.wait(); err == nil || !strings.Contains(err.Error(), "max_msg_size") {
		t.Fatalf("ended with %v", err)
	}
	cfg.MaxMsgSize = -1 // as the error says
	if _, err := js.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	r = f.run(f.sharedStream(server))
	f.awaitBacklog(0)
	r.stop()
	got, _ := f.streamed(server, 1)
	sameSet(t, got, f.rows())
}

// A broker has forgotten events, and others have published since.
func TestForgottenBehindOthersMessages(t *testing.T) {
	t.Parallel()
	for _, exclusive := range []bool{true, false} {
		t.Run(fmt.Sprintf("exclusive %v", exclusive), func(t *testing.T) {
			f := newFixture(t, pgtest.New(t))
			server := natstest.New(t)
			r := f.run(f.openStream(server, exclusive))
			f.put(10)
			f.streamed(server, 10)
			f.settle()
			r.stop()
			_, messages := f.streamed(server, 10)
			f.forgetBehind(server, messages, 5)
			js := server.JetStream(t)
			for range 8 {
				if _, err := js.PublishMsg(t.Context(), &nats.Msg{Subject: "ebb.theirs", Data: []byte("x"), Header: nats.Header{"ce-id": {"0"}}}); err != nil {
					t.Fatal(err)
				}
			}
			f.put(2)
			r = f.run(f.openStream(server, exclusive))
			pgtest.Eventually(t, patience, func() (bool, string) {
				select {
				case <-r.done:
					t.Logf("halted with %v", r.err)
					return true, ""
				default:
				}
				return pgtest.Value[int64](t, f.db, "SELECT count(*) FROM ebb.backlog") == 0, "backlog"
			})
			select {
			case <-r.done: // good
				return
			default:
			}
			r.stop()
			got, _ := f.streamed(server, 1)
			var ours []int64
			for _, id := range got {
				if id != 0 {
					ours = append(ours, id)
				}
			}
			sameSet(t, ours, f.rows())
		})
	}
}

// Old rows, long since delivered, have been removed; what was forgotten is all in the buffer.
func TestOldRowsRemoved(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	server := natstest.New(t)
	f.put(10)
	f.delivered(server, 10)
	f.db.Exec(t, "SELECT pg_current_xact_id()") // time goes by
	f.put(5)
	f.delivered(server, 15)
	f.put(5)
	f.delivered(server, 20)
	f.db.Exec(t, "DELETE FROM ebb.buffer WHERE id <= 10")
	_, messages := f.streamed(server, 20)
	f.forgetBehind(server, messages, 15)
	r := f.run(f.stream(server))
	pgtest.Eventually(t, patience, func() (bool, string) {
		select {
		case <-r.done:
			t.Fatalf("ended with %v", r.err)
		default:
		}
		return stream(t, server).CachedInfo().State.LastSeq >= 20, "not delivered again"
	})
	r.stop()
}

// A new stream forgets what it was given, and is filled in with what another one had been given before.
func TestForgottenAfterASwitch(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	old := newExactSink()
	r := f.run(old)
	f.put(10)
	old.await(t, 10)
	f.settle()
	r.stop()
	server := natstest.New(t)
	cfg := func() bridge.Config {
		cfg := f.config(f.stream(server))
		cfg.Destination = "nats EBB"
		return cfg
	}
	r = f.runWith(cfg())
	f.put(5)
	f.streamed(server, 5)
	f.settle()
	r.stop()
	f.forgetBehind(server, nil, 0)
	r = f.runWith(cfg())
	f.awaitBacklog(0)
	f.settle()
	r.stop()
	got, _ := f.streamed(server, 5)
	sameSet(t, got, f.rows()[10:])
}

// The tick that the stream still reaches was forgotten, because nothing had happened for TickKeep; its limits have removed older messages.
func TestForgottenAfterAQuietTime(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	server := natstest.New(t)
	f.put(5)
	r := f.run(f.stream(server))
	f.streamed(server, 5)
	f.settle()
	r.stop()
	if err := stream(t, server).Purge(t.Context(), natsjs.WithPurgeSequence(4)); err != nil { // as max_age does
		t.Fatal(err)
	}
	restore := backup(t, server)
	f.db.Exec(t, "UPDATE ebb.tick SET delivered_at = delivered_at - interval '1 day'") // a quiet night
	r = f.run(f.stream(server))
	f.put(1)
	f.streamed(server, 3)
	f.settle()
	r.stop()
	restore()
	r = f.run(f.stream(server))
	f.awaitBacklog(0)
	f.settle()
	r.stop()
	got, _ := f.streamed(server, 3)
	sameSet(t, got, f.rows()[3:])
}

// A bridge that starts while setup makes the slot ends setup's walsender.
func TestBridgeStartsDuringSetup(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	f.db.Exec(t, "SELECT pg_drop_replication_slot('"+f.slot+"')")
	conn := f.db.Connect(t)
	if _, err := conn.Exec(t.Context(), "BEGIN; SELECT pg_current_xact_id()"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	db, err := sql.Connect(ctx, f.db.URL, f.slot)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close(ctx)
	setup := make(chan error, 1)
	go func() {
		_, err := bridge.EnsureSlot(ctx, db, f.config(nil))
		setup <- err
	}()
	pgtest.Eventually(t, patience, func() (bool, string) {
		return pgtest.Value[bool](t, f.db, "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND locktype = 'transactionid')"), "setup does not wait"
	})
	s := newExactSink()
	r := f.run(s)
	time.Sleep(time.Second)
	if _, err := conn.Exec(t.Context(), "COMMIT"); err != nil {
		t.Fatal(err)
	}
	if err := <-setup; err != nil {
		t.Errorf("setup ended with %v", err)
	}
	f.put(1)
	f.awaitBacklog(0)
	r.stop()
}

// awaySink is a stream whose server goes away for a moment when it is scanned for the first time.
type awaySink struct {
	*jetstream.Sink
	once sync.Once
	away func()
}

func (s *awaySink) Scan(ctx context.Context, after uint64, fn func(sink.Stored) error) error {
	s.once.Do(s.away)
	return s.Sink.Scan(ctx, after, fn)
}

// NATS restarts while a recovery looks for what the stream holds.
func TestStreamAwayDuringAScan(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	server := natstest.New(t)
	f.put(10)
	f.delivered(server, 10)
	f.put(5)
	f.db.Exec(t, "SELECT pg_drop_replication_slot('"+f.slot+"')")
	cfg := f.config(f.stream(server))
	cfg.TickEvery = time.Hour
	r := f.runWith(cfg) // no tick follows but that of the recovery
	f.streamed(server, 15)
	f.put(3)
	f.streamed(server, 18)
	r.stop()
	f.put(5)
	f.db.Exec(t, "SELECT pg_drop_replication_slot('"+f.slot+"')")
	started := make(chan struct{})
	s := &awaySink{Sink: f.stream(server), away: func() {
		server.Stop(t)
		go func() {
			defer close(started)
			time.Sleep(time.Second)
			server.Start(t)
		}()
	}}
	r = f.run(s)
	<-started
	pgtest.Eventually(t, patience, func() (bool, string) {
		select {
		case <-r.done:
			t.Fatalf("ended with %v", r.err)
		default:
		}
		return pgtest.Value[int64](t, f.db, "SELECT count(*) FROM ebb.backlog") == 0, "backlog"
	})
	r.stop()
	f.onceInStream(server)
}

// The rights of ebb_bridge are enough for every way to go on. (Passes.)
func TestRights(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	name := f.slot + "_run"
	f.db.Exec(t, "CREATE ROLE "+name+" LOGIN REPLICATION", "GRANT ebb_bridge TO "+name)
	t.Cleanup(func() { f.db.Exec(t, "DROP OWNED BY "+name, "DROP ROLE "+name) })
	server := natstest.New(t)
	cfg := func() bridge.Config {
		cfg := f.config(f.stream(server))
		cfg.Postgres = strings.Replace(f.db.URL, "postgres@", name+"@", 1)
		if cfg.Postgres == f.db.URL {
			t.Fatal(cfg.Postgres)
		}
		cfg.Adopt = true
		return cfg
	}
	run := func() {
		t.Helper()
		r := f.runWith(cfg())
		pgtest.Eventually(t, patience, func() (bool, string) {
			select {
			case <-r.done:
				t.Fatalf("ended with %v", r.err)
			default:
			}
			return pgtest.Value[int64](t, f.db, "SELECT count(*) FROM ebb.backlog") == 0, "backlog"
		})
		f.settle()
		r.stop()
		f.onceInStream(server)
	}
	f.put(5)
	run()
	f.put(5)
	_, messages := f.streamed(server, 5)
	f.forgetBehind(server, messages, 3)
	run()
	f.db.Exec(t, "SELECT pg_drop_replication_slot('"+f.slot+"')")
	f.put(2)
	run()
	f.db.Exec(t, "UPDATE ebb.slot SET timeline = 7")
	f.put(2)
	run()
	f.db.Exec(t, "UPDATE ebb.slot SET publication = '1/2'")
	f.put(2)
	run()
}
