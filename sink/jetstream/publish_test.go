package jetstream_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	natsjs "github.com/nats-io/nats.go/jetstream"

	"ebb/event"
	"ebb/internal/natstest"
	"ebb/sink"
	"ebb/sink/jetstream"
)

// patience is how long a test waits for what must happen.
const patience = 20 * time.Second

// logs keeps what is logged, for tests of what an operator reads.
type logs struct {
	mu      sync.Mutex
	text    strings.Builder
	changed chan struct{}
}

func newLogs() *logs { return &logs{changed: make(chan struct{})} }

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.text.Write(p)
	close(l.changed)
	l.changed = make(chan struct{})
	return len(p), nil
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// await waits for a line that has all of the words.
func (l *logs) await(t *testing.T, words ...string) {
	t.Helper()
	timeout := time.After(patience)
	for {
		l.mu.Lock()
		text, changed := l.text.String(), l.changed
		l.mu.Unlock()
		for line := range strings.Lines(text) {
			if containsAll(line, words) {
				return
			}
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("no line with %q in\n%s", words, text)
		}
	}
}

// awaitCount waits until a text was logged n times.
func (l *logs) awaitCount(t *testing.T, text string, n int) {
	t.Helper()
	timeout := time.After(patience)
	for {
		l.mu.Lock()
		count, changed := strings.Count(l.text.String(), text), l.changed
		l.mu.Unlock()
		if count >= n {
			return
		}
		select {
		case <-changed:
		case <-timeout:
			t.Fatalf("%q was logged %d times, want %d", text, count, n)
		}
	}
}

func containsAll(s string, words []string) bool {
	for _, word := range words {
		if !strings.Contains(s, word) {
			return false
		}
	}
	return true
}

// publishing is a Run of a sink over events that a test hands over bit by bit. The events are numbered: the n-th is event n of one
// transaction.
type publishing struct {
	t    *testing.T
	sink *jetstream.Sink
	logs *logs
	in   chan *event.Batch
	done chan struct{}
	err  error // once done is closed
	// dead, unless nil, keeps what is not delivered.
	dead   *deadLetters
	cancel context.CancelFunc

	handed int

	mu        sync.Mutex
	delivered int
	progress  []sink.Progress
	changed   chan struct{}
}

// start resumes a sink and runs it. It is stopped when the test ends.
func start(t *testing.T, cfg jetstream.Config) *publishing {
	t.Helper()
	p := prepare(t, cfg)
	p.resume()
	p.run()
	return p
}

func prepare(t *testing.T, cfg jetstream.Config) *publishing {
	t.Helper()
	logs := newLogs()
	cfg.Logger = slog.New(slog.NewTextHandler(io.MultiWriter(logs, t.Output()), nil))
	p := &publishing{t: t, sink: open(t, cfg), logs: logs, in: make(chan *event.Batch), done: make(chan struct{}), changed: make(chan struct{})}
	jetstream.SetAckTimeout(p.sink, 500*time.Millisecond)
	t.Cleanup(func() { closed(t, p.sink) })
	return p
}

func (p *publishing) resume() {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), patience)
	defer cancel()
	if _, err := p.sink.Resume(ctx, sink.Known{}); err != nil {
		p.t.Fatal(err)
	}
}

func (p *publishing) run() {
	ctx, cancel := context.WithCancel(p.t.Context())
	p.cancel = cancel
	p.t.Cleanup(func() { cancel(); <-p.done })
	out := sink.Outcome{Delivered: func(progress sink.Progress) {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.delivered += progress.Events
		p.progress = append(p.progress, progress)
		close(p.changed)
		p.changed = make(chan struct{})
	}}
	if p.dead != nil {
		out.Dead = p.dead
	}
	go func() {
		defer close(p.done)
		p.err = p.sink.Run(ctx, p.in, out)
	}()
}

// hand hands over a batch of the next n events.
func (p *publishing) hand(n int) { p.handChanged(n, nil) }

