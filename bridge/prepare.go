package bridge

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"

	"ebb/event"
	"ebb/replication"
	"ebb/sink"
	"ebb/sql"
)

// maxSteps bounds the steps before a stream: every one of them is taken once at most, but for a recovery that a destination interrupts by
// forgetting again.
const maxSteps = 16

// prepare looks and takes a step, again and again, until there is nothing left to do but to stream. It may be interrupted anywhere.
func (l *leader) prepare(ctx context.Context) (step, error) {
	for range maxSteps {
		f, err := l.look(ctx)
		if err != nil {
			return step{}, err
		}
		s := decide(f)
		if s.action == actStream {
			l.sayForeign(f)
			l.slot, l.before = f.slot, f.newest.Events
			l.recorded = f.tick.StreamSeq
			if l.replay = f.replayed; l.replay != nil && l.replay.State != sql.ReplayRunning {
				l.replay = nil
			}
			if err := l.at("stream"); err != nil {
				return step{}, err
			}
			if err := l.hearWitness(ctx, f); err != nil {
				return step{}, err
			}
			if f.remembers && !f.tail.Exclusive {
				s.skip.Held, err = l.heldBehind(ctx, f.tick.StreamSeq)
			}
			if err == nil && (s.skip.Counted || s.skip.More > 0) {
				s.skip.Aside, err = l.asideBehind(ctx, f.tick.Position.Commit)
			}
			return s, err
		}
		if err := l.act(ctx, f, s); err != nil {
			return step{}, err
		}
	}
	return step{}, errors.New("the preparations for streaming come to no end")
}

// act takes one step.
func (l *leader) act(ctx context.Context, f *facts, s step) error {
	switch s.action {
	case actHalt:
		return &haltError{s.err}
	case actRaise:
		l.Logger.Warn("beginning a new epoch", "slot", l.Slot, "epoch", s.raise.Epoch.Number, "from", s.raise.Epoch.From, "because", s.why,
			"remake_slot", s.raise.Remake)
		l.carried.doubt = noDoubt // of what was before
		return sql.RaiseEpoch(ctx, l.db, l.record, s.raise)
	case actRewind:
		l.Logger.Warn("the stream has forgotten what it acknowledged; delivering it again", "because", s.why, "from_slot", s.slotHolds,
			"from_trailing_slot", s.reset)
		return sql.Rewind(ctx, l.db, l.record, s.tick, s.slotHolds, s.reset, s.because)
	case actRetry:
		l.Logger.Warn("the stream has forgotten events that were retried; they are retried again", "because", s.why)
		if err := sql.RetryForgotten(ctx, l.db, l.record, l.Destination, f.tail.Holds); err != nil {
			return err
		}
		return l.dead.holdKeys(ctx, l.db) // before anything of theirs comes by
	case actReset:
		l.Logger.Warn("the slot is to be made anew from the trailing one", "slot", l.Slot, "because", s.why)
		return sql.BeginReset(ctx, l.db, l.record, s.why)
	case actCopy:
		return l.copyTrail(ctx, f, s.why)
	case actAbandon:
		l.Logger.Warn("the slot stays as it is, which was to be reset", "slot", l.Slot, "because", s.why)
		return sql.AbandonReset(ctx, l.db, l.record, s.replay, s.why)
	case actVoid:
		return sql.VoidReplay(ctx, l.db, l.record, s.replay)
	case actReplay:
		return l.beginReplay(ctx, f, s)
	case actRefuse:
		l.Logger.Error("a replay cannot be done", "replay", f.requested.ID, "from", f.requested.From, "because", s.why)
		return sql.FailReplay(ctx, l.db, f.requested.ID, s.why)
	case actDistrust:
		l.Logger.Warn("the slot is to be made anew", "slot", l.Slot, "because", s.why)
		return sql.RemakeSlot(ctx, l.db, l.record, s.why, true)
	case actMake:
		l.Logger.Warn("making the slot anew, and delivering from the buffer what it held", "slot", l.Slot, "because", s.why,
			"times_made", l.record.MadeTimes)
		l.carried.doubt = noDoubt
		if r := f.replayed; r != nil && r.State == sql.ReplayRunning {
			if err := sql.FailReplay(ctx, l.db, r.ID, "the slot was made anew: "+s.why); err != nil {
				return err
			}
		}
		var err error
		l.record, err = makeSlot(ctx, l.db, l.conn, &l.Config, l.system, l.record.Term, s.why, l.own.tables)
		l.dead.setRecord(l.record)
		return err
	case actRecover:
		return l.recover(ctx, f)
	}
	return fmt.Errorf("no such action: %d", s.action)
}

