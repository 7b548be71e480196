package bridge

import (
	"sync"

	"ebb/event"
	"ebb/sink"
)

// tracker knows how far delivery has come in the log. What it is told of events that were handed to the sink and of events
// that the sink has delivered gives the LSN before which nothing is undelivered: the end of a transaction counts only
// when its last event is delivered, and a keepalive's position only when everything before it is.
type tracker struct {
	mu sync.Mutex
	// handed and delivered count events, from the start of the stream.
	handed, delivered uint64
	// marks wait for delivered to reach their event count. Both their counts and their LSNs rise.
	marks []trackerMark
	lsn   event.LSN
	last  sink.Progress
}

type trackerMark struct {
	events uint64
	lsn    event.LSN
}

// newTracker returns a tracker of a stream before whose start, lsn, everything is delivered; last was the last of it.
func newTracker(lsn event.LSN, last sink.Progress) *tracker { return &tracker{lsn: lsn, last: last} }

// hand is called with each batch before the sink can have it. It returns the LSN before which all is delivered.
func (t *tracker) hand(b *event.Batch) event.LSN {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, m := range b.Marks {
		t.mark(t.handed+uint64(m.Events), m.LSN)
	}
	t.handed += uint64(len(b.Events))
	return t.advance()
}

func (t *tracker) mark(events uint64, lsn event.LSN) {
	if n := len(t.marks); n > 0 && t.marks[n-1].events == events {
		t.marks[n-1].lsn = max(t.marks[n-1].lsn, lsn)
		return
	}
	t.marks = append(t.marks, trackerMark{events: events, lsn: lsn})
}

// deliver is called with what the sink has delivered. It returns the LSN before which all is delivered.
func (t *tracker) deliver(p sink.Progress) event.LSN {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.delivered += uint64(p.Events)
	t.last = p
	return t.advance()
}

func (t *tracker) advance() event.LSN {
	n := 0
	for n < len(t.marks) && t.marks[n].events <= t.delivered {
		t.lsn = max(t.lsn, t.marks[n].lsn)
		n++
	}
	t.marks = append(t.marks[:0], t.marks[n:]...)
	return t.lsn
}

// snapshot is what a tracker knows at one moment.
type snapshot struct {
	// lsn is where everything before it is delivered.
	lsn event.LSN
	// delivered counts events since the stream started; waiting are with the sink.
	delivered, waiting uint64
	// last is the last delivered event.
	last sink.Progress
}

func (t *tracker) snapshot() snapshot {
	t.mu.Lock()
	defer t.mu.Unlock()
	return snapshot{lsn: t.lsn, delivered: t.delivered, waiting: t.handed - t.delivered, last: t.last}
}
