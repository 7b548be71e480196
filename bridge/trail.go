package bridge

import (
	"context"
	"errors"
	"time"

	"ebb/event"
	"ebb/internal/quiet"
	"ebb/internal/sleep"
	"ebb/replication"
	"ebb/sql"
)

// Trail says how far the trailing slot stays behind, so that delivery can be reset to there.
type Trail struct {
	// Window is how far it stays behind in time; 0 means that there is none.
	Window time.Duration
	// MaxWAL is how far it stays behind at most, in bytes of the log.
	MaxWAL int64
}

const (
	// The server reads much of the log to advance a slot. So that is done once in advanceEvery, and, so that MaxWAL is kept to, whenever
	// there is advanceBytes more of the log. Both are smaller where a smaller window makes that necessary.
	advanceEvery = time.Minute
	advanceBytes = 256 << 20
	// trailPoll is how often it is looked whether that is due.
	trailPoll, minTrailPoll = 5 * time.Second, 50 * time.Millisecond
	// trailSteps is into how many steps a window is divided, at least.
	trailSteps = 8
)

// EnsureTrail makes the trailing slot, unless it is there, or drops it if there is to be none. It returns what it did, or "".
func EnsureTrail(ctx context.Context, db *pgxConn, cfg Config) (string, error) {
	name := replication.TrailOf(cfg.Slot)
	slot, err := replication.InspectSlot(ctx, db, name)
	exists := err == nil
	if err != nil && !errors.Is(err, replication.ErrNoSlot) {
		return "", err
	}
	record, err := sql.ReadSlot(ctx, db, cfg.Slot)
	if err != nil {
		return "", err
	}
	if record.Reset { // the trailing slot is needed as it is, and the slot may not be there
		return "", nil
	}
	if exists {
		if err := slot.Ours(db.Config().Database); err != nil {
			return "", err
		}
	}
	did := "created slot " + name
	switch {
	case cfg.Trail.Window == 0 && exists:
		return "dropped slot " + name, replication.DropSlot(ctx, db, name)
	case cfg.Trail.Window == 0:
		return "", nil
	case !exists:
	case slot.Lost() || slot.Plugin != replication.Plugin:
		did = "made slot " + name + " anew, which could not be read any more"
	case record.Made && slot.ConfirmedFlush < record.ConsistentPoint:
		did = "made slot " + name + " anew, as slot " + cfg.Slot + " was"
	case !slot.Failover: // whoever made it was killed before that
		return "", setFailover(ctx, &cfg, name)
	default:
		return "", nil
	}
	if exists {
		if err := replication.DropSlot(ctx, db, name); err != nil {
			return "", err
		}
	}
	if err := replication.CopySlot(ctx, db, cfg.Slot, name); err != nil {
		if _, there := replication.InspectSlot(ctx, db, name); there == nil {
			return "", nil // another one was faster: setup and a bridge both make it
		}
		return "", err
	}
	return did, setFailover(ctx, &cfg, name)
}

// setFailover gives a copy of a slot what the copying leaves out.
func setFailover(ctx context.Context, cfg *Config, name string) error {
	conn, err := replication.Connect(ctx, cfg.Postgres, cfg.Slot)
	if err != nil {
		return err
	}
	return errors.Join(conn.SetFailover(ctx, name), conn.Close())
}

// trail keeps the trailing slot as far behind as it is to be, while this bridge leads. Delivery does not depend on that it succeeds.
func (l *leader) trail(ctx context.Context) {
	attempts := quiet.New(l.Logger)
	t := &trailing{leader: l}
	defer t.close()
	for {
		err := t.round(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			t.close() // a session that works is better than one that may
			attempts.Failed("the trailing slot is not kept up, so that delivery may not be reset as far as it should", err,
				"slot", replication.TrailOf(l.Slot))
		case l.Trail.Window == 0:
			return
		default:
			attempts.Succeeded("the trailing slot is kept up again")
		}
		if sleep.For(ctx, max(min(trailPoll, l.Trail.Window/trailSteps), minTrailPoll)) != nil {
			return
		}
	}
}

// trailing is what is remembered between two rounds.
type trailing struct {
	*leader
	// db is a session of its own, as advancing a slot takes its time; nil when there is none.
	db *pgxConn
	// advanced is when the slot was advanced last, and at which end of the log.
	advanced time.Time
	at       event.LSN
	// passed are places that the slot itself had confirmed at past times. In a quiet buffer, where there are no ticks, it is by them that
	// the trailing slot follows what others write to the log.
	passed []sample
}

func (t *trailing) close() {
	if t.db != nil {
		closeQuietly(t.db)
		t.db = nil
	}
}

type sample struct {
	time time.Time
	sql.Passed
}

func (t *trailing) round(ctx context.Context) (err error) {
	if t.db == nil {
		if t.db, err = sql.Connect(ctx, t.Postgres, t.Slot); err != nil {
			t.db = nil
			return err
		}
	}
	db := t.db
	did, err := EnsureTrail(ctx, db, t.Config)
	if did != "" {
		t.Logger.Warn(did + "; delivery can be reset to this moment at the earliest")
	}
	if err != nil || t.Trail.Window == 0 {
		return err
	}
	slot, err := replication.InspectSlot(ctx, db, t.Slot)
	if err != nil {
		return err
	}
	// What the slot has confirmed is delivered; the other way round, what is delivered by now may be more.
	here := sql.Passed{LSN: slot.ConfirmedFlush, StreamSeq: t.tracker.snapshot().last.Sequence}
	if did != "" {
		return sql.StoreTrail(ctx, db, t.record, t.Destination, here)
	}
	now := time.Now()
	step := min(t.Trail.Window/trailSteps, advanceEvery)
	if n := len(t.passed); n == 0 || now.Sub(t.passed[n-1].time) >= step {
		t.passed = append(t.passed, sample{now, here})
	}
	if now.Sub(t.advanced) < step && int64(slot.Current-t.at) < min(advanceBytes, t.Trail.MaxWAL/trailSteps) {
		return nil
	}
	target, err := t.target(ctx, now, slot.Current)
	if err != nil {
		return err
	}
	trail, err := replication.InspectSlot(ctx, db, replication.TrailOf(t.Slot))
	if err != nil {
		return err
	}
	if target.LSN > trail.ConfirmedFlush && target.LSN <= slot.ConfirmedFlush {
		if err := sql.StoreTrail(ctx, db, t.record, t.Destination, target); err != nil {
			return err
		}
		if _, err := replication.AdvanceSlot(ctx, db, trail.Name, target.LSN); err != nil {
			return err
		}
	}
	t.advanced, t.at = now, slot.Current
	return nil
}

// target is the newest place that is as far behind as it is to be: of those that the ticks know, and those that the slot itself has passed.
func (t *trailing) target(ctx context.Context, now time.Time, current event.LSN) (sql.Passed, error) {
	var oldest event.LSN
	if by := int64(current) - t.Trail.MaxWAL; by > 0 {
		oldest = event.LSN(by)
	}
	target, err := sql.DeliveredBefore(ctx, t.db, t.record, t.Destination, t.Trail.Window, oldest)
	if err != nil {
		return sql.Passed{}, err
	}
	for len(t.passed) > 0 && (now.Sub(t.passed[0].time) > t.Trail.Window || target.LSN < oldest) {
		if p := t.passed[0].Passed; p.LSN > target.LSN {
			target = p
		}
		t.passed = t.passed[1:]
	}
	return target, nil
}
