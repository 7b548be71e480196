// Package bridge carries events from the slot to the sink.
package bridge

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v5"

	"ebb/decode"
	"ebb/internal/quiet"
	"ebb/internal/sleep"
	"ebb/replication"
	"ebb/sink"
	"ebb/sql"
)

// Config says what a bridge connects.
type Config struct {
	// Postgres is a libpq URL or DSN.
	Postgres    string
	Slot        string
	Publication string
	// Buffers are the tables whose rows are events; none stand for the managed one.
	Buffers []Buffer
	Sink    sink.Sink
	// Destination names where the sink delivers. What was recorded of another one does not count for it.
	Destination string
	Logger      *slog.Logger

	// TickEvery is how often delivery is recorded while events are delivered, and TickKeep for how long the records
	// are kept.
	TickEvery, TickKeep time.Duration
	Trail               Trail
	// Keep is how long delivered rows stay in the buffer; 0: for ever.
	Keep time.Duration

	// Flow are the limits on the slot's lag.
	Flow sql.Flow

	// Adopt says that this database is to be gone on with, although the destination belongs to another source or holds events that the
	// database does not have. AcceptGap says that what the destination has forgotten, and the buffer does not have any more, may be missing.
	Adopt, AcceptGap bool

	// Block says that an event that the sink cannot deliver holds up those behind it, and is not set aside in the dead letters. What is there already
	// is delivered from there nevertheless.
	Block bool

	// OnRole, unless nil, is told which role the bridge has now.
	OnRole func(Role)

	// interrupt, unless nil, is called by tests at places where a bridge may be killed. An error ends the bridge there.
	interrupt func(place string) error
}

func (c *Config) at(place string) error {
	if c.interrupt == nil {
		return nil
	}
	return c.interrupt(place)
}

const (
	// standbyPoll is how often a standby asks whether the leader is gone.
	standbyPoll = 250 * time.Millisecond
	// settled is how long a bridge that has nothing to deliver has run when its next failure counts as a new one.
	settled = 10 * time.Second
)

// Run delivers until ctx ends. Then it lets the sink deliver what it was handed, confirms that and returns nil. It outlives
// whatever may pass by itself, and returns an error for what waiting cannot mend.
func Run(ctx context.Context, cfg Config) error {
	attempts := quiet.New(cfg.Logger)
	wait := backoff.NewExponentialBackOff()
	wait.InitialInterval, wait.MaxInterval = 100*time.Millisecond, 5*time.Second
	var carried carried
	for {
		started := time.Now()
		before := carried.doubt
		carried.delivered.Store(false)
		err := lead(ctx, cfg, &carried)
		switch {
		case ctx.Err() != nil:
			if err != nil && !errors.Is(err, context.Canceled) {
				cfg.Logger.Warn("stopped in the middle; what is missing follows at the next start", "error", err)
			}
			return nil
		case errors.Is(err, errReplay):
			cfg.Logger.Info("the stream has ended for a replay", "slot", cfg.Slot)
			wait.Reset()
			continue
		case isPermanent(err), errors.Is(err, decode.ErrPositions) && (!cfg.Adopt || before == mispositioned):
			return err
		}
		if err == nil {
			err = errors.New("the stream ended")
		}
		if carried.delivered.Load() || time.Since(started) > settled {
			carried.doubt = noDoubt
			wait.Reset()
			attempts.Succeeded("the bridge had recovered")
		}
		carried.doubt = carried.doubt.after(err)
		next := wait.NextBackOff()
		attempts.Failed("the bridge was interrupted and tries again", err, "next", next.Round(time.Millisecond))
		if sleep.For(ctx, next) != nil {
			return nil
		}
	}
}

// carried is what one lead leaves to the next one.
type carried struct {
	doubt doubt
	// delivered says that the sink has taken something from the slot's stream.
	delivered atomic.Bool
}

// sinkError is what a sink gave up with.
type sinkError struct{ err error }

func (e *sinkError) Error() string { return e.err.Error() }
func (e *sinkError) Unwrap() error { return e.err }

// isPermanent reports whether waiting cannot mend err.
func isPermanent(err error) bool {
	for _, target := range []error{
		sql.ErrNoRecord, sql.ErrNoSchema, sql.ErrPublication, sql.ErrTable, sql.ErrMark, decode.ErrMapping, decode.ErrMalformed, decode.ErrRow,
		replication.ErrForeignSlot, replication.ErrWALLevel,
	} {
		if errors.Is(err, target) {
			return true
		}
	}
	var haltErr *haltError
	var sinkErr *sinkError
	return errors.As(err, &haltErr) || errors.As(err, &sinkErr) && !errors.Is(err, sink.ErrChanged) || replication.IsPermanent(err)
}

