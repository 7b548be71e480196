package sql

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"ebb/event"
)

// Letter is an event that is to be kept in the dead letters.
type Letter struct {
	ID, Topic string
	// Key is nil if there is none.
	Key         *string
	Payload     []byte
	ContentType string
	// Headers is a JSON object of strings, or nil.
	Headers  []byte
	Time     time.Time
	Position event.Position
	Replay   int64
	// Fault is that of the event, or "".
	Fault string

	Reason, Detail string
	Attempts       int
	// FirstAt and LastAt are now if they are zero.
	FirstAt, LastAt time.Time
	// Retry says that it is retrying and not parked, if there is no queue of its key whose state counts.
	Retry bool
}

// AppendPlace appends what stands in the column place: a position without its epoch.
func AppendPlace(b []byte, p event.Position) []byte {
	b = append(p.Commit.Append(b), ':')
	return strconv.AppendUint(b, p.Index, 10)
}

const (
	// deadChannel is that of the notifications that somebody has decided about dead letters; the payload is the slot.
	deadChannel = "ebb_dead"
	// queued is true of the rows that queues consist of.
	queued = "state IN ('parked', 'retrying')"
	// waitsOn is true of a row that waits, when its event comes by again and has to wait behind others.
	waitsOn = "excluded.reason = 'queued' AND d." + queued
	// mended is true of a row without a fault whose event comes by again with one, as it is in the log: somebody has mended the row, or the event was
	// sound under an earlier mapping.
	mended = "coalesce(d.fault, '') = '' AND excluded.fault IS NOT NULL"
	// term is that of the leader whose statement it is: no other one's applies, and none begins before it has ended.
	term = "slot AS (SELECT name FROM ebb.slot WHERE name = $1 AND term = $2 FOR SHARE)"
)

// ListenForDecisions has a session be notified when somebody has decided about dead letters, and returns the channel.
func ListenForDecisions(ctx context.Context, db *pgx.Conn) (channel string, err error) {
	if _, err := db.Exec(ctx, "LISTEN "+deadChannel); err != nil {
		return "", fmt.Errorf("listen for decisions about dead letters: %w", withHint(err))
	}
	return deadChannel, nil
}

// StoreLetters keeps events, in order, each behind those that are there of its key, whose state it gets. One that is there already, by its id and
// place, stays as it is, unless it is there from an earlier epoch and not discarded: then it has come by again, and goes to the end. What was mended
// in it stays even then. The error is ErrSuperseded when the record's term is over.
//
// What Postgres does not take as text or JSON is stored as bytes, or escaped.
func StoreLetters(ctx context.Context, db *pgx.Conn, r SlotRecord, letters []Letter) error {
	err := storeLetters(ctx, db, r, letters, asItIs)
	for form := inASCII; form <= inBytes && isOfData(err) && len(letters) == 1; form++ {
		err = storeLetters(ctx, db, r, letters, form)
	}
	if !isOfData(err) || len(letters) == 1 {
		return err
	}
	half := len(letters) / 2
	if err := StoreLetters(ctx, db, r, letters[:half]); err != nil {
		return err
	}
	return StoreLetters(ctx, db, r, letters[half:])
}

// isOfData reports whether an error is of what is stored, and comes whenever that is.
func isOfData(err error) bool {
	var pg *pgconn.PgError
	return errors.As(err, &pg) && (strings.HasPrefix(pg.Code, "22") || strings.HasPrefix(pg.Code, "54")) // data exception; program limit exceeded
}

// form is how a letter is stored.
type form int

const (
	asItIs form = iota
	// inASCII has text of receivers and headers in ASCII, for a database in an encoding that does not have all characters.
	inASCII
	// inBytes has the payload in bytes as well.
	inBytes
)

