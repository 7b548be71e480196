// Package quiet logs a failure that repeats, without repeating it.
package quiet

import (
	"log/slog"
	"time"
)

// every is how often an unchanged failure is logged again, so that a log shows that it goes on.
const every = 30 * time.Second

// Log logs the attempts at one thing. It is used by one goroutine.
type Log struct {
	log      *slog.Logger
	reason   string
	logged   time.Time
	since    time.Time
	attempts int
}

// New returns a Log that writes to log.
func New(log *slog.Logger) *Log { return &Log{log: log} }

// Failed logs a failed attempt at level warn when it is the first, fails for another reason than the one before, or enough
// time has passed.
func (l *Log) Failed(msg string, err error, args ...any) {
	now := time.Now()
	if l.attempts == 0 {
		l.since = now
	}
	l.attempts++
	reason := err.Error()
	if reason == l.reason && now.Sub(l.logged) < every {
		return
	}
	l.reason, l.logged = reason, now
	l.log.Warn(msg, append([]any{"error", err, "attempts", l.attempts}, args...)...)
}

// Succeeded logs, at level info, that what had failed works again. It does nothing when nothing had.
func (l *Log) Succeeded(msg string, args ...any) {
	if l.attempts == 0 {
		return
	}
	l.log.Info(msg, append([]any{"attempts", l.attempts, "after", time.Since(l.since).Round(time.Millisecond)}, args...)...)
	*l = Log{log: l.log}
}
