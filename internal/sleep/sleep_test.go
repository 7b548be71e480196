package sleep

import (
	"context"
	"errors"
	"testing"
	"time"
)

func TestFor(t *testing.T) {
	started := time.Now()
	if err := For(t.Context(), 10*time.Millisecond); err != nil || time.Since(started) < 10*time.Millisecond {
		t.Errorf("after %s: %v", time.Since(started), err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := For(ctx, time.Hour); !errors.Is(err, context.Canceled) {
		t.Errorf("error is %v", err)
	}
}
