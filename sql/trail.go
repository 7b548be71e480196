package sql

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"ebb/event"
)

// Passed is a place in the log before which everything was delivered, in messages up to a sequence number.
type Passed struct {
	LSN       event.LSN
	StreamSeq uint64
}

// DeliveredBefore returns the LSN of the newest tick of a slot that was stored longer ago than age, or, if that is behind it, of the oldest tick at or
// behind an LSN: everything that committed since stands behind it in the log. Of no such tick it returns zero.
func DeliveredBefore(ctx context.Context, db *pgx.Conn, r SlotRecord, destination string, age time.Duration, oldest event.LSN) (Passed, error) {
	var text string
	var seq int64
	err := db.QueryRow(ctx, `WITH t AS (SELECT id, lsn, stream_seq, delivered_at FROM ebb.tick
			WHERE slot = $1 AND system_identifier = $2 AND destination = $3)
		SELECT lsn::text, stream_seq FROM t WHERE id = greatest(
			(SELECT max(id) FROM t WHERE delivered_at < clock_timestamp() - make_interval(secs => $4)),
			(SELECT min(id) FROM t WHERE lsn >= $5::text::pg_lsn AND $5 <> '0/0'))`,
		r.Name, r.SystemIdentifier, destination, age.Seconds(), oldest.String()).Scan(&text, &seq)
	if errors.Is(err, pgx.ErrNoRows) {
		return Passed{}, nil
	}
	if err != nil {
		return Passed{}, fmt.Errorf("look for a tick before %s: %w", age, withHint(err))
	}
	lsn, err := event.ParseLSN(text)
	if err != nil {
		return Passed{}, fmt.Errorf("look for a tick before %s: %w", age, err)
	}
	return Passed{lsn, uint64(seq)}, nil
}

// StoreTrail stores where the trailing slot is, or will be in a moment, and what stands before that.
func StoreTrail(ctx context.Context, db *pgx.Conn, r SlotRecord, destination string, at Passed) error {
	return update(ctx, db, r, "store what stands before the trailing slot",
		"UPDATE ebb.slot SET trail_lsn = $3::text::pg_lsn, trail_seq = $4, trail_destination = $5 WHERE name = $1 AND term = $2",
		at.LSN.String(), int64(at.StreamSeq), destination)
}

// TickAround returns when the newest tick at or before an LSN was stored, and the oldest one at or behind it, of those that have recorded an event.
// Either is zero if there is none. Exact says that the first one is at that LSN.
func TickAround(ctx context.Context, db *pgx.Conn, r SlotRecord, lsn event.LSN) (before, behind time.Time, exact bool, err error) {
	var b, h *time.Time
	err = db.QueryRow(ctx, `WITH t AS (SELECT lsn, delivered_at FROM ebb.tick WHERE slot = $1 AND system_identifier = $2 AND events > 0)
		SELECT (SELECT max(delivered_at) FROM t WHERE lsn <= $3::text::pg_lsn), (SELECT min(delivered_at) FROM t WHERE lsn >= $3::text::pg_lsn),
			EXISTS (SELECT FROM t WHERE lsn = $3::text::pg_lsn)`, r.Name, r.SystemIdentifier, lsn.String()).Scan(&b, &h, &exact)
	if err != nil {
		return time.Time{}, time.Time{}, false, fmt.Errorf("look for the ticks around %s: %w", lsn, withHint(err))
	}
	if b != nil {
		before = *b
	}
	if h != nil {
		behind = *h
	}
	return before, behind, exact, nil
}
