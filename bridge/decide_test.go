package bridge

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
	"strconv"
	"testing"

	"pgregory.net/rapid"

	"ebb/decode"
	"ebb/event"
	"ebb/replication"
	"ebb/sink"
	"ebb/sql"
)

// world is a model of all that outlives a bridge: the database, its slot, what is recorded, and a stream. It does what the statements and the
// servers do; what it is asked to do is decided by the real decision, and confirmed by the real tracker.
type world struct {
	t *rapid.T

	// transactions hold the ids of their rows; the n-th, from 0, commits at commitAt(n).
	transactions [][]int64
	nextID       int64
	removed      map[int64]bool // from the table
	removedTo    int            // all removed rows are of transactions before this one

	slot     replication.Slot
	exists   bool
	onDisk   event.LSN // what the slot confirms after a crash of the server
	record   sql.SlotRecord
	snapshot int // transactions that the slot does not hold
	start    event.LSN
	// trail is the trailing slot, and trailOnDisk what it confirms after a crash of the server.
	trail       replication.Slot
	follows     bool
	trailOnDisk event.LSN
	// replays are those that were ever asked for; began is how many transactions there were when they began.
	replays  []sql.Replay
	began    []int
	ticks    []worldTick
	lastTick int64

	stream []worldMessage
	expired,
	forgotten map[int64]bool // that the stream has deleted by its limits, or forgotten, at least once

	// rowless says that every third event has no row that would give it again. Gone are those of which a slot was made anew.
	rowless bool
	gone    map[int64]bool
	// confirmed is what the slot had confirmed when the last replay was begun.
	confirmed event.LSN

	// letters are the dead letters, in order of their numbers. The stream does not take what is in poison.
	letters []*worldLetter
	poison  map[int64]bool
	// decided are those that an operator has decided about since the newest tick.
	decided map[*worldLetter]bool

	acceptGap bool
	// unsure says that it cannot be known exactly which events the stream has removed that no tick has recorded. They may come again.
	unsure  bool
	renewed bool // the stream was deleted, and gets what the trailing slot has
	doubt   doubt
	session *session
	calm    bool // nothing is killed any more
}

// killed draws whether the bridge is killed at a place.
func (w *world) killed(where string, oneIn int) bool {
	return !w.calm && rapid.IntRange(1, oneIn).Draw(w.t, "killed "+where) == 1
}

type worldTick struct {
	sql.Tick
	sees int // transactions
}

type worldMessage struct {
	id       int64 // 0 for one of somebody else
	position event.Position
	origin   event.Origin
	deleted  bool
	// own is the epoch of a retried event.
	own uint32
}

// worldLetter is an event in the dead letters.
type worldLetter struct {
	id    int64
	place event.Position // in no epoch
	epoch uint32
	state string
	seq   uint64
}

func (l *worldLetter) waits() bool { return l.state == "parked" || l.state == "retrying" }

// keyOf is the key of an event, or 0 if it has none.
func keyOf(id int64) int64 { return id % 4 }

// entry is an event that was handed to the sink.
type entry struct {
	worldMessage
	seq uint64 // where it is stored
	// letter, unless nil, is what is to be kept of it instead; kept says that it is.
	letter *worldLetter
	kept   bool
}

// session is a bridge that streams.
type session struct {
	tracker *tracker
	skip    decode.Skip
	from    sink.Progress
	// next is where in the log the slot stands, as a transaction and a row in it.
	tx, row int
	counted uint64
	more    uint64
	passed  bool
	// handed are with the sink, the first stored of them in the stream or kept, of which the bridge has not heard.
	handed []*entry
	stored int
	seq    uint64
	tick   *worldTick
	// letters are those that wait for their commit, and at what the sink says of the last event that is not retried.
	letters []*entry
	at      sink.Progress
	// ticked says that a tick was stored since this bridge leads. Behind is the position of the last message. Retry is under way, stored at its number, and retried are acknowledged and not yet marked.
	ticked  bool
	behind  event.Position
	retry   *worldRetry
	retried []*worldRetry
}

type worldRetry struct {
	worldLetter // as it was
	seq         uint64
}

const publicationMark = "1/1"

func commitAt(tx int) event.LSN { return event.LSN(100*tx + 110) }
func endAt(tx int) event.LSN    { return event.LSN(100*tx + 150) }

// at is the position of a row of a transaction.
func (w *world) at(tx, row int) event.Position {
	return event.Position{Epoch: w.record.Epochs.At(commitAt(tx)), Commit: commitAt(tx), Index: uint64(row + 1)}
}

func (w *world) now() event.LSN { return event.LSN(100*len(w.transactions) + 100) }

func newWorld(t *rapid.T) *world {
	return &world{t: t, poison: map[int64]bool{}, decided: map[*worldLetter]bool{}, rowless: rapid.Bool().Draw(t, "rowless"), gone: map[int64]bool{}, removed: map[int64]bool{}, expired: map[int64]bool{}, forgotten: map[int64]bool{}, nextID: 1,
		record: sql.SlotRecord{Name: "s", SystemIdentifier: "1", Timeline: 1, Epochs: event.Epochs{{Number: 1}}, Buffer: "b", Publication: publicationMark}}
}

