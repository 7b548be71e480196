package bridge

import (
	"fmt"
	"math"

	"ebb/event"
	"ebb/sql"
)

// trails reports whether the slot can be copied from the trailing one, so that it is as it was a while ago.
func (f *facts) trails() bool { return f.follows && follows(f.trail, f.record, f.publication) }

// trailReaches reports whether the destination still holds everything that stands before the trailing slot, which it has forgotten something of.
func (f *facts) trailReaches() bool {
	return f.holds && f.trail.ConfirmedFlush <= f.held.LSN || f.trailIsHeld()
}

// trailIsHeld reports whether it is recorded that the destination was given everything that stands before the trailing slot, and holds it.
func (f *facts) trailIsHeld() bool {
	r := &f.record
	return r.TrailDestination == f.destination && f.trail.ConfirmedFlush <= r.TrailLSN && (!f.remembers || f.tail.Holds >= r.TrailSeq)
}

// whatIsReset has a slot copied from the trailing one, if that has been begun.
func whatIsReset(f *facts) (step, bool) {
	if !f.record.Reset {
		return step{}, false
	}
	if f.trails() && f.trail.ConfirmedFlush <= f.resetTo() {
		return step{action: actCopy, why: f.record.MadeBecause}, true
	}
	const lost = "the trailing slot, from which it was to be copied, is lost"
	switch {
	case f.isResetForReplay() && f.usable():
		return step{action: actAbandon, why: lost, replay: f.replayed.ID}, true
	case f.usable() && f.slot.ConfirmedFlush <= f.newest.LSN: // it was copied
		return step{action: actAbandon, why: lost}, true
	case f.record.Done && (f.record.MadeBecause == becauseForgotten || f.record.MadeBecause == becauseRenewed):
		if err := f.gap(lost); err != nil {
			return halt(err), true
		}
	case f.record.Done && !f.reach && !f.acceptGap:
		return halt(f.lostSlot(lost)), true
	}
	return step{action: actMake, why: lost}, true
}

// isResetForReplay reports whether the slot is to be reset for a replay.
func (f *facts) isResetForReplay() bool {
	return f.replayed != nil && f.record.MadeBecause == sql.BecauseOfReplay(f.replayed.ID)
}

// resetTo returns how far the trailing slot may have come for the slot to be copied from it. It may be another one than when that was decided.
func (f *facts) resetTo() event.LSN {
	switch {
	case f.isResetForReplay() && (f.usable() || f.trailIsHeld()):
		return f.replayed.From
	case f.isResetForReplay(): // the slot may have stood further back than the trailing one, and held what that does not
		return min(f.replayed.From, f.newest.LSN)
	case f.record.MadeBecause == becauseRenewed, f.trailIsHeld():
		return math.MaxUint64
	}
	return f.newest.LSN
}

// isResetNeedless finds out whether the slot stands further back than the trailing one, as it may after a crash of the server, which writes
// neither position to disk at once.
func isResetNeedless(f *facts) (step, bool) {
	if !f.record.Reset || !f.usable() || !f.trails() || f.slot.ConfirmedFlush >= f.trail.ConfirmedFlush {
		return step{}, false
	}
	return step{action: actAbandon, why: fmt.Sprintf("it stands at %s, and the trailing one at %s", f.slot.ConfirmedFlush, f.trail.ConfirmedFlush)}, true
}

// leftOff returns the replay that was begun last, if the destination still holds all that it held then.
func (f *facts) leftOff() *sql.Replay {
	if r := f.replayed; r != nil && !r.Void && r.Destination == f.destination {
		return r
	}
	return nil
}

// heldSeq is the sequence number at which the destination held everything when the last replay was begun, or 0.
func (f *facts) heldSeq() uint64 {
	if r := f.leftOff(); r != nil {
		return r.Held
	}
	return 0
}

// whatIsVoid takes note that the destination has forgotten what it held when the last replay was begun: that is then not left out.
func whatIsVoid(f *facts) (step, bool) {
	if r := f.leftOff(); r != nil && f.remembers && f.tail.Holds < r.Held {
		return step{action: actVoid, replay: r.ID}, true
	}
	return step{}, false
}

// isReplayMissed finds out whether the slot has passed the place of a replay that is running, as that of a standby has which was promoted: a server
// does not synchronize a slot backwards. What is confirmed moves with ticks, and the first one ends the replay.
func isReplayMissed(f *facts) (step, bool) {
	r := f.replayed
	if r == nil || r.State != sql.ReplayRunning || !f.remembers || f.ticked && f.tick.Epoch >= r.Epoch || f.slot.ConfirmedFlush <= r.From {
		return step{}, false
	}
	if f.trails() && f.trail.ConfirmedFlush <= r.From {
		return step{action: actReset, why: sql.BecauseOfReplay(r.ID)}, true
	}
	return step{action: actAbandon, replay: r.ID, why: fmt.Sprintf("the slot has passed %s and stands at %s, and no trailing slot reaches there", r.From,
		f.slot.ConfirmedFlush)}, true
}

// replay begins a replay, for which the slot is to be reset.
func (f *facts) replay() step {
	r := f.requested
	switch {
	case !f.trails():
		return step{action: actRefuse, why: "there is no trailing slot from which the position could be reset"}
	case f.trail.ConfirmedFlush > r.From:
		return step{action: actRefuse, why: fmt.Sprintf("the trailing slot has passed %s and begins at %s now", r.From, f.trail.ConfirmedFlush)}
	}
	number := max(f.record.Epochs.Last(), f.tail.Position.Epoch) + 1
	s := f.stream()
	if s.action == actHalt {
		return s
	}
	if f.remembers && f.tail.Exclusive {
		s.last.Sequence = f.tail.Holds
	}
	s.action, s.epoch = actReplay, event.Epoch{Number: number, From: r.From, Replay: true}
	return s
}