func (p *publishing) handChanged(n int, change func(n int, e *event.Event)) {
	p.t.Helper()
	from := p.handed
	b := batchOf(1, n, func(i int, e *event.Event) {
		e.Position.Index = uint64(from + i + 1)
		e.ID = fmt.Appendf(nil, "1-%d", from+i+1)
		if change != nil {
			change(from+i+1, e)
		}
	})
	select {
	case p.in <- b:
		p.handed += n
	case <-p.done:
		b.Release()
	case <-time.After(patience):
		p.t.Fatal("run takes no more events")
	}
}

// awaitDelivered waits until n events are delivered.
func (p *publishing) awaitDelivered(n int) {
	p.t.Helper()
	timeout := time.After(patience)
	for {
		p.mu.Lock()
		delivered, changed := p.delivered, p.changed
		p.mu.Unlock()
		if delivered >= n {
			return
		}
		select {
		case <-changed:
		case <-p.done:
			p.t.Fatalf("run ended with %v after %d of %d events", p.err, delivered, n)
		case <-timeout:
			p.t.Fatalf("%d of %d events are delivered", delivered, n)
		}
	}
}

// ended waits for the end of Run.
func (p *publishing) ended() error {
	p.t.Helper()
	select {
	case <-p.done:
	case <-time.After(patience):
		p.t.Fatal("run goes on")
	}
	return p.err
}

// finish expects that everything is delivered, and that the stream holds it once and in order.
func (p *publishing) finish(server *natstest.Server) {
	p.t.Helper()
	close(p.in)
	if err := p.ended(); err != nil {
		p.t.Fatal(err)
	}
	if p.delivered != p.handed {
		p.t.Errorf("%d of %d events are delivered", p.delivered, p.handed)
	}
	p.compare(server, p.handed)
}

// compare expects that the stream holds the first n events in order and nothing else that has a position, and that every progress told
// the truth about where.
func (p *publishing) compare(server *natstest.Server, n int) {
	p.t.Helper()
	at := map[uint64]string{}
	next := 1
	for _, m := range server.Messages(p.t, "EBB") {
		position := m.Header.Get("Ebb-Position")
		if position == "" {
			continue
		}
		if want := fmt.Sprintf("1:0/1:%d", next); position != want {
			p.t.Fatalf("sequence %d is %s, want %s", m.Sequence, position, want)
		}
		at[m.Sequence] = position
		next++
	}
	if next-1 != n {
		p.t.Errorf("the stream holds %d events, want %d", next-1, n)
	}
	for _, progress := range p.progress {
		if position := at[progress.Sequence]; position != progress.Position.String() {
			p.t.Errorf("%s is said to be at sequence %d, which is %q", progress.Position, progress.Sequence, position)
		}
	}
}

func stream(t *testing.T, server *natstest.Server) natsjs.Stream {
	t.Helper()
	stream, err := server.JetStream(t).Stream(t.Context(), "EBB")
	if err != nil {
		t.Fatal(err)
	}
	return stream
}

func update(t *testing.T, server *natstest.Server, change func(*natsjs.StreamConfig)) {
	t.Helper()
	cfg := stream(t, server).CachedInfo().Config
	change(&cfg)
	if _, err := server.JetStream(t).UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
}

// A foreign message that takes a sequence number while nothing is published costs a refusal, and a warning.
func TestForeignMessagesInBetween(t *testing.T) {
	t.Parallel()
	server := natstest.New(t)
	p := start(t, config(t, server))
	for i := range 20 {
		for range i % 4 {
			publish(t, server, nats.Header{})
		}
		p.hand(1)
		p.awaitDelivered(i + 1)
	}
	p.finish(server)
	if warned := strings.Count(p.logs.String(), "stepped over"); warned != 1 {
		t.Errorf("%d warnings, want one:\n%s", warned, p.logs)
	}
	p.logs.await(t, "stepped over", "who may publish", "messages=1", "stream=EBB")
	if strings.Contains(p.logs.String(), "interrupted") {
		t.Errorf("what was expected is logged as an interruption:\n%s", p.logs)
	}
}

