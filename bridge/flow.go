package bridge

import (
	"cmp"
	"context"
	"errors"
	"time"

	"ebb/internal/quiet"
	"ebb/sql"
)

var (
	errPastWarn  = errors.New("the lag is past flow.warn")
	errPastLimit = errors.New("the lag is past flow.limit")
	errClosed    = errors.New("the lag has been past flow.limit: ebb.put is refused")
)

// regulator holds producers to the flow limits. They are held without it as well, by the lag alone, but would be let in for each few bytes that
// are delivered.
type regulator struct {
	next time.Time
	log  *quiet.Log
}

// setFlow stores the limits that this bridge is configured with.
func (l *leader) setFlow(ctx context.Context) error {
	changed, err := sql.SetFlow(ctx, l.db, l.Slot, l.Flow)
	if changed {
		l.Logger.Info("set the flow limits", "slot", l.Slot, "warn_bytes", l.Flow.Warn, "limit_bytes", l.Flow.Limit, "on_full", cmp.Or(l.Flow.OnFull, sql.Reject))
	}
	return err
}

// regulate looks at the lag, unless it has just done so, and says what is the matter. It is called by whoever has the session for statements.
func (l *leader) regulate(ctx context.Context) error {
	if l.Flow.Warn == 0 && l.Flow.Limit == 0 || time.Now().Before(l.regulator.next) {
		return nil
	}
	l.regulator.next = time.Now().Add(l.TickEvery)
	if l.regulator.log == nil {
		l.regulator.log = quiet.New(l.Logger)
	}
	now, err := sql.Regulate(ctx, l.db, l.Slot)
	if err != nil {
		return err
	}
	args := []any{"slot", l.Slot, "lag_bytes", now.Lag, "warn_bytes", l.Flow.Warn, "limit_bytes", l.Flow.Limit}
	switch {
	case now.State == sql.FlowClosed:
		l.regulator.log.Failed("the buffer is full", errClosed, append(args, "reopen_bytes", now.Reopen)...)
	case now.State == sql.FlowWarn && l.Flow.Limit > 0 && now.Lag > l.Flow.Limit:
		l.regulator.log.Failed("the buffer is full, and takes events nevertheless (flow.on_full)", errPastLimit, args...)
	case now.State == sql.FlowWarn:
		l.regulator.log.Failed("the buffer fills up", errPastWarn, args...)
	default:
		l.regulator.log.Succeeded("the buffer has drained", args...)
	}
	return nil
}