// lead waits until this bridge is the slot's leader, and then delivers until stop ends or something fails, which is an error.
func lead(stop context.Context, cfg Config, carried *carried) error {
	// Before there is a stream, there is nothing to drain: stop ends everything at once.
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(stop))
	defer cancel(nil)
	detach := context.AfterFunc(stop, func() { cancel(stop.Err()) })
	defer detach()

	lock, err := sql.Connect(ctx, cfg.Postgres, cfg.Slot)
	if err != nil {
		return err
	}
	defer closeQuietly(lock)
	defer cfg.setRole(RoleNone)
	if err := sql.Check(ctx, lock); err != nil {
		return err
	}
	if err := replication.CheckWALLevel(ctx, lock); err != nil {
		return err
	}
	if _, err := inspectOwn(ctx, lock, &cfg); err != nil { // a standby says what is wrong before it is needed
		return err
	}
	if err := awaitLead(ctx, cfg, lock); err != nil {
		return err
	}
	if err := sql.LimitIdle(ctx, lock); err != nil {
		return err
	}
	if err := sql.ListenForReplays(ctx, lock); err != nil {
		return err
	}
	db, err := sql.Connect(ctx, cfg.Postgres, cfg.Slot)
	if err != nil {
		return err
	}
	defer closeQuietly(db)

	// The session that holds the lock and all that happens under it live and die together. It also tells at once when the server shuts
	// down, which must not wait for us.
	held := make(chan struct{})
	var turned atomic.Bool
	streaming, turn := context.WithCancel(stop)
	defer turn()
	go func() {
		defer close(held)
		cancel(sql.Hold(ctx, lock, func(slot string) {
			if slot == cfg.Slot {
				turned.Store(true)
				turn()
			}
		}))
	}()
	defer func() {
		cancel(nil)
		<-held
	}()

	l := &leader{Config: cfg, db: db, carried: carried, lockPID: lock.PgConn().PID()}
	defer l.closeConn()
	if l.own, err = inspectOwn(ctx, db, &cfg); err != nil {
		return err
	}
	if l.own.marks() {
		if l.own.db, err = sql.ConnectMarker(ctx, cfg.Postgres, cfg.Slot); err != nil {
			return err
		}
		defer closeQuietly(l.own.db)
	}
	err = l.connect(ctx)
	if err == nil {
		l.token, err = sql.MessageToken(ctx, db)
	}
	if err == nil {
		l.record, err = sql.TakeTerm(ctx, db, cfg.Slot)
	}
	if err == nil {
		err = l.setFlow(ctx)
	}
	var next step
	if err == nil {
		next, err = l.prepare(ctx)
	}
	if err == nil {
		err = l.start(ctx, next)
	}
	if err == nil {
		detach()
		err = l.stream(streaming, ctx)
	}
	if cause := context.Cause(ctx); cause != nil {
		return cause // of which err is a consequence
	}
	if err == nil && turned.Load() {
		return errReplay
	}
	if missing := (*decode.MissingColumnError)(nil); errors.As(err, &missing) {
		return l.outdated(ctx, missing, err)
	}
	if errors.Is(err, decode.ErrPositions) {
		return fmt.Errorf("slot %q against %s: %w. If a table was added to publication %q, take it out. If this database was restored or replaced and "+
			"is the one to go on with, stop the other one and start once with ebb run --adopt", l.Slot, l.Destination, err, l.Publication)
	}
	return err
}

// connect opens the replication connection, to the same server as that of the session which holds the lock.
func (l *leader) connect(ctx context.Context) error {
	var err error
	if l.conn, err = replication.Connect(ctx, l.Postgres, l.Slot); err != nil {
		return err
	}
	replicates, err := l.conn.SharesServer(ctx, l.lockPID)
	if err != nil {
		return err
	}
	queries, err := sql.SharesServer(ctx, l.db, l.lockPID)
	if err != nil {
		return err
	}
	if l.own.db != nil && queries {
		if queries, err = sql.SharesServer(ctx, l.own.db, l.lockPID); err != nil {
			return err
		}
	}
	if !replicates || !queries {
		return errors.New("two connections have led to two servers; one of them is not, or is no longer, the primary")
	}
	l.system, err = l.conn.Identify(ctx)
	return err
}

// closeConn closes the replication connection, unless a stream has taken it over.
func (l *leader) closeConn() {
	if l.conn == nil {
		return
	}
	if err := l.conn.Close(); err != nil {
		l.Logger.Debug("close the replication connection", "error", err)
	}
}

func (c *Config) setRole(r Role) {
	if c.OnRole != nil {
		c.OnRole(r)
	}
}

// awaitLead takes the leader's lock. It asks again and again instead of waiting for it in the server, because a session that
// waits holds back vacuum.
func awaitLead(ctx context.Context, cfg Config, lock *pgxConn) error {
	for waiting := false; ; {
		ok, err := sql.TryLead(ctx, lock, cfg.Slot)
		if err != nil {
			return err
		}
		if ok {
			cfg.setRole(RoleLeader)
			cfg.Logger.Info("this bridge leads", "slot", cfg.Slot)
			return nil
		}
		if !waiting {
			waiting = true
			cfg.setRole(RoleStandby)
			cfg.Logger.Info("another bridge leads; standing by", "slot", cfg.Slot)
		}
		if err := sleep.For(ctx, standbyPoll); err != nil {
			return err
		}
	}
}
