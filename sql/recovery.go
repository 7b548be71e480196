package sql

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"ebb/event"
)

// Row is a row of the buffer that is read from the table. Nil means NULL.
type Row struct {
	ID                           int64
	Topic, Key, Payload, Headers []byte
	CreatedAt                    time.Time
}

// RowsToRecover returns, by id, the next rows behind id after that the slot's stream does not hold, that no tick has recorded, and that are not among the
// dead letters: at most 1,000 of them, and about size bytes of content.
func RowsToRecover(ctx context.Context, db *pgx.Conn, slot string, after int64, size int) ([]Row, error) {
	rows, err := db.Query(ctx, `SELECT id, topic, key, payload, headers, created_at
		FROM (
			SELECT p.*, sum(octet_length(payload)) OVER (ORDER BY id) - octet_length(payload) AS before
			FROM (
				SELECT b.id, b.topic, b.key, b.payload::text, b.headers::text, b.created_at
				FROM ebb.buffer b, ebb.slot s LEFT JOIN ebb.tick t ON t.id = s.recovered_after
				WHERE s.name = $1 AND b.id > $2 AND pg_visible_in_snapshot(b.xid, s.snapshot)
				  AND (t.snapshot IS NULL OR NOT pg_visible_in_snapshot(b.xid, t.snapshot))
				  AND NOT EXISTS (SELECT FROM ebb.dead_letter d WHERE d.slot = $1 AND d.event_id = b.id::text)
				ORDER BY b.id LIMIT 1000) p) q
		WHERE before < $3 ORDER BY id`, slot, after, size)
	if err != nil {
		return nil, fmt.Errorf("read rows to recover: %w", withHint(err))
	}
	return collectRows(rows, "read rows to recover")
}

func collectRows(rows pgx.Rows, step string) ([]Row, error) {
	out, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (Row, error) {
		var r Row
		err := row.Scan(&r.ID, &r.Topic, &r.Key, &r.Payload, &r.Headers, &r.CreatedAt)
		return r, err
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", step, withHint(err))
	}
	return out, nil
}

// RowsSince returns, by id, the next rows behind id after that were made at or after a time: at most limit of them.
func RowsSince(ctx context.Context, db *pgx.Conn, after int64, since time.Time, limit int) ([]Row, error) {
	const step = "read rows of the buffer"
	rows, err := db.Query(ctx, `SELECT id, topic, key, payload::text, headers::text, created_at FROM ebb.buffer
		WHERE id > $1 AND created_at >= $2 ORDER BY id LIMIT $3`, after, since, limit)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", step, withHint(err))
	}
	return collectRows(rows, step)
}

// OldestRow returns when the oldest row of the buffer was made, or false when it is empty.
func OldestRow(ctx context.Context, db *pgx.Conn) (time.Time, bool, error) {
	var at *time.Time
	if err := db.QueryRow(ctx, "SELECT min(created_at) FROM (SELECT created_at FROM ebb.buffer ORDER BY id LIMIT 1000) b").Scan(&at); err != nil {
		return time.Time{}, false, fmt.Errorf("look for the oldest row of the buffer: %w", withHint(err))
	}
	if at == nil {
		return time.Time{}, false, nil
	}
	return *at, true, nil
}

// BeginRecovery stores where the rows from before the slot are being delivered, and the last sequence number there.
func BeginRecovery(ctx context.Context, db *pgx.Conn, r SlotRecord, destination string, seq uint64) error {
	return update(ctx, db, r, "store where the recovery delivers",
		"UPDATE ebb.slot SET destination = $3, recovered_seq = $4 WHERE name = $1 AND term = $2", destination, int64(seq))
}

// Recovered stores that all rows to recover up to id are delivered, n of them since it was last called, the last one at sequence
// number seq.
func Recovered(ctx context.Context, db *pgx.Conn, r SlotRecord, id int64, n int, seq uint64) error {
	return update(ctx, db, r, "store how far the recovery has come",
		"UPDATE ebb.slot SET recovered_id = $3, recovered_events = recovered_events + $4, recovered_seq = $5 WHERE name = $1 AND term = $2",
		id, n, int64(seq))
}

// RecoveryDone stores that all rows from before the slot are delivered, the last of them in or before a position. From here on it is the
// slot alone that counts. The slot's snapshot makes a tick: whatever it sees has ended before the point from which the slot streams.
func RecoveryDone(ctx context.Context, db *pgx.Conn, r SlotRecord, destination string, position event.Position, seq uint64, own ...OwnTable) error {
	schemas, tables := ownNames(own)
	return update(ctx, db, r, "store that the recovery is done", `WITH slot AS (
			UPDATE ebb.slot SET recovered_at = clock_timestamp(), diverged = false, own_pending = false
			WHERE name = $1 AND term = $2 AND snapshot IS NOT NULL RETURNING *), `+fmt.Sprintf(startTables, "$6", "$7", "true")+`
		INSERT INTO ebb.tick (lsn, snapshot, position, stream_seq, epoch, events, slot, system_identifier, destination)
		SELECT s.consistent_point, s.snapshot, $3, $4, s.epoch, coalesce(t.events, 0) + s.recovered_events, s.name, s.system_identifier, $5
		FROM slot s LEFT JOIN ebb.tick t ON t.id = s.recovered_after`, position.String(), int64(seq), destination, schemas, tables)
}

