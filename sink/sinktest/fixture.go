package sinktest

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"ebb/event"
	"ebb/sink"
)

// patience is how long a case waits for what must come.
var patience = 60 * time.Second

// promptly is how soon a Run must have ended when its context has.
var promptly = 5 * time.Second

type fixture struct {
	t    *testing.T
	h    Harness
	sink sink.Sink
	rand *rand.Rand
	// dead, unless nil, keeps what cannot be delivered.
	dead *DeadLetters
	// block is [sink.Outcome.Block].
	block bool

	// confirmed is how many distinct events the destination is known to hold, by what the sink said.
	confirmed int
	// known lags behind that, as what the database records does.
	known sink.Known
}

func newFixture(t *testing.T, h Harness) *fixture {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	f := &fixture{t: t, h: h, rand: rand.New(rand.NewPCG(seed, 0)),
		known: sink.Known{Source: sink.Source{SystemIdentifier: "7300000000000000001", Database: "app", Slot: "ebb"}}}
	f.sink = h.New(t)
	t.Cleanup(f.close)
	return f
}

func (f *fixture) close() {
	if err := f.sink.Close(); err != nil {
		f.t.Errorf("close: %v", err)
	}
}

func (f *fixture) reopen() {
	f.close()
	f.sink = f.h.Reopen(f.t)
}

// resume checks that the sink resumes at the last of want, or at the zero position when there is none.
func (f *fixture) resume(want ...Message) {
	f.t.Helper()
	var pos event.Position
	if len(want) > 0 {
		pos = want[len(want)-1].Position
	}
	if got := f.tail(); got != pos {
		f.t.Fatalf("resume: got position %v, want %v", got, pos)
	}
}

// tail returns what the sink resumes at.
func (f *fixture) tail() event.Position {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	tail, err := f.sink.Resume(ctx, f.known)
	if err != nil {
		f.t.Fatalf("resume: %v", err)
	}
	return tail.Position
}

// resumeIn returns how many of messages are at or before the position that the sink resumes at.
func (f *fixture) resumeIn(messages []Message) int {
	f.t.Helper()
	pos, n := f.tail(), 0
	for n < len(messages) && messages[n].Position.Compare(pos) <= 0 {
		n++
	}
	if n == 0 && !pos.IsZero() || n > 0 && messages[n-1].Position != pos {
		f.t.Fatalf("resume: position %v is that of no event", pos)
	}
	return n
}

// running is a Run under way, with what it said so far.
type running struct {
	f       *fixture
	in      chan *event.Batch
	cancel  context.CancelFunc
	ended   chan struct{}
	err     error // valid when ended is closed
	calling atomic.Bool

	// Everything below is written under mu; what only the test's goroutine writes, that one reads without.
	mu        sync.Mutex
	messages  []Message // what will be handed over, in all
	handed    int
	delivered int
	sequence  uint64
	changed   chan struct{} // closed and replaced when delivered changes
}

// start starts a Run, which is going to be handed messages.
func (f *fixture) start(messages []Message) *running {
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{f: f, messages: messages, in: make(chan *event.Batch), cancel: cancel, ended: make(chan struct{}), changed: make(chan struct{})}
	s := f.sink
	go func() { // ended is waited for by the cleanup below, at the latest
		defer close(r.ended)
		r.err = errors.New("the goroutine of Run was ended by a harness")
		out := sink.Outcome{Delivered: r.onDelivered, Block: f.block}
		if f.dead != nil {
			out.Dead = f.dead
		}
		r.err = s.Run(ctx, r.in, out)
	}()
	f.t.Cleanup(func() {
		cancel()
		select {
		case <-r.ended:
		case <-time.After(promptly):
			f.t.Errorf("run goes on %v after its context ended", promptly)
		}
	})
	return r
}

func (r *running) onDelivered(p sink.Progress) {
	t, n := r.f.t, p.Events
	if !r.calling.CompareAndSwap(false, true) {
		t.Error("delivered is called twice at once")
	}
	defer r.calling.Store(false)
	select {
	case <-r.ended:
		t.Error("delivered is called after Run ended")
	default:
	}
	r.mu.Lock()
	messages, handed, total := r.messages, r.handed, r.delivered+n
	r.mu.Unlock()
	switch {
	case n <= 0:
		t.Errorf("delivered says %d events", n)
		return
	case total > handed:
		t.Errorf("delivered says %d events in all, but only %d were handed over", total, handed)
		return
	}
	kept, n := r.kept(messages[:total], n)
	last := total - 1
	for r.f.h.Resumes && last > 0 && kept[messages[last].ID] {
		last-- // positions are those of what is stored
	}
	if want := messages[last].Position; p.Position != want && !kept[messages[last].ID] {
		t.Errorf("delivered says %d events up to %v, but that one has position %v", total, p.Position, want)
	}
	if r.sequence > 0 && p.Sequence < r.sequence+uint64(n) {
		t.Errorf("delivered says that %d events after sequence %d end at sequence %d", n, r.sequence, p.Sequence)
	}
	if count := r.f.h.Count(t); count < r.f.confirmed+total-len(kept) {
		t.Errorf("delivered says %d events, but the destination holds %d", r.f.confirmed+total-len(kept), count)
	}
	Scribble()
	r.mu.Lock()
	r.delivered, r.sequence = total, p.Sequence
	if r.f.known.Position.IsZero() || total%3 == 0 {
		r.f.known.Position, r.f.known.Sequence = p.Position, p.Sequence
	}
	close(r.changed)
	r.changed = make(chan struct{})
	r.mu.Unlock()
}

