package bridge

import (
	"context"
	"crypto/sha256"
	"errors"
	"hash/maphash"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5/pgtype"

	"ebb/decode"
	"ebb/event"
	"ebb/internal/sleep"
	"ebb/sink"
	"ebb/sql"
)

// recoverBytes is about how much content a page of recovered rows holds.
const recoverBytes = 1 << 20

// recover delivers the rows that were in the buffer before the slot was. It may be interrupted anywhere: what the sink holds by then is not
// delivered again, if the sink can tell. When the sink turns out to have forgotten what was just delivered, it returns early, without an
// error: the facts are others then.
func (l *leader) recover(ctx context.Context, f *facts) error {
	managed := l.carriesManaged()
	if managed || l.record.OwnPending {
		if err := l.awaitVisible(ctx); err != nil {
			return err
		}
	}
	if l.record.Destination != l.Destination {
		if err := sql.BeginRecovery(ctx, l.db, l.record, l.Destination, f.tail.Last); err != nil {
			return err
		}
	}
	floor, err := sql.RecoveryFloor(ctx, l.db, l.Slot, l.Destination)
	if err != nil {
		return err
	}
	r := &recovery{l: l, f: f, held: newHoldings(l.record.Diverged, l.record.OwnPending), position: f.lastPosition(), seq: f.tail.Last,
		lastSeq: max(f.tail.Sequence, f.tick.StreamSeq)}
	if f.tail.Exclusive {
		r.lastSeq = f.tail.Last
	}
	if err := l.addHeld(ctx, r.held, floor); err != nil {
		return err
	}
	if f.tail.Removed > 0 && f.ticked {
		l.Logger.Warn("the stream has removed messages before it could be compared with the buffer; rows that were among them are delivered again",
			"messages", f.tail.Removed)
	}
	if managed {
		err = l.recoverManaged(ctx, r)
	}
	if err == nil && l.record.OwnPending {
		err = l.recoverOwn(ctx, r)
	}
	if errors.Is(err, errForgot) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := l.conn.EndSnapshot(ctx); err != nil {
		return err
	}
	if err := sql.RecoveryDone(ctx, l.db, l.record, l.Destination, r.position, r.lastSeq, l.own.tables...); err != nil {
		return err
	}
	if l.record.Recovered > 0 {
		l.Logger.Info("delivered the rows from before the slot", "slot", l.Slot, "events", l.record.Recovered)
	}
	return nil
}

// recovery is the delivery of rows that were there before the slot.
type recovery struct {
	l    *leader
	f    *facts
	held *holdings
	// position is that of the last event that is delivered, seq the last sequence number of the destination, and lastSeq the last one for which
	// the recovery's tick stands: where others publish as well, it is to be one of ours.
	position     event.Position
	seq, lastSeq uint64
}

// at is the position of the events that come next.
func (r *recovery) at() event.Position { return r.f.recoveredAt(r.position) }

// resume asks the destination for its end before a page. The error is errForgot if that has forgotten what was just delivered.
func (r *recovery) resume(ctx context.Context) error {
	tail, err := r.l.Sink.Resume(ctx, sink.Known{Source: r.f.source, Position: r.position, Sequence: r.seq})
	if err != nil {
		return &sinkError{err}
	}
	switch {
	case r.f.remembers && tail.Last < r.seq:
		return errForgot
	case tail.Last > r.seq:
		// What the leader before this one had sent off has arrived only now.
		if err := r.l.addHeld(ctx, r.held, r.seq); err != nil {
			return err
		}
		r.seq = tail.Last
	}
	if tail.Position.Compare(r.position) > 0 {
		r.position = tail.Position
	}
	r.lastSeq = max(r.lastSeq, tail.Sequence)
	return nil
}