func (w *world) commit(rows int) {
	var ids []int64
	for range rows {
		ids = append(ids, w.nextID)
		w.nextID++
	}
	w.transactions = append(w.transactions, ids)
	if n := len(w.transactions); n > 1 && rapid.Bool().Draw(w.t, "ids out of order") {
		a, b := w.transactions[n-2], w.transactions[n-1]
		if len(a) == len(b) && w.snapshot <= n-2 && !w.begun(n-2) {
			w.transactions[n-2], w.transactions[n-1] = b, a
		}
	}
}

// begun reports whether anybody may have seen a transaction, whose ids must then stay.
func (w *world) begun(tx int) bool {
	if w.session != nil && w.session.tx >= tx {
		return true
	}
	for _, id := range w.transactions[tx] {
		if slices.ContainsFunc(w.stream, func(m worldMessage) bool { return m.id == id }) || w.forgotten[id] || w.removed[id] || w.hasLetter(id) {
			return true
		}
	}
	return slices.ContainsFunc(w.ticks, func(t worldTick) bool { return t.sees > tx })
}

func (w *world) tail() sink.Tail {
	t := sink.Tail{Last: uint64(len(w.stream)), Holds: uint64(len(w.stream)), Exclusive: true, Source: w.source()}
	var known uint64
	if tick, ok := w.newest(); ok {
		known = tick.StreamSeq
	}
	if r := w.replayed(); r != nil && !r.Void {
		known = max(known, r.Held)
	}
	if !w.record.Done && w.record.Destination != "" {
		known = max(known, w.record.RecoveredSeq)
	}
	after := known
	if t.Last < after {
		after = 0
	}
	behind := uint64(0)
	take := func(i int) {
		m := w.stream[i]
		t.Position, t.Sequence, t.ID, t.Origin = m.position, uint64(i+1), "", m.origin
		if m.origin == event.Streamed {
			t.ID = fmt.Sprint(m.id)
		}
	}
	missing := uint64(0)
	for i := int(after); i < len(w.stream); i++ {
		switch m := w.stream[i]; {
		case m.deleted:
			missing++
		case m.id == 0:
			behind++
		default:
			take(i)
			t.Foreign, behind = t.Foreign+behind, 0
			t.Missing = missing
			if m.origin == event.Retried {
				t.Retried++
			}
		}
	}
	if n := len(w.stream); t.Sequence == 0 && n > 0 && !w.stream[n-1].deleted && w.stream[n-1].id != 0 {
		take(n - 1)
	}
	if base := max(t.Sequence, known); t.Last > base+behind {
		t.Removed = t.Last - base - behind
	}
	return t
}

func (w *world) source() sink.Source {
	return sink.Source{SystemIdentifier: "1", Database: "d", Slot: "s", Buffer: "b"}
}

func (w *world) newest() (worldTick, bool) {
	if len(w.ticks) == 0 {
		return worldTick{}, false
	}
	return w.ticks[len(w.ticks)-1], true
}

func (w *world) facts() *facts {
	f := &facts{destination: "x", source: w.source(), acceptGap: w.acceptGap, doubt: w.doubt,
		publication: publicationMark, system: replication.System{ID: "1", Timeline: 1, Database: "d"}, flushed: w.now(), record: w.record, slot: w.slot, exists: w.exists,
		remembers: true, tail: w.tail(), rowless: w.rowless}
	if tick, ok := w.newest(); ok {
		f.newest, f.tick, f.ticked, f.delivered = tick.Tick, tick.Tick, true, true
	}
	f.trail, f.follows = w.trail, w.follows
	f.replayed = w.replayed()
	if n := len(w.replays); n > 0 && w.replays[n-1].State == sql.ReplayRequested {
		f.requested = &w.replays[n-1]
	}
	f.reach = w.removedTo <= w.seenBy(f.newest.ID)
	retriable := func(seq uint64) (n uint64) {
		for _, l := range w.letters {
			if l.state == "retrying" || l.state == "delivered" && l.seq > seq || l.state != "delivered" && w.decided[l] {
				n++
			}
		}
		return n
	}
	for _, l := range w.letters {
		if l.state == "delivered" && l.seq > f.tail.Holds {
			f.forgotten++
		}
	}
	if f.ticked && (f.tail.Missing > 0 || f.tail.Removed > 0) {
		f.retried, f.retriedLast = retriable(f.tick.StreamSeq), retriable(max(f.tick.StreamSeq, f.tail.Sequence))
	}
	if f.forgot() {
		for _, tick := range slices.Backward(w.ticks) {
			if tick.StreamSeq <= f.tail.Last && tick.Position.Compare(f.endPosition()) <= 0 {
				f.held, f.holds = tick.Tick, true
				break
			}
		}
		f.reach = w.removedTo <= w.seenBy(f.held.ID)
	}
	return f
}

func (w *world) hasNoRow(id int64) bool { return w.rowless && id%3 == 0 }

// replayed returns a copy of the replay that was begun last, or nil.
func (w *world) replayed() *sql.Replay {
	for _, r := range slices.Backward(w.replays) {
		if r.Epoch != 0 {
			return &r
		}
	}
	return nil
}

// endReplay ends the one that has not ended.
func (w *world) endReplay(state sql.ReplayState) {
	for i := range w.replays {
		if w.replays[i].Active() {
			w.replays[i].State = state
		}
	}
}

// seenBy returns how many transactions the snapshot of a tick sees.
func (w *world) seenBy(id int64) int {
	for _, tick := range w.ticks {
		if tick.ID == id {
			return tick.sees
		}
	}
	return 0
}

