package bridge

import (
	"errors"
	"fmt"
	"math"
	"strings"

	"ebb/decode"
	"ebb/event"
	"ebb/replication"
	"ebb/sink"
	"ebb/sql"
)

var (
	// ErrGap says that the destination has forgotten what it acknowledged, and that it cannot be filled in again.
	ErrGap = errors.New("gap in the stream")
	// ErrOtherSource says that the destination belongs to another source.
	ErrOtherSource = errors.New("the stream belongs to another source")
	// ErrMoved says that the slot was made on another cluster.
	ErrMoved = errors.New("this is another database than the one that was set up")
	// ErrLost says that the destination holds events that this database does not have: either it has lost them, or it is a copy.
	ErrLost = errors.New("the stream holds events that this database does not have")
	// ErrForeign says that the destination holds something else than what was delivered to it.
	ErrForeign = errors.New("the stream holds something else than what was delivered to it")
)

// facts are all that counts for how a bridge that has taken the lead goes on.
type facts struct {
	destination string
	source      sink.Source
	// adopt and acceptGap are what the operator has said.
	adopt, acceptGap bool
	// doubt is what the last attempt to stream has found, if that says that the slot or the destination is not what it seems.
	doubt doubt

	system replication.System
	// switches end the timelines before the system's.
	switches []replication.Switch
	// flushed is how far the log is on the server's disk.
	flushed     event.LSN
	publication string // its mark

	record sql.SlotRecord
	slot   replication.Slot
	exists bool // the slot does
	// trail is the trailing slot; follows says that there is one.
	trail   replication.Slot
	follows bool
	// requested is a replay that waits to be begun, and replayed the one that began the current epoch.
	requested, replayed *sql.Replay

	// newest is the newest tick, and tick is as well if ticked, which says that it is for this destination; delivered says that there ever
	// was one for it.
	newest, tick      sql.Tick
	ticked, delivered bool

	// remembers says that the destination knows what it holds, of which tail is the end.
	remembers bool
	tail      sink.Tail
	// held is the newest tick that the destination still reaches, if holds. It is looked for when the destination has forgotten something.
	held  sql.Tick
	holds bool
	// reach says that the buffer has all rows that came behind the tick which counts: held if the destination has forgotten something, else
	// the newest one.
	reach bool
	// rowless says that events may be delivered that no row gives again: of own tables, whose rows are marked or deleted then, or never were.
	rowless bool
	// snapshot says that this bridge is in the snapshot with which it has made the slot.
	snapshot bool
	// lost are events that the destination holds and this database does not. They are looked for when the database's history has changed.
	lost []lostEvent
	// forgotten is how many events are recorded as delivered from the dead letters that the destination does not reach any more.
	forgotten int64
	// retried is how many events the destination may hold, or have held, behind the tick that came from the dead letters, and retriedLast how many of
	// those stood behind the end that is still there. They are looked for when messages are missing.
	retried, retriedLast uint64
}

type lostEvent struct {
	id       string
	position event.Position
	seq      uint64
}

// doubt is what an attempt to stream has found.
type doubt int

const (
	noDoubt doubt = iota
	// miscounted: the slot has another number of events than the destination holds.
	miscounted
	// mispositioned: other events come by than the destination holds.
	mispositioned
)

// after is the doubt that follows from how an attempt to stream has ended.
func (d doubt) after(err error) doubt {
	switch {
	case errors.Is(err, decode.ErrPositions):
		return mispositioned
	case errors.Is(err, decode.ErrCount):
		return miscounted
	}
	return d
}

// action is what a bridge does next.
type action int

const (
	actStream   action = iota // go on behind skip
	actRaise                  // begin a new epoch
	actRewind                 // take back ticks that are no longer true
	actRetry                  // have what was retried, and is forgotten, retried again
	actDistrust               // have the slot made anew, and take back ticks that may be false because of its publication
	actMake                   // make the slot anew
	actReset                  // have the slot dropped and copied from the trailing one
	actCopy                   // do that
	actAbandon                // leave the slot as it is, which was to be reset
	actVoid                   // take back what the destination held when a replay was begun
	actReplay                 // begin the epoch of a replay
	actRefuse                 // say that a replay cannot be
	actRecover                // deliver the rows from before the slot
	actHalt                   // give up, with err
)

