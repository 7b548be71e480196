package bridge_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"ebb/bridge"
	"ebb/event"
	"ebb/internal/natstest"
	"ebb/internal/pgtest"
	"ebb/replication"
	"ebb/sql"
)

// trailing is a configuration with a trailing slot, and makes that slot.
func (f *fixture) trailing(cfg bridge.Config) bridge.Config {
	f.t.Helper()
	cfg.Trail = bridge.Trail{Window: time.Hour, MaxWAL: 1 << 30}
	db, err := sql.Connect(f.t.Context(), f.db.URL, f.slot)
	if err != nil {
		f.t.Fatal(err)
	}
	defer db.Close(context.WithoutCancel(f.t.Context()))
	if _, err := bridge.EnsureTrail(f.t.Context(), db, cfg); err != nil {
		f.t.Fatal(err)
	}
	return cfg
}

// requestReplay asks for a replay from the transaction of a position on.
func (f *fixture) requestReplay(from event.LSN) int64 {
	f.t.Helper()
	id, err := sql.RequestReplay(f.t.Context(), f.db.Connect(f.t), f.slot, from, from.String(), 0)
	if err != nil {
		f.t.Fatal(err)
	}
	return id
}

func (f *fixture) awaitReplay(id int64, want sql.ReplayState) sql.Replay {
	f.t.Helper()
	db := f.db.Connect(f.t)
	var last sql.Replay
	pgtest.Eventually(f.t, patience, func() (bool, string) {
		var err error
		if last, err = sql.ReadReplay(f.t.Context(), db, id); err != nil {
			f.t.Fatal(err)
		}
		return last.State == want, fmt.Sprintf("replay %d is %s (%s)", id, last.State, last.Detail)
	})
	return last
}

// What was delivered is delivered again from a transaction on, with the same ids and in the same order, new events follow, and each comes once in
// its epoch.
func TestReplay(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	server := natstest.New(t)
	r := f.runWith(f.trailing(f.config(f.stream(server))))
	for range 4 {
		f.put(5)
	}
	_, messages := f.streamed(server, 20)
	f.settle()
	id := f.requestReplay(commitOf(t, messages[10]))
	got, _ := f.streamed(server, 30)
	all := f.rows()
	sameOrder(t, got, append(slices.Clone(all), all[10:]...))
	if replay := f.awaitReplay(id, sql.ReplayDone); replay.Epoch != 2 || replay.Delivered != 10 {
		t.Errorf("%+v", replay)
	}
	f.put(2)
	f.streamed(server, 32)
	f.settle()
	r.stop()

	// After a restart everything is where it was.
	r = f.runWith(f.trailing(f.config(f.stream(server))))
	f.put(3)
	got, messages = f.streamed(server, 35)
	f.settle()
	r.stop()
	sameOrder(t, got, slices.Concat(all, all[10:], f.rows()[20:]))
	for i, m := range messages {
		replayed, epoch := "", "2:"
		switch {
		case i < 20:
			epoch = "1:"
		case i < 30:
			replayed = strconv.FormatInt(id, 10)
		}
		if m.Header.Get("Ebb-Replay") != replayed || !strings.HasPrefix(m.Header.Get("Ebb-Position"), epoch) {
			t.Errorf("message %d has Ebb-Replay %q and position %s, want %q in epoch %s", i, m.Header.Get("Ebb-Replay"), m.Header.Get("Ebb-Position"),
				replayed, epoch)
		}
	}
}

func commitOf(t *testing.T, m natstest.Msg) event.LSN {
	t.Helper()
	at, err := event.ParsePosition(m.Header.Get("Ebb-Position"))
	if err != nil {
		t.Fatal(err)
	}
	return at.Commit
}

// inEpochs sorts the ids in the stream by the epoch in which they were delivered.
func inEpochs(t *testing.T, ids []int64, messages []natstest.Msg) map[uint32][]int64 {
	t.Helper()
	epochs := map[uint32][]int64{}
	for i, m := range messages {
		at, err := event.ParsePosition(m.Header.Get("Ebb-Position"))
		if err != nil {
			t.Fatal(err)
		}
		epochs[at.Epoch] = append(epochs[at.Epoch], ids[i])
	}
	return epochs
}

