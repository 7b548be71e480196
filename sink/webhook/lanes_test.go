package webhook

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// steady makes pauses that the tests can reckon with.
func steady(d time.Duration) func() *pause {
	return func() *pause {
		p := newPause(d, d)
		p.backoff.RandomizationFactor = 0
		p.backoff.MaxInterval = d
		return p
	}
}

func testLimits(requests, window, batch int) limits {
	return limits{requests: requests, window: window, bytes: 1000, batch: batch, batchBytes: 100, pause: steady(time.Second), probe: steady(time.Second)}
}

// model is what the lanes are to keep, told by what goes in and out alone. Events have the numbers of their parcels.
type model struct {
	t      *rapid.T
	l      *lanes
	now    time.Time
	events []modelEvent // by number
	queue  []uint64     // from the oldest one on that is not done
	jobs   []*job       // in flight
	// held are jobs that failed, and when they may go again; what is in one of them goes out again with the same events.
	held   map[*job]time.Time
	hurry  map[*job]bool
	failed map[*job]bool
	// waiting are what was parked and is not committed.
	waiting [][]*parcel
	// letters are those of each key that are not delivered, in order; those without a key are under a key of their own.
	letters map[string][]letter
	retries map[string]*lane
	// newest is the last event of each key that was delivered, in whatever way.
	newest    map[string]uint64
	delivered int
	successes int
	more      bool
}

type modelEvent struct {
	key     string // "" for none
	size    int
	refused bool
	sent    bool   // in flight
	parked  bool   // or to be so, as its key is
	done    bool   // delivered, or kept
	origin  uint64 // of a retry: the event's number when it was new
}

type letter struct {
	number    uint64
	committed bool
}

func (m *model) event(number uint64) *modelEvent { return &m.events[number-1] }

func (m *model) queueKey(number uint64) string {
	if key := m.event(number).key; key != "" {
		return key
	}
	return fmt.Sprint(number)
}

func (m *model) outstandingSize() int {
	n := 0
	for _, number := range m.queue {
		n += m.event(number).size
	}
	return n
}

func (m *model) add(key string, size int, refused bool) {
	window, bytes := m.l.window, m.l.bytes
	if m.l.reserve > 0 && !m.more {
		window, bytes = window-m.l.reserve, bytes-100
	}
	want := len(m.queue) == 0 || len(m.queue) < window && m.outstandingSize()+size <= bytes
	if got := m.l.room(size, m.more); got != want {
		m.t.Fatalf("room for %d bytes: %v, with %d events outstanding", size, got, len(m.queue))
	}
	if !want {
		return
	}
	m.more = false
	p := &parcel{size: size, wire: size}
	number := m.l.number + 1
	m.queue = append(m.queue, number)
	m.events = append(m.events, modelEvent{key: key, size: size, refused: refused})
	if len(m.letters[key]) > 0 && key != "" {
		m.event(number).parked = true
		m.letters[key] = append(m.letters[key], letter{number: number})
		m.waiting = append(m.waiting, []*parcel{p})
		m.l.hold(p)
		return
	}
	if refused {
		p.refusal = errors.New("refused")
	}
	var k []byte
	if key != "" {
		k = []byte(key)
	}
	m.l.add(p, k)
	m.refuse()
}

// refuse parks what cannot be sent and is the first of its key.
func (m *model) refuse() {
	for parcels := m.l.takeRefused(); parcels != nil; parcels = m.l.takeRefused() {
		if !m.event(parcels[0].number).refused {
			m.t.Fatalf("event %d is taken out, although it can be sent", parcels[0].number)
		}
		m.park(parcels)
	}
}

// park checks that what is taken out is all that there is of a key, in order.
func (m *model) park(parcels []*parcel) {
	first := parcels[0].number
	key := m.event(first).key
	var want []uint64
	for _, number := range m.queue {
		if e := m.event(number); e.key == key && !e.parked && !e.done && (key != "" || number == first) {
			want = append(want, number)
		}
	}
	var got []uint64
	for _, p := range parcels {
		got = append(got, p.number)
		m.event(p.number).parked = true
		m.letters[m.queueKey(p.number)] = append(m.letters[m.queueKey(p.number)], letter{number: p.number})
	}
	if !slices.Equal(got, want) {
		m.t.Fatalf("events %v are taken out, want %v", got, want)
	}
	m.waiting = append(m.waiting, parcels)
}

