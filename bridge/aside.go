package bridge

import (
	"context"
	"errors"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"ebb/event"
	"ebb/sink"
)

// Aside is a replay beside the main flow, which it leaves alone: to another sink, of some of the events, at a bounded rate.
type Aside struct {
	From, To Place
	// Topics and Keys are those of the events that are delivered; none stands for all.
	Topics, Keys []string
	// Rate is in events a second; 0: unbounded.
	Rate float64
	// Delivered, unless nil, is called with how many events more were delivered.
	Delivered func(events int)
}

// RunAside delivers what was delivered between two places once more, to cfg.Sink. It does not begin again where it has ended: what was
// delivered when it fails is delivered again the next time, with the same ids.
func RunAside(ctx context.Context, cfg Config, a Aside) (err error) {
	db, record, start, err := cfg.startOf(ctx, a.From)
	if err != nil {
		return err
	}
	defer closeQuietly(db)
	t, err := openTap(ctx, &cfg, db, record, start)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, t.close()) }()
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
		return cfg.Sink.Run(running, in, func(p sink.Progress) {
			if a.Delivered != nil {
				a.Delivered(p.Events)
			}
		})
	})
	g.Go(func() error {
		defer close(in)
		return a.feed(running, t, in)
	})
	err = g.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// feed hands on the events that are to be delivered.
func (a *Aside) feed(ctx context.Context, t *tap, in chan<- *event.Batch) error {
	within := newSection(a.From, a.To)
	began, sent := time.Now(), 0
	if a.Rate > 0 {
		t.most = max(1, min(maxBatchEvents, int(a.Rate/10))) // ten batches a second
	}
	for !t.ended() && !within.over {
		batch, err := t.next(ctx)
		if err != nil {
			return ignoreEnd(ctx, err)
		}
		batch.Events = slices.DeleteFunc(batch.Events, func(e event.Event) bool {
			return !within.has(&e) || !oneOf(a.Topics, e.Topic) || !oneOf(a.Keys, e.Key)
		})
		batch.Marks = nil
		n := len(batch.Events)
		if n == 0 {
			batch.Release()
			continue
		}
		if a.Rate > 0 {
			due := began.Add(time.Duration(float64(sent) / a.Rate * float64(time.Second)))
			if err := t.pause(ctx, time.Until(due)); err != nil {
				return ignoreEnd(ctx, err)
			}
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