// deliver delivers a page of events, and releases it. It returns how many they were.
func (r *recovery) deliver(ctx context.Context, batch *event.Batch) (int, error) {
	n := len(batch.Events)
	if n == 0 {
		batch.Release()
		return 0, nil
	}
	in := make(chan *event.Batch, 1)
	in <- batch
	close(in)
	var last sink.Progress
	out := sink.Outcome{Delivered: func(p sink.Progress) { last = p }, Dead: r.l.dead, Block: r.l.Block}
	if err := r.l.Sink.Run(ctx, in, out); err != nil {
		return 0, &sinkError{err}
	}
	// If all of them are parked, a destination that remembers positions ends where it did.
	if last.Position.Compare(r.position) > 0 {
		r.position = last.Position
	}
	r.seq, r.lastSeq = max(r.seq, last.Sequence), max(r.lastSeq, last.Sequence)
	return n, nil
}

// errForgot says that the destination has forgotten what was just delivered.
var errForgot = errors.New("the destination has forgotten")

// recoverManaged delivers the rows of the managed table, by id.
func (l *leader) recoverManaged(ctx context.Context, r *recovery) error {
	for {
		if err := l.at("page"); err != nil {
			return err
		}
		rows, err := sql.RowsToRecover(ctx, l.db, l.Slot, l.record.RecoveredID, recoverBytes)
		if err != nil || len(rows) == 0 {
			return err
		}
		if err := r.resume(ctx); err != nil {
			return err
		}
		at := r.at()
		batch, err := recoveredBatch(at, rows, r.held)
		if err != nil {
			return err
		}
		n, err := r.deliver(ctx, batch)
		if err != nil {
			return err
		}
		l.record.RecoveredID = rows[len(rows)-1].ID
		l.record.Recovered += int64(n)
		if err := l.at("delivered page"); err != nil {
			return err
		}
		if err := sql.Recovered(ctx, l.db, l.record, l.record.RecoveredID, n, r.seq); err != nil {
			return err
		}
	}
}

// awaitVisible waits until a query sees every row that is to be recovered.
func (l *leader) awaitVisible(ctx context.Context) error {
	waits := newWaits(&l.Config)
	for began, said := time.Now(), false; ; {
		ok, err := sql.AllVisible(ctx, l.db, l.Slot)
		if ok || err != nil {
			return err
		}
		if err := waits.end(ctx, l.db); err != nil {
			return err
		}
		if !said && time.Since(began) > waitersAfter {
			said = true
			l.Logger.Warn("the recovery waits for transactions to become visible that wait for a synchronous standby", "slot", l.Slot)
		}
		if err := sleep.For(ctx, caughtUpPoll); err != nil {
			return err
		}
	}
}

// lastPosition is the position of the last event that is known to be delivered.
func (f *facts) lastPosition() event.Position {
	if f.ticked && f.tick.Position.Compare(f.tail.Position) > 0 {
		return f.tick.Position // of an event that the destination has removed
	}
	return f.tail.Position
}

// recoveredAt returns the position of events that are recovered behind one at last: the same. But the first ones of an epoch stand at its
// beginning, so that a bridge of a database that has not come so far, as a primary from before a promotion, sees that the stream has gone on
// without it. The epoch is that of what the slot is to bring next.
func (f *facts) recoveredAt(last event.Position) event.Position {
	if epoch := f.record.Epochs.At(f.slot.ConfirmedFlush); last.Epoch < epoch {
		return event.Position{Epoch: epoch}
	}
	return last
}

// holdings are the events that the sink holds, among those that are still to be recovered.
type holdings struct {
	ids idSet
	// contents are the events by id, kept where an id alone does not say that it is the same event.
	contents map[int64]content
	seed     maphash.Seed
	// own, unless nil, are the events that may be of own tables, by a digest of their ids; the value is one of the payload, or zero where the id
	// is enough. Payloads are those of events whose position was their id, which a row does not tell.
	own      map[digest]digest
	payloads map[digest]int
	diverged bool
}

// digest is long enough for two never to be the same by chance.
type digest [16]byte

func digestOf(content []byte) digest {
	sum := sha256.Sum256(content)
	return digest(sum[:16])
}

func newHoldings(diverged, own bool) *holdings {
	h := &holdings{ids: idSet{}, seed: maphash.MakeSeed(), diverged: diverged}
	if diverged {
		h.contents = map[int64]content{}
	}
	if own {
		h.own, h.payloads = map[digest]digest{}, map[digest]int{}
	}
	return h
}

