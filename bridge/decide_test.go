package bridge

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"
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
	// handed are with the sink, the first stored of them in the stream, of which the bridge has not heard.
	handed []worldMessage
	stored int
	seq    uint64
	tick   *worldTick
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
	return &world{t: t, rowless: rapid.Bool().Draw(t, "rowless"), gone: map[int64]bool{}, removed: map[int64]bool{}, expired: map[int64]bool{}, forgotten: map[int64]bool{}, nextID: 1,
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
		if slices.ContainsFunc(w.stream, func(m worldMessage) bool { return m.id == id }) || w.forgotten[id] || w.removed[id] {
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
		t.Position, t.Sequence, t.ID = m.position, uint64(i+1), ""
		if m.origin == event.Streamed {
			t.ID = fmt.Sprint(m.id)
		}
	}
	for i := int(after); i < len(w.stream); i++ {
		switch m := w.stream[i]; {
		case m.deleted:
		case m.id == 0:
			behind++
		default:
			take(i)
			t.Foreign, behind = t.Foreign+behind, 0
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
	for _, m := range w.stream[min(floor, len(w.stream)):] {
		held[m.id] = held[m.id] || !m.deleted
	}
	var rows []int64
	for tx := w.seenBy(w.record.RecoveredAfter); tx < w.snapshot; tx++ {
		for _, id := range w.transactions[tx] {
			if id > w.record.RecoveredID && !w.removed[id] && !w.hasNoRow(id) {
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
		if !held[id] {
			w.stream = append(w.stream, worldMessage{id: id, position: position, origin: event.Recovered})
		}
	}
	w.record.RecoveredID, w.record.RecoveredSeq = rows[len(rows)-1], uint64(len(w.stream))
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
		if m.position.Compare(b.skip.Since) > 0 && through <= 0 {
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
		case b.more < b.skip.More:
			b.more++
			skipped++
			b.from = sink.Progress{Position: m.position, Sequence: b.from.Sequence + 1}
		default:
			if skipped > 0 { // as batches hold what comes behind what was left out
				b.tracker.hand(event.NewBatch(), skipped, b.from)
				skipped = 0
			}
			batch.Events = append(batch.Events, event.Event{Position: m.position})
			b.handed = append(b.handed, m)
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

// publish stores the next n events; the stream refuses all of them when it has changed.
func (b *session) publish(w *world, n int) {
	if uint64(len(w.stream)) != b.seq {
		w.session = nil
		return
	}
	for ; n > 0 && b.stored < len(b.handed); n-- {
		w.stream = append(w.stream, b.handed[b.stored])
		b.stored++
		b.seq++
	}
}

// ack has the bridge hear of the next n stored events.
func (b *session) ack(n int) {
	if n = min(n, b.stored); n == 0 {
		return
	}
	b.tracker.deliver(sink.Progress{Events: n, Position: b.handed[n-1].position, Sequence: b.seq - uint64(b.stored-n)})
	b.handed, b.stored = b.handed[n:], b.stored-n
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
	if w.session != b {
		return false
	}
	b.publish(w, math.MaxInt)
	if w.session != b {
		return false
	}
	b.ack(math.MaxInt)
	b.beginTick(w)
	b.storeTick(w)
	b.confirm(w)
	if b.tick != nil {
		w.t.Fatal("a tick does not come true although everything is delivered")
	}
	return true
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
		if seen[m.id] && m.position.Epoch == epochs[m.id] {
			w.t.Fatalf("event %d is in the stream again at %d: %v", m.id, i+1, w.stream)
		}
		if seen[m.id] && !w.isReplayed(m.id, m.position.Epoch) {
			w.t.Fatalf("event %d is in the stream again at %d, which no replay is of: %v", m.id, i+1, w.stream)
		}
		seen[m.id], epochs[m.id] = true, m.position.Epoch
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
				if commitAt(tx) < r.From || w.forgotten[id] {
					continue
				}
				if !slices.ContainsFunc(w.stream, func(m worldMessage) bool { return m.id == id && m.position.Epoch >= r.Epoch }) {
					w.t.Fatalf("replay %d is done, and event %d was not delivered again: %v", r.ID, id, w.stream)
				}
			}
		}
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
		for range 100 {
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
		inStream := map[int64]bool{}
		for _, m := range w.stream {
			inStream[m.id] = inStream[m.id] || !m.deleted
		}
		for _, ids := range w.transactions {
			for _, id := range ids {
				if !inStream[id] && !w.expired[id] && !w.gone[id] && !(w.forgotten[id] && (w.removed[id] && w.acceptGap || w.renewed)) {
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
