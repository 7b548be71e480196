package sql

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"ebb/event"
)

// DeliveredBefore returns the LSN of the newest tick of a slot that was stored longer ago than age: everything that committed since stands
// behind it in the log. Of no such tick it returns 0.
func DeliveredBefore(ctx context.Context, db *pgx.Conn, r SlotRecord, age time.Duration) (event.LSN, error) {
	var text string
	err := db.QueryRow(ctx, `SELECT lsn::text FROM ebb.tick WHERE slot = $1 AND system_identifier = $2
		AND delivered_at < clock_timestamp() - make_interval(secs => $3) ORDER BY id DESC LIMIT 1`, r.Name, r.SystemIdentifier, age.Seconds()).Scan(&text)
	if errors.Is(err, pgx.ErrNoRows) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("look for a tick before %s: %w", age, withHint(err))
	}
	lsn, err := event.ParseLSN(text)
	if err != nil {
		return 0, fmt.Errorf("look for a tick before %s: %w", age, err)
	}
	return lsn, nil
}

// TickAround returns when the newest tick at or before an LSN was stored, and the oldest one at or behind it. Either is zero if there is none. Exact
// says that the first one is at that LSN.
func TickAround(ctx context.Context, db *pgx.Conn, r SlotRecord, lsn event.LSN) (before, behind time.Time, exact bool, err error) {
	var b, h *time.Time
	err = db.QueryRow(ctx, `WITH t AS (SELECT lsn, delivered_at FROM ebb.tick WHERE slot = $1 AND system_identifier = $2)
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
