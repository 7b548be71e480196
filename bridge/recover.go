package bridge

import (
	"context"
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
	if err := l.awaitVisible(ctx); err != nil {
		return err
	}
	seq := f.tail.Last
	if l.record.Destination != l.Destination {
		if err := sql.BeginRecovery(ctx, l.db, l.record, l.Destination, seq); err != nil {
			return err
		}
	}
	floor, err := sql.RecoveryFloor(ctx, l.db, l.Slot, l.Destination)
	if err != nil {
		return err
	}
	held := newHoldings(l.record.Diverged)
	if err := l.addHeld(ctx, held, floor); err != nil {
		return err
	}
	if f.tail.Removed > 0 && f.ticked {
		l.Logger.Warn("the stream has removed messages before it could be compared with the buffer; rows that were among them are delivered again",
			"messages", f.tail.Removed)
	}
	position := f.lastPosition()
	// The last message that the recovery's tick stands for: where others publish as well, it is to be one of ours.
	lastSeq := max(f.tail.Sequence, f.tick.StreamSeq)
	if f.tail.Exclusive {
		lastSeq = f.tail.Last
	}
	for {
		if err := l.at("page"); err != nil {
			return err
		}
		rows, err := sql.RowsToRecover(ctx, l.db, l.Slot, l.record.RecoveredID, recoverBytes)
		if err != nil {
			return err
		}
		if len(rows) == 0 {
			break
		}
		tail, err := l.Sink.Resume(ctx, sink.Known{Source: f.source, Position: position, Sequence: seq})
		if err != nil {
			return &sinkError{err}
		}
		switch {
		case f.remembers && tail.Last < seq:
			return nil
		case tail.Last > seq:
			// What the leader before this one had sent off has arrived only now.
			if err := l.addHeld(ctx, held, seq); err != nil {
				return err
			}
			seq = tail.Last
		}
		if tail.Position.Compare(position) > 0 {
			position = tail.Position
		}
		lastSeq = max(lastSeq, tail.Sequence)
		at := f.recoveredAt(position)
		n, last, err := l.recoverPage(ctx, at, rows, held)
		if err != nil {
			return err
		}
		if n > 0 {
			position = at
		}
		seq, lastSeq = max(seq, last), max(lastSeq, last)
		l.record.RecoveredID = rows[len(rows)-1].ID
		l.record.Recovered += int64(n)
		if err := l.at("delivered page"); err != nil {
			return err
		}
		if err := sql.Recovered(ctx, l.db, l.record, l.record.RecoveredID, n, seq); err != nil {
			return err
		}
	}
	if err := sql.RecoveryDone(ctx, l.db, l.record, l.Destination, position, lastSeq); err != nil {
		return err
	}
	if l.record.Recovered > 0 {
		l.Logger.Info("delivered the rows from before the slot", "slot", l.Slot, "events", l.record.Recovered)
	}
	return nil
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
	// messages, unless nil, are the events whose id is their position, as that of a message is. A recovery, which has rows to deliver, does not
	// need them.
	messages map[event.Position]bool
	// contents are the events by id, kept where an id alone does not say that it is the same event.
	contents map[int64]content
	seed     maphash.Seed
}

func newHoldings(diverged bool) *holdings {
	h := &holdings{ids: idSet{}, seed: maphash.MakeSeed()}
	if diverged {
		h.contents = map[int64]content{}
	}
	return h
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

// addHeld adds what the sink holds behind a sequence number, if it can tell.
func (l *leader) addHeld(ctx context.Context, h *holdings, after uint64) error {
	scanner, ok := l.Sink.(sink.Scanner)
	if !ok {
		return nil
	}
	return scanner.Scan(ctx, after, func(m sink.Stored) error {
		id, err := strconv.ParseInt(string(m.ID), 10, 64)
		if err != nil {
			if p, err := event.ParsePosition(string(m.ID)); err == nil && h.messages != nil {
				h.messages[p] = true
			}
			return nil
		}
		if !l.record.Done && id <= l.record.RecoveredID {
			return nil // of the others it is known already
		}
		if m.Origin == event.Streamed && l.record.Epochs.RuleOut(m.Position) {
			return nil // of a lost row, whose id another one may have
		}
		h.add(id, m)
		return nil
	})
}

// recoverPage delivers those of the rows that the sink does not hold. It returns how many they were, and the sequence number of the last one.
func (l *leader) recoverPage(ctx context.Context, position event.Position, rows []sql.Row, held *holdings) (int, uint64, error) {
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
			return 0, 0, err
		}
	}
	n := len(batch.Events)
	if n == 0 {
		batch.Release()
		return 0, 0, nil
	}
	in := make(chan *event.Batch, 1)
	in <- batch
	close(in)
	var seq uint64
	if err := l.Sink.Run(ctx, in, func(p sink.Progress) { seq = p.Sequence }); err != nil {
		return 0, 0, &sinkError{err}
	}
	return n, seq, nil
}