// step is an action with what it needs. Each is stored as a whole, so that a bridge which is killed finds the facts as they were before
// the step or after it.
type step struct {
	action action
	why    string

	raise sql.Raise
	// tick is the last one that is kept; slotHolds says that the slot has all that came behind it.
	tick      int64
	slotHolds bool
	// reset says that the trailing slot has it, and because is why it is needed.
	reset   bool
	because string
	// replay is one that has failed, or that is to be void.
	replay int64
	// epoch is that of a replay.
	epoch event.Epoch
	skip  decode.Skip
	// last is the last delivered event.
	last sink.Progress
	err  error
}

func halt(err error) step { return step{action: actHalt, err: err} }

// decide says what a bridge that has taken the lead does next. It is asked again after every step until it says to stream.
func decide(f *facts) step {
	for _, rule := range []func(*facts) (step, bool){
		whoseStream, whichHistory, whatIsVoid, whatIsRetried, isResetNeedless, whatIsForgotten, whatIsForeign, whatIsReset, whichSlot, whatIsLost,
	} {
		if s, ok := rule(f); ok {
			return s
		}
	}
	if !f.record.Done {
		return step{action: actRecover}
	}
	if s, ok := isReplayMissed(f); ok {
		return s
	}
	if f.requested != nil {
		return f.replay()
	}
	return f.stream()
}

// whoseStream keeps a bridge from delivering into a stream that another source fills, such as production's from a copy of its database.
func whoseStream(f *facts) (step, bool) {
	if !f.remembers {
		return step{}, false
	}
	unknown := f.tail.Source == sink.Source{}
	var theirs string
	switch {
	case !unknown && f.tail.Source != f.source:
		theirs = f.tail.Source.String()
	case unknown && f.tail.Sequence > 0 && !f.delivered && f.record.Destination != f.destination:
		// Made by hand, and filled by a bridge that was not this one's.
		theirs = "unknown, " + f.destination
	default:
		return step{}, false
	}
	if f.record.Adopted == theirs {
		return step{}, false
	}
	if !f.adopt {
		return halt(fmt.Errorf("%w: it was made for %s, and this is %s. Name a stream of its own (nats.stream); or, if this database is to go "+
			"on with it in place of the other one, stop that and start once with ebb run --adopt", ErrOtherSource, theirs, f.source)), true
	}
	s := f.diverge("adopted a stream of another source", 0)
	s.raise.Adopted = theirs
	return s, true
}

