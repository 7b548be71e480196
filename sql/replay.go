package sql

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"ebb/event"
)

// ErrReplayActive says that another replay has not ended.
var ErrReplayActive = errors.New("another replay has not ended")

// ReplayState is how far a replay has come.
type ReplayState string

const (
	// ReplayRequested waits for a bridge to take it up.
	ReplayRequested ReplayState = "requested"
	// ReplayRunning has an epoch, in which events are delivered again.
	ReplayRunning ReplayState = "running"
	// ReplayDone has delivered everything again.
	ReplayDone ReplayState = "done"
	// ReplayCancelled was ended by somebody.
	ReplayCancelled ReplayState = "cancelled"
	// ReplayFailed could not be begun, or not be ended; Detail says why.
	ReplayFailed ReplayState = "failed"
)

// Replay is a reset of the position: transactions that committed at or behind an LSN are delivered again.
type Replay struct {
	ID   int64
	Slot string
	From event.LSN
	// Place is the place as it was asked for.
	Place string
	// Events is how many events there were to deliver again when it was asked for, or 0 if they were not counted.
	Events      int64
	RequestedBy string
	RequestedAt time.Time
	State       ReplayState
	// Epoch is that of the events that are delivered again, and Through the last one of them as it was delivered before; zero until it runs.
	Epoch   uint32
	Through event.Position
	// Destination held everything up to Through, and Held is its sequence number by then, or 0 if it has none. Void says that it has forgotten some
	// of that since.
	Destination string
	Held        uint64
	Void        bool
	// Delivered is how many events were delivered since it began, the last of them at Position.
	Delivered          int64
	Position           event.Position
	StartedAt, EndedAt *time.Time
	Detail             string
}

// Active reports whether the replay has not ended.
func (r *Replay) Active() bool { return r.State == ReplayRequested || r.State == ReplayRunning }

// IsCutShort reports whether the replay ended before its end.
func (r *Replay) IsCutShort() bool { return r.State == ReplayCancelled || r.State == ReplayFailed }

// replayChannel is that of the notifications about replays; the payload is the slot.
const replayChannel = "ebb_replay"

// ListenForReplays has a session be notified when a replay is asked for or cancelled.
func ListenForReplays(ctx context.Context, db *pgx.Conn) error {
	if _, err := db.Exec(ctx, "LISTEN "+replayChannel); err != nil {
		return fmt.Errorf("listen for replays: %w", withHint(err))
	}
	return nil
}

// RequestReplay asks for a replay, and returns its id, or ErrReplayActive when there is one already.
func RequestReplay(ctx context.Context, db *pgx.Conn, slot string, from event.LSN, place string, events int64) (int64, error) {
	var id int64
	err := db.QueryRow(ctx, `WITH asked AS (INSERT INTO ebb.replay (slot, from_lsn, place, events) VALUES ($1, $2::text::pg_lsn, $3, $4) RETURNING id)
		SELECT id FROM asked, pg_notify('`+replayChannel+`', $1)`, slot, from.String(), place, events).Scan(&id)
	var pg *pgconn.PgError
	if errors.As(err, &pg) && pg.Code == "23505" { // unique_violation
		return 0, fmt.Errorf("ask for a replay of slot %q: %w; ebb status shows it, and ebb replay --cancel ends it", slot, ErrReplayActive)
	}
	if err != nil {
		return 0, fmt.Errorf("ask for a replay of slot %q: %w", slot, withHint(err))
	}
	return id, nil
}

// CancelReplay ends the replay that has not ended, and returns it, or false when there is none. What was delivered again by then stays
// delivered; what was not is not.
func CancelReplay(ctx context.Context, db *pgx.Conn, slot string) (Replay, bool, error) {
	var id int64
	err := db.QueryRow(ctx, `WITH cancelled AS (UPDATE ebb.replay SET state = 'cancelled', ended_at = clock_timestamp(), detail = 'by ' || session_user
			WHERE slot = $1 AND state IN ('requested', 'running') RETURNING id)
		SELECT id FROM cancelled, pg_notify('`+replayChannel+`', $1)`, slot).Scan(&id)
	if errors.Is(err, pgx.ErrNoRows) {
		return Replay{}, false, nil
	}
	if err != nil {
		return Replay{}, false, fmt.Errorf("cancel the replay of slot %q: %w", slot, withHint(err))
	}
	r, err := ReadReplay(ctx, db, id)
	return r, err == nil, err
}