// commit is about one of those that wait for it, in any order.
func (m *model) commit(i int) {
	parcels := m.waiting[i]
	m.waiting = slices.Delete(m.waiting, i, i+1)
	for _, p := range parcels {
		m.event(p.number).done = true
		key := m.queueKey(p.number)
		for i := range m.letters[key] {
			if l := &m.letters[key][i]; l.number == p.number {
				l.committed = true
			}
		}
	}
	m.advance(m.l.kept(parcels))
}

func (m *model) advance(n int, last *parcel) {
	before := m.queue
	for len(m.queue) > 0 && m.event(m.queue[0]).done {
		m.queue = m.queue[1:]
	}
	want := len(before) - len(m.queue)
	if n != want || n > 0 && last.number != before[n-1] || n == 0 && last != nil {
		m.t.Fatalf("%d events are said to be delivered, want %v", n, before[:want])
	}
}

// retry has the first letters of a key tried again, at most so many.
func (m *model) retry(key string, most int) {
	if m.retries[key] != nil {
		return
	}
	var parcels []*parcel
	for _, l := range m.letters[key] {
		if !l.committed || len(parcels) == most {
			break
		}
		e := *m.event(l.number)
		m.events = append(m.events, modelEvent{key: e.key, size: e.size, origin: l.number})
		parcels = append(parcels, &parcel{size: e.size, wire: e.size})
	}
	if len(parcels) > 0 {
		m.retries[key] = m.l.retry(parcels)
	}
}

// retryOf returns the key of the retry that a job is of, or "".
func (m *model) retryOf(j *job) string {
	if origin := m.event(j.parcels[0].number).origin; origin != 0 {
		return m.queueKey(origin)
	}
	return ""
}

func (m *model) next() {
	wasDown, inFlight := m.l.down, len(m.jobs)
	j := m.l.next(m.now)
	if j == nil {
		m.expectNothing()
		return
	}
	if len(m.jobs) >= m.l.requests {
		m.t.Fatalf("request %d of %d", len(m.jobs)+1, m.l.requests)
	}
	if wasDown && (inFlight > 0 || m.now.Before(m.l.probeAt)) {
		m.t.Fatal("more than a probe while the receiver is down")
	}
	if due, ok := m.held[j]; ok && m.now.Before(due) && (j.told || !m.hurry[j]) {
		m.t.Fatal("sent again before its time")
	}
	delete(m.held, j)
	size := 0
	mine := map[uint64]bool{}
	for i, p := range j.parcels {
		e := m.event(p.number)
		switch {
		case i > 0 && j.parcels[i-1].number >= p.number:
			m.t.Fatalf("event %d before %d in a batch", j.parcels[i-1].number, p.number)
		case e.done, e.sent, e.parked, e.refused && e.origin == 0:
			m.t.Fatalf("event %d goes out: %+v", p.number, *e)
		case p.most > 0 && len(j.parcels) > p.most:
			m.t.Fatalf("event %d is in a batch of %d, with %d at most", p.number, len(j.parcels), p.most)
		case m.event(j.parcels[0].number).origin == 0 != (e.origin == 0):
			m.t.Fatalf("event %d is in a batch of retried and others", p.number)
		case e.origin != 0 && m.queueKey(e.origin) != m.retryOf(j):
			m.t.Fatalf("event %d is in a batch of another retry", p.number)
		}
		size += p.size
		e.sent = true
		mine[p.number] = true
		// Nothing of the same key that came before may be undelivered, unless it is before it in the same job.
		before := m.queue
		if e.origin != 0 {
			before = nil
			for _, o := range m.retries[m.queueKey(e.origin)].parcels {
				before = append(before, o.number)
			}
		}
		for _, n := range before {
			if o := m.event(n); n < p.number && e.key != "" && o.key == e.key && !o.done && !mine[n] {
				m.t.Fatalf("event %d of key %q goes out before event %d is delivered", p.number, e.key, n)
			}
		}
	}
	if len(j.parcels) > m.l.batch || len(j.parcels) > 1 && size > m.l.batchBytes {
		m.t.Fatalf("a batch of %d events, %d bytes", len(j.parcels), size)
	}
	m.jobs = append(m.jobs, j)
}

