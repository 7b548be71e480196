package sinktest

import "time"

// SetPatience shortens the wait for what a faulty sink never does.
func SetPatience(d time.Duration) { patience, promptly = d, d }
