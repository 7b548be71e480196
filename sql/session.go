package sql

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"ebb/internal/session"
)

const (
	// sessionTimeout is after how much idleness the server ends a session that holds the leader's lock, which asks it something far
	// more often. So a leader that is frozen, or whose host has vanished, does not keep the lock.
	sessionTimeout = 10 * time.Second
	// pingEvery is how often the session that holds the lock shows that it is alive, and pingTimeout how long the answer may take.
	pingEvery   = 2 * time.Second
	pingTimeout = 8 * time.Second
)

// Connect opens an ordinary connection for the bridge's own statements.
func Connect(ctx context.Context, url, name string) (*pgx.Conn, error) {
	cfg, err := pgx.ParseConfig(url)
	if err != nil {
		return nil, fmt.Errorf("postgres: %w", err)
	}
	session.Configure(&cfg.Config, name)
	db, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("connect to Postgres: %w", err)
	}
	return db, nil
}

// TryLead takes, without waiting, the lock of the bridge that leads on a slot. It is held until the session ends.
func TryLead(ctx context.Context, db *pgx.Conn, slot string) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, pingTimeout)
	defer cancel()
	var ok bool
	if err := db.QueryRow(ctx, "SELECT pg_try_advisory_lock("+leaderKey+")", slot).Scan(&ok); err != nil {
		return false, fmt.Errorf("take the leader's lock: %w", err)
	}
	return ok, nil
}

// LimitIdle has the server end a session that asks nothing for some seconds, as [Hold] does.
func LimitIdle(ctx context.Context, db *pgx.Conn) error {
	if _, err := db.Exec(ctx, fmt.Sprintf("SET idle_session_timeout = %d", sessionTimeout.Milliseconds())); err != nil {
		return fmt.Errorf("limit the idle time of the session that holds the leader's lock: %w", err)
	}
	return nil
}

// SharesServer reports whether db is a session of the server on which the session with a process id holds the lock of a bridge.
func SharesServer(ctx context.Context, db *pgx.Conn, pid uint32) (bool, error) {
	var ok bool
	err := db.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND granted AND pid = $1)", int32(pid)).Scan(&ok)
	if err != nil {
		return false, fmt.Errorf("compare the servers of two connections: %w", err)
	}
	return ok, nil
}

// Hold keeps the session that holds the leader's lock alive, until ctx ends or the session does, which is an error. It notices at once
// when the server ends the session, as it does when it shuts down. It calls notified with each notification.
func Hold(ctx context.Context, db *pgx.Conn, notified func(channel, payload string)) error {
	for next := time.Now().Add(pingEvery); ; {
		// Notifications do not tell the server that anybody is there.
		listening, cancel := context.WithDeadline(ctx, next)
		n, err := db.WaitForNotification(listening)
		cancel()
		if err == nil {
			notified(n.Channel, n.Payload)
			if time.Now().Before(next) {
				continue
			}
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil && !errors.Is(err, context.DeadlineExceeded) && !pgconn.Timeout(err) || db.IsClosed() {
			return fmt.Errorf("hold the leader's lock: %w", err)
		}
		next = time.Now().Add(pingEvery)
		asking, cancel := context.WithTimeout(ctx, pingTimeout)
		_, err = db.Exec(asking, "SELECT 1")
		cancel()
		if err != nil {
			return fmt.Errorf("hold the leader's lock: %w", err)
		}
	}
}

// StepDown gives the leader's lock back.
func StepDown(ctx context.Context, db *pgx.Conn, slot string) error {
	if _, err := db.Exec(ctx, "SELECT pg_advisory_unlock("+leaderKey+")", slot); err != nil {
		return fmt.Errorf("give the leader's lock back: %w", err)
	}
	return nil
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
