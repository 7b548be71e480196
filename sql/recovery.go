package sql

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// Row is a row of the buffer that is read from the table. Nil means NULL.
type Row struct {
	ID                           int64
	Topic, Key, Payload, Headers []byte
	CreatedAt                    time.Time
}

// RowsToRecover returns, by id, the next rows behind id after that the slot's stream does not hold and that no tick has
// recorded: at most 1,000 of them, and about size bytes of content.
func RowsToRecover(ctx context.Context, db *pgx.Conn, slot string, after int64, size int) ([]Row, error) {
	rows, err := db.Query(ctx, `SELECT id, topic, key, payload, headers, created_at
		FROM (
			SELECT p.*, sum(octet_length(payload)) OVER (ORDER BY id) - octet_length(payload) AS before
			FROM (
				SELECT b.id, b.topic, b.key, b.payload::text, b.headers::text, b.created_at
				FROM ebb.buffer b, ebb.slot s LEFT JOIN ebb.tick t ON t.id = s.recovered_after
				WHERE s.name = $1 AND b.id > $2 AND pg_visible_in_snapshot(b.xid, s.snapshot)
				  AND (t.snapshot IS NULL OR NOT pg_visible_in_snapshot(b.xid, t.snapshot))
				ORDER BY b.id LIMIT 1000) p) q
		WHERE before < $3 ORDER BY id`, slot, after, size)
	if err != nil {
		return nil, fmt.Errorf("read rows to recover: %w", withHint(err))
	}
	out, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (Row, error) {
		var r Row
		err := row.Scan(&r.ID, &r.Topic, &r.Key, &r.Payload, &r.Headers, &r.CreatedAt)
		return r, err
	})
	if err != nil {
		return nil, fmt.Errorf("read rows to recover: %w", withHint(err))
	}
	return out, nil
}

// Recovered stores that all rows to recover up to id are delivered, n of them since it was last called.
func Recovered(ctx context.Context, db *pgx.Conn, slot string, id int64, n int) error {
	_, err := db.Exec(ctx, "UPDATE ebb.slot SET recovered_id = $2, recovered_events = recovered_events + $3 WHERE name = $1", slot, id, n)
	if err != nil {
		return fmt.Errorf("store how far the recovery has come: %w", withHint(err))
	}
	return nil
}

// RecoveryDone stores that all rows from before the slot are delivered, from where on it is the slot alone that counts.
func RecoveryDone(ctx context.Context, db *pgx.Conn, slot string) error {
	if _, err := db.Exec(ctx, "UPDATE ebb.slot SET recovered_at = clock_timestamp() WHERE name = $1", slot); err != nil {
		return fmt.Errorf("store that the recovery is done: %w", withHint(err))
	}
	return nil
}

// RecoveryFloor returns the sequence number in the stream behind which ids may stand that a recovery must not deliver again.
// A transaction that waits for a synchronous standby is decoded before any snapshot shows it, so that the tick to start
// from is not the newest but one whose snapshot had ended before the newest one's began. Another destination than that of the
// ticks is searched from its beginning.
func RecoveryFloor(ctx context.Context, db *pgx.Conn, slot, destination string) (uint64, error) {
	var seq int64
	err := db.QueryRow(ctx, `SELECT coalesce((
		SELECT t.stream_seq FROM ebb.slot s JOIN ebb.tick n ON n.id = s.recovered_after
		JOIN ebb.tick t ON (t.slot, t.system_identifier, t.destination) = (n.slot, n.system_identifier, n.destination)
			AND pg_snapshot_xmax(t.snapshot) <= pg_snapshot_xmin(n.snapshot)
		WHERE s.name = $1 AND n.destination = $2 ORDER BY t.id DESC LIMIT 1), 0)`, slot, destination).Scan(&seq)
	if err != nil {
		return 0, fmt.Errorf("find where the recovery starts in the stream: %w", withHint(err))
	}
	return uint64(seq), nil
}
