package sql

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"ebb/event"
)

var (
	// ErrNoRecord says that ebb has no record of a slot.
	ErrNoRecord = errors.New("there is no record of the slot")
	// ErrNotMade says that a slot is to be made anew.
	ErrNotMade = errors.New("the slot is to be made anew")
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

// SlotRecord is what ebb knows of a slot that it made.
type SlotRecord struct {
	Name             string
	SystemIdentifier string
	Timeline         int32
	Epoch            uint32
	// Buffer is the identity of the buffer.
	Buffer string
	// RecoveredAfter is the tick that had recorded some of the rows which the slot does not hold, or 0.
	RecoveredAfter int64
	// RecoveredID is the last row that is known to be recovered, or 0; of a finished recovery it says nothing.
	RecoveredID int64
	// Recovered is how many events the recovery has delivered.
	Recovered int64
	// Made is false while the slot is being made: what there is of that name is another one.
	Made bool
	// Done says that all rows from before the slot are delivered.
	Done bool
	// CreatedAt is when the slot was made.
	CreatedAt time.Time
}

// remakeSlots says of every slot that it is to be made anew.
const remakeSlots = "UPDATE ebb.slot SET snapshot = NULL, consistent_point = NULL, recovered_at = NULL"

// PrepareSlot stores that a slot is about to be made. Until [RecordSlot], the record says that a slot of this name, if there is
// one, must be made anew: a slot cannot be made in one transaction with its record, and whoever is killed in between must
// not leave a slot that seems to be the recorded one.
//
// The epoch rises when the record was of another cluster or timeline, where the same LSN is another place.
func PrepareSlot(ctx context.Context, db *pgx.Conn, name, systemIdentifier string, timeline int32) error {
	_, err := db.Exec(ctx, `INSERT INTO ebb.slot AS s (name, system_identifier, timeline, epoch) VALUES ($1, $2, $3, 1)
		ON CONFLICT (name) DO UPDATE SET system_identifier = excluded.system_identifier, timeline = excluded.timeline,
			epoch = s.epoch + ((s.system_identifier, s.timeline) <> (excluded.system_identifier, excluded.timeline))::int,
			snapshot = NULL, consistent_point = NULL, recovered_at = NULL`, name, systemIdentifier, timeline)
	if err != nil {
		return fmt.Errorf("record that slot %q is being made: %w", name, withHint(err))
	}
	return nil
}

// OtherSlots returns the names of the slots that the buffer has beside one. Ticks of one slot say nothing of what another has
// delivered, so that there is to be none.
func OtherSlots(ctx context.Context, db *pgx.Conn, name string) ([]string, error) {
	rows, err := db.Query(ctx, "SELECT name FROM ebb.slot WHERE name <> $1 ORDER BY name", name)
	if err != nil {
		return nil, fmt.Errorf("look for other slots: %w", withHint(err))
	}
	names, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, fmt.Errorf("look for other slots: %w", withHint(err))
	}
	return names, nil
}

// RecordSlot stores that a prepared slot was made. From here on, the rows that its snapshot sees and that the newest tick has
// not recorded are to be delivered from the table.
func RecordSlot(ctx context.Context, db *pgx.Conn, name, snapshot string, consistentPoint event.LSN) error {
	tag, err := db.Exec(ctx, `UPDATE ebb.slot s SET snapshot = $2::text::pg_snapshot, consistent_point = $3::text::pg_lsn, created_at = clock_timestamp(),
			recovered_id = NULL, recovered_events = 0,
			recovered_after = (SELECT max(id) FROM ebb.tick WHERE slot = s.name AND system_identifier = s.system_identifier)
		WHERE name = $1`, name, snapshot, consistentPoint.String())
	if err != nil {
		return fmt.Errorf("record slot %q: %w", name, withHint(err))
	}
	if tag.RowsAffected() != 1 {
		return fmt.Errorf("record slot %q: %w", name, ErrNoRecord)
	}
	return nil
}

// ReadSlot returns the record of a slot, or ErrNoRecord.
func ReadSlot(ctx context.Context, db *pgx.Conn, name string) (SlotRecord, error) {
	r := SlotRecord{Name: name}
	err := db.QueryRow(ctx, `SELECT (SELECT id::text FROM ebb.identity), system_identifier, timeline, epoch, coalesce(recovered_after, 0), coalesce(recovered_id, 0), recovered_events,
			snapshot IS NOT NULL, recovered_at IS NOT NULL, created_at
		FROM ebb.slot WHERE name = $1`, name).
		Scan(&r.Buffer, &r.SystemIdentifier, &r.Timeline, &r.Epoch, &r.RecoveredAfter, &r.RecoveredID, &r.Recovered, &r.Made, &r.Done, &r.CreatedAt)
	if errors.Is(err, pgx.ErrNoRows) {
		return SlotRecord{}, fmt.Errorf("slot %q: %w", name, ErrNoRecord)
	}
	if err != nil {
		return SlotRecord{}, fmt.Errorf("read the record of slot %q: %w", name, withHint(err))
	}
	return r, nil
}

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

// Backlog is what is not recorded as delivered.
type Backlog struct {
	Events int64
	// Estimated says that there are at least Events.
	Estimated bool
	// OldestAge is the age of the oldest event, or 0 when there is none.
	OldestAge time.Duration
}

// maxCounted is how far [ReadBacklog] counts.
const maxCounted = 1_000_000

// ReadBacklog counts the events that are not recorded as delivered.
func ReadBacklog(ctx context.Context, db *pgx.Conn) (Backlog, error) {
	var b Backlog
	var age float64
	err := db.QueryRow(ctx, `SELECT count(*), coalesce(extract(epoch FROM max(age)), 0)::float8
		FROM (SELECT age FROM ebb.backlog ORDER BY id LIMIT $1) b`, maxCounted).Scan(&b.Events, &age)
	if err != nil {
		return Backlog{}, fmt.Errorf("count the backlog: %w", withHint(err))
	}
	b.Estimated = b.Events == maxCounted
	b.OldestAge = time.Duration(age * float64(time.Second))
	return b, nil
}
