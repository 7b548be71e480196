package sql

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

var (
	// ErrNoDeadEvent says that none of the dead letters has an id.
	ErrNoDeadEvent = errors.New("there is no such dead letter")
	// ErrDiscarded says that an event is never to be delivered.
	ErrDiscarded = errors.New("it is discarded")
)

// DeadEventState is what becomes of an event that was set aside.
type DeadEventState string

const (
	// DeadParked waits for an operator.
	DeadParked DeadEventState = "parked"
	// DeadRetrying is delivered by the bridge as soon as it can.
	DeadRetrying DeadEventState = "retrying"
	// DeadDelivered was delivered out of turn.
	DeadDelivered DeadEventState = "delivered"
	// DeadDiscarded is never delivered.
	DeadDiscarded DeadEventState = "discarded"
)

// DeadEventStates are all states.
var DeadEventStates = []DeadEventState{DeadParked, DeadRetrying, DeadDelivered, DeadDiscarded}

// DeadEvent is a row of ebb.dead_letter.
type DeadEvent struct {
	Number  int64   `json:"number"`
	EventID string  `json:"event_id"`
	Topic   string  `json:"topic"`
	Key     *string `json:"key"`
	// Payload is JSON, or null where the payload is not, which PayloadBytes holds then.
	Payload      json.RawMessage `json:"payload"`
	PayloadBytes []byte          `json:"payload_bytes"`
	ContentType  string          `json:"content_type"`
	// Headers is an object of strings, or null.
	Headers   json.RawMessage `json:"headers"`
	EventTime time.Time       `json:"event_time"`
	Position  string          `json:"position"`
	// Fault says why its row made no event, or is null.
	Fault    *string        `json:"fault"`
	Reason   string         `json:"reason"`
	Detail   string         `json:"detail"`
	Attempts int            `json:"attempts"`
	FirstAt  time.Time      `json:"first_at"`
	LastAt   time.Time      `json:"last_at"`
	State    DeadEventState `json:"state"`
	// StreamSeq is where in Destination it is stored, if it was delivered from here and the destination numbers what it stores.
	StreamSeq   *int64  `json:"stream_seq"`
	Destination *string `json:"destination"`
	// DecidedBy asked at DecidedAt for it to be retried or discarded.
	DecidedBy *string    `json:"decided_by"`
	DecidedAt *time.Time `json:"decided_at"`
	// QueuePlace is its place, from 1, among the QueueLength events of its queue, or null if it is in none any more.
	QueuePlace  *int64 `json:"queue_place"`
	QueueLength *int64 `json:"queue_length"`
}

// DeadFilter says which dead letters are meant: those that have one of each list which is not empty, and were last sent or set aside at Since or
// later.
type DeadFilter struct {
	IDs, Topics, Keys, Reasons []string
	Since                      time.Time
}

// matches is true of the rows that a filter means, whose values are the parameters from $2 to $6.
const matches = `((cardinality($2::text[]) = 0 OR event_id = ANY ($2)) AND (cardinality($3::text[]) = 0 OR topic = ANY ($3))
	AND (cardinality($4::text[]) = 0 OR coalesce(key = ANY ($4), false))
	AND (cardinality($5::text[]) = 0 OR EXISTS (SELECT FROM unnest($5::text[]) r WHERE strpos(lower(reason), lower(r)) > 0))
	AND ($6::timestamptz IS NULL OR last_at >= $6))`

// args are the parameters of a statement with matches.
func (f *DeadFilter) args(slot string, more ...any) []any {
	list := func(l []string) []string {
		if l == nil {
			return []string{} // nil would be NULL
		}
		return l
	}
	var since *time.Time
	if !f.Since.IsZero() {
		since = &f.Since
	}
	return append([]any{slot, list(f.IDs), list(f.Topics), list(f.Keys), list(f.Reasons), since}, more...)
}

// CheckDead checks that the schema is there, and that the session's role may see the dead letters.
func CheckDead(ctx context.Context, db *pgx.Conn) error {
	if err := Check(ctx, db); err != nil {
		return deadError(db, "look at the dead letters", err)
	}
	if _, err := db.Exec(ctx, "SELECT FROM ebb.dead_letter LIMIT 0"); err != nil {
		return deadError(db, "look at the dead letters", err)
	}
	return nil
}

