package sql

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// Flow are limits on the lag of a slot, in bytes of log; 0 is none. Past Limit, [OnFull] says what becomes of new events.
type Flow struct {
	Warn, Limit int64
	OnFull      OnFull
}

// OnFull is what happens when the lag is past the limit.
type OnFull string

const (
	// Reject refuses new events, from the limit on until the lag is down to four fifths of it. The zero value means the same.
	Reject OnFull = "reject"
	// Allow takes them nevertheless.
	Allow OnFull = "allow"
)

// FlowState is how the lag stands against the limits.
type FlowState string

const (
	// FlowOpen says that nothing is the matter.
	FlowOpen FlowState = "open"
	// FlowWarn says that the lag is past Warn, or past Limit where that is allowed.
	FlowWarn FlowState = "warn"
	// FlowClosed says that new events are refused.
	FlowClosed FlowState = "closed"
)

// setFlow is one statement, which does nothing when the limits are the same.
const setFlow = `INSERT INTO ebb.flow AS f (slot, warn_bytes, limit_bytes, on_full) VALUES ($1, $2, $3, $4)
	ON CONFLICT (only_row) DO UPDATE SET slot = excluded.slot, warn_bytes = excluded.warn_bytes, limit_bytes = excluded.limit_bytes,
		on_full = excluded.on_full, closed = f.closed AND f.slot = excluded.slot, changed_at = clock_timestamp()
	WHERE (f.slot, f.warn_bytes, f.limit_bytes, f.on_full) IS DISTINCT FROM
		(excluded.slot, excluded.warn_bytes, excluded.limit_bytes, excluded.on_full)`

// SetFlow stores the limits on a slot, from where ebb.put has them, and reports whether they were others.
func SetFlow(ctx context.Context, db execer, slot string, f Flow) (bool, error) {
	tag, err := db.Exec(ctx, setFlow, slot, f.Warn, f.Limit, string(cmp.Or(f.OnFull, Reject)))
	if err != nil {
		return false, fmt.Errorf("store the flow limits: %w", withHint(err))
	}
	return tag.RowsAffected() > 0, nil
}

// flowScript is the statement of SetFlow as text.
func flowScript(slot string, f Flow) string {
	return fmt.Sprintf("UPDATE ebb.flow SET slot = %s, warn_bytes = %d, limit_bytes = %d, on_full = %s", quoteLiteral(slot), f.Warn, f.Limit,
		quoteLiteral(string(cmp.Or(f.OnFull, Reject))))
}

// applyFlow stores the limits, and returns a line when there were others before.
func applyFlow(ctx context.Context, tx pgx.Tx, s Setup, first bool) (string, error) {
	if s.Slot == "" {
		return "", nil
	}
	changed, err := SetFlow(ctx, tx, s.Slot, s.Flow)
	if !changed || first || err != nil {
		return "", err
	}
	return "set the flow limits", nil
}

// FlowNow is how the lag stands.
type FlowNow struct {
	State FlowState
	// Lag is in bytes. Of a slot that is not there it is counted from where delivery was last recorded.
	Lag int64
	// Reopen is down to where the lag must be before a closed buffer takes events again.
	Reopen int64
}

// Regulate has the buffer closed or opened again as the lag is, and returns how that stands. Without it, a buffer is full as long as the lag is
// past the limit, and no longer.
func Regulate(ctx context.Context, db *pgx.Conn, slot string) (FlowNow, error) {
	var now FlowNow
	var was bool
	err := db.QueryRow(ctx, "SELECT coalesce(lag_bytes, 0), reopen_bytes, closed, ebb.flow_state(slot) FROM ebb.flow_now WHERE slot = $1", slot).
		Scan(&now.Lag, &now.Reopen, &was, &now.State)
	if errors.Is(err, pgx.ErrNoRows) {
		return FlowNow{State: FlowOpen}, nil // somebody has set the limits of another slot meanwhile
	}
	if err != nil {
		return FlowNow{}, fmt.Errorf("look at the flow limits: %w", withHint(err))
	}
	if closed := now.State == FlowClosed; closed != was {
		if _, err := db.Exec(ctx, "UPDATE ebb.flow SET closed = $2, changed_at = clock_timestamp() WHERE slot = $1 AND closed <> $2", slot, closed); err != nil {
			return FlowNow{}, fmt.Errorf("store how the flow limits stand: %w", withHint(err))
		}
	}
	return now, nil
}

// StoredFlow returns the limits that ebb.put goes by, and the slot whose lag they are on.
func StoredFlow(ctx context.Context, db querier) (slot string, f Flow, err error) {
	if err := db.QueryRow(ctx, "SELECT slot, warn_bytes, limit_bytes, on_full FROM ebb.flow").Scan(&slot, &f.Warn, &f.Limit, &f.OnFull); err != nil {
		return "", Flow{}, fmt.Errorf("read the flow limits: %w", withHint(err))
	}
	return slot, f, nil
}

// MaxRetained returns how much log the server keeps for a slot at most (max_slot_wal_keep_size), in bytes, or -1 if there is no limit.
func MaxRetained(ctx context.Context, db querier) (int64, error) {
	var bytes int64
	if err := db.QueryRow(ctx, "SELECT pg_size_bytes(current_setting('max_slot_wal_keep_size'))").Scan(&bytes); err != nil {
		return 0, fmt.Errorf("read max_slot_wal_keep_size: %w", withHint(err))
	}
	return max(bytes, -1), nil
}

// ReadFlow returns how the lag of a slot stands against the limits.
func ReadFlow(ctx context.Context, db querier, slot string) (FlowState, error) {
	var state FlowState
	if err := db.QueryRow(ctx, "SELECT ebb.flow_state($1)", slot).Scan(&state); err != nil {
		return "", fmt.Errorf("look at the flow limits: %w", withHint(err))
	}
	return state, nil
}
