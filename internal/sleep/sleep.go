// Package sleep waits, no longer than a context lasts.
package sleep

import (
	"context"
	"time"
)

// For returns nil after d, or the context's error as soon as ctx ends.
func For(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
