package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"ebb/internal/sleep"
)

// style is how a producer writes.
type style int

const (
	// ordinary transactions have 1 to 200 rows, many of them one.
	ordinary style = iota
	// waiting is like ordinary, and after each commit waits until the event is recorded as delivered.
	waiting
	// slow transactions stay open for seconds, while others commit.
	slow
	// large transactions have 5,000 rows.
	large
	// steady transactions have one row, come at an even pace, and are all committed.
	steady
)

var styleNames = []string{"ordinary", "waiting", "slow", "large", "steady"}

// defaultStyles are those of the producers, unless --producers says others.
const defaultStyles = "ordinary,ordinary,ordinary,ordinary,waiting,waiting,slow,slow,large"

// parseStyles reads a list with commas, a name for each producer.
func parseStyles(list string) ([]style, error) {
	var styles []style
	for _, name := range strings.Split(list, ",") {
		i := slices.Index(styleNames, strings.TrimSpace(name))
		if i < 0 {
			return nil, fmt.Errorf("--producers: no producer is called %q; there are: %s", name, strings.Join(styleNames, ", "))
		}
		styles = append(styles, style(i))
	}
	return styles, nil
}

const (
	largeRows = 5000
	// waitMost is how long a producer waits for delivery before it goes on: faults may keep an event for longer.
	waitMost = 15 * time.Second
)

// producer writes transactions, one after the other, and survives whatever happens to Postgres.
type producer struct {
	number int
	style  style
	url    string
	rand   *rand.Rand
	// pace is the mean time that one row takes.
	pace time.Duration

	db       *pgx.Conn
	ledger   []entry
	sequence int
	// delays are how long the waits for delivery took.
	delays []time.Duration
}

// produce writes until ctx ends; it ends the transaction that it has begun. An error is one of the harness: Postgres refused what it
// should take.
func (p *producer) produce(ctx context.Context) error {
	work := context.WithoutCancel(ctx)
	defer func() {
		if p.db != nil {
			p.db.Close(work)
		}
	}()
	for n := 0; ctx.Err() == nil; n++ {
		if !p.connect(ctx) {
			return nil
		}
		size := p.size()
		t := entry{producer: p.number, number: n, first: p.sequence, size: size}
		p.sequence += size
		last, err := p.transaction(work, ctx, &t)
		p.ledger = append(p.ledger, t)
		if err != nil {
			p.db.Close(work)
			p.db = nil
			var refused interface{ SQLState() string }
			// 57: the server shuts down, or the session was ended.
			if errors.As(err, &refused) && refused.SQLState()[:2] != "57" {
				return fmt.Errorf("producer %d: %w", p.number, err)
			}
			continue
		}
		if t.outcome == committed && p.style == waiting {
			p.await(ctx, last)
		}
		if sleep.For(ctx, p.pause(size)) != nil {
			return nil
		}
	}
	return nil
}

func (p *producer) size() int {
	switch p.style {
	case steady:
		return 1
	case large:
		return largeRows
	case slow:
		return 2 + p.rand.IntN(50)
	case ordinary, waiting:
		if p.rand.IntN(2) == 0 {
			return 1
		}
	}
	return 1 + p.rand.IntN(1+p.rand.IntN(200))
}

func (p *producer) pause(size int) time.Duration {
	if p.style == steady {
		return p.pace
	}
	return min(time.Duration(p.rand.ExpFloat64()*float64(p.pace)*float64(size)), 20*time.Second)
}

func (p *producer) connect(ctx context.Context) bool {
	for p.db == nil || p.db.IsClosed() {
		trying, cancel := context.WithTimeout(ctx, 10*time.Second)
		db, err := pgx.Connect(trying, p.url)
		cancel()
		if err == nil {
			p.db = db
			return true
		}
		if sleep.For(ctx, 50*time.Millisecond) != nil {
			return false
		}
	}
	return true
}

