package webhook

import (
	"cmp"
	"container/heap"
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
	// batch and batchBytes are how much one request carries. One event it carries always.
	batch, batchBytes int
	// pause gives the pauses between attempts, probe those between probes of a receiver that is down.
	pause, probe func() *pause
}

// parcel is an event on its way to the receiver.
type parcel struct {
	number    uint64 // in order of arrival
	lane      *lane
	size      int
	most      int // how many events may share its request; 0 is any number
	delivered bool

	position event.Position
	id       []byte
	event    *event.Event // in binary mode
	held     *held        // what event points into
	body     []byte       // in the other modes
}

// lane holds the parcels of one key in order. Those in a job are its first ones, and while there are any, no other job gets more.
type lane struct {
	key     string
	keyed   bool
	parcels []*parcel
	busy    int // how many are in a job
}

// job is what one request carries, through all of its attempts: so that a request that is repeated is the same to the receiver.
type job struct {
	parcels  []*parcel // in order of arrival
	attempts int
	pause    *pause
	due      time.Time // of the next attempt
	told     bool      // by the receiver, in Retry-After
	round    uint64    // in which it last failed
	logged   bool      // that it failed
	since    time.Time // of the first failure
}

// lanes decides which event goes out when. It does no I/O, knows the time only from its callers, and is used by one goroutine.
//
// Events of one key are in flight strictly one request after the other, until the receiver has said yes; those without a key wait for
// nobody. Of what may go, the oldest goes first. A job that waits for its next attempt takes no place of the requests in flight.
type lanes struct {
	limits
	queue  []*parcel // from the oldest undelivered one on
	size   int       // of queue
	number uint64
	byKey  map[string]*lane

	fresh    ordered[*lane] // with parcels, and none in a job
	again    ordered[*job]  // whose time has come
	waiting  ordered[*job]
	inFlight int

	breaker
}

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
}

func newLanes(l limits) *lanes {
	return &lanes{
		limits:  l,
		byKey:   map[string]*lane{},
		breaker: breaker{round: 1},
		fresh:   ordered[*lane]{before: func(a, b *lane) bool { return a.parcels[0].number < b.parcels[0].number }},
		again:   ordered[*job]{before: func(a, b *job) bool { return a.parcels[0].number < b.parcels[0].number }},
		waiting: ordered[*job]{before: func(a, b *job) bool { return a.due.Before(b.due) }},
	}
}

// room reports whether a parcel of a size may be added.
func (l *lanes) room(size int) bool {
	return len(l.queue) == 0 || len(l.queue) < l.window && l.size+size <= l.bytes
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
	l.number++
	p.number, p.lane = l.number, ln
	l.queue = append(l.queue, p)
	l.size += p.size
	ln.parcels = append(ln.parcels, p)
	if len(ln.parcels) == 1 {
		l.fresh.push(ln)
	}
}

// next returns what is to be sent now, or nil. [lanes.delivered], [lanes.failed] or [lanes.split] says what came of it.
func (l *lanes) next(now time.Time) *job {
	for l.waiting.len() > 0 && !l.waiting.first().due.After(now) {
		l.again.push(l.waiting.pop())
	}
	if l.inFlight >= l.requests || l.down && (l.inFlight > 0 || now.Before(l.probeAt)) {
		return nil
	}
	j := l.pick()
	if j != nil {
		l.inFlight++
		j.attempts++
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
		for _, p := range ln.parcels {
			m := most
			if p.most > 0 {
				m = min(m, p.most)
			}
			if n := len(j.parcels); n > 0 && (n >= m || size+p.size > l.batchBytes) {
				break
			}
			most = m
			size += p.size
			ln.busy++
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

// delivered notes that the receiver has j, and returns how many events more are delivered with all before them, and the last of those.
func (l *lanes) delivered(j *job) (n int, last *parcel) {
	l.inFlight--
	l.round++
	l.failing = 0
	if l.down {
		l.down, l.probing, l.probeAt = false, nil, time.Time{}
		l.hurry()
	}
	for _, p := range j.parcels {
		p.delivered = true
		p.lane.parcels[0] = nil
		p.lane.parcels = p.lane.parcels[1:]
		l.free(p.lane)
	}
	for len(l.queue) > 0 && l.queue[0].delivered {
		last = l.queue[0]
		l.size -= last.size
		l.queue[0] = nil
		l.queue = l.queue[1:]
		n++
	}
	return n, last
}

// free takes a parcel of a lane out of its job.
func (l *lanes) free(ln *lane) {
	ln.busy--
	switch {
	case ln.busy > 0:
	case len(ln.parcels) > 0:
		l.fresh.push(ln)
	case ln.keyed:
		delete(l.byKey, ln.key)
	}
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
	l.count(j, now, retryAfter)
	return wait
}

// split notes that j is not to be sent as a whole again: what was in it goes on in halves, until what the receiver does not take is by itself
// and holds up nobody but its key.
func (l *lanes) split(j *job, now time.Time) {
	for _, p := range j.parcels {
		p.most = len(j.parcels) / 2
		l.free(p.lane)
	}
	l.count(j, now, 0)
}

func (l *lanes) count(j *job, now time.Time, retryAfter time.Duration) {
	l.inFlight--
	if j.round != l.round {
		j.round = l.round
		l.failing++
	}
	if !l.down && l.failing >= breakAfter {
		l.down, l.probing = true, l.probe()
	}
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

// ordered is a heap.
type ordered[T any] struct {
	items  []T
	before func(a, b T) bool
}

func (o *ordered[T]) len() int { return len(o.items) }
func (o *ordered[T]) first() T { return o.items[0] }
func (o *ordered[T]) push(x T) { heap.Push((*heapOf[T])(o), x) }
func (o *ordered[T]) pop() T   { return heap.Pop((*heapOf[T])(o)).(T) }

// heapOf keeps the methods that container/heap asks for from those of ordered.
type heapOf[T any] ordered[T]

func (h *heapOf[T]) Len() int           { return len(h.items) }
func (h *heapOf[T]) Less(i, j int) bool { return h.before(h.items[i], h.items[j]) }
func (h *heapOf[T]) Swap(i, j int)      { h.items[i], h.items[j] = h.items[j], h.items[i] }
func (h *heapOf[T]) Push(x any)         { h.items = append(h.items, x.(T)) }
func (h *heapOf[T]) Pop() any {
	last := len(h.items) - 1
	x := h.items[last]
	var none T
	h.items[last] = none
	h.items = h.items[:last]
	return x
}