// stored returns how many of the first n messages are not kept.
func (r *running) stored(n int) int {
	_, n = r.kept(r.messages[:n], n)
	return n
}

// kept returns which of the messages are kept, and how many of the last n are not. What is kept must be committed.
func (r *running) kept(messages []Message, n int) (map[string]bool, int) {
	kept := map[string]bool{}
	if r.f.dead == nil {
		return kept, n
	}
	committed := map[string]bool{}
	for _, l := range r.f.dead.Letters() {
		committed[l.ID] = l.Committed
	}
	from := len(messages) - n
	for i, m := range messages {
		is, ok := committed[m.ID]
		if !ok {
			continue
		}
		if !is {
			r.f.t.Errorf("delivered says %d events, but event %d is parked, and that is not committed", len(messages), i+1)
		}
		kept[m.ID] = true
		if i >= from {
			n--
		}
	}
	return kept, n
}

// hand hands the next messages over as one batch. It returns false when that took longer than wait, or the Run ended.
func (r *running) hand(n int, wait time.Duration) bool {
	batch := newBatch(r.messages[r.handed:][:n], r.f.rand)
	r.mu.Lock()
	r.handed += n
	r.mu.Unlock()
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case r.in <- batch:
		Scribble()
		return true
	case <-r.ended:
	case <-timer.C:
	}
	batch.Release()
	r.mu.Lock()
	r.handed -= n
	r.mu.Unlock()
	return false
}

// handAll hands over what is left, in batches of random size up to most.
func (r *running) handAll(most int) {
	r.f.t.Helper()
	r.handAllOf(len(r.messages)-r.handed, most)
}

// handAllOf hands over the next n.
func (r *running) handAllOf(n, most int) {
	r.f.t.Helper()
	until := r.handed + n
	for left := n; left > 0; left = until - r.handed {
		if !r.hand(min(left, 1+r.f.rand.IntN(most)), patience) {
			select {
			case <-r.ended:
				r.f.t.Fatalf("run ended after %d of %d events were handed over: %v", r.handed, len(r.messages), r.err)
			default:
				r.f.t.Fatalf("run took %d of %d events and no more", r.handed, len(r.messages))
			}
		}
	}
}

// awaitDelivered waits until the sink said that n events are delivered.
func (r *running) awaitDelivered(n int) {
	r.f.t.Helper()
	timer := time.NewTimer(patience)
	defer timer.Stop()
	for {
		r.mu.Lock()
		got, changed := r.delivered, r.changed
		r.mu.Unlock()
		if got >= n {
			return
		}
		select {
		case <-changed:
		case <-r.ended:
			r.mu.Lock()
			got = r.delivered
			r.mu.Unlock()
			if got < n {
				r.f.t.Fatalf("run ended after %d of %d events: %v", got, n, r.err)
			}
		case <-timer.C:
			r.f.t.Fatalf("%d of %d events were delivered within %v", got, n, patience)
		}
	}
}

// wait waits for the end of Run and returns its error and how many events it delivered.
func (r *running) wait(within time.Duration) (int, error) {
	r.f.t.Helper()
	timer := time.NewTimer(within)
	defer timer.Stop()
	select {
	case <-r.ended:
	case <-timer.C:
		r.f.t.Fatalf("run goes on after %v", within)
	}
	return r.delivered, r.err
}

// cut cuts what is left to hand over to n events.
func (r *running) cut(n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.messages = r.messages[:r.handed+n]
}

// finish closes in and expects that everything handed over is delivered.
func (r *running) finish() {
	r.f.t.Helper()
	close(r.in)
	n, err := r.wait(patience)
	if err != nil {
		r.f.t.Fatalf("run: %v, want none after in was closed", err)
	}
	if n != r.handed {
		r.f.t.Fatalf("run ended well, but delivered only %d of %d events", n, r.handed)
	}
	r.f.confirmed += r.stored(n)
}

// stop ends the Run's context and expects that Run ends with its error.
func (r *running) stop() {
	r.f.t.Helper()
	r.cancel()
	n, err := r.wait(promptly)
	if !errors.Is(err, context.Canceled) {
		r.f.t.Fatalf("run: got %v, want that the context was canceled", err)
	}
	r.f.confirmed += r.stored(n)
}

