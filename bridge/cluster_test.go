package bridge_test

import (
	"context"
	"fmt"
	"strconv"
	"testing"
	"time"

	"ebb/bridge"
	"ebb/internal/natstest"
	"ebb/internal/pgtest"
	"ebb/sink/jetstream"
)

// The stream is kept by three servers, which lose their leader in every way while events flow, and so does the slot. The stream has what was
// committed, once and in order.
func TestClusterChangesItsLeaders(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	c := natstest.NewCluster(t, 3)
	run := func() *running {
		s, err := jetstream.New(jetstream.Config{Servers: c.URLs(), Stream: "EBB", Subject: "ebb.{topic}", Source: "ebb", CreateStream: true,
			Replicas: 3, Exclusive: true, Name: f.slot, Logger: f.log})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
		return f.run(s)
	}
	r := run()
	w := f.produce(f.db.URL, 4, 10*time.Millisecond) // 2,800 events/s
	js := c.JetStream(t)
	stored := func() (n int) {
		t.Helper()
		pgtest.Eventually(t, patience, func() (bool, string) {
			ctx, cancel := context.WithTimeout(t.Context(), 250*time.Millisecond) // no answer at all comes while nobody leads
			defer cancel()
			stream, err := js.Stream(ctx, "EBB")
			if err != nil {
				return false, err.Error()
			}
			n = int(stream.CachedInfo().State.Msgs)
			return true, ""
		})
		return n
	}
	began := time.Now()
	// flow waits until events have got through since it was called.
	flow := func(what string) {
		t.Helper()
		before := stored()
		pgtest.Eventually(t, patience, func() (bool, string) {
			now := stored()
			return now >= before+500, fmt.Sprintf("after %s, %d events were stored, and %d were before", what, now, before)
		})
		t.Logf("%-30s %s, %d events stored", what, time.Since(began).Round(time.Millisecond), stored())
		began = time.Now()
	}
	flow("the start")
	c.WaitHealthy(t, "EBB")

	for range 3 {
		c.StepDown(t, "EBB")
		flow("a step-down")
	}
	r.cancel()
	c.StepDown(t, "EBB")
	r.stop()
	r = run()
	flow("a step-down and a restart of the bridge")
	f.db.Exec(t, "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory' AND "+
		"database = (SELECT oid FROM pg_database WHERE datname = current_database())")
	c.StepDown(t, "EBB")
	flow("a step-down and the end of the leading bridge's session")
	leader := c.StreamLeader(t, "EBB")
	c.Server(leader).Restart(t)
	flow("a restart of the leader")
	c.WaitHealthy(t, "EBB")
	c.Server((c.StreamLeader(t, "EBB") + 1) % 3).Restart(t)
	flow("a restart of a follower")
	r.await(bridge.RoleLeader)
	w.stop()

	want := f.committed()
	pgtest.Eventually(t, patience, func() (bool, string) {
		n := stored()
		return n >= len(want), fmt.Sprintf("%d of %d events are stored", n, len(want))
	})
	f.awaitBacklog(0)
	r.stop()
	messages := c.Messages(t, "EBB")
	var got []int64
	for _, m := range messages {
		id, err := strconv.ParseInt(m.Header.Get("ce-id"), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, id)
	}
	sameOrder(t, got, want)
	positions(t, messages)
}