// whichHistory finds out whether this is the database that it was: a restored or copied one, or a standby that was promoted, may lack
// transactions that were delivered, and its LSNs mean other places.
func whichHistory(f *facts) (step, bool) {
	epoch := f.record.Epochs.Last()
	switch {
	case f.system.ID != f.record.SystemIdentifier:
		what := fmt.Sprintf("slot %q was made on cluster %s and this is cluster %s: a restored or copied database", f.record.Name,
			f.record.SystemIdentifier, f.system.ID)
		if f.remembers && f.tail.Last == 0 {
			s := f.diverge(what, 0)
			s.raise.Diverged = false // from an empty stream
			return s, true
		}
		if !f.adopt {
			return halt(fmt.Errorf("%w: %s. If this is the one to go on with, stop the other one and start once with ebb run --adopt", ErrMoved, what)), true
		}
		return f.diverge(what, 0), true

	// Also after a promotion: that of another standby, whose bridge has gone on with the stream, may have come before it. Of the other
	// one's events it cannot be told from positions which are of rows that are here.
	case f.remembers && f.tail.Position.Epoch > epoch:
		if !f.adopt {
			return halt(fmt.Errorf("%w: its last event is of epoch %d and this database is in epoch %d, so that another one, restored, copied or "+
				"promoted, has gone on with it. If this database is the one to go on with, stop the other one and start once with ebb run --adopt",
				ErrLost, f.tail.Position.Epoch, epoch)), true
		}
		return f.diverge("adopted a stream of a later epoch", 0), true

	case f.system.Timeline != f.record.Timeline:
		at, ok := f.switchPoint()
		switch {
		case !ok && !f.adopt:
			return halt(fmt.Errorf("%w: slot %q was made on timeline %d, which is not in the history of this one, %d. If this database is the one "+
				"to go on with, stop the other one and start once with ebb run --adopt", ErrLost, f.record.Name, f.record.Timeline, f.system.Timeline)), true
		case !ok:
			return f.diverge(fmt.Sprintf("adopted timeline %d", f.system.Timeline), 0), true
		case len(f.lost) > 0 && !f.adopt:
			return halt(f.lostError(fmt.Sprintf("timeline %d was left at %s", f.record.Timeline, at))), true
		case len(f.lost) > 0:
			return f.diverge(fmt.Sprintf("adopted timeline %d", f.system.Timeline), at), true
		}
		s := f.raise(fmt.Sprintf("promotion to timeline %d", f.system.Timeline), at)
		// A slot that was on the standby holds what is needed if the primary's was copied there, or if it begins where a tick says that
		// everything was delivered.
		s.raise.Remake = !f.usable() || !f.slot.Synced && f.slot.ConfirmedFlush > f.newest.LSN
		return s, true

	case !f.remembers:
		return step{}, false

	case f.ruledOut():
		if !f.adopt {
			return halt(f.lostError(fmt.Sprintf("this database is in epoch %d since %s", epoch, f.record.Epochs[len(f.record.Epochs)-1].From))), true
		}
		return f.diverge("adopted a stream with events of an earlier epoch from behind its end", f.flushed), true

	case f.tail.Position.Epoch == epoch && f.tail.Position.Commit >= f.flushed && f.tail.Position.Commit > 0:
		if !f.adopt {
			return halt(f.lostError(fmt.Sprintf("its log ends at %s", f.flushed))), true
		}
		return f.diverge("adopted by a database whose log ends earlier", f.flushed), true

	case f.doubt == mispositioned && f.adopt:
		return f.diverge("adopted by a database of another history", 0), true
	}
	return step{}, false
}

// ruledOut reports whether the destination ends with an event that is not of this database's history, and that it did not have when the newest
// tick was stored: the primary from before a promotion has gone on, and its bridge as well.
func (f *facts) ruledOut() bool {
	return f.remembers && f.record.Done && f.ticked && f.tail.Position.Compare(f.tick.Position) > 0 && f.record.Epochs.RuleOut(f.tail.Position)
}

// switchPoint returns where the history of the server has left the timeline that the record is of.
func (f *facts) switchPoint() (event.LSN, bool) {
	for _, s := range f.switches {
		if s.Timeline == f.record.Timeline {
			return s.LSN, true
		}
	}
	return 0, false
}

// raise begins a new epoch at an LSN.
func (f *facts) raise(why string, from event.LSN) step {
	number := max(f.record.Epochs.Last(), f.tail.Position.Epoch) + 1
	return step{action: actRaise, why: why, raise: sql.Raise{
		Epoch:            event.Epoch{Number: number, From: from},
		SystemIdentifier: f.system.ID,
		Timeline:         f.system.Timeline,
		Reason:           why,
	}}
}

// diverge begins a new epoch in which nothing is taken for delivered because of its position: the slot is made anew, and the rows that no
// tick of this database has recorded are compared with the events in the destination. From is the LSN from which on the destination's
// events are none of this database's; 0 if that is not known.
func (f *facts) diverge(why string, from event.LSN) step {
	s := f.raise(why, from)
	s.raise.Remake, s.raise.Diverged = true, true
	return s
}

// maxListed is how many events an error lists.
const maxListed = 10