// deadError says what is needed of the role.
func deadError(db *pgx.Conn, step string, err error) error {
	var pg *pgconn.PgError
	switch {
	case errors.As(err, &pg) && pg.Code == "42501": // insufficient_privilege
		return fmt.Errorf("%s: role %q has not the rights of ebb_bridge, which sees and decides about them: GRANT ebb_bridge TO %s: %w",
			step, db.Config().User, quoteIdent(db.Config().User), pg)
	case errors.As(err, &pg) && pg.Code == "55P03": // lock_not_available
		return fmt.Errorf("%s: another session has held locks on ebb.dead_letter for %s; try again: %w", step, deadLockTimeout, pg)
	}
	return fmt.Errorf("%s: %w", step, withHint(err))
}

// ListDead calls each with the dead letters that a filter means, those that were sent or set aside last first, and at most limit of them unless that
// is 0. Without states it gives the head of each queue that has an event which is meant, otherwise all events in one of the states. It returns how many
// there are without the limit, and how many are in the queues of the heads.
func ListDead(ctx context.Context, db *pgx.Conn, slot string, f DeadFilter, states []DeadEventState, limit int, each func(*DeadEvent) error) (n, behind int64, err error) {
	const step = "list the dead letters"
	words := []string{} // nil would be NULL
	looked := queued    // which has an index
	for _, s := range states {
		words = append(words, string(s))
		if s == DeadDelivered || s == DeadDiscarded {
			looked = "(" + queued + " OR state = ANY ($7::text[]))"
		}
	}
	// The totals come first, and are there where no row is.
	rows, err := db.Query(ctx, `WITH letter AS (
			SELECT number, state, `+matches+` AS meant, row_number() OVER (queue ORDER BY number) AS nth, count(*) OVER queue AS length,
				bool_or(`+matches+`) OVER queue AS queue_meant
			FROM ebb.dead_letter WHERE slot = $1 AND `+looked+`
			WINDOW queue AS (PARTITION BY key, CASE WHEN key IS NULL OR NOT `+queued+` THEN number END)
		), chosen AS (
			SELECT number, nth, length FROM letter
			WHERE CASE WHEN cardinality($7::text[]) = 0 THEN nth = 1 AND queue_meant ELSE meant AND state = ANY ($7) END
		), total AS (
			SELECT count(*) AS n, coalesce(sum(length), 0)::bigint AS queued FROM chosen
		), shown AS (
			SELECT c.nth, c.length, d.* FROM chosen c JOIN ebb.dead_letter d USING (number) ORDER BY d.last_at DESC, d.number LIMIT nullif($8::bigint, 0)
		)
		SELECT t.n, t.queued, coalesce(s.number, 0), coalesce(s.event_id, ''), coalesce(s.topic, ''), s.key, s.payload::text, s.payload_bytes,
			coalesce(s.content_type, ''), s.headers::text, coalesce(s.event_time, 'epoch'), coalesce(s.position, ''), s.fault, coalesce(s.reason, ''),
			coalesce(s.detail, ''), coalesce(s.attempts, 0), coalesce(s.first_at, 'epoch'), coalesce(s.last_at, 'epoch'), coalesce(s.state, ''), s.stream_seq,
			s.destination, s.decided_by, s.decided_at,
			CASE WHEN s.`+queued+` THEN s.nth END, CASE WHEN s.`+queued+` THEN s.length END
		FROM total t LEFT JOIN shown s ON true ORDER BY s.last_at DESC, s.number`, f.args(slot, words, limit)...)
	if err != nil {
		return 0, 0, deadError(db, step, err)
	}
	defer rows.Close()
	for rows.Next() {
		var d DeadEvent
		var payload, headers *string
		if err := rows.Scan(&n, &behind, &d.Number, &d.EventID, &d.Topic, &d.Key, &payload, &d.PayloadBytes, &d.ContentType, &headers, &d.EventTime, &d.Position,
			&d.Fault, &d.Reason, &d.Detail, &d.Attempts, &d.FirstAt, &d.LastAt, &d.State, &d.StreamSeq, &d.Destination, &d.DecidedBy, &d.DecidedAt,
			&d.QueuePlace, &d.QueueLength); err != nil {
			return 0, 0, fmt.Errorf("%s: %w", step, err)
		}
		if d.State == "" {
			continue // the totals alone
		}
		if payload != nil {
			d.Payload = json.RawMessage(*payload)
		}
		if headers != nil {
			d.Headers = json.RawMessage(*headers)
		}
		for _, t := range []*time.Time{&d.EventTime, &d.FirstAt, &d.LastAt, d.DecidedAt} {
			if t != nil {
				*t = t.UTC()
			}
		}
		if err := each(&d); err != nil {
			return 0, 0, err
		}
	}
	if err := rows.Err(); err != nil {
		return 0, 0, deadError(db, step, err)
	}
	return n, behind, nil
}

