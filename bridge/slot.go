package bridge

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5/pgtype"

	"ebb/decode"
	"ebb/event"
	"ebb/replication"
	"ebb/sink"
	"ebb/sql"
)

const (
	// recoverBytes is about how much content a page of recovered rows holds.
	recoverBytes = 1 << 20
	// waitersAfter is when and how often it is said what the creation of a slot waits for.
	waitersAfter = 2 * time.Second
	waitersEvery = 10 * time.Second
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
	slot, err := replication.InspectSlot(ctx, db, cfg.Slot)
	if err != nil && !errors.Is(err, replication.ErrNoSlot) {
		return false, err
	}
	exists := err == nil
	if exists {
		if err := slot.Usable(system.Database); err != nil {
			return false, err
		}
		record, err := sql.ReadSlot(ctx, db, cfg.Slot)
		if err != nil && !errors.Is(err, sql.ErrNoRecord) {
			return false, err
		}
		if err == nil && record.Made && !slot.Lost() && record.SystemIdentifier == system.ID && record.Timeline == system.Timeline {
			return false, nil
		}
		if slot.Active {
			return false, fmt.Errorf("%w: slot %q is not ebb's and is in use by pid %d (%s): stop that, or choose another name for "+
				"the slot setting", replication.ErrForeignSlot, cfg.Slot, slot.ActivePID, slot.ActiveName)
		}
	}
	if err := sql.PrepareSlot(ctx, db, cfg.Slot, system.ID, system.Timeline); err != nil {
		return false, err
	}
	if exists {
		if err := conn.DropSlot(ctx, cfg.Slot); err != nil {
			return false, err
		}
		cfg.Logger.Warn("dropped a slot that could not be used", "slot", cfg.Slot, "wal_status", slot.WALStatus)
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
		return false, fmt.Errorf("%w; transactions that have written must end before a slot can be made", err)
	case err != nil:
		return false, err
	}
	if err := sql.RecordSlot(ctx, db, cfg.Slot, made.Snapshot, made.ConsistentPoint); err != nil {
		return false, err
	}
	return true, nil
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

// ensureSlot checks that what setup made is there, and makes a slot that was lost anew.
func (l *leader) ensureSlot(ctx context.Context) error {
	if err := sql.CheckPublication(ctx, l.db, l.Publication); err != nil {
		return err
	}
	record, err := sql.ReadSlot(ctx, l.db, l.Slot)
	if errors.Is(err, sql.ErrNoRecord) {
		return fmt.Errorf("%w: %w; run ebb setup", ErrSetup, err)
	}
	if err != nil {
		return err
	}
	slot, err := replication.InspectSlot(ctx, l.db, l.Slot)
	if err != nil && !errors.Is(err, replication.ErrNoSlot) {
		return err
	}
	lost := err != nil || slot.Lost() || !record.Made
	if err == nil {
		if err := slot.Usable(l.db.Config().Database); err != nil {
			return err
		}
		// A walsender that ends at this moment is active still and has no name any more.
		if slot.Active && slot.ActiveName != "" && slot.ActiveName != l.Slot {
			return fmt.Errorf("%w: slot %q is in use by pid %d (%s), which is no bridge: stop that", replication.ErrForeignSlot, l.Slot,
				slot.ActivePID, slot.ActiveName)
		}
	}
	system, err := l.identify(ctx)
	if err != nil {
		return err
	}
	if system.ID != record.SystemIdentifier || system.Timeline != record.Timeline {
		return fmt.Errorf("%w: slot %q was made on cluster %s, timeline %d, and this is %s, timeline %d: a restored, copied or promoted "+
			"database. If this is the one to go on with, run ebb setup, which makes the slot anew and delivers what the buffer holds",
			ErrSetup, l.Slot, record.SystemIdentifier, record.Timeline, system.ID, system.Timeline)
	}
	if lost {
		l.Logger.Warn("the slot is lost; making it anew and delivering from the buffer what it held", "slot", l.Slot,
			"wal_status", slot.WALStatus)
		if _, err := EnsureSlot(ctx, l.db, l.Config); err != nil {
			return err
		}
		if record, err = sql.ReadSlot(ctx, l.db, l.Slot); err != nil {
			return err
		}
	}
	l.record = record
	return nil
}

func (l *leader) identify(ctx context.Context) (replication.System, error) {
	conn, err := replication.Connect(ctx, l.Postgres, l.Slot)
	if err != nil {
		return replication.System{}, err
	}
	system, err := conn.Identify(ctx)
	return system, errors.Join(err, conn.Close())
}

// recover delivers the rows that were in the buffer before the slot was, unless that is done. It may be interrupted anywhere:
// what the sink holds by then is not delivered again, if the sink can tell.
func (l *leader) recover(ctx context.Context) error {
	if l.record.Done {
		return nil
	}
	known, _, err := l.known(ctx)
	if err != nil {
		return err
	}
	if _, err := l.Sink.Resume(ctx, known); err != nil {
		return &sinkError{err}
	}
	// Of the ids that the sink holds, only those matter that are still to come: they are few, however much is recovered.
	held := map[int64]struct{}{}
	if scanner, ok := l.Sink.(sink.IDScanner); ok {
		floor, err := sql.RecoveryFloor(ctx, l.db, l.Slot, l.Destination)
		if err != nil {
			return err
		}
		if err := scanner.ScanIDs(ctx, floor, func(id []byte) {
			if n, err := strconv.ParseInt(string(id), 10, 64); err == nil && n > l.record.RecoveredID {
				held[n] = struct{}{}
			}
		}); err != nil {
			return err
		}
	}
	for {
		rows, err := sql.RowsToRecover(ctx, l.db, l.Slot, l.record.RecoveredID, recoverBytes)
		if err != nil {
			return err
		}
		if len(rows) == 0 {
			break
		}
		n, err := l.recoverPage(ctx, known, rows, held)
		if err != nil {
			return err
		}
		l.record.RecoveredID = rows[len(rows)-1].ID
		l.record.Recovered += int64(n)
		if err := sql.Recovered(ctx, l.db, l.Slot, l.record.RecoveredID, n); err != nil {
			return err
		}
	}
	if err := sql.RecoveryDone(ctx, l.db, l.Slot); err != nil {
		return err
	}
	if l.record.Recovered > 0 {
		l.Logger.Info("delivered the rows from before the slot", "slot", l.Slot, "events", l.record.Recovered)
	}
	return nil
}

// recoverPage delivers those of the rows that the sink does not hold, and returns how many they were.
func (l *leader) recoverPage(ctx context.Context, known sink.Known, rows []sql.Row, held map[int64]struct{}) (int, error) {
	tail, err := l.Sink.Resume(ctx, known)
	if err != nil {
		return 0, &sinkError{err}
	}
	position := tail.Position
	if position.IsZero() {
		position.Epoch = l.record.Epoch
	}
	managed := decode.Managed()
	batch := event.NewBatch()
	for _, row := range rows {
		if _, ok := held[row.ID]; ok {
			continue
		}
		if err := managed.AppendRow(batch, decode.Row{
			ID: strconv.AppendInt(nil, row.ID, 10), Topic: row.Topic, Key: row.Key, Payload: row.Payload, Headers: row.Headers,
			PayloadType: pgtype.JSONOID, Time: row.CreatedAt, Position: position,
		}); err != nil {
			return 0, err
		}
	}
	n := len(batch.Events)
	if n == 0 {
		batch.Release()
		return 0, nil
	}
	in := make(chan *event.Batch, 1)
	in <- batch
	close(in)
	if err := l.Sink.Run(ctx, in, func(sink.Progress) {}); err != nil {
		return 0, &sinkError{err}
	}
	return n, nil
}
