package bridge

import (
	"sync"

	"ebb/event"
	"ebb/sink"
)

// tracker knows how far delivery has come in the log. It is told of events that were handed to the sink, of events that the sink
// has delivered, and of ticks that were stored, and says what may be confirmed.
type tracker struct {
	mu sync.Mutex
	// handed and delivered count events, from the start of the stream.
	handed, delivered uint64
	// waiting are marks whose events are not all delivered; done are those whose events are, and which no tick covers yet.
	// Counts and LSNs rise through waiting and done.
	waiting, done []mark
	// ticked says that flush waits for ticks. The first one is waited for in any case: what was delivered before the stream
	// started may not be covered either. covered is how many of the delivered events are.
	ticked, anyTick bool
	covered         uint64
	confirmed       confirmation
	last            sink.Progress
}

// mark says: once so many events are delivered, everything before first is, and so is everything before last, as no event stands
// between. It stands for the end of a transaction or for a keepalive's position, and for those that follow it.
type mark struct {
	events      uint64
	first, last event.LSN
}

// confirmation is what Postgres may be told. Nothing before write is undelivered. Nothing before flush is undelivered, or
// delivered without that a tick has recorded it, so that a destination which forgets is found out before the slot has too.
type confirmation struct {
	write, flush event.LSN
}

// maxDone bounds the marks that wait for a tick. Past it they are thinned out, for which flush is a little late.
const maxDone = 1 << 16

// newTracker returns a tracker of a stream before whose start, lsn, everything is delivered; last was the last of it. If
// ticked, flush waits for ticks; otherwise it is the same as write.
func newTracker(lsn event.LSN, last sink.Progress, ticked bool) *tracker {
	return &tracker{confirmed: confirmation{write: lsn, flush: lsn}, last: last, ticked: ticked}
}

// hand is called with each batch before the sink can have it, and with how many events were left out before the batch's first
// because the sink has them already, up to last.
func (t *tracker) hand(b *event.Batch, skipped uint64, last sink.Progress) confirmation {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.handed += skipped
	t.delivered += skipped
	if skipped > 0 {
		t.last = last
	}
	for _, m := range b.Marks {
		t.waiting = appendMark(t.waiting, mark{events: t.handed + uint64(m.Events), first: m.First, last: m.Last})
	}
	t.handed += uint64(len(b.Events))
	return t.advance()
}

// appendMark appends m, or adds it to the mark before it if no event separates them.
func appendMark(marks []mark, m mark) []mark {
	if n := len(marks); n > 0 && marks[n-1].events == m.events {
		marks[n-1].last = max(marks[n-1].last, m.last)
		return marks
	}
	return append(marks, m)
}

// deliver is called with what the sink has delivered.
func (t *tracker) deliver(p sink.Progress) confirmation {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.delivered += uint64(p.Events)
	t.last = p
	return t.advance()
}

// cover is called when a tick is stored that covers every transaction which ends at or before lsn, where everything was
// delivered.
func (t *tracker) cover(lsn event.LSN) confirmation {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.anyTick = true
	for _, m := range t.done {
		if m.first <= lsn {
			t.covered = max(t.covered, m.events)
		}
	}
	return t.advance()
}

func (t *tracker) isCovered(m mark) bool { return !t.ticked || t.anyTick && m.events <= t.covered }

// advance moves marks on as far as they may go.
func (t *tracker) advance() confirmation {
	n := 0
	for ; n < len(t.waiting) && t.waiting[n].events <= t.delivered; n++ {
		t.confirmed.write = max(t.confirmed.write, t.waiting[n].last)
		t.done = appendMark(t.done, t.waiting[n])
	}
	t.waiting = t.waiting[n:]

	n = 0
	for ; n < len(t.done) && t.isCovered(t.done[n]); n++ {
		t.confirmed.flush = max(t.confirmed.flush, t.done[n].last)
	}
	t.done = t.done[n:]
	if len(t.done) > maxDone {
		kept := t.done[:0]
		for i := 1; i < len(t.done); i += 2 {
			kept = append(kept, t.done[i])
		}
		t.done = kept
	}
	return t.confirmed
}

// snapshot is what a tracker knows at one moment.
type snapshot struct {
	confirmation
	// delivered counts events since the stream started; waiting are with the sink.
	delivered, waiting uint64
	// last is the last delivered event.
	last sink.Progress
}

func (t *tracker) snapshot() snapshot {
	t.mu.Lock()
	defer t.mu.Unlock()
	return snapshot{confirmation: t.confirmed, delivered: t.delivered, waiting: t.handed - t.delivered, last: t.last}
}
