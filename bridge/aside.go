package bridge

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"

	"ebb/event"
	"ebb/internal/sleep"
	"ebb/sink"
	"ebb/sql"
)

// Aside is a replay beside the main flow, which it leaves alone: to another sink, of some of the events, at a bounded rate.
type Aside struct {
	From, To Place
	// FromTable has rows that are still in the managed buffer delivered, by id, and not what the trailing slot holds, which reaches less far back
	// where rows are kept for longer. From is then a time, for that of the row, or an id.
	FromTable bool
	// Topics and Keys are those of the events that are delivered; none stands for all.
	Topics, Keys []string
	// Rate is in events a second; 0: unbounded.
	Rate float64
	// Delivered, unless nil, is called with how many events more were delivered.
	Delivered func(events int)
	// LeftOut, unless nil, is called with each event that cannot be delivered, as its row makes none.
	LeftOut func(id, fault string)
}

// RunAside delivers what was delivered between two places once more, to cfg.Sink. It does not begin again where it has ended: what was
// delivered when it fails is delivered again the next time, with the same ids.
func RunAside(ctx context.Context, cfg Config, a Aside) (err error) {
	feed, db, record, stop, err := a.open(ctx, &cfg)
	if err != nil {
		return err
	}
	defer closeQuietly(db)
	defer func() { err = errors.Join(err, stop()) }()
	source := sink.Source{SystemIdentifier: record.SystemIdentifier, Database: db.Config().Database, Slot: record.Name + " aside", Buffer: record.Buffer}
	if _, err := cfg.Sink.Resume(ctx, sink.Known{Source: source}); err != nil {
		return err
	}

	var g errgroup.Group
	running, cancel := context.WithCancel(ctx)
	defer cancel()
	in := make(chan *event.Batch, handedBatches)
	g.Go(func() error {
		defer cancel()
		return cfg.Sink.Run(running, in, sink.Outcome{Delivered: func(p sink.Progress) {
			if a.Delivered != nil {
				a.Delivered(p.Events)
			}
		}})
	})
	g.Go(func() error {
		defer close(in)
		return feed(running, in)
	})
	err = g.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// open connects, and returns what hands on the events that are to be delivered.
func (a *Aside) open(ctx context.Context, cfg *Config) (feed func(context.Context, chan<- *event.Batch) error, db *pgxConn, record sql.SlotRecord,
	stop func() error, err error) {
	if !a.FromTable {
		db, record, start, err := cfg.startOf(ctx, a.From)
		if err != nil {
			return nil, nil, record, nil, err
		}
		t, err := openTap(ctx, cfg, db, record, start)
		if err != nil {
			closeQuietly(db)
			return nil, nil, record, nil, err
		}
		return func(ctx context.Context, in chan<- *event.Batch) error { return a.feed(ctx, t, in) }, db, record, t.close, nil
	}
	if db, record, err = cfg.connectRecorded(ctx); err != nil {
		return nil, nil, record, nil, err
	}
	return func(ctx context.Context, in chan<- *event.Batch) error { return a.feedRows(ctx, db, in) }, db, record, func() error { return nil }, nil
}

// atOnce is how many events are handed on at once, at most: a tenth of a second's worth where there is a rate.
func (a *Aside) atOnce(most int) int {
	if a.Rate == 0 {
		return most
	}
	return max(1, min(most, int(a.Rate/10)))
}

// ahead is by how much an aside that has sent so many events since it began is ahead of its rate; without one it never is.
func (a *Aside) ahead(began time.Time, sent int) time.Duration {
	if a.Rate == 0 {
		return 0
	}
	return time.Until(began.Add(time.Duration(float64(sent) / a.Rate * float64(time.Second))))
}

// rowsPage is how many rows are read at once.
const rowsPage = 500

// feedRows hands on the rows of the managed buffer.
func (a *Aside) feedRows(ctx context.Context, db *pgxConn, in chan<- *event.Batch) error {
	after, page := int64(0), a.atOnce(rowsPage)
	if a.From.ID != "" {
		id, err := strconv.ParseInt(a.From.ID, 10, 64)
		if err != nil {
			return fmt.Errorf("event %s is no row of ebb.buffer, whose ids are numbers", quoteShort(a.From.ID))
		}
		after = id - 1
	}
	began, sent := time.Now(), 0
	for {
		rows, err := sql.RowsSince(ctx, db, after, a.From.Time, page)
		if err != nil || len(rows) == 0 {
			return ignoreEnd(ctx, err)
		}
		after = rows[len(rows)-1].ID
		rows = slices.DeleteFunc(rows, func(r sql.Row) bool {
			return !oneOf(a.Topics, r.Topic) || !oneOf(a.Keys, r.Key) || !a.To.Time.IsZero() && !r.CreatedAt.Before(a.To.Time)
		})
		if len(rows) == 0 {
			continue
		}
		batch, err := recoveredBatch(event.Position{}, rows, newHoldings(false, false))
		if err != nil {
			return err
		}
		if err := sleep.For(ctx, a.ahead(began, sent)); err != nil {
			return nil
		}
		sent += len(rows)
		select {
		case in <- batch:
		case <-ctx.Done():
			return nil
		}
	}
}

// feed hands on the events that are to be delivered.
func (a *Aside) feed(ctx context.Context, t *tap, in chan<- *event.Batch) error {
	within := newSection(a.From, a.To)
	began, sent := time.Now(), 0
	t.most = a.atOnce(maxBatchEvents)
	for !t.ended() && !within.over {
		batch, err := t.next(ctx)
		if err != nil {
			return ignoreEnd(ctx, err)
		}
		batch.Events = slices.DeleteFunc(batch.Events, func(e event.Event) bool {
			if !within.has(&e) || !oneOf(a.Topics, e.Topic) || !oneOf(a.Keys, e.Key) {
				return true
			}
			if e.Fault != "" && a.LeftOut != nil {
				a.LeftOut(string(e.ID), e.Fault)
			}
			return e.Fault != ""
		})
		batch.Marks = nil
		n := len(batch.Events)
		if n == 0 {
			batch.Release()
			continue
		}
		if err := t.pause(ctx, a.ahead(began, sent)); err != nil {
			return ignoreEnd(ctx, err)
		}
		sent += n
		if err := t.out.Hand(ctx, in, batch); err != nil {
			return ignoreEnd(ctx, err)
		}
	}
	return within.check()
}

func oneOf(wanted []string, value []byte) bool {
	return len(wanted) == 0 || slices.Contains(wanted, string(value))
}

// pause keeps the connection alive while it waits.
func (t *tap) pause(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return nil
	}
	done := make(chan struct{})
	over, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	context.AfterFunc(over, func() { close(done) })
	return t.out.Wait(ctx, done)
}