// storeLetters is StoreLetters in one statement.
func storeLetters(ctx context.Context, db *pgx.Conn, r SlotRecord, letters []Letter, as form) error {
	n := len(letters)
	var (
		ids, topics, types, positions, places = make([]string, 0, n), make([]string, 0, n), make([]string, 0, n), make([]string, 0, n), make([]string, 0, n)
		reasons, details, faults, states      = make([]string, 0, n), make([]string, 0, n), make([]string, 0, n), make([]string, 0, n)
		keys, payloads, headers               = make([]*string, 0, n), make([]*string, 0, n), make([]*string, 0, n)
		contents                              = make([][]byte, 0, n)
		times                                 = make([]time.Time, 0, n)
		firsts, lasts                         = make([]*time.Time, 0, n), make([]*time.Time, 0, n)
		epochs, attempts                      = make([]int32, 0, n), make([]int32, 0, n)
		replays                               = make([]int64, 0, n)
	)
	seen := make(map[[2]string]bool, n)
	first := map[string]string{} // the state of the first one of a key
	for i := range letters {
		l := &letters[i]
		place := string(AppendPlace(nil, l.Position))
		if seen[[2]string{l.ID, place}] {
			continue
		}
		seen[[2]string{l.ID, place}] = true
		var payload *string
		content := l.Payload
		if as < inBytes && l.ContentType == jsonType && isJSON(content) {
			text := string(content)
			payload, content = &text, nil
		} else if content == nil && l.Fault == "" {
			content = []byte{} // rather than no payload at all
		}
		state := "parked"
		if l.Retry {
			state = "retrying"
		}
		if l.Key != nil {
			if earlier, ok := first[*l.Key]; ok {
				state = earlier
			}
			first[*l.Key] = state
		}
		reason, detail, fault, object := clean(l.Reason), clean(l.Detail), clean(l.Fault), l.Headers
		if as >= inASCII {
			reason, detail, fault, object = toASCII(reason), toASCII(detail), toASCII(fault), escapeJSON(object)
		}
		var header *string
		if object != nil {
			text := string(object)
			header = &text
		}
		ids, topics, keys, payloads, contents = append(ids, l.ID), append(topics, l.Topic), append(keys, l.Key), append(payloads, payload), append(contents, content)
		types, headers, times = append(types, l.ContentType), append(headers, header), append(times, l.Time)
		positions, places, epochs = append(positions, l.Position.String()), append(places, place), append(epochs, int32(l.Position.Epoch))
		replays, reasons, details, faults, states = append(replays, l.Replay), append(reasons, reason), append(details, detail), append(faults, fault), append(states, state)
		attempts, firsts, lasts = append(attempts, int32(l.Attempts)), append(firsts, orNull(l.FirstAt)), append(lasts, orNull(l.LastAt))
	}
	return update(ctx, db, r, "store dead letters", `WITH `+term+`, l AS (
			SELECT * FROM unnest($3::text[], $4::text[], $5::text[], $6::text[], $7::bytea[], $8::text[], $9::text[], $10::timestamptz[], $11::text[],
				$12::text[], $13::integer[], $14::bigint[], $15::text[], $16::text[], $17::integer[], $18::timestamptz[], $19::timestamptz[], $20::text[], $21::text[])
				WITH ORDINALITY u (event_id, topic, key, payload, payload_bytes, content_type, headers, event_time, position, place, epoch, replay, reason,
				detail, attempts, first_at, last_at, state, fault, n)
		), stored AS (
			INSERT INTO ebb.dead_letter AS d (slot, event_id, topic, key, payload, payload_bytes, content_type, headers, event_time, position, place,
				epoch, replay, fault, reason, detail, attempts, first_at, last_at, state)
			SELECT slot.name, event_id, topic, key, payload::json, payload_bytes, content_type, headers::json, event_time, position, place,
				epoch, replay, nullif(fault, ''), reason, detail, attempts, coalesce(first_at, clock_timestamp()), coalesce(last_at, clock_timestamp()),
				coalesce((SELECT q.state FROM ebb.dead_letter q WHERE q.slot = slot.name AND left(q.key, 500) = left(l.key, 500) AND q.key = l.key
					AND q.`+queued+` ORDER BY q.number LIMIT 1), l.state)
			FROM slot, l ORDER BY l.n
			ON CONFLICT (slot, event_id, place) DO UPDATE SET
				(topic, payload, payload_bytes, content_type, headers, fault) = (
					SELECT d.topic, d.payload, d.payload_bytes, d.content_type, d.headers, d.fault WHERE `+mended+`
					UNION ALL
					SELECT excluded.topic, excluded.payload, excluded.payload_bytes, excluded.content_type, excluded.headers, excluded.fault
					WHERE NOT (`+mended+`)),
				-- The bridge holds the key of the row.
				number = DEFAULT, key = excluded.key, event_time = excluded.event_time, position = excluded.position, epoch = excluded.epoch, replay = excluded.replay,
				state = CASE WHEN (excluded.reason = 'queued' OR `+mended+`) AND d.`+queued+` AND (excluded.key IS NULL OR d.key IS DISTINCT FROM excluded.key)
					THEN d.state ELSE excluded.state END,
				stream_seq = NULL, destination = NULL, decided_by = NULL, decided_at = NULL,
				-- Why it waits does not change by that it has to wait behind others now.
				reason = CASE WHEN `+waitsOn+` THEN d.reason ELSE excluded.reason END,
				detail = CASE WHEN `+waitsOn+` THEN d.detail
					WHEN excluded.reason <> 'queued' AND `+mended+` THEN 'what is kept here is not what the row says, and can be retried as it is' ELSE excluded.detail END,
				attempts = CASE WHEN `+waitsOn+` THEN d.attempts ELSE excluded.attempts END,
				first_at = CASE WHEN `+waitsOn+` THEN d.first_at ELSE excluded.first_at END,
				last_at = CASE WHEN `+waitsOn+` THEN d.last_at ELSE excluded.last_at END
			WHERE d.epoch < excluded.epoch AND d.state <> 'discarded')
		SELECT FROM slot`,
		ids, topics, keys, payloads, contents, types, headers, times, positions, places, epochs, replays, reasons, details, attempts, firsts, lasts, states, faults)
}