// A foreign message in the place of the first of several has that refused and lets the next ones in. As many messages as
// there are events follow the last acknowledged one then, the last of them the last event; and yet one is missing.
func TestForeignMessageInFrontOfTheWindow(t *testing.T) {
	t.Parallel()
	server := natstest.New(t)
	p := start(t, config(t, server))
	p.hand(2)
	p.awaitDelivered(2)
	publish(t, server, nats.Header{})
	p.hand(3)
	err := p.ended()
	if !errors.Is(err, jetstream.ErrForeign) {
		t.Fatalf("error is %v", err)
	}
	for _, word := range []string{`event "1-3"`, `in front of event "1-4"`, "sequence 4", "sequence 3", "who may publish"} {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("the error does not say %s: %v", word, err)
		}
	}
	if p.delivered != 2 {
		t.Errorf("%d events are reported as delivered, want the 2 before the foreign message", p.delivered)
	}
}

// While somebody else publishes all the time, either everything arrives or the bridge halts; what it reports as delivered is in
// the stream, without a gap, whatever happens.
func TestForeignMessagesAtAnyTime(t *testing.T) {
	t.Parallel()
	halted := 0
	for round := range 12 {
		server := natstest.New(t)
		p := start(t, config(t, server))
		random := rand.New(rand.NewPCG(1, uint64(round)))
		var wg sync.WaitGroup
		wg.Go(func() {
			for range 10 {
				p.hand(1 + random.IntN(20))
			}
		})
		for range round {
			publish(t, server, nats.Header{})
		}
		wg.Wait()
		close(p.in)
		err := p.ended()
		switch {
		case err == nil:
			p.compare(server, p.handed)
		case errors.Is(err, jetstream.ErrForeign):
			halted++
			var positions []string
			for _, m := range server.Messages(t, "EBB") {
				if position := m.Header.Get("Ebb-Position"); position != "" {
					positions = append(positions, position)
				}
			}
			for i := range p.delivered {
				if want := fmt.Sprintf("1:0/1:%d", i+1); i >= len(positions) || positions[i] != want {
					t.Fatalf("%d events are reported as delivered, but %s is not in its place", p.delivered, want)
				}
			}
		default:
			t.Fatal(err)
		}
	}
	t.Logf("halted %d times", halted)
}

// Another process of the same bridge, killed a moment ago, may have published what this one is handed next, and stepped over a
// foreign message itself.
func TestForeignMessageAndAnotherProcess(t *testing.T) {
	t.Parallel()
	server := natstest.New(t)
	p := start(t, config(t, server))
	other := start(t, config(t, server))
	other.hand(5)
	other.awaitDelivered(5)
	publish(t, server, nats.Header{})
	other.hand(1)
	other.awaitDelivered(6)
	other.hand(4)
	other.finish(server)
	for _, n := range []int{3, 4, 3, 2} {
		p.hand(n)
		p.awaitDelivered(p.handed)
	}
	p.finish(server)
	p.logs.await(t, "stepped over", "messages=1")
}

// What stands in the stream is not the bridge's when it is another event, wherever the foreign messages are.
func TestAnotherEventBehindAForeignMessage(t *testing.T) {
	t.Parallel()
	server := natstest.New(t)
	p := start(t, config(t, server))
	publish(t, server, nats.Header{})
	publish(t, server, nats.Header{"Ebb-Position": {"1:0/1:7"}, "Ce-Id": {"1-7"}})
	p.hand(3)
	if err := p.ended(); !errors.Is(err, jetstream.ErrForeign) || !strings.Contains(err.Error(), `"1-1"`) {
		t.Errorf("error is %v", err)
	}
	if p.delivered != 0 {
		t.Errorf("%d events are reported as delivered", p.delivered)
	}
}

