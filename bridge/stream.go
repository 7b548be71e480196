package bridge

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"ebb/decode"
	"ebb/event"
	"ebb/replication"
	"ebb/sink"
	"ebb/sql"
)

type pgxConn = pgx.Conn

const (
	// A batch is handed on when it holds this much, or when the server has sent nothing more.
	maxBatchEvents = 2000
	maxBatchBytes  = 256 << 10
	// behindBy is how old a transaction is when it is read late, so that it does not matter to read a moment later and more.
	behindBy = 20 * time.Millisecond
	// handedBatches is how many batches may wait for the sink.
	handedBatches = 2
	// drainTimeout is how long a bridge that stops waits for its sink. It leaves room within the ten seconds that
	// container engines give by default.
	drainTimeout = 8 * time.Second
	// closeTimeout bounds the end of an ordinary connection.
	closeTimeout = 2 * time.Second
)

// leader is a bridge that holds the leader's lock.
type leader struct {
	Config
	db *pgxConn
	// conn is the replication connection until out, the stream, has taken it over.
	conn    *replication.Conn
	system  replication.System
	carried *carried
	record  sql.SlotRecord
	own     *ownTables
	// lockPID is the process id of the session that holds the lock.
	lockPID uint32
	// token is that of messages which are events.
	token []byte
	// slot is what the stream starts from.
	slot replication.Slot

	out     *replication.Stream
	decoder *decode.Decoder
	tracker *tracker
	// replay, unless nil, is what is being delivered again; replayed counts what was delivered since that was last stored.
	replay   *sql.Replay
	replayed atomic.Int64
	// witness, unless nil, sees what comes by, because the slot may not be the one that ebb has made.
	witness *witness
	dead    *deadLetters
	// recorded is up to where a tick knows what the destination holds, as a sequence number.
	recorded uint64
	// regulator is used by the ticks.
	regulator regulator
	// skipped is how many of the events that the sink has already were left out so far.
	skipped uint64
	// from is the last event that the sink was known to hold when this stream started.
	from sink.Progress
	// before is how many events were delivered before this stream started.
	before int64
}

// start starts streaming from the slot. What has passed is not delivered when it comes by.
func (l *leader) start(ctx context.Context, s step, passed map[string]passedEvent) error {
	conn := l.conn
	l.conn = nil
	var err error
	if l.out, err = conn.Start(ctx, l.Slot, l.Publication, l.slot.ConfirmedFlush); err != nil {
		if _, gone := replication.InspectSlot(ctx, l.db, l.Slot); errors.Is(gone, replication.ErrNoSlot) {
			return gone // a moment ago: it is made anew in the next round
		}
		return err
	}
	l.Logger.Info("streaming", "slot", l.Slot, "from", l.slot.ConfirmedFlush, "delivered", s.last.Position)
	l.from = s.last
	cfg := decode.Config{Epochs: l.record.Epochs, Buffers: l.own.buffers, Skip: s.skip, Token: l.token}
	cfg.LookUp = func(oids []uint32) (decode.Types, event.LSN, error) { return l.lookUp(ctx, oids) }
	if l.replay != nil {
		cfg.Replay = decode.Replay{Number: l.replay.ID, Epoch: l.replay.Epoch, Through: l.replay.Through}
	}
	if l.witness != nil {
		cfg.Seen = l.witness.see
	}
	l.decoder = decode.New(cfg)
	_, remembers := l.Sink.(sink.Scanner)
	l.tracker = newTracker(l.slot.ConfirmedFlush, s.last, remembers)
	kept := &keptStream{from: l.slot.ConfirmedFlush, tracker: l.tracker}
	if remembers {
		if kept.after, err = sql.FlushedLSN(ctx, l.db); err != nil {
			return err
		}
	}
	l.dead.begin(kept, passed)
	return nil
}

// stream delivers what the slot sends, until stop ends, which lets the sink finish, or until ctx ends or something fails.
func (l *leader) stream(stop, ctx context.Context) error {
	running, cancel := context.WithCancel(ctx)
	defer cancel()
	in := make(chan *event.Batch, handedBatches)
	sunk := make(chan struct{})
	var g errgroup.Group
	g.Go(func() error {
		defer close(sunk)
		err := l.Sink.Run(running, in, sink.Outcome{Delivered: l.delivered, Dead: l.dead, Block: l.Block})
		if err == nil {
			return nil // in is closed, and what was delivered last is still to be marked
		}
		defer cancel()
		if running.Err() != nil && errors.Is(err, context.Canceled) {
			return nil // another has failed, and its error counts
		}
		return &sinkError{err}
	})
	g.Go(func() error {
		defer cancel()
		return l.tick(running)
	})
	if l.Keep > 0 {
		g.Go(func() error {
			defer cancel()
			return l.collect(running)
		})
	}
	if l.own.db != nil {
		g.Go(func() error {
			defer cancel()
			return l.markRows(running)
		})
	}
	g.Go(func() error {
		l.trail(running)
		return nil
	})
	g.Go(func() error {
		err := l.read(stop, running, in)
		close(in)
		err = errors.Join(err, l.drain(running, sunk))
		cancel()
		return errors.Join(err, l.out.Close())
	})
	return g.Wait()
}

