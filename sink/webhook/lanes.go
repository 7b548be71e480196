package webhook

import (
	"cmp"
	"slices"
	"time"

	"ebb/event"
)

// limits bound what is under way.
type limits struct {
	// requests is how many are in flight at once.
	requests int
	// window and bytes are how many events, and how much of them, are taken in from the oldest one on that is not delivered. One is
	// taken in always.
	window, bytes int
	// reserve is how many of the window are taken in only to find out whether the receiver takes any others.
	reserve int
	// batch and batchBytes are how much one request carries. One event it carries always.
	batch, batchBytes int
	// pause gives the pauses between attempts, probe those between probes of a receiver that is down.
	pause, probe func() *pause
}

// parcel is an event on its way to the receiver, or to the dead letters. Its memory is its own: a batch would be held up as a whole by one event
// of it.
type parcel struct {
	number uint64 // in order of arrival
	lane   *lane  // nil when it is not to be sent, or no more
	job    *job
	size   int  // of its memory
	wire   int  // what it takes of a request with several events
	most   int  // how many events may share its request; 0 is any number
	done   bool // delivered, or kept

	position event.Position
	event    event.Event
	body     []byte // unless in binary mode
	refusal  error  // why it can never be sent

	attempts    int
	first, last time.Time // of the attempts
}

// lane holds the parcels of one key in order. Those in a job are its first ones, and while there are any, no other job gets more.
type lane struct {
	key     string
	keyed   bool
	retry   bool // of events that were kept: not of the queue, and not of byKey
	parcels []*parcel
	busy    int // how many are in a job
}

// job is what one request carries, through all of its attempts: so that a request that is repeated is the same to the receiver.
type job struct {
	parcels  []*parcel // in order of arrival
	attempts int
	inFlight bool
	pause    *pause
	due      time.Time // of the next attempt
	told     bool      // by the receiver, in Retry-After
	round    uint64    // in which it last failed

	sent, first time.Time // of the last attempt and the first one
	// failedIn is the spell in which it last failed, and failedAt when it did so for the first time in it.
	failedIn uint64
	failedAt time.Time

	// What follows is of those who send it.
	cancel  func()
	aside   bool      // it was cancelled, to be set aside
	failure *failure  // the last one
	logged  bool      // that it failed
	since   time.Time // of the first failure
}

// lanes decides which event goes out when. It does no I/O, knows the time only from its callers, and is used by one goroutine.
//
// Events of one key are in flight strictly one request after the other, until the receiver has said yes; those without a key wait for
// nobody. Of what may go, the oldest goes first. A job that waits for its next attempt takes no place of the requests in flight.
//
// What cannot be delivered is taken out, with all that is behind it in its lane, and counts as delivered once it is kept elsewhere. Retries are
// lanes of their own, of which nothing waits for the other.
type lanes struct {
	limits
	queue  []*parcel // from the oldest one on that is not done
	size   int       // of queue
	number uint64
	byKey  map[string]*lane

	refused  []*lane        // whose first parcel cannot be sent
	fresh    ordered[*lane] // with parcels, and none in a job
	again    ordered[*job]  // whose time has come
	waiting  ordered[*job]
	inFlight int

	breaker
}

func newLanes(l limits) *lanes {
	return &lanes{
		limits:  l,
		byKey:   map[string]*lane{},
		breaker: breaker{round: 1, spell: 1},
		fresh:   ordered[*lane]{before: func(a, b *lane) bool { return a.parcels[0].number < b.parcels[0].number }},
		again:   ordered[*job]{before: func(a, b *job) bool { return a.parcels[0].number < b.parcels[0].number }},
		waiting: ordered[*job]{before: func(a, b *job) bool { return a.due.Before(b.due) }},
	}
}

// room reports whether a parcel of a size may be added, if need be from the reserve.
func (l *lanes) room(size int, need bool) bool {
	window, bytes := l.window, l.bytes
	if l.reserve > 0 && !need {
		window, bytes = window-l.reserve, bytes-bytes/10
	}
	return len(l.queue) == 0 || len(l.queue) < window && l.size+size <= bytes
}

func (l *lanes) empty() bool { return len(l.queue) == 0 }

// add adds a parcel, for which there is room. A nil key is none.
func (l *lanes) add(p *parcel, key []byte) {
	ln := l.byKey[string(key)]
	switch {
	case key == nil:
		ln = &lane{}
	case ln == nil:
		ln = &lane{key: string(key), keyed: true}
		l.byKey[ln.key] = ln
	}
	l.hold(p)
	p.lane = ln
	ln.parcels = append(ln.parcels, p)
	if len(ln.parcels) == 1 {
		l.line(ln)
	}
}

