package jetstream

import "time"

// SetAckTimeout has s wait no longer than d for the next acknowledgment.
func SetAckTimeout(s *Sink, d time.Duration) { s.ackTimeout = d }

// SetRetryFor has a retry hold up the others for longer.
func SetRetryFor(s *Sink, d time.Duration) { s.retryFor = d }