// QueueOf returns the ids of a key's queue, in order, at most limit of them.
func QueueOf(ctx context.Context, db *pgx.Conn, slot, key string, limit int) ([]string, error) {
	const step = "read the queue of a key"
	rows, err := db.Query(ctx, "SELECT event_id FROM ebb.dead_letter WHERE slot = $1 AND key = $2 AND "+queued+" ORDER BY number LIMIT $3", slot, key, limit)
	if err != nil {
		return nil, deadError(db, step, err)
	}
	ids, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, deadError(db, step, err)
	}
	return ids, nil
}

// CountDead returns how many events wait for an operator, and how many for the bridge.
func CountDead(ctx context.Context, db *pgx.Conn, slot string) (parked, retrying int64, err error) {
	err = db.QueryRow(ctx, "SELECT count(*) FILTER (WHERE state = 'parked'), count(*) FILTER (WHERE state = 'retrying') FROM ebb.dead_letter WHERE slot = $1 AND "+
		queued, slot).Scan(&parked, &retrying)
	if err != nil {
		return 0, 0, deadError(db, "count the dead letters", err)
	}
	return parked, retrying, nil
}

// deadLockTimeout is how long a decision waits for the bridge, which holds locks on the table for a moment, and for how long it may hold it up
// when its process is stopped.
const deadLockTimeout = 10 * time.Second

// decide runs a decision about dead letters. Nobody else writes to the table meanwhile: a letter that the bridge puts behind a queue must
// see the state that is decided for the queue, and a lock of the rows that are there says nothing to it.
func decide(ctx context.Context, db *pgx.Conn, slot, step string, do func(pgx.Tx) error) error {
	err := pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
		for _, setting := range []string{"lock_timeout", "idle_in_transaction_session_timeout"} {
			if _, err := tx.Exec(ctx, fmt.Sprintf("SET LOCAL %s = %d", setting, deadLockTimeout.Milliseconds())); err != nil {
				return err
			}
		}
		if _, err := tx.Exec(ctx, "LOCK TABLE ebb.dead_letter IN SHARE ROW EXCLUSIVE MODE"); err != nil {
			return err
		}
		if err := do(tx); err != nil {
			return err
		}
		_, err := tx.Exec(ctx, "SELECT pg_notify('"+deadChannel+"', $1)", slot)
		return err
	})
	if err != nil {
		return deadError(db, step, err)
	}
	return nil
}

// DeadRetry is what is retried.
type DeadRetry struct {
	// Numbers are those of all events that are retried, in order, of which Asked are meant by the filter, in Queues.
	Numbers       []int64
	Asked, Queues int64
	// Delivered are the ids among those asked for of events that are delivered already.
	Delivered []string
}