// ReadReplay returns a replay.
func ReadReplay(ctx context.Context, db *pgx.Conn, id int64) (Replay, error) {
	replays, err := readReplays(ctx, db, "id = $1", id)
	if err == nil && len(replays) == 0 {
		err = fmt.Errorf("read replay %d: there is none", id)
	}
	if err != nil {
		return Replay{}, err
	}
	return replays[0], nil
}

// LastReplay returns the replay of a slot that was asked for last, or false.
func LastReplay(ctx context.Context, db *pgx.Conn, slot string) (Replay, bool, error) {
	replays, err := readReplays(ctx, db, "slot = $1 ORDER BY id DESC LIMIT 1", slot)
	if err != nil || len(replays) == 0 {
		return Replay{}, false, err
	}
	return replays[0], true, nil
}

// LastBegun returns the replay of a slot that was begun last, or false. Other epochs may have begun since.
func LastBegun(ctx context.Context, db *pgx.Conn, slot string) (Replay, bool, error) {
	replays, err := readReplays(ctx, db, "slot = $1 AND epoch IS NOT NULL ORDER BY id DESC LIMIT 1", slot)
	if err != nil || len(replays) == 0 {
		return Replay{}, false, err
	}
	return replays[0], true, nil
}

// ReplayRate returns how many events a second the last replay of some size delivered, or 0.
func ReplayRate(ctx context.Context, db *pgx.Conn, slot string) (float64, error) {
	var rate float64
	err := db.QueryRow(ctx, `SELECT coalesce((SELECT (delivered / greatest(extract(epoch FROM ended_at - started_at), 0.001))::float8 FROM ebb.replay
		WHERE slot = $1 AND state = 'done' AND delivered >= 1000 ORDER BY id DESC LIMIT 1), 0)`, slot).Scan(&rate)
	if err != nil {
		return 0, fmt.Errorf("read how fast the last replay was: %w", withHint(err))
	}
	return rate, nil
}

func readReplays(ctx context.Context, db *pgx.Conn, which string, args ...any) ([]Replay, error) {
	rows, err := db.Query(ctx, `SELECT id, slot, from_lsn::text, place, coalesce(events, 0), requested_by, requested_at, state, coalesce(epoch, 0),
		coalesce(through, ''), coalesce(destination, ''), coalesce(held_seq, 0), void, delivered, coalesce(position, ''), started_at, ended_at, coalesce(detail, '') FROM ebb.replay WHERE `+which, args...)
	if err != nil {
		return nil, fmt.Errorf("read replays: %w", withHint(err))
	}
	replays, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (Replay, error) {
		var r Replay
		var from, through, position string
		var epoch int32
		var held int64
		err := row.Scan(&r.ID, &r.Slot, &from, &r.Place, &r.Events, &r.RequestedBy, &r.RequestedAt, &r.State, &epoch, &through, &r.Destination, &held, &r.Void, &r.Delivered, &position,
			&r.StartedAt, &r.EndedAt, &r.Detail)
		if err != nil {
			return r, err
		}
		r.Epoch, r.Held = uint32(epoch), uint64(held)
		if r.From, err = event.ParseLSN(from); err != nil {
			return r, err
		}
		for _, p := range []struct {
			text string
			to   *event.Position
		}{{through, &r.Through}, {position, &r.Position}} {
			if p.text == "" {
				continue
			}
			if *p.to, err = event.ParsePosition(p.text); err != nil {
				return r, err
			}
		}
		return r, nil
	})
	if err != nil {
		return nil, fmt.Errorf("read replays: %w", withHint(err))
	}
	return replays, nil
}