// A replay whose bridge is killed at each of its steps, while events keep coming, is exact.
func TestReplayKilledAtEveryStep(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	server := natstest.New(t)
	cfg := f.trailing(f.config(f.stream(server)))
	r := f.runWith(cfg)
	f.put(5)
	f.put(5)
	_, messages := f.streamed(server, 10)
	f.settle()
	r.stop()
	from := commitOf(t, messages[5])

	errKilled := errors.New("killed")
	seen := map[string]bool{}
	for killed := true; killed; {
		killed = false
		cfg := f.trailing(f.config(f.stream(server)))
		var mu sync.Mutex
		cfg.InterruptAt(func(place string) error {
			mu.Lock()
			defer mu.Unlock()
			if !seen[place] {
				seen[place], killed = true, true
				return errKilled
			}
			return nil
		})
		r := f.runWith(cfg) // it starts over by itself
		f.put(1)
		id := f.requestReplay(from)
		f.put(1)
		replay := f.awaitReplay(id, sql.ReplayDone)
		f.put(1)
		f.awaitBacklog(0)
		f.settle()
		r.stop()
		got, messages := f.streamed(server, int(stream(t, server).CachedInfo().State.Msgs))
		sameOrder(t, inEpochs(t, got, messages)[replay.Epoch], f.rows()[5:])
	}
	for _, place := range []string{"replay", "dropped for a copy", "copied", "failover set", "stream"} {
		if !seen[place] {
			t.Errorf("it was never killed at %q", place)
		}
	}
}

// A replay that is cancelled goes on with what is new.
func TestReplayCancelled(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	s := newExactSink()
	r := f.runWith(f.trailing(f.config(s)))
	const n = 20_000 // more than what is handed on to a sink that takes nothing
	for range 10 {
		f.put(n / 10)
	}
	s.await(t, n)
	f.settle()
	s.block()
	id := f.requestReplay(s.all()[0].Position.Commit)
	f.awaitReplay(id, sql.ReplayRunning)
	db := f.db.Connect(t)
	first := s.all()[0].Position.Commit
	pgtest.Eventually(t, patience, func() (bool, string) {
		slot, err := replication.InspectSlot(t.Context(), db, f.slot)
		return err == nil && slot.Active && slot.ConfirmedFlush <= first, fmt.Sprintf("the slot stands at %s, and is to go back to before %s (%v)",
			slot.ConfirmedFlush, first, err)
	})
	if _, err := sql.RequestReplay(t.Context(), db, f.slot, 1, "", 0); !errors.Is(err, sql.ErrReplayActive) {
		t.Errorf("asked for another one: %v", err)
	}
	if got, ok, err := sql.CancelReplay(t.Context(), db, f.slot); err != nil || !ok || got.ID != id {
		t.Fatalf("cancelled %+v, %v, %v", got, ok, err)
	}
	f.put(5)
	s.unblock()
	pgtest.Eventually(t, patience, func() (bool, string) {
		got := s.all()
		return string(got[len(got)-1].ID) == strconv.Itoa(n+5), fmt.Sprintf("%d events", len(got))
	})
	f.settle()
	r.stop()
	r = f.runWith(f.trailing(f.config(s)))
	f.put(1)
	f.awaitBacklog(0)
	r.stop()
	got := ids(t, s.all())
	sameOrder(t, got[len(got)-6:], f.rows()[n:])
	if again := len(got) - n - 6; again < 0 || again >= n {
		t.Errorf("%d events were delivered again", again)
	}
}

// A replay from before the trailing slot is refused, and delivery goes on.
func TestReplayOutOfReach(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	s := newExactSink()
	r := f.runWith(f.trailing(f.config(s)))
	id := f.requestReplay(1)
	replay := f.awaitReplay(id, sql.ReplayFailed)
	if !strings.Contains(replay.Detail, "has passed 0/1") {
		t.Error(replay.Detail)
	}
	f.put(1)
	s.await(t, 1)
	r.stop()
}