// RetryDead has the bridge deliver the queues that have an event which is meant. If there are no dead letters of an id, that is ErrNoDeadEvent, if one is
// discarded, ErrDiscarded, and nothing is changed.
func RetryDead(ctx context.Context, db *pgx.Conn, slot string, f DeadFilter) (DeadRetry, error) {
	var r DeadRetry
	err := decide(ctx, db, slot, "retry dead letters", func(tx pgx.Tx) error {
		var err error
		if r.Delivered, err = settled(ctx, tx, slot, f, true); err != nil {
			return err
		}
		rows, err := tx.Query(ctx, `SELECT number, meant, head FROM (
				SELECT number, `+matches+` AS meant, bool_or(`+matches+`) OVER queue AS queue_meant, row_number() OVER (queue ORDER BY number) = 1 AS head
				FROM ebb.dead_letter WHERE slot = $1 AND `+queued+`
				WINDOW queue AS (PARTITION BY key, CASE WHEN key IS NULL THEN number END)
			) q WHERE queue_meant ORDER BY number`, f.args(slot)...)
		if err != nil {
			return err
		}
		var number int64
		var meant, head bool
		_, err = pgx.ForEachRow(rows, []any{&number, &meant, &head}, func() error {
			r.Numbers = append(r.Numbers, number)
			if meant {
				r.Asked++
			}
			if head {
				r.Queues++
			}
			return nil
		})
		if err != nil {
			return err
		}
		return setDead(ctx, tx, r.Numbers, DeadRetrying)
	})
	return r, err
}

// setDead sets the state of events by their numbers.
func setDead(ctx context.Context, tx pgx.Tx, numbers []int64, state DeadEventState) error {
	_, err := tx.Exec(ctx, "UPDATE ebb.dead_letter SET state = $2, decided_by = session_user, decided_at = clock_timestamp() WHERE number = ANY ($1)", numbers, string(state))
	return err
}

// settled looks for what cannot be decided any more of the ids that are asked for, and returns those of events that are delivered.
func settled(ctx context.Context, db interface {
	Query(ctx context.Context, sql string, args ...any) (pgx.Rows, error)
}, slot string, f DeadFilter, toRetry bool) ([]string, error) {
	if len(f.IDs) == 0 {
		return nil, nil
	}
	rows, err := db.Query(ctx, `SELECT asked, coalesce(array_agg(state) FILTER (WHERE state IS NOT NULL), '{}')
		FROM unnest($2::text[]) WITH ORDINALITY a (asked, n) LEFT JOIN ebb.dead_letter ON slot = $1 AND event_id = asked AND `+matches+`
		GROUP BY asked ORDER BY min(n)`, f.args(slot)...)
	if err != nil {
		return nil, err
	}
	var delivered []string
	var id string
	var states []DeadEventState
	_, err = pgx.ForEachRow(rows, []any{&id, &states}, func() error {
		switch {
		case len(states) == 0:
			return fmt.Errorf("event %q: %w; ebb dead list --state all prints all there are", id, ErrNoDeadEvent)
		case slices.Contains(states, DeadParked) || slices.Contains(states, DeadRetrying):
			return nil
		case slices.Contains(states, DeadDelivered):
			delivered = append(delivered, id)
			return nil
		case toRetry:
			return fmt.Errorf("event %q: %w, and is never delivered", id, ErrDiscarded)
		}
		return nil
	})
	return delivered, err
}

// DeadChoice is what may be discarded.
type DeadChoice struct {
	// Events are those that are meant and not settled yet, in order; of each there are its number, id, topic and key.
	Events []DeadEvent
	// Delivered are the ids among those asked for of events that are delivered already.
	Delivered []string
}

// Numbers are those of the events.
func (c *DeadChoice) Numbers() []int64 {
	numbers := make([]int64, len(c.Events))
	for i := range c.Events {
		numbers[i] = c.Events[i].Number
	}
	return numbers
}

// ChooseDead returns what a filter means. If there are no dead letters of an id, that is ErrNoDeadEvent.
func ChooseDead(ctx context.Context, db *pgx.Conn, slot string, f DeadFilter) (DeadChoice, error) {
	const step = "choose dead letters"
	var c DeadChoice
	var err error
	if c.Delivered, err = settled(ctx, db, slot, f, false); err != nil {
		return DeadChoice{}, deadError(db, step, err)
	}
	rows, err := db.Query(ctx, "SELECT number, event_id, topic, key FROM ebb.dead_letter WHERE slot = $1 AND "+queued+" AND "+matches+" ORDER BY number", f.args(slot)...)
	if err != nil {
		return DeadChoice{}, deadError(db, step, err)
	}
	c.Events, err = pgx.CollectRows(rows, func(row pgx.CollectableRow) (d DeadEvent, err error) {
		err = row.Scan(&d.Number, &d.EventID, &d.Topic, &d.Key)
		return d, err
	})
	if err != nil {
		return DeadChoice{}, deadError(db, step, err)
	}
	return c, nil
}