func (f *facts) lostError(why string) error {
	var list strings.Builder
	for i, e := range f.lost {
		if i == maxListed {
			fmt.Fprintf(&list, " and %d more", len(f.lost)-maxListed)
			break
		}
		fmt.Fprintf(&list, " %s at %s (sequence %d)", e.id, e.position, e.seq)
		if i+1 < min(len(f.lost), maxListed) {
			list.WriteByte(',')
		}
	}
	return fmt.Errorf("%w: %s, and %d events were delivered that come from behind that or have no row here:%s. Either this is a copy, which must "+
		"not publish there, or transactions were lost that had been delivered. To go on from this database, stop the other one and start once "+
		"with ebb run --adopt", ErrLost, why, len(f.lost), list.String())
}

// forgot reports whether the destination holds less than was recorded.
func (f *facts) forgot() bool {
	if !f.remembers {
		return false
	}
	if f.ticked && f.tail.Holds < f.tick.StreamSeq {
		return true
	}
	return !f.record.Done && f.record.Destination == f.destination && f.tail.Last < f.record.RecoveredSeq
}

// whatIsRetried has events delivered from the dead letters once more that the destination has forgotten. No tick tells of them, as they are not in the
// places that they have in the slot.
func whatIsRetried(f *facts) (step, bool) {
	if !f.remembers || f.forgotten == 0 {
		return step{}, false
	}
	return step{action: actRetry, why: fmt.Sprintf("it ends at sequence %d, and had acknowledged %d retried events behind that", f.tail.Holds,
		f.forgotten)}, true
}

// endPosition is the position at which the destination ends, for finding the ticks that it reaches.
func (f *facts) endPosition() event.Position {
	if f.tail.Sequence == 0 && f.tail.Holds > 0 {
		return event.Position{Epoch: math.MaxUint32} // nothing is left that would tell
	}
	return f.tail.Position
}

// whatIsForgotten has a destination filled in again that has lost what it acknowledged.
func whatIsForgotten(f *facts) (step, bool) {
	if !f.forgot() {
		return step{}, false
	}
	forgotten := max(f.tick.StreamSeq, f.record.RecoveredSeq) - f.tail.Holds
	what := fmt.Sprintf("it ends at sequence %d, position %s, and had acknowledged sequence %d, position %s, so that %d messages are forgotten",
		f.tail.Holds, f.tail.Position, f.tick.StreamSeq, f.tick.Position, forgotten)
	s := step{action: actRewind, why: what, tick: f.held.ID}
	s.slotHolds = f.record.Done && !f.record.Reset && f.usable() && f.holds && f.slot.ConfirmedFlush <= f.held.LSN
	// Of a stream that is new, what the trailing slot has is as much as there is.
	s.reset = !s.slotHolds && f.trails() && (f.trailReaches() || f.tail.Last == 0 && (!f.reach || f.rowless))
	s.because = becauseForgotten
	if s.reset && !f.trailReaches() {
		s.because = becauseRenewed
		s.why += fmt.Sprintf("; the trailing slot begins at %s, and what was delivered before that is not delivered again", f.trail.ConfirmedFlush)
	}
	if s.slotHolds || s.reset {
		return s, true
	}
	if err := f.gap(what); err != nil {
		return halt(err), true
	}
	return s, true
}

// Why a slot is reset for a stream: one that holds what a tick has recorded, or one that is new, which gets what the trailing slot has.
const (
	becauseForgotten = "the stream had forgotten what it acknowledged"
	becauseRenewed   = "the stream had forgotten all that it acknowledged"
)

// gap is the error, if any, of filling in a stream that has forgotten something from rows of the buffer alone.
func (f *facts) gap(what string) error {
	if f.rowless && !f.acceptGap {
		return fmt.Errorf("%w: %s, and there may have been events among them that nothing but the slot could give again, as the rows of own tables are "+
			"marked, deleted or not told apart once they are delivered. Restore the stream from a backup; or go on without them by starting once with "+
			"ebb run --accept-gap", ErrGap, what)
	}
	if !f.reach && !f.acceptGap {
		return fmt.Errorf("%w: %s, and rows that were among them have been removed from the buffer since. Restore the stream from a backup; or go "+
			"on with what the buffer still has, and without the rest, by starting once with ebb run --accept-gap", ErrGap, what)
	}
	return nil
}