// jsonType is the media type of JSON.
const jsonType = "application/json"

// isJSON reports whether text is JSON, as far as can be told without Postgres, whose stack may end earlier than that of encoding/json.
func isJSON(text []byte) bool { return utf8.Valid(text) && json.Valid(text) }

func orNull(t time.Time) *time.Time {
	if t.IsZero() {
		return nil
	}
	return &t
}

// clean makes text of a receiver what Postgres takes for text.
func clean(s string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(s, "\uFFFD"), "\x00", "\uFFFD")
}

func toASCII(s string) string {
	return strings.Map(func(r rune) rune {
		if r >= utf8.RuneSelf {
			return '?'
		}
		return r
	}, s)
}

// escapeJSON escapes what is outside ASCII in JSON.
func escapeJSON(text []byte) []byte {
	if text == nil {
		return nil
	}
	out := make([]byte, 0, len(text))
	for _, r := range string(text) {
		switch {
		case r < utf8.RuneSelf:
			out = append(out, byte(r))
		case r < 0x10000:
			out = fmt.Appendf(out, `\u%04x`, r)
		default:
			out = fmt.Appendf(out, `\u%04x\u%04x`, 0xD800+(r-0x10000)>>10, 0xDC00+(r-0x10000)&0x3FF)
		}
	}
	return out
}

// HeadersJSON returns headers as a JSON object, in their order, or nil if there are none.
func HeadersJSON(headers []event.Header) []byte {
	if len(headers) == 0 {
		return nil
	}
	var out bytes.Buffer
	encoder := json.NewEncoder(&out)
	encoder.SetEscapeHTML(false)
	for i, h := range headers {
		out.WriteByte("{,"[min(i, 1)])
		for j, part := range [][]byte{h.Name, h.Value} {
			if j == 1 {
				out.WriteByte(':')
			}
			if err := encoder.Encode(string(part)); err != nil {
				panic(err) // it is a string, and goes to memory
			}
			out.Truncate(out.Len() - 1) // the line's end
		}
	}
	out.WriteByte('}')
	return out.Bytes()
}

// FlushedLSN returns up to where the log is on the disk. Whatever this session has committed stands before that.
func FlushedLSN(ctx context.Context, db *pgx.Conn) (event.LSN, error) {
	var text string
	if err := db.QueryRow(ctx, "SELECT pg_current_wal_flush_lsn()::text").Scan(&text); err != nil {
		return 0, fmt.Errorf("read up to where the log is on the disk: %w", err)
	}
	return event.ParseLSN(text)
}

// HasStandby reports whether a standby may have copies of the slots: one that has a physical slot, without which the server synchronizes none.
func HasStandby(ctx context.Context, db *pgx.Conn) (bool, error) {
	var ok bool
	if err := db.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_replication_slots WHERE slot_type = 'physical')").Scan(&ok); err != nil {
		return false, fmt.Errorf("look for slots of standbys: %w", err)
	}
	return ok, nil
}

