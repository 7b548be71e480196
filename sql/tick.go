package sql

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
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
	// Epoch was the current one.
	Epoch uint32
	// Destination is where they were delivered. Position and StreamSeq mean nothing to another one.
	Destination string
	DeliveredAt time.Time
	// LastID is the highest id of a row that had been given out before the snapshot was read.
	LastID int64
}

// Oldest returns the lowest transaction id of those that the snapshot does not see.
func (t *Tick) Oldest() (uint64, error) {
	xmin, _, _ := strings.Cut(t.Snapshot, ":")
	n, err := strconv.ParseUint(xmin, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read snapshot %q: %w", t.Snapshot, err)
	}
	return n, nil
}

// BeginTick reads a snapshot and then the end of the log. Once everything before that end is delivered, so is every row whose
// transaction the snapshot sees, if the publication, which is read by the same statement, is as it was when the slot was made. The
// tick is worthless when the session that read it ends before it is stored: after a crash of the server, transaction ids that never
// reached the disk are given out again. No tables stand for the managed one.
func BeginTick(ctx context.Context, db *pgx.Conn, publication string, tables ...Table) (Tick, Publication, error) {
	var t Tick
	var lsn string
	var block, segment int64
	var data []byte
	// A target list is evaluated from left to right.
	err := db.QueryRow(ctx, `SELECT (SELECT last_value FROM ebb.buffer_id_seq), pg_current_snapshot()::text, pg_current_wal_insert_lsn()::text,
		current_setting('wal_block_size')::bigint, pg_size_bytes(current_setting('wal_segment_size')), `+publicationJSON,
		publicationArgs(publication, tables)...).Scan(&t.LastID, &t.Snapshot, &lsn, &block, &segment, &data)
	if err != nil {
		return Tick{}, Publication{}, fmt.Errorf("begin a tick: %w", err)
	}
	if t.LSN, err = event.ParseLSN(lsn); err != nil {
		return Tick{}, Publication{}, fmt.Errorf("begin a tick: %w", err)
	}
	t.LSN = endOfRecord(t.LSN, uint64(block), uint64(segment))
	p, err := parsePublication(publication, tables, data)
	if err != nil {
		return Tick{}, Publication{}, err
	}
	return t, p, nil
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

// StoreTick stores a tick that has come true, and forgets those of the slot that are older than keep, but for the newest of them, which a
// destination that forgets after a quiet time may reach. It returns the id of the transaction that stored it, or ErrNotMade when the slot is
// to be made anew by now, as a tick would have the recovery pass over rows, or ErrSuperseded when the record's term is over.
func StoreTick(ctx context.Context, db *pgx.Conn, r SlotRecord, t Tick, keep time.Duration) (xid uint64, err error) {
	err = db.QueryRow(ctx, `WITH slot AS (
			SELECT name, recovered_after FROM ebb.slot WHERE name = $7 AND snapshot IS NOT NULL AND term = $11 FOR SHARE
		), old AS (
			SELECT t.id FROM ebb.tick t JOIN slot ON t.slot = slot.name
			WHERE t.delivered_at < clock_timestamp() - make_interval(secs => $9) AND t.id IS DISTINCT FROM slot.recovered_after
		), forgotten AS (
			DELETE FROM ebb.tick t USING old WHERE t.id = old.id AND t.id < (SELECT max(id) FROM old))
		INSERT INTO ebb.tick (lsn, snapshot, position, stream_seq, epoch, events, slot, system_identifier, destination, last_id)
		SELECT $1::text::pg_lsn, $2::text::pg_snapshot, $3, $4, $5, $6, slot.name, $8, $10, $12 FROM slot
		RETURNING xid`,
		t.LSN.String(), t.Snapshot, t.Position.String(), int64(t.StreamSeq), int32(t.Epoch), t.Events, r.Name, r.SystemIdentifier,
		keep.Seconds(), t.Destination, r.Term, t.LastID).Scan(&xid)
	if err == nil {
		return xid, nil
	}
	if !errors.Is(err, pgx.ErrNoRows) {
		return 0, fmt.Errorf("store a tick: %w", withHint(err))
	}
	now, err := ReadSlot(ctx, db, r.Name)
	switch {
	case err != nil:
		return 0, fmt.Errorf("store a tick: %w", err)
	case now.Term != r.Term:
		return 0, fmt.Errorf("store a tick of slot %q: %w", r.Name, ErrSuperseded)
	}
	return 0, fmt.Errorf("store a tick of slot %q: %w", r.Name, ErrNotMade)
}

// LastTick returns the newest tick of this cluster and slot, or false when there is none.
func LastTick(ctx context.Context, db *pgx.Conn, r SlotRecord) (Tick, bool, error) {
	ticks, err := readTicks(ctx, db, "ORDER BY id DESC LIMIT 1", r.Name, r.SystemIdentifier)
	if err != nil || len(ticks) == 0 {
		return Tick{}, false, err
	}
	return ticks[0], true, nil
}

// TickAt returns the newest tick of this cluster and slot whose delivery to the destination ended at or before a sequence number and a
// position, or false when there is none.
func TickAt(ctx context.Context, db *pgx.Conn, r SlotRecord, destination string, seq uint64, position event.Position) (Tick, bool, error) {
	// Few are looked at: positions and sequence numbers of one stream rise together.
	ticks, err := readTicks(ctx, db, "AND destination = $3 AND stream_seq <= $4 ORDER BY id DESC", r.Name, r.SystemIdentifier, destination, int64(seq))
	if err != nil {
		return Tick{}, false, err
	}
	for _, t := range ticks {
		if t.Position.Compare(position) <= 0 {
			return t, true, nil
		}
	}
	return Tick{}, false, nil
}

// TickBefore returns the newest tick of this cluster and slot from before anything was delivered to the destination, or false when there is none.
func TickBefore(ctx context.Context, db *pgx.Conn, r SlotRecord, destination string) (Tick, bool, error) {
	ticks, err := readTicks(ctx, db, "AND id < (SELECT min(id) FROM ebb.tick WHERE slot = $1 AND destination = $3) ORDER BY id DESC LIMIT 1",
		r.Name, r.SystemIdentifier, destination)
	if err != nil || len(ticks) == 0 {
		return Tick{}, false, err
	}
	return ticks[0], true, nil
}

// HasDelivered reports whether anything of this cluster and slot was ever recorded as delivered to a destination.
func HasDelivered(ctx context.Context, db *pgx.Conn, r SlotRecord, destination string) (bool, error) {
	var ok bool
	err := db.QueryRow(ctx, "SELECT EXISTS (SELECT FROM ebb.tick WHERE slot = $1 AND system_identifier = $2 AND destination = $3)",
		r.Name, r.SystemIdentifier, destination).Scan(&ok)
	if err != nil {
		return false, fmt.Errorf("look for ticks of the destination: %w", withHint(err))
	}
	return ok, nil
}

func readTicks(ctx context.Context, db *pgx.Conn, rest string, args ...any) ([]Tick, error) {
	rows, err := db.Query(ctx, `SELECT id, lsn::text, snapshot::text, position, stream_seq, epoch, events, destination, delivered_at FROM ebb.tick
		WHERE slot = $1 AND system_identifier = $2 `+rest, args...)
	if err != nil {
		return nil, fmt.Errorf("read ticks: %w", withHint(err))
	}
	ticks, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (Tick, error) {
		var t Tick
		var lsn, position string
		var seq int64
		var epoch int32
		if err := row.Scan(&t.ID, &lsn, &t.Snapshot, &position, &seq, &epoch, &t.Events, &t.Destination, &t.DeliveredAt); err != nil {
			return Tick{}, err
		}
		t.StreamSeq, t.Epoch = uint64(seq), uint32(epoch)
		var err error
		if t.LSN, err = event.ParseLSN(lsn); err == nil {
			t.Position, err = event.ParsePosition(position)
		}
		return t, err
	})
	if err != nil {
		return nil, fmt.Errorf("read ticks: %w", withHint(err))
	}
	return ticks, nil
}