// expectNothing checks that nothing could have gone.
func (m *model) expectNothing() {
	if len(m.jobs) >= m.l.requests || m.l.down && (len(m.jobs) > 0 || m.now.Before(m.l.probeAt)) {
		return
	}
	waits := map[uint64]bool{}
	for j, due := range m.held {
		if !due.After(m.now) {
			m.t.Fatalf("a job does not go although its time has come, with %d in flight", len(m.jobs))
		}
		for _, p := range j.parcels {
			waits[p.number] = true
		}
	}
	blocked := map[string]bool{}
	for _, n := range m.queue {
		e := m.event(n)
		switch {
		case e.done, e.parked:
		case e.sent, waits[n]:
			blocked[e.key] = true
		case e.key == "" || !blocked[e.key]:
			m.t.Fatalf("event %d of key %q does not go although nothing holds it up", n, e.key)
		}
	}
	for key, ln := range m.retries {
		if !m.event(ln.parcels[0].number).sent {
			m.t.Fatalf("the retry of key %s does not go although nothing holds it up", key)
		}
	}
}

func (m *model) take(i int) *job {
	j := m.jobs[i]
	m.jobs = slices.Delete(m.jobs, i, i+1)
	for _, p := range j.parcels {
		m.event(p.number).sent = false
	}
	return j
}

func (m *model) deliver(i int) {
	j := m.take(i)
	m.successes++
	before := m.l.spell
	key := m.retryOf(j)
	numbers := []uint64{}
	for _, p := range j.parcels {
		e := m.event(p.number)
		e.done = true
		number := p.number
		if key != "" {
			number = e.origin
			if m.letters[key][0].number != number {
				m.t.Fatalf("event %d is retried before event %d", number, m.letters[key][0].number)
			}
			m.letters[key] = m.letters[key][1:]
		}
		if e.key != "" && number <= m.newest[e.key] {
			m.t.Fatalf("event %d of key %q is delivered after event %d", number, e.key, m.newest[e.key])
		}
		if key == "" && e.key != "" && len(m.letters[e.key]) > 0 {
			m.t.Fatalf("event %d of key %q is delivered before its letters", number, e.key)
		}
		m.newest[e.key] = number
		numbers = append(numbers, number)
	}
	m.delivered += len(numbers)
	n, last := m.l.delivered(j, m.now)
	if key != "" {
		if n > 0 {
			m.t.Fatalf("%d events are said to be delivered by a retry", n)
		}
		if len(m.retries[key].parcels) == 0 {
			delete(m.retries, key)
		}
	} else {
		m.advance(n, last)
	}
	if m.l.spell != before {
		for j := range m.held {
			m.hurry[j] = true
		}
	}
	m.refuse()
}

func (m *model) fail(i int, retryAfter time.Duration) {
	j := m.take(i)
	if key := m.retryOf(j); key != "" {
		m.l.ended(j, m.now, retryAfter)
		delete(m.retries, key)
		return
	}
	wait := m.l.failed(j, m.now, retryAfter)
	if wait < retryAfter || wait < time.Second {
		m.t.Fatalf("waits %v", wait)
	}
	m.hurry[j] = false
	m.failed[j] = true
	m.held[j] = m.now.Add(wait)
}

// setAside takes out what is stuck, if anything is.
func (m *model) setAside(last bool) {
	j, more, at := m.l.stuck(m.now, last)
	m.more = more
	if more && (j != nil || last || m.l.down || len(m.jobs) >= m.l.requests) {
		m.t.Fatal("more is asked for, which would prove nothing")
	}
	if j == nil {
		if !at.IsZero() && !at.After(m.now) {
			m.t.Fatalf("nothing is stuck at %v, although it was to be at %v", m.now, at)
		}
		return
	}
	switch {
	case m.l.down:
		m.t.Fatal("something is stuck although the receiver is down")
	case !slices.ContainsFunc(j.parcels, func(p *parcel) bool { return p.number == m.queue[0] }):
		m.t.Fatalf("event %d is stuck, which is not the oldest", j.parcels[0].number)
	case m.successes == 0, m.now.Sub(j.first) < minStuck, m.now.Sub(m.l.since) < minStuck:
		m.t.Fatalf("stuck after %v, with %d successes", m.now.Sub(j.first), m.successes)
	case !j.inFlight && len(m.jobs) >= m.l.requests:
		m.t.Fatal("a job that waits is stuck although others take all the places")
	}
	if i := slices.Index(m.jobs, j); i >= 0 {
		m.take(i)
	} else if _, ok := m.held[j]; !ok || j.sent.Before(m.l.since) {
		m.t.Fatal("a job is stuck that is neither in flight nor waits, or was not tried")
	}
	delete(m.held, j)
	if len(j.parcels) > 1 {
		m.l.scatter(j, m.now)
		for _, p := range j.parcels {
			if p.most != 1 {
				m.t.Fatalf("event %d goes on in batches of %d", p.number, p.most)
			}
		}
		return
	}
	m.park(m.l.setAside(j, m.now))
}

