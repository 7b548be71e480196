package main

import (
	"testing"
	"time"

	"ebb/internal/natstest"
	"ebb/internal/pgtest"
)

// What was delivered to one destination is not missed in the next one, nor is anything lost on the way from one to the other.
func TestDestinationChanges(t *testing.T) {
	broker, db := natstest.New(t), pgtest.New(t)
	toStdout := newSite(t, db, "stdout")
	toStream := newSite(t, db, broker.URL())
	toOther := newSite(t, db, broker.URL(), "nats: {stream: OTHER, subject: 'other.{topic}'}")
	toStdout.setup(t)
	recorded := func(s *site) {
		pgtest.Eventually(t, 20*time.Second, func() (bool, string) {
			return s.statusJSON(t, exitOK)["backlog"].(map[string]any)["events"] == 0.0, "the backlog is not empty"
		})
	}
	// deliver puts an event and has it delivered and recorded.
	deliver := func(s *site) string {
		t.Helper()
		id := s.put(t, 1)
		bridge := s.streaming(t)
		recorded(s)
		bridge.stop(t)
		return id
	}
	deliver(toStdout)
	first := deliver(toStream)
	equalIDs(t, "the stream", streamIDs(t, broker), []string{first})
	deliver(toStdout)
	deliver(toOther)
	if n := len(broker.Messages(t, "OTHER")); n == 0 {
		t.Error("the other stream got nothing")
	}

	// A buffer that was torn down and made again counts its ids from 1 again: they are not those in the stream.
	toStream.ebb(t, "teardown", "--yes").must(t)
	toStream.setup(t)
	toStream.put(t, 1)
	toStream.ebb(t, "run").fails(t, exitFailed, "belongs to another source", "buffer", "nats.stream", "--adopt")
	fresh := newSite(t, db, broker.URL(), "nats: {stream: FRESH, subject: 'fresh.{topic}'}")
	bridge := fresh.streaming(t)
	recorded(fresh)
	bridge.stop(t)
	if n := len(broker.Messages(t, "FRESH")); n != 1 {
		t.Errorf("%d events in the fresh stream", n)
	}
}

// One buffer has one slot: the ticks of one would say nothing of what another has delivered.
func TestOneSlot(t *testing.T) {
	db := pgtest.New(t)
	s := newSite(t, db, "stdout")
	s.setup(t)
	other := []string{"--postgres", db.URL}
	ebb(t, append(other, "setup")...).fails(t, exitFailed, db.Name, "already")
	ebb(t, append(other, "teardown", "--yes")...).fails(t, exitFailed, db.Name)
	s.ebb(t, "teardown", "--yes").must(t)
}
