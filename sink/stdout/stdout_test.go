package stdout_test

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"ebb/event"
	"ebb/sink"
	"ebb/sink/sinktest"
	"ebb/sink/stdout"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// output counts lines and keeps them.
type output struct {
	mu     sync.Mutex
	buf    bytes.Buffer
	writes int
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.writes++
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

func TestConformance(t *testing.T) {
	var out *output
	sinktest.Run(t, sinktest.Harness{
		New: func(*testing.T) sink.Sink {
			out = &output{}
			return stdout.New(stdout.Config{Out: out, Source: "test"})
		},
		Received: func(t *testing.T) []sinktest.Message { return parse(t, out.String()) },
		Count: func(*testing.T) int {
			out.mu.Lock()
			defer out.mu.Unlock()
			return bytes.Count(out.buf.Bytes(), []byte("\n"))
		},
		ExactlyOnce: true,
		Parks:       true,
	})
}

func parse(t *testing.T, lines string) []sinktest.Message {
	t.Helper()
	var messages []sinktest.Message
	r := bufio.NewReader(strings.NewReader(lines))
	for {
		line, err := r.ReadString('\n')
		if errors.Is(err, io.EOF) && line == "" {
			return messages
		}
		if err != nil {
			t.Fatalf("line %q: %v", line, err)
		}
		var members map[string]json.RawMessage
		if err := json.Unmarshal([]byte(line), &members); err != nil {
			t.Fatalf("line %q: %v", line, err)
		}
		m := sinktest.Message{Payload: string(members["data"]), Headers: map[string]string{}}
		// A RawMessage loses the white space around it, so the payload is taken from the line, of which it is the last member.
		if _, data, ok := strings.Cut(line, `,"data":`); ok {
			m.Payload = strings.TrimSuffix(data, "}\n")
		}
		delete(members, "data")
		for name, raw := range members {
			var value string
			if err := json.Unmarshal(raw, &value); err != nil {
				t.Fatalf("member %s is no string: %s", name, raw)
			}
			switch name {
			case "specversion", "source":
			case "id":
				m.ID = value
			case "type":
				m.Topic = value
			case "subject":
				m.Key = &value
			case "time":
				if m.Time, err = time.Parse(time.RFC3339Nano, value); err != nil {
					t.Fatal(err)
				}
			case "datacontenttype":
				m.ContentType = value
			case "ebbposition":
				if m.Position, err = event.ParsePosition(value); err != nil {
					t.Fatal(err)
				}
			case "ebborigin":
				m.Origin = event.Origin(value)
			default:
				m.Headers[name] = value
			}
		}
		for _, name := range []string{"specversion", "id", "source", "type", "ebbposition"} {
			if _, ok := members[name]; !ok {
				t.Fatalf("no %s in %q, but %v", name, line, maps.Keys(members))
			}
		}
		messages = append(messages, m)
	}
}

func batch(ids ...string) *event.Batch {
	b := event.NewBatch()
	for i, id := range ids {
		b.Events = append(b.Events, event.Event{Position: event.Position{Epoch: 1, Commit: 2, Index: uint64(i + 1)}, ID: b.Copy([]byte(id)), Topic: b.Copy([]byte("t"))})
	}
	return b
}

func TestOneWriteABatch(t *testing.T) {
	var out output
	s := stdout.New(stdout.Config{Out: &out, Source: "test"})
	in := make(chan *event.Batch, 2)
	in <- batch("1", "2", "3")
	in <- batch("4")
	close(in)
	if err := s.Run(context.Background(), in, sink.Outcome{Delivered: func(sink.Progress) {}}); err != nil {
		t.Fatal(err)
	}
	if out.writes != 2 {
		t.Errorf("%d writes for 2 batches", out.writes)
	}
	const want = `{"specversion":"1.0","id":"4","source":"test","type":"t","ebbposition":"1:0/2:1"}` + "\n"
	if got := out.String(); !strings.HasSuffix(got, want) {
		t.Errorf("got %s, want at its end %s", got, want)
	}
}

func TestWriteError(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	r.Close()
	s := stdout.New(stdout.Config{Out: w})
	in := make(chan *event.Batch, 1)
	in <- batch("1")
	err = s.Run(context.Background(), in, sink.Outcome{Delivered: func(sink.Progress) { t.Error("delivered to nobody") }})
	if !errors.Is(err, os.ErrClosed) && !strings.Contains(err.Error(), "broken pipe") {
		t.Errorf("got %v, want that the pipe is broken", err)
	}
	if pos, err := s.Resume(context.Background(), sink.Known{}); err != nil || !pos.Position.IsZero() {
		t.Errorf("resume: got %v, %v, want the zero position", pos, err)
	}
}

// TestBlockedReader stops a Run whose write nobody takes. The write goes on, and what it delivered is known to the next Resume.
func TestBlockedReader(t *testing.T) {
	r, w := io.Pipe()
	defer r.Close()
	s := stdout.New(stdout.Config{Out: w})
	in := make(chan *event.Batch)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() {
		ended <- s.Run(ctx, in, sink.Outcome{Delivered: func(sink.Progress) { t.Error("delivered to nobody") }})
	}()
	in <- batch("1", "2")
	first := make([]byte, 1) // the write is under way
	if _, err := r.Read(first); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Fatalf("run: got %v, want that the context was canceled", err)
	}
	if _, err := s.Resume(ctx, sink.Known{}); !errors.Is(err, context.Canceled) {
		t.Fatalf("resume: got %v, want that it waits for the write", err)
	}

	read := make(chan string)
	go func() {
		b, _ := io.ReadAll(r)
		read <- string(first) + string(b)
	}()
	tail, err := s.Resume(context.Background(), sink.Known{})
	if want := (event.Position{Epoch: 1, Commit: 2, Index: 2}); err != nil || tail.Position != want {
		t.Errorf("resume: got %v, %v, want %v", tail, err, want)
	}
	in2 := make(chan *event.Batch, 1)
	in2 <- batch("3")
	close(in2)
	if err := s.Run(context.Background(), in2, sink.Outcome{Delivered: func(sink.Progress) {}}); err != nil {
		t.Error(err)
	}
	w.Close()
	if got := parse(t, <-read); len(got) != 3 {
		t.Errorf("got %d lines, want 3", len(got))
	}
}
