package bridge

import (
	"context"
	"errors"
	"fmt"

	"ebb/replication"
	"ebb/sql"
)

// errReplay ends a stream because a replay was asked for or cancelled.
var errReplay = errors.New("a replay was asked for or cancelled")

// copyTrail drops the slot, if there is one, and makes it anew as a copy of the trailing one. It is done again from its beginning if it is
// interrupted.
func (l *leader) copyTrail(ctx context.Context, f *facts, why string) error {
	if f.exists {
		if err := l.conn.DropSlot(ctx, l.Slot); err != nil {
			return err
		}
	}
	if err := l.at("dropped for a copy"); err != nil {
		return err
	}
	if err := replication.CopySlot(ctx, l.db, replication.TrailOf(l.Slot), l.Slot); err != nil {
		return err
	}
	if err := l.at("copied"); err != nil {
		return err
	}
	// Whoever led before may have been advancing the trailing slot.
	if slot, err := replication.InspectSlot(ctx, l.db, l.Slot); err != nil {
		return err
	} else if slot.ConfirmedFlush != f.trail.ConfirmedFlush {
		return fmt.Errorf("copy slot %q to %q: it has moved from %s to %s meanwhile", f.trail.Name, l.Slot, f.trail.ConfirmedFlush, slot.ConfirmedFlush)
	}
	if err := l.conn.SetFailover(ctx, l.Slot); err != nil {
		return err
	}
	l.carried.doubt = noDoubt
	l.Logger.Warn("the slot is reset to where the trailing one stands", "slot", l.Slot, "position", f.trail.ConfirmedFlush, "because", why)
	if err := l.at("failover set"); err != nil {
		return err
	}
	return sql.EndReset(ctx, l.db, l.record)
}

// beginReplay begins the epoch in which events are delivered again.
func (l *leader) beginReplay(ctx context.Context, f *facts, s step) error {
	r := f.requested
	// Where the sink does not tell, what the slot has confirmed is delivered as well.
	through := s.skip.Through
	if !f.remembers && f.slot.ConfirmedFlush > through.Commit {
		through.Commit, through.Index = f.slot.ConfirmedFlush, 0
	}
	l.Logger.Warn("delivering again", "replay", r.ID, "from", r.From, "through", through, "epoch", s.epoch.Number, "asked_for_by", r.RequestedBy)
	if err := l.at("replay"); err != nil {
		return err
	}
	return sql.BeginReplay(ctx, l.db, l.record, r.ID, s.epoch, through, l.Destination, s.last.Sequence)
}

// recordReplay stores how far a replay has come. It is done when a tick is: what had been delivered before it began is behind that.
func (l *leader) recordReplay(ctx context.Context, done bool) error {
	if l.replay == nil {
		return nil
	}
	n := l.replayed.Swap(0)
	if n == 0 && !done {
		return nil
	}
	position := l.tracker.snapshot().last.Position
	if err := sql.ReplayDelivered(ctx, l.db, l.replay.ID, n, position, done); err != nil {
		return err
	}
	if done {
		l.Logger.Info("what was to be delivered again is delivered", "replay", l.replay.ID, "through", position)
		l.replay = nil
	}
	return nil
}