// TestLanes compares the lanes with the model over random histories: order of each key, through the dead letters and back, one request of a key at a
// time, the prefix, the window, that nothing is lost, and that nothing waits without a reason or gives way while the receiver is down.
func TestLanes(t *testing.T) {
	parkings, asides := 0, 0
	history := func(t *rapid.T) {
		l := testLimits(rapid.IntRange(1, 8).Draw(t, "requests"), rapid.IntRange(1, 40).Draw(t, "window"), rapid.IntRange(1, 10).Draw(t, "batch"))
		if l.window >= 10 {
			l.reserve = l.window / 10
		}
		m := &model{
			t: t, l: newLanes(l), now: time.Unix(0, 0), held: map[*job]time.Time{}, hurry: map[*job]bool{}, failed: map[*job]bool{},
			letters: map[string][]letter{}, retries: map[string]*lane{}, newest: map[string]uint64{},
		}
		pick := func(t *rapid.T, f func(*job) bool) int {
			var fit []int
			for i, j := range m.jobs {
				if f(j) {
					fit = append(fit, i)
				}
			}
			if len(fit) == 0 {
				t.Skip()
			}
			return rapid.SampledFrom(fit).Draw(t, "job")
		}
		all := func(*job) bool { return true }
		keys := rapid.SampledFrom([]string{"", "a", "b", "c", "d", "e", "f", "g"})
		t.Repeat(map[string]func(*rapid.T){
			"add": func(t *rapid.T) {
				m.t = t
				for range rapid.IntRange(1, 5).Draw(t, "events") {
					refused := rapid.IntRange(0, 30).Draw(t, "refused") == 0
					m.add(keys.Draw(t, "key"), rapid.SampledFrom([]int{1, 10, 60, 200}).Draw(t, "size"), refused)
				}
			},
			"next":    func(t *rapid.T) { m.t = t; m.next() },
			"deliver": func(t *rapid.T) { m.t = t; m.deliver(pick(t, all)) },
			"fail": func(t *rapid.T) {
				m.t = t
				m.fail(pick(t, all), rapid.SampledFrom([]time.Duration{0, 0, 5 * time.Second}).Draw(t, "retry after"))
			},
			"resend": func(t *rapid.T) {
				m.t = t
				j := m.take(pick(t, func(j *job) bool { return m.retryOf(j) == "" }))
				m.l.resend(j, m.now)
				m.hurry[j] = true
				m.held[j] = m.now
			},
			"split": func(t *rapid.T) {
				m.t = t
				m.l.split(m.take(pick(t, func(j *job) bool { return len(j.parcels) > 1 })), m.now)
			},
			"reject": func(t *rapid.T) {
				m.t = t
				i := pick(t, func(j *job) bool { return len(j.parcels) == 1 && m.retryOf(j) == "" })
				m.park(m.l.rejected(m.take(i), m.now))
				parkings++
			},
			"set aside": func(t *rapid.T) {
				m.t = t
				m.now = m.now.Add(time.Duration(rapid.SampledFrom([]int{0, 0, 1500}).Draw(t, "ms")) * time.Millisecond)
				before := len(m.waiting)
				m.setAside(rapid.Bool().Draw(t, "last"))
				asides += len(m.waiting) - before
			},
			// The receiver takes everything but the oldest, which chance alone seldom has.
			"stick": func(t *rapid.T) {
				m.t = t
				for range rapid.IntRange(1, 6).Draw(t, "rounds") {
					for n := -1; n < len(m.jobs); {
						n = len(m.jobs)
						m.next()
					}
					m.now = m.now.Add(400 * time.Millisecond)
					for i := len(m.jobs) - 1; i >= 0 && len(m.queue) > 0; i-- {
						if !slices.ContainsFunc(m.jobs[i].parcels, func(p *parcel) bool { return p.number == m.queue[0] }) {
							m.deliver(i)
						}
					}
				}
				before := len(m.waiting)
				m.setAside(false)
				asides += len(m.waiting) - before
			},
			"commit": func(t *rapid.T) {
				m.t = t
				if len(m.waiting) == 0 {
					t.Skip()
				}
				m.commit(rapid.IntRange(0, len(m.waiting)-1).Draw(t, "which"))
			},
			"retry": func(t *rapid.T) {
				m.t = t
				if queues := slices.Sorted(maps.Keys(m.letters)); len(queues) > 0 {
					m.retry(rapid.SampledFrom(queues).Draw(t, "queue"), rapid.IntRange(1, 12).Draw(t, "most"))
				}
			},
			"end retry": func(t *rapid.T) {
				m.t = t
				for _, key := range slices.Sorted(maps.Keys(m.retries)) {
					if ln := m.retries[key]; ln.busy == 0 {
						m.l.drop(ln)
						delete(m.retries, key)
						return
					}
				}
				t.Skip()
			},
			"wait": func(t *rapid.T) {
				m.t = t
				m.now = m.now.Add(time.Duration(rapid.IntRange(1, 3000).Draw(t, "ms")) * time.Millisecond)
			},
		})
		// Whatever happened, all of it can be delivered, and wake says when.
		m.t = t
		for !m.l.empty() || len(m.letters) > 0 {
			for len(m.waiting) > 0 {
				m.commit(0)
			}
			for key := range m.letters {
				if len(m.letters[key]) == 0 {
					delete(m.letters, key)
				} else {
					m.retry(key, 5)
				}
			}
			m.next()
			switch {
			case len(m.jobs) > 0:
				m.deliver(0)
			case !m.l.empty() || len(m.retries) > 0:
				at := m.l.wake()
				if !at.After(m.now) {
					t.Fatalf("nothing goes at %v, and lanes wake at %v", m.now, at)
				}
				m.now = at
			}
		}
		events := 0
		for _, e := range m.events {
			if e.origin == 0 {
				events++
			}
		}
		if m.delivered != events || len(m.queue) != 0 || len(m.l.byKey) != 0 || m.l.size != 0 || m.l.inFlight != 0 {
			t.Errorf("%d of %d events delivered, %d lanes, %d bytes and %d requests are left", m.delivered, events, len(m.l.byKey), m.l.size, m.l.inFlight)
		}
	}
	for runs := 0; runs == 0 || runs < 20 && (parkings == 0 || asides == 0); runs++ {
		rapid.Check(t, history)
	}
	if parkings == 0 || asides == 0 {
		t.Errorf("%d events were rejected and %d set aside: no test", parkings, asides)
	}
}