// Held is a key of which events are kept.
type Held struct {
	Key string
	// Retrying says that they are to be delivered.
	Retrying bool
}

// HeldKeys returns the keys of which events are kept. It takes as long as they are many, however many events there are of one.
func HeldKeys(ctx context.Context, db *pgx.Conn, slot string) ([]Held, error) {
	const step = "read the keys of dead letters"
	rows, err := db.Query(ctx, `WITH RECURSIVE p AS (
			(SELECT left(key, 500) AS prefix FROM ebb.dead_letter WHERE slot = $1 AND `+queued+` AND left(key, 500) IS NOT NULL
				ORDER BY left(key, 500) LIMIT 1)
			UNION ALL
			SELECT (SELECT left(d.key, 500) FROM ebb.dead_letter d WHERE d.slot = $1 AND d.`+queued+` AND left(d.key, 500) > p.prefix
				ORDER BY left(d.key, 500) LIMIT 1)
			FROM p WHERE p.prefix IS NOT NULL
		), k AS (
			SELECT prefix AS key FROM p WHERE length(prefix) < 500
			UNION ALL
			SELECT DISTINCT d.key FROM p JOIN ebb.dead_letter d ON left(d.key, 500) = p.prefix
			WHERE d.slot = $1 AND d.`+queued+` AND length(p.prefix) = 500
		)
		SELECT k.key, h.state = 'retrying' FROM k CROSS JOIN LATERAL (
			SELECT d.state FROM ebb.dead_letter d WHERE d.slot = $1 AND left(d.key, 500) = left(k.key, 500) AND d.key = k.key AND d.`+queued+`
			ORDER BY d.number LIMIT 1) h`, slot)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", step, withHint(err))
	}
	held, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (h Held, err error) {
		err = row.Scan(&h.Key, &h.Retrying)
		return h, err
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", step, withHint(err))
	}
	return held, nil
}

// AloneToRetry returns the numbers of events without a key that are to be delivered: at most limit, behind a number.
func AloneToRetry(ctx context.Context, db *pgx.Conn, slot string, after int64, limit int) ([]int64, error) {
	const step = "read the dead letters without a key"
	rows, err := db.Query(ctx, `SELECT number FROM ebb.dead_letter WHERE slot = $1 AND state = 'retrying' AND key IS NULL AND number > $2
		ORDER BY number LIMIT $3`, slot, after, limit)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", step, withHint(err))
	}
	numbers, err := pgx.CollectRows(rows, pgx.RowTo[int64])
	if err != nil {
		return nil, fmt.Errorf("%s: %w", step, withHint(err))
	}
	return numbers, nil
}

// PassedLetter is a kept event that may come by again.
type PassedLetter struct {
	ID       string
	Position event.Position
	// Discarded says that it is never to be delivered, and Alone that it waits, and has no key that is held.
	Discarded, Alone bool
}

