package bridge

import (
	"bytes"
	"math"
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
	// covers is up to where flush might be, were it not for the spans, which are in order of their ends.
	covers event.LSN
	spans  []span

	// rows are those of handed events, in order, taken those that are being marked, and locked those that somebody else has locked. unmarked is
	// the lowest number of events in all of them, or noRow.
	rows, taken, locked []trackedRow
	unmarked            uint64
	rowBytes            int
	// due wakes who marks rows.
	due chan struct{}
	// roomy, unless nil, is closed when there is room for more rows.
	roomy chan struct{}
}

// trackedRow is a row that is to be marked once so many events are delivered.
type trackedRow struct {
	events uint64
	table  int
	// xid is the id of its transaction, without the epoch; 0 if every query sees it.
	xid uint32
	key []byte
}

// noRow says that there is no row to be marked.
const noRow = math.MaxUint64

// maxRows and maxRowBytes bound the rows that wait to be marked, and their keys. Past them, reading waits.
const maxRows, maxRowBytes = 100_000, 16 << 20

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

// span is from where an event is in the log that was set aside to where it is in the log that it was. Between the two, a standby has the one and not
// the other: nothing there is confirmed, or else the event would be lost if that was promoted.
type span struct{ from, to event.LSN }

const (
	// spanSlack is how far what is delivered may be ahead of the end of a span for that to hold. Where events are set aside all the time, the
	// log would be kept for ever. No standby is so far behind of which the server knows (synchronized_standby_slots).
	spanSlack = 64 << 20
	// spanMerge is how far a span may reach that is made of several.
	spanMerge = 1 << 20
)

// maxDone bounds the marks that wait for a tick. Past it they are thinned out, for which flush is a little late.
const maxDone = 1 << 16

// newTracker returns a tracker of a stream before whose start, lsn, everything is delivered; last was the last of it. If
// ticked, flush waits for ticks; otherwise it is the same as write.
func newTracker(lsn event.LSN, last sink.Progress, ticked bool) *tracker {
	return &tracker{confirmed: confirmation{write: lsn, flush: lsn}, covers: lsn, last: last, ticked: ticked,
		unmarked: noRow, due: make(chan struct{}, 1)}
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
	for _, row := range b.Rows {
		events := t.handed + uint64(row.Events)
		t.rows = append(t.rows, trackedRow{events: events, table: row.Table, xid: row.XID, key: bytes.Clone(row.Key)})
		t.rowBytes += len(row.Key)
		t.unmarked = min(t.unmarked, events)
	}
	t.handed += uint64(len(b.Events))
	t.wake()
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
	if p.Position.Compare(t.last.Position) >= 0 { // of events that are all set aside, the sink says what it delivered before what was left out
		t.last = p
	}
	t.wake()
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

// isCovered reports whether nothing before a mark is needed again. Where no tick tells what a destination holds, the slot must still hold
// what is not marked: it is delivered again then.
func (t *tracker) isCovered(m mark) bool {
	if !t.ticked {
		return m.events < t.unmarked
	}
	return t.anyTick && m.events <= t.covered
}

// wake wakes who marks rows, when there are many to be marked.
func (t *tracker) wake() {
	if len(t.rows) >= markBatch && t.rows[markBatch-1].events <= t.delivered {
		t.ask()
	}
}

// ask asks for the rows of delivered events to be marked now.
func (t *tracker) ask() {
	select {
	case t.due <- struct{}{}:
	default:
	}
}

// take returns at most so many rows of delivered events, which are to be marked; if again, those that were locked come first. Then marked is to be
// called.
func (t *tracker) take(most int, again bool) []trackedRow {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.taken = nil
	if again {
		n := min(most, len(t.locked))
		t.taken, t.locked = append(t.taken, t.locked[:n]...), t.locked[n:]
	}
	n := 0
	for n < len(t.rows) && len(t.taken)+n < most && t.rows[n].events <= t.delivered {
		n++
	}
	t.taken, t.rows = append(t.taken, t.rows[:n]...), t.rows[n:]
	return t.taken
}

// marked is called when the rows that were taken are marked, but for some that somebody else has locked.
func (t *tracker) marked(locked []trackedRow) confirmation {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, row := range t.taken {
		t.rowBytes -= len(row.key)
	}
	for _, row := range locked {
		t.rowBytes += len(row.key)
	}
	t.taken, t.locked = nil, append(t.locked, locked...)
	t.unmarked = noRow
	if len(t.rows) > 0 {
		t.unmarked = t.rows[0].events
	}
	for _, row := range t.locked {
		t.unmarked = min(t.unmarked, row.events)
	}
	if t.roomy != nil && t.hasRoom() {
		close(t.roomy)
		t.roomy = nil
	}
	return t.advance()
}

// allMarked reports whether the rows of the first so many events are marked.
func (t *tracker) allMarked(events uint64) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return events < t.unmarked
}

// hasLocked reports whether there are rows that somebody else has locked.
func (t *tracker) hasLocked() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.locked) > 0
}

// hasDue reports whether there are rows of delivered events that are to be marked, apart from those that somebody else has locked.
func (t *tracker) hasDue() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.taken) > 0 || len(t.rows) > 0 && t.rows[0].events <= t.delivered
}

func (t *tracker) hasRoom() bool {
	return len(t.rows)+len(t.taken)+len(t.locked) < maxRows && t.rowBytes < maxRowBytes
}

// room returns nil if there is room for more rows, or else a channel that is closed when there is.
func (t *tracker) room() <-chan struct{} {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.hasRoom() {
		return nil
	}
	if t.roomy == nil {
		t.roomy = make(chan struct{})
	}
	return t.roomy
}

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
		t.covers = max(t.covers, t.done[n].last)
	}
	t.done = t.done[n:]
	t.confirmed.flush = max(t.confirmed.flush, t.outside(t.covers))
	if len(t.done) > maxDone {
		kept := t.done[:0]
		for i := 1; i < len(t.done); i += 2 {
			kept = append(kept, t.done[i])
		}
		t.done = kept
	}
	return t.confirmed
}

// span is called when events that stand in the log from one place on are set aside, which is in the log before another one. They do not count as
// delivered yet.
func (t *tracker) span(from, to event.LSN) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.prune()
	if n := len(t.spans); n > 0 {
		last := &t.spans[n-1]
		if merged := (span{min(last.from, from), max(last.to, to)}); merged.to-merged.from <= spanMerge {
			*last = merged
			return
		}
		to = max(last.to, to)
	}
	t.spans = append(t.spans, span{from, to})
}

// prune forgets the spans that are over.
func (t *tracker) prune() {
	n := 0
	for n < len(t.spans) && (t.spans[n].to <= t.confirmed.flush || t.spans[n].to+spanSlack <= t.confirmed.write) {
		n++
	}
	t.spans = t.spans[n:]
}

// outside returns the highest place up to lsn that is in no span.
func (t *tracker) outside(lsn event.LSN) event.LSN {
	t.prune()
	for i := len(t.spans) - 1; i >= 0; i-- {
		if s := t.spans[i]; s.from < lsn && lsn < s.to {
			lsn = s.from
		}
	}
	return lsn
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
