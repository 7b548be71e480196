package quiet

import (
	"bytes"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"
)

func TestLogSaysWhatIsNew(t *testing.T) {
	var out bytes.Buffer
	l := New(slog.New(slog.NewTextHandler(&out, nil)))
	lines := func(want int, what string) {
		t.Helper()
		if got := strings.Count(out.String(), "\n"); got != want {
			t.Errorf("%s: %d lines, want %d:\n%s", what, got, want, out.String())
		}
	}
	l.Succeeded("well")
	lines(0, "a success without a failure")
	for range 100 {
		l.Failed("ill", errors.New("a reason"))
	}
	lines(1, "the same failure")
	l.Failed("ill", errors.New("another reason"))
	lines(2, "another reason")
	l.logged = l.logged.Add(-2 * every)
	l.Failed("ill", errors.New("another reason"))
	lines(3, "the same reason, long after")
	l.since = l.since.Add(-time.Minute)
	l.Succeeded("well")
	lines(4, "a success")
	if !strings.Contains(out.String(), "attempts=102 after=1m0") {
		t.Errorf("the success does not say after what:\n%s", out.String())
	}
	l.Failed("ill", errors.New("another reason"))
	lines(5, "a failure after a success")
}