// whatIsForeign finds out whether the destination was given something else than what was delivered.
func whatIsForeign(f *facts) (step, bool) {
	if !f.remembers || !f.ticked || f.tail.Sequence < f.tick.StreamSeq || f.tail.Sequence == 0 {
		return step{}, false
	}
	if f.tail.Position.Compare(f.tick.Position) >= 0 {
		return step{}, false
	}
	if f.tail.Origin == event.Retried {
		return step{}, false // behind events that the destination had removed, so that its sink did not know their positions
	}
	return halt(fmt.Errorf("%w: its message %d is event %q at %s, and position %s was delivered in message %d. Give ebb a stream of its own "+
		"(nats.stream), and restrict who may publish to it", ErrForeign, f.tail.Sequence, f.tail.ID, f.tail.Position, f.tick.Position,
		f.tick.StreamSeq)), true
}

// usable reports whether there is a slot that ebb has made, and that can be read.
func (f *facts) usable() bool {
	return f.exists && f.record.Made && !f.slot.Lost() && f.slot.Plugin == replication.Plugin
}

const publicationChanged = "its publication was changed, so that it may have passed over rows"

// whichSlot has a slot made that is missing, cannot be read any more, or has passed over rows.
func whichSlot(f *facts) (step, bool) {
	var why string
	switch {
	case !f.exists:
		why = "the slot does not exist"
	case f.slot.Plugin != replication.Plugin:
		why = "somebody has made another slot, with plugin " + f.slot.Plugin
	case f.slot.Invalidated == "idle_timeout":
		why = "the server has invalidated it as nobody used it (idle_replication_slot_timeout)"
	case f.slot.Invalidated != "" && f.slot.Invalidated != "wal_removed":
		why = "the server has invalidated it: " + f.slot.Invalidated
	case f.slot.Lost():
		why = "the server has removed the log that it needs (max_slot_wal_keep_size)"
	case !f.record.Made:
		if why = f.record.MadeBecause; why == "" {
			why = "it was not made to the end"
		}
	case f.record.OwnPending && !f.snapshot:
		why = "rows of own tables are to be delivered from before it, which takes the snapshot with which it is made"
	case f.record.Publication != "" && !sql.SamePublication(f.record.Publication, f.publication):
		return step{action: actDistrust, why: publicationChanged}, true
	case f.doubt == miscounted && f.acceptGap:
		why = "events are missing in the stream, and are delivered late"
	case f.doubt == miscounted && f.tail.Foreign == 0 && f.ticked && f.slot.ConfirmedFlush > f.tick.LSN,
		f.counted() && f.eventsSinceTick() > 0 && f.tail.Position.Commit < f.slot.ConfirmedFlush:
		why = "it begins behind events that no tick has recorded, so that somebody must have made another one or moved it"
	default:
		return step{}, false
	}
	late := f.doubt == miscounted && f.acceptGap // and so not in the places that they have in the slot
	if !late && f.trails() && (f.trail.ConfirmedFlush <= f.newest.LSN || f.trailIsHeld()) {
		return step{action: actReset, why: why}, true
	}
	if !f.reach && f.record.Done && !f.acceptGap {
		return halt(f.lostSlot(why)), true
	}
	return step{action: actMake, why: why}, true
}

func (f *facts) lostSlot(why string) error {
	return fmt.Errorf("%w: slot %q is lost (%s), and rows that are not recorded as delivered have been removed from the buffer. To go on "+
		"without them, start once with ebb run --accept-gap", ErrGap, f.record.Name, why)
}

// whatIsLost keeps a copy of the database, which has no slot, from delivering into the stream of the one that it was copied from.
func whatIsLost(f *facts) (step, bool) {
	if !f.beginsRecovery() || len(f.lost) == 0 {
		return step{}, false
	}
	if !f.adopt {
		return halt(f.lostError(fmt.Sprintf("its newest tick is of %s", f.tick.LSN))), true
	}
	return f.diverge("adopted by a database that lacks events", f.flushed), true
}

// beginsRecovery reports whether rows are to be recovered whose ids alone say which of them the destination holds.
func (f *facts) beginsRecovery() bool {
	return f.remembers && f.usable() && !f.record.Done && !f.record.Diverged && f.ticked
}

