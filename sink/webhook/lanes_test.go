package webhook

import (
	"fmt"
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

// model is what the lanes are to keep, told by what goes in and out alone.
type model struct {
	t     *rapid.T
	l     *lanes
	now   time.Time
	keys  []string // of each event by number; "" for none
	sizes []int
	done  map[uint64]bool
	sent  map[uint64]bool // in flight
	jobs  []*job
	// held are jobs that failed, and when they may go again; what is in one of them goes out again with the same events.
	held   map[*job]time.Time
	first  uint64 // the oldest undelivered one
	failed map[*job]bool
}

func (m *model) outstandingSize() int {
	n := 0
	for i := m.first; i <= uint64(len(m.keys)); i++ {
		n += m.sizes[i-1]
	}
	return n
}

func (m *model) add(key string, size int) {
	outstanding := len(m.keys) - int(m.first) + 1
	want := outstanding == 0 || outstanding < m.l.window && m.outstandingSize()+size <= m.l.bytes
	if got := m.l.room(size); got != want {
		m.t.Fatalf("room for %d bytes: %v, with %d events outstanding", size, got, outstanding)
	}
	if !want {
		return
	}
	var k []byte
	if key != "" {
		k = []byte(key)
	}
	m.l.add(&parcel{size: size, wire: size}, k)
	m.keys, m.sizes = append(m.keys, key), append(m.sizes, size)
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
	if due, ok := m.held[j]; ok && m.now.Before(due) && !j.told && !m.failed[j] {
		m.t.Fatal("sent again before its time")
	} else if ok && j.told && m.now.Before(due) {
		m.t.Fatal("sent again before the time that the receiver told")
	}
	delete(m.held, j)
	size := 0
	for i, p := range j.parcels {
		switch {
		case i > 0 && j.parcels[i-1].number >= p.number:
			m.t.Fatalf("event %d before %d in a batch", j.parcels[i-1].number, p.number)
		case m.done[p.number], m.sent[p.number]:
			m.t.Fatalf("event %d goes out again, delivered %v, in flight %v", p.number, m.done[p.number], m.sent[p.number])
		case p.most > 0 && len(j.parcels) > p.most:
			m.t.Fatalf("event %d is in a batch of %d, with %d at most", p.number, len(j.parcels), p.most)
		}
		size += p.size
		m.sent[p.number] = true
	}
	if len(j.parcels) > m.l.batch || len(j.parcels) > 1 && size > m.l.batchBytes {
		m.t.Fatalf("a batch of %d events, %d bytes", len(j.parcels), size)
	}
	// Nothing of the same key that came before may be undelivered, unless it is before it in the same job.
	mine := map[uint64]bool{}
	for _, p := range j.parcels {
		for n := m.first; m.keys[p.number-1] != "" && n < p.number; n++ {
			if m.keys[n-1] == m.keys[p.number-1] && !m.done[n] && !mine[n] {
				m.t.Fatalf("event %d of key %q goes out before event %d is delivered", p.number, m.keys[n-1], n)
			}
		}
		mine[p.number] = true
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
	for n := m.first; n <= uint64(len(m.keys)); n++ {
		key := m.keys[n-1]
		switch {
		case m.done[n]:
		case m.sent[n], waits[n]:
			blocked[key] = true
		case key == "" || !blocked[key]:
			m.t.Fatalf("event %d of key %q does not go although nothing holds it up", n, key)
		}
	}
}

func (m *model) take(i int) *job {
	j := m.jobs[i]
	m.jobs = slices.Delete(m.jobs, i, i+1)
	for _, p := range j.parcels {
		delete(m.sent, p.number)
	}
	return j
}

func (m *model) deliver(i int) {
	j := m.take(i)
	wasDown := m.l.down
	n, last := m.l.delivered(j, m.now)
	for _, p := range j.parcels {
		m.done[p.number] = true
	}
	before := m.first
	for m.done[m.first] {
		m.first++
	}
	if n != int(m.first-before) || n > 0 && last.number != m.first-1 || n == 0 && last != nil {
		m.t.Fatalf("%d events are said to be delivered, want those from %d to %d", n, before, m.first-1)
	}
	if wasDown {
		for j := range m.held {
			m.failed[j] = true // may go at once
		}
	}
}

func (m *model) fail(i int, retryAfter time.Duration) {
	j := m.take(i)
	wait := m.l.failed(j, m.now, retryAfter)
	if wait < retryAfter || wait < time.Second {
		m.t.Fatalf("waits %v", wait)
	}
	m.failed[j] = false
	m.held[j] = m.now.Add(wait)
}

// TestLanes compares the lanes with the model over random histories: order of each key, one request of a key at a time, the contiguous
// prefix, the window, and that nothing waits without a reason.
func TestLanes(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		l := testLimits(rapid.IntRange(1, 8).Draw(t, "requests"), rapid.IntRange(1, 40).Draw(t, "window"), rapid.IntRange(1, 10).Draw(t, "batch"))
		m := &model{t: t, l: newLanes(l), now: time.Unix(0, 0), done: map[uint64]bool{}, sent: map[uint64]bool{}, held: map[*job]time.Time{}, failed: map[*job]bool{}, first: 1}
		pick := func(t *rapid.T) int {
			if len(m.jobs) == 0 {
				t.Skip()
			}
			return rapid.IntRange(0, len(m.jobs)-1).Draw(t, "job")
		}
		keys := rapid.SampledFrom([]string{"", "a", "b", "c", "d", "e", "f", "g"})
		t.Repeat(map[string]func(*rapid.T){
			"add": func(t *rapid.T) {
				m.t = t
				for range rapid.IntRange(1, 5).Draw(t, "events") {
					m.add(keys.Draw(t, "key"), rapid.SampledFrom([]int{1, 10, 60, 200}).Draw(t, "size"))
				}
			},
			"next":    func(t *rapid.T) { m.t = t; m.next() },
			"deliver": func(t *rapid.T) { m.t = t; m.deliver(pick(t)) },
			"fail": func(t *rapid.T) {
				m.t = t
				m.fail(pick(t), rapid.SampledFrom([]time.Duration{0, 0, 5 * time.Second}).Draw(t, "retry after"))
			},
			"split": func(t *rapid.T) {
				m.t = t
				i := pick(t)
				if len(m.jobs[i].parcels) == 1 {
					t.Skip()
				}
				m.l.split(m.take(i), m.now)
			},
			"wait": func(t *rapid.T) {
				m.t = t
				m.now = m.now.Add(time.Duration(rapid.IntRange(1, 3000).Draw(t, "ms")) * time.Millisecond)
			},
		})
		// Whatever happened, all of it can be delivered, and wake says when.
		m.t = t
		for !m.l.empty() {
			m.next()
			switch {
			case len(m.jobs) > 0:
				m.deliver(0)
			default:
				at := m.l.wake()
				if !at.After(m.now) {
					t.Fatalf("nothing goes at %v, and lanes wake at %v", m.now, at)
				}
				m.now = at
			}
		}
		if int(m.first) != len(m.keys)+1 || len(m.l.byKey) != 0 || m.l.size != 0 {
			t.Errorf("%d of %d events delivered, %d lanes and %d bytes are left", m.first-1, len(m.keys), len(m.l.byKey), m.l.size)
		}
	})
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
	if n, _ := l.delivered(probe, now); l.down || n > 1 {
		t.Fatalf("down %v, %d delivered", l.down, n)
	}
	next(16)
}
