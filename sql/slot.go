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
	ErrNoRecord = errors.New("there is no record of the slot; run ebb setup")
	// ErrNotMade says that a slot is to be made anew.
	ErrNotMade = errors.New("the slot is to be made anew")
	// ErrSuperseded says that another bridge has taken the lead, so that this one may record nothing any more.
	ErrSuperseded = errors.New("another bridge has taken the lead")
)

// SlotRecord is what ebb knows of a slot that it made.
type SlotRecord struct {
	Name             string
	SystemIdentifier string
	Timeline         int32
	// Epochs are never empty.
	Epochs event.Epochs
	// Buffer is the identity of the buffer.
	Buffer string
	// Term is that of the bridge that took the lead last. What a bridge records is refused when its term is over.
	Term int64
	// Publication is the mark of the publication as it was when the slot was made; see [Publication].
	Publication string

	// ConsistentPoint is where it begins, when it was made; what was before that was delivered from the tables. A reset does not change it.
	ConsistentPoint event.LSN
	// Made is false while the slot is being made: what there is of that name is another one.
	Made bool
	// MadeTimes is how often it was made, the last time at CreatedAt because of MadeBecause.
	MadeTimes   int
	MadeBecause string
	CreatedAt   time.Time

	// Done says that all rows from before the slot are delivered.
	Done bool
	// RecoveredAfter is the tick that had recorded some of the rows which the slot does not hold, or 0.
	RecoveredAfter int64
	// RecoveredID is the last row that is known to be recovered, or 0; of a finished recovery it says nothing.
	RecoveredID int64
	// RecoveredSeq is the last sequence number of the destination that is known to the recovery, or 0.
	RecoveredSeq uint64
	// Recovered is how many events the recovery has delivered.
	Recovered int64
	// Destination is where the recovery delivers, or "" before it began.
	Destination string
	// Diverged says that the destination may hold events of the same ids that this database never had.
	Diverged bool
	// Reset says that the slot is to be dropped and copied from the trailing one, as the position is to go back.
	Reset bool
	// OwnPending says that rows of own tables from before the slot are to be delivered, in the snapshot with which it was made.
	OwnPending bool
	// TrailSeq is the sequence number in TrailDestination up to which everything was delivered that stands before TrailLSN. A trailing slot that is
	// ahead of that is another one.
	TrailLSN         event.LSN
	TrailSeq         uint64
	TrailDestination string
	// Adopted names the source, other than this one, whose stream is gone on with, or "".
	Adopted string
}

// distrusted are the ticks of a slot s that may have been stored while its publication was not what it seemed: the transaction that
// changed it is decoded a moment before a snapshot shows it, and long before if it waits for a synchronous standby. One that was stored
// before any transaction began that the newest tick does not see is true.
const distrusted = `DELETE FROM ebb.tick t USING (SELECT slot, max(id) AS id FROM ebb.tick GROUP BY slot) newest JOIN ebb.tick n ON n.id = newest.id
	WHERE t.slot = n.slot AND t.xid >= pg_snapshot_xmin(n.snapshot)`

// remakeSlots says of every slot that it is to be made anew, as its publication was changed.
const remakeSlots = `WITH distrusted AS (` + distrusted + `)
	UPDATE ebb.slot SET snapshot = NULL, consistent_point = NULL, recovered_at = NULL, made_because = 'its publication was made or mended'`