// advance takes one step, or goes on streaming. It reports whether there is nothing left to do.
func (w *world) advance() bool {
	if w.session != nil {
		return w.session.idle(w)
	}
	f := w.facts()
	s := decide(f)
	switch s.action {
	case actHalt:
		if !errors.Is(s.err, ErrGap) || w.removedTo == 0 && !w.rowless {
			w.t.Fatalf("halts with %v", s.err)
		}
		w.acceptGap = true
	case actRewind:
		w.ticks = slices.DeleteFunc(w.ticks, func(t worldTick) bool { return t.ID > s.tick })
		switch {
		case s.slotHolds:
		case s.reset:
			w.record.Reset, w.record.MadeBecause = true, s.because
			w.renewed = w.renewed || s.because == becauseRenewed
		case w.record.Done:
			w.record.Made, w.record.Done = false, false
		default:
			w.record.RecoveredAfter = s.tick
		}
		w.record.RecoveredID, w.record.RecoveredSeq = 0, 0
	case actRetry:
		for _, l := range w.letters {
			if l.state != "delivered" || l.seq <= f.tail.Holds {
				continue
			}
			l.state, l.seq = "retrying", 0
			for _, behind := range w.letters {
				if keyOf(l.id) != 0 && keyOf(behind.id) == keyOf(l.id) && behind.state == "parked" {
					behind.state = "retrying"
				}
			}
		}
	case actMake:
		w.doubt = noDoubt
		for _, ids := range w.transactions {
			for _, id := range ids {
				w.gone[id] = w.gone[id] || w.hasNoRow(id)
			}
		}
		if r := w.replayed(); r != nil && r.State == sql.ReplayRunning {
			w.endReplay(sql.ReplayFailed)
			w.unsure = true
		}
		w.record.Made, w.record.Done, w.exists, w.record.Reset = false, false, false, false
		if w.killed("while the slot is made", 4) {
			return false
		}
		w.exists, w.start, w.snapshot = true, w.now(), len(w.transactions)
		w.slot = replication.Slot{Plugin: replication.Plugin, ConfirmedFlush: w.start}
		w.onDisk = w.start
		if w.killed("before it is recorded", 4) {
			return false
		}
		w.record.Made, w.record.RecoveredID, w.record.RecoveredSeq, w.record.Destination = true, 0, 0, ""
		tick, _ := w.newest()
		w.record.RecoveredAfter, w.record.ConsistentPoint = tick.ID, w.start
	case actReset:
		w.record.Reset, w.record.MadeBecause = true, s.why
	case actCopy:
		w.exists = false
		if w.killed("before the copy", 4) {
			return false
		}
		w.exists, w.slot, w.onDisk = true, replication.Slot{Plugin: replication.Plugin, ConfirmedFlush: w.trail.ConfirmedFlush}, w.trail.ConfirmedFlush
		w.doubt = noDoubt
		if w.killed("before the end of the reset", 4) {
			return false
		}
		w.record.Reset = false
	case actAbandon:
		if s.replay != 0 {
			w.endReplay(sql.ReplayFailed)
			w.unsure = true
		}
		w.record.Reset = false
	case actVoid:
		for i := range w.replays {
			w.replays[i].Void = true
		}
		w.unsure = true
	case actReplay:
		w.confirmed = w.slot.ConfirmedFlush
		w.unsure = w.unsure || f.tail.Removed > 0
		r := &w.replays[len(w.replays)-1]
		r.State, r.Epoch, r.Through, r.Held, r.Destination = sql.ReplayRunning, s.epoch.Number, s.skip.Through, s.last.Sequence, "x"
		w.record.Epochs = append(slices.Clone(w.record.Epochs), s.epoch)
		w.record.Reset, w.record.MadeBecause = true, fmt.Sprint("replay ", r.ID)
		w.began = append(w.began, len(w.transactions))
	case actRefuse:
		w.endReplay(sql.ReplayFailed)
	case actRecover:
		w.recover(f)
	case actStream:
		w.unsure = w.unsure || s.skip.More < f.tail.Removed && f.tail.Exclusive
		w.session = w.begin(s)
	default:
		w.t.Fatalf("what is %d for?", s.action)
	}
	return false
}

// recover delivers a page, or finds that there is none left.
func (w *world) recover(f *facts) {
	if w.record.Destination == "" {
		w.record.Destination, w.record.RecoveredSeq = "x", f.tail.Last
	}
	held := map[int64]bool{}
	floor := 0
	for i, tick := range w.ticks {
		if tick.ID == w.record.RecoveredAfter && i > 0 {
			floor = int(w.ticks[i-1].StreamSeq) // which was stored before the newest one began
		}
	}
	w.findRetried(floor)
	for _, m := range w.stream[min(floor, len(w.stream)):] {
		held[m.id] = held[m.id] || !m.deleted
	}
	var rows []int64
	for tx := w.seenBy(w.record.RecoveredAfter); tx < w.snapshot; tx++ {
		for _, id := range w.transactions[tx] {
			if id > w.record.RecoveredID && !w.removed[id] && !w.hasNoRow(id) && !w.hasLetter(id) {
				rows = append(rows, id)
			}
		}
	}
	slices.Sort(rows)
	position := f.recoveredAt(f.lastPosition())
	if len(rows) == 0 {
		w.record.Done = true
		w.store(worldTick{Tick: sql.Tick{LSN: w.start, Position: f.lastPosition(), StreamSeq: max(w.record.RecoveredSeq, f.tail.Last)},
			sees: w.snapshot})
		return
	}
	rows = rows[:rapid.IntRange(1, len(rows)).Draw(w.t, "page")]
	for _, id := range rows {
		if w.killed("in the middle of a page", 10) {
			return
		}
		switch {
		case held[id]:
		case w.holds(id):
			w.keep(&worldLetter{id: id, place: event.Position{Commit: position.Commit, Index: position.Index}, epoch: position.Epoch, state: "retrying"})
		case w.rejects(id):
			w.keep(&worldLetter{id: id, place: event.Position{Commit: position.Commit, Index: position.Index}, epoch: position.Epoch, state: "parked"})
		default:
			w.stream = append(w.stream, worldMessage{id: id, position: position, origin: event.Recovered})
		}
	}
	w.record.RecoveredID, w.record.RecoveredSeq = rows[len(rows)-1], uint64(len(w.stream))
}

