// Package sinktest is the conformance suite that every sink passes.
package sinktest

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"ebb/event"
	"ebb/sink"
	"ebb/sink/cloudevent"
)

// Harness lends the suite a kind of destination. Cases run one after the other; each calls New first, and the other functions are
// about the destination of the latest New. Delivered calls Count from the goroutine of the sink, so Count must not rely on ending
// the test's.
type Harness struct {
	// New returns a sink on a fresh destination. The suite closes the sink; t.Cleanup of the given t closes the destination.
	New func(t *testing.T) sink.Sink
	// Received returns what a subscriber of the destination sees, in its order. It works while the destination is broken or after
	// it was.
	Received func(t *testing.T) []Message
	// Count returns the number of messages that the destination holds; nil means len(Received). It is called each time that
	// the sink reports a delivery.
	Count func(t *testing.T) int

	// Break makes the destination unreachable, or refuse everything, until Mend. Both are nil for one that cannot be broken.
	Break, Mend func(t *testing.T)

	// Resumes says that the destination itself knows what it holds last, so that a new process can resume. Reopen then
	// returns another sink on the same destination; the one before is closed.
	Resumes bool
	Reopen  func(t *testing.T) sink.Sink

	// ExactlyOnce says that nothing is received twice, whatever happens. Where it is false, an event may be received again, but
	// the first receptions are in order.
	ExactlyOnce bool
	// PerKey says that only events of the same key are in order, and those without a key in none.
	PerKey bool
	// Parks says that events which cannot be delivered are parked, where there are dead letters.
	Parks bool
	// Waits says that a Run takes nothing at all while the destination is broken.
	Waits bool
}

// Message is an event as a subscriber sees it, with every encoding undone.
type Message struct {
	ID, Topic string
	// Key is nil when there is none.
	Key         *string
	Payload     string
	ContentType string
	// Headers are those of the producer, by lower-case name. A harness may leave those of the transport in: the suite looks for
	// what must be there.
	Headers  map[string]string
	Position event.Position
	Origin   event.Origin
	Time     time.Time
}

// FromBinary reads a message in CloudEvents binary mode. The headers may come in any case: those of net/http and of NATS fit.
func FromBinary(headers map[string][]string, body []byte) (Message, error) {
	m := Message{Payload: string(body), Headers: map[string]string{}}
	for _, name := range slices.Sorted(maps.Keys(headers)) {
		values := headers[name]
		lower := strings.ToLower(name)
		if len(values) != 1 {
			return Message{}, fmt.Errorf("header %s has %d values, want one", name, len(values))
		}
		decoded := string(cloudevent.AppendDecoded(nil, values[0]))
		var err error
		switch lower {
		case "ce-specversion":
			if decoded != "1.0" {
				return Message{}, fmt.Errorf("specversion %q, want 1.0", decoded)
			}
		case "ce-source":
		case "ce-id":
			m.ID = decoded
		case "ce-type":
			m.Topic = decoded
		case "ce-subject":
			m.Key = &decoded
		case "ce-time":
			m.Time, err = time.Parse("2006-01-02T15:04:05.000000Z", decoded)
		case "content-type":
			m.ContentType = values[0]
		case "ebb-position":
			m.Position, err = event.ParsePosition(values[0])
		case "ebb-origin":
			m.Origin = event.Origin(values[0])
		default:
			if strings.HasPrefix(lower, "ce-") {
				return Message{}, fmt.Errorf("header %s is none that ebb sets", name)
			}
			m.Headers[lower] = values[0]
		}
		if err != nil {
			return Message{}, fmt.Errorf("header %s: %w", name, err)
		}
	}
	for _, name := range []string{"ce-specversion", "ce-id", "ce-source", "ce-type", "ebb-position"} {
		if !slices.ContainsFunc(slices.Collect(maps.Keys(headers)), func(h string) bool { return strings.EqualFold(h, name) }) {
			return Message{}, fmt.Errorf("no header %s", name)
		}
	}
	return m, nil
}

// Run finds out whether a sink keeps what [sink.Sink] promises.
func Run(t *testing.T, h Harness) {
	if h.Count == nil {
		h.Count = func(t *testing.T) int { return len(h.Received(t)) }
	}
	for _, c := range []struct {
		name string
		run  func(*fixture)
		skip bool
	}{
		{name: "order and content", run: orderAndContent},
		{name: "nothing to deliver", run: nothingToDeliver},
		{name: "cancelled", run: cancelled},
		{name: "cancelled while broken", run: cancelledWhileBroken, skip: h.Break == nil},
		{name: "back-pressure", run: backPressure, skip: h.Break == nil},
		{name: "outage", run: outage, skip: h.Break == nil},
		{name: "run again", run: runAgain},
		{name: "rejected", run: rejected},
		{name: "payloads", run: payloads},
		{name: "keys and topics", run: keysAndTopics},
		{name: "recovered", run: recovered},
		{name: "parked", run: parked, skip: !h.Parks},
		{name: "kept late", run: keptLate, skip: !h.Parks},
		{name: "blocked", run: blocked, skip: !h.Parks},
		{name: "retried", run: retried, skip: !h.Parks},
		{name: "cancelled while retried", run: cancelledWhileRetried, skip: !h.Parks || h.Break == nil || h.Waits},
		{name: "killed", run: killed},
		{name: "resumes at what is known", run: resumesAtKnown, skip: h.Resumes},
		{name: "reopened when empty", run: reopenedWhenEmpty, skip: !h.Resumes},
	} {
		if c.skip {
			continue // what the destination cannot do is no test that was left out
		}
		t.Run(c.name, func(t *testing.T) { c.run(newFixture(t, h)) })
	}
}
