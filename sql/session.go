package sql

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// Connect opens an ordinary connection for the bridge's own statements.
func Connect(ctx context.Context, url, name string) (*pgx.Conn, error) {
	cfg, err := pgx.ParseConfig(url)
	if err != nil {
		return nil, fmt.Errorf("postgres: %w", err)
	}
	cfg.RuntimeParams["application_name"] = name
	cfg.RuntimeParams["client_encoding"] = "UTF8"
	// ebb must never wait for the synchronous standby that it may itself be.
	cfg.RuntimeParams["synchronous_commit"] = "local"
	db, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("connect to Postgres: %w", err)
	}
	return db, nil
}

// TryLead takes, without waiting, the lock of the bridge that leads on a slot. It is held until the session ends.
func TryLead(ctx context.Context, db *pgx.Conn, slot string) (bool, error) {
	var ok bool
	if err := db.QueryRow(ctx, "SELECT pg_try_advisory_lock("+leaderKey+")", slot).Scan(&ok); err != nil {
		return false, fmt.Errorf("take the leader's lock: %w", err)
	}
	return ok, nil
}

// HasLeader reports whether a bridge leads on a slot.
func HasLeader(ctx context.Context, db *pgx.Conn, slot string) (bool, error) {
	var ok bool
	err := db.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 1
		AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
		AND (classid::bigint << 32 | objid::bigint) = `+leaderKey+`)`, slot).Scan(&ok)
	if err != nil {
		return false, fmt.Errorf("look for the leader's lock: %w", err)
	}
	return ok, nil
}

// leaderKey is the advisory lock of the slot that is parameter $1.
const leaderKey = "hashtextextended('ebb leader on ' || $1::text, 0)"
