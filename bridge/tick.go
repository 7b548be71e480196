package bridge

import (
	"context"
	"time"

	"ebb/event"
	"ebb/sql"
)

// caughtUpPoll is how often a tick looks whether delivery has reached it. Delivery is usually there within a round trip.
const caughtUpPoll = 20 * time.Millisecond

// tick records delivery: once in TickEvery, and only when events were delivered since, a snapshot is read together with the
// end of the log, and stored once everything before that end is delivered. A quiet buffer is not written to.
//
// The first tick comes in any case, as the last of what was delivered before the stream started may not be recorded. And every
// delivery is followed by two: a transaction is decoded a moment before a snapshot shows it.
func (l *leader) tick(ctx context.Context) error {
	every := time.NewTicker(l.TickEvery)
	defer every.Stop()
	var recorded uint64
	for due := 2; ; {
		select {
		case <-every.C:
		case <-ctx.Done():
			return nil
		}
		// What is delivered from here on may be too late for the snapshot.
		if delivered := l.tracker.snapshot().delivered; delivered != recorded {
			recorded, due = delivered, 2
		}
		tick, err := sql.BeginTick(ctx, l.db)
		if err != nil {
			return ignoreEnd(ctx, err)
		}
		// While the publication does not fit, the slot passes over rows without a word. It is looked at after the snapshot
		// was taken, so that no such row can be in there.
		if err := sql.CheckPublication(ctx, l.db, l.Publication); err != nil {
			return ignoreEnd(ctx, err)
		}
		if due == 0 {
			continue
		}
		now, ok := l.awaitDelivered(ctx, tick.LSN)
		if !ok {
			return nil
		}
		tick.Position, tick.StreamSeq, tick.Events = now.last.Position, now.last.Sequence, l.before+int64(now.delivered)
		tick.Destination = l.Destination
		if err := sql.StoreTick(ctx, l.db, l.record, tick, l.TickKeep); err != nil {
			return ignoreEnd(ctx, err)
		}
		confirmed := l.tracker.cover(tick.LSN)
		l.out.Confirm(confirmed.write, confirmed.flush)
		due--
	}
}

// awaitDelivered waits until everything before lsn is delivered.
func (l *leader) awaitDelivered(ctx context.Context, lsn event.LSN) (snapshot, bool) {
	poll := time.NewTicker(caughtUpPoll)
	defer poll.Stop()
	for {
		if now := l.tracker.snapshot(); now.write >= lsn {
			return now, true
		}
		select {
		case <-poll.C:
		case <-ctx.Done():
			return snapshot{}, false
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
