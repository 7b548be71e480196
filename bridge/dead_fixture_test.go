package bridge_test

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strconv"
	"sync"
	"testing"

	"ebb/event"
	"ebb/internal/pgtest"
	"ebb/sink"
)

// parkingSink is a destination that has kept what it does not take. If it is exact, it knows what it holds, and stores nothing behind an event that is
// not kept yet, as a stream does. Otherwise it knows nothing after a new start, and goes on with others meanwhile, as a receiver does.
type parkingSink struct {
	*testSink

	mu sync.Mutex
	// rejects and fails, unless nil, say what is not taken: never, or not now.
	rejects, fails func(e *event.Event) bool
	// retries is how many were taken, and none are while noRetries.
	retries   int
	noRetries bool
}

// exactParkingSink is one that is exact.
type exactParkingSink struct{ *parkingSink }

func (s *exactParkingSink) Scan(ctx context.Context, after uint64, fn func(sink.Stored) error) error {
	return (&exactSink{s.testSink}).Scan(ctx, after, fn)
}

// isBad is the topic of what is rejected until that is mended.
func isBad(e *event.Event) bool { return string(e.Topic) == "bad" }

func newParkingSink(exact bool) (*parkingSink, sink.Sink) {
	s := &parkingSink{testSink: newTestSink(), rejects: isBad}
	if s.exact = exact; exact {
		return s, &exactParkingSink{s}
	}
	return s, s
}

// refuse sets what is not taken.
func (s *parkingSink) refuse(rejects, fails func(e *event.Event) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rejects, s.fails = rejects, fails
}

func (s *parkingSink) refuses(e *event.Event) (rejected, failed bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.rejects != nil && s.rejects(e), s.fails != nil && s.fails(e)
}

func (s *parkingSink) Resume(ctx context.Context, known sink.Known) (sink.Tail, error) {
	if !s.exact {
		return sink.Tail{Position: known.Position}, nil
	}
	tail, err := s.testSink.Resume(ctx, known)
	s.testSink.mu.Lock()
	defer s.testSink.mu.Unlock()
	for i := range s.events {
		if e := &s.events[i]; uint64(i) >= known.Sequence && e.Origin == event.Retried {
			tail.Retried++
		}
	}
	if n := len(s.events); n > 0 {
		tail.Origin = s.events[n-1].Origin
	}
	return tail, err
}

// parkingRun is a Run of a parkingSink.
type parkingRun struct {
	s       *parkingSink
	ctx     context.Context
	out     sink.Outcome
	entries []*parkingEntry // that are not delivered yet
	mu      sync.Mutex
	kept    []*parkingEntry
	wake    chan struct{}
	unkept  int
}

type parkingEntry struct {
	done     bool
	progress sink.Progress
}

// parkingWindow is how many events are under way, at most.
const parkingWindow = 10_000

func (s *parkingSink) Run(ctx context.Context, in <-chan *event.Batch, out sink.Outcome) error {
	r := &parkingRun{s: s, ctx: ctx, out: out, wake: make(chan struct{}, 1)}
	for in != nil || len(r.entries) > 0 {
		from, retries := in, out.Dead.Retries()
		if len(r.entries) > parkingWindow {
			from = nil
		}
		s.mu.Lock()
		if in == nil || s.noRetries {
			retries = nil
		}
		s.mu.Unlock()
		select {
		case b, ok := <-from:
			if !ok {
				in = nil
				continue
			}
			if err := r.take(b); err != nil {
				return err
			}
		case retry := <-retries:
			if err := r.retry(retry); err != nil {
				return err
			}
		case <-r.wake:
			r.collect()
		case <-ctx.Done():
			return ctx.Err()
		}
		r.report()
	}
	return nil
}

