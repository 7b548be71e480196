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
