package jetstream_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	natsjs "github.com/nats-io/nats.go/jetstream"
	"go.uber.org/goleak"

	"ebb/event"
	"ebb/internal/natstest"
	"ebb/sink"
	"ebb/sink/jetstream"
	"ebb/sink/sinktest"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, natstest.Leaks()...)
}

func logger(t *testing.T) *slog.Logger {
	level := slog.LevelWarn
	if os.Getenv("EBB_TEST_LOG") != "" {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: level}))
}

func config(t *testing.T, server *natstest.Server) jetstream.Config {
	return jetstream.Config{
		Servers: server.URL(), Stream: "EBB", Subject: "ebb.{topic}", Source: "test", CreateStream: true, Replicas: 1, Exclusive: true, Name: "test",
		Logger: logger(t),
	}
}

func open(t *testing.T, cfg jetstream.Config) *jetstream.Sink {
	t.Helper()
	s, err := jetstream.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	jetstream.SetRetryFor(s, patience) // on a slow machine as well, all of one is delivered at once
	return s
}

func TestConformance(t *testing.T) {
	t.Parallel()
	var server *natstest.Server
	received := func(t *testing.T) []sinktest.Message {
		var out []sinktest.Message
		for _, m := range server.Messages(t, "EBB") {
			message, err := sinktest.FromBinary(m.Header, m.Data)
			if err != nil {
				t.Fatal(err)
			}
			out = append(out, message)
		}
		return out
	}
	var broken bool
	var js natsjs.JetStream
	sinktest.Run(t, sinktest.Harness{
		New: func(t *testing.T) sink.Sink {
			server, broken = natstest.New(t), false
			js = server.JetStream(t)
			return open(t, config(t, server))
		},
		Reopen: func(t *testing.T) sink.Sink { return open(t, config(t, server)) },
		Received: func(t *testing.T) []sinktest.Message {
			if broken {
				// A server that is down can be asked once it is up.
				return nil
			}
			return received(t)
		},
		Count: func(t *testing.T) int {
			// The sink may be back on a server that was restarted before this connection is.
			var last error
			for range 50 {
				ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
				stream, err := js.Stream(ctx, "EBB")
				cancel()
				if err == nil {
					return int(stream.CachedInfo().State.Msgs)
				}
				last = err
			}
			t.Error(last)
			return 0
		},
		Break:       func(t *testing.T) { broken = true; server.Stop(t) },
		Mend:        func(t *testing.T) { server.Start(t); broken = false },
		Resumes:     true,
		ExactlyOnce: true,
		Parks:       true,
		Waits:       true,
	})
}

// batchOf makes a batch of events at index 1 to n of one transaction.
func batchOf(commit event.LSN, n int, change func(i int, e *event.Event)) *event.Batch {
	b := event.NewBatch()
	for i := range n {
		e := event.Event{
			Position: event.Position{Epoch: 1, Commit: commit, Index: uint64(i + 1)},
			ID:       b.Copy(fmt.Appendf(nil, "%d-%d", commit, i+1)),
			Topic:    b.Copy([]byte("topic")),
			Payload:  b.Copy([]byte("{}")),
		}
		if change != nil {
			change(i, &e)
		}
		b.Events = append(b.Events, e)
	}
	return b
}

// deliver resumes and runs once over the batches, and returns how many events were reported.
func deliver(ctx context.Context, t *testing.T, s *jetstream.Sink, known sink.Known, batches ...*event.Batch) (int, error) {
	t.Helper()
	if _, err := s.Resume(ctx, known); err != nil {
		return 0, err
	}
	in := make(chan *event.Batch, len(batches))
	for _, b := range batches {
		in <- b
	}
	close(in)
	n := 0
	err := s.Run(ctx, in, sink.Outcome{Delivered: func(p sink.Progress) { n += p.Events }})
	return n, err
}