// A stream that drops its oldest messages may not hold any more what is looked for after an interruption. What is left of it
// tells that they were there.
func TestDeletedBeforeTheyAreLookedAt(t *testing.T) {
	t.Parallel()
	server := natstest.New(t)
	create(t, server, natsjs.StreamConfig{Name: "EBB", Subjects: []string{"ebb.>"}, MaxMsgs: 5, Discard: natsjs.DiscardOld})
	p := start(t, config(t, server))
	other := start(t, config(t, server))
	other.hand(100)
	other.awaitDelivered(100)
	p.hand(100)
	p.awaitDelivered(100)
	p.hand(1)
	p.awaitDelivered(101)
	if last := p.progress[len(p.progress)-1]; last.Sequence != 101 {
		t.Errorf("the last one is at %d", last.Sequence)
	}
	// Where nothing is left, it does not.
	if err := stream(t, server).Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	other.hand(1)
	if err := other.ended(); !errors.Is(err, sink.ErrChanged) {
		t.Errorf("error is %v", err)
	}
}

func TestStreamCreatedByHand(t *testing.T) {
	t.Parallel()
	server := natstest.New(t)
	cfg := config(t, server)
	cfg.CreateStream = false
	p := prepare(t, cfg)
	resumed := make(chan struct{})
	go func() { defer close(resumed); p.resume() }()
	p.logs.await(t, "nats.create_stream", "create it", "stream=EBB")
	create(t, server, natsjs.StreamConfig{Name: "EBB", Subjects: []string{"ebb.>"}})
	<-resumed
	p.run()
	p.hand(3)
	p.finish(server)
}

// A stream that is deleted before it acknowledged anything ends the Run, so that the next Resume creates it again.
func TestStreamDeletedBeforeTheFirstEvent(t *testing.T) {
	t.Parallel()
	for _, swallowed := range []bool{false, true} {
		server := natstest.New(t)
		p := start(t, config(t, server))
		if swallowed {
			// A plain subscriber, so that the server has somebody to hand the messages to and does not say that nobody listens.
			conn := server.Connect(t)
			if _, err := conn.Subscribe("ebb.>", func(*nats.Msg) {}); err != nil {
				t.Fatal(err)
			}
			if err := conn.Flush(); err != nil {
				t.Fatal(err)
			}
		}
		if err := server.JetStream(t).DeleteStream(t.Context(), "EBB"); err != nil {
			t.Fatal(err)
		}
		p.hand(3)
		if err := p.ended(); !errors.Is(err, sink.ErrChanged) || !strings.Contains(err.Error(), "does not exist any more") {
			t.Errorf("swallowed: %v: error is %v", swallowed, err)
		}
		if timedOut := strings.Contains(p.logs.String(), "no acknowledgment"); timedOut != swallowed {
			t.Errorf("swallowed: %v, but logged is\n%s", swallowed, p.logs)
		}
		again := start(t, config(t, server))
		again.hand(3)
		again.finish(server)
	}
}

func TestSubjectNotInTheStream(t *testing.T) {
	t.Parallel()
	server := natstest.New(t)
	create(t, server, natsjs.StreamConfig{Name: "EBB", Subjects: []string{"ebb.topic"}})
	p := start(t, config(t, server))
	p.handChanged(50, func(n int, e *event.Event) {
		if n == 40 {
			e.Topic = []byte("other")
		}
	})
	err := p.ended()
	if !errors.Is(err, jetstream.ErrUnsuitable) {
		t.Fatalf("error is %v", err)
	}
	for _, word := range []string{"ebb.other", "ebb.topic", "nats.subject"} {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("the error does not say %s: %v", word, err)
		}
	}
	if p.delivered != 39 {
		t.Errorf("%d events are delivered, want the 39 before it", p.delivered)
	}
	p.compare(server, 39)
}

// Another stream that takes the subject away from this one does not get the events.
func TestSubjectOfAnotherStream(t *testing.T) {
	t.Parallel()
	server := natstest.New(t)
	p := start(t, config(t, server))
	update(t, server, func(cfg *natsjs.StreamConfig) { cfg.Subjects = []string{"other.>"} })
	if _, err := server.JetStream(t).CreateStream(t.Context(), natsjs.StreamConfig{Name: "THEIRS", Subjects: []string{"ebb.>"}}); err != nil {
		t.Fatal(err)
	}
	p.hand(5)
	if err := p.ended(); !errors.Is(err, jetstream.ErrUnsuitable) || !strings.Contains(err.Error(), "other.>") {
		t.Errorf("error is %v", err)
	}
	if n := len(server.Messages(t, "THEIRS")); n != 0 {
		t.Errorf("the other stream got %d events", n)
	}
}

