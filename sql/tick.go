package sql

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"ebb/event"
)

// Tick records that everything its snapshot sees is delivered.
type Tick struct {
	ID int64
	// LSN is at or behind the end of every transaction that the snapshot sees.
	LSN event.LSN
	// Snapshot is in the text form of type pg_snapshot.
	Snapshot string
	// Position and StreamSeq are those of the last event that was delivered when the tick was stored, and Events is how
	// many were delivered until then in all.
	Position  event.Position
	StreamSeq uint64
	Events    int64
	// Destination is where they were delivered. Position and StreamSeq mean nothing to another one.
	Destination string
	DeliveredAt time.Time
}

// BeginTick reads a snapshot and then the end of the log. Once everything before that end is delivered, so is every row whose
// transaction the snapshot sees. The tick is worthless when the session that read it ends before it is stored: after a
// crash of the server, transaction ids that never reached the disk are given out again.
func BeginTick(ctx context.Context, db *pgx.Conn) (Tick, error) {
	var t Tick
	var lsn string
	var block, segment int64
	// A target list is evaluated from left to right.
	err := db.QueryRow(ctx, `SELECT pg_current_snapshot()::text, pg_current_wal_insert_lsn()::text,
		current_setting('wal_block_size')::bigint, pg_size_bytes(current_setting('wal_segment_size'))`).
		Scan(&t.Snapshot, &lsn, &block, &segment)
	if err != nil {
		return Tick{}, fmt.Errorf("begin a tick: %w", err)
	}
	if t.LSN, err = event.ParseLSN(lsn); err != nil {
		return Tick{}, fmt.Errorf("begin a tick: %w", err)
	}
	t.LSN = endOfRecord(t.LSN, uint64(block), uint64(segment))
	return t, nil
}

// endOfRecord takes the position at which the next record will be inserted and returns the end of the one before it. They
// differ at the start of a page, whose header belongs to no record: nothing ever ends behind a header alone, and to wait
// for that would be to wait for the next write. Source: XLogBytePosToRecPtr and XLogBytePosToEndRecPtr in xlog.c.
func endOfRecord(insert event.LSN, block, segment uint64) event.LSN {
	const shortHeader, longHeader = 24, 40
	switch {
	case uint64(insert)%segment == longHeader:
		return insert - longHeader
	case uint64(insert)%block == shortHeader:
		return insert - shortHeader
	}
	return insert
}

// StoreTick stores a tick that has come true, and forgets those of the slot that are older than keep. It returns
// ErrNotMade when the slot is to be made anew by now: a tick would have the recovery pass over rows.
func StoreTick(ctx context.Context, db *pgx.Conn, r SlotRecord, t Tick, keep time.Duration) error {
	tag, err := db.Exec(ctx, `WITH slot AS (
			SELECT name, recovered_after FROM ebb.slot WHERE name = $7 AND snapshot IS NOT NULL
		), forgotten AS (
			DELETE FROM ebb.tick t USING slot
			WHERE t.slot = slot.name AND t.delivered_at < clock_timestamp() - make_interval(secs => $9)
			  AND t.delivered_at < coalesce((SELECT created_at FROM ebb.buffer ORDER BY id LIMIT 1), 'infinity')
			  AND t.id IS DISTINCT FROM slot.recovered_after)
		INSERT INTO ebb.tick (lsn, snapshot, position, stream_seq, epoch, events, slot, system_identifier, destination)
		SELECT $1::text::pg_lsn, $2::text::pg_snapshot, $3, $4, $5, $6, slot.name, $8, $10 FROM slot`,
		t.LSN.String(), t.Snapshot, t.Position.String(), int64(t.StreamSeq), int32(t.Position.Epoch), t.Events, r.Name, r.SystemIdentifier,
		keep.Seconds(), t.Destination)
	if err != nil {
		return fmt.Errorf("store a tick: %w", withHint(err))
	}
	if tag.RowsAffected() == 0 {
		return fmt.Errorf("store a tick of slot %q: %w", r.Name, ErrNotMade)
	}
	return nil
}

// LastTick returns the newest tick of this cluster and slot, or false when there is none.
func LastTick(ctx context.Context, db *pgx.Conn, r SlotRecord) (Tick, bool, error) {
	var t Tick
	var lsn, position string
	var seq int64
	err := db.QueryRow(ctx, `SELECT id, lsn::text, snapshot::text, position, stream_seq, events, destination, delivered_at FROM ebb.tick
		WHERE slot = $1 AND system_identifier = $2 ORDER BY id DESC LIMIT 1`, r.Name, r.SystemIdentifier).
		Scan(&t.ID, &lsn, &t.Snapshot, &position, &seq, &t.Events, &t.Destination, &t.DeliveredAt)
	if errors.Is(err, pgx.ErrNoRows) {
		return Tick{}, false, nil
	}
	if err != nil {
		return Tick{}, false, fmt.Errorf("read the newest tick: %w", withHint(err))
	}
	t.StreamSeq = uint64(seq)
	if t.LSN, err = event.ParseLSN(lsn); err == nil {
		t.Position, err = event.ParsePosition(position)
	}
	if err != nil {
		return Tick{}, false, fmt.Errorf("read the newest tick: %w", err)
	}
	return t, true, nil
}
