package sinktest_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"slices"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"ebb/event"
	"ebb/sink"
	"ebb/sink/cloudevent"
	"ebb/sink/sinktest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestRun passes a faultless sink through the suite.
func TestRun(t *testing.T) {
	fault := os.Getenv("EBB_FAULT")
	if fault != "" {
		sinktest.SetPatience(3 * time.Second)
	}
	sinktest.Run(t, memoryHarness(fault))
}

// TestRunFindsFaults runs TestRun again in a process of its own for each fault that a sink could have.
func TestRunFindsFaults(t *testing.T) {
	if os.Getenv("EBB_FAULT") != "" {
		return
	}
	for _, c := range []struct{ fault, found string }{
		{"releases too early", "order_and_content"},
		{"says too early", "order_and_content"},
		{"counts one too few", "order_and_content"},
		{"says a wrong position", "order_and_content"},
		{"swaps", "order_and_content"},
		{"loses the key", "keys_and_topics"},
		{"drops the last", "order_and_content"},
		{"takes everything", "back-pressure"},
		{"deaf to its context", "cancelled"},
		{"passes rejected events", "rejected"},
		{"skips rejected events", "rejected"},
		{"forgets its tail", "killed"},
		{"says what it did not deliver when it is stopped", "cancelled_while_broken"},
		{"delivers what is held", "parked"},
		{"parks without what is behind", "parked"},
		{"says too early that something is kept", "kept_late"},
		{"parks though it is to block", "blocked"},
		{"retries at the event's own position", "retried"},
		{"goes on behind a retry that failed", "retried"},
		{"leaves a retry behind", "cancelled_while_retried"},
	} {
		t.Run(c.fault, func(t *testing.T) {
			t.Parallel()
			cmd := exec.Command(os.Args[0], "-test.timeout", "2m", "-test.run", "^TestRun$/^"+c.found+"$")
			cmd.Env = append(os.Environ(), "EBB_FAULT="+c.fault)
			out, err := cmd.CombinedOutput()
			if exit := (*exec.ExitError)(nil); !errors.As(err, &exit) || !bytes.Contains(out, []byte("--- FAIL: TestRun/"+c.found)) {
				t.Errorf("the suite does not find it: %v\n%s", err, out)
			}
		})
	}
}

// memory is a destination that remembers.
type memory struct {
	mu       sync.Mutex
	messages []sinktest.Message
	mended   chan struct{} // closed unless broken
}

type memorySink struct {
	memory *memory
	fault  string
}

func memoryHarness(fault string) sinktest.Harness {
	var m *memory
	open := func(*testing.T) sink.Sink { return &memorySink{memory: m, fault: fault} }
	return sinktest.Harness{
		New: func(t *testing.T) sink.Sink {
			m = &memory{mended: make(chan struct{})}
			close(m.mended)
			return open(t)
		},
		Reopen: open,
		Received: func(*testing.T) []sinktest.Message {
			m.mu.Lock()
			defer m.mu.Unlock()
			return slices.Clone(m.messages)
		},
		Break: func(*testing.T) {
			m.mu.Lock()
			defer m.mu.Unlock()
			m.mended = make(chan struct{})
		},
		Mend: func(*testing.T) {
			m.mu.Lock()
			defer m.mu.Unlock()
			close(m.mended)
		},
		Resumes:     true,
		ExactlyOnce: true,
		Parks:       true,
	}
}

func (s *memorySink) Close() error { return nil }

func (s *memorySink) Resume(context.Context, sink.Known) (sink.Tail, error) {
	s.memory.mu.Lock()
	defer s.memory.mu.Unlock()
	n := len(s.memory.messages)
	if s.fault == "forgets its tail" {
		n /= 2
	}
	if n == 0 {
		return sink.Tail{}, nil
	}
	return sink.Tail{Position: s.memory.messages[n-1].Position}, nil
}

