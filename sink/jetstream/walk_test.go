package jetstream

import (
	"errors"
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"ebb/event"
	"ebb/sink"
)

// model is a stream that refuses a message which names the wrong predecessor.
type model struct {
	messages []peeked // the n-th has sequence number n+1
	first    uint64   // those before it are deleted
}

func (m *model) publish(p peeked, after int) bool {
	if after >= 0 && after != len(m.messages) {
		return false
	}
	p.seq = uint64(len(m.messages) + 1)
	m.messages = append(m.messages, p)
	return true
}

func (m *model) read(seq uint64) (peeked, error) {
	switch {
	case seq == 0 || seq > uint64(len(m.messages)):
		return peeked{}, fmt.Errorf("read of %d, which was never there", seq)
	case seq < m.first:
		return peeked{message: message{seq: seq}, kind: missing}, nil
	}
	return m.messages[seq-1], nil
}

// ours returns which of the events the stream holds, in its order.
func (m *model) ours() []string {
	var ids []string
	for _, p := range m.messages {
		if p.kind == ours {
			ids = append(ids, p.id)
		}
	}
	return ids
}

func messageOf(e *event.Event) peeked {
	return peeked{message: message{position: e.Position, id: string(e.ID)}}
}

// drawEvents draws events some of which were recovered, so that they share a position.
func drawEvents(t *rapid.T) []*event.Event {
	events := make([]*event.Event, rapid.IntRange(1, 30).Draw(t, "events"))
	position := event.Position{Epoch: 1}
	for i := range events {
		e := &event.Event{Position: position, ID: fmt.Appendf(nil, "%d", i), Origin: event.Recovered}
		if rapid.IntRange(0, 3).Draw(t, "streamed") > 0 {
			position.Index++
			e.Position, e.Origin = position, event.Streamed
		}
		events[i] = e
	}
	return events
}

// Publishing goes on, attempt for attempt, through cut connections and foreign messages. What is said to be delivered is in the
// stream at the place that is told; if it comes to an end, everything is in the stream once and in order, and if it halts, an
// event is missing in the middle.
func TestAttempts(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		events := drawEvents(t)
		var stream model
		type copied struct {
			e     *event.Event
			after int
		}
		var late []copied // what earlier attempts sent and the server has yet to take in
		meanwhile := func() {
			for range max(0, rapid.IntRange(-6, 2).Draw(t, "foreign messages")) {
				stream.publish(peeked{kind: foreign}, -1)
			}
			for len(late) > 0 && rapid.Bool().Draw(t, "a late one") {
				stream.publish(messageOf(late[0].e), late[0].after)
				late = late[1:]
			}
		}
		delivered, end, stepped := 0, uint64(0), 0
		for round := 0; delivered < len(events); round++ {
			if round > 100 {
				t.Fatalf("no end: %d of %d events are delivered, up to %d of %d", delivered, len(events), end, len(stream.messages))
			}
			pending := events[delivered:min(len(events), delivered+rapid.IntRange(1, 10).Draw(t, "window"))]
			arrive := len(pending)
			if round < 20 {
				arrive = rapid.IntRange(0, len(pending)).Draw(t, "arrive")
			}
			for i, e := range pending[:arrive] {
				if round < 20 {
					meanwhile()
				}
				stream.publish(messageOf(e), int(end)+i)
			}
			for i, e := range pending[arrive:] {
				late = append(late, copied{e, int(end) + arrive + i})
			}
			w := walk{pending: pending, end: end}
			err := w.over(end+1, uint64(len(stream.messages)), stream.read)
			if w.matched > 0 {
				if m := stream.messages[w.seq-1]; !m.is(pending[w.matched-1]) {
					t.Fatalf("event %d is said to be at %d, where %s is", delivered+w.matched-1, w.seq, m)
				}
			}
			delivered += w.matched
			stepped += w.foreign
			end = w.end
			for i, id := range stream.ours()[:delivered] {
				if id != fmt.Sprint(i) {
					t.Fatalf("%d events are said to be delivered, and the stream holds %v", delivered, stream.ours())
				}
			}
			if err != nil {
				if held := stream.ours(); !errors.Is(err, ErrForeign) || len(held) == delivered || held[delivered] == fmt.Sprint(delivered) {
					t.Fatalf("halts with %v after %d events, and the stream holds %v", err, delivered, held)
				}
				return
			}
			// Those behind the window are seen when it has moved there.
			if held := len(stream.ours()); w.matched < len(pending) && (held != delivered || end != uint64(len(stream.messages))) {
				t.Fatalf("%d of %d events are seen, up to %d of %d", delivered, held, end, len(stream.messages))
			}
		}
		if stepped != len(stream.messages)-len(events) {
			t.Fatalf("%d foreign messages are reported, and %d are there", stepped, len(stream.messages)-len(events))
		}
	})
}

