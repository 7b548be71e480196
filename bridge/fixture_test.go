package bridge_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"ebb/bridge"
	"ebb/event"
	"ebb/internal/natstest"
	"ebb/internal/pgtest"
	"ebb/replication"
	"ebb/sink"
	"ebb/sink/jetstream"
	"ebb/sql"
)

func TestMain(m *testing.M) { pgtest.Main(m, natstest.Leaks()...) }

// patience is how long a test waits for what must come.
const patience = 60 * time.Second

// fixture is a database that is set up for a bridge.
type fixture struct {
	t    *testing.T
	db   *pgtest.Database
	slot string
	log  *slog.Logger
}

func newFixture(t *testing.T, db *pgtest.Database) *fixture {
	t.Helper()
	f := &fixture{t: t, db: db, slot: db.Name, log: logTo(t)}
	f.setup()
	return f
}

// setup does what ebb setup does.
func (f *fixture) setup() {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), patience)
	defer cancel()
	db, err := sql.Connect(ctx, f.db.URL, f.slot)
	if err != nil {
		f.t.Fatal(err)
	}
	defer db.Close(ctx)
	if _, err := sql.Apply(ctx, db, sql.Setup{Publication: "ebb", Keep: time.Hour}); err != nil {
		f.t.Fatal(err)
	}
	if _, err := bridge.EnsureSlot(ctx, db, f.config(nil)); err != nil {
		f.t.Fatal(err)
	}
}

func (f *fixture) config(s sink.Sink) bridge.Config {
	return bridge.Config{Postgres: f.db.URL, Slot: f.slot, Publication: "ebb", Sink: s, Logger: f.log,
		TickEvery: 100 * time.Millisecond, TickKeep: time.Hour}
}

// put inserts n events in one transaction.
func (f *fixture) put(n int) {
	f.t.Helper()
	f.db.Exec(f.t, fmt.Sprintf("INSERT INTO ebb.buffer (topic, payload) SELECT 't', json_build_object('n', i) FROM generate_series(1, %d) i", n))
}

// rows returns the ids of the buffer in the order of the ids, which is that of commits when one session alone inserts.
func (f *fixture) rows() []int64 {
	f.t.Helper()
	return pgtest.Value[[]int64](f.t, f.db, "SELECT coalesce(array_agg(id ORDER BY id), '{}') FROM ebb.buffer")
}

// confirmed is what the slot has confirmed.
func (f *fixture) inspect(db *pgx.Conn) replication.Slot {
	f.t.Helper()
	s, err := replication.InspectSlot(f.t.Context(), db, f.slot)
	if err != nil {
		f.t.Fatal(err)
	}
	return s
}

// settle waits until everything is recorded and the bridge writes no more ticks.
func (f *fixture) settle() {
	f.t.Helper()
	f.awaitBacklog(0)
	ticks, since := int64(-1), time.Now()
	pgtest.Eventually(f.t, patience, func() (bool, string) {
		if n := pgtest.Value[int64](f.t, f.db, "SELECT count(*) FROM ebb.tick"); n != ticks {
			ticks, since = n, time.Now()
		}
		return time.Since(since) > 500*time.Millisecond, "ticks go on"
	})
}

func (f *fixture) awaitBacklog(want int64) {
	f.t.Helper()
	pgtest.Eventually(f.t, patience, func() (bool, string) {
		n := pgtest.Value[int64](f.t, f.db, "SELECT count(*) FROM ebb.backlog")
		return n == want, fmt.Sprintf("%d events are in the backlog, want %d", n, want)
	})
}

// running is a bridge that runs in the test's process.
type running struct {
	t      *testing.T
	cancel context.CancelFunc
	done   chan struct{}
	err    error

	mu    sync.Mutex
	roles []bridge.Role
}

func (f *fixture) run(s sink.Sink) *running { return f.runWith(f.config(s)) }

func (f *fixture) runWith(cfg bridge.Config) *running {
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{t: f.t, cancel: cancel, done: make(chan struct{})}
	cfg.OnRole = func(role bridge.Role) {
		r.mu.Lock()
		defer r.mu.Unlock()
		r.roles = append(r.roles, role)
	}
	go func() {
		defer close(r.done)
		r.err = bridge.Run(ctx, cfg)
	}()
	f.t.Cleanup(func() {
		cancel()
		<-r.done
		if f.t.Failed() && r.err != nil {
			f.t.Logf("a bridge ended with %v", r.err)
		}
	})
	return r
}