func (r *parkingRun) take(b *event.Batch) error {
	defer b.Release()
	// They count in the order of the events, whatever is kept first.
	entries := make([]*parkingEntry, len(b.Events))
	for i := range b.Events {
		entries[i] = r.entry()
		entries[i].progress = r.progress(&b.Events[i])
	}
	parked := map[int]bool{}
	for i := range b.Events {
		e, entry := &b.Events[i], entries[i]
		entry.progress = r.progress(e)
		if parked[i] {
			continue
		}
		rejected, failed := r.s.refuses(e)
		switch {
		case r.out.Dead.Queue(e, func() { r.isKept(entry) }):
			r.unkept++
		case rejected || failed:
			letters := []sink.Letter{{Event: e, Reason: "refused", Detail: "by \x00 the \xff test", Attempts: 1, FirstAt: e.Time, LastAt: e.Time, Retry: !rejected}}
			together := []*parkingEntry{entry}
			for j := i + 1; j < len(b.Events) && e.Key != nil; j++ { // what the window has behind it of that key
				if next := &b.Events[j]; next.Key != nil && bytes.Equal(next.Key, e.Key) {
					letters = append(letters, sink.Letter{Event: next, Reason: sink.Queued, Retry: !rejected})
					together = append(together, entries[j])
					parked[j] = true
				}
			}
			r.unkept += len(together)
			r.out.Dead.Park(letters, func() { r.isKept(together...) })
		default:
			if err := r.deliver(e, e.Position); err != nil {
				return err
			}
			entry.progress = r.progress(e)
			entry.done = true
		}
		r.report()
	}
	return nil
}

// progress is what is said once an event is delivered or kept, with all before it.
func (r *parkingRun) progress(e *event.Event) sink.Progress {
	if !r.s.exact {
		return sink.Progress{Position: e.Position}
	}
	position, seq := r.tail()
	return sink.Progress{Position: position, Sequence: seq}
}

func (r *parkingRun) tail() (event.Position, uint64) {
	r.s.testSink.mu.Lock()
	defer r.s.testSink.mu.Unlock()
	return r.s.last, uint64(len(r.s.events))
}

func (r *parkingRun) entry() *parkingEntry {
	e := &parkingEntry{}
	r.entries = append(r.entries, e)
	return e
}

func (r *parkingRun) isKept(entries ...*parkingEntry) {
	r.mu.Lock()
	r.kept = append(r.kept, entries...)
	r.mu.Unlock()
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

func (r *parkingRun) collect() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, entry := range r.kept {
		entry.done = true
	}
	r.unkept -= len(r.kept)
	r.kept = nil
}

func (r *parkingRun) report() {
	for len(r.entries) > 0 && r.entries[0].done {
		p := r.entries[0].progress
		p.Events = 1
		r.entries = r.entries[1:]
		r.out.Delivered(p)
	}
}

// deliver stores an event. An exact sink stores nothing behind one that is not kept.
func (r *parkingRun) deliver(e *event.Event, at event.Position) error {
	for r.s.exact && r.unkept > 0 {
		select {
		case <-r.wake:
			r.collect()
			r.report()
		case <-r.ctx.Done():
			return r.ctx.Err()
		}
	}
	s := r.s.testSink
	s.mu.Lock()
	gate := s.gate
	s.mu.Unlock()
	select {
	case <-gate:
	case <-r.ctx.Done():
		return r.ctx.Err()
	}
	clone := *e
	clone.ID, clone.Topic, clone.Key, clone.Payload, clone.Headers = bytes.Clone(e.ID), bytes.Clone(e.Topic), bytes.Clone(e.Key), bytes.Clone(e.Payload), nil
	for _, h := range e.Headers {
		clone.Headers = append(clone.Headers, event.Header{Name: bytes.Clone(h.Name), Value: bytes.Clone(h.Value)})
	}
	clone.Position = at
	s.mu.Lock()
	s.events = append(s.events, clone)
	s.last = at
	n := len(s.events)
	s.mu.Unlock()
	if s.dies != nil && s.dies(n) {
		return errDied
	}
	return nil
}

func (r *parkingRun) retry(retry *sink.Retry) error {
	r.s.mu.Lock()
	r.s.retries++
	r.s.mu.Unlock()
	defer retry.Batch.Release()
	for i := range retry.Batch.Events {
		e := &retry.Batch.Events[i]
		_, seq := r.tail()
		if rejected, failed := r.s.refuses(e); rejected || failed {
			retry.Done(i, seq, &sink.Failure{Rejected: rejected, Reason: "refused again", Detail: "once \xff more", Attempts: 1})
			return nil
		}
		at := e.Position
		if r.s.exact {
			if at, _ = r.tail(); at.Epoch < e.Position.Epoch {
				at = event.Position{Epoch: e.Position.Epoch}
			}
		}
		if err := r.deliver(e, at); err != nil {
			return err
		}
	}
	_, seq := r.tail()
	retry.Done(len(retry.Batch.Events), seq, nil)
	return nil
}

