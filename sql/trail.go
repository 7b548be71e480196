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
