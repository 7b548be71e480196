package sql

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Buckets is how many partitions the buffer has.
const Buckets = 2 * ringKept

// Collected is what came of an attempt to empty a partition of the buffer.
type Collected string

const (
	// CollectedEmptied says that it was emptied.
	CollectedEmptied Collected = "collected"
	// CollectedEmpty says that there was nothing in it.
	CollectedEmpty Collected = "empty"
	// CollectedCurrent says that producers write to it, or will in a moment.
	CollectedCurrent Collected = "current"
	// CollectedKept says that rows in it were delivered less than the time ago for which they are kept.
	CollectedKept Collected = "kept"
	// CollectedUndelivered says that rows in it which are older than that are not recorded as delivered.
	CollectedUndelivered Collected = "undelivered"
	// CollectedInUse says that a transaction that has written to it or has read it is open.
	CollectedInUse Collected = "in use"
)

// Collect empties a partition of the buffer, from 0 to Buckets-1, if everything in it was recorded as delivered longer than keep ago. It
// waits for a tenth of a second at most for others to let go of the partition. The error is ErrSuperseded when the record's term is over.
func Collect(ctx context.Context, db *pgx.Conn, r SlotRecord, bucket int, keep time.Duration) (Collected, error) {
	var c Collected
	err := db.QueryRow(ctx, "SELECT ebb.collect($1, $2, $3, make_interval(secs => $4))", r.Name, r.Term, bucket, keep.Seconds()).Scan(&c)
	var pg *pgconn.PgError
	switch {
	case errors.As(err, &pg) && (pg.Code == "55P03" || pg.Code == "40P01"): // lock_not_available, deadlock_detected
		return CollectedInUse, nil
	case err != nil:
		return "", fmt.Errorf("empty bucket %d of ebb.buffer: %w", bucket, withHint(err))
	case c == "superseded":
		return "", fmt.Errorf("empty bucket %d of ebb.buffer: %w", bucket, ErrSuperseded)
	}
	return c, nil
}