// PassedLetters calls fn with the kept events of transactions that committed at or behind an LSN; if discarded, with those alone that are.
func PassedLetters(ctx context.Context, db *pgx.Conn, slot string, from event.LSN, discarded bool, fn func(PassedLetter)) error {
	const step = "read the dead letters that may come by again"
	rows, err := db.Query(ctx, `SELECT event_id, position, state = 'discarded', key IS NULL AND `+queued+` FROM ebb.dead_letter
		WHERE slot = $1 AND split_part(place, ':', 1)::pg_lsn >= $2::text::pg_lsn AND (state = 'discarded' OR NOT $3)`, slot, from.String(), discarded)
	if err != nil {
		return fmt.Errorf("%s: %w", step, withHint(err))
	}
	var p PassedLetter
	var position string
	_, err = pgx.ForEachRow(rows, []any{&p.ID, &position, &p.Discarded, &p.Alone}, func() (err error) {
		if p.Position, err = event.ParsePosition(position); err == nil {
			fn(p)
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("%s: %w", step, withHint(err))
	}
	return nil
}

// Queue names events that are kept: those of a key, or one without a key.
type Queue struct {
	// Key, unless nil, is that of the events; otherwise Number is that of the event.
	Key    *string
	Number int64
}

// KeptLetter is a kept event. Of its letter, what it is set aside for is left out.
type KeptLetter struct {
	Number int64
	Letter
}

// Next are the next events of a queue that are to be delivered.
type Next struct {
	// Read is false if they were not read, as those of the queues before it are as much as there is to be.
	Read bool
	// Letters are none if the queue is empty or parked.
	Letters []KeptLetter
	Parked  bool
}

// NextLetters returns, for each of the queues, the next events that are to be delivered: at most so many as most says, and of more than one about
// each bytes of content. In all of them are about all bytes.
func NextLetters(ctx context.Context, db *pgx.Conn, slot string, queues []Queue, most []int, each, all int) ([]Next, error) {
	const step = "read dead letters"
	keys, numbers, limits := make([]*string, len(queues)), make([]int64, len(queues)), make([]int32, len(queues))
	for i, q := range queues {
		keys[i], numbers[i], limits[i] = q.Key, q.Number, int32(most[i])
	}
	rows, err := db.Query(ctx, `SELECT n, coalesce(number, 0), coalesce(state, ''), coalesce(event_id, ''), coalesce(topic, ''), key, payload::text, payload_bytes,
			coalesce(content_type, ''), headers::text, coalesce(event_time, 'epoch'), coalesce(position, ''), coalesce(replay, 0),
			coalesce(fault, '')
		FROM (
			SELECT d.*, sum(size) OVER (PARTITION BY n ORDER BY number) - size AS before, sum(size) OVER (ORDER BY n, number) - size AS before_all
			FROM (
				SELECT q.n, d.*, coalesce(octet_length(d.payload::text), octet_length(d.payload_bytes), 0) AS size
				FROM unnest($2::text[], $3::bigint[], $4::integer[]) WITH ORDINALITY q (key, number, most, n) LEFT JOIN LATERAL (
					(SELECT * FROM ebb.dead_letter d WHERE d.slot = $1 AND left(d.key, 500) = left(q.key, 500) AND d.key = q.key AND d.`+queued+`
						ORDER BY d.number LIMIT q.most)
					UNION ALL
					SELECT * FROM ebb.dead_letter d WHERE q.key IS NULL AND d.slot = $1 AND d.number = q.number AND d.`+queued+`
				) d ON true
			) d
		) d
		WHERE before < $5 AND before_all < $6 ORDER BY n, number`, slot, keys, numbers, limits, each, all)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", step, withHint(err))
	}
	next := make([]Next, len(queues))
	var (
		n               int
		l               KeptLetter
		state, position string
		text, content   []byte
	)
	_, err = pgx.ForEachRow(rows, []any{&n, &l.Number, &state, &l.ID, &l.Topic, &l.Key, &text, &content, &l.ContentType, &l.Headers, &l.Time, &position, &l.Replay, &l.Fault}, func() error {
		q := &next[n-1]
		q.Read = true
		// Should somebody have changed the state of others than all of a queue, what is parked holds up what is behind it.
		if q.Parked = q.Parked || state == "parked"; q.Parked || state == "" {
			return nil
		}
		var err error
		if l.Position, err = event.ParsePosition(position); err != nil {
			return err
		}
		if l.Payload = content; text != nil {
			l.Payload = text
		}
		q.Letters = append(q.Letters, l)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", step, withHint(err))
	}
	for i := range next {
		next[i].Parked = next[i].Parked && len(next[i].Letters) == 0
	}
	return next, nil
}

// Attempt is what came of the delivery of a kept event.
type Attempt struct {
	Number int64
	// Key is nil if there is none.
	Key *string
	// Delivered says that it is, and Seq is where the destination stores that, or 0. Otherwise, the rest says why it is not.
	Delivered bool
	Seq       uint64
	// Rejected has it parked, and all behind it.
	Rejected       bool
	Reason, Detail string
	Attempts       int
}

// StoreAttempts stores what came of deliveries to a destination, of which there is one for each queue that has failed. One that was discarded meanwhile
// stays discarded.
func StoreAttempts(ctx context.Context, db *pgx.Conn, r SlotRecord, destination string, attempts []Attempt) error {
	err := storeAttempts(ctx, db, r, destination, attempts, clean)
	if isOfData(err) { // text of a receiver, which this database has no characters for
		return storeAttempts(ctx, db, r, destination, attempts, func(s string) string { return toASCII(clean(s)) })
	}
	return err
}

func storeAttempts(ctx context.Context, db *pgx.Conn, r SlotRecord, destination string, attempts []Attempt, clean func(string) string) error {
	var delivered, seqs, failed []int64
	var keys []*string
	var rejected []bool
	var reasons, details []string
	var times []int32
	for i := range attempts {
		a := &attempts[i]
		if a.Delivered {
			delivered, seqs = append(delivered, a.Number), append(seqs, int64(a.Seq))
			continue
		}
		failed, keys, rejected, times = append(failed, a.Number), append(keys, a.Key), append(rejected, a.Rejected), append(times, int32(a.Attempts))
		reasons, details = append(reasons, clean(a.Reason)), append(details, clean(a.Detail))
	}
	return update(ctx, db, r, "store what came of dead letters", `WITH `+term+`, delivered AS (
			UPDATE ebb.dead_letter d SET state = CASE d.state WHEN 'discarded' THEN 'discarded' ELSE 'delivered' END, attempts = d.attempts + 1,
				last_at = clock_timestamp(), stream_seq = nullif(u.seq, 0), destination = $3
			FROM slot, unnest($4::bigint[], $5::bigint[]) u (number, seq) WHERE d.number = u.number AND d.slot = slot.name
		), f AS (
			SELECT * FROM unnest($6::bigint[], $7::text[], $8::boolean[], $9::text[], $10::text[], $11::integer[])
				u (number, key, rejected, reason, detail, attempts)
		), failed AS (
			UPDATE ebb.dead_letter d SET attempts = d.attempts + f.attempts, last_at = clock_timestamp(), reason = coalesce(nullif(f.reason, ''), d.reason),
				detail = f.detail, state = CASE WHEN f.rejected AND d.state = 'retrying' THEN 'parked' ELSE d.state END
			FROM slot, f WHERE d.number = f.number AND d.slot = slot.name
		), parked AS (
			UPDATE ebb.dead_letter d SET state = 'parked' FROM slot, f
			WHERE f.rejected AND d.slot = slot.name AND left(d.key, 500) = left(f.key, 500) AND d.key = f.key AND d.`+queued+`
				AND d.number > f.number -- those before it are delivered
				-- If it was discarded while it was sent, nothing holds up the others.
				AND EXISTS (SELECT FROM ebb.dead_letter h WHERE h.number = f.number AND h.`+queued+`))
		SELECT FROM slot`, destination, delivered, seqs, failed, keys, rejected, reasons, details, times)
}

// HasLetters reports whether there are events that wait in the dead letters.
func HasLetters(ctx context.Context, db *pgx.Conn, slot string) (bool, error) {
	var ok bool
	if err := db.QueryRow(ctx, "SELECT EXISTS (SELECT FROM ebb.dead_letter WHERE slot = $1 AND "+queued+")", slot).Scan(&ok); err != nil {
		return false, fmt.Errorf("look for dead letters: %w", withHint(err))
	}
	return ok, nil
}

// CollectLetters removes events that were delivered longer than keep ago, at most limit of them, and returns how many. Those stay that may come by
// again, as the slot has not confirmed them, and those of a destination that may forget them without that a tick tells.
func CollectLetters(ctx context.Context, db *pgx.Conn, r SlotRecord, confirmed event.LSN, keep time.Duration, limit int) (int64, error) {
	tag, err := db.Exec(ctx, `WITH `+term+`, old AS (
			SELECT t.destination, max(t.stream_seq) AS seq FROM slot JOIN ebb.tick t ON t.slot = slot.name
			WHERE t.delivered_at < clock_timestamp() - make_interval(secs => $3) GROUP BY t.destination)
		DELETE FROM ebb.dead_letter WHERE number IN (
			SELECT d.number FROM slot JOIN ebb.dead_letter d ON d.slot = slot.name LEFT JOIN old ON old.destination = d.destination
			WHERE d.state = 'delivered' AND d.last_at < clock_timestamp() - make_interval(secs => $3) AND split_part(d.place, ':', 1)::pg_lsn < $4::text::pg_lsn
				AND (d.stream_seq IS NULL OR d.stream_seq <= old.seq)
			LIMIT $5)`, r.Name, r.Term, keep.Seconds(), confirmed.String(), limit)
	if err != nil {
		return 0, fmt.Errorf("remove delivered dead letters: %w", withHint(err))
	}
	return tag.RowsAffected(), nil
}
