package bridge

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"ebb/event"
	"ebb/replication"
	"ebb/sql"
)

// ErrOutOfReach says that a place is further back than the trailing slot reaches.
var ErrOutOfReach = errors.New("out of reach")

// Place is a place among the events that were delivered.
type Place struct {
	// Text is the place as it was given.
	Text string
	// One of these is set: the LSN of a commit record or one before it; the time of a commit or one before it; the id of an event; or Oldest, for as far
	// back as the trailing slot reaches.
	LSN    event.LSN
	Time   time.Time
	ID     string
	Oldest bool
}

// ParsePlace reads an LSN such as 16/B374D848, a time in the form of RFC 3339, a duration such as 90m, which is before now, the word trail, or
// the id of an event, which is anything else.
func ParsePlace(text string, now time.Time) (Place, error) {
	p := Place{Text: text}
	if text == "" {
		return p, errors.New("want an LSN, a time such as 2026-01-02T15:04:05Z, a duration such as 90m, the id of an event, or trail")
	}
	if text == "trail" {
		p.Oldest = true
		return p, nil
	}
	if lsn, err := event.ParseLSN(text); err == nil {
		p.LSN = lsn
		return p, nil
	}
	if d, err := time.ParseDuration(text); err == nil {
		if d < 0 {
			return p, fmt.Errorf("%q is in the future; write the duration without a sign", text)
		}
		p.Time = now.Add(-d)
		return p, nil
	}
	if t, err := time.Parse(time.RFC3339Nano, text); err == nil {
		if t.After(now) {
			return p, fmt.Errorf("%q is in the future", text)
		}
		p.Time = t
		return p, nil
	}
	p.ID = text
	return p, nil
}

// Survey is what there is between two places.
type Survey struct {
	// From is the LSN of the commit record of the first transaction, and FromTime when it was committed; To and ToTime are those of the last one. They
	// are zero when there is none.
	From     event.LSN `json:"from"`
	FromTime time.Time `json:"from_time"`
	To       event.LSN `json:"to"`
	ToTime   time.Time `json:"to_time"`
	Events   int64     `json:"events"`
	// Bytes is the size of the events' content.
	Bytes int64 `json:"bytes"`
	// Took is how long it took to read them, and Rate how many a second the last replay delivered, or 0 if there was none.
	Took time.Duration `json:"-"`
	Rate float64       `json:"-"`
}

// Reach is how far back the trailing slot reaches.
type Reach struct {
	LSN event.LSN
	// Time is from which time on every transaction is in reach; zero if every one ever is.
	Time time.Time
}

func (r Reach) String() string {
	if r.Time.IsZero() {
		return fmt.Sprintf("the oldest position in reach is %s", r.LSN)
	}
	return fmt.Sprintf("the oldest position in reach is %s, of %s", r.LSN, r.Time.UTC().Format(time.RFC3339))
}

// ReadReach returns how far back the trailing slot reaches, or ErrOutOfReach when there is none.
func ReadReach(ctx context.Context, db *pgxConn, record sql.SlotRecord) (Reach, error) {
	trail, err := replication.InspectSlot(ctx, db, replication.TrailOf(record.Name))
	if errors.Is(err, replication.ErrNoSlot) || err == nil && trail.Lost() {
		return Reach{}, fmt.Errorf("%w: there is no trailing slot %q that could be read; with replay.window above 0, ebb setup and ebb run make it",
			ErrOutOfReach, replication.TrailOf(record.Name))
	}
	if err != nil {
		return Reach{}, err
	}
	before, behind, exact, err := sql.TickAround(ctx, db, record, trail.ConfirmedFlush)
	if err != nil {
		return Reach{}, err
	}
	r := Reach{LSN: trail.ConfirmedFlush}
	switch {
	case before.IsZero(): // nothing was delivered before
	case exact:
		r.Time = before
	case !behind.IsZero():
		r.Time = behind
	default:
		r.Time = time.Now()
	}
	return r, nil
}

// TakeSurvey reads what was delivered from one place on up to another, which may be the zero Place for no end.
func TakeSurvey(ctx context.Context, cfg Config, from, to Place) (_ Survey, err error) {
	db, record, start, err := cfg.startOf(ctx, from)
	if err != nil {
		return Survey{}, err
	}
	defer closeQuietly(db)
	t, err := openTap(ctx, &cfg, db, record, start)
	if err != nil {
		return Survey{}, err
	}
	defer func() { err = errors.Join(err, t.close()) }()
	began := time.Now()
	var s Survey
	within := newSection(from, to)
	for !t.ended() && !within.over {
		batch, err := t.next(ctx)
		if err != nil {
			return Survey{}, err
		}
		for i := range batch.Events {
			e := &batch.Events[i]
			if !within.has(e) {
				continue
			}
			if s.Events == 0 {
				s.From, s.FromTime = e.Position.Commit, e.Time
			}
			s.To, s.ToTime = e.Position.Commit, e.Time
			s.Events++
			s.Bytes += int64(e.Size())
		}
		batch.Release()
	}
	// The events of its transaction before the one that was looked for.
	if within.found {
		s.Events += within.missed
		s.Bytes += within.missedBytes
	}
	if err := within.check(); err != nil {
		return Survey{}, err
	}
	s.Took = time.Since(began)
	s.Rate, err = sql.ReplayRate(ctx, db, record.Name)
	return s, err
}