// findRetried records what the stream holds of the dead letters behind a sequence number.
func (w *world) findRetried(after int) {
	for i, m := range w.stream {
		for _, l := range w.letters {
			if i >= after && m.origin == event.Retried && !m.deleted && l.id == m.id && l.waits() && l.epoch <= m.position.Epoch {
				l.state, l.seq = "delivered", uint64(i+1)
			}
		}
	}
}

// follow makes the trailing slot, as setup does at any time.
func (w *world) follow() {
	switch {
	case !w.exists, w.slot.Lost(), !w.record.Made:
	case !w.follows, w.trail.Lost(), w.trail.ConfirmedFlush < w.record.ConsistentPoint:
		w.trail, w.follows, w.trailOnDisk = replication.Slot{Plugin: replication.Plugin, ConfirmedFlush: w.slot.ConfirmedFlush}, true, w.slot.ConfirmedFlush
	}
}

func (w *world) store(t worldTick) {
	w.lastTick++
	t.ID, t.Epoch = w.lastTick, w.record.Epochs.Last()
	w.ticks = append(w.ticks, t)
}

func (w *world) begin(s step) *session {
	if !w.exists || w.slot.Lost() {
		w.t.Fatalf("streams from a slot that is not there: %+v", w.slot)
	}
	b := &session{tracker: newTracker(w.slot.ConfirmedFlush, s.last, true), skip: s.skip, from: s.last, seq: uint64(len(w.stream))}
	tail, tick := w.tail(), worldTick{}
	b.at = sink.Progress{Position: tail.Position, Sequence: tail.Sequence}
	if newest, ok := w.newest(); ok {
		if tick = newest; tail.Sequence < tick.StreamSeq || tail.Position.Compare(tick.Position) < 0 {
			b.at = sink.Progress{Position: tick.Position, Sequence: tick.StreamSeq}
			if tail.Sequence < tick.StreamSeq {
				b.at.Sequence = max(tick.StreamSeq, tail.Last)
			}
		}
	}
	b.behind = b.at.Position
	w.findRetried(int(tick.StreamSeq))
	left := map[worldLetter]bool{}
	for _, l := range w.letters {
		left[worldLetter{id: l.id, place: l.place, epoch: l.epoch}] = true
		if l.state == "discarded" {
			left[worldLetter{id: l.id, place: l.place}] = true
		}
	}
	b.skip.Aside = func(id []byte, at event.Position) bool {
		n, _ := strconv.ParseInt(string(id), 10, 64)
		place := event.Position{Commit: at.Commit, Index: at.Index}
		return left[worldLetter{id: n, place: place}] || left[worldLetter{id: n, place: place, epoch: at.Epoch}]
	}
	for b.tx < len(w.transactions) && commitAt(b.tx) < w.slot.ConfirmedFlush {
		b.tx++
	}
	return b
}

// read hands over the next n rows of the slot.
func (b *session) read(w *world, n int) {
	batch := event.NewBatch()
	var skipped uint64
	for ; n > 0 && b.tx < len(w.transactions); n-- {
		rows := w.transactions[b.tx]
		m := worldMessage{id: rows[b.row], position: w.at(b.tx, b.row)}
		through := m.position.Compare(b.skip.Through)
		aside := b.skip.Aside(fmt.Append(nil, m.id), m.position)
		if m.position.Compare(b.skip.Since) > 0 && through <= 0 && !aside {
			b.counted++
		}
		if through == 0 && b.skip.ID != "" && b.skip.ID != fmt.Sprint(m.id) {
			w.t.Fatalf("at %s there is %d, and the stream holds %s", m.position, m.id, b.skip.ID)
		}
		if through >= 0 && !b.passed {
			b.passed = true
			if through > 0 && b.skip.Comes {
				w.t.Fatalf("%s does not come by", b.skip.Through)
			}
			if b.skip.Counted && b.counted != b.skip.Count {
				w.doubt, w.session = w.doubt.after(decode.ErrCount), nil
				return
			}
		}
		switch {
		case through <= 0:
			skipped++
		case !aside && b.more < b.skip.More:
			b.more++
			skipped++
			b.from = sink.Progress{Position: m.position, Sequence: b.from.Sequence + 1}
		default:
			if skipped > 0 { // as batches hold what comes behind what was left out
				b.tracker.hand(event.NewBatch(), skipped, b.from)
				skipped = 0
			}
			batch.Events = append(batch.Events, event.Event{Position: m.position})
			e := &entry{worldMessage: m}
			b.handed = append(b.handed, e)
			if w.passed(m) || w.holds(m.id) {
				b.setAside(e, "retrying")
			}
		}
		if b.row++; b.row == len(rows) {
			batch.MarkEnd(endAt(b.tx))
			b.tx, b.row = b.tx+1, 0
		}
	}
	if b.tx == len(w.transactions) {
		batch.MarkEnd(w.now())
	}
	b.tracker.hand(batch, skipped, b.from)
}