// hold adds a parcel that is not to be sent, and is done when [lanes.kept] says so.
func (l *lanes) hold(p *parcel) {
	l.number++
	p.number = l.number
	l.queue = append(l.queue, p)
	l.size += p.size
}

// retry adds a lane of parcels that were kept. They are no part of what is delivered in order.
func (l *lanes) retry(parcels []*parcel) *lane {
	ln := &lane{retry: true, parcels: parcels}
	for _, p := range parcels {
		l.number++
		p.number, p.lane = l.number, ln
	}
	l.fresh.push(ln)
	return ln
}

// line puts a lane with no parcel in a job to where it belongs.
func (l *lanes) line(ln *lane) {
	switch {
	case len(ln.parcels) == 0:
		if ln.keyed {
			delete(l.byKey, ln.key)
		}
	case ln.parcels[0].refusal != nil:
		l.refused = append(l.refused, ln)
	default:
		l.fresh.push(ln)
	}
}

// next returns what is to be sent now, or nil. [lanes.delivered], [lanes.failed], [lanes.split] or [lanes.rejected] says what came of it.
func (l *lanes) next(now time.Time) *job {
	for l.waiting.len() > 0 && !l.waiting.first().due.After(now) {
		l.again.push(l.waiting.pop())
	}
	if l.inFlight >= l.requests || l.down && (l.inFlight > 0 || now.Before(l.probeAt)) {
		return nil
	}
	j := l.pick()
	if j == nil {
		return nil
	}
	l.inFlight++
	j.attempts++
	j.inFlight, j.sent = true, now
	if j.attempts == 1 {
		j.first = now
	}
	for _, p := range j.parcels {
		if p.attempts++; p.attempts == 1 {
			p.first = now
		}
		p.last = now
	}
	return j
}

func (l *lanes) pick() *job {
	switch {
	case l.again.len() == 0 && l.fresh.len() == 0:
		return nil
	case l.again.len() == 0:
	case l.fresh.len() == 0:
		return l.again.pop()
	case l.down:
		// It may be that the receiver is well and all the keys tried so far are poisoned: now and then, one that was not tried tells.
		if l.probeFresh = !l.probeFresh; !l.probeFresh {
			return l.again.pop()
		}
	case l.again.first().parcels[0].number < l.fresh.first().parcels[0].number:
		return l.again.pop()
	}
	j := &job{}
	most, size := l.batch, 0
	for l.fresh.len() > 0 {
		ln := l.fresh.first()
		if len(j.parcels) > 0 && (ln.retry || j.parcels[0].lane.retry) {
			break // a retry ends with its first failure, which must be its own
		}
		for _, p := range ln.parcels {
			m := most
			if p.most > 0 {
				m = min(m, p.most)
			}
			if n := len(j.parcels); n > 0 && (n >= m || size+p.wire > l.batchBytes) || p.refusal != nil {
				break
			}
			most = m
			size += p.wire
			ln.busy++
			p.job = j
			j.parcels = append(j.parcels, p)
		}
		if ln.busy == 0 {
			break
		}
		l.fresh.pop()
	}
	slices.SortFunc(j.parcels, func(a, b *parcel) int { return cmp.Compare(a.number, b.number) })
	return j
}

// wake returns when next is to be called again if nothing else happens until then; zero for never.
func (l *lanes) wake() time.Time {
	var at time.Time
	switch {
	case l.inFlight >= l.requests, l.down && l.inFlight > 0:
		return at
	case l.fresh.len() > 0 || l.again.len() > 0:
		at = l.probeAt // else next would have returned something
	case l.waiting.len() > 0:
		at = l.waiting.first().due
	default:
		return at
	}
	if l.down && at.Before(l.probeAt) {
		at = l.probeAt
	}
	return at
}

// delivered notes that the receiver has j, and returns how many events more are done with all before them, and the last of those.
func (l *lanes) delivered(j *job, now time.Time) (n int, last *parcel) {
	l.land(j)
	took, slow := now.Sub(j.sent), max(minStuck/2, 4*l.usual)
	again := l.down || l.doubts > 0 || took > slow && now.Sub(l.succeeded) > slow
	l.round++
	l.failing, l.failures, l.doubts = 0, 0, 0
	l.succeeded = now
	if j.sent.After(l.taken) {
		l.taken = j.sent
	}
	if l.usual == 0 {
		l.usual = took
	} else {
		l.usual += (took - l.usual) / 8
	}
	if again {
		l.spell, l.since = l.round, now
		l.down, l.probing, l.probeAt = false, nil, time.Time{}
		l.hurry()
	}
	for _, p := range j.parcels {
		ln := p.lane
		p.done, p.lane, p.job = true, nil, nil
		ln.parcels[0] = nil
		ln.parcels = ln.parcels[1:]
		l.free(ln)
	}
	return l.advance()
}

