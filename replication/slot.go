package replication

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"ebb/event"
	"ebb/internal/sleep"
)

var (
	// ErrNoSlot says that a slot does not exist.
	ErrNoSlot = errors.New("the slot does not exist")
	// ErrForeignSlot says that a slot belongs to something else than this database's bridge.
	ErrForeignSlot = errors.New("the slot is not ebb's")
	// ErrWALLevel says that the server writes too little into its log.
	ErrWALLevel = errors.New("wal_level is not logical")
)

// Slot is what a server says of a slot. Source: https://www.postgresql.org/docs/current/view-pg-replication-slots.html
type Slot struct {
	Name string
	// Plugin and Database are empty for a physical slot.
	Plugin   string
	Database string
	Active   bool
	// ActivePID is the walsender that streams from the slot, or 0.
	ActivePID int32
	// ActiveName is the application_name of that walsender, where the role that asks may see it.
	ActiveName string
	// WALStatus is reserved, extended, unreserved or lost.
	WALStatus string
	// Invalidated is why the server has given the slot up, or "". Before Postgres 17 it does not tell; WALStatus does.
	Invalidated string
	// Synced says that the server, when it was a standby, has copied the slot from its primary.
	Synced bool
	// Failover says that standbys which synchronize slots have it too; true of servers before Postgres 17, where none can.
	Failover       bool
	ConfirmedFlush event.LSN
	Restart        event.LSN
	// Current is how far the server has written its log at the moment of asking.
	Current event.LSN
}

// LagBytes is how much log there is that the slot has not confirmed.
func (s Slot) LagBytes() int64 { return max(0, int64(s.Current)-int64(s.ConfirmedFlush)) }

// RetainedBytes is how much log the server keeps because of the slot.
func (s Slot) RetainedBytes() int64 { return max(0, int64(s.Current)-int64(s.Restart)) }

// Lost reports whether the server has given the slot up, for one because it has removed log that the slot needs, so that it can never
// be read again.
func (s Slot) Lost() bool { return s.WALStatus == "lost" || s.Invalidated != "" }

// Ours returns ErrForeignSlot if the slot is one that a bridge of the given database must leave alone, whatever its own records say.
func (s Slot) Ours(database string) error {
	switch {
	case s.Plugin == "":
		return fmt.Errorf("%w: slot %q is a physical one: choose another name for the slot setting", ErrForeignSlot, s.Name)
	case s.Database != database:
		return fmt.Errorf("%w: slot %q belongs to database %q and not to %q: choose another name for the slot setting", ErrForeignSlot,
			s.Name, s.Database, database)
	}
	return nil
}

// Usable returns ErrForeignSlot unless the slot is one that a bridge of the given database can have made.
func (s Slot) Usable(database string) error {
	if err := s.Ours(database); err != nil {
		return err
	}
	if s.Plugin != Plugin {
		return fmt.Errorf("%w: slot %q has output plugin %s and not %s: choose another name for the slot setting", ErrForeignSlot, s.Name,
			s.Plugin, Plugin)
	}
	return nil
}

// CheckWALLevel returns ErrWALLevel, with what to do, unless the server writes what logical decoding needs.
func CheckWALLevel(ctx context.Context, db *pgx.Conn) error {
	var level string
	if err := db.QueryRow(ctx, "SHOW wal_level").Scan(&level); err != nil {
		return fmt.Errorf("read wal_level: %w", err)
	}
	if level != "logical" {
		return fmt.Errorf("%w but %s: set wal_level = logical in postgresql.conf (ALTER SYSTEM SET wal_level = logical) and restart the server",
			ErrWALLevel, level)
	}
	return nil
}