// publish stores the next n events; the stream refuses all of them when it has changed. None is stored behind one that is to be kept and is not yet.
func (b *session) publish(w *world, n int) {
	if uint64(len(w.stream)) != b.seq {
		w.session = nil
		return
	}
	for ; n > 0 && b.stored < len(b.handed) && b.retry == nil; n-- {
		e := b.handed[b.stored]
		switch {
		case e.letter != nil && !e.kept:
			return
		case e.letter != nil:
		case w.rejects(e.id):
			if b.stored > 0 {
				return // what is in front of it is to be acknowledged first
			}
			b.setAside(e, "parked")
			for _, behind := range b.handed[1:] {
				if keyOf(e.id) != 0 && keyOf(behind.id) == keyOf(e.id) && behind.letter == nil {
					b.setAside(behind, "parked")
				}
			}
			return
		default:
			b.seq++
			e.seq = b.seq
			w.stream = append(w.stream, e.worldMessage)
		}
		b.stored++
	}
}

// setAside has an event be kept.
func (b *session) setAside(e *entry, state string) {
	e.letter = &worldLetter{id: e.id, place: event.Position{Commit: e.position.Commit, Index: e.position.Index}, epoch: e.position.Epoch, state: state}
	b.letters = append(b.letters, e)
}

// keep commits the next n letters.
func (b *session) keep(w *world, n int) {
	n = min(n, len(b.letters))
	for _, e := range b.letters[:n] {
		w.keep(e.letter)
		e.kept = true
	}
	b.letters = b.letters[n:]
}

// ack has the bridge hear of the next n stored events, and of those that are kept.
func (b *session) ack(n int) {
	if b.retry != nil {
		b.at = sink.Progress{Position: b.behind, Sequence: b.retry.seq}
		b.retried, b.retry = append(b.retried, b.retry), nil
		return
	}
	if n = min(n, b.stored); n == 0 {
		return
	}
	for _, e := range b.handed[:n] {
		if e.letter == nil {
			b.at = sink.Progress{Position: e.position, Sequence: e.seq}
			b.behind = e.position
		}
	}
	b.tracker.deliver(sink.Progress{Events: n, Position: b.at.Position, Sequence: b.at.Sequence})
	b.handed, b.stored = b.handed[n:], b.stored-n
}

// sendRetry publishes the first event of a queue that is to be retried, alone.
func (b *session) sendRetry(w *world) bool {
	if !b.ticked || len(b.handed) > 0 || b.retry != nil {
		return false
	}
	keys := map[int64]bool{}
	for _, l := range w.letters {
		key := keyOf(l.id)
		if !l.waits() || keys[key] {
			continue
		}
		keys[key] = key != 0
		if l.state != "retrying" || slices.ContainsFunc(b.retried, func(r *worldRetry) bool { return r.worldLetter == *l }) {
			continue
		}
		if w.rejects(l.id) {
			for _, behind := range w.letters {
				if behind.state == "retrying" && (behind == l || key != 0 && keyOf(behind.id) == key) {
					behind.state = "parked"
				}
			}
			return true
		}
		if uint64(len(w.stream)) != b.seq {
			w.session = nil
			return true
		}
		if b.behind.Epoch < l.epoch {
			b.behind = event.Position{Epoch: l.epoch}
		}
		b.seq++
		w.stream = append(w.stream, worldMessage{id: l.id, position: b.behind, origin: event.Retried, own: l.epoch})
		b.retry = &worldRetry{*l, b.seq}
		return true
	}
	return false
}

// mark records what was retried.
func (b *session) mark(w *world) {
	for _, done := range b.retried {
		for _, l := range w.letters {
			if l.id == done.id && l.place == done.place && l.epoch == done.epoch && l.waits() {
				l.state, l.seq = "delivered", done.seq
			}
		}
	}
	b.retried = nil
}

// rejects reports whether the stream does not take an event.
func (w *world) rejects(id int64) bool {
	bad, known := w.poison[id]
	if !known {
		bad = !w.calm && rapid.IntRange(1, 6).Draw(w.t, "poison") == 1
		w.poison[id] = bad
	}
	return bad
}

// keep stores a letter, as the statement does.
func (w *world) keep(l *worldLetter) {
	for i, there := range w.letters {
		if there.id != l.id || there.place != l.place {
			continue
		}
		if there.epoch >= l.epoch || there.state == "discarded" {
			return
		}
		w.letters = slices.Delete(w.letters, i, i+1)
		break
	}
	for _, there := range w.letters {
		if keyOf(l.id) != 0 && keyOf(there.id) == keyOf(l.id) && there.waits() {
			l.state = there.state
			break
		}
	}
	w.letters = append(w.letters, l)
}

func (w *world) hasLetter(id int64) bool {
	return slices.ContainsFunc(w.letters, func(l *worldLetter) bool { return l.id == id })
}

// holds reports whether events of the key of an event are kept.
func (w *world) holds(id int64) bool {
	same := func(other int64) bool { return keyOf(id) != 0 && keyOf(other) == keyOf(id) }
	return slices.ContainsFunc(w.letters, func(l *worldLetter) bool { return l.waits() && same(l.id) }) ||
		w.session != nil && slices.ContainsFunc(w.session.letters, func(e *entry) bool { return same(e.id) })
}

