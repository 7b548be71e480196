package bridge

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

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
	record, err := sql.ReadSlot(ctx, db, cfg.Slot)
	if err != nil && !errors.Is(err, sql.ErrNoRecord) {
		return false, err
	}
	recorded := err == nil
	slot, err := replication.InspectSlot(ctx, db, cfg.Slot)
	if err != nil && !errors.Is(err, replication.ErrNoSlot) {
		return false, err
	}
	why := "setup"
	if err == nil {
		if err := slot.Ours(system.Database); err != nil {
			return false, err
		}
		// What follows from a change of the timeline is for the bridge to decide, which can ask the destination.
		if recorded && record.Made && !slot.Lost() && slot.Plugin == replication.Plugin && record.SystemIdentifier == system.ID {
			return false, nil
		}
		if err := slot.Usable(system.Database); err != nil && !recorded {
			return false, err
		}
		if slot.Active {
			return false, fmt.Errorf("%w: slot %q is not ebb's and is in use by pid %d (%s): stop that, or choose another name for "+
				"the slot setting", replication.ErrForeignSlot, cfg.Slot, slot.ActivePID, slot.ActiveName)
		}
		why = "there was another slot of that name"
	} else if recorded {
		why = "the slot does not exist"
	}
	_, err = makeSlot(ctx, db, conn, &cfg, system, why)
	return err == nil, err
}

// makeSlot makes the slot, in place of one that there may be, and returns its record, which is of a new term. Whenever it is interrupted,
// the record says that it has to be done again.
func makeSlot(ctx context.Context, db *pgxConn, conn *replication.Conn, cfg *Config, system replication.System, why string) (sql.SlotRecord, error) {
	publication, err := sql.ReadPublication(ctx, db, cfg.Publication)
	if err == nil {
		err = publication.Check()
	}
	if err != nil {
		return sql.SlotRecord{}, err
	}
	record, err := sql.PrepareSlot(ctx, db, cfg.Slot, system.ID, system.Timeline, publication.Mark, why)
	if err != nil {
		return sql.SlotRecord{}, err
	}
	if err := cfg.at("prepared"); err != nil {
		return sql.SlotRecord{}, err
	}
	_, err = replication.InspectSlot(ctx, db, cfg.Slot)
	switch {
	case err == nil:
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
		sayWaiters(waiting, db, cfg.Logger)
	}()
	made, err := conn.CreateSlot(ctx, cfg.Slot)
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
	if err := sql.RecordSlot(ctx, db, record, made.Snapshot, made.ConsistentPoint); err != nil {
		return sql.SlotRecord{}, err
	}
	return record, cfg.at("recorded")
}

// sayWaiters logs which transactions the creation of a slot waits for, as long as ctx lasts.
func sayWaiters(ctx context.Context, db *pgxConn, log *slog.Logger) {
	timer := time.NewTimer(waitersAfter)
	defer timer.Stop()
	for {
		select {
		case <-timer.C:
		case <-ctx.Done():
			return
		}
		// A cancelled query would end the session, which others use.
		lines, err := replication.Waiters(context.WithoutCancel(ctx), db)
		if err != nil {
			log.Warn("the slot waits for transactions to end", "error", err)
		}
		for _, line := range lines {
			log.Warn("the slot waits for a transaction to end", "transaction", line)
		}
		timer.Reset(waitersEvery)
	}
}