// deliver runs the sink with messages, in batches of random size up to most, until all is delivered.
func (f *fixture) deliver(messages []Message, most int) {
	f.t.Helper()
	r := f.start(messages)
	r.handAll(most)
	r.finish()
}

// expect compares what the destination received with what it must have.
func (f *fixture) expect(want []Message) {
	f.t.Helper()
	got := f.h.Received(f.t)
	if !f.h.ExactlyOnce {
		got = firsts(got)
	}
	if f.h.PerKey {
		got = f.inOrder(got, want)
	}
	var before event.Position
	for i, m := range got {
		if f.h.Resumes && m.Origin == event.Retried && i > 0 && i < len(want) {
			if m.Position != before {
				f.t.Fatalf("event %s, which is retried, has position %v, behind one with %v", m.ID, m.Position, before)
			}
			got[i].Position = want[i].Position
		}
		before = m.Position
	}
	for i := range min(len(want), len(got)) {
		if diff := gocmp.Diff(shorten(want[i]), shorten(like(got[i], want[i]))); diff != "" || got[i].Payload != want[i].Payload {
			f.t.Fatalf("message %d (-want +got):\n%s", i, diff)
		}
	}
	if len(got) != len(want) {
		f.t.Fatalf("received %d messages, want %d", len(got), len(want))
	}
}

// inOrder returns got in the order of want, after it has found those of each key in that order.
func (f *fixture) inOrder(got, want []Message) []Message {
	f.t.Helper()
	place := make(map[string]int, len(want))
	for i, m := range want {
		place[m.ID] = i
	}
	last := map[string]Message{}
	for _, m := range got {
		if _, ok := place[m.ID]; !ok {
			f.t.Fatalf("received event %s, which is none that was to be delivered", m.ID)
		}
		if m.Key == nil {
			continue
		}
		if before, ok := last[*m.Key]; ok && place[before.ID] > place[m.ID] {
			f.t.Fatalf("received event %s of key %q after event %s", m.ID, *m.Key, before.ID)
		}
		last[*m.Key] = m
	}
	got = slices.Clone(got)
	slices.SortStableFunc(got, func(a, b Message) int { return cmp.Compare(place[a.ID], place[b.ID]) })
	return got
}

// firsts returns the first message of each id.
func firsts(messages []Message) []Message {
	seen := map[string]bool{}
	return slices.DeleteFunc(slices.Clone(messages), func(m Message) bool {
		again := seen[m.ID]
		seen[m.ID] = true
		return again
	})
}

// like returns m without the headers that want does not have, and in want's time zone.
func like(m, want Message) Message {
	m.Headers = maps.Clone(m.Headers)
	maps.DeleteFunc(m.Headers, func(name, _ string) bool { _, ok := want.Headers[name]; return !ok })
	if len(m.Headers) == 0 {
		m.Headers = nil
	}
	if m.Time.Equal(want.Time) {
		m.Time = want.Time
	}
	return m
}

// shorten keeps a difference in a giant payload readable.
func shorten(m Message) Message {
	if len(m.Payload) > 500 {
		m.Payload = fmt.Sprintf("%s… (%d bytes)", m.Payload[:200], len(m.Payload))
	}
	return m
}

// newBatch puts messages into a batch, with a mark behind the last event of some transactions.
func newBatch(messages []Message, random *rand.Rand) *event.Batch {
	b := event.NewBatch()
	for i, m := range messages {
		addTo(b, m)
		if i+1 < len(messages) && messages[i+1].Position.Commit != m.Position.Commit || random.IntN(4) == 0 {
			b.MarkEnd(m.Position.Commit + 1)
		}
	}
	return b
}

// addTo adds m to a batch.
func addTo(b *event.Batch, m Message) {
	e := event.Event{
		Position:    m.Position,
		ID:          b.Copy([]byte(m.ID)),
		Topic:       b.Copy([]byte(m.Topic)),
		Payload:     b.Copy([]byte(m.Payload)),
		ContentType: m.ContentType,
		Time:        m.Time,
		Origin:      m.Origin,
	}
	if m.Key != nil {
		e.Key = b.Copy([]byte(*m.Key))
	}
	for _, name := range slices.Sorted(maps.Keys(m.Headers)) {
		b.AddHeader(event.Header{Name: b.Copy([]byte(name)), Value: b.Copy([]byte(m.Headers[name]))})
	}
	e.Headers = b.TakeHeaders(len(m.Headers))
	b.Events = append(b.Events, e)
}

var poison = bytes.Repeat([]byte{0xdb}, 32<<10)

// Scribble overwrites the memory of the batches that were released last, so that whoever still reads it is found out: by what is
// received, or by the race detector.
func Scribble() {
	var batches [4]*event.Batch
	for i := range batches {
		batches[i] = event.NewBatch()
		for range 2 {
			copy(batches[i].Alloc(len(poison)), poison)
		}
	}
	for _, b := range batches {
		b.Release()
	}
}