func (s *memorySink) Run(ctx context.Context, in <-chan *event.Batch, out sink.Outcome) error {
	if s.fault == "takes everything" {
		all := make(chan *event.Batch, 1_000_000)
		source := in
		in = all
		var wg sync.WaitGroup
		defer wg.Wait()
		wg.Go(func() {
			defer close(all)
			for {
				select {
				case <-ctx.Done():
					return
				case b, ok := <-source:
					if !ok {
						return
					}
					all <- b
				}
			}
		})
	}
	if s.fault == "deaf to its context" {
		ctx = context.WithoutCancel(ctx)
	}
	var retries <-chan *sink.Retry
	if out.Dead != nil {
		retries = out.Dead.Retries()
	}
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case r := <-retries:
			n, failure := s.retry(ctx, r.Batch)
			r.Batch.Release()
			if ctx.Err() == nil || s.fault != "leaves a retry behind" {
				r.Done(n, 0, failure)
			}
		case batch, ok := <-in:
			if !ok {
				return nil
			}
			events := slices.Clone(batch.Events)
			if s.fault == "releases too early" {
				batch.Release()
			}
			if s.fault == "swaps" && len(events) > 1 {
				events[0], events[1] = events[1], events[0]
			}
			for i := range events {
				if s.fault == "drops the last" && events[i].Position.Index > 4 {
					continue
				}
				if err := s.deliverOrKeep(ctx, &events[i], out); err != nil {
					return err
				}
			}
			if s.fault != "releases too early" {
				batch.Release()
			}
		}
	}
}

// deliverOrKeep waits until the event is kept, if it is not to be delivered.
func (s *memorySink) deliverOrKeep(ctx context.Context, e *event.Event, out sink.Outcome) error {
	done := make(chan struct{})
	kept := func() { close(done) }
	if out.Dead == nil || s.fault == "delivers what is held" || !out.Dead.Queue(e, kept) {
		err := s.deliver(ctx, e, out.Delivered)
		var rejection *sink.RejectedError
		if !errors.As(err, &rejection) || !out.Parks() && (out.Dead == nil || s.fault != "parks though it is to block") {
			return err
		}
		letter := sink.Letter{Event: e, Reason: "header", Detail: rejection.Error()}
		if s.fault == "parks without what is behind" {
			letter.Event = &event.Event{ID: e.ID, Position: e.Position}
		}
		out.Dead.Park([]sink.Letter{letter}, kept)
	}
	if s.fault != "says too early that something is kept" {
		select {
		case <-done:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	s.memory.mu.Lock()
	p := sink.Progress{Events: 1}
	if n := len(s.memory.messages); n > 0 {
		p.Position = s.memory.messages[n-1].Position
	}
	s.memory.mu.Unlock()
	out.Delivered(p)
	return nil
}

// retry delivers events at the position of the last one, up to the first that fails.
func (s *memorySink) retry(ctx context.Context, b *event.Batch) (n int, failure *sink.Failure) {
	for i := range b.Events {
		e := b.Events[i]
		s.memory.mu.Lock()
		if last := len(s.memory.messages) - 1; s.fault != "retries at the event's own position" && last >= 0 {
			e.Position = s.memory.messages[last].Position
		}
		s.memory.mu.Unlock()
		err := s.deliver(ctx, &e, func(sink.Progress) {})
		switch {
		case ctx.Err() != nil:
			return n, nil
		case err == nil:
			n++
		case s.fault != "goes on behind a retry that failed":
			return n, &sink.Failure{Rejected: true, Reason: "header", Detail: err.Error()}
		}
	}
	return n, failure
}

func (s *memorySink) deliver(ctx context.Context, e *event.Event, delivered sink.Delivered) error {
	headers := map[string][]string{}
	_, err := cloudevent.Envelope{Source: "test"}.Headers(e, nil, func(name string, value []byte) {
		headers[string([]byte(name))] = []string{string(value)}
	})
	if err != nil && s.fault == "skips rejected events" {
		return nil
	}
	if err != nil && s.fault != "passes rejected events" {
		return &sink.RejectedError{ID: string(e.ID), Position: e.Position, Err: err}
	}
	m, _ := sinktest.FromBinary(headers, e.Payload)
	if s.fault == "loses the key" && m.Key != nil && *m.Key == "" {
		m.Key = nil
	}
	pos := e.Position
	switch s.fault {
	case "says a wrong position":
		pos.Index++
	case "says too early":
		delivered(sink.Progress{Events: 1, Position: pos})
	}
	s.memory.mu.Lock()
	mended := s.memory.mended
	s.memory.mu.Unlock()
	select {
	case <-mended:
	case <-ctx.Done():
		if s.fault == "says what it did not deliver when it is stopped" {
			delivered(sink.Progress{Events: 1, Position: pos})
		}
		return ctx.Err()
	}
	s.memory.mu.Lock()
	s.memory.messages = append(s.memory.messages, m)
	count := len(s.memory.messages)
	s.memory.mu.Unlock()
	if s.fault == "says too early" || s.fault == "counts one too few" && count%10 == 0 {
		return nil
	}
	delivered(sink.Progress{Events: 1, Position: pos})
	return nil
}