// DeadDiscard is what came of the events that were to be discarded.
type DeadDiscard struct {
	// Discarded is how many there are, and Freed how many events behind them are delivered now.
	Discarded, Freed int64
	// Delivered are the ids of those that were delivered in the meantime.
	Delivered []string
	// Gone is how many are discarded by somebody else, or have moved, as their events came by again in a replay.
	Gone int64
}

// DiscardDead discards events by their numbers. Where the head of a queue is among them, and the next event there is kept because of that alone, the
// bridge delivers what is left of the queue.
func DiscardDead(ctx context.Context, db *pgx.Conn, slot string, numbers []int64) (DeadDiscard, error) {
	var r DeadDiscard
	err := decide(ctx, db, slot, "discard dead letters", func(tx pgx.Tx) error {
		rows, err := tx.Query(ctx, "SELECT event_id FROM ebb.dead_letter WHERE slot = $1 AND number = ANY ($2) AND state = 'delivered' ORDER BY number", slot, numbers)
		if err != nil {
			return err
		}
		if r.Delivered, err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil {
			return err
		}
		rows, err = tx.Query(ctx, `SELECT number, CASE WHEN number = head THEN key END FROM (
				SELECT number, key, min(number) OVER (PARTITION BY key) AS head FROM ebb.dead_letter WHERE slot = $1 AND `+queued+`
			) q WHERE number = ANY ($2)`, slot, numbers)
		if err != nil {
			return err
		}
		var number int64
		var key *string
		var discarded []int64
		var headless []string
		_, err = pgx.ForEachRow(rows, []any{&number, &key}, func() error {
			discarded = append(discarded, number)
			if key != nil {
				headless = append(headless, *key)
			}
			return nil
		})
		if err != nil {
			return err
		}
		r.Discarded = int64(len(discarded))
		r.Gone = int64(len(numbers)-len(r.Delivered)) - r.Discarded
		if err := setDead(ctx, tx, discarded, DeadDiscarded); err != nil {
			return err
		}
		rows, err = tx.Query(ctx, `SELECT number FROM (
				SELECT number, state, first_value(reason) OVER (PARTITION BY key ORDER BY number) AS reason
				FROM ebb.dead_letter WHERE slot = $1 AND `+queued+` AND key = ANY ($2)
			) q WHERE state = 'parked' AND reason = 'queued'`, slot, headless)
		if err != nil {
			return err
		}
		freed, err := pgx.CollectRows(rows, pgx.RowTo[int64])
		if err != nil {
			return err
		}
		r.Freed = int64(len(freed))
		return setDead(ctx, tx, freed, DeadRetrying)
	})
	return r, err
}

// DeadDone is what came of an event that was retried.
type DeadDone struct {
	Number int64
	// State is that of the event, or "" if it has moved, as it came by again in a replay, or was removed long after its delivery.
	State   DeadEventState
	EventID string
	Key     *string
	// Reason and Detail say why it is parked.
	Reason, Detail string
}

// RetriedDead returns what came of those of the events with these numbers that are not being retried any more.
func RetriedDead(ctx context.Context, db *pgx.Conn, numbers []int64) ([]DeadDone, error) {
	const step = "look at what is retried"
	rows, err := db.Query(ctx, `SELECT n, coalesce(d.state, ''), coalesce(d.event_id, ''), d.key, coalesce(d.reason, ''), coalesce(d.detail, '')
		FROM unnest($1::bigint[]) n LEFT JOIN ebb.dead_letter d ON d.number = n WHERE d.state IS DISTINCT FROM 'retrying' ORDER BY n`, numbers)
	if err != nil {
		return nil, deadError(db, step, err)
	}
	done, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (d DeadDone, err error) {
		err = row.Scan(&d.Number, &d.State, &d.EventID, &d.Key, &d.Reason, &d.Detail)
		return d, err
	})
	if err != nil {
		return nil, deadError(db, step, err)
	}
	return done, nil
}