// haltError is what waiting cannot mend.
type haltError struct{ err error }

func (e *haltError) Error() string { return e.err.Error() }
func (e *haltError) Unwrap() error { return e.err }

// look collects the facts.
func (l *leader) look(ctx context.Context) (*facts, error) {
	f := &facts{destination: l.Destination, adopt: l.Adopt, acceptGap: l.AcceptGap, doubt: l.carried.doubt, system: l.system,
		rowless: len(l.own.tables) > 0, snapshot: l.conn.HasSnapshot()}
	var err error
	if f.record, err = sql.ReadSlot(ctx, l.db, l.Slot); err != nil {
		return nil, err
	}
	if f.record.Term != l.record.Term {
		return nil, fmt.Errorf("slot %q: %w", l.Slot, sql.ErrSuperseded)
	}
	l.record = f.record
	f.source = sink.Source{SystemIdentifier: l.system.ID, Database: l.system.Database, Slot: l.Slot, Buffer: f.record.Buffer}
	publication, err := sql.CheckPublication(ctx, l.db, l.Publication, Tables(l.Buffers)...)
	if err != nil {
		return nil, err
	}
	f.publication = publication.Mark
	if err := l.lookAtSlot(ctx, f); err != nil {
		return nil, err
	}
	if f.flushed, err = replication.FlushedTo(ctx, l.db); err != nil {
		return nil, err
	}
	if err := l.lookAtReplays(ctx, f); err != nil {
		return nil, err
	}
	if f.system.Timeline != f.record.Timeline {
		if f.switches, err = l.conn.History(ctx, f.system.Timeline); err != nil {
			return nil, err
		}
	}
	f.reach = true
	if f.system.ID == f.record.SystemIdentifier { // the ticks of another cluster mean nothing in this one
		if err := l.lookAtTicks(ctx, f); err != nil {
			return nil, err
		}
	}
	return f, l.lookAtDestination(ctx, f)
}

// lookAtSlot finds out what there is of the slot. A bridge that was the leader may still stream from it: that is ended.
func (l *leader) lookAtSlot(ctx context.Context, f *facts) error {
	for {
		slot, err := replication.InspectSlot(ctx, l.db, l.Slot)
		if errors.Is(err, replication.ErrNoSlot) {
			f.exists = false
			return nil
		}
		if err != nil {
			return err
		}
		if err := slot.Ours(l.system.Database); err != nil {
			return err
		}
		f.slot, f.exists = slot, true
		if !slot.Active {
			return nil
		}
		// A walsender that ends at this moment is active still and has no name any more.
		if slot.ActiveName != "" && slot.ActiveName != l.Slot {
			return fmt.Errorf("%w: slot %q is in use by pid %d (%s), which is no bridge: stop that", replication.ErrForeignSlot, l.Slot,
				slot.ActivePID, slot.ActiveName)
		}
		if err := endWalsender(ctx, l.db, &l.Config, slot); err != nil {
			return err
		}
	}
}

// lookAtReplays finds out what is to be delivered again, and from what.
func (l *leader) lookAtReplays(ctx context.Context, f *facts) error {
	trail, err := replication.InspectSlot(ctx, l.db, replication.TrailOf(l.Slot))
	if err != nil && !errors.Is(err, replication.ErrNoSlot) {
		return err
	}
	f.trail, f.follows = trail, err == nil && trail.Ours(l.system.Database) == nil
	last, ok, err := sql.LastReplay(ctx, l.db, l.Slot)
	if err != nil {
		return err
	}
	if ok && last.State == sql.ReplayRequested {
		f.requested = &last
	}
	replayed, ok, err := sql.LastBegun(ctx, l.db, l.Slot)
	if ok {
		f.replayed = &replayed
	}
	return err
}