func TestSealedStream(t *testing.T) {
	t.Parallel()
	server := natstest.New(t)
	p := start(t, config(t, server))
	p.hand(3)
	p.awaitDelivered(3)
	update(t, server, func(cfg *natsjs.StreamConfig) { cfg.Sealed = true })
	p.hand(3)
	if err := p.ended(); !errors.Is(err, jetstream.ErrUnsuitable) || !strings.Contains(err.Error(), "sealed") {
		t.Errorf("error is %v", err)
	}
	p.compare(server, 3)
}

// A stream that is full and refuses what is new is waited for, and the log says which limit to raise.
func TestFullStream(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name    string
		stream  natsjs.StreamConfig
		words   []string
		without string
		mend    func(*natsjs.StreamConfig)
	}{
		{"max_msgs", natsjs.StreamConfig{MaxMsgs: 10, MaxBytes: 1 << 20}, []string{"max_msgs of 10"}, "max_bytes",
			func(cfg *natsjs.StreamConfig) { cfg.MaxMsgs = 1000 }},
		{"max_bytes", natsjs.StreamConfig{MaxBytes: 10_000, MaxMsgs: 1000}, []string{"max_bytes of 10000"}, "max_msgs of",
			func(cfg *natsjs.StreamConfig) { cfg.MaxBytes = 1 << 20 }},
		{"max_msgs_per_subject", natsjs.StreamConfig{MaxMsgsPerSubject: 20, DiscardNewPerSubject: true}, []string{"max_msgs_per_subject of 20"}, "max_bytes",
			func(cfg *natsjs.StreamConfig) { cfg.MaxMsgsPerSubject = 1000 }},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			server := natstest.New(t)
			c.stream.Name, c.stream.Subjects, c.stream.Discard = "EBB", []string{"ebb.>"}, natsjs.DiscardNew
			create(t, server, c.stream)
			p := start(t, config(t, server))
			p.hand(100)
			p.logs.await(t, append(c.words, "is full", "raise", "stream=EBB")...)
			if strings.Contains(p.logs.String(), c.without) {
				t.Errorf("the log names %s:\n%s", c.without, p.logs)
			}
			update(t, server, c.mend)
			p.hand(20)
			p.awaitDelivered(120)
			p.finish(server)
			p.logs.await(t, "publishing goes on")
		})
	}
}

// A message that is larger than the stream takes ends the Run once all before it are delivered. When the limit is raised it is
// delivered in its place.
func TestLimitOfTheStreamRaised(t *testing.T) {
	t.Parallel()
	server := natstest.New(t)
	create(t, server, natsjs.StreamConfig{Name: "EBB", Subjects: []string{"ebb.>"}, MaxMsgSize: 1000})
	large := func(n int, e *event.Event) {
		if n == 40 {
			e.Payload = make([]byte, 2000)
		}
	}
	p := start(t, config(t, server))
	p.handChanged(50, large)
	err := p.ended()
	var rejected *sink.RejectedError
	if !errors.As(err, &rejected) || rejected.ID != "1-40" || !strings.Contains(err.Error(), "max_msg_size") {
		t.Fatalf("error is %v", err)
	}
	if p.delivered != 39 {
		t.Errorf("%d events are delivered, want the 39 before it", p.delivered)
	}
	p.compare(server, 39)
	update(t, server, func(cfg *natsjs.StreamConfig) { cfg.MaxMsgSize = 3000 })
	again := start(t, config(t, server))
	again.handed, again.delivered = 39, 39
	again.handChanged(20, large)
	again.finish(server)
}