// TestBreaker: a receiver that fails for different keys is asked one request at a time; one that fails for a few keys is not.
func TestBreaker(t *testing.T) {
	now := time.Unix(0, 0)
	l := newLanes(testLimits(16, 1000, 1))
	for i := range 100 {
		l.add(&parcel{size: 1}, fmt.Append(nil, i))
	}
	next := func(want int) (jobs []*job) {
		t.Helper()
		for j := l.next(now); j != nil; j = l.next(now) {
			jobs = append(jobs, j)
		}
		if len(jobs) != want {
			t.Fatalf("%d requests, want %d", len(jobs), want)
		}
		return jobs
	}
	jobs := next(16)
	for range 20 { // one key, again and again: the others go on
		l.failed(jobs[0], now, 0)
		now = now.Add(time.Second)
		jobs[0] = next(1)[0]
	}
	for _, j := range jobs[:4] {
		l.failed(j, now, 0)
	}
	if l.down {
		t.Fatal("down after four keys")
	}
	jobs = append(next(4), jobs[4:]...)
	for i, j := range jobs {
		l.failed(j, now, 0)
		if i > 0 {
			next(0)
		}
	}
	for range 10 {
		next(0)
		if at := l.wake(); at != now.Add(time.Second) {
			t.Fatalf("wakes at %v, want %v", at, now.Add(time.Second))
		}
		now = l.wake()
		probe := next(1)[0]
		if at := l.wake(); !at.IsZero() {
			t.Fatalf("wakes at %v although a probe is out", at)
		}
		l.failed(probe, now, 0)
	}
	now = l.wake()
	probe := next(1)[0]
	l.failed(probe, now, time.Minute) // the receiver asks for a minute
	if at := l.wake(); at != now.Add(time.Minute) {
		t.Fatalf("wakes at %v", at)
	}
	now = l.wake()
	probe = next(1)[0]
	l.rejected(probe, now) // what was sent is to blame, and the receiver may still be down
	next(0)
	if at := l.wake(); at != now.Add(time.Second) {
		t.Fatalf("wakes at %v", at)
	}
	now = l.wake()
	probe = next(1)[0]
	if n, _ := l.delivered(probe, now); l.down || n > 1 {
		t.Fatalf("down %v, %d delivered", l.down, n)
	}
	next(16)
}