// BeginReplay begins the epoch of a replay, and stores that the slot is to be reset for it. Through is the last event that was delivered, and seq
// the sequence number at which the destination held all that was.
func BeginReplay(ctx context.Context, db *pgx.Conn, r SlotRecord, id int64, epoch event.Epoch, through event.Position, destination string, seq uint64) error {
	return update(ctx, db, r, fmt.Sprintf("begin replay %d", id), `WITH slot AS (
			UPDATE ebb.slot SET epoch = $3, reset = true, made_because = $9
			WHERE name = $1 AND term = $2 AND EXISTS (SELECT FROM ebb.replay WHERE id = $4 AND state = 'requested' FOR UPDATE) RETURNING *
		), begun AS (
			UPDATE ebb.replay p SET state = 'running', epoch = $3, through = $5, destination = $7, held_seq = $8, started_at = clock_timestamp() FROM slot WHERE p.id = $4)
		INSERT INTO ebb.epoch (slot, epoch, from_lsn, system_identifier, timeline, reason, replay)
		SELECT name, epoch, $6::text::pg_lsn, system_identifier, timeline, $9, $4 FROM slot`,
		int32(epoch.Number), id, through.String(), epoch.From.String(), destination, int64(seq), BecauseOfReplay(id))
}

// BecauseOfReplay is why a slot is reset for a replay.
func BecauseOfReplay(id int64) string { return fmt.Sprintf("replay %d", id) }

// VoidReplay stores that the destination has forgotten some of what it held when a replay was begun.
func VoidReplay(ctx context.Context, db *pgx.Conn, r SlotRecord, id int64) error {
	return update(ctx, db, r, fmt.Sprintf("store what is forgotten from before replay %d", id), `WITH slot AS (
			SELECT name FROM ebb.slot WHERE name = $1 AND term = $2 FOR UPDATE)
		UPDATE ebb.replay SET void = true FROM slot WHERE slot = slot.name AND id = $3`, id)
}

// FailReplay stores that a replay cannot be begun or ended.
func FailReplay(ctx context.Context, db *pgx.Conn, id int64, detail string) error {
	if _, err := db.Exec(ctx, "UPDATE ebb.replay SET state = 'failed', ended_at = clock_timestamp(), detail = $2 WHERE id = $1 AND state IN ('requested', 'running')",
		id, detail); err != nil {
		return fmt.Errorf("store that replay %d has failed: %w", id, withHint(err))
	}
	return nil
}

// ReplayDelivered stores that n more events were delivered, the last of them at a position, and, if done, that the replay is.
func ReplayDelivered(ctx context.Context, db *pgx.Conn, id int64, n int64, position event.Position, done bool) error {
	if _, err := db.Exec(ctx, `UPDATE ebb.replay SET delivered = delivered + $2, position = $3,
			state = CASE WHEN $4 THEN 'done' ELSE state END, ended_at = CASE WHEN $4 THEN clock_timestamp() END
		WHERE id = $1 AND state = 'running'`, id, n, position.String(), done); err != nil {
		return fmt.Errorf("store how far replay %d has come: %w", id, withHint(err))
	}
	return nil
}

// BeginReset stores that the slot is to be dropped and copied from the trailing one, and why.
func BeginReset(ctx context.Context, db *pgx.Conn, r SlotRecord, because string) error {
	return update(ctx, db, r, "have the slot reset", "UPDATE ebb.slot SET reset = true, made_because = $3 WHERE name = $1 AND term = $2", because)
}

// AbandonReset stores that the slot stays as it is, which was to be reset, and that the replay for which it was, unless 0, has failed.
func AbandonReset(ctx context.Context, db *pgx.Conn, r SlotRecord, replay int64, detail string) error {
	return update(ctx, db, r, "leave the slot as it is", `WITH slot AS (
			UPDATE ebb.slot SET reset = false WHERE name = $1 AND term = $2 RETURNING name
		), failed AS (
			UPDATE ebb.replay SET state = 'failed', ended_at = clock_timestamp(), detail = $4 WHERE id = $3 AND state IN ('requested', 'running'))
		SELECT FROM slot`, replay, detail)
}

// EndReset stores that the slot is a copy of the trailing one now.
func EndReset(ctx context.Context, db *pgx.Conn, r SlotRecord) error {
	return update(ctx, db, r, "store that the slot is reset", "UPDATE ebb.slot SET reset = false, made = made + 1 WHERE name = $1 AND term = $2")
}