// passed reports whether an event that comes by is kept, or was.
func (w *world) passed(m worldMessage) bool {
	return slices.ContainsFunc(w.letters, func(l *worldLetter) bool {
		return l.id == m.id && l.place.Commit == m.position.Commit && l.place.Index == m.position.Index &&
			(l.epoch == m.position.Epoch || l.state == "discarded" || l.waits() && keyOf(l.id) == 0)
	})
}

func (b *session) beginTick(w *world) {
	b.tick = &worldTick{Tick: sql.Tick{LSN: w.now()}, sees: len(w.transactions)}
}

// storeTick stores the tick that was begun, if it has come true.
func (b *session) storeTick(w *world) {
	now := b.tracker.snapshot()
	if b.tick == nil || now.write < b.tick.LSN {
		return
	}
	b.mark(w)
	b.ticked = true
	clear(w.decided)
	b.tick.Position, b.tick.StreamSeq = now.last.Position, now.last.Sequence
	w.store(*b.tick)
	if n := len(w.replays); n > 0 && w.replays[n-1].State == sql.ReplayRunning {
		w.replays[n-1].State = sql.ReplayDone
	}
	b.tracker.cover(b.tick.LSN)
	b.tick = nil
}

func (b *session) confirm(w *world) {
	if w.exists {
		w.slot.ConfirmedFlush = max(w.slot.ConfirmedFlush, b.tracker.snapshot().flush)
	}
}

// idle goes on until there is nothing left to do, and reports whether that is so.
func (b *session) idle(w *world) bool {
	b.read(w, math.MaxInt)
	for first := true; w.session == b && (first || len(b.handed) > 0 || b.retry != nil); first = false {
		b.keep(w, math.MaxInt)
		b.publish(w, math.MaxInt)
		b.ack(math.MaxInt)
	}
	if w.session != b {
		return false
	}
	b.mark(w)
	if b.sendRetry(w) {
		return false
	}
	b.beginTick(w)
	b.storeTick(w)
	b.confirm(w)
	if b.tick != nil {
		w.t.Fatal("a tick does not come true although everything is delivered")
	}
	return !b.sendRetry(w)
}

func (w *world) check() {
	type delivery struct {
		id    int64
		epoch uint32
	}
	seen, streamed, epochs := map[int64]bool{}, map[delivery]bool{}, map[int64]uint32{}
	var last event.Position
	for i, m := range w.stream {
		if m.origin == event.Streamed && m.id != 0 {
			if streamed[delivery{m.id, m.position.Epoch}] && !w.unsure {
				w.t.Fatalf("event %d, which the stream has removed, is streamed again at %d: %v", m.id, i+1, w.stream)
			}
			streamed[delivery{m.id, m.position.Epoch}] = true
		}
		if m.deleted || m.id == 0 {
			continue
		}
		epoch := m.position.Epoch
		if m.origin == event.Retried {
			epoch = m.own
		}
		if seen[m.id] && epoch == epochs[m.id] {
			w.t.Fatalf("event %d is in the stream again at %d: %v", m.id, i+1, w.stream)
		}
		if seen[m.id] && !w.isReplayed(m.id, epoch) {
			w.t.Fatalf("event %d is in the stream again at %d, which no replay is of: %v", m.id, i+1, w.stream)
		}
		seen[m.id], epochs[m.id] = true, epoch
		if c := m.position.Compare(last); c < 0 || c == 0 && m.origin == event.Streamed {
			w.t.Fatalf("message %d is at %s after %s", i+1, m.position, last)
		}
		last = m.position
	}
	if w.session != nil {
		// What is confirmed can come again from the stream's end on, or from the table.
		now := w.session.tracker.snapshot()
		if now.flush > now.write {
			w.t.Fatalf("flush %s is behind write %s", now.flush, now.write)
		}
	}
}

// isReplayed reports whether the events of a row were to be delivered again in an epoch.
func (w *world) isReplayed(id int64, epoch uint32) bool {
	tx := slices.IndexFunc(w.transactions, func(ids []int64) bool { return slices.Contains(ids, id) })
	return slices.ContainsFunc(w.replays, func(r sql.Replay) bool { return r.Epoch != 0 && r.Epoch <= epoch && r.From <= commitAt(tx) })
}

// checkReplays checks that what is said to be delivered again is, unless the stream has forgotten it since.
func (w *world) checkReplays() {
	begun := 0
	for _, r := range w.replays {
		if r.Epoch == 0 {
			continue
		}
		if begun++; r.State != sql.ReplayDone {
			continue
		}
		for tx := range w.began[begun-1] {
			for _, id := range w.transactions[tx] {
				if commitAt(tx) < r.From || w.forgotten[id] || w.isKept(id) {
					continue
				}
				if !slices.ContainsFunc(w.stream, func(m worldMessage) bool { return m.id == id && m.position.Epoch >= r.Epoch }) {
					w.t.Fatalf("replay %d is done, and event %d was not delivered again: %v", r.ID, id, w.stream)
				}
			}
		}
	}
}

// isKept reports whether an event is among the dead letters and not delivered.
func (w *world) isKept(id int64) bool {
	return slices.ContainsFunc(w.letters, func(l *worldLetter) bool { return l.id == id && l.state != "delivered" })
}

