package sinktest

import (
	"bytes"
	"sync"
	"testing"
	"time"

	"ebb/event"
	"ebb/sink"
)

// DeadLetters keeps letters in memory, and commits them as a database does: some time later, in order, and from a goroutine of its own.
type DeadLetters struct {
	t       testing.TB
	delay   time.Duration
	retries chan *sink.Retry

	mu      sync.Mutex
	letters []*Letter
	held    map[string]int // how many letters a key has that are not delivered
	waiting []waiting
	changed chan struct{} // closed and replaced when something waits, or is committed
	paused  bool
}

// Letter is a letter as it was kept.
type Letter struct {
	Message
	Reason, Detail  string
	Attempts        int
	FirstAt, LastAt time.Time
	Retry           bool
	// Committed and Delivered are what came of it; one that is discarded is delivered as well.
	Committed, Delivered bool
}

type waiting struct {
	letters []*Letter
	kept    func()
}

var _ sink.DeadLetters = (*DeadLetters)(nil)

// NewDeadLetters returns dead letters that commit after a delay, until the end of the test.
func NewDeadLetters(t testing.TB, delay time.Duration) *DeadLetters {
	d := &DeadLetters{t: t, delay: delay, retries: make(chan *sink.Retry), held: map[string]int{}, changed: make(chan struct{})}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() { d.commit(stop) })
	t.Cleanup(func() {
		close(stop)
		wg.Wait()
	})
	return d
}

// Queue is [sink.DeadLetters.Queue].
func (d *DeadLetters) Queue(e *event.Event, kept func()) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if e.Key == nil || d.held[string(e.Key)] == 0 {
		return false
	}
	d.keep([]sink.Letter{{Event: e, Reason: sink.Queued}}, kept)
	return true
}

// Park is [sink.DeadLetters.Park].
func (d *DeadLetters) Park(letters []sink.Letter, kept func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(letters) == 0 {
		d.t.Error("no letters are parked")
	}
	for i := range letters {
		first, e := letters[0].Event, letters[i].Event
		if first.Key == nil && len(letters) > 1 || !bytes.Equal(first.Key, e.Key) {
			d.t.Errorf("event %s, whose key is %q, is parked with event %s, whose key is %q", e.ID, e.Key, first.ID, first.Key)
		}
		if letters[i].Retry != letters[0].Retry || i > 0 && letters[i].Reason != sink.Queued || letters[i].Reason == "" {
			d.t.Errorf("event %s is parked for %q behind event %s, retry %v and %v", e.ID, letters[i].Reason, first.ID, letters[i].Retry, letters[0].Retry)
		}
	}
	d.keep(letters, kept)
}

func (d *DeadLetters) keep(letters []sink.Letter, kept func()) {
	w := waiting{kept: kept}
	for _, l := range letters {
		letter := &Letter{
			Message: fromEvent(l.Event), Reason: l.Reason, Detail: l.Detail, Attempts: l.Attempts, FirstAt: l.FirstAt, LastAt: l.LastAt, Retry: l.Retry,
		}
		w.letters = append(w.letters, letter)
		if letter.Key != nil {
			d.held[*letter.Key]++
		}
	}
	d.letters = append(d.letters, w.letters...)
	d.waiting = append(d.waiting, w)
	d.tell()
}

func (d *DeadLetters) tell() {
	close(d.changed)
	d.changed = make(chan struct{})
}

// Retries is [sink.DeadLetters.Retries].
func (d *DeadLetters) Retries() <-chan *sink.Retry { return d.retries }

// Pause keeps all that waits from being committed, until it is called with false.
func (d *DeadLetters) Pause(paused bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.paused = paused
	d.tell()
}

func (d *DeadLetters) commit(stop <-chan struct{}) {
	for {
		d.mu.Lock()
		changed, idle := d.changed, d.paused || len(d.waiting) == 0
		d.mu.Unlock()
		if idle {
			select {
			case <-changed:
				continue
			case <-stop:
				return
			}
		}
		select {
		case <-time.After(d.delay):
		case <-stop:
			return
		}
		d.mu.Lock()
		group := d.waiting
		if d.paused {
			group = nil
		} else {
			d.waiting = nil
		}
		for _, w := range group {
			for _, l := range w.letters {
				l.Committed = true
			}
		}
		d.tell()
		d.mu.Unlock()
		for _, w := range group {
			w.kept()
		}
	}
}