// OwnRecovered stores that n events of own tables were delivered from before the slot, the last one at sequence number seq.
func OwnRecovered(ctx context.Context, db *pgx.Conn, r SlotRecord, n int, seq uint64) error {
	return update(ctx, db, r, "store how far the recovery has come",
		"UPDATE ebb.slot SET recovered_events = recovered_events + $3, recovered_seq = $4 WHERE name = $1 AND term = $2", n, int64(seq))
}

// Reach says whether the buffer still holds every row that was not delivered when a tick was stored, or, with 0, every row that there
// ever was.
func Reach(ctx context.Context, db *pgx.Conn, r SlotRecord, tick int64) (bool, error) {
	var ok bool
	err := db.QueryRow(ctx, `SELECT NOT EXISTS (SELECT FROM ebb.removed r WHERE r.system_identifier = $2
		AND NOT coalesce((SELECT pg_visible_in_snapshot(r.newest, t.snapshot) FROM ebb.tick t WHERE t.id = $1), false))`, tick, r.SystemIdentifier).Scan(&ok)
	if err != nil {
		return false, fmt.Errorf("find out which rows were removed from the buffer: %w", withHint(err))
	}
	return ok, nil
}

// AllVisible reports whether a query sees every row that is to be recovered. A transaction that waits for a synchronous standby has
// ended before the slot begins, and no query sees it yet.
func AllVisible(ctx context.Context, db *pgx.Conn, slot string) (bool, error) {
	var ok bool
	err := db.QueryRow(ctx, `SELECT NOT EXISTS (
			SELECT FROM pg_snapshot_xip(now) x WHERE pg_visible_in_snapshot(x, s.snapshot)
			UNION ALL
			SELECT FROM generate_series(pg_snapshot_xmax(now)::text::bigint, pg_snapshot_xmax(s.snapshot)::text::bigint - 1) x
			WHERE pg_visible_in_snapshot(x::text::xid8, s.snapshot))
		FROM ebb.slot s, pg_current_snapshot() now WHERE s.name = $1`, slot).Scan(&ok)
	if err != nil {
		return false, fmt.Errorf("look for transactions that are not visible yet: %w", withHint(err))
	}
	return ok, nil
}

// RowsBetween calls fn with the id of every row of a transaction that one snapshot, in the text form of type pg_snapshot, does not see and
// a later one does, but for those that are among the dead letters of the slot.
func RowsBetween(ctx context.Context, db *pgx.Conn, slot, earlier, later string, fn func(id int64)) error {
	rows, err := db.Query(ctx, `SELECT id FROM ebb.buffer b WHERE pg_visible_in_snapshot(xid, $2::text::pg_snapshot)
		AND ($1 = '' OR NOT pg_visible_in_snapshot(xid, nullif($1, '')::pg_snapshot))
		AND NOT EXISTS (SELECT FROM ebb.dead_letter d WHERE d.slot = $3 AND d.event_id = b.id::text)`, earlier, later, slot)
	if err != nil {
		return fmt.Errorf("look for rows that are not recorded: %w", withHint(err))
	}
	var id int64
	if _, err := pgx.ForEachRow(rows, []any{&id}, func() error {
		fn(id)
		return nil
	}); err != nil {
		return fmt.Errorf("look for rows that are not recorded: %w", withHint(err))
	}
	return nil
}

// MissingRows returns those of the ids that no row of the buffer has.
func MissingRows(ctx context.Context, db *pgx.Conn, ids []int64) ([]int64, error) {
	rows, err := db.Query(ctx, "SELECT i FROM unnest($1::bigint[]) i WHERE NOT EXISTS (SELECT FROM ebb.buffer WHERE id = i) ORDER BY i", ids)
	if err != nil {
		return nil, fmt.Errorf("look for the rows of events: %w", withHint(err))
	}
	missing, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	if err != nil {
		return nil, fmt.Errorf("look for the rows of events: %w", withHint(err))
	}
	return missing, nil
}

// RecoveryFloor returns the sequence number in the stream behind which ids may stand that a recovery must not deliver again: those of
// rows which the tick that it begins behind does not see. Whatever that does not see began to write after a tick was stored whose own
// transaction it does see, with all before. (That the snapshot of one had ended before the other's began is not enough: a transaction may
// run, and have been delivered, whose id is not below the end of either.) Another destination than that of the ticks is searched from
// its beginning.
func RecoveryFloor(ctx context.Context, db *pgx.Conn, slot, destination string) (uint64, error) {
	return floor(ctx, db, "(SELECT recovered_after FROM ebb.slot WHERE name = $1)", slot, destination)
}

// UnrecordedFloor is the same for what the newest tick does not see.
func UnrecordedFloor(ctx context.Context, db *pgx.Conn, slot, destination string) (uint64, error) {
	return floor(ctx, db, "(SELECT max(id) FROM ebb.tick WHERE slot = $1)", slot, destination)
}

func floor(ctx context.Context, db *pgx.Conn, tick, slot, destination string) (uint64, error) {
	var seq int64
	err := db.QueryRow(ctx, `SELECT coalesce((
		SELECT t.stream_seq FROM ebb.tick n JOIN ebb.tick t ON (t.slot, t.system_identifier, t.destination) = (n.slot, n.system_identifier, n.destination)
			AND t.xid < pg_snapshot_xmin(n.snapshot)
		WHERE n.id = `+tick+` AND n.slot = $1 AND n.destination = $2 ORDER BY t.id DESC LIMIT 1), 0)`, slot, destination).Scan(&seq)
	if err != nil {
		return 0, fmt.Errorf("find out from where on the stream has to be compared: %w", withHint(err))
	}
	return uint64(seq), nil
}