// checkKeys checks that what has the same key is in the order in which it was committed, where nothing was delivered in another order for another reason.
func (w *world) checkKeys() {
	if len(w.replays) > 0 || len(w.forgotten) > 0 || slices.ContainsFunc(w.stream, func(m worldMessage) bool { return m.origin == event.Recovered }) ||
		slices.ContainsFunc(w.letters, func(l *worldLetter) bool { return l.place.Commit == 0 }) {
		return
	}
	committed := map[int64]int{}
	for _, ids := range w.transactions {
		for _, id := range ids {
			committed[id] = len(committed)
		}
	}
	last := map[int64]int64{}
	for i, m := range w.stream {
		key := keyOf(m.id)
		if before, ok := last[key]; ok && key != 0 && committed[m.id] < committed[before] {
			w.t.Fatalf("event %d is at %d behind %d of the same key: %v", m.id, i+1, before, w.stream)
		}
		last[key] = m.id
	}
}

func (w *world) deleteFromStream(i int) {
	if !w.stream[i].deleted {
		w.stream[i].deleted = true
		w.expired[w.stream[i].id] = true
	}
}

// Whatever comes to pass, in whatever order, every row is in the stream once, unless the stream has removed it by its own limits, or has
// forgotten it after it was removed from the buffer.
func TestDecisions(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld(t)
		streaming := func(do func(b *session)) func(*rapid.T) {
			return func(t *rapid.T) {
				if w.session == nil {
					w.advance()
					return
				}
				do(w.session)
			}
		}
		some := func(name string) int { return rapid.IntRange(1, 4).Draw(t, name) }
		t.Repeat(map[string]func(*rapid.T){
			"commit":     func(t *rapid.T) { w.commit(some("rows")) },
			"step":       func(*rapid.T) { w.advance() },
			"read":       streaming(func(b *session) { b.read(w, some("rows")) }),
			"publish":    streaming(func(b *session) { b.publish(w, some("events")) }),
			"ack":        streaming(func(b *session) { b.ack(some("events")) }),
			"begin tick": streaming(func(b *session) { b.beginTick(w) }),
			"store tick": streaming(func(b *session) { b.storeTick(w) }),
			"confirm":    streaming(func(b *session) { b.confirm(w) }),
			"keep":       streaming(func(b *session) { b.keep(w, some("letters")) }),
			"retry":      streaming(func(b *session) { b.sendRetry(w) }),
			"mark":       streaming(func(b *session) { b.mark(w) }),
			"retry what is parked": func(t *rapid.T) {
				for _, l := range w.letters {
					if l.state == "parked" {
						l.state, w.poison[l.id], w.decided[l] = "retrying", w.poison[l.id] && rapid.Bool().Draw(t, "still poison"), true
					}
				}
			},
			"discard": func(t *rapid.T) {
				i := slices.IndexFunc(w.letters, func(l *worldLetter) bool { return l.state == "parked" })
				if i < 0 {
					return
				}
				l := w.letters[i]
				l.state, w.decided[l] = "discarded", true
				for _, behind := range w.letters {
					if keyOf(l.id) != 0 && keyOf(behind.id) == keyOf(l.id) && behind.state == "parked" {
						behind.state, w.decided[behind] = "retrying", true
					}
				}
			},
			"checkpoint": func(*rapid.T) { w.onDisk, w.trailOnDisk = w.slot.ConfirmedFlush, w.trail.ConfirmedFlush },
			"kill the bridge": func(*rapid.T) {
				w.session = nil
			},
			"crash Postgres": func(*rapid.T) {
				w.session = nil
				w.slot.ConfirmedFlush = min(w.slot.ConfirmedFlush, w.onDisk)
				w.trail.ConfirmedFlush = min(w.trail.ConfirmedFlush, w.trailOnDisk)
			},
			"forget": func(t *rapid.T) {
				keep := rapid.IntRange(0, len(w.stream)).Draw(t, "kept")
				for _, m := range w.stream[keep:] {
					w.forgotten[m.id] = true
				}
				w.stream = slices.Clone(w.stream[:keep])
			},
			"expire": func(t *rapid.T) {
				n := len(w.stream)
				if rapid.Bool().Draw(t, "not all") {
					n = rapid.IntRange(0, n).Draw(t, "expired")
				}
				for i := range n {
					w.deleteFromStream(i)
				}
			},
			"drop the slot": func(*rapid.T) {
				w.exists, w.session = false, nil
			},
			"advance the trailing slot": streaming(func(b *session) {
				if !w.follows || w.trail.Lost() {
					w.follow()
					return
				}
				if to := event.LSN(rapid.IntRange(0, int(w.slot.ConfirmedFlush)).Draw(t, "to")); to > w.trail.ConfirmedFlush {
					w.trail.ConfirmedFlush = to
				}
				if rapid.Bool().Draw(t, "at once on disk") {
					w.trailOnDisk = w.trail.ConfirmedFlush
				}
			}),
			"set up":                       func(*rapid.T) { w.follow() },
			"drop the trailing slot":       func(*rapid.T) { w.follows = false },
			"invalidate the trailing slot": func(*rapid.T) { w.trail.WALStatus = "lost" },
			"fail over to a slot that has not gone back": func(*rapid.T) {
				if r := w.replayed(); r != nil && r.State == sql.ReplayRunning && !r.Void && w.exists && w.record.Made {
					w.slot.ConfirmedFlush, w.session = max(w.slot.ConfirmedFlush, w.confirmed), nil
				}
			},
			"ask for a replay": func(t *rapid.T) {
				if n := len(w.replays); n > 0 && w.replays[n-1].Active() || len(w.transactions) == 0 {
					return
				}
				w.replays = append(w.replays, sql.Replay{ID: int64(len(w.replays) + 1), State: sql.ReplayRequested,
					From: commitAt(rapid.IntRange(0, len(w.transactions)-1).Draw(t, "from"))})
				w.session = nil
			},
			"cancel the replay": func(*rapid.T) {
				if n := len(w.replays); n > 0 && w.replays[n-1].Active() {
					w.endReplay(sql.ReplayCancelled)
					w.unsure = true
					w.session = nil
				}
			},
			"invalidate the slot": func(*rapid.T) {
				w.slot.WALStatus, w.session = "lost", nil
			},
			"collect": func(t *rapid.T) {
				tick, ok := w.newest()
				if !ok {
					return
				}
				to := rapid.IntRange(0, tick.sees).Draw(t, "collected")
				for tx := range to {
					for _, id := range w.transactions[tx] {
						w.removed[id] = true
					}
				}
				w.removedTo = max(w.removedTo, to)
			},
			"": func(*rapid.T) { w.check() },
		})
		w.calm = true
		for range 1000 {
			if w.advance() {
				break
			}
			w.check()
		}
		if w.session == nil || !w.advance() {
			t.Fatal("it comes to no rest")
		}
		w.check()
		w.checkReplays()
		w.checkKeys()
		inStream := map[int64]bool{}
		for _, m := range w.stream {
			inStream[m.id] = inStream[m.id] || !m.deleted
		}
		for _, ids := range w.transactions {
			for _, id := range ids {
				if !inStream[id] && !w.isKept(id) && !w.expired[id] && !w.gone[id] && !(w.forgotten[id] && (w.removed[id] && w.acceptGap || w.renewed)) {
					t.Fatalf("event %d is missing in the stream", id)
				}
			}
		}
		if rows := slices.MaxFunc(append(w.transactions, []int64{0}), func(a, b []int64) int { return cmp.Compare(slices.Max(a), slices.Max(b)) }); slices.Max(rows) != w.nextID-1 {
			t.Fatal("the model has lost rows")
		}
	})
}

