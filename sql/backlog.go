package sql

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// Backlog is what is not recorded as delivered.
type Backlog struct {
	Events int64
	// Estimated says that there are at least Events.
	Estimated bool
	// OldestAge is the age of the oldest event, or 0 when there is none.
	OldestAge time.Duration
}

// maxCounted is how far [ReadBacklog] counts.
const maxCounted = 1_000_000

// ReadBacklog counts the events that are not recorded as delivered.
func ReadBacklog(ctx context.Context, db *pgx.Conn) (Backlog, error) {
	var b Backlog
	var age float64
	err := db.QueryRow(ctx, `SELECT count(*), coalesce(extract(epoch FROM max(age)), 0)::float8
		FROM (SELECT age FROM ebb.backlog ORDER BY id LIMIT $1) b`, maxCounted).Scan(&b.Events, &age)
	if err != nil {
		return Backlog{}, fmt.Errorf("count the backlog: %w", withHint(err))
	}
	b.Estimated = b.Events == maxCounted
	b.OldestAge = time.Duration(age * float64(time.Second))
	return b, nil
}