// Over HTTP, which cannot tell what it holds, it is the slot that counts.
func TestReplayWithoutMemory(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	s := newTestSink()
	r := f.runWith(f.trailing(f.config(s)))
	f.put(5)
	f.put(5)
	s.await(t, 10)
	f.settle()
	id := f.requestReplay(s.all()[5].Position.Commit)
	f.awaitReplay(id, sql.ReplayDone)
	f.put(1)
	s.await(t, 16)
	r.stop()
	all := f.rows()
	sameOrder(t, ids(t, s.all()), slices.Concat(all[:10], all[5:]))
}

// The trailing slot follows at its distance in time, also when nothing is delivered, is never ahead of the slot, and is made anew when it is gone.
func TestTrailFollows(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	s := newExactSink()
	cfg := f.trailing(f.config(s))
	cfg.Trail.Window = 2 * time.Second
	r := f.runWith(cfg)
	db := f.db.Connect(t)
	name := replication.TrailOf(f.slot)
	inspect := func() (slot, trail replication.Slot) {
		t.Helper()
		trail, err := replication.InspectSlot(t.Context(), db, name)
		if err != nil {
			t.Fatal(err)
		}
		return f.inspect(db), trail
	}
	_, began := inspect()
	f.put(5)
	s.await(t, 5)
	f.settle()
	end := f.inspect(db).ConfirmedFlush
	at := time.Now()
	pgtest.Eventually(t, patience, func() (bool, string) {
		slot, trail := inspect()
		if trail.ConfirmedFlush > slot.ConfirmedFlush {
			t.Fatalf("the trailing slot, at %s, is ahead of the slot, at %s", trail.ConfirmedFlush, slot.ConfirmedFlush)
		}
		return trail.ConfirmedFlush >= end, fmt.Sprintf("it stands at %s, began at %s, want %s", trail.ConfirmedFlush, began.ConfirmedFlush, end)
	})
	if took := time.Since(at); took < cfg.Trail.Window-time.Second {
		t.Errorf("the trailing slot came near after %s", took)
	}
	if n := pgtest.Value[int64](t, f.db, "SELECT trail_seq FROM ebb.slot"); n != 5 {
		t.Errorf("%d messages stand before the trailing slot, want 5", n)
	}

	// What others write is followed as well.
	f.db.Exec(t, "CREATE TABLE other AS SELECT repeat('x', 100) FROM generate_series(1, 1000)")
	end = f.inspect(db).Current
	pgtest.Eventually(t, patience, func() (bool, string) {
		_, trail := inspect()
		return trail.ConfirmedFlush >= end-100, fmt.Sprintf("it stands at %s, want %s", trail.ConfirmedFlush, end)
	})

	f.db.Exec(t, "SELECT pg_drop_replication_slot('"+name+"')")
	pgtest.Eventually(t, patience, func() (bool, string) {
		_, err := replication.InspectSlot(t.Context(), db, name)
		return err == nil, "it is not there"
	})
	r.stop()

	cfg.Trail.Window = 0
	r = f.runWith(cfg)
	pgtest.Eventually(t, patience, func() (bool, string) {
		_, err := replication.InspectSlot(t.Context(), db, name)
		return errors.Is(err, replication.ErrNoSlot), fmt.Sprint("it is still there: ", err)
	})
	r.stop()
}

