package bridge_test

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	natsjs "github.com/nats-io/nats.go/jetstream"

	"ebb/bridge"
	"ebb/event"
	"ebb/internal/natstest"
	"ebb/internal/pgtest"
	"ebb/internal/postgres"
	"ebb/replication"
	"ebb/sql"
)

// delivered runs a bridge until the stream holds n messages and everything is recorded, and stops it.
func (f *fixture) delivered(server *natstest.Server, n int) {
	f.t.Helper()
	r := f.run(f.stream(server))
	f.streamed(server, n)
	f.settle()
	r.stop()
}

// onceInStream waits until the stream holds as many events as the buffer has rows, and compares them, in whatever order.
func (f *fixture) onceInStream(server *natstest.Server) []natstest.Msg {
	f.t.Helper()
	rows := f.rows()
	got, messages := f.streamed(server, len(rows))
	sameSet(f.t, got, rows)
	return messages
}

func stream(t *testing.T, server *natstest.Server) natsjs.Stream {
	t.Helper()
	s, err := server.JetStream(t).Stream(t.Context(), "EBB")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// backup copies the store of a server, which is stopped for it.
func backup(t *testing.T, server *natstest.Server) (restore func()) {
	t.Helper()
	dir := t.TempDir()
	server.Stop(t)
	if err := os.CopyFS(dir, os.DirFS(server.StoreDir())); err != nil {
		t.Fatal(err)
	}
	server.Start(t)
	return func() {
		t.Helper()
		server.Stop(t)
		if err := os.RemoveAll(server.StoreDir()); err != nil {
			t.Fatal(err)
		}
		if err := os.CopyFS(server.StoreDir(), os.DirFS(dir)); err != nil {
			t.Fatal(err)
		}
		server.Start(t)
	}
}

// A broker that comes back with an earlier state, or with none, is filled in again, whether the bridge runs meanwhile or not.
func TestForgetfulBroker(t *testing.T) {
	t.Parallel()
	for _, running := range []bool{false, true} {
		for _, c := range []struct {
			name   string
			forget func(t *testing.T, server *natstest.Server, restore func())
			kept   int
		}{
			{"restored", func(_ *testing.T, _ *natstest.Server, restore func()) { restore() }, 300},
			{"stream deleted", func(t *testing.T, server *natstest.Server, _ func()) {
				if err := server.JetStream(t).DeleteStream(t.Context(), "EBB"); err != nil {
					t.Fatal(err)
				}
			}, 0},
		} {
			t.Run(fmt.Sprintf("%s, running %v", c.name, running), func(t *testing.T) {
				f := newFixture(t, pgtest.New(t))
				server := natstest.New(t)
				f.put(300)
				f.delivered(server, 300)
				restore := backup(t, server)
				r := f.run(f.stream(server))
				f.put(400)
				f.streamed(server, 700)
				f.settle()
				if !running {
					r.stop()
					f.put(10)
				}
				c.forget(t, server, restore)
				if !running {
					r = f.run(f.stream(server))
				}
				f.put(50)
				f.awaitBacklog(0)
				messages := f.onceInStream(server)
				recovered := 0
				for i, m := range messages {
					if i < c.kept != (m.Header.Get("Ebb-Origin") == "") && i < 700 {
						t.Fatalf("message %d has origin %q", i, m.Header.Get("Ebb-Origin"))
					}
					if m.Header.Get("Ebb-Origin") == string(event.Recovered) {
						recovered++
					}
				}
				if recovered < 400 {
					t.Errorf("%d events were recovered", recovered)
				}
				r.stop()
				// And it is at rest: another start delivers nothing.
				r = f.run(f.stream(server))
				f.put(1)
				f.awaitBacklog(0)
				f.onceInStream(server)
				r.stop()
			})
		}
	}
}

// What was forgotten and is not in the buffer any more is not passed over in silence.
func TestForgottenAndRemoved(t *testing.T) {
	t.Parallel()
	for _, remove := range []string{"DELETE FROM ebb.buffer WHERE id = 17", "TRUNCATE ebb.buffer"} {
		t.Run(remove, func(t *testing.T) {
			f := newFixture(t, pgtest.New(t))
			server := natstest.New(t)
			f.put(100)
			f.delivered(server, 100)
			f.db.Exec(t, remove)
			if err := server.JetStream(t).DeleteStream(t.Context(), "EBB"); err != nil {
				t.Fatal(err)
			}
			f.put(10)
			for range 2 {
				err := f.run(f.stream(server)).wait()
				if !errors.Is(err, bridge.ErrGap) || !strings.Contains(err.Error(), "--accept-gap") || !strings.Contains(err.Error(), "100 messages") {
					t.Fatalf("ended with %v", err)
				}
			}
			if _, err := server.JetStream(t).Stream(t.Context(), "EBB"); !errors.Is(err, natsjs.ErrStreamNotFound) {
				t.Errorf("the stream that somebody may want to restore: %v", err)
			}
			cfg := f.config(f.stream(server))
			cfg.AcceptGap = true
			r := f.runWith(cfg)
			f.awaitBacklog(0)
			f.onceInStream(server)
			r.stop()
			f.put(10)
			r = f.run(f.stream(server))
			f.awaitBacklog(0)
			f.onceInStream(server)
			r.stop()

			// Rows that were removed before what the stream still holds do not matter.
			f.settle()
			restore := backup(t, server)
			f.put(10)
			f.delivered(server, len(f.rows()))
			restore()
			r = f.run(f.stream(server))
			f.awaitBacklog(0)
			f.onceInStream(server)
			r.stop()
		})
	}
}

// A broker that forgets again and again while it is being filled in.
func TestForgettingDuringRecovery(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	server := natstest.New(t)
	f.put(2000)
	f.delivered(server, 2000)
	if err := server.JetStream(t).DeleteStream(t.Context(), "EBB"); err != nil {
		t.Fatal(err)
	}
	forgets := 0
	cfg := f.config(f.stream(server))
	cfg.InterruptAt(func(place string) error {
		if place == "delivered page" && forgets < 3 {
			forgets++
			if err := server.JetStream(t).DeleteStream(t.Context(), "EBB"); err != nil {
				t.Error(err)
			}
		}
		return nil
	})
	r := f.runWith(cfg)
	f.put(10)
	f.awaitBacklog(0)
	f.onceInStream(server)
	r.stop()
	if forgets != 3 {
		t.Errorf("it forgot %d times", forgets)
	}
}

// A stream that was emptied by its own limits has forgotten nothing: the events behind the newest tick are counted.
func TestStreamEmptiedByItsLimits(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	server := natstest.New(t)
	f.put(100)
	f.delivered(server, 100)
	last := uint64(100)
	for _, unrecorded := range []int{0, 50} {
		cfg := f.config(f.stream(server))
		cfg.TickEvery = time.Hour
		r := f.runWith(cfg)
		f.put(unrecorded)
		last += uint64(unrecorded)
		pgtest.Eventually(t, patience, func() (bool, string) {
			return stream(t, server).CachedInfo().State.LastSeq == last, "not delivered"
		})
		r.stop()
		if err := stream(t, server).Purge(t.Context()); err != nil {
			t.Fatal(err)
		}
		// A bridge that does nothing but to count the events that are gone records that it has.
		r = f.run(f.stream(server))
		f.settle()
		r.stop()
		f.put(20)
		last += 20
		r = f.run(f.stream(server))
		f.awaitBacklog(0)
		r.stop()
		info := stream(t, server).CachedInfo().State
		if info.LastSeq != last || info.Msgs != 20 {
			t.Fatalf("after %d events without a record, the stream ends at %d and holds %d messages, want %d and 20", unrecorded, info.LastSeq, info.Msgs, last)
		}
		got, _ := f.streamed(server, 20)
		rows := f.rows()
		sameOrder(t, got, rows[len(rows)-20:])
		if err := stream(t, server).Purge(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

// A message of somebody else between those of the bridge is told apart from one that has taken an event's place.
func TestForeignMessagesInTheStream(t *testing.T) {
	t.Parallel()
	foreign := func(t *testing.T, server *natstest.Server) {
		t.Helper()
		if _, err := server.JetStream(t).PublishMsg(t.Context(), &nats.Msg{Subject: "ebb.theirs", Data: []byte("x"), Header: nats.Header{"ce-id": {"0"}}}); err != nil {
			t.Fatal(err)
		}
	}
	for _, where := range []string{"tail", "middle", "behind the recorded ones"} {
		t.Run(where, func(t *testing.T) {
			f := newFixture(t, pgtest.New(t))
			server := natstest.New(t)
			f.put(10)
			f.delivered(server, 10)
			cfg := f.config(f.stream(server))
			if where != "behind the recorded ones" {
				cfg.TickEvery = time.Hour // what follows is not recorded
			}
			r := f.runWith(cfg)
			f.put(10)
			f.streamed(server, 20)
			foreign(t, server)
			messages := 21
			if where == "middle" {
				f.put(1) // of more than one, the first would be refused and the next ones let through
				messages = 22
			}
			f.streamed(server, messages)
			if where == "behind the recorded ones" {
				f.settle()
			}
			r.stop()
			f.put(5)
			r = f.run(f.stream(server))
			f.awaitBacklog(0)
			got, _ := f.streamed(server, messages+5)
			r.stop()
			var ours []int64
			for _, id := range got {
				if id != 0 {
					ours = append(ours, id)
				}
			}
			sameOrder(t, ours, f.rows())
		})
	}

	// As when a foreign message had the place of an event whose successor was let through.
	t.Run("in the place of an event", func(t *testing.T) {
		f := newFixture(t, pgtest.New(t))
		server := natstest.New(t)
		f.put(10)
		f.delivered(server, 10)
		cfg := f.config(f.stream(server))
		cfg.TickEvery = time.Hour
		r := f.runWith(cfg)
		f.put(10)
		_, messages := f.streamed(server, 20)
		r.stop()
		restore := func() { // the tail, with a foreign message in the place of its first event
			js := server.JetStream(t)
			restoreTail(t, js, messages[10:], func(i int, m *nats.Msg) bool {
				if i == 0 {
					*m = nats.Msg{Subject: "ebb.theirs", Header: nats.Header{"ce-id": {"0"}}, Data: []byte("x")}
				}
				return true
			})
		}
		f.forgetBehind(server, messages, 10)
		restore()
		err := f.run(f.stream(server)).wait()
		if !errors.Is(err, bridge.ErrForeign) || !strings.Contains(err.Error(), "--accept-gap") {
			t.Fatalf("ended with %v", err)
		}
		cfg = f.config(f.stream(server))
		cfg.AcceptGap = true
		r = f.runWith(cfg)
		f.put(5)
		f.awaitBacklog(0)
		r.stop()
		got, _ := f.streamed(server, 26)
		sameSet(t, got, append(f.rows(), 0))
	})
}

// forgetBehind leaves a stream that holds the first n of the messages.
func (f *fixture) forgetBehind(server *natstest.Server, messages []natstest.Msg, n int) {
	f.t.Helper()
	server.RecreateStream(f.t, stream(f.t, server).CachedInfo().Config)
	restoreTail(f.t, server.JetStream(f.t), messages[:n], nil)
}

// restoreTail publishes messages again, as change leaves them.
func restoreTail(t *testing.T, js natsjs.JetStream, messages []natstest.Msg, change func(i int, m *nats.Msg) bool) {
	t.Helper()
	for i, m := range messages {
		msg := &nats.Msg{Subject: m.Subject, Header: m.Header, Data: m.Data}
		if change != nil && !change(i, msg) {
			continue
		}
		msg.Header.Del("Nats-Expected-Last-Sequence")
		if _, err := js.PublishMsg(t.Context(), msg); err != nil {
			t.Fatal(err)
		}
	}
}

// A stream that others publish to as well: the bridge neither minds them nor counts on numbers, and delivers nothing twice over restarts.
func TestSharedStream(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	server := natstest.New(t)
	js := server.JetStream(t)
	if _, err := js.CreateStream(t.Context(), natsjs.StreamConfig{Name: "EBB", Subjects: []string{"ebb.>"}}); err != nil {
		t.Fatal(err)
	}
	done, finish := make(chan int), make(chan struct{})
	go func() {
		n := 0
		for ; ; n++ {
			select {
			case <-finish:
				done <- n
				return
			default:
			}
			if _, err := js.PublishMsg(t.Context(), &nats.Msg{Subject: "ebb.theirs", Data: []byte("x"), Header: nats.Header{"ce-id": {"0"}}}); err != nil {
				t.Error(err)
			}
		}
	}()
	for range 5 {
		r := f.run(f.sharedStream(server))
		for range 20 {
			f.put(20)
		}
		r.stop()
	}
	r := f.run(f.sharedStream(server))
	f.awaitBacklog(0)
	r.stop()
	close(finish)
	theirs := <-done
	got, _ := f.streamed(server, theirs+len(f.rows()))
	var ours []int64
	for _, id := range got {
		if id != 0 {
			ours = append(ours, id)
		}
	}
	sameOrder(t, ours, f.rows())
	if theirs == 0 {
		t.Error("nobody else published")
	}
}

// Of a slot that somebody has dropped and made again by hand there is no sign but the rows that do not come by.
func TestSlotReplacedByHand(t *testing.T) {
	t.Parallel()
	for _, quiet := range []bool{false, true} {
		t.Run(fmt.Sprintf("quiet before %v", quiet), func(t *testing.T) {
			f := newFixture(t, pgtest.New(t))
			server := natstest.New(t)
			f.put(100)
			f.delivered(server, 100)
			cfg := f.config(f.stream(server))
			if !quiet {
				cfg.TickEvery = time.Hour
			}
			r := f.runWith(cfg)
			if !quiet {
				f.put(20)
			}
			f.streamed(server, len(f.rows()))
			r.stop()
			f.put(30)
			f.db.Exec(t, "SELECT pg_drop_replication_slot('"+f.slot+"')")
			f.db.Exec(t, "SELECT pg_create_logical_replication_slot('"+f.slot+"', 'pgoutput')")
			f.put(40)
			r = f.run(f.stream(server))
			f.awaitBacklog(0)
			f.onceInStream(server)
			r.stop()
			if n := pgtest.Value[int](t, f.db, "SELECT made FROM ebb.slot"); n != 2 {
				t.Errorf("the slot was made %d times", n)
			}
		})
	}
}

// A publication that was damaged and mended by hand, so that it fits at every tick, has passed over rows all the same.
func TestPublicationMendedByHand(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	s := newExactSink()
	cfg := f.config(s)
	cfg.TickEvery = 700 * time.Millisecond
	r := f.runWith(cfg)
	f.put(10)
	s.await(t, 10)
	f.settle()
	f.db.Exec(t, "ALTER PUBLICATION ebb DROP TABLE ebb.buffer", "SELECT ebb.put('t', '{}') FROM generate_series(1, 5)",
		"ALTER PUBLICATION ebb ADD TABLE ebb.buffer (id, topic, key, payload, headers)")
	f.put(5)
	s.await(t, 20)
	f.awaitBacklog(0)
	r.stop()
	sameSet(t, ids(t, s.all()), f.rows())

	// And with no bridge there to see it.
	f.db.Exec(t, "ALTER PUBLICATION ebb DROP TABLE ebb.buffer", "SELECT ebb.put('t', '{}') FROM generate_series(1, 5)",
		"ALTER PUBLICATION ebb ADD TABLE ebb.buffer (id, topic, key, payload, headers)")
	f.put(5)
	r = f.run(s)
	s.await(t, 30)
	f.awaitBacklog(0)
	r.stop()
	sameSet(t, ids(t, s.all()), f.rows())
}

// Dropping a published column with CASCADE takes the table out of the publication without a word. Under load, the bridge stops and confirms
// nothing of what it passed over.
func TestPublishedColumnDropped(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	s := newExactSink()
	r := f.run(s)
	stop, stopped := make(chan struct{}), make(chan struct{})
	producer := f.db.Connect(t)
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := producer.Exec(t.Context(), "INSERT INTO ebb.buffer (topic, payload) SELECT 't', '{}' FROM generate_series(1, 3)"); err != nil {
				t.Error(err)
				return
			}
		}
	}()
	s.await(t, 300)
	f.db.Exec(t, "ALTER TABLE ebb.buffer DROP COLUMN headers CASCADE")
	if err := r.wait(); !errors.Is(err, sql.ErrPublication) || !strings.Contains(err.Error(), "ebb.buffer") {
		t.Errorf("ended with %v", err)
	}
	if n := pgtest.Value[int64](t, f.db, "SELECT count(*) FROM ebb.buffer"); n <= int64(s.count()) {
		t.Fatalf("%d rows are in the buffer and %d delivered: nothing was passed over", n, s.count())
	}
	close(stop)
	<-stopped
	if _, err := sql.Apply(t.Context(), f.db.Connect(t), sql.Setup{Publication: "ebb", Keep: time.Hour}); !errors.Is(err, sql.ErrPublication) ||
		!strings.Contains(err.Error(), "no column headers") {
		t.Errorf("setup without the column: %v", err)
	}
	f.db.Exec(t, "ALTER TABLE ebb.buffer ADD COLUMN headers jsonb")
	f.setup()
	r = f.run(s)
	s.await(t, len(f.rows()))
	f.awaitBacklog(0)
	r.stop()
	sameSet(t, ids(t, s.all()), f.rows())
}

// A slot that is lost while the bridge is killed at every place where it can be: it converges, and delivers each row once.
func TestKilledAtEveryStep(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	server := natstest.New(t)
	f.put(50)
	f.delivered(server, 50)
	errKilled := errors.New("killed")
	seen := map[string]bool{}
	for killed := true; killed; {
		killed = false
		f.put(10)
		f.db.Exec(t, "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = '"+f.slot+"'")
		f.put(10)
		cfg := f.config(f.stream(server))
		cfg.InterruptAt(func(place string) error {
			if !seen[place] {
				seen[place], killed = true, true
				return errKilled
			}
			return nil
		})
		r := f.runWith(cfg) // it starts over by itself
		f.awaitBacklog(0)
		f.onceInStream(server)
		r.stop()
	}
	for _, place := range []string{"prepared", "dropped", "created", "recorded", "page", "delivered page"} {
		if !seen[place] {
			t.Errorf("it was never killed at %q", place)
		}
	}
}

// A slot that the server has given up, or that is another one by now, is made anew; what it held comes from the buffer.
func TestSlotGivenUp(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name   string
		major  int // at least
		give   func(t *testing.T, server *pgtest.Server, f *fixture)
		reason string
	}{
		{"max_slot_wal_keep_size", 0, func(t *testing.T, server *pgtest.Server, f *fixture) {
			if err := server.SetSetting(t.Context(), "max_slot_wal_keep_size", "1MB"); err != nil {
				t.Fatal(err)
			}
			f.db.Exec(t, "CREATE TABLE other (v text)", "ALTER TABLE other ALTER v SET STORAGE EXTERNAL")
			for range 3 {
				f.db.Exec(t, "INSERT INTO other SELECT repeat(md5(i::text), 1024) FROM generate_series(1, 600) i", "SELECT pg_switch_wal()", "CHECKPOINT")
			}
		}, "max_slot_wal_keep_size"},
		{"idle_replication_slot_timeout", 18, func(t *testing.T, server *pgtest.Server, f *fixture) {
			if err := server.SetSetting(t.Context(), "idle_replication_slot_timeout", "1s"); err != nil {
				t.Fatal(err)
			}
			pgtest.Eventually(t, patience, func() (bool, string) {
				f.db.Exec(t, "CHECKPOINT")
				return pgtest.Value[bool](t, f.db, "SELECT invalidation_reason = 'idle_timeout' IS TRUE FROM pg_replication_slots WHERE slot_name = $1", f.slot),
					"the slot is not invalidated"
			})
		}, "idle_replication_slot_timeout"},
		{"another plugin", 0, func(t *testing.T, _ *pgtest.Server, f *fixture) {
			f.db.Exec(t, "SELECT pg_drop_replication_slot('"+f.slot+"')", "SELECT pg_create_logical_replication_slot('"+f.slot+"', 'test_decoding')")
		}, "test_decoding"},
	} {
		t.Run(c.name, func(t *testing.T) {
			cfg := postgres.Config{}
			if c.major > 0 {
				cfg.Installation = pgtest.Installation(t, c.major)
			}
			server := pgtest.NewServer(t, cfg)
			f := newFixture(t, server.New(t))
			nats := natstest.New(t)
			f.put(20)
			f.delivered(nats, 20)
			unrecorded := f.config(f.stream(nats))
			unrecorded.TickEvery = time.Hour
			r := f.runWith(unrecorded)
			f.put(20)
			f.streamed(nats, 40)
			r.stop()
			f.put(20)
			c.give(t, server, f)
			f.put(20)
			r = f.run(f.stream(nats))
			f.awaitBacklog(0)
			f.onceInStream(nats)
			r.stop()
			if why := pgtest.Value[string](t, f.db, "SELECT made || ' ' || made_because FROM ebb.slot"); !strings.HasPrefix(why, "2 ") || !strings.Contains(why, c.reason) {
				t.Errorf("the slot was made: %s", why)
			}
		})
	}

	t.Run("another database", func(t *testing.T) {
		f := newFixture(t, pgtest.New(t))
		f.db.Exec(t, "SELECT pg_drop_replication_slot('"+f.slot+"')")
		other := pgtest.New(t)
		other.Exec(t, "SELECT pg_create_logical_replication_slot('"+f.slot+"', 'pgoutput')")
		if err := f.run(newExactSink()).wait(); !errors.Is(err, replication.ErrForeignSlot) || !strings.Contains(err.Error(), other.Name) {
			t.Errorf("ended with %v", err)
		}
		if n := pgtest.Value[int64](t, other, "SELECT count(*) FROM pg_replication_slots WHERE slot_name = $1", f.slot); n != 1 {
			t.Error("another database's slot is gone")
		}
	})
}

// In a shared stream, an event whose id is lower than that of the last recovered row, as it was committed later, is known again as well.
func TestSharedStreamKnowsLateIDs(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	server := natstest.New(t)
	// Drawn now, and used behind all others.
	id := pgtest.Value[int64](t, f.db, "SELECT nextval(pg_get_serial_sequence('ebb.buffer', 'id'))")
	f.db.Exec(t, "SELECT pg_drop_replication_slot('"+f.slot+"')")
	f.put(10)
	r := f.run(f.sharedStream(server)) // recovers them
	f.streamed(server, 10)
	f.settle()
	r.stop()
	cfg := f.config(f.sharedStream(server))
	cfg.TickEvery = time.Hour
	r = f.runWith(cfg)
	f.db.Exec(t, fmt.Sprintf("INSERT INTO ebb.buffer (id, topic, payload) OVERRIDING SYSTEM VALUE VALUES (%d, 't', '{}')", id))
	f.streamed(server, 11)
	r.stop()
	// The server's window for duplicates must not be what helps.
	if _, err := server.JetStream(t).UpdateStream(t.Context(), withoutWindow(stream(t, server).CachedInfo().Config)); err != nil {
		t.Fatal(err)
	}
	time.Sleep(200 * time.Millisecond) // until the shortest one is over
	r = f.run(f.sharedStream(server))
	f.put(1)
	f.awaitBacklog(0)
	r.stop()
	f.onceInStream(server)
}

func withoutWindow(cfg natsjs.StreamConfig) natsjs.StreamConfig {
	cfg.Duplicates = 100 * time.Millisecond
	return cfg
}