// PrepareSlot stores that a slot is about to be made, and why. Until [RecordSlot], the record says that a slot of this name, if
// there is one, must be made anew: a slot cannot be made in one transaction with its record, and whoever is killed in between must
// not leave a slot that seems to be the recorded one. It needs the term of the record, 0 if there is none, begins another and returns that.
//
// Rows that were restored from a dump carry transaction ids of another cluster, and no snapshot of this one would see some of them until it
// has come as far. They get the id of this transaction.
//
// The epoch rises when the record was of another cluster, where the same LSN is another place. A change of the timeline alone is
// left to the bridge, which can tell what was delivered on the old one.
func PrepareSlot(ctx context.Context, db *pgx.Conn, name, systemIdentifier string, timeline int32, term int64, publication, because string) (SlotRecord, error) {
	err := pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
		tag, err := tx.Exec(ctx, `INSERT INTO ebb.slot AS s (name, system_identifier, timeline, epoch, publication, made, made_because, term)
			VALUES ($1, $2, $3, 1, $4, 0, $5, 1)
			ON CONFLICT (name) DO UPDATE SET
				epoch = s.epoch + (s.system_identifier <> excluded.system_identifier)::int,
				timeline = CASE WHEN s.system_identifier = excluded.system_identifier THEN s.timeline ELSE excluded.timeline END,
				diverged = s.diverged OR s.system_identifier <> excluded.system_identifier,
				adopted = CASE WHEN s.system_identifier = excluded.system_identifier THEN s.adopted END, -- it came with a copy
				system_identifier = excluded.system_identifier, publication = excluded.publication, made_because = excluded.made_because,
				term = s.term + 1, snapshot = NULL, consistent_point = NULL, recovered_at = NULL, reset = false
			WHERE s.term = $6`,
			name, systemIdentifier, timeline, publication, because, term)
		if err != nil {
			return err
		}
		if tag.RowsAffected() == 0 {
			return ErrSuperseded
		}
		_, err = tx.Exec(ctx, `INSERT INTO ebb.epoch (slot, epoch, from_lsn, system_identifier, timeline, reason)
			SELECT name, epoch, '0/0', system_identifier, timeline, CASE WHEN epoch = 1 THEN 'setup' ELSE 'another cluster' END
			FROM ebb.slot WHERE name = $1 ON CONFLICT DO NOTHING`, name)
		if err != nil {
			return err
		}
		// A row of this cluster that the statement sees is of a transaction that its snapshot sees.
		_, err = tx.Exec(ctx, "UPDATE ebb.buffer SET xid = pg_current_xact_id() WHERE NOT pg_visible_in_snapshot(xid, pg_current_snapshot())")
		return err
	})
	if err != nil {
		return SlotRecord{}, fmt.Errorf("record that slot %q is being made: %w", name, withHint(err))
	}
	return ReadSlot(ctx, db, name)
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
// not recorded are to be delivered from the table; and if r says so, rows of own tables. If not, these have started with the slot.
func RecordSlot(ctx context.Context, db *pgx.Conn, r SlotRecord, snapshot string, consistentPoint event.LSN, own ...OwnTable) error {
	schemas, tables := ownNames(own)
	return update(ctx, db, r, fmt.Sprintf("record slot %q", r.Name), `WITH slot AS (UPDATE ebb.slot s SET
			snapshot = $3::text::pg_snapshot, consistent_point = $4::text::pg_lsn, created_at = clock_timestamp(), made = made + 1,
			recovered_id = NULL, recovered_seq = NULL, recovered_events = 0, destination = NULL, own_pending = $5,
			recovered_after = (SELECT max(id) FROM ebb.tick WHERE slot = s.name AND system_identifier = s.system_identifier)
		WHERE name = $1 AND term = $2 RETURNING *), `+fmt.Sprintf(startTables, "$6", "$7", "NOT slot.own_pending")+`
		SELECT FROM slot`, snapshot, consistentPoint.String(), r.OwnPending, schemas, tables)
}

// TakeTerm begins the term of a bridge that has taken the lead, and returns the record of its slot, or ErrNoRecord.
func TakeTerm(ctx context.Context, db *pgx.Conn, name string) (SlotRecord, error) {
	if _, err := db.Exec(ctx, "UPDATE ebb.slot SET term = term + 1 WHERE name = $1", name); err != nil {
		return SlotRecord{}, fmt.Errorf("begin a term on slot %q: %w", name, withHint(err))
	}
	return ReadSlot(ctx, db, name)
}

// ReadSlot returns the record of a slot, or ErrNoRecord.
func ReadSlot(ctx context.Context, db *pgx.Conn, name string) (SlotRecord, error) {
	r := SlotRecord{Name: name}
	var seq int64
	var numbers []int32
	var from []string
	var replays []bool
	var consistent, trail string
	var trailSeq int64
	err := db.QueryRow(ctx, `SELECT (SELECT id::text FROM ebb.identity), system_identifier, timeline, term, coalesce(publication, ''),
			coalesce(recovered_after, 0), coalesce(recovered_id, 0), coalesce(recovered_seq, 0), recovered_events,
			snapshot IS NOT NULL, recovered_at IS NOT NULL, made, coalesce(made_because, ''), created_at,
			coalesce(destination, ''), diverged, coalesce(adopted, ''), own_pending, reset, coalesce(consistent_point, '0/0')::text,
			coalesce(trail_lsn, '0/0')::text, coalesce(trail_seq, 0), coalesce(trail_destination, ''),
			ARRAY(SELECT replay IS NOT NULL FROM ebb.epoch WHERE slot = s.name ORDER BY epoch),
			ARRAY(SELECT epoch FROM ebb.epoch WHERE slot = s.name ORDER BY epoch),
			ARRAY(SELECT from_lsn::text FROM ebb.epoch WHERE slot = s.name ORDER BY epoch)
		FROM ebb.slot s WHERE name = $1`, name).
		Scan(&r.Buffer, &r.SystemIdentifier, &r.Timeline, &r.Term, &r.Publication, &r.RecoveredAfter, &r.RecoveredID, &seq, &r.Recovered,
			&r.Made, &r.Done, &r.MadeTimes, &r.MadeBecause, &r.CreatedAt, &r.Destination, &r.Diverged, &r.Adopted, &r.OwnPending, &r.Reset,
			&consistent, &trail, &trailSeq, &r.TrailDestination, &replays, &numbers, &from)
	if errors.Is(err, pgx.ErrNoRows) {
		return SlotRecord{}, fmt.Errorf("slot %q: %w", name, ErrNoRecord)
	}
	if err != nil {
		return SlotRecord{}, fmt.Errorf("read the record of slot %q: %w", name, withHint(err))
	}
	r.RecoveredSeq, r.TrailSeq = uint64(seq), uint64(trailSeq)
	if r.ConsistentPoint, err = event.ParseLSN(consistent); err != nil {
		return SlotRecord{}, fmt.Errorf("read the record of slot %q: %w", name, err)
	}
	if r.TrailLSN, err = event.ParseLSN(trail); err != nil {
		return SlotRecord{}, fmt.Errorf("read the record of slot %q: %w", name, err)
	}
	for i, n := range numbers {
		lsn, err := event.ParseLSN(from[i])
		if err != nil {
			return SlotRecord{}, fmt.Errorf("read the epochs of slot %q: %w", name, err)
		}
		r.Epochs = append(r.Epochs, event.Epoch{Number: uint32(n), From: lsn, Replay: replays[i]})
	}
	if len(r.Epochs) == 0 {
		return SlotRecord{}, fmt.Errorf("read the epochs of slot %q: there are none in ebb.epoch; run ebb setup", name)
	}
	return r, nil
}