// read is the way of an event: from the slot, decoded, to the sink. It returns nil when stop or ctx ends.
func (l *leader) read(stop, ctx context.Context, in chan<- *event.Batch) error {
	reading, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(stop, cancel)()

	batch := event.NewBatch()
	var said decode.Skipped
	var forged uint64
	for behind := false; ; {
		if err := l.out.Fill(reading, behind); err != nil {
			return err
		}
		if reading.Err() != nil {
			return nil
		}
		for {
			msg, ok, err := l.out.Next()
			if err != nil {
				return err
			}
			if !ok {
				break
			}
			switch {
			case msg.Data != nil:
				if err := l.decoder.Decode(msg.Data, batch); err != nil {
					return errors.Join(err, ignoreEnd(reading, l.hand(reading, in, batch)))
				}
				behind = msg.SendTime.Sub(l.decoder.CommitTime()) > behindBy
			case !l.decoder.InTransaction():
				batch.MarkEnd(msg.WALEnd)
			}
			if len(batch.Events) >= maxBatchEvents || batch.Size() >= maxBatchBytes {
				if err := l.hand(reading, in, batch); err != nil {
					return ignoreEnd(reading, err)
				}
				batch = event.NewBatch()
			}
		}
		if err := l.hand(reading, in, batch); err != nil {
			return ignoreEnd(reading, err)
		}
		batch = event.NewBatch()
		said = l.saySkipped(l.decoder.Skipped(), said)
		forged = l.sayForged(l.decoder.Skipped(), forged)
	}
}

// saySkipped logs, once for each kind, that the publication sends what makes no event. It returns what has been said.
func (l *leader) saySkipped(skipped, said decode.Skipped) decode.Skipped {
	skipped.Delivered = 0 // expected after every start
	if (skipped.Unmapped > 0) != (said.Unmapped > 0) || (skipped.Updates > 0) != (said.Updates > 0) ||
		(skipped.Deletes > 0) != (said.Deletes > 0) || (skipped.Truncates > 0) != (said.Truncates > 0) {
		l.Logger.Warn("the publication sends what makes no event; ebb setup mends it", "publication", l.Publication,
			"rows_of_other_tables", skipped.Unmapped, "updates", skipped.Updates, "deletes", skipped.Deletes, "truncates", skipped.Truncates)
		return skipped
	}
	return said
}

// hand passes a batch on to the sink. Marks without an event before them are of no interest to it. After an error the sink has
// not got the batch, and must get none of those that follow: it would take them for what comes next.
func (l *leader) hand(ctx context.Context, in chan<- *event.Batch, batch *event.Batch) error {
	skipped := l.decoder.Skipped().Delivered
	last := l.from
	if more, position := l.decoder.SkippedMore(); more > 0 {
		last = sink.Progress{Position: position, Sequence: l.from.Sequence + more}
	}
	// Rows that are delivered faster than they are marked are not to fill the memory.
	if room := l.tracker.room(); room != nil {
		if err := l.out.Wait(ctx, room); err != nil {
			return err
		}
	}
	confirmed := l.tracker.hand(batch, skipped-l.skipped, last)
	l.skipped = skipped
	l.out.Confirm(confirmed.write, confirmed.flush)
	if len(batch.Events) == 0 {
		batch.Release()
		return nil
	}
	return l.out.Hand(ctx, in, batch)
}

// delivered is called by the sink.
func (l *leader) delivered(p sink.Progress) {
	l.carried.delivered.Store(true)
	l.replayed.Add(int64(p.Events))
	confirmed := l.tracker.deliver(p)
	l.out.Confirm(confirmed.write, confirmed.flush)
}

// drain waits for the sink to deliver what it was handed, and keeps the replication connection alive meanwhile.
func (l *leader) drain(ctx context.Context, sunk <-chan struct{}) error {
	ctx, cancel := context.WithTimeout(ctx, drainTimeout)
	defer cancel()
	err := l.out.Wait(ctx, sunk)
	if err != nil && ctx.Err() == nil {
		// Without a connection there is nobody to report to, but what is delivered now need not be delivered again.
		select {
		case <-sunk:
		case <-ctx.Done():
		}
	}
	if err == nil {
		err = l.drainRows(ctx)
	}
	if errors.Is(ctx.Err(), context.DeadlineExceeded) && l.tracker.snapshot().waiting > 0 {
		return fmt.Errorf("the sink had not delivered %d events after %s", l.tracker.snapshot().waiting, drainTimeout)
	}
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return nil
	}
	return err
}

// drainRows waits for the rows of what is delivered to be marked or deleted, and keeps the replication connection alive meanwhile. Rows that
// somebody else has locked are left for the next start.
func (l *leader) drainRows(ctx context.Context) error {
	waiting, cancel := context.WithCancel(ctx)
	defer cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		l.awaitMarkedOrLocked(waiting)
	}()
	err := l.out.Wait(ctx, done)
	cancel()
	<-done
	return err
}

func closeQuietly(db *pgxConn) {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	// The session is given up; that it may already be gone is why.
	_ = db.Close(ctx)
	// After a cancelled query it is closed in the background, and until then holds its locks.
	select {
	case <-db.PgConn().CleanupDone():
	case <-ctx.Done():
	}
}