// lookAtTicks finds the newest tick, if it is of this destination.
func (l *leader) lookAtTicks(ctx context.Context, f *facts) error {
	tick, ok, err := sql.LastTick(ctx, l.db, f.record)
	if err != nil {
		return err
	}
	if f.newest = tick; ok && tick.Destination == l.Destination {
		f.tick, f.ticked = tick, true
	}
	if f.delivered, err = sql.HasDelivered(ctx, l.db, f.record, l.Destination); err != nil {
		return err
	}
	return l.lookAtReach(ctx, f, tick.ID)
}

// lookAtReach finds out whether the managed table, if it is carried, has all rows that came behind a tick.
func (l *leader) lookAtReach(ctx context.Context, f *facts, tick int64) error {
	if !l.carriesManaged() {
		return nil
	}
	var err error
	f.reach, err = sql.Reach(ctx, l.db, f.record, tick)
	return err
}

// lookAtDestination asks the destination what it holds, and what else has to be known if that does not fit.
func (l *leader) lookAtDestination(ctx context.Context, f *facts) error {
	var scanner sink.Scanner
	scanner, f.remembers = l.Sink.(sink.Scanner)
	known := sink.Known{Source: f.source, Position: f.tick.Position, Sequence: max(f.tick.StreamSeq, f.heldSeq(), l.recoveredSeq(f)), Audit: f.ticked && f.record.Done}
	var err error
	if f.tail, err = l.Sink.Resume(ctx, known); err != nil {
		return &sinkError{err}
	}
	if !f.remembers {
		return nil
	}
	if err := l.lookAtRetried(ctx, f); err != nil {
		return err
	}
	if f.forgot() {
		if f.held, f.holds, err = sql.TickAt(ctx, l.db, f.record, l.Destination, f.tail.Holds, f.endPosition()); err != nil {
			return err
		}
		if !f.holds {
			// What was delivered to another destination before this one is none of its business.
			if f.held, f.holds, err = sql.TickBefore(ctx, l.db, f.record, l.Destination); err != nil {
				return err
			}
		}
		return l.lookAtReach(ctx, f, f.held.ID)
	}
	if f.system.ID != f.record.SystemIdentifier {
		return nil
	}
	at, switched := f.switchPoint()
	if !switched {
		if f.tail.Position.Commit < f.flushed && !f.ruledOut() && !f.beginsRecovery() {
			return nil
		}
		at = f.flushed
	}
	f.lost, err = l.lostEvents(ctx, scanner, f, at)
	return err
}

// lookAtRetried finds out what the destination was given from the dead letters, where that makes a difference.
func (l *leader) lookAtRetried(ctx context.Context, f *facts) error {
	var err error
	if f.forgotten, err = sql.RetriedBehind(ctx, l.db, l.Slot, l.Destination, f.tail.Holds); err != nil {
		return err
	}
	if !f.ticked || f.tail.Missing == 0 && f.tail.Removed == 0 {
		return nil
	}
	if f.retried, err = sql.Retriable(ctx, l.db, l.Slot, l.Destination, f.tick.StreamSeq, f.tick.DeliveredAt); err != nil {
		return err
	}
	f.retriedLast, err = sql.Retriable(ctx, l.db, l.Slot, l.Destination, max(f.tail.Sequence, f.tick.StreamSeq), f.tick.DeliveredAt)
	return err
}

// asideBehind returns a function that tells the events of transactions behind an LSN which were set aside, or nil if there are none.
func (l *leader) asideBehind(ctx context.Context, from event.LSN) (func(id []byte, at event.Position) bool, error) {
	// Rows that were recovered share a place.
	places := map[event.Position][]sql.PassedLetter{}
	if err := sql.PassedLetters(ctx, l.db, l.Slot, from, false, func(e sql.PassedLetter) {
		place := e.Position
		place.Epoch = 0
		places[place] = append(places[place], e)
	}); err != nil || len(places) == 0 {
		return nil, err
	}
	return func(id []byte, at event.Position) bool {
		place := at
		place.Epoch = 0
		for _, e := range places[place] {
			if e.ID == string(id) && (e.Discarded || e.Position.Epoch == at.Epoch) {
				return true
			}
		}
		return false
	}, nil
}

