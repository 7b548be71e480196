package main

import (
	"context"
	"sync"
	"syscall"
	"testing"
	"time"

	"ebb/event"
	"ebb/internal/natstest"
	"ebb/internal/pgtest"
)

// TestFrozenLeader: a leader that is frozen in the middle of its work loses the lead to the standby, and does no harm when it wakes up and goes
// on with what it had in its hands. Then it stands by itself, and can be the leader again.
func TestFrozenLeader(t *testing.T) {
	broker, db := natstest.New(t), pgtest.New(t)
	s := newSite(t, db, broker.URL())
	s.setup(t)
	leader := s.streaming(t)
	standby := s.run(t)
	standby.logs(t, 20*time.Second, "standing by")

	// One producer, so that the ids are in the order of the commits.
	ctx, stop := context.WithCancel(t.Context())
	producer := db.Connect(t)
	var producing sync.WaitGroup
	var pause sync.Mutex
	put := func() error {
		pause.Lock()
		defer pause.Unlock()
		_, err := producer.Exec(context.WithoutCancel(ctx), "SELECT ebb.put('numbers', '{}') FROM generate_series(1, 5)")
		return err
	}
	producing.Go(func() {
		for ctx.Err() == nil {
			if err := put(); err != nil {
				t.Error(err)
				return
			}
		}
	})
	t.Cleanup(func() { stop(); producing.Wait() })

	js := broker.JetStream(t)
	grows := func() {
		t.Helper()
		var first uint64
		pgtest.Eventually(t, 30*time.Second, func() (bool, string) {
			stream, err := js.Stream(t.Context(), "EBB")
			if err != nil {
				return false, err.Error()
			}
			n := stream.CachedInfo().State.Msgs
			if first == 0 {
				first = n
			}
			return n >= first+200, "the stream does not grow"
		})
	}
	grows()
	signal := func(p *program, signal syscall.Signal) {
		t.Helper()
		if err := p.cmd.Process.Signal(signal); err != nil {
			t.Fatal(err)
		}
	}
	signal(leader, syscall.SIGSTOP)
	began := time.Now()
	before := len(s.ids(t))
	pgtest.Eventually(t, 30*time.Second, func() (bool, string) { return len(s.ids(t)) > before+200, "nothing is produced" })
	pause.Lock() // there is enough to deliver
	standby.logs(t, 30*time.Second, "this bridge leads")
	pause.Unlock()
	t.Logf("took over after %s", time.Since(began).Round(time.Millisecond))
	grows()
	signal(leader, syscall.SIGCONT)
	leader.logs(t, 20*time.Second, "standing by")
	grows()
	standby.kill()
	grows() // through the first one again
	stop()
	producing.Wait()

	want := s.ids(t)
	delivered(t, broker, 40*time.Second, len(want))
	s.confirms(t, 40*time.Second)
	leader.stop(t)
	equalIDs(t, "the stream", streamIDs(t, broker), want)
	var last event.Position
	for _, m := range broker.Messages(t, "EBB") {
		position, err := event.ParsePosition(m.Header.Get("Ebb-Position"))
		if err != nil {
			t.Fatal(err)
		}
		if position.Compare(last) <= 0 {
			t.Fatalf("message %d is at %s, the one before it at %s", m.Sequence, position, last)
		}
		last = position
	}
}
