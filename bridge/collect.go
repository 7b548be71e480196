package bridge

import (
	"context"
	"errors"
	"time"

	"ebb/internal/quiet"
	"ebb/internal/sleep"
	"ebb/sql"
)

// maxCollectEvery bounds the time between two looks at the partitions of the buffer.
const maxCollectEvery = time.Minute

// collect empties, again and again, the partitions of the buffer in which nothing is needed any more. That it fails is said and tried again,
// as delivery does not depend on it.
func (l *leader) collect(ctx context.Context) error {
	// A round of the ring takes twice Keep, so that each partition is looked at many times before producers come round to it again.
	every := min(max(l.Keep/sql.Buckets, 100*time.Millisecond), maxCollectEvery)
	attempts := quiet.New(l.Logger)
	var said collectSaid
	for {
		if err := sleep.For(ctx, every); err != nil {
			return nil
		}
		err := l.collectRound(ctx, &said)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, sql.ErrSuperseded):
			return err
		case err != nil:
			attempts.Failed("delivered rows are not collected", err)
		default:
			attempts.Succeeded("delivered rows are collected again")
		}
	}
}

// collectSaid is since when, and for which reason, a partition that is due is not emptied, and whether that was said.
type collectSaid [sql.Buckets]struct {
	because sql.Collected
	since   time.Time
	said    bool
}

// collectRound looks at every partition once. It has a session of its own, as it may take its time.
func (l *leader) collectRound(ctx context.Context, said *collectSaid) error {
	db, err := sql.Connect(ctx, l.Postgres, l.Slot)
	if err != nil {
		return err
	}
	defer closeQuietly(db)
	for bucket := range sql.Buckets {
		got, err := sql.Collect(ctx, db, l.record, bucket, l.Keep)
		if err != nil {
			return err
		}
		s := &said[bucket]
		if s.because != got {
			s.because, s.since, s.said = got, time.Now(), false
		}
		switch {
		case got == sql.CollectedEmptied:
			l.Logger.Debug("emptied a partition of the buffer", "bucket", bucket)
		case s.said:
		case got == sql.CollectedUndelivered:
			s.said = true
			l.Logger.Warn("a partition of the buffer is not emptied: it holds events that are not recorded as delivered", "bucket", bucket,
				"older_than", l.Keep)
		case got == sql.CollectedInUse && time.Since(s.since) > l.Keep/4:
			s.said = true
			l.Logger.Warn("a partition of the buffer is not emptied: a transaction that uses it is open (see pg_locks)", "bucket", bucket,
				"since", s.since.Round(time.Second))
		}
	}
	return nil
}