// A server or an account whose storage is used up is waited for, and the log says what to raise.
func TestNoRoom(t *testing.T) {
	t.Parallel()
	t.Run("server", func(t *testing.T) {
		t.Parallel()
		var limit int64 = 50_000
		server := natstest.New(t, natstest.Adjust(func(o *server.Options) { o.JetStreamMaxStore = limit }))
		p := start(t, config(t, server))
		p.hand(1000)
		p.logs.await(t, "max_file_store", "no room")
		server.Stop(t)
		limit = 100 << 20
		server.Start(t)
		p.awaitDelivered(1000)
		p.finish(server)
	})
	t.Run("account", func(t *testing.T) {
		t.Parallel()
		nats := natstest.New(t)
		limit := func(bytes int64) {
			if err := nats.NATS().GlobalAccount().UpdateJetStreamLimits(map[string]server.JetStreamAccountLimits{"": {
				MaxMemory: -1, MaxStore: bytes, MaxStreams: -1, MaxConsumers: -1,
			}}); err != nil {
				t.Fatal(err)
			}
		}
		limit(50_000)
		p := start(t, config(t, nats))
		p.hand(1000)
		p.logs.await(t, "the account has no room", "JetStream limits")
		limit(100 << 20)
		p.awaitDelivered(1000)
		p.finish(nats)
	})
}

// A server that holds back fewer messages for a stream than are sent refuses what is too many. All come in order all the same.
func TestTooManyForTheServer(t *testing.T) {
	t.Parallel()
	server := natstest.New(t, natstest.Adjust(func(o *server.Options) { o.StreamMaxBufferedMsgs = 20 }))
	p := start(t, config(t, server))
	for range 20 {
		p.hand(1000)
	}
	p.awaitDelivered(20_000)
	p.finish(server)
	p.logs.await(t, "fewer messages at a time", "max_buffered_msgs")
	if lines := strings.Count(p.logs.String(), "max_buffered_msgs"); lines > 1 {
		t.Errorf("what goes on all the time is logged %d times", lines)
	}
}

func TestJetStreamDisabled(t *testing.T) {
	t.Parallel()
	t.Run("until the server is started with it", func(t *testing.T) {
		t.Parallel()
		js := natstest.New(t)
		js.Stop(t)
		host, port, err := net.SplitHostPort(js.Addr())
		if err != nil {
			t.Fatal(err)
		}
		options := &server.Options{Host: host, NoSigs: true, NoLog: true}
		if _, err := fmt.Sscan(port, &options.Port); err != nil {
			t.Fatal(err)
		}
		plain, err := server.NewServer(options)
		if err != nil {
			t.Fatal(err)
		}
		plain.Start()
		defer plain.Shutdown()
		p := prepare(t, config(t, js))
		resumed := make(chan struct{})
		go func() { defer close(resumed); p.resume() }()
		p.logs.await(t, "enable it in the server's configuration", "stream=EBB")
		plain.Shutdown()
		plain.WaitForShutdown()
		js.Start(t)
		<-resumed
		p.run()
		p.hand(10)
		p.finish(js)
	})
	t.Run("while running", func(t *testing.T) {
		t.Parallel()
		nats := natstest.New(t)
		p := start(t, config(t, nats))
		p.hand(10)
		p.awaitDelivered(10)
		if err := nats.NATS().DisableJetStream(); err != nil {
			t.Fatal(err)
		}
		p.hand(10)
		p.logs.await(t, "waiting for the stream", "without JetStream")
		nats.Restart(t)
		p.awaitDelivered(20)
		p.finish(nats)
	})
	t.Run("for the account", func(t *testing.T) {
		t.Parallel()
		var accounts []*server.Account
		nats := natstest.New(t, natstest.Adjust(func(o *server.Options) {
			theirs := server.NewAccount("APP")
			accounts = []*server.Account{theirs}
			o.Accounts = accounts
			o.Users = []*server.User{{Username: "ebb", Password: "x", Account: theirs}}
			o.NoAuthUser = "ebb"
		}))
		p := prepare(t, config(t, nats))
		resumed := make(chan struct{})
		go func() { defer close(resumed); p.resume() }()
		p.logs.await(t, "the account may not use JetStream", "enable it for the account")
		account, err := nats.NATS().LookupAccount("APP")
		if err != nil {
			t.Fatal(err)
		}
		if err := account.EnableJetStream(nil, nil); err != nil {
			t.Fatal(err)
		}
		<-resumed
		p.run()
		p.hand(10)
		p.finish(nats)
	})
}

