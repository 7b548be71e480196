package bridge

import (
	"context"
	"time"

	"ebb/decode"
	"ebb/event"
)

// InterruptAt has the bridge call at at each place where it may be killed; an error ends it there.
func (c *Config) InterruptAt(at func(place string) error) { c.interrupt = at }

// RetryAfter has kept events be retried sooner.
func (c *Config) RetryAfter(d time.Duration) { c.retryAfter = d }

// LookUp is how a bridge whose lock is held by the session with a process id looks up types.
func (c *Config) LookUp(ctx context.Context, lockPID uint32, oids []uint32) (decode.Types, event.LSN, error) {
	l := &leader{Config: *c, lockPID: lockPID}
	return l.lookUp(ctx, oids)
}