// kept notes that parcels which were taken out, or were never in a lane, are kept elsewhere, and returns what delivered does.
func (l *lanes) kept(parcels []*parcel) (n int, last *parcel) {
	for _, p := range parcels {
		p.done = true
	}
	return l.advance()
}

func (l *lanes) advance() (n int, last *parcel) {
	for len(l.queue) > 0 && l.queue[0].done {
		last = l.queue[0]
		l.size -= last.size
		l.queue[0] = nil
		l.queue = l.queue[1:]
		n++
	}
	return n, last
}

// land notes that an attempt has ended.
func (l *lanes) land(j *job) {
	l.inFlight--
	j.inFlight = false
}

// free takes a parcel of a lane out of its job.
func (l *lanes) free(ln *lane) {
	if ln.busy--; ln.busy == 0 {
		l.line(ln)
	}
}

// remove takes a lane with no parcel in a job out of the lanes, and returns its parcels.
func (l *lanes) remove(ln *lane) []*parcel {
	parcels := ln.parcels
	ln.parcels, ln.busy = nil, 0
	for _, p := range parcels {
		p.lane, p.job = nil, nil
	}
	if ln.keyed {
		delete(l.byKey, ln.key)
	}
	return parcels
}

// drop is remove for a lane that may be waiting for its turn.
func (l *lanes) drop(ln *lane) []*parcel {
	l.fresh.remove(ln)
	return l.remove(ln)
}

// takeRefused takes out a lane whose first parcel cannot be sent. It returns nil when there is none.
func (l *lanes) takeRefused() []*parcel {
	if len(l.refused) == 0 {
		return nil
	}
	ln := l.refused[0]
	l.refused[0] = nil
	l.refused = l.refused[1:]
	return l.remove(ln)
}

// rejected notes that the only parcel of j is not to be sent again, and takes its lane out. An answer that concerns what was sent says nothing
// of the receiver, so it counts neither for it nor against it.
func (l *lanes) rejected(j *job, now time.Time) []*parcel {
	l.land(j)
	l.pauseProbes(now, 0)
	return l.remove(j.parcels[0].lane)
}

// setAside is rejected for a job that is stuck, in flight or not.
func (l *lanes) setAside(j *job, now time.Time) []*parcel {
	l.recall(j, now)
	return l.remove(j.parcels[0].lane)
}

// scatter has what is in a job that is stuck go on one by one.
func (l *lanes) scatter(j *job, now time.Time) {
	l.recall(j, now)
	l.unpack(j, 1)
}

// resend has j, which was cancelled, sent again at once. That says nothing of anything.
func (l *lanes) resend(j *job, now time.Time) {
	l.land(j)
	l.pauseProbes(now, 0)
	l.again.push(j)
}

// recall ends a job that is in flight no more, or waits.
func (l *lanes) recall(j *job, now time.Time) {
	if j.inFlight {
		l.land(j)
		l.pauseProbes(now, 0)
	} else if !l.waiting.remove(j) {
		l.again.remove(j)
	}
}

// ended notes that a retry has failed for good, and takes it out. Whoever asked for it pauses, so that it says less of the receiver than those
// that go on, and counts while that is down.
func (l *lanes) ended(j *job, now time.Time, retryAfter time.Duration) {
	l.land(j)
	l.failures++
	l.pauseProbes(now, retryAfter)
	l.remove(j.parcels[0].lane)
}

// hurry has those that wait tried at once, except where the receiver has said when.
func (l *lanes) hurry() {
	var told []*job
	for l.waiting.len() > 0 {
		if j := l.waiting.pop(); j.told {
			told = append(told, j)
		} else {
			l.again.push(j)
		}
	}
	for _, j := range told {
		l.waiting.push(j)
	}
}

// failed notes that j is to be sent again, not before retryAfter has passed, and returns how long it waits.
func (l *lanes) failed(j *job, now time.Time, retryAfter time.Duration) time.Duration {
	if j.pause == nil {
		j.pause = l.pause()
	}
	wait := j.pause.next()
	j.told = retryAfter > wait
	wait = max(wait, retryAfter)
	j.due = now.Add(wait)
	l.waiting.push(j)
	if j.failedIn != l.spell {
		j.failedIn, j.failedAt = l.spell, now
	}
	l.count(j, now, retryAfter)
	return wait
}

// split notes that j is not to be sent as a whole again: what was in it goes on in halves, until what the receiver does not take is by itself
// and holds up nobody but its key.
func (l *lanes) split(j *job, now time.Time) {
	l.count(j, now, 0)
	l.unpack(j, len(j.parcels)/2)
}

// unpack has the parcels of a job go on, at most so many of them in one.
func (l *lanes) unpack(j *job, most int) {
	for _, p := range j.parcels {
		p.most, p.job = most, nil
		l.free(p.lane)
	}
}