// connectRecorded connects to a database that is set up, and reads the record of the slot.
func (c *Config) connectRecorded(ctx context.Context) (_ *pgxConn, _ sql.SlotRecord, err error) {
	db, err := sql.Connect(ctx, c.Postgres, c.Slot)
	if err != nil {
		return nil, sql.SlotRecord{}, err
	}
	defer func() {
		if err != nil {
			closeQuietly(db)
		}
	}()
	if err := sql.Check(ctx, db); err != nil {
		return nil, sql.SlotRecord{}, err
	}
	record, err := sql.ReadSlot(ctx, db, c.Slot)
	return db, record, err
}

// startOf connects, and returns the LSN from which on the log has to be read for a place.
func (c *Config) startOf(ctx context.Context, from Place) (_ *pgxConn, _ sql.SlotRecord, _ event.LSN, err error) {
	db, record, err := c.connectRecorded(ctx)
	if err != nil {
		return nil, sql.SlotRecord{}, 0, err
	}
	defer func() {
		if err != nil {
			closeQuietly(db)
		}
	}()
	reach, err := ReadReach(ctx, db, record)
	if err != nil {
		return nil, sql.SlotRecord{}, 0, err
	}
	if from.LSN != 0 && from.LSN < reach.LSN || !from.Time.IsZero() && from.Time.Before(reach.Time) {
		hint := ""
		if at, ok, oldestErr := sql.OldestRow(ctx, db); oldestErr == nil && ok && !at.After(reach.Time) {
			hint = fmt.Sprintf("; the buffer still has rows since %s: ebb replay --aside --from-table", at.UTC().Format(time.RFC3339))
		}
		return nil, sql.SlotRecord{}, 0, fmt.Errorf("%s is %w: %s%s", from.Text, ErrOutOfReach, reach, hint)
	}
	start := max(reach.LSN, from.LSN)
	if !from.Time.IsZero() {
		mark, err := sql.DeliveredBefore(ctx, db, record, c.Destination, time.Since(from.Time), 0)
		if err != nil {
			return nil, sql.SlotRecord{}, 0, err
		}
		start = max(start, mark.LSN)
	}
	return db, record, start, nil
}

// section tells the events from one place up to another, as they come by: up to before it if that is an LSN or a time, and with its whole
// transaction if it is an event.
type section struct {
	from, to Place
	// begun says that events are within it; over that none that follows is.
	begun, over bool
	// found says that the event was found which was looked for. Missed are those that came before it in its transaction.
	found               bool
	commit              event.LSN
	missed, missedBytes int64
	last                bool // the transaction at hand holds the event that ends the section
}

func newSection(from, to Place) *section { return &section{from: from, to: to} }

func (s *section) has(e *event.Event) bool {
	if e.Position.Commit != s.commit {
		if s.commit = e.Position.Commit; !s.found {
			s.missed, s.missedBytes = 0, 0
		}
		if !s.over && s.ends(e) {
			s.over = true
		}
	}
	if s.over {
		return false
	}
	s.last = s.last || s.to.ID != "" && string(e.ID) == s.to.ID
	if !s.begun {
		switch {
		case s.from.ID != "":
			s.found = string(e.ID) == s.from.ID
			s.begun = s.found
			if !s.found {
				s.missed++
				s.missedBytes += int64(e.Size())
			}
		case !s.from.Time.IsZero():
			s.begun = !e.Time.Before(s.from.Time)
		default:
			s.begun = e.Position.Commit >= s.from.LSN
		}
	}
	return s.begun
}

// ends reports whether a transaction, whose first event is given, is the first one behind the section.
func (s *section) ends(e *event.Event) bool {
	switch {
	case s.to.LSN != 0:
		return e.Position.Commit >= s.to.LSN
	case !s.to.Time.IsZero():
		return !e.Time.Before(s.to.Time)
	}
	return s.last
}

func (s *section) check() error {
	if s.from.ID != "" && !s.found {
		return fmt.Errorf("event %s is %w: what the trailing slot holds has no such event", quoteShort(s.from.ID), ErrOutOfReach)
	}
	if s.to.ID != "" && !s.last {
		return fmt.Errorf("event %s, up to which it is to be, does not come from %s on", quoteShort(s.to.ID), s.from.Text)
	}
	return nil
}

func quoteShort(id string) string {
	if len(id) > 80 {
		id = id[:80] + "…"
	}
	return fmt.Sprintf("%q", strings.ToValidUTF8(id, "?"))
}