func (r *running) role() bridge.Role {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.roles) == 0 {
		return ""
	}
	return r.roles[len(r.roles)-1]
}

func (r *running) await(role bridge.Role) {
	r.t.Helper()
	pgtest.Eventually(r.t, patience, func() (bool, string) { return r.role() == role, "the bridge is " + string(r.role()) })
}

// stop ends the bridge as SIGTERM does, and returns how long it took.
func (r *running) stop() time.Duration {
	r.t.Helper()
	began := time.Now()
	r.cancel()
	if err := r.wait(); err != nil {
		r.t.Fatalf("the bridge ended with %v", err)
	}
	return time.Since(began)
}

// wait returns what Run returned.
func (r *running) wait() error {
	r.t.Helper()
	select {
	case <-r.done:
	case <-time.After(patience):
		r.t.Fatal("the bridge does not end")
	}
	return r.err
}

// logTo logs into a buffer that is shown when the test fails.
func logTo(t *testing.T) *slog.Logger {
	out := &lockedBuffer{}
	t.Cleanup(func() {
		if t.Failed() || os.Getenv("EBB_TEST_LOG") != "" {
			t.Logf("log of the bridge:\n%s", out)
		}
	})
	return slog.New(slog.NewTextHandler(out, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// testSink is a destination whose behaviour a test chooses.
type testSink struct {
	// exact sinks know what they hold, as a stream does; the others are told, as an HTTP server is.
	exact bool
	// dies, unless nil, is asked about each event that was stored and not reported yet: true makes Run fail.
	dies func(stored int) bool
	// slow, unless 0, is how long each event takes.
	slow time.Duration

	mu       sync.Mutex
	events   []event.Event
	last     event.Position
	gate     chan struct{} // closed while it is open
	resume   chan struct{} // closed while Resume answers
	received int
	asked    int
}

var (
	_ sink.Sink    = (*testSink)(nil)
	_ sink.Scanner = (*exactSink)(nil)

	errDied = errors.New("the test's sink died")
)

func newTestSink() *testSink {
	s := &testSink{gate: make(chan struct{}), resume: make(chan struct{})}
	close(s.gate)
	close(s.resume)
	return s
}

// exactSink is a testSink that knows what it holds.
type exactSink struct{ *testSink }

func newExactSink() *exactSink {
	s := newTestSink()
	s.exact = true
	return &exactSink{s}
}

func (s *exactSink) Scan(_ context.Context, after uint64, fn func(sink.Stored) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := min(after, uint64(len(s.events))); i < uint64(len(s.events)); i++ {
		e := &s.events[i]
		if err := fn(sink.Stored{Sequence: i + 1, Position: e.Position, Origin: e.Origin, ID: e.ID, Payload: e.Payload, Time: e.Time}); err != nil {
			return err
		}
	}
	return nil
}

// block keeps the sink from delivering until unblock.
func (s *testSink) block() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gate = make(chan struct{})
}

func (s *testSink) unblock() {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.gate)
}

func (s *testSink) Resume(ctx context.Context, known sink.Known) (sink.Tail, error) {
	s.mu.Lock()
	resume := s.resume
	s.asked++
	s.mu.Unlock()
	select {
	case <-resume:
	case <-ctx.Done():
		return sink.Tail{}, ctx.Err()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.exact {
		n := uint64(len(s.events))
		return sink.Tail{Position: s.last, Sequence: n, Last: n, Holds: n, Source: known.Source, Exclusive: true}, nil
	}
	if s.last.Compare(known.Position) > 0 {
		return sink.Tail{Position: s.last}, nil
	}
	return sink.Tail{Position: known.Position}, nil
}

func (s *testSink) Run(ctx context.Context, in <-chan *event.Batch, out sink.Outcome) error {
	for {
		var b *event.Batch
		select {
		case next, ok := <-in:
			if !ok {
				return nil
			}
			b = next
		case <-ctx.Done():
			return ctx.Err()
		}
		s.mu.Lock()
		s.received += len(b.Events)
		s.mu.Unlock()
		for i := range b.Events {
			if err := s.deliver(ctx, &b.Events[i], out.Delivered); err != nil {
				return err
			}
		}
		b.Release()
	}
}

func (s *testSink) deliver(ctx context.Context, e *event.Event, delivered sink.Delivered) error {
	s.mu.Lock()
	gate := s.gate
	s.mu.Unlock()
	select {
	case <-gate:
	case <-ctx.Done():
		return ctx.Err()
	}
	if s.slow > 0 {
		time.Sleep(s.slow)
	}
	s.mu.Lock()
	s.events = append(s.events, event.Event{ID: bytes.Clone(e.ID), Topic: bytes.Clone(e.Topic), Key: bytes.Clone(e.Key),
		Payload: bytes.Clone(e.Payload), Position: e.Position, Origin: e.Origin, Time: e.Time})
	s.last = e.Position
	n := len(s.events)
	s.mu.Unlock()
	if s.dies != nil && s.dies(n) {
		return errDied
	}
	delivered(sink.Progress{Events: 1, Position: e.Position, Sequence: uint64(n)})
	return nil
}

func (s *testSink) Close() error { return nil }

func (s *testSink) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.events)
}

