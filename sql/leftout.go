package sql

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"ebb/event"
)

// Retriable returns how many events a destination may hold, or have held, behind a sequence number that it was given from the dead letters. Since is when
// everything up to that number was marked: of what was retried later, a bridge that was killed may not have marked some.
func Retriable(ctx context.Context, db *pgx.Conn, slot, destination string, seq uint64, since time.Time) (uint64, error) {
	var n int64
	if err := db.QueryRow(ctx, `SELECT count(*) FROM ebb.dead_letter WHERE slot = $1
		AND (state = 'retrying' OR state = 'delivered' AND destination = $2 AND stream_seq > $3 OR decided_at >= $4)`,
		slot, destination, int64(seq), since).Scan(&n); err != nil {
		return 0, fmt.Errorf("count what was retried: %w", withHint(err))
	}
	return uint64(n), nil
}

// RetriedBehind returns how many events are recorded as delivered from the dead letters behind a sequence number of a destination.
func RetriedBehind(ctx context.Context, db *pgx.Conn, slot, destination string, seq uint64) (int64, error) {
	var n int64
	if err := db.QueryRow(ctx, `SELECT count(*) FROM ebb.dead_letter
		WHERE slot = $1 AND state = 'delivered' AND destination = $2 AND stream_seq > $3`, slot, destination, int64(seq)).Scan(&n); err != nil {
		return 0, fmt.Errorf("look for retried events behind the end of the destination: %w", withHint(err))
	}
	return n, nil
}

// RetryForgotten has the events delivered once more that were delivered from the dead letters behind a sequence number of a destination, as it has
// forgotten them. What waits behind them with the same key is tried again after them, so that the order is kept.
func RetryForgotten(ctx context.Context, db *pgx.Conn, r SlotRecord, destination string, seq uint64) error {
	return update(ctx, db, r, "have forgotten events retried", `WITH slot AS (
			SELECT name FROM ebb.slot WHERE name = $1 AND term = $2 FOR SHARE
		), forgotten AS (
			UPDATE ebb.dead_letter d SET state = 'retrying', stream_seq = NULL, destination = NULL FROM slot
			WHERE d.slot = slot.name AND d.state = 'delivered' AND d.destination = $3 AND d.stream_seq > $4 RETURNING d.key
		), behind AS (
			UPDATE ebb.dead_letter d SET state = 'retrying' FROM slot
			WHERE d.slot = slot.name AND d.state = 'parked' AND d.key IN (SELECT key FROM forgotten))
		SELECT pg_notify('ebb_dead', name) FROM slot`, destination, int64(seq))
}

// RequeueComingBy has what waits in the dead letters, of transactions that committed at or behind an LSN, go to the end of its queue when it comes by
// again, as in a replay. So it stands behind what a destination has forgotten of the events that were streamed before it, which come by as well.
func RequeueComingBy(ctx context.Context, db *pgx.Conn, r SlotRecord, from event.LSN) error {
	return update(ctx, db, r, "have dead letters that come by queue again", `WITH slot AS (
			SELECT name FROM ebb.slot WHERE name = $1 AND term = $2 FOR SHARE
		), waiting AS (
			UPDATE ebb.dead_letter d SET epoch = 0 FROM slot
			WHERE d.slot = slot.name AND d.`+queued+` AND d.key IS NOT NULL AND split_part(d.place, ':', 1)::pg_lsn >= $3::text::pg_lsn)
		SELECT FROM slot`, from.String())
}

// KeptOf returns those of the ids of events that the dead letters keep, or have kept.
func KeptOf(ctx context.Context, db *pgx.Conn, slot string, ids []string) (map[string]bool, error) {
	const step = "look for events among the dead letters"
	kept := map[string]bool{}
	rows, err := db.Query(ctx, "SELECT DISTINCT event_id FROM ebb.dead_letter WHERE slot = $1 AND event_id = ANY($2)", slot, ids)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", step, withHint(err))
	}
	var id string
	if _, err := pgx.ForEachRow(rows, []any{&id}, func() error {
		kept[id] = true
		return nil
	}); err != nil {
		return nil, fmt.Errorf("%s: %w", step, withHint(err))
	}
	return kept, nil
}

// PositionedPayloads calls fn with the payload of every event that the dead letters keep, or have kept, and whose id is a position. The payload is valid
// during the call.
func PositionedPayloads(ctx context.Context, db *pgx.Conn, slot string, fn func(payload []byte)) error {
	const step = "read the dead letters whose ids are positions"
	rows, err := db.Query(ctx, `SELECT coalesce(convert_to(payload::text, 'UTF8'), payload_bytes) FROM ebb.dead_letter
		WHERE slot = $1 AND event_id ~ '^[0-9]+:[0-9A-F]+/[0-9A-F]+:[0-9]+$'`, slot)
	if err != nil {
		return fmt.Errorf("%s: %w", step, withHint(err))
	}
	var payload []byte
	if _, err := pgx.ForEachRow(rows, []any{&payload}, func() error {
		fn(payload)
		return nil
	}); err != nil {
		return fmt.Errorf("%s: %w", step, withHint(err))
	}
	return nil
}

// Retried is a message that a destination holds of an event from the dead letters.
type Retried struct {
	ID    string
	Seq   uint64
	Epoch uint32
}

// MarkRetried stores that events were delivered from the dead letters, as the destination holds them. What has come by again since, in a later epoch, is
// another one.
func MarkRetried(ctx context.Context, db *pgx.Conn, r SlotRecord, destination string, retried []Retried) error {
	ids, seqs, epochs := make([]string, len(retried)), make([]int64, len(retried)), make([]int32, len(retried))
	for i, m := range retried {
		ids[i], seqs[i], epochs[i] = m.ID, int64(m.Seq), int32(m.Epoch)
	}
	return update(ctx, db, r, "store what was retried", `WITH slot AS (
			SELECT name FROM ebb.slot WHERE name = $1 AND term = $2 FOR SHARE
		), marked AS (
			UPDATE ebb.dead_letter d SET state = 'delivered', attempts = d.attempts + 1, last_at = clock_timestamp(), stream_seq = m.seq, destination = $3
			FROM slot, (SELECT id, max(seq) AS seq, max(epoch) AS epoch FROM unnest($4::text[], $5::bigint[], $6::integer[]) m (id, seq, epoch) GROUP BY id) m
			WHERE d.slot = slot.name AND d.event_id = m.id AND d.epoch <= m.epoch AND d.state IN ('parked', 'retrying'))
		SELECT FROM slot`, destination, ids, seqs, epochs)
}
