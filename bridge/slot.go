package bridge

import (
	"context"
	"errors"
	"fmt"
	"time"

	"ebb/internal/sleep"
	"ebb/replication"
	"ebb/sql"
)

const (
	// waitersAfter is when and how often it is said what the creation of a slot waits for.
	waitersAfter = 2 * time.Second
	waitersEvery = 10 * time.Second
	// endTimeout is how long the walsender of a bridge that has lost the lead may take to end.
	endTimeout = 15 * time.Second
)

// EnsureSlot makes the slot, unless there is one that ebb has a record of. It returns whether it did. With the slot comes a
// record of its snapshot, so that the rows which the slot does not hold are known and will be delivered from the table.
//
// While it makes one it holds the leader's lock. Where a bridge has that, which will itself make what is missing, it waits.
func EnsureSlot(ctx context.Context, db *pgxConn, cfg Config) (bool, error) {
	conn, err := replication.Connect(ctx, cfg.Postgres, cfg.Slot)
	if err != nil {
		return false, err
	}
	defer func() {
		if err := conn.Close(); err != nil {
			cfg.Logger.Debug("close the replication connection", "error", err)
		}
	}()
	system, err := conn.Identify(ctx)
	if err != nil {
		return false, err
	}
	own, err := inspectOwn(ctx, db, &cfg)
	if err != nil {
		return false, err
	}
	for said := false; ; {
		why, term, err := whyMakeSlot(ctx, db, cfg.Slot, system)
		if why == "" || err != nil {
			return false, err
		}
		leads, err := sql.TryLead(ctx, db, cfg.Slot)
		if err != nil {
			return false, err
		}
		if leads {
			if copied, err := copyLost(ctx, db, conn, &cfg, why); copied || err != nil {
				return copied, errors.Join(err, sql.StepDown(ctx, db, cfg.Slot))
			}
			record, err := makeSlot(ctx, db, conn, &cfg, system, term, why, own.tables)
			if err == nil && record.OwnPending {
				cfg.Logger.Info("rows of own tables are there already; they are delivered first of all, by the next ebb run, which makes the slot anew for that",
					"slot", cfg.Slot)
			}
			if err == nil {
				err = conn.EndSnapshot(ctx)
			}
			if err == nil {
				err = sql.StepDown(ctx, db, cfg.Slot)
			}
			return err == nil, err
		}
		if !said {
			said = true
			cfg.Logger.Info("a bridge leads, and makes the slot; waiting for that", "slot", cfg.Slot)
		}
		if err := sleep.For(ctx, standbyPoll); err != nil {
			return false, fmt.Errorf("wait for the bridge that leads on slot %q to make it: %w", cfg.Slot, err)
		}
	}
}

// copyLost makes a slot that is lost as a copy of the trailing one, where there is that, so that what the slot had not delivered comes in its order,
// and whatever it is. It reports whether it did.
func copyLost(ctx context.Context, db *pgxConn, conn *replication.Conn, cfg *Config, why string) (bool, error) {
	record, err := sql.ReadSlot(ctx, db, cfg.Slot)
	if errors.Is(err, sql.ErrNoRecord) || err == nil && !(record.Made && record.Done) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	trail, err := replication.InspectSlot(ctx, db, replication.TrailOf(cfg.Slot))
	if errors.Is(err, replication.ErrNoSlot) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	publication, err := sql.CheckPublication(ctx, db, cfg.Publication, Tables(cfg.Buffers)...)
	if err != nil {
		return false, err
	}
	if !follows(trail, record, publication.Mark) {
		return false, nil
	}
	if err := sql.BeginReset(ctx, db, record, why); err != nil {
		return false, err
	}
	if err := conn.DropSlot(ctx, cfg.Slot); err != nil {
		return false, err
	}
	if err := replication.CopySlot(ctx, db, trail.Name, cfg.Slot); err != nil {
		return false, err
	}
	if err := conn.SetFailover(ctx, cfg.Slot); err != nil {
		return false, err
	}
	return true, sql.EndReset(ctx, db, record)
}

// follows reports whether a slot can be copied from its trailing one. One from before the slot was made has what was then delivered from the buffer, or
// has passed over it.
func follows(trail replication.Slot, record sql.SlotRecord, publication string) bool {
	return record.Made && record.Done && !trail.Lost() && trail.Plugin == replication.Plugin && trail.ConfirmedFlush >= record.ConsistentPoint &&
		sql.SamePublication(record.Publication, publication)
}

// whyMakeSlot says why a slot is to be made, or "", and the term of its record, or 0. A slot that cannot have been ebb's and is somebody's is an error.
func whyMakeSlot(ctx context.Context, db *pgxConn, name string, system replication.System) (why string, term int64, err error) {
	record, err := sql.ReadSlot(ctx, db, name)
	if err != nil && !errors.Is(err, sql.ErrNoRecord) {
		return "", 0, err
	}
	recorded := err == nil
	if recorded && record.Reset && record.SystemIdentifier == system.ID {
		return "", 0, nil // a bridge was about to copy it from the trailing slot, and goes on with that
	}
	slot, err := replication.InspectSlot(ctx, db, name)
	switch {
	case errors.Is(err, replication.ErrNoSlot) && recorded:
		return "the slot does not exist", record.Term, nil
	case errors.Is(err, replication.ErrNoSlot):
		return "setup", 0, nil
	case err != nil:
		return "", 0, err
	}
	if err := slot.Ours(system.Database); err != nil {
		return "", 0, err
	}
	// What follows from a change of the timeline is for the bridge to decide, which can ask the destination.
	if recorded && record.Made && !slot.Lost() && slot.Plugin == replication.Plugin && record.SystemIdentifier == system.ID {
		return "", 0, nil
	}
	if err := slot.Usable(system.Database); err != nil && !recorded {
		return "", 0, err
	}
	if slot.Active && slot.ActiveName != name {
		return "", 0, fmt.Errorf("%w: slot %q is not ebb's and is in use by pid %d (%s): stop that, or choose another name for the slot setting",
			replication.ErrForeignSlot, name, slot.ActivePID, slot.ActiveName)
	}
	return "there was another slot of that name", record.Term, nil
}