// InspectSlot returns what the server says of a slot, or ErrNoSlot.
func InspectSlot(ctx context.Context, db *pgx.Conn, name string) (Slot, error) {
	s := Slot{Name: name}
	var confirmed, restart, current string
	err := db.QueryRow(ctx, `
		SELECT coalesce(s.plugin, ''), coalesce(s.database, ''), s.active, coalesce(s.active_pid, 0), coalesce(a.application_name, ''),
		       coalesce(s.wal_status, ''), coalesce(s.confirmed_flush_lsn, '0/0')::text, coalesce(s.restart_lsn, '0/0')::text,
		       (CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END)::text,
		       coalesce(to_jsonb(s)->>'invalidation_reason', ''), coalesce((to_jsonb(s)->>'synced')::boolean, false),
		       coalesce((to_jsonb(s)->>'failover')::boolean, true)
		FROM pg_replication_slots s LEFT JOIN pg_stat_activity a ON a.pid = s.active_pid
		WHERE s.slot_name = $1`, name).
		Scan(&s.Plugin, &s.Database, &s.Active, &s.ActivePID, &s.ActiveName, &s.WALStatus, &confirmed, &restart, &current,
			&s.Invalidated, &s.Synced, &s.Failover)
	if errors.Is(err, pgx.ErrNoRows) {
		return Slot{}, fmt.Errorf("slot %q: %w", name, ErrNoSlot)
	}
	if err != nil {
		return Slot{}, fmt.Errorf("inspect slot %q: %w", name, err)
	}
	for _, p := range []struct {
		text string
		lsn  *event.LSN
	}{{confirmed, &s.ConfirmedFlush}, {restart, &s.Restart}, {current, &s.Current}} {
		if *p.lsn, err = event.ParseLSN(p.text); err != nil {
			return Slot{}, fmt.Errorf("inspect slot %q: %w", name, err)
		}
	}
	return s, nil
}

// Waiters describes, a line each, the transactions that a CREATE_REPLICATION_SLOT waits for: those that have written and have
// not ended. Of sessions of other roles, a role without pg_read_all_stats sees little more than that they are there.
func Waiters(ctx context.Context, db *pgx.Conn) ([]string, error) {
	rows, err := db.Query(ctx, `
		SELECT format('pid %s, user %s, application %s, %s, in its transaction for %s: %s',
			pid, coalesce(usename, '?'), coalesce(nullif(application_name, ''), '?'),
			CASE WHEN wait_event = 'SyncRep' THEN 'waiting for a synchronous standby in its COMMIT' ELSE coalesce(state, '?') END,
			coalesce(date_trunc('second', clock_timestamp() - xact_start)::text, '?'), left(regexp_replace(query, '\s+', ' ', 'g'), 80))
		FROM pg_stat_activity
		WHERE pid <> pg_backend_pid()
		  AND pid IN (SELECT pid FROM pg_locks WHERE locktype = 'transactionid' AND mode = 'ExclusiveLock' AND granted)
		UNION ALL
		SELECT format('prepared transaction %s of %s, since %s: COMMIT PREPARED or ROLLBACK PREPARED it', gid, owner, prepared)
		FROM pg_prepared_xacts
		ORDER BY 1`)
	if err != nil {
		return nil, fmt.Errorf("list the transactions in the way: %w", err)
	}
	lines, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, fmt.Errorf("list the transactions in the way: %w", err)
	}
	return lines, nil
}

// FlushedTo returns how far the server's log is on its disk. A walsender sends nothing from behind that.
func FlushedTo(ctx context.Context, db *pgx.Conn) (event.LSN, error) {
	var text string
	if err := db.QueryRow(ctx, "SELECT pg_current_wal_flush_lsn()::text").Scan(&text); err != nil {
		return 0, fmt.Errorf("read the end of the log: %w", err)
	}
	lsn, err := event.ParseLSN(text)
	if err != nil {
		return 0, fmt.Errorf("read the end of the log: %w", err)
	}
	return lsn, nil
}

// EndWalsender ends the walsender that still streams from a slot for a bridge that has lost the lead, and waits until the slot is free.
func EndWalsender(ctx context.Context, db *pgx.Conn, name string, pid int32) error {
	if _, err := db.Exec(ctx, "SELECT pg_terminate_backend($1)", pid); err != nil {
		return fmt.Errorf("end walsender %d, which has slot %q: %w", pid, name, withHint(err))
	}
	for {
		s, err := InspectSlot(ctx, db, name)
		if err != nil && !errors.Is(err, ErrNoSlot) {
			return err
		}
		if !s.Active || s.ActivePID != pid {
			return nil
		}
		if err := sleep.For(ctx, 10*time.Millisecond); err != nil {
			return fmt.Errorf("wait for walsender %d to leave slot %q: %w", pid, name, err)
		}
	}
}

// DropSlot drops a slot of the database that db is connected to. On a replication connection use [Conn.DropSlot].
func DropSlot(ctx context.Context, db *pgx.Conn, name string) error {
	if _, err := db.Exec(ctx, "SELECT pg_drop_replication_slot($1)", name); err != nil {
		return fmt.Errorf("drop slot %q: %w", name, withHint(err))
	}
	return nil
}
