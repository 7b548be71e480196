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
	// Estimated says that Events was not counted.
	Estimated bool
	// OldestAge is the age of the oldest event, or 0 when there is none.
	OldestAge time.Duration
}

// ReadBacklog counts the events that are not recorded as delivered, or estimates how many there are if they are many.
func ReadBacklog(ctx context.Context, db *pgx.Conn) (Backlog, error) {
	var b Backlog
	var age float64
	err := db.QueryRow(ctx, `SELECT events, estimated, coalesce(extract(epoch FROM clock_timestamp() - oldest), 0)::float8 FROM ebb.backlog_size()`).
		Scan(&b.Events, &b.Estimated, &age)
	if err != nil {
		return Backlog{}, fmt.Errorf("count the backlog: %w", withHint(err))
	}
	b.OldestAge = time.Duration(age * float64(time.Second))
	return b, nil
}