// makeSlot makes the slot, in place of one that there may be, and returns its record, which is of a new term. Whenever it is interrupted,
// the record says that it has to be done again. If rows of own tables are to be delivered from before it, conn is left in the slot's snapshot.
func makeSlot(ctx context.Context, db *pgxConn, conn *replication.Conn, cfg *Config, system replication.System, term int64,
	why string, own []sql.OwnTable) (sql.SlotRecord, error) {
	if err := conn.EndSnapshot(ctx); err != nil {
		return sql.SlotRecord{}, err
	}
	publication, err := sql.CheckPublication(ctx, db, cfg.Publication, Tables(cfg.Buffers)...)
	if err != nil {
		return sql.SlotRecord{}, err
	}
	record, err := sql.PrepareSlot(ctx, db, cfg.Slot, system.ID, system.Timeline, term, publication.Mark, why)
	if err != nil {
		return sql.SlotRecord{}, err
	}
	if err := cfg.at("prepared"); err != nil {
		return sql.SlotRecord{}, err
	}
	slot, err := replication.InspectSlot(ctx, db, cfg.Slot)
	switch {
	case err == nil:
		if slot.Active { // for a bridge that was killed while it made the slot, or for one that has lost the lead
			if err := endWalsender(ctx, db, cfg, slot); err != nil {
				return sql.SlotRecord{}, err
			}
		}
		if err := conn.DropSlot(ctx, cfg.Slot); err != nil {
			return sql.SlotRecord{}, err
		}
		cfg.Logger.Warn("dropped a slot that could not be used", "slot", cfg.Slot, "because", why)
	case !errors.Is(err, replication.ErrNoSlot):
		return sql.SlotRecord{}, err
	}
	if err := cfg.at("dropped"); err != nil {
		return sql.SlotRecord{}, err
	}

	waiting, stopWaiting := context.WithCancel(ctx)
	said := make(chan struct{})
	go func() {
		defer close(said)
		sayWaiters(waiting, db, cfg)
	}()
	made, err := conn.CreateSlotInSnapshot(ctx, cfg.Slot)
	stopWaiting()
	<-said
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return sql.SlotRecord{}, fmt.Errorf("%w; transactions that have written must end before a slot can be made", err)
	case err != nil:
		return sql.SlotRecord{}, err
	}
	if err := cfg.at("created"); err != nil {
		return sql.SlotRecord{}, err
	}
	record.OwnPending, err = undeliveredOwn(ctx, db, conn, cfg, own, record.MadeTimes > 0)
	if err == nil && !record.OwnPending {
		err = conn.EndSnapshot(ctx)
	}
	if err != nil {
		return sql.SlotRecord{}, errors.Join(err, conn.AbandonSlot(cfg.Slot))
	}
	if err := sql.RecordSlot(ctx, db, record, made.Snapshot, made.ConsistentPoint, own...); err != nil {
		if errors.Is(err, sql.ErrSuperseded) {
			err = errors.Join(err, conn.AbandonSlot(cfg.Slot)) // nobody has a record of it
		}
		return sql.SlotRecord{}, err
	}
	return record, cfg.at("recorded")
}

// endWalsender ends the walsender that has the slot for a bridge which does not lead any more.
func endWalsender(ctx context.Context, db *pgxConn, cfg *Config, slot replication.Slot) error {
	cfg.Logger.Info("ending the stream of the bridge that led before", "slot", cfg.Slot, "pid", slot.ActivePID)
	ctx, cancel := context.WithTimeout(ctx, endTimeout)
	defer cancel()
	return replication.EndWalsender(ctx, db, cfg.Slot, slot.ActivePID)
}

// sayWaiters logs which transactions the creation of a slot waits for, as long as ctx lasts. Those that wait themselves, in their COMMIT,
// for what is delivered from the slot, are ended.
func sayWaiters(ctx context.Context, db *pgxConn, cfg *Config) {
	log := cfg.Logger
	say, wake := time.NewTimer(waitersAfter), time.NewTicker(endWaitsEvery)
	defer say.Stop()
	defer wake.Stop()
	waits := newWaits(cfg)
	for {
		// A cancelled query would end the session, which others use.
		asking, cancel := context.WithTimeout(context.WithoutCancel(ctx), waitersEvery)
		if err := waits.end(asking, db); err != nil {
			log.Warn("the slot may wait for a COMMIT that waits for delivery", "error", err)
		}
		cancel()
		select {
		case <-wake.C:
			continue
		case <-ctx.Done():
			return
		case <-say.C:
		}
		asking, cancel = context.WithTimeout(context.WithoutCancel(ctx), waitersEvery)
		lines, err := replication.Waiters(asking, db)
		cancel()
		if err != nil {
			log.Warn("the slot waits for transactions to end", "error", err)
		}
		for _, line := range lines {
			log.Warn("the slot waits for a transaction to end", "transaction", line)
		}
		say.Reset(waitersEvery)
	}
}
