package bridge

import (
	"context"
	"fmt"
	"time"

	"ebb/event"
	"ebb/sql"
)

// caughtUpPoll is how often a tick looks whether delivery has reached it. Delivery is usually there within a round trip.
const caughtUpPoll = 20 * time.Millisecond

// maxPause bounds, in intervals, the time between ticks that are stored because the one before did not tell.
const maxPause = 64

// tick records delivery: once in TickEvery, and only when events were delivered since, a snapshot is read together with the
// end of the log, and stored once everything before that end is delivered. A quiet buffer is not written to.
//
// The first tick comes in any case, as the last of what was delivered before the stream started may not be recorded. And ticks go on until
// one sees all that was delivered: a transaction is decoded a moment before a snapshot shows it, and long before if it waits for a
// synchronous standby. Where other transactions stay open and one cannot tell, they come at longer and longer intervals.
func (l *leader) tick(ctx context.Context) error {
	every := time.NewTicker(l.TickEvery)
	defer every.Stop()
	var recorded, stored uint64 // events, and the transaction that stored the first tick behind the last one of them
	due, pause, waited := true, 1, 0
	for {
		select {
		case <-every.C:
		case <-ctx.Done():
			return nil
		}
		if err := l.regulate(ctx); err != nil {
			return ignoreEnd(ctx, err)
		}
		// What is delivered from here on may be too late for the snapshot.
		if delivered := l.tracker.snapshot().delivered; delivered != recorded {
			recorded, stored, due, pause, waited = delivered, 0, true, 1, 0
		}
		tick, publication, err := sql.BeginTick(ctx, l.db, l.Publication, Tables(l.Buffers)...)
		if err != nil {
			return ignoreEnd(ctx, err)
		}
		// While the publication does not fit, the slot passes over rows without a word.
		if err := l.checkPublication(ctx, publication); err != nil {
			return ignoreEnd(ctx, err)
		}
		if err := l.recordReplay(ctx, false); err != nil {
			return ignoreEnd(ctx, err)
		}
		if waited++; !due || waited < pause {
			continue
		}
		waited = 0
		now, ok, err := l.awaitDelivered(ctx, tick.LSN)
		if !ok || err != nil {
			return ignoreEnd(ctx, err)
		}
		// So rows that are delivered and not marked stand behind the newest tick in the stream.
		if ok, err := l.awaitMarked(ctx, now.delivered); !ok || err != nil {
			return ignoreEnd(ctx, err)
		}
		// So what was retried and is not recorded stands there as well.
		retried := l.dead.retried()
		if ok, err := l.await(ctx, func() bool { return l.dead.hasStored(retried) }); !ok || err != nil {
			return ignoreEnd(ctx, err)
		}
		if err := l.checkWitness(ctx, tick); err != nil {
			return ignoreEnd(ctx, err)
		}
		tick.Position, tick.StreamSeq, tick.Events = now.last.Position, now.last.Sequence, l.before+int64(now.delivered)
		tick.Destination, tick.Epoch = l.Destination, l.record.Epochs.Last()
		xid, err := sql.StoreTick(ctx, l.db, l.record, tick, l.TickKeep)
		if err != nil {
			return ignoreEnd(ctx, err)
		}
		if err := l.recordReplay(ctx, true); err != nil {
			return ignoreEnd(ctx, err)
		}
		confirmed := l.tracker.cover(tick.LSN)
		l.out.Confirm(confirmed.write, confirmed.flush)

		oldest, err := tick.Oldest()
		switch {
		case err != nil:
			return err
		case stored == 0:
			stored = xid
		case oldest > stored:
			due = false // whatever had been delivered by then has ended
		default:
			pause = min(2*pause, maxPause)
		}
	}
}

// checkPublication returns an error, and nothing is recorded or confirmed any more, if the publication is not what it was when the slot
// was made. One that fits again may not have done so in between: then the slot is made anew.
func (l *leader) checkPublication(ctx context.Context, p sql.Publication) error {
	if err := p.Check(); err != nil {
		return err
	}
	if l.record.Publication == "" || sql.SamePublication(l.record.Publication, p.Mark) {
		return nil
	}
	if err := sql.RemakeSlot(ctx, l.db, l.record, publicationChanged, true); err != nil {
		return err
	}
	return fmt.Errorf("slot %q: %w: %s", l.Slot, sql.ErrNotMade, publicationChanged)
}

// checkWitness returns an error if rows that the tick is to record as delivered have not come by since the stream started, nor were they
// recorded or set aside before: somebody has made another slot, or has moved this one. It is made anew then.
func (l *leader) checkWitness(ctx context.Context, tick sql.Tick) error {
	if l.witness == nil {
		return nil
	}
	missed := 0
	if err := sql.RowsBetween(ctx, l.db, l.Slot, l.witness.since, tick.Snapshot, func(id int64) {
		if !l.witness.saw(id) {
			missed++
		}
	}); err != nil {
		return err
	}
	if missed > 0 {
		because := fmt.Sprintf("it has passed over %d rows, so that somebody must have made another one or moved it", missed)
		if err := sql.RemakeSlot(ctx, l.db, l.record, because, false); err != nil {
			return err
		}
		return fmt.Errorf("slot %q: %w: %s", l.Slot, sql.ErrNotMade, because)
	}
	l.witness.dismiss()
	l.witness = nil
	return nil
}

// awaitDelivered waits until everything before lsn is delivered, or returns false when ctx ends. It goes on looking at the lag meanwhile,
// which grows while a sink is down.
func (l *leader) awaitDelivered(ctx context.Context, lsn event.LSN) (snapshot, bool, error) {
	var now snapshot
	ok, err := l.await(ctx, func() bool {
		now = l.tracker.snapshot()
		return now.write >= lsn
	})
	return now, ok, err
}

// awaitMarked waits until the rows of the first so many events are marked or deleted, in the same way: a row that is locked holds up the slot.
func (l *leader) awaitMarked(ctx context.Context, events uint64) (bool, error) {
	if !l.tracker.allMarked(events) {
		l.tracker.ask()
	}
	return l.await(ctx, func() bool { return l.tracker.allMarked(events) })
}

// await waits for a condition and does meanwhile what a tick does besides recording. It returns false when ctx ends.
func (l *leader) await(ctx context.Context, reached func() bool) (bool, error) {
	poll := time.NewTicker(caughtUpPoll)
	defer poll.Stop()
	said := time.Now()
	for {
		if reached() {
			return true, nil
		}
		if err := l.regulate(ctx); err != nil {
			return false, err
		}
		select {
		case <-poll.C:
		case <-ctx.Done():
			return false, nil
		}
		if time.Since(said) < l.TickEvery {
			continue
		}
		said = time.Now()
		if err := l.recordReplay(ctx, false); err != nil {
			return false, err
		}
	}
}

// ignoreEnd drops the error of a query that ctx has ended.
func ignoreEnd(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		return nil
	}
	return err
}