// addOwn adds an event that may be of an own table.
func (h *holdings) addOwn(m sink.Stored) {
	if h.own == nil {
		return
	}
	if _, err := event.ParsePosition(string(m.ID)); err == nil {
		h.payloads[digestOf(m.Payload)]++
		return
	}
	var payload digest
	if h.diverged {
		payload = digestOf(m.Payload)
	}
	h.own[digestOf(m.ID)] = payload
}

// holdsEvent reports whether the sink holds the event of a row of an own table. Where the position of an event is its id, a whole row with its primary
// key tells it as well.
func (h *holdings) holdsEvent(e *event.Event, t *sql.OwnTable) bool {
	if payload, ok := h.own[digestOf(e.ID)]; ok {
		return !h.diverged || payload == digestOf(e.Payload)
	}
	if t.ID != "" || !t.WholeRow || len(t.Key) == 0 {
		return false
	}
	d := digestOf(e.Payload)
	if h.payloads[d] == 0 {
		return false
	}
	h.payloads[d]--
	return true
}

// content tells events of the same id apart.
type content struct {
	digest uint64
	// time is that of the event, or zero.
	time time.Time
}

func (h *holdings) add(id int64, m sink.Stored) {
	h.ids.add(id)
	if h.contents != nil {
		h.contents[id] = content{maphash.Bytes(h.seed, m.Payload), m.Time}
	}
}

func (h *holdings) hold(row *sql.Row) bool {
	if !h.ids.has(row.ID) {
		return false
	}
	if h.contents == nil {
		return true
	}
	c := h.contents[row.ID]
	// No transaction commits before it has made the row.
	return c.digest == maphash.Bytes(h.seed, row.Payload) && (c.time.IsZero() || !c.time.Before(row.CreatedAt))
}

// managedID returns the id of a row of the managed table, if the id of an event is one: no other table has numbers for ids then.
func (l *leader) managedID(id []byte) (int64, bool) {
	if !l.carriesManaged() {
		return 0, false
	}
	n, err := strconv.ParseInt(string(id), 10, 64)
	return n, err == nil
}

// addHeld adds what the sink holds behind a sequence number, if it can tell.
func (l *leader) addHeld(ctx context.Context, h *holdings, after uint64) error {
	scanner, ok := l.Sink.(sink.Scanner)
	if !ok {
		return nil
	}
	// The tick with which the recovery ends stands behind what it finds, and of retried events nobody else looks in front of that.
	var retried []sql.Retried
	if err := scanner.Scan(ctx, after, func(m sink.Stored) error {
		if m.Origin == event.Streamed && l.record.Epochs.RuleOut(m.Position) {
			return nil // of a lost row, whose id another one may have
		}
		if m.Origin == event.Retried {
			retried = append(retried, sql.Retried{ID: string(m.ID), Seq: m.Sequence, Epoch: m.Position.Epoch})
		}
		id, ok := l.managedID(m.ID)
		switch {
		case !ok:
			h.addOwn(m)
		case l.record.Done || id > l.record.RecoveredID: // of the others it is known already
			h.add(id, m)
		}
		return nil
	}); err != nil || len(retried) == 0 {
		return err
	}
	return sql.MarkRetried(ctx, l.db, l.record, l.Destination, retried)
}

// recoveredBatch returns the events of those of the rows that the sink does not hold.
func recoveredBatch(position event.Position, rows []sql.Row, held *holdings) (*event.Batch, error) {
	managed := decode.Managed()
	batch := event.NewBatch()
	for i := range rows {
		row := &rows[i]
		if held.hold(row) {
			continue
		}
		if err := managed.AppendRow(batch, decode.Row{
			ID: strconv.AppendInt(nil, row.ID, 10), Topic: row.Topic, Key: row.Key, Payload: row.Payload, Headers: row.Headers,
			PayloadType: pgtype.JSONOID, Time: row.CreatedAt, Position: position,
		}); err != nil {
			return nil, err
		}
	}
	return batch, nil
}
