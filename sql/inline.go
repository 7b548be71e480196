package sql

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// Wait is a session whose COMMIT waited for delivery.
type Wait struct {
	PID  int32
	Role string
	// Ended is false for one that the owner of the schema may not end.
	Ended bool
}

// EndWaits ends the sessions whose COMMIT waits for a delivery that cannot come before they have ended: a slot is not made while a transaction
// runs, and rows are not recovered before they can be seen. Otherwise it does nothing.
func EndWaits(ctx context.Context, db *pgx.Conn, slot string) ([]Wait, error) {
	rows, err := db.Query(ctx, "SELECT pid, role, ended FROM ebb.end_waits($1)", slot)
	if err != nil {
		return nil, fmt.Errorf("look for COMMITs that wait for delivery: %w", withHint(err))
	}
	waits, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Wait])
	if err != nil {
		return nil, fmt.Errorf("look for COMMITs that wait for delivery: %w", withHint(err))
	}
	return waits, nil
}