// What the user may not do is in the log, with what to grant.
func TestPermissions(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name        string
		permissions server.Permissions
		words       []string
	}{
		{"JetStream API", server.Permissions{Publish: &server.SubjectPermission{Deny: []string{"$JS.API.>"}}}, []string{"$JS.API", "to publish to"}},
		{"inbox", server.Permissions{Subscribe: &server.SubjectPermission{Deny: []string{"_INBOX.>"}}}, []string{"_INBOX", "to subscribe to"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			nats := natstest.New(t, natstest.Adjust(func(o *server.Options) {
				o.Users = []*server.User{{Username: "ebb", Password: "x", Permissions: &c.permissions}, {Username: "admin", Password: "x"}}
				o.NoAuthUser = "admin"
			}))
			cfg := config(t, nats)
			cfg.Servers = strings.Replace(nats.URL(), "://", "://ebb:x@", 1)
			p := prepare(t, cfg)
			ctx, cancel := context.WithCancel(t.Context())
			ended := make(chan error)
			go func() {
				_, err := p.sink.Resume(ctx, sink.Known{})
				ended <- err
			}()
			p.logs.await(t, append(c.words, "waiting for the stream", "grant the user")...)
			cancel()
			if err := <-ended; !errors.Is(err, context.Canceled) {
				t.Errorf("error is %v", err)
			}
		})
	}
}

// proxy stands between a client and a server, and fails in many ways.
type proxy struct {
	listener net.Listener
	target   string
	wg       sync.WaitGroup

	mu    sync.Mutex
	conns map[net.Conn]bool
	// left is how many more bytes of clients pass before their connections are cut, or negative.
	left int
	// deaf keeps from clients what the server says.
	deaf bool
	// frozen is closed when bytes may pass, and not lost, in either direction.
	frozen chan struct{}
	// slow is how long what the server says is under way.
	slow time.Duration
}

func newProxy(t *testing.T, target string) *proxy {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	p := &proxy{listener: listener, target: target, conns: map[net.Conn]bool{}, left: -1, frozen: make(chan struct{})}
	close(p.frozen)
	p.wg.Go(p.serve)
	t.Cleanup(func() {
		listener.Close()
		p.thaw()
		p.cut()
		p.wg.Wait()
	})
	return p
}

func (p *proxy) url() string { return "nats://" + p.listener.Addr().String() }

func (p *proxy) serve() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		upstream, err := net.Dial("tcp", p.target)
		if err != nil {
			client.Close()
			continue
		}
		p.mu.Lock()
		p.conns[client], p.conns[upstream] = true, true
		p.mu.Unlock()
		p.wg.Go(func() { p.pipe(upstream, client, true) })
		p.wg.Go(func() { p.pipe(client, upstream, false) })
	}
}

func (p *proxy) pipe(to, from net.Conn, toServer bool) {
	defer to.Close()
	defer from.Close()
	buffer := make([]byte, 4096)
	for {
		n, err := from.Read(buffer)
		if err != nil {
			return
		}
		p.mu.Lock()
		frozen, deaf, slow, cut := p.frozen, p.deaf, p.slow, false
		if toServer && p.left >= 0 {
			if n >= p.left {
				n, cut, p.left = p.left, true, -1
			} else {
				p.left -= n
			}
		}
		p.mu.Unlock()
		<-frozen
		if !toServer {
			time.Sleep(slow)
		}
		if deaf && !toServer {
			continue
		}
		if _, err := to.Write(buffer[:n]); err != nil || cut {
			return
		}
	}
}

// cut ends all connections.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for conn := range p.conns {
		conn.Close()
	}
	clear(p.conns)
}

// cutAfter ends the connection that carries the byte of that number to the server.
func (p *proxy) cutAfter(bytes int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.left = bytes
}

func (p *proxy) deafen(deaf bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.deaf = deaf
}