// transaction writes one, sets its outcome, and returns the id of its last row. An error means that the session is lost.
func (p *producer) transaction(ctx, stop context.Context, t *entry) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Minute)
	defer cancel()
	t.outcome = rolledBack
	if _, err := p.db.Exec(ctx, "BEGIN"); err != nil {
		return 0, err
	}
	last, err := p.rows(ctx, stop, *t)
	if err != nil {
		return 0, err
	}
	if p.style != steady && p.rand.IntN(5) == 0 {
		_, err := p.db.Exec(ctx, "ROLLBACK")
		return 0, err
	}
	t.outcome = unknown
	tag, err := p.db.Exec(ctx, "COMMIT")
	if err != nil {
		return 0, err
	}
	if tag.String() != "COMMIT" {
		return 0, fmt.Errorf("COMMIT answered %s", tag)
	}
	t.outcome = committed
	return last, nil
}

// rows writes the rows, some of them in savepoints, one of which may be rolled back with more inside.
func (p *producer) rows(ctx, stop context.Context, t entry) (int64, error) {
	middle, end := t.first+p.rand.IntN(t.size), t.first+t.size
	if _, err := p.insert(ctx, t, t.first, middle, false); err != nil {
		return 0, err
	}
	if p.style == slow {
		_ = sleep.For(stop, between(p.rand, 100*time.Millisecond, 3*time.Second)) // at the end of the round it just goes on
	}
	if p.style != steady && p.rand.IntN(3) == 0 {
		if _, err := p.db.Exec(ctx, "SAVEPOINT undone"); err != nil {
			return 0, err
		}
		if _, err := p.insert(ctx, t, middle, middle+1+p.rand.IntN(20), true); err != nil {
			return 0, err
		}
		if _, err := p.db.Exec(ctx, "SAVEPOINT nested"); err != nil {
			return 0, err
		}
		if _, err := p.insert(ctx, t, middle, middle+3, true); err != nil {
			return 0, err
		}
		if _, err := p.db.Exec(ctx, "RELEASE SAVEPOINT nested; ROLLBACK TO SAVEPOINT undone; SAVEPOINT kept"); err != nil {
			return 0, err
		}
	}
	return p.insert(ctx, t, middle, end, false)
}

// insert writes the rows with the sequence numbers from first up to but not including end, and returns the last one's id.
func (p *producer) insert(ctx context.Context, t entry, first, end int, undone bool) (int64, error) {
	if first >= end {
		return 0, nil
	}
	// Payloads differ in length, and have what JSON must escape; some rows have no key, some have headers.
	const query = `WITH put AS (INSERT INTO ebb.buffer (topic, key, payload, headers)
		SELECT CASE WHEN s % 10 = 0 THEN 'torture.rare' ELSE 'torture.' || $1::int END,
			CASE WHEN s % 7 = 0 THEN NULL ELSE 'key ' || s % 13 END,
			json_strip_nulls(json_build_object('p', $1::int, 't', $2::int, 's', s, 'u', CASE WHEN $5::bool THEN true END,
				'pad', repeat('ä"' || chr(10), s * 7 % 60))),
			CASE WHEN s % 11 = 0 THEN jsonb_build_object('torture', s) END
		FROM generate_series($3::int, $4::int - 1) s RETURNING id) SELECT max(id) FROM put`
	var last int64
	err := p.db.QueryRow(ctx, query, t.producer, t.number, first, end, undone).Scan(&last)
	return last, err
}

// await waits until the event is recorded as delivered, as a service would that must not answer before.
func (p *producer) await(ctx context.Context, id int64) {
	began := time.Now()
	for time.Since(began) < waitMost {
		var waits bool
		if !p.connect(ctx) {
			return
		}
		asking, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
		err := p.db.QueryRow(asking, "SELECT EXISTS (SELECT FROM ebb.backlog WHERE id = $1)", id).Scan(&waits)
		cancel()
		switch {
		case err != nil:
			p.db.Close(context.WithoutCancel(ctx))
			p.db = nil
		case !waits:
			p.delays = append(p.delays, time.Since(began))
			return
		}
		if sleep.For(ctx, 50*time.Millisecond) != nil {
			return
		}
	}
}
