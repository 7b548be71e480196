package main

import (
	"strings"
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
		pgtest.Eventually(t, 30*time.Second, func() (bool, string) {
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

// A stream that was deleted is filled in again; one whose events are gone from the buffer as well is for an operator to decide on, at the
// command line, once.
func TestStreamThatForgot(t *testing.T) {
	broker, db := natstest.New(t), pgtest.New(t)
	s := newSite(t, db, broker.URL(), "replay: {window: 0s}") // nor is there a trailing slot
	s.setup(t)
	recorded := func() {
		t.Helper()
		pgtest.Eventually(t, 30*time.Second, func() (bool, string) {
			return s.statusJSON(t, exitOK)["backlog"].(map[string]any)["events"] == 0.0, "the backlog is not empty"
		})
	}
	forget := func() {
		t.Helper()
		if err := broker.JetStream(t).DeleteStream(t.Context(), "EBB"); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 5 {
		s.put(t, i)
	}
	bridge := s.streaming(t)
	recorded()
	bridge.stop(t)
	forget()
	bridge = s.streaming(t)
	delivered(t, broker, 40*time.Second, 5)
	recorded()
	bridge.stop(t)
	equalIDs(t, "the stream that was filled in again", streamIDs(t, broker), s.ids(t))
	if text := s.ebb(t, "status"); !strings.Contains(text.stdout, "made 2 times") || !strings.Contains(text.stdout, "forgotten") {
		t.Errorf("the status does not say why the slot was made anew:\n%s", text.stdout)
	}

	db.Exec(t, "DELETE FROM ebb.buffer WHERE id = 3")
	forget()
	s.ebb(t, "run").fails(t, exitFailed, "gap", "sequence 5", "5 messages", "--accept-gap")
	bridge, err := launch(t.TempDir(), nil, s.args("run", "--accept-gap")...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(bridge.kill)
	delivered(t, broker, 40*time.Second, 4)
	recorded()
	bridge.stop(t)
	equalIDs(t, "the stream with a gap", streamIDs(t, broker), s.ids(t))
}

// A stream of another buffer is gone on with only if somebody says so.
func TestAdoptedStream(t *testing.T) {
	broker, db := natstest.New(t), pgtest.New(t)
	s := newSite(t, db, broker.URL())
	s.setup(t)
	s.put(t, 1)
	bridge := s.streaming(t)
	delivered(t, broker, 40*time.Second, 1)
	bridge.stop(t)
	s.ebb(t, "teardown", "--yes").must(t)
	s.setup(t)
	s.put(t, 2) // whose id is that of the one before
	s.ebb(t, "run").fails(t, exitFailed, "belongs to another source", "--adopt")
	bridge, err := launch(t.TempDir(), nil, s.args("run", "--adopt")...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(bridge.kill)
	delivered(t, broker, 40*time.Second, 2)
	bridge.stop(t)
	s.put(t, 3)
	bridge = s.streaming(t) // without being told again
	delivered(t, broker, 40*time.Second, 3)
	bridge.stop(t)
	equalIDs(t, "the adopted stream", streamIDs(t, broker), []string{"1", "1", "2"})
}