func (p *proxy) slowDown(by time.Duration) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.slow = by
}

func (p *proxy) freeze() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.frozen = make(chan struct{})
}

func (p *proxy) thaw() {
	p.mu.Lock()
	defer p.mu.Unlock()
	select {
	case <-p.frozen:
	default:
		close(p.frozen)
	}
}

// The connection is cut in the middle of a message, again and again.
func TestConnectionCut(t *testing.T) {
	t.Parallel()
	server := natstest.New(t)
	proxy := newProxy(t, server.Addr())
	cfg := config(t, server)
	cfg.Servers = proxy.url()
	p := start(t, cfg)
	random := rand.New(rand.NewPCG(1, 2))
	for range 25 {
		proxy.cutAfter(random.IntN(60_000))
		for range 1 + random.IntN(4) {
			p.hand(1 + random.IntN(100))
		}
		p.awaitDelivered(p.handed - random.IntN(p.handed/4+1))
	}
	proxy.cutAfter(-1)
	p.finish(server)
	if !strings.Contains(p.logs.String(), "not connected") {
		t.Errorf("no connection was cut:\n%s", p.logs)
	}
}

// Acknowledgments that do not come are not waited for for ever. Once they do, nothing is doubled.
func TestNoAcknowledgments(t *testing.T) {
	t.Parallel()
	server := natstest.New(t)
	proxy := newProxy(t, server.Addr())
	cfg := config(t, server)
	cfg.Servers = proxy.url()
	p := start(t, cfg)
	p.hand(10)
	p.awaitDelivered(10)
	proxy.deafen(true)
	p.hand(500)
	p.logs.await(t, "no acknowledgment for 500ms")
	proxy.deafen(false)
	proxy.cut() // as what was kept back was in the middle of something
	p.hand(500)
	p.awaitDelivered(1010)
	p.finish(server)
}

// A server that stands still for a while, as one does that is stopped by a signal, takes what was sent to it when it goes on.
func TestFrozenServer(t *testing.T) {
	t.Parallel()
	server := natstest.New(t)
	proxy := newProxy(t, server.Addr())
	cfg := config(t, server)
	cfg.Servers = proxy.url()
	p := start(t, cfg)
	for range 3 {
		p.hand(10)
		p.awaitDelivered(p.handed)
		proxy.freeze()
		p.hand(500)
		timeouts := strings.Count(p.logs.String(), "publishing was interrupted")
		p.logs.awaitCount(t, "publishing was interrupted", timeouts+1)
		proxy.thaw()
		p.awaitDelivered(p.handed)
	}
	p.finish(server)
}

// In a cluster, the stream changes its leader while events are published, as it does when a server is restarted.
func TestLeaderChange(t *testing.T) {
	t.Parallel()
	cluster := natstest.NewCluster(t, 3)
	p := prepare(t, jetstream.Config{
		Servers: cluster.URLs(), Stream: "EBB", Subject: "ebb.{topic}", Source: "test", CreateStream: true, Replicas: 3, Exclusive: true, Name: "test",
	})
	jetstream.SetAckTimeout(p.sink, 2*time.Second)
	p.resume()
	p.run()
	leaders := map[int]bool{}
	for range 6 {
		for range 10 {
			p.hand(100)
		}
		leaders[cluster.StreamLeader(t, "EBB")] = true
		cluster.StepDown(t, "EBB")
		for range 10 {
			p.hand(100)
		}
		p.awaitDelivered(p.handed)
	}
	if len(leaders) < 2 {
		t.Errorf("the leaders were %v, want several", leaders)
	}
	close(p.in)
	if err := p.ended(); err != nil {
		t.Fatal(err)
	}
	messages := cluster.Messages(t, "EBB")
	if len(messages) != p.handed {
		t.Fatalf("the stream holds %d messages, want %d", len(messages), p.handed)
	}
	for i, m := range messages {
		if position := m.Header.Get("Ebb-Position"); position != fmt.Sprintf("1:0/1:%d", i+1) {
			t.Fatalf("message %d is at %s", i+1, position)
		}
	}
}
