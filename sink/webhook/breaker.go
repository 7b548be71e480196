package webhook

import "time"

// breakAfter is how many jobs must have failed with no success between them for the whole receiver to count as down. The failures of one
// lane say nothing of the others, so each job counts once.
const breakAfter = 5

// breaker knows whether the receiver as a whole is down. Then one request at a time goes out, with pauses, until one succeeds.
type breaker struct {
	round   uint64 // how many requests succeeded, and one
	failing int    // jobs that failed in this round
	down    bool
	probeAt time.Time // no request before that
	probing *pause
	// probeFresh says that the last probe was of an event that had not been tried before.
	probeFresh bool
	// failures is how many attempts failed in this round.
	failures int
	// succeeded is when a request last did, taken when the latest one of those that did was sent, and usual how long they take.
	succeeded, taken time.Time
	usual            time.Duration
	// spell is the round in which the receiver took something again after it had not for a while, which says nothing of what failed before, and since is
	// when that was. It did not if what was new failed: that is doubts.
	spell  uint64
	since  time.Time
	doubts int
	// asked is when one was last wanted from the reserve.
	asked time.Time
}

// minStuck is how long a job must have been under way, at least, to count as stuck.
const minStuck = time.Second

// takesOthers reports whether the receiver has taken something that was sent after j had failed, and nothing new has failed meanwhile.
func (l *lanes) takesOthers(j *job) bool {
	return !l.down && j.failedIn == l.spell && l.taken.After(j.failedAt)
}

// tried reports whether j has had an attempt since the receiver takes anything again.
func (l *lanes) tried(j *job) bool { return !j.sent.Before(l.since) }

// works reports whether the last answer was a success.
func (l *lanes) works() bool { return !l.down && l.round > 1 && l.failures == 0 }

// stuck says whether the job of the oldest event is what holds up all the others: it is under way for long, while the receiver has taken others that
// were sent clearly after it should have taken this one, or all of them. If that is only a matter of time, it returns when to ask again. If there is nothing to
// prove it by, one event more is to be added from the reserve. When no more is to come, it counts, much later, that the receiver has taken
// anything at all.
//
// Long is relative: to a receiver that takes its time for every request, a second is nothing. It is about the time since the receiver takes anything
// at all. A job that waits holds up nobody while there is work for all requests.
func (l *lanes) stuck(now time.Time, last bool) (j *job, more bool, at time.Time) {
	if l.down || len(l.queue) == 0 {
		return nil, false, time.Time{}
	}
	j = l.queue[0].job
	if j == nil || j.aside || !j.inFlight && (l.inFlight >= l.requests || !l.tried(j)) {
		return nil, false, time.Time{}
	}
	from := j.first
	if j.failedIn != l.spell {
		from = j.sent // before, nothing was to be expected
	}
	if l.since.After(from) {
		from = l.since
	}
	idle := l.fresh.len() == 0 && l.again.len() == 0 && l.inFlight < l.requests
	alone := idle && l.waiting.len()+l.inFlight == 1
	long := max(minStuck, 4*l.usual)
	switch {
	case alone && l.taken.After(j.first), l.takesOthers(j), l.taken.Sub(from) > long/2:
	case idle && last && l.round > 1:
		long *= 10
	case idle && !last:
		more = true
	default:
		return nil, false, time.Time{}
	}
	if more && l.asked.After(from) {
		from = l.asked // and its answer is still to come, or it was behind what is stuck itself
	}
	switch at := from.Add(long); {
	case now.Before(at):
		return nil, false, at
	case more:
		l.asked = now
		return nil, true, time.Time{}
	}
	return j, false, time.Time{}
}

// count takes note of an attempt that was no success, which may be one too many.
func (l *lanes) count(j *job, now time.Time, retryAfter time.Duration) {
	l.land(j)
	l.failures++
	if j.attempts == 1 {
		l.doubts++
	}
	if j.round != l.round {
		j.round = l.round
		l.failing++
	}
	if !l.down && l.failing >= breakAfter {
		l.down, l.probing = true, l.probe()
	}
	l.pauseProbes(now, retryAfter)
}

// pauseProbes has a receiver that is down left alone for a while, after an attempt that was no success.
func (l *lanes) pauseProbes(now time.Time, retryAfter time.Duration) {
	if !l.down {
		return
	}
	if at := now.Add(retryAfter); at.After(l.probeAt) {
		l.probeAt = at
	}
	if l.inFlight > 0 {
		return // of those that were in flight when it broke, the last one counts
	}
	if at := now.Add(l.probing.next()); at.After(l.probeAt) {
		l.probeAt = at
	}
}