func (s *testSink) taken() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.received
}

// timesAsked is how often Resume was called.
func (s *testSink) timesAsked() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.asked
}

func (s *testSink) all() []event.Event {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.events)
}

// await waits until the sink holds n events.
func (s *testSink) await(t *testing.T, n int) {
	t.Helper()
	pgtest.Eventually(t, patience, func() (bool, string) {
		have := s.count()
		return have >= n, fmt.Sprintf("%d of %d events are delivered", have, n)
	})
}

// ids returns the ids of events.
func ids(t *testing.T, events []event.Event) []int64 {
	t.Helper()
	out := make([]int64, 0, len(events))
	for _, e := range events {
		id, err := strconv.ParseInt(string(e.ID), 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, id)
	}
	return out
}

// sameOrder compares what was delivered with what was to be, in order.
func sameOrder(t *testing.T, got, want []int64) {
	t.Helper()
	if slices.Equal(got, want) {
		return
	}
	for i := range min(len(got), len(want)) {
		if got[i] != want[i] {
			t.Fatalf("delivered %d events, want %d; number %d is id %d, want %d", len(got), len(want), i, got[i], want[i])
		}
	}
	t.Fatalf("delivered %d events, want %d", len(got), len(want))
}

// sameSet compares what was delivered with what was to be, in any order and each once.
func sameSet(t *testing.T, got, want []int64) {
	t.Helper()
	got, want = slices.Sorted(slices.Values(got)), slices.Sorted(slices.Values(want))
	sameOrder(t, got, want)
}

// stream is a sink for a stream of a test's own server.
func (f *fixture) stream(server *natstest.Server) *jetstream.Sink { return f.openStream(server, true) }

// sharedStream is one for a stream that others publish to.
func (f *fixture) sharedStream(server *natstest.Server) *jetstream.Sink {
	return f.openStream(server, false)
}

func (f *fixture) openStream(server *natstest.Server, exclusive bool) *jetstream.Sink {
	f.t.Helper()
	s, err := jetstream.New(jetstream.Config{Servers: server.URL(), Stream: "EBB", Subject: "ebb.{topic}", Source: "ebb",
		CreateStream: true, Replicas: 1, Exclusive: exclusive, Name: f.slot, Logger: f.log})
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() {
		if err := s.Close(); err != nil {
			f.t.Error(err)
		}
	})
	return s
}

// streamed waits until the stream holds n messages, and returns the ids of all that it holds.
func (f *fixture) streamed(server *natstest.Server, n int) ([]int64, []natstest.Msg) {
	f.t.Helper()
	js := server.JetStream(f.t)
	pgtest.Eventually(f.t, patience, func() (bool, string) {
		ctx, cancel := context.WithTimeout(f.t.Context(), 5*time.Second)
		defer cancel()
		stream, err := js.Stream(ctx, "EBB")
		if err != nil {
			return false, err.Error()
		}
		have := stream.CachedInfo().State.Msgs
		return have >= uint64(n), fmt.Sprintf("%d of %d messages are in the stream", have, n)
	})
	messages := server.Messages(f.t, "EBB")
	out := make([]int64, 0, len(messages))
	for _, m := range messages {
		id, err := strconv.ParseInt(m.Header.Get("ce-id"), 10, 64)
		if err != nil {
			f.t.Fatal(err)
		}
		out = append(out, id)
	}
	return out, messages
}