func closed(t *testing.T, s *jetstream.Sink) {
	t.Helper()
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestSubjects(t *testing.T) {
	server := natstest.New(t)
	cfg := config(t, server)
	cfg.Subject = "ebb.{topic}.{key}"
	s := open(t, cfg)
	defer closed(t, s)
	long := strings.Repeat("é", 150)
	for i, c := range []struct{ topic, key, want string }{
		{"plain", "k", "ebb.plain.k"},
		{"a.b", "a.b", "ebb.a.b.a%2Eb"},
		{"", "", "ebb.%.%"},
		{"a..b", "x", "ebb.a.%.b.x"},
		{"* > \n%", "é", "ebb.%2A%20%3E%20%0A%25.%C3%A9"},
		{long, "k", "ebb." + strings.Repeat("%C3%A9", 42)},
		{strings.Repeat("x", 250) + "..y", "k", "ebb." + strings.Repeat("x", 250)},
	} {
		if _, err := deliver(t.Context(), t, s, sink.Known{}, batchOf(event.LSN(i+1), 1, func(_ int, e *event.Event) {
			e.Topic, e.Key = []byte(c.topic), []byte(c.key)
		})); err != nil {
			t.Fatal(err)
		}
		messages := server.Messages(t, "EBB")
		got := messages[len(messages)-1]
		if got.Subject != c.want {
			t.Errorf("topic %q, key %q: subject is %q, want %q", c.topic, c.key, got.Subject, c.want)
		}
		if topic := got.Header.Get("ce-type"); c.topic == long && len(topic) != 6*150 {
			t.Errorf("the topic of a long subject is cut in its header too: %q", topic)
		}
	}
}

func TestRawFormat(t *testing.T) {
	server := natstest.New(t)
	cfg := config(t, server)
	cfg.Raw = true
	s := open(t, cfg)
	defer closed(t, s)
	if _, err := deliver(t.Context(), t, s, sink.Known{}, batchOf(7, 2, func(_ int, e *event.Event) {
		e.Headers = []event.Header{{Name: []byte("traceparent"), Value: []byte("00-1-2-03")}}
	})); err != nil {
		t.Fatal(err)
	}
	for i, m := range server.Messages(t, "EBB") {
		if m.Header.Get("ce-id") != "" || m.Header.Get("traceparent") != "00-1-2-03" || m.Header.Get("Ebb-Position") != fmt.Sprintf("1:0/7:%d", i+1) {
			t.Errorf("message %d has headers %v", i, m.Header)
		}
	}
}

func TestTooLargeForTheServer(t *testing.T) {
	server := natstest.New(t)
	s := open(t, config(t, server))
	defer closed(t, s)
	large := batchOf(1, 5, func(i int, e *event.Event) {
		if i == 3 {
			e.Payload = make([]byte, 1<<20)
		}
	})
	n, err := deliver(t.Context(), t, s, sink.Known{}, large)
	var rejected *sink.RejectedError
	if !errors.As(err, &rejected) || rejected.ID != "1-4" || !strings.Contains(err.Error(), "max_payload") {
		t.Fatalf("error is %v", err)
	}
	if stored := len(server.Messages(t, "EBB")); n != 3 || stored != 3 {
		t.Errorf("%d events reported and %d stored, want the 3 before the large one", n, stored)
	}
}

func TestTooLargeForTheStream(t *testing.T) {
	server := natstest.New(t)
	create(t, server, natsjs.StreamConfig{Name: "EBB", Subjects: []string{"ebb.>"}, MaxMsgSize: 1000})
	s := open(t, config(t, server))
	defer closed(t, s)
	n, err := deliver(t.Context(), t, s, sink.Known{}, batchOf(1, 5, func(i int, e *event.Event) {
		if i == 3 {
			e.Payload = make([]byte, 2000)
		}
	}))
	var rejected *sink.RejectedError
	if !errors.As(err, &rejected) || rejected.ID != "1-4" || n != 3 {
		t.Fatalf("%d events, error %v", n, err)
	}
}

func create(t *testing.T, server *natstest.Server, cfg natsjs.StreamConfig) {
	t.Helper()
	if _, err := server.JetStream(t).CreateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
}

func TestUnsuitableStreams(t *testing.T) {
	for _, c := range []struct {
		name   string
		stream natsjs.StreamConfig
		want   error
	}{
		{"no_ack", natsjs.StreamConfig{NoAck: true}, jetstream.ErrUnsuitable},
		{"workqueue", natsjs.StreamConfig{Retention: natsjs.WorkQueuePolicy}, jetstream.ErrUnsuitable},
		{"sources", natsjs.StreamConfig{Sources: []*natsjs.StreamSource{{Name: "OTHER"}}}, jetstream.ErrUnsuitable},
		{"other subjects", natsjs.StreamConfig{Subjects: []string{"other.>"}}, jetstream.ErrUnsuitable},
	} {
		t.Run(c.name, func(t *testing.T) {
			server := natstest.New(t)
			c.stream.Name = "EBB"
			if c.stream.Subjects == nil {
				c.stream.Subjects = []string{"ebb.>"}
			}
			create(t, server, c.stream)
			s := open(t, config(t, server))
			defer closed(t, s)
			if _, err := deliver(t.Context(), t, s, sink.Known{}, batchOf(1, 1, nil)); !errors.Is(err, c.want) {
				t.Errorf("error is %v, want %v", err, c.want)
			}
		})
	}
}

// What somebody else put into the stream is never taken for ours, wherever it stands, and is counted.
func TestForeignMessages(t *testing.T) {
	server := natstest.New(t)
	s := open(t, config(t, server))
	defer closed(t, s)
	if _, err := deliver(t.Context(), t, s, sink.Known{}, batchOf(1, 3, nil)); err != nil {
		t.Fatal(err)
	}
	ours := sink.Tail{Position: event.Position{Epoch: 1, Commit: 1, Index: 3}, Sequence: 3, ID: "1-3", Last: 3, Exclusive: true}
	resume := func(known sink.Known, want sink.Tail) {
		t.Helper()
		want.Holds = want.Last
		if got, err := s.Resume(t.Context(), known); err != nil || got != want {
			t.Errorf("the end is %+v, %v; want %+v", got, err, want)
		}
	}
	resume(sink.Known{}, ours)
	publish(t, server, nats.Header{})
	publish(t, server, nats.Header{"Ebb-Position": {"nonsense"}})
	ours.Last = 5
	resume(sink.Known{}, ours)
	resume(sink.Known{Sequence: 3}, sink.Tail{Last: 5, Exclusive: true})
	if _, err := deliver(t.Context(), t, s, sink.Known{}, batchOf(2, 1, nil)); err != nil {
		t.Fatal(err)
	}
	last := sink.Tail{Position: event.Position{Epoch: 1, Commit: 2, Index: 1}, Sequence: 6, ID: "2-1", Last: 6, Exclusive: true}
	resume(sink.Known{Sequence: 2}, last)
	last.Foreign = 2
	resume(sink.Known{Sequence: 2, Audit: true}, last)
	resume(sink.Known{Audit: true}, last)
}

// A stream says for whom it was made.
func TestSourceOfAStream(t *testing.T) {
	server := natstest.New(t)
	source := sink.Source{SystemIdentifier: "7300000000000000001", Database: "app", Slot: "ebb", Buffer: "b"}
	for _, known := range []sink.Known{{Source: source}, {Source: sink.Source{Database: "another"}}} {
		s := open(t, config(t, server))
		defer closed(t, s)
		if tail, err := s.Resume(t.Context(), known); err != nil || tail.Source != source {
			t.Errorf("the stream was made for %+v, %v", tail.Source, err)
		}
	}
}

// A bridge that wakes up after another one has gone on can add nothing. It learns what the other one has delivered of its own
// events, and stops where the stream holds something else.
func TestZombie(t *testing.T) {
	server := natstest.New(t)
	zombie := open(t, config(t, server))
	defer closed(t, zombie)
	if _, err := zombie.Resume(t.Context(), sink.Known{}); err != nil {
		t.Fatal(err)
	}
	leader := open(t, config(t, server))
	defer closed(t, leader)
	if _, err := deliver(t.Context(), t, leader, sink.Known{}, batchOf(1, 10, nil)); err != nil {
		t.Fatal(err)
	}
	in := make(chan *event.Batch)
	delivered := make(chan int, 10)
	done := make(chan error)
	go func() {
		done <- zombie.Run(t.Context(), in, sink.Outcome{Delivered: func(p sink.Progress) { delivered <- p.Events }})
	}()
	in <- batchOf(1, 3, nil)
	if n := <-delivered; n != 3 {
		t.Errorf("%d events were reported", n)
	}
	in <- batchOf(2, 1, nil) // which the leader never had
	if err := <-done; !errors.Is(err, jetstream.ErrForeign) {
		t.Errorf("error is %v", err)
	}
	if n := len(server.Messages(t, "EBB")); n != 10 {
		t.Errorf("the stream holds %d messages", n)
	}
}

func publish(t *testing.T, server *natstest.Server, header nats.Header) {
	t.Helper()
	if _, err := server.JetStream(t).PublishMsg(t.Context(), &nats.Msg{Subject: "ebb.theirs", Header: header, Data: []byte("x")}); err != nil {
		t.Fatal(err)
	}
}

// The end of a stream that no longer holds what is known to have been in it.
func TestEndsOfStreams(t *testing.T) {
	known := sink.Known{Position: event.Position{Epoch: 1, Commit: 1, Index: 3}, Sequence: 3}
	type change func(t *testing.T, stream natsjs.Stream)
	remove := func(sequences ...uint64) change {
		return func(t *testing.T, stream natsjs.Stream) {
			for _, seq := range sequences {
				if err := stream.DeleteMsg(t.Context(), seq); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	for _, c := range []struct {
		name   string
		held   int
		change change
		want   sink.Tail // but for position and id, which follow from the sequence number
	}{
		{"longer", 5, nil, sink.Tail{Sequence: 5, Last: 5}},
		{"as known", 3, nil, sink.Tail{Sequence: 3, Last: 3}},
		{"shorter", 2, nil, sink.Tail{Sequence: 2, Last: 2}},
		{"shorter, and its last message deleted", 2, remove(2), sink.Tail{Sequence: 1, Last: 2}},
		{"empty again", 3, func(t *testing.T, s natsjs.Stream) {
			if err := s.Purge(t.Context()); err != nil {
				t.Fatal(err)
			}
		}, sink.Tail{Last: 3}},
		{"more, and empty again", 7, func(t *testing.T, s natsjs.Stream) {
			if err := s.Purge(t.Context()); err != nil {
				t.Fatal(err)
			}
		}, sink.Tail{Last: 7, Removed: 4}},
		{"its last messages deleted", 7, remove(6, 7), sink.Tail{Sequence: 5, Last: 7, Removed: 2}},
		{"all behind what is known deleted", 6, remove(4, 5, 6), sink.Tail{Last: 6, Removed: 3}},
	} {
		t.Run(c.name, func(t *testing.T) {
			server := natstest.New(t)
			s := open(t, config(t, server))
			defer closed(t, s)
			if _, err := deliver(t.Context(), t, s, sink.Known{}, batchOf(1, c.held, nil)); err != nil {
				t.Fatal(err)
			}
			stream, err := server.JetStream(t).Stream(t.Context(), "EBB")
			if err != nil {
				t.Fatal(err)
			}
			if c.change != nil {
				c.change(t, stream)
			}
			c.want.Exclusive, c.want.Holds = true, c.want.Last
			if n := c.want.Sequence; n > 0 {
				c.want.Position, c.want.ID = event.Position{Epoch: 1, Commit: 1, Index: n}, fmt.Sprintf("1-%d", n)
			}
			if got, err := s.Resume(t.Context(), known); err != nil || got != c.want {
				t.Errorf("it ends at %+v, %v; want %+v", got, err, c.want)
			}
			n, err := deliver(t.Context(), t, s, known, batchOf(2, 2, nil))
			if err != nil || n != 2 {
				t.Errorf("goes on with %d events, %v", n, err)
			}
		})
	}
	t.Run("gone", func(t *testing.T) {
		server := natstest.New(t)
		s := open(t, config(t, server))
		defer closed(t, s)
		if got, err := s.Resume(t.Context(), known); err != nil || got != (sink.Tail{}) {
			t.Errorf("it ends at %+v, %v", got, err)
		}
		if _, err := server.JetStream(t).Stream(t.Context(), "EBB"); !errors.Is(err, natsjs.ErrStreamNotFound) {
			t.Errorf("a stream whose content has to be found first: %v", err)
		}
	})
}

func TestRefusedCredentials(t *testing.T) {
	server := natstest.New(t, natstest.Adjust(func(o *server.Options) { o.Username, o.Password = "ebb", "secret" }))
	cfg := config(t, server)
	cfg.Servers = strings.Replace(server.URL(), "://", "://ebb:hunter2@", 1)
	s := open(t, cfg)
	defer closed(t, s)
	_, err := s.Resume(t.Context(), sink.Known{})
	if !errors.Is(err, nats.ErrAuthorization) {
		t.Fatalf("error is %v", err)
	}
	if strings.Contains(err.Error(), "hunter2") {
		t.Errorf("the error tells the password: %v", err)
	}
}

func TestScan(t *testing.T) {
	server := natstest.New(t)
	s := open(t, config(t, server))
	defer closed(t, s)
	if _, err := deliver(t.Context(), t, s, sink.Known{}, batchOf(1, 1000, nil)); err != nil {
		t.Fatal(err)
	}
	for _, after := range []uint64{0, 400, 999, 1000, 2000} {
		var ids []string
		if err := s.Scan(t.Context(), after, func(m sink.Stored) error { ids = append(ids, string(m.ID)); return nil }); err != nil {
			t.Fatal(err)
		}
		if want := max(0, 1000-int(after)); len(ids) != want || want > 0 && ids[0] != fmt.Sprintf("1-%d", after+1) {
			t.Errorf("after %d: %d ids, want %d", after, len(ids), want)
		}
	}
}

func TestHeadersTooLarge(t *testing.T) {
	server := natstest.New(t)
	s := open(t, config(t, server))
	defer closed(t, s)
	n, err := deliver(t.Context(), t, s, sink.Known{}, batchOf(1, 5, func(i int, e *event.Event) {
		if i == 3 {
			e.Key = []byte(strings.Repeat("é", 12_000))
		}
	}))
	var rejected *sink.RejectedError
	if !errors.As(err, &rejected) || rejected.ID != "1-4" || n != 3 || !strings.Contains(err.Error(), "headers") {
		t.Fatalf("%d events, error %v", n, err)
	}
}

func TestScanOfWhatIsDeleted(t *testing.T) {
	server := natstest.New(t)
	s := open(t, config(t, server))
	defer closed(t, s)
	if _, err := deliver(t.Context(), t, s, sink.Known{}, batchOf(1, 3, func(_ int, e *event.Event) {
		// A status is how the server ends a request; a producer's header of that name is not one.
		e.Headers = []event.Header{{Name: []byte("Status"), Value: []byte("404")}}
	})); err != nil {
		t.Fatal(err)
	}
	n := 0
	if err := s.Scan(t.Context(), 0, func(sink.Stored) error { n++; return nil }); err != nil || n != 3 {
		t.Errorf("%d ids, %v", n, err)
	}
	stream, err := server.JetStream(t).Stream(t.Context(), "EBB")
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := s.Scan(t.Context(), 0, func(m sink.Stored) error { t.Errorf("found %s", m.ID); return nil }); err != nil {
		t.Error(err)
	}
}

// A stream that is deleted, or replaced, while the bridge runs forgot what it had acknowledged; the next Resume decides what that means.
func TestStreamReplacedWhileRunning(t *testing.T) {
	for _, again := range []bool{false, true} {
		server := natstest.New(t)
		s := open(t, config(t, server))
		defer closed(t, s)
		if _, err := s.Resume(t.Context(), sink.Known{}); err != nil {
			t.Fatal(err)
		}
		in, done, delivered := make(chan *event.Batch), make(chan error), make(chan int, 10)
		go func() {
			done <- s.Run(t.Context(), in, sink.Outcome{Delivered: func(p sink.Progress) { delivered <- p.Events }})
		}()
		in <- batchOf(1, 3, nil)
		for n := 0; n < 3; {
			n += <-delivered
		}
		if again {
			server.RecreateStream(t, natsjs.StreamConfig{Name: "EBB", Subjects: []string{"ebb.>"}})
		} else if err := server.JetStream(t).DeleteStream(t.Context(), "EBB"); err != nil {
			t.Fatal(err)
		}
		in <- batchOf(2, 3, nil)
		if err := <-done; !errors.Is(err, sink.ErrChanged) {
			t.Errorf("created again: %v: error is %v", again, err)
		}
	}
}

func TestConnectionStopsWithItsContext(t *testing.T) {
	t.Parallel()
	listener, err := net.Listen("tcp", "127.0.0.1:0") // which accepts and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	cfg := config(t, natstest.New(t))
	cfg.Servers = "nats://" + listener.Addr().String()
	s := open(t, cfg)
	defer closed(t, s)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	started := time.Now()
	if _, err := s.Resume(ctx, sink.Known{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error is %v", err)
	}
	if took := time.Since(started); took > 2*time.Second {
		t.Errorf("it took %s", took)
	}
}

func TestPublishNotPermitted(t *testing.T) {
	t.Parallel()
	var logged bytes.Buffer
	server := natstest.New(t, natstest.Adjust(func(o *server.Options) {
		o.Users = []*server.User{{Username: "ebb", Password: "x", Permissions: &server.Permissions{
			Publish: &server.SubjectPermission{Deny: []string{"ebb.>"}},
		}}, {Username: "admin", Password: "x"}}
		o.NoAuthUser = "admin"
	}))
	cfg := config(t, server)
	cfg.Servers = strings.Replace(server.URL(), "://", "://ebb:x@", 1)
	cfg.Logger = slog.New(slog.NewTextHandler(&logged, nil))
	s := open(t, cfg)
	jetstream.SetAckTimeout(s, 300*time.Millisecond)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	if _, err := deliver(ctx, t, s, sink.Known{}, batchOf(1, 1000, nil)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("error is %v", err)
	}
	closed(t, s)
	if lines := strings.Count(logged.String(), "\n"); lines > 10 || !strings.Contains(logged.String(), "grant the user") {
		t.Errorf("%d lines are logged:\n%.2000s", lines, logged.String())
	}
}