// Letters returns all that were kept, in order.
func (d *DeadLetters) Letters() []Letter {
	d.mu.Lock()
	defer d.mu.Unlock()
	letters := make([]Letter, len(d.letters))
	for i, l := range d.letters {
		letters[i] = *l
	}
	return letters
}

// Discard has an event that was kept not be delivered.
func (d *DeadLetters) Discard(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, l := range d.letters {
		if l.ID == id && !l.Delivered {
			d.settle(l)
		}
	}
}

func (d *DeadLetters) settle(l *Letter) {
	l.Delivered = true
	if l.Key != nil {
		d.held[*l.Key]--
	}
	d.tell()
}

func (d *DeadLetters) delivered(id string) bool {
	for _, l := range d.Letters() {
		if l.ID == id {
			return l.Delivered
		}
	}
	return false
}

// Has reports whether an event was kept.
func (d *DeadLetters) Has(id string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, l := range d.letters {
		if l.ID == id {
			return true
		}
	}
	return false
}

// Await waits until Letters satisfies a condition.
func (d *DeadLetters) Await(what string, f func([]Letter) bool) {
	d.t.Helper()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	for {
		d.mu.Lock()
		changed := d.changed
		d.mu.Unlock()
		if f(d.Letters()) {
			return
		}
		select {
		case <-changed:
		case <-timer.C:
			d.t.Fatalf("not within %v: %s", patience, what)
		}
	}
}

// Hand hands the first letters of a queue that are committed and not delivered to the Run under way, at most so many, and returns what comes of it. The
// queue is that of a key, or of the only letter that has none and that id. It returns a nil channel when there are none, or when no Run takes them.
func (d *DeadLetters) Hand(queue string, most int) <-chan Retried {
	d.t.Helper()
	d.mu.Lock()
	var letters []*Letter
	for _, l := range d.letters {
		mine := l.Key != nil && *l.Key == queue || l.Key == nil && l.ID == queue
		if mine && l.Committed && !l.Delivered && len(letters) < most {
			letters = append(letters, l)
		}
	}
	d.mu.Unlock()
	if len(letters) == 0 {
		return nil
	}
	b := event.NewBatch()
	for _, l := range letters {
		m := l.Message
		m.Origin = event.Retried
		addTo(b, m)
	}
	ended := make(chan Retried, 1)
	var once sync.Once
	r := &sink.Retry{Batch: b, Done: func(n int, seq uint64, failure *sink.Failure) {
		again := true
		once.Do(func() { again = false })
		switch {
		case again:
			d.t.Error("a retry is done twice")
			return
		case n < 0 || n > len(letters) || failure != nil && n == len(letters):
			d.t.Errorf("%d events of a retry of %d are delivered, and then: %+v", n, len(letters), failure)
			return
		}
		d.mu.Lock()
		for _, l := range letters[:n] {
			d.settle(l)
		}
		d.mu.Unlock()
		ended <- Retried{Delivered: n, Sequence: seq, Failure: failure}
	}}
	select {
	case d.retries <- r:
		return ended
	case <-time.After(patience):
		b.Release()
		d.t.Errorf("nobody takes a retry within %v", patience)
		return nil
	}
}

// Retried is what came of a retry.
type Retried struct {
	Delivered int
	Sequence  uint64
	Failure   *sink.Failure
}

// Retry is Hand, and waits for the outcome.
func (d *DeadLetters) Retry(queue string, most int) Retried {
	d.t.Helper()
	ended := d.Hand(queue, most)
	if ended == nil {
		d.t.Fatalf("there is nothing to retry of %q, or nobody who does", queue)
	}
	select {
	case r := <-ended:
		return r
	case <-time.After(patience):
		d.t.Fatalf("a retry goes on after %v", patience)
		return Retried{}
	}
}

// fromEvent copies e.
func fromEvent(e *event.Event) Message {
	m := Message{
		ID: string(e.ID), Topic: string(e.Topic), Payload: string(e.Payload), ContentType: e.ContentType, Position: e.Position, Origin: e.Origin, Time: e.Time,
	}
	if e.Key != nil {
		m.Key = new(string(e.Key))
	}
	for _, h := range e.Headers {
		if m.Headers == nil {
			m.Headers = map[string]string{}
		}
		m.Headers[string(h.Name)] = string(h.Value)
	}
	return m
}