// With a trailing slot, a slot that is lost, and a stream that has forgotten, come back in commit order, and whatever the buffer holds.
func TestRefilledFromTheTrail(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	server := natstest.New(t)
	run := func() *running { return f.runWith(f.trailing(f.config(f.stream(server)))) }
	r := run()
	f.put(10)
	f.streamed(server, 10)
	f.settle()
	r.stop()
	f.db.Exec(t, "SELECT pg_drop_replication_slot('"+f.slot+"')")
	f.put(5)
	r = run()
	_, messages := f.streamed(server, 15)
	f.settle()
	r.stop()
	for i, m := range messages {
		if m.Header.Get("Ebb-Origin") != "" {
			t.Errorf("message %d is %s", i, m.Header.Get("Ebb-Origin"))
		}
	}

	f.db.Exec(t, "TRUNCATE ebb.buffer")
	f.put(5)
	f.forgetBehind(server, messages, 12)
	r = run()
	f.streamed(server, 20)
	f.settle()
	r.stop()
	got, _ := f.streamed(server, 20)
	all := make([]int64, 20)
	for i := range all {
		all[i] = int64(i + 1)
	}
	sameOrder(t, got, all)

	if err := server.JetStream(t).DeleteStream(t.Context(), "EBB"); err != nil {
		t.Fatal(err)
	}
	r = run()
	got, _ = f.streamed(server, 20)
	f.settle()
	r.stop()
	sameOrder(t, got, all)
}

// A broker that comes back with an earlier state, or with none, while the rows are gone from the buffer, is filled in from the trailing slot, as far
// as that reaches, whether the bridge runs meanwhile or not.
func TestForgetfulBrokerIsRefilledFromTheTrail(t *testing.T) {
	t.Parallel()
	for _, running := range []bool{false, true} {
		for _, deleted := range []bool{false, true} {
			t.Run(fmt.Sprintf("deleted %v, running %v", deleted, running), func(t *testing.T) {
				f := newFixture(t, pgtest.New(t))
				server := natstest.New(t)
				cfg := func() bridge.Config { return f.trailing(f.config(f.stream(server))) }
				r := f.runWith(cfg())
				f.put(200)
				f.streamed(server, 200)
				f.settle()
				r.stop()
				db := f.db.Connect(t)
				// What came before is out of the window.
				if _, err := replication.AdvanceSlot(t.Context(), db, replication.TrailOf(f.slot), f.inspect(db).ConfirmedFlush); err != nil {
					t.Fatal(err)
				}
				f.db.Exec(t, "UPDATE ebb.slot SET trail_seq = 200, trail_destination = '', trail_lsn = (SELECT confirmed_flush_lsn FROM pg_replication_slots WHERE slot_name = name)")
				restore := backup(t, server)
				r = f.runWith(cfg())
				for range 10 {
					f.put(20)
				}
				f.streamed(server, 400)
				f.settle()
				f.db.Exec(t, "TRUNCATE ebb.buffer")
				if !running {
					r.stop()
				}
				want := make([]int64, 0, 420)
				if deleted {
					if err := server.JetStream(t).DeleteStream(t.Context(), "EBB"); err != nil {
						t.Fatal(err)
					}
				} else {
					restore()
					for id := range int64(200) {
						want = append(want, id+1)
					}
				}
				if !running {
					r = f.runWith(cfg())
				}
				f.put(20) // of which a bridge that runs finds out
				for id := int64(200); id < 420; id++ {
					want = append(want, id+1)
				}
				got, _ := f.streamed(server, len(want))
				f.settle()
				r.stop()
				sameOrder(t, got, want)
			})
		}
	}
}

// Setup makes a slot that is gone from the trailing one as well, so that a message without a row that was not delivered is not lost.
func TestSetupCopiesALostSlot(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	s := newExactSink()
	cfg := f.trailing(f.config(s))
	r := f.runWith(cfg)
	f.put(1)
	s.await(t, 1)
	f.settle()
	r.stop()
	f.db.Exec(t, "SELECT ebb.emit('t', '{}')", "SELECT pg_drop_replication_slot('"+f.slot+"')")
	f.setup()
	r = f.runWith(cfg)
	s.await(t, 2)
	f.put(1)
	s.await(t, 3)
	r.stop()
	if got := s.all(); got[1].Origin != event.Streamed || got[1].Position.Compare(got[2].Position) >= 0 || len(got) != 3 {
		t.Errorf("delivered %+v", got)
	}
}