// putKeyed inserts n events of a topic and a key, if that is not "", in one transaction.
func (f *fixture) putKeyed(topic, key string, n int) {
	f.t.Helper()
	f.db.Exec(f.t, fmt.Sprintf("INSERT INTO ebb.buffer (topic, key, payload) SELECT '%s', nullif('%s', ''), json_build_object('n', i) FROM generate_series(1, %d) i",
		topic, key, n))
}

// decide changes the dead letters as ebb dead does: nobody else writes to them meanwhile, and the bridge is told.
func (f *fixture) decide(statements string) {
	f.t.Helper()
	f.db.Exec(f.t, "LOCK TABLE ebb.dead_letter IN SHARE ROW EXCLUSIVE MODE; "+statements+"; SELECT pg_notify('ebb_dead', '"+f.slot+"')")
}

// retryAll has everything that is parked be retried.
func (f *fixture) retryAll() {
	f.t.Helper()
	f.decide("UPDATE ebb.dead_letter SET state = 'retrying' WHERE state = 'parked'")
}

// retryUntilNone has everything be retried until nothing is left.
func (f *fixture) retryUntilNone() {
	f.t.Helper()
	pgtest.Eventually(f.t, patience, func() (bool, string) {
		f.retryAll()
		n := pgtest.Value[int64](f.t, f.db, "SELECT count(*) FROM ebb.dead_letter WHERE state IN ('parked', 'retrying')")
		return n == 0, fmt.Sprintf("%d letters are left", n)
	})
}

// awaitDead waits until so many dead letters are in a state.
func (f *fixture) awaitDead(state string, n int64) {
	f.t.Helper()
	pgtest.Eventually(f.t, patience, func() (bool, string) {
		have := pgtest.Value[int64](f.t, f.db, "SELECT count(*) FROM ebb.dead_letter WHERE state = $1", state)
		return have == n, fmt.Sprintf("%d letters are %s, want %d", have, state, n)
	})
}

// inOrderByKey compares what was delivered with the rows of the buffer: of each key all, in order. An exact sink has each once; of what another one has
// several times, the first time counts.
func (f *fixture) inOrderByKey(events []event.Event, exactly bool) {
	f.t.Helper()
	got := map[string][]int64{}
	for _, e := range events {
		id, err := strconv.ParseInt(string(e.ID), 10, 64)
		if err != nil {
			f.t.Fatal(err)
		}
		if key := string(e.Key); exactly || !slices.Contains(got[key], id) {
			got[key] = append(got[key], id)
		}
	}
	rows, err := f.db.Connect(f.t).Query(f.t.Context(), "SELECT coalesce(key, ''), id FROM ebb.buffer ORDER BY id")
	if err != nil {
		f.t.Fatal(err)
	}
	want := map[string][]int64{}
	for rows.Next() {
		var key string
		var id int64
		if err := rows.Scan(&key, &id); err != nil {
			f.t.Fatal(err)
		}
		want[key] = append(want[key], id)
	}
	if err := rows.Err(); err != nil {
		f.t.Fatal(err)
	}
	for key, ids := range want {
		if key == "" { // events without one are in no order
			slices.Sort(got[key])
		}
		if !slices.Equal(got[key], ids) {
			f.t.Errorf("of key %q, events %v were delivered, want %v", key, got[key], ids)
		}
		delete(got, key)
	}
	if len(got) > 0 {
		f.t.Errorf("delivered events that there are not: %v", got)
	}
}

// everyKind runs a test with an exact sink and with one that is told.
func everyKind(t *testing.T, test func(t *testing.T, f *fixture, s *parkingSink, as sink.Sink)) {
	t.Parallel()
	for _, exact := range []bool{true, false} {
		t.Run(fmt.Sprintf("exact %v", exact), func(t *testing.T) {
			t.Parallel()
			s, as := newParkingSink(exact)
			test(t, newFixture(t, pgtest.New(t)), s, as)
		})
	}
}

// letters returns what is kept, in order: state, id, reason and attempts.
func (f *fixture) letters() []string {
	f.t.Helper()
	return pgtest.Value[[]string](f.t, f.db, "SELECT coalesce(array_agg(concat_ws(' ', state, event_id, reason, attempts) ORDER BY number), '{}') FROM ebb.dead_letter")
}