// counted reports whether sequence numbers tell how many events the slot must bring that the destination holds already. What is missing of them may have
// been retried events.
func (f *facts) counted() bool {
	if f.remembers && f.tail.Missing > 0 && f.retried > 0 {
		return false
	}
	return f.remembers && f.tail.Exclusive && f.record.Done && f.ticked && f.tail.Sequence >= f.tick.StreamSeq &&
		f.tick.Epoch == f.record.Epochs.Last()
}

// eventsSinceTick is how many events the destination holds behind the newest tick in the places that they have in the slot.
func (f *facts) eventsSinceTick() uint64 {
	return f.tail.Sequence - f.tick.StreamSeq - f.tail.Foreign - f.tail.Retried
}

// stream goes on with the slot, behind what the destination holds.
func (f *facts) stream() step {
	if f.doubt == miscounted {
		return halt(fmt.Errorf("%w: behind sequence %d, position %s, events are missing in it that the slot has, and there are %d messages of others. "+
			"Restrict who may publish to it, give ebb a stream of its own, or set nats.exclusive: false. To go on with this one, and have what is "+
			"missing delivered late and marked as recovered, start once with ebb run --accept-gap", ErrForeign, f.tick.StreamSeq, f.tick.Position,
			f.tail.Foreign))
	}
	s := step{action: actStream, skip: decode.Skip{Through: f.tail.Position, ID: f.tail.ID}}
	s.last = sink.Progress{Position: f.tail.Position, Sequence: f.tail.Sequence}
	if f.ticked && (f.remembers && f.tail.Sequence < f.tick.StreamSeq || f.tail.Position.Compare(f.tick.Position) < 0) {
		// The destination has removed the last event that was recorded, by its own limits.
		s.skip.Through, s.skip.ID = f.tick.Position, ""
		s.last = sink.Progress{Position: f.tick.Position, Sequence: f.tick.StreamSeq}
	}
	if f.remembers && !f.tail.Exclusive {
		// What stands behind the newest tick is known by its id alone: an event may be missing before another one.
		s.skip = decode.Skip{Through: f.tick.Position}
		s.last = sink.Progress{Position: f.tick.Position, Sequence: f.tick.StreamSeq}
	}
	if r := f.leftOff(); r != nil {
		if s.skip.Through.Compare(r.Through) < 0 {
			// What came behind the tick by then has been removed, or left out.
			s.skip = decode.Skip{Through: r.Through}
			if s.last.Sequence < r.Held {
				s.last = sink.Progress{Position: r.Through, Sequence: r.Held}
			}
		}
		end := event.Position{Epoch: r.Epoch, Commit: r.Through.Commit, Index: r.Through.Index}
		if r.IsCutShort() && r.From <= end.Commit && s.skip.Through.Compare(end) < 0 {
			// What was not delivered again by then is not to be. If it began behind the end, nothing was.
			s.skip = decode.Skip{Through: end}
			return s
		}
	}
	if !f.remembers || !f.tail.Exclusive {
		return s
	}
	// What was removed may be of before a replay and of it, or of a replay that does not come by any more, as the ticks of it were taken back. Then its
	// number does not tell which events it was.
	mixed := f.replayed != nil && f.tick.Epoch < f.replayed.Epoch && (f.leftOff() == nil || f.slot.ConfirmedFlush > f.replayed.From)
	if f.ticked && !mixed {
		// What may have been a retried event is not taken for one of the slot, which would be lost.
		retried := min(f.tail.Removed, f.retriedLast)
		s.skip.More = f.tail.Removed - retried
		s.last.Sequence += retried
	}
	commit := s.skip.Through.Commit
	s.skip.Comes = commit > 0 && commit >= f.slot.ConfirmedFlush && f.record.Epochs.At(commit) == s.skip.Through.Epoch
	if f.counted() {
		s.skip.Counted, s.skip.Since, s.skip.Count = true, f.tick.Position, f.eventsSinceTick()
	}
	return s
}