// hearWitness has a witness see what comes by if the slot begins behind what is recorded, as it does after a quiet time, and as another one
// does that somebody has made in its place. What the destination holds already has come by.
func (l *leader) hearWitness(ctx context.Context, f *facts) error {
	scanner, ok := l.Sink.(sink.Scanner)
	if !ok || !l.carriesManaged() || f.slot.ConfirmedFlush <= f.newest.LSN {
		return nil
	}
	l.witness = newWitness(f.newest.Snapshot)
	floor, err := sql.UnrecordedFloor(ctx, l.db, l.Slot, l.Destination)
	if err != nil {
		return err
	}
	return scanner.Scan(ctx, floor, func(m sink.Stored) error {
		l.witness.see(m.ID)
		return nil
	})
}

// heldBehind returns a function that tells the events which the destination holds behind a sequence number.
func (l *leader) heldBehind(ctx context.Context, seq uint64) (func(id []byte) bool, error) {
	scanner, ok := l.Sink.(sink.Scanner)
	if !ok {
		return nil, nil
	}
	numbers, others := idSet{}, map[digest]bool{}
	if err := scanner.Scan(ctx, seq, func(m sink.Stored) error {
		if m.Origin == event.Streamed && l.record.Epochs.RuleOut(m.Position) {
			return nil // of a lost row, whose id another one may have
		}
		if m.Origin == event.Streamed && l.record.Epochs.Repeats(m.Position) {
			return nil // and is to be there once more
		}
		if m.Origin == event.Retried {
			return nil // the dead letters know it, and whether it is to be there once more
		}
		if id, ok := l.managedID(m.ID); ok {
			numbers.add(id)
		} else {
			others[digestOf(m.ID)] = true
		}
		return nil
	}); err != nil {
		return nil, err
	}
	return func(id []byte) bool {
		if n, ok := l.managedID(id); ok {
			return numbers.has(n)
		}
		return others[digestOf(id)]
	}, nil
}

func (l *leader) recoveredSeq(f *facts) uint64 {
	if f.record.Done || f.record.Destination != l.Destination {
		return 0
	}
	return f.record.RecoveredSeq
}

// lostEvents returns the events behind the newest tick that the destination holds and this database does not have: of transactions that
// committed at or behind an LSN or are of another history, and those without a row. Rows that no tick has recorded are never removed by
// ebb; once somebody else has removed some, that a row is missing says nothing. Nor does it of a retried event, whose row was recorded long ago.
func (l *leader) lostEvents(ctx context.Context, scanner sink.Scanner, f *facts, at event.LSN) ([]lostEvent, error) {
	var lost []lostEvent
	others := map[int64]lostEvent{}
	var ids []int64
	epochs := f.record.Epochs
	err := scanner.Scan(ctx, f.tick.StreamSeq, func(m sink.Stored) error {
		e := lostEvent{id: string(m.ID), position: m.Position, seq: m.Sequence}
		if m.Origin == event.Streamed && (m.Position.Epoch == epochs.Last() && m.Position.Commit >= at || epochs.RuleOut(m.Position)) {
			lost = append(lost, e)
			return nil
		}
		if id, ok := l.managedID(m.ID); ok && f.reach && m.Origin != event.Retried {
			others[id] = e
			ids = append(ids, id)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	missing, err := sql.MissingRows(ctx, l.db, ids)
	if err != nil {
		return nil, err
	}
	for _, id := range missing {
		lost = append(lost, others[id])
	}
	slices.SortFunc(lost, func(a, b lostEvent) int { return cmp.Compare(a.seq, b.seq) })
	return lost, nil
}

// sayForeign warns of messages of others in a stream that is to be the bridge's own.
func (l *leader) sayForeign(f *facts) {
	if !f.remembers || !f.tail.Exclusive {
		return
	}
	behind := f.tail.Last - max(f.tail.Sequence, min(f.tick.StreamSeq, f.tail.Last)) - f.tail.Removed
	if n := f.tail.Foreign + behind; n > 0 && f.ticked {
		l.Logger.Warn("others publish to the stream; restrict who may, or set nats.exclusive: false", "messages", n)
	}
}