// Another process has published the pending events and others behind them, and the stream may have deleted some. What cannot be
// told is not guessed: either the number is right, or it is an error.
func TestWalkBehindAnotherProcess(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		events := drawEvents(t)
		var stream model
		held := rapid.IntRange(0, len(events)).Draw(t, "held")
		for _, e := range events[:held] {
			stream.publish(messageOf(e), -1)
		}
		stream.first = uint64(rapid.IntRange(0, held+1).Draw(t, "first"))
		pending := events[:rapid.IntRange(1, len(events)).Draw(t, "window")]
		w := walk{pending: pending}
		err := w.over(1, uint64(held), stream.read)
		want := min(held, len(pending))
		if deleted := max(0, int(stream.first)-1); deleted > 0 && deleted >= min(held, len(pending)) {
			if !errors.Is(err, sink.ErrChanged) {
				t.Fatalf("%d of %d messages are deleted, and %d are matched with error %v", deleted, held, w.matched, err)
			}
			return
		}
		if err != nil || w.matched != want || w.end != uint64(want) {
			t.Fatalf("%d events are matched up to %d, want %d: %v", w.matched, w.end, want, err)
		}
	})
}

func TestWindow(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var w window
		var want []string
		made := 0
		// handed are all events that were ever added.
		type windowed struct {
			keeping *keeping
			dropped bool
		}
		var handed []windowed
		var keepings []*keeping
		signal := make(chan struct{}, 1)
		t.Repeat(map[string]func(*rapid.T){
			"add": func(t *rapid.T) {
				b := event.NewBatch()
				for range rapid.IntRange(0, 5).Draw(t, "events") {
					id := fmt.Sprint(made)
					made++
					b.Events = append(b.Events, event.Event{ID: b.Copy([]byte(id))})
					want, handed = append(want, id), append(handed, windowed{})
				}
				w.add(b, nil)
			},
			"drop": func(t *rapid.T) {
				n := rapid.IntRange(0, min(len(want), w.before())).Draw(t, "dropped")
				w.drop(n)
				want = want[n:]
				for ; n > 0; n-- {
					i := slices.IndexFunc(handed, func(h windowed) bool { return h.keeping == nil && !h.dropped })
					handed[i].dropped = true
				}
			},
			"add some": func(t *rapid.T) {
				b, k := event.NewBatch(), newKeeping(signal)
				for range rapid.IntRange(0, 5).Draw(t, "events") {
					id := fmt.Sprint(made)
					made++
					b.Events = append(b.Events, event.Event{ID: b.Copy([]byte(id))})
				}
				w.add(b, func(e *event.Event) *keeping {
					if rapid.Bool().Draw(t, "aside") {
						k.given++
						handed = append(handed, windowed{keeping: k})
						return k
					}
					want, handed = append(want, string(e.ID)), append(handed, windowed{})
					return nil
				})
				if k.given > 0 {
					keepings = append(keepings, k)
				}
			},
			"take": func(t *rapid.T) {
				var out []int
				k := newKeeping(signal)
				k.given = 1
				pending := 0
				var left []string
				for i := range handed {
					if handed[i].keeping != nil || handed[i].dropped {
						continue
					}
					if rapid.IntRange(0, 2).Draw(t, "taken") == 0 {
						out = append(out, pending)
						handed[i].keeping = k
					} else {
						left = append(left, want[pending])
					}
					pending++
				}
				if len(out) > 0 {
					w.take(out, k)
					want, keepings = left, append(keepings, k)
				}
			},
			"keep": func(t *rapid.T) {
				if len(keepings) == 0 {
					return
				}
				k := keepings[rapid.IntRange(0, len(keepings)-1).Draw(t, "kept")]
				for !k.isKept() {
					k.done()
				}
			},
			"settle": func(t *rapid.T) {
				n := w.settle()
				for ; n > 0; n-- {
					i := slices.IndexFunc(handed, func(h windowed) bool { return !h.dropped })
					if handed[i].keeping == nil || !handed[i].keeping.isKept() {
						t.Fatalf("event %d of those that were handed over is settled", i)
					}
					handed[i].dropped = true
				}
				if i := slices.IndexFunc(handed, func(h windowed) bool { return !h.dropped }); i >= 0 && handed[i].keeping != nil && handed[i].keeping.isKept() {
					t.Fatalf("event %d of those that were handed over is not settled", i)
				}
			},
			"": func(t *rapid.T) {
				before, left := 0, 0
				for _, h := range handed {
					if h.keeping != nil && !h.dropped {
						left++
					}
				}
				for _, h := range handed {
					if h.keeping != nil && !h.keeping.isKept() {
						break
					}
					if h.keeping == nil && !h.dropped {
						before++
					}
				}
				if w.before() != before || w.left != left {
					t.Fatalf("%d events stand before what is not kept, want %d; %d are set aside, want %d", w.before(), before, w.left, left)
				}
				var have []string
				bytes, left := 0, 0
				for _, e := range w.pending {
					have = append(have, string(e.ID))
					bytes += e.Size()
				}
				for _, h := range w.batches {
					if h.left == 0 {
						t.Fatal("a batch is held for nothing")
					}
					left += h.left
				}
				if !slices.Equal(have, want) || bytes != w.bytes || left != len(have) {
					t.Fatalf("holds %v of %d bytes, %d in batches; want %v of %d", have, w.bytes, left, want, bytes)
				}
			},
		})
		w.release()
	})
}