// The old primary's bridge has delivered an event from behind the switch after the epoch was raised.
func TestTailBehindTheSwitch(t *testing.T) {
	source := sink.Source{SystemIdentifier: "1", Database: "d", Slot: "s", Buffer: "b"}
	f := &facts{
		source: source, system: replication.System{ID: "1", Timeline: 2, Database: "d"}, flushed: 0x5000, exists: true, remembers: true,
		record: sql.SlotRecord{Name: "s", SystemIdentifier: "1", Timeline: 2, Epochs: event.Epochs{{Number: 1}, {Number: 2, From: 0x2000}},
			Made: true, Done: true},
		slot: replication.Slot{Plugin: replication.Plugin, ConfirmedFlush: 0x1000},
		tick: sql.Tick{ID: 1, LSN: 0x1000, Position: event.Position{Epoch: 1, Commit: 0xF00, Index: 1}, StreamSeq: 10, Epoch: 1}, ticked: true, delivered: true,
		tail: sink.Tail{Position: event.Position{Epoch: 1, Commit: 0x2500, Index: 1}, Sequence: 11, Last: 11, ID: "11", Exclusive: true, Source: source},
	}
	f.newest = f.tick
	if s := decide(f); s.action != actHalt || !errors.Is(s.err, ErrLost) {
		t.Errorf("action %d, error %v: the stream ends with an event at %s, and epoch 1 ended at 0/2000", s.action, s.err, f.tail.Position)
	}
}

// The stream has removed an event of a replay, and forgotten the replay's tick. Whether the event is among what comes by depends on where the slot stands.
func TestRemovedOfAReplay(t *testing.T) {
	for _, test := range []struct {
		slot event.LSN
		more uint64
	}{{0x64, 1}, {0xC8, 0}} {
		source := sink.Source{SystemIdentifier: "1", Database: "d", Slot: "s", Buffer: "b"}
		f := &facts{
			destination: "x", source: source, system: replication.System{ID: "1", Timeline: 1, Database: "d"}, flushed: 0x5000, exists: true, remembers: true,
			record: sql.SlotRecord{Name: "s", SystemIdentifier: "1", Timeline: 1, Epochs: event.Epochs{{Number: 1}, {Number: 2, From: 0x6E, Replay: true}},
				Made: true, Done: true},
			slot: replication.Slot{Plugin: replication.Plugin, ConfirmedFlush: test.slot},
			tick: sql.Tick{ID: 1, LSN: 0xC8, Position: event.Position{Epoch: 1, Commit: 0x6E, Index: 2}, StreamSeq: 2, Epoch: 1}, ticked: true, delivered: true,
			replayed: &sql.Replay{ID: 1, State: sql.ReplayDone, From: 0x6E, Epoch: 2, Through: event.Position{Epoch: 1, Commit: 0x6E, Index: 2}, Held: 2, Destination: "x"},
			tail:     sink.Tail{Last: 3, Holds: 3, Removed: 1, Exclusive: true, Source: source},
		}
		f.newest = f.tick
		if s := decide(f); s.action != actStream || s.skip.More != test.more {
			t.Errorf("with the slot at %s: action %d, and %d events are left out, want %d", test.slot, s.action, s.skip.More, test.more)
		}
	}
}