// Raise is a new epoch, and what changes with it.
type Raise struct {
	Epoch            event.Epoch
	SystemIdentifier string
	Timeline         int32
	Reason           string
	// Remake says that the slot is to be made anew, Diverged that the destination may hold what this database never had.
	Remake, Diverged bool
	// Adopted is the source of the stream that is gone on with, if that is another one.
	Adopted string
}

// RaiseEpoch stores a new epoch.
func RaiseEpoch(ctx context.Context, db *pgx.Conn, r SlotRecord, to Raise) error {
	return update(ctx, db, r, fmt.Sprintf("raise the epoch to %d", to.Epoch.Number), `WITH slot AS (
			UPDATE ebb.slot SET epoch = $3, system_identifier = $4, timeline = $5, diverged = diverged OR $6,
				adopted = coalesce(nullif($7, ''), adopted),
				snapshot = CASE WHEN $8 THEN NULL ELSE snapshot END,
				consistent_point = CASE WHEN $8 THEN NULL ELSE consistent_point END,
				recovered_at = CASE WHEN $8 THEN NULL ELSE recovered_at END,
				made_because = CASE WHEN $8 THEN $9 ELSE made_because END
			WHERE name = $1 AND term = $2 RETURNING *)
		INSERT INTO ebb.epoch (slot, epoch, from_lsn, system_identifier, timeline, reason)
		SELECT name, epoch, $10::text::pg_lsn, system_identifier, timeline, $9 FROM slot`,
		int32(to.Epoch.Number), to.SystemIdentifier, to.Timeline, to.Diverged, to.Adopted, to.Remake, to.Reason, to.Epoch.From.String())
}

// Rewind takes back the ticks behind one, 0 for all of them, because the destination has forgotten what they recorded. Unless the
// slot still holds all of that, or is to be reset, as the trailing slot does, it is to be made anew; of one whose recovery is not done, the
// recovery begins anew.
func Rewind(ctx context.Context, db *pgx.Conn, r SlotRecord, tick int64, slotHolds, reset bool, because string) error {
	return update(ctx, db, r, fmt.Sprintf("take back the ticks behind %d", tick), `WITH slot AS (
			UPDATE ebb.slot SET
				snapshot = CASE WHEN $4 OR recovered_at IS NULL THEN snapshot END,
				consistent_point = CASE WHEN $4 OR recovered_at IS NULL THEN consistent_point END,
				recovered_at = CASE WHEN $4 THEN recovered_at END,
				recovered_after = CASE WHEN recovered_at IS NULL THEN nullif($3, 0) ELSE recovered_after END,
				recovered_id = NULL, recovered_seq = NULL, reset = reset OR $6,
				made_because = CASE WHEN $6 OR NOT $4 AND recovered_at IS NOT NULL THEN $5 ELSE made_because END
			WHERE name = $1 AND term = $2 RETURNING name
		), taken AS (
			DELETE FROM ebb.tick t USING slot WHERE t.slot = slot.name AND t.id > $3)
		SELECT FROM slot`, tick, slotHolds || reset, because, reset)
}

// RemakeSlot stores that a slot is to be made anew. If its publication was changed, ticks that may be false because of that are taken back.
func RemakeSlot(ctx context.Context, db *pgx.Conn, r SlotRecord, because string, publicationChanged bool) error {
	return update(ctx, db, r, "have the slot made anew", `WITH slot AS (
			UPDATE ebb.slot SET snapshot = NULL, consistent_point = NULL, recovered_at = NULL, made_because = $3
			WHERE name = $1 AND term = $2 RETURNING name
		), distrusted AS (`+distrusted+` AND $4 AND t.slot IN (SELECT name FROM slot))
		SELECT FROM slot`, because, publicationChanged)
}

// update runs a statement about the slot in parameter 1, which applies in the term in parameter 2 alone.
func update(ctx context.Context, db *pgx.Conn, r SlotRecord, step, statement string, args ...any) error {
	tag, err := db.Exec(ctx, statement, append([]any{r.Name, r.Term}, args...)...)
	if err != nil {
		return fmt.Errorf("%s: %w", step, withHint(err))
	}
	if tag.RowsAffected() == 0 {
		return fmt.Errorf("%s: %w", step, ErrSuperseded)
	}
	return nil
}