// TestStuck: what takes its time is not stuck, nor is anything when the whole receiver hangs at once.
func TestStuck(t *testing.T) {
	start := time.Unix(0, 0)
	at := func(ms int) time.Time { return start.Add(time.Duration(ms) * time.Millisecond) }
	open := func(requests int, keys string) *lanes {
		l := newLanes(testLimits(requests, 1000, 1))
		for _, key := range keys {
			l.add(&parcel{size: 1}, []byte{byte(key)})
		}
		return l
	}
	send := func(l *lanes, ms int) *job {
		t.Helper()
		j := l.next(at(ms))
		if j == nil {
			t.Fatal("nothing goes")
		}
		return j
	}
	expect := func(l *lanes, ms int, want *job, wantAt time.Time) {
		t.Helper()
		if j, more, again := l.stuck(at(ms), false); j != want || again != wantAt || more {
			t.Errorf("after %d ms: stuck %v, want %v; more %v, again at %v, want %v", ms, j, want, more, again, wantAt)
		}
	}
	none := time.Time{}

	l := open(2, "abbb") // a hangs, and the others are taken
	a := send(l, 0)
	l.delivered(send(l, 0), at(1))
	l.delivered(send(l, 300), at(301)) // which was sent too early to prove anything
	if j, more, again := l.stuck(at(400), false); j != nil || more || !again.IsZero() {
		t.Errorf("stuck %v, more %v, again at %v", j, more, again)
	}
	l.delivered(send(l, 600), at(601))
	expect(l, 602, nil, at(1000))
	expect(l, 1000, a, none)

	l = open(2, "abc") // all hang at once, although one was taken before
	send(l, 0)
	l.delivered(send(l, 0), at(1))
	send(l, 1)
	expect(l, 100_000, nil, none)

	l = open(3, "abc") // the same, and there is nothing else to prove anything
	a = send(l, 0)
	l.delivered(send(l, 0), at(1))
	send(l, 1)
	expect(l, 999, nil, at(1000))
	if j, more, _ := l.stuck(at(1000), false); j != nil || !more {
		t.Errorf("stuck %v, more %v", j, more)
	}
	l.add(&parcel{size: 1}, []byte("d"))
	l.delivered(send(l, 1001), at(1002))
	expect(l, 1002, a, none)

	l = open(2, "abbbbc") // everything takes a second and a half
	send(l, 0)
	l.delivered(send(l, 0), at(1500))
	send(l, 1500)
	expect(l, 1500, nil, none)

	l = open(2, "abbb") // a fails at once, and then all
	a = send(l, 0)
	b := send(l, 0)
	l.delivered(b, at(5))
	l.failed(a, at(6), 0)
	l.failed(send(l, 6), at(7), 0)
	if j, more, _ := l.stuck(at(3000), false); j != nil || !more {
		t.Errorf("stuck %v, more %v", j, more)
	}
	l.delivered(send(l, 3100), at(3101)) // a, again
	if len(l.queue) != 2 {
		t.Fatalf("%d events are left", len(l.queue))
	}

	l = open(1, "ab") // the last one is all that is left
	l.delivered(send(l, 0), at(1))
	b = send(l, 1)
	l.failed(b, at(2), 0)
	if j, _, _ := l.stuck(at(5000), true); j != nil {
		t.Error("the last event gives way after five seconds")
	}
	if j, _, _ := l.stuck(at(10_001), true); j != b {
		t.Error("the last event holds up the end for ever")
	}
}
