package jetstream_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	natsjs "github.com/nats-io/nats.go/jetstream"

	"ebb/event"
	"ebb/internal/natstest"
	"ebb/internal/pgtest"
	"ebb/sink"
	"ebb/sink/jetstream"
)

// deadLetters keeps what a sink parks, as the bridge does: it goes on keeping the events of a key until somebody takes them all out.
type deadLetters struct {
	t       *testing.T
	retries chan *sink.Retry

	mu      sync.Mutex
	letters []letter
	// ids are those of the letters, which come by again when a bridge is started again.
	ids  map[string]bool
	held map[string]bool
	// slow has letters wait until it is closed.
	slow    chan struct{}
	changed chan struct{}
	commits sync.WaitGroup
}

type letter struct {
	id, key, reason, detail string
	attempts                int
	sent                    bool
}

func newDeadLetters(t *testing.T) *deadLetters {
	d := &deadLetters{t: t, retries: make(chan *sink.Retry), ids: map[string]bool{}, held: map[string]bool{}, slow: make(chan struct{}), changed: make(chan struct{})}
	close(d.slow)
	t.Cleanup(d.commits.Wait)
	return d
}

func (d *deadLetters) commit(kept func()) {
	slow := d.slow
	d.commits.Go(func() {
		select {
		case <-slow:
			kept()
		case <-d.t.Context().Done():
		}
	})
	close(d.changed)
	d.changed = make(chan struct{})
}

func (d *deadLetters) Queue(e *event.Event, kept func()) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.ids[string(e.ID)] && (e.Key == nil || !d.held[string(e.Key)]) {
		return false
	}
	d.keep(sink.Letter{Event: e, Reason: sink.Queued})
	d.commit(kept)
	return true
}

func (d *deadLetters) Park(letters []sink.Letter, kept func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, l := range letters {
		if (l.Event.Key == nil) && len(letters) > 1 || string(l.Event.Key) != string(letters[0].Event.Key) {
			d.t.Errorf("letters of several keys: %q and %q", letters[0].Event.Key, l.Event.Key)
		}
		d.keep(l)
	}
	if letters[0].Event.Key != nil {
		d.held[string(letters[0].Event.Key)] = true
	}
	d.commit(kept)
}

func (d *deadLetters) keep(l sink.Letter) {
	if d.ids[string(l.Event.ID)] {
		return
	}
	if l.Event.Origin == event.Retried {
		d.t.Errorf("retried event %s is parked", l.Event.ID)
	}
	d.ids[string(l.Event.ID)] = true
	d.letters = append(d.letters, letter{string(l.Event.ID), string(l.Event.Key), l.Reason, l.Detail, l.Attempts, !l.LastAt.IsZero() && !l.FirstAt.IsZero()})
}

func (d *deadLetters) Retries() <-chan *sink.Retry { return d.retries }

// hold has the letters that follow wait until the returned function is called.
func (d *deadLetters) hold() (release func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	slow := make(chan struct{})
	d.slow = slow
	return func() { close(slow) }
}

// await waits for so many letters.
func (d *deadLetters) await(n int) {
	d.t.Helper()
	timeout := time.After(patience)
	for {
		d.mu.Lock()
		have, changed := len(d.letters), d.changed
		d.mu.Unlock()
		if have >= n {
			return
		}
		select {
		case <-changed:
		case <-timeout:
			d.t.Fatalf("%d letters, want %d", have, n)
		}
	}
}

// outcome is what a retry was told.
type outcome struct {
	n       int
	seq     uint64
	failure *sink.Failure
}

// retry hands over events as retries of epoch 1, and returns where what comes of them is sent.
func retry(p *publishing, change func(i int, e *event.Event), ids ...string) <-chan outcome {
	p.t.Helper()
	b := event.NewBatch()
	for i, id := range ids {
		e := event.Event{Position: event.Position{Epoch: 1, Commit: 1, Index: 9999}, ID: b.Copy([]byte(id)), Topic: []byte("topic"), Key: []byte("retried"),
			Payload: []byte("{}"), Origin: event.Retried}
		if change != nil {
			change(i, &e)
		}
		b.Events = append(b.Events, e)
	}
	done := make(chan outcome, 2)
	r := &sink.Retry{Batch: b, Done: func(n int, seq uint64, failure *sink.Failure) { done <- outcome{n, seq, failure} }}
	select {
	case p.dead.retries <- r:
	case <-p.done:
		p.t.Fatalf("run ended with %v", p.err)
	case <-time.After(patience):
		p.t.Fatal("run takes no retry")
	}
	return done
}

func await[T any](t *testing.T, from <-chan T) T {
	t.Helper()
	select {
	case v := <-from:
		return v
	case <-time.After(patience):
		t.Fatal("nothing comes")
	}
	panic("unreachable")
}

// contents returns the ids in the stream, in order, those of retried events with an R in front. It checks that positions do not fall, and that those
// of retried events are of the event before them.
func contents(t *testing.T, messages []natstest.Msg) []string {
	t.Helper()
	var ids []string
	last := "1:0/0:0"
	var at event.Position
	for _, m := range messages {
		position := m.Header.Get("Ebb-Position")
		now, err := event.ParsePosition(position)
		if err != nil || now.Compare(at) < 0 {
			t.Errorf("message %d is at %q behind %s: %v", m.Sequence, position, at, err)
		}
		id := m.Header.Get("ce-id")
		if m.Header.Get("Ebb-Origin") == "retry" {
			if position != last {
				t.Errorf("retried event %s is at %s behind %s", id, position, last)
			}
			id = "R" + id
		}
		ids, last, at = append(ids, id), position, now
	}
	return ids
}

// withKey gives events one of three keys, or none.
func withKey(n int, e *event.Event) {
	if k := n % 4; k > 0 {
		e.Key = []byte{byte('a' + k)}
	}
}

func startParking(t *testing.T, cfg jetstream.Config) *publishing {
	t.Helper()
	p := prepare(t, cfg)
	p.dead = newDeadLetters(t)
	p.resume()
	p.run()
	return p
}

// truthful expects that every progress tells where the stream holds the last event, and that none counts an event that is not delivered.
func (p *publishing) truthful(messages []natstest.Msg) {
	p.t.Helper()
	at := map[uint64]string{}
	for _, m := range messages {
		at[m.Sequence] = m.Header.Get("Ebb-Position")
	}
	for _, progress := range p.progress {
		if position := at[progress.Sequence]; position != progress.Position.String() && (progress.Sequence != 0 || !progress.Position.IsZero()) {
			p.t.Errorf("%s is said to be at sequence %d, which is %q", progress.Position, progress.Sequence, position)
		}
	}
}

// Whatever it is that the stream does not take: the event is parked with those of its key behind it, and all others go on.
func TestRejectedEventsAreParked(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name, reason, word string
		poison             func(e *event.Event)
		lower              int32 // max_msg_size while it runs, so that the server finds it
		sent               bool
	}{
		{"max_payload", "larger than max_payload", "raise it", func(e *event.Event) { e.Payload = make([]byte, 200_000) }, 0, false},
		{"header", "header cannot be passed on", `"Nats-X"`, func(e *event.Event) { e.Headers = []event.Header{{Name: []byte("Nats-X"), Value: []byte("1")}} }, 0, false},
		{"fault", "impossible event", "is NULL", func(e *event.Event) { e.Topic, e.Fault = nil, "the topic is NULL" }, 0, false},
		{"max_msg_size", "larger than max_msg_size", "raise that", func(e *event.Event) { e.Payload = make([]byte, 5000) }, 0, false},
		{"max_msg_size lowered", "larger than max_msg_size", "raise that", func(e *event.Event) { e.Payload = make([]byte, 3000) }, 2000, true},
		{"headers", "headers too large", "65,535", func(e *event.Event) { e.Topic = []byte(strings.Repeat("x", 70_000)) }, 0, false},
	} {
		for _, exclusive := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, exclusive %v", c.name, exclusive), func(t *testing.T) {
				t.Parallel()
				server := natstest.New(t, natstest.MaxPayload(100_000))
				size := int32(4000)
				if c.name == "headers" || c.name == "max_payload" {
					size = -1
				}
				create(t, server, natsjs.StreamConfig{Name: "EBB", Subjects: []string{"ebb.>"}, MaxMsgSize: size})
				cfg := config(t, server)
				cfg.Exclusive = exclusive
				p := startParking(t, cfg)
				p.handChanged(5, withKey)
				p.awaitDelivered(5)
				if c.lower > 0 {
					update(t, server, func(cfg *natsjs.StreamConfig) { cfg.MaxMsgSize = c.lower })
				}
				poison := func(n int, e *event.Event) {
					withKey(n, e)
					if n == 10 || n == 20 { // of key c, and of none
						c.poison(e)
					}
				}
				p.handChanged(40, poison)
				p.awaitDelivered(45)
				p.handChanged(15, withKey)
				close(p.in)
				if err := p.ended(); err != nil {
					t.Fatal(err)
				}
				if p.delivered != 60 {
					t.Errorf("%d events are delivered", p.delivered)
				}
				messages := server.Messages(t, "EBB")
				got := contents(t, messages)
				p.truthful(messages)
				inStream := map[string]bool{}
				for i, id := range got {
					var n int
					if _, err := fmt.Sscanf(id, "1-%d", &n); err != nil || inStream[id] || n == 10 || n == 20 {
						t.Errorf("message %d is %s", i+1, id)
					}
					inStream[id] = true
				}
				var keyless, keyed []int
				for _, l := range p.dead.letters {
					var n int
					if _, err := fmt.Sscanf(l.id, "1-%d", &n); err != nil || inStream[l.id] {
						t.Errorf("letter %+v, which the stream holds: %v", l, inStream[l.id])
					}
					want, attempts := sink.Queued, 0
					if n == 10 || n == 20 {
						want = c.reason
						if c.sent {
							attempts = 1
						}
						if !strings.Contains(l.detail, c.word) {
							t.Errorf("letter %+v does not say %q", l, c.word)
						}
					}
					if l.reason != want || l.attempts != attempts || l.sent != (attempts > 0) {
						t.Errorf("letter %+v, want reason %q and %d attempts", l, want, attempts)
					}
					if l.key == "" {
						keyless = append(keyless, n)
					} else {
						keyed = append(keyed, n)
					}
				}
				if len(inStream)+len(p.dead.letters) != 60 {
					t.Errorf("%d events are in the stream, and %d kept, of 60", len(inStream), len(p.dead.letters))
				}
				if !slices.Equal(keyless, []int{20}) || !slices.IsSorted(keyed) || keyed[0] != 10 {
					t.Errorf("kept are %v, and without a key %v", keyed, keyless)
				}
				// Where others may publish, the server takes what comes behind an event that it refuses.
				if want := 13; len(keyed) != want && (exclusive || !c.sent) {
					t.Errorf("of its key, %v are kept, want %d", keyed, want)
				}
			})
		}
	}
}

// Nothing behind an event that is parked is published before that is committed, and all that is in front of it is.
func TestNothingOvertakesAParkedEvent(t *testing.T) {
	t.Parallel()
	server := natstest.New(t)
	p := startParking(t, config(t, server))
	p.dead.held["q"] = true
	release := p.dead.hold()
	p.handChanged(5, func(n int, e *event.Event) {
		if n == 3 {
			e.Headers = []event.Header{{Name: []byte("ce-id"), Value: []byte("x")}}
		}
	})
	p.awaitDelivered(2)
	p.dead.await(1)
	released := p.dead.hold()
	p.handChanged(4, func(n int, e *event.Event) {
		if n == 7 || n == 9 {
			e.Key = []byte("q")
		}
	})
	p.dead.await(3)
	p.hand(1) // when this is taken, what was to be sent was
	p.hand(1)
	if got := contents(t, server.Messages(t, "EBB")); !slices.Equal(got, []string{"1-1", "1-2"}) {
		t.Errorf("the stream holds %v before the third event is kept", got)
	}
	release()
	p.awaitDelivered(6)
	p.hand(1)
	p.hand(1)
	if got := contents(t, server.Messages(t, "EBB")); !slices.Equal(got, []string{"1-1", "1-2", "1-4", "1-5", "1-6"}) || p.delivered != 6 {
		t.Errorf("the stream holds %v, and %d are delivered, before the seventh event is kept", got, p.delivered)
	}
	released()
	close(p.in)
	if err := p.ended(); err != nil || p.delivered != p.handed {
		t.Fatalf("%d of %d events are delivered, error %v", p.delivered, p.handed, err)
	}
	messages := server.Messages(t, "EBB")
	p.truthful(messages)
	if got := contents(t, messages); !slices.Equal(got, []string{"1-1", "1-2", "1-4", "1-5", "1-6", "1-8", "1-10", "1-11", "1-12", "1-13"}) {
		t.Errorf("the stream holds %v", got)
	}
}

// Where nothing is pending, a parked event counts at once, and the place is the last one that is known: of the stream, or of what it has removed.
func TestParkedEventsAlone(t *testing.T) {
	t.Parallel()
	server := natstest.New(t)
	p := prepare(t, config(t, server))
	p.dead = newDeadLetters(t)
	p.dead.held["q"] = true
	queued := func(_ int, e *event.Event) { e.Key = []byte("q") }
	p.resume()
	p.run()
	p.handChanged(3, queued)
	p.awaitDelivered(3)
	if got := p.progress[len(p.progress)-1]; !got.Position.IsZero() || got.Sequence != 0 {
		t.Errorf("of an empty stream, the progress is %+v", got)
	}
	p.hand(2)
	p.awaitDelivered(5)
	p.handChanged(1, queued)
	p.awaitDelivered(6)
	if got := p.progress[len(p.progress)-1]; got.Position.Index != 5 || got.Sequence != 2 {
		t.Errorf("behind the second message, the progress is %+v", got)
	}
	close(p.in)
	if err := p.ended(); err != nil {
		t.Fatal(err)
	}
	if err := stream(t, server).Purge(t.Context()); err != nil {
		t.Fatal(err)
	}
	again := prepare(t, config(t, server))
	again.dead = p.dead
	at := event.Position{Epoch: 1, Commit: 1, Index: 5}
	if _, err := again.sink.Resume(t.Context(), sink.Known{Position: at, Sequence: 2}); err != nil {
		t.Fatal(err)
	}
	again.run()
	again.handed = 6
	again.handChanged(1, queued)
	again.awaitDelivered(1)
	if got := again.progress[0]; got.Position != at || got.Sequence != 2 {
		t.Errorf("of a stream that was purged, the progress is %+v", got)
	}
	done := retry(again, nil, "1-3")
	if got := await(t, done); got.n != 1 || got.seq != 3 || got.failure != nil {
		t.Errorf("the retry has come to %+v", got)
	}
	if got := server.Messages(t, "EBB"); len(got) != 1 || got[0].Header.Get("Ebb-Position") != at.String() {
		t.Errorf("the retried event is in %v", got)
	}
}

// A bridge that is killed when an event is committed to the dead letters, and nothing behind it published, goes on as if nothing had been.
func TestKilledBehindAParkedEvent(t *testing.T) {
	t.Parallel()
	for _, exclusive := range []bool{true, false} {
		server := natstest.New(t)
		cfg := config(t, server)
		cfg.Exclusive = exclusive
		dead := newDeadLetters(t)
		for handed := 0; handed < 60; {
			p := prepare(t, cfg)
			p.dead = dead
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			tail, err := p.sink.Resume(ctx, sink.Known{Audit: true})
			cancel()
			if err != nil {
				t.Fatal(err)
			}
			p.handed = int(tail.Position.Index)
			if handed = min(60, p.handed+20); len(p.dead.letters) > 0 {
				handed = 60
			}
			if handed < 60 {
				dead.hold()
			}
			p.run()
			p.handChanged(handed-p.handed, func(n int, e *event.Event) {
				withKey(n, e)
				if n%16 == 13 {
					e.Payload = make([]byte, 2<<20)
				}
			})
			if handed < 60 {
				dead.await(1)
				dead.slow = make(chan struct{})
				close(dead.slow)
			} else {
				close(p.in)
				if err := p.ended(); err != nil {
					t.Fatal(err)
				}
			}
			p.cancel()
			<-p.done
		}
		got := contents(t, server.Messages(t, "EBB"))
		var want, letters []string
		for n := range 60 {
			if n++; n%4 == 1 && n >= 13 {
				letters = append(letters, fmt.Sprintf("1-%d", n))
			} else {
				want = append(want, fmt.Sprintf("1-%d", n))
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("exclusive %v: the stream holds %v", exclusive, got)
		}
		var kept []string
		for _, l := range dead.letters {
			kept = append(kept, l.id)
		}
		if !slices.Equal(kept, letters) {
			t.Errorf("exclusive %v: the letters are %v, want %v", exclusive, kept, letters)
		}
	}
}

// What is retried comes between what is streamed, each once, however often the connection is cut.
func TestRetries(t *testing.T) {
	t.Parallel()
	for _, exclusive := range []bool{true, false} {
		t.Run(fmt.Sprintf("exclusive %v", exclusive), func(t *testing.T) {
			t.Parallel()
			server := natstest.New(t)
			proxy := newProxy(t, server.Addr())
			cfg := config(t, server)
			cfg.Exclusive, cfg.Servers = exclusive, proxy.url()
			p := startParking(t, cfg)
			random := rand.New(rand.NewPCG(3, 4))
			var ids []string
			var last []<-chan outcome
			var sizes []int
			for round := range 30 {
				if round%3 == 0 {
					p.awaitDelivered(p.handed)
					proxy.cutAfter(random.IntN(6000))
				}
				p.hand(1 + random.IntN(10))
				var some []string
				for range 1 + random.IntN(4) {
					ids = append(ids, fmt.Sprintf("again-%d", len(ids)))
					some = append(some, ids[len(ids)-1])
				}
				last, sizes = append(last, retry(p, nil, some...)), append(sizes, len(some))
				p.hand(1 + random.IntN(10))
			}
			proxy.cutAfter(-1)
			p.awaitDelivered(p.handed)
			for i, done := range last {
				got := await(t, done)
				if got.n != sizes[i] || got.failure != nil {
					t.Fatalf("retry %d has come to %+v", i, got)
				}
				n := 0
				for _, k := range sizes[:i+1] {
					n += k
				}
				if m, err := stream(t, server).GetMsg(t.Context(), got.seq); err != nil || m.Header.Get("ce-id") != ids[n-1] {
					t.Errorf("retry %d is said to end at sequence %d, which is %v: %v", i, got.seq, m, err)
				}
			}
			close(p.in)
			if err := p.ended(); err != nil {
				t.Fatal(err)
			}
			if p.delivered != p.handed {
				t.Errorf("%d of %d events are delivered", p.delivered, p.handed)
			}
			messages := server.Messages(t, "EBB")
			p.truthful(messages)
			var streamed, retried []string
			for _, id := range contents(t, messages) {
				if again, ok := strings.CutPrefix(id, "R"); ok {
					retried = append(retried, again)
				} else {
					streamed = append(streamed, id)
				}
			}
			if !slices.Equal(retried, ids) {
				t.Errorf("retried are %v", retried)
			}
			for i, id := range streamed {
				if id != fmt.Sprintf("1-%d", i+1) {
					t.Fatalf("streamed event %d is %s", i+1, id)
				}
			}
			if len(streamed) != p.handed || !strings.Contains(p.logs.String(), "not connected") {
				t.Errorf("%d of %d events are in the stream; was a connection cut?\n%s", len(streamed), p.handed, p.logs)
			}
		})
	}
}

// What is retried goes message by message. However much of it there is, and however slow the broker, other events do not wait for long.
func TestRetriesDoNotHoldUpOthers(t *testing.T) {
	t.Parallel()
	server := natstest.New(t)
	proxy := newProxy(t, server.Addr())
	proxy.slowDown(5 * time.Millisecond)
	cfg := config(t, server)
	cfg.Servers = proxy.url()
	p := prepare(t, cfg)
	p.dead = newDeadLetters(t)
	p.dead.retries = make(chan *sink.Retry, 20)
	jetstream.SetRetryFor(p.sink, 100*time.Millisecond)
	p.resume()
	p.run()
	many := func(from, n int) (ids []string) {
		for i := range n {
			ids = append(ids, fmt.Sprint(from+i))
		}
		return ids
	}

	// One that has many is cut short, and the rest is to be handed over again.
	long := retry(p, nil, many(0, 100)...)
	p.hand(1)
	got := await(t, long)
	if got.n == 0 || got.n == 100 || got.failure != nil {
		t.Errorf("a long retry has come to %+v", got)
	}
	p.awaitDelivered(1)

	// Many go in turn with what else there is.
	var done []<-chan outcome
	for i := range 20 {
		done = append(done, retry(p, nil, many(100+5*i, 5)...))
	}
	await(t, done[0])
	p.hand(1)
	for _, d := range done[1:] {
		if got := await(t, d); got.n != 5 || got.failure != nil {
			t.Errorf("a retry has come to %+v", got)
		}
	}
	close(p.in)
	if err := p.ended(); err != nil {
		t.Fatal(err)
	}
	messages := server.Messages(t, "EBB")
	p.truthful(messages)
	all := contents(t, messages)
	if at := slices.Index(all, "1-1"); at != got.n && at != 0 { // 0 if it was taken first
		t.Errorf("the first event stands behind %d that were retried, want %d", at, got.n)
	}
	if at := slices.Index(all, "1-2"); at < 0 || at-got.n-1 > 20 {
		t.Errorf("the second event stands behind %d that were retried, of 100", at-got.n-1)
	}
}

// What a stream of others holds already is not parked with the event before it that it has refused, also where its answers were lost.
func TestStoredBehindARefusedEvent(t *testing.T) {
	t.Parallel()
	server := natstest.New(t)
	proxy := newProxy(t, server.Addr())
	cfg := config(t, server)
	cfg.Exclusive, cfg.Servers = false, proxy.url()
	p := startParking(t, cfg)
	p.hand(1)
	p.awaitDelivered(1)
	update(t, server, func(cfg *natsjs.StreamConfig) { cfg.MaxMsgSize = 1000 })
	proxy.deafen(true)
	p.handChanged(3, func(n int, e *event.Event) {
		e.Key = []byte("k")
		if n == 2 {
			e.Payload = make([]byte, 2000)
		}
	})
	pgtest.Eventually(t, patience, func() (bool, string) {
		n := stream(t, server).CachedInfo().State.Msgs
		return n == 3, fmt.Sprintf("%d messages are in the stream", n)
	})
	proxy.deafen(false)
	proxy.cut()
	p.awaitDelivered(4)
	close(p.in)
	if err := p.ended(); err != nil {
		t.Fatal(err)
	}
	if got := p.dead.letters; len(got) != 1 || got[0].id != "1-2" {
		t.Errorf("the letters are %v", got)
	}
}

// A retry ends with the event that the stream does not take; those behind it are not sent, and the flow goes on.
func TestRejectedRetry(t *testing.T) {
	t.Parallel()
	server := natstest.New(t)
	p := startParking(t, config(t, server))
	p.hand(3)
	bad := func(i int, e *event.Event) {
		if i == 2 {
			e.Payload = make([]byte, 2<<20)
		}
	}
	done := retry(p, bad, "a", "b", "c", "d")
	other := retry(p, nil, "e")
	p.hand(2)
	if got := await(t, done); got.n != 2 || got.seq != 5 || got.failure == nil || !got.failure.Rejected || got.failure.Reason != "larger than max_payload" {
		t.Errorf("the retry has come to %+v", got)
	}
	if got := await(t, other); got.n != 1 || got.failure != nil {
		t.Errorf("the one behind it has come to %+v", got)
	}
	// The server refuses one while it runs.
	update(t, server, func(cfg *natsjs.StreamConfig) { cfg.MaxMsgSize = 1000 })
	done = retry(p, func(_ int, e *event.Event) { e.Payload = make([]byte, 2000) }, "f", "g")
	if got := await(t, done); got.n != 0 || got.failure == nil || !got.failure.Rejected || got.failure.Attempts != 1 || got.failure.Reason != "larger than max_msg_size" {
		t.Errorf("the refused one has come to %+v", got)
	}
	p.hand(1)
	close(p.in)
	if err := p.ended(); err != nil {
		t.Fatal(err)
	}
	messages := server.Messages(t, "EBB")
	p.truthful(messages)
	if got := contents(t, messages); !slices.Equal(got, []string{"1-1", "1-2", "1-3", "Ra", "Rb", "Re", "1-4", "1-5", "1-6"}) || p.delivered != 6 {
		t.Errorf("the stream holds %v, and %d are delivered", got, p.delivered)
	}
	if len(p.dead.letters) > 0 {
		t.Errorf("letters: %v", p.dead.letters)
	}
}

// A retry that another process has published while this one was at it ends the Run, as what is to be retried has to be looked at again.
func TestRetryOfAnotherProcess(t *testing.T) {
	t.Parallel()
	server := natstest.New(t)
	p := startParking(t, config(t, server))
	p.hand(2)
	p.awaitDelivered(2)
	other := prepare(t, config(t, server))
	other.dead = newDeadLetters(t)
	other.resume()
	other.run()
	await(t, retry(other, nil, "a"))
	// The same one is found where it stands.
	if got := await(t, retry(p, nil, "a")); got.n != 1 || got.seq != 3 {
		t.Errorf("the retry has come to %+v", got)
	}
	await(t, retry(other, nil, "b"))
	p.hand(1)
	if err := p.ended(); !errors.Is(err, sink.ErrChanged) || !strings.Contains(err.Error(), `event "b"`) {
		t.Errorf("error is %v", err)
	}
}

// A Run that ends early says how much of a retry is acknowledged.
func TestRunEndsInARetry(t *testing.T) {
	t.Parallel()
	server := natstest.New(t)
	proxy := newProxy(t, server.Addr())
	cfg := config(t, server)
	cfg.Servers = proxy.url()
	p := startParking(t, cfg)
	done := retry(p, nil, "a")
	if got := await(t, done); got.n != 1 || got.seq != 1 {
		t.Errorf("the retry has come to %+v", got)
	}
	proxy.deafen(true)
	done = retry(p, nil, "b", "c")
	p.logs.await(t, "no acknowledgment")
	p.cancel()
	<-p.done
	if got := await(t, done); got.n != 0 || got.failure != nil {
		t.Errorf("the retry has come to %+v", got)
	}
	select {
	case got := <-done:
		t.Errorf("it has come to %+v as well", got)
	default:
	}
	// What it had sent is there all the same.
	again := prepare(t, config(t, server))
	tail, err := again.sink.Resume(t.Context(), sink.Known{Audit: true})
	if err != nil || tail.ID != "" || tail.Origin != event.Retried || tail.Retried != 2 || tail.Position != (event.Position{Epoch: 1}) || tail.Missing != 0 {
		t.Errorf("the tail is %+v, error %v", tail, err)
	}
}

// The limit of the stream is raised while an event waits for those in front of it.
func TestLimitRaisedBeforeItIsParked(t *testing.T) {
	t.Parallel()
	server := natstest.New(t)
	create(t, server, natsjs.StreamConfig{Name: "EBB", Subjects: []string{"ebb.>"}, MaxMsgSize: 1000})
	p := startParking(t, config(t, server))
	p.hand(1)
	p.awaitDelivered(1)
	update(t, server, func(cfg *natsjs.StreamConfig) { cfg.MaxMsgSize = 3000 })
	p.handChanged(5, func(n int, e *event.Event) {
		if n == 4 {
			e.Payload = make([]byte, 2000)
		}
	})
	p.finish(server)
	if len(p.dead.letters) > 0 {
		t.Errorf("letters: %v", p.dead.letters)
	}
}

// In a cluster whose stream changes its leader, parked and retried events are where they belong as well.
func TestParkingInACluster(t *testing.T) {
	t.Parallel()
	cluster := natstest.NewCluster(t, 3)
	p := prepare(t, jetstream.Config{
		Servers: cluster.URLs(), Stream: "EBB", Subject: "ebb.{topic}", Source: "test", CreateStream: true, Replicas: 3, Exclusive: true, Name: "test",
	})
	jetstream.SetAckTimeout(p.sink, time.Second)
	p.dead = newDeadLetters(t)
	p.resume()
	p.run()
	js := cluster.JetStream(t)
	s, err := js.Stream(t.Context(), "EBB")
	if err != nil {
		t.Fatal(err)
	}
	cfg := s.CachedInfo().Config
	cfg.MaxMsgSize = 2000 // of which the sink does not hear
	if _, err := js.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	var retried []string
	for round := range 2 {
		for i := range 5 {
			retried = append(retried, fmt.Sprintf("R%d-%d", round, i))
			retry(p, nil, retried[len(retried)-1][1:])
			p.handChanged(20, func(n int, e *event.Event) {
				if n%50 == 0 {
					e.Payload = make([]byte, 3000)
				}
			})
			if i == 2 {
				cluster.StepDown(t, "EBB")
			}
		}
		p.awaitDelivered(p.handed)
	}
	close(p.in)
	if err := p.ended(); err != nil {
		t.Fatal(err)
	}
	var streamed, again, want []string
	for _, id := range contents(t, cluster.Messages(t, "EBB")) {
		if strings.HasPrefix(id, "R") {
			again = append(again, id)
		} else {
			streamed = append(streamed, id)
		}
	}
	for n := range p.handed {
		if n++; n%50 != 0 {
			want = append(want, fmt.Sprintf("1-%d", n))
		}
	}
	if !slices.Equal(streamed, want) || !slices.Equal(again, retried) {
		t.Errorf("the stream holds %v and %v", streamed, again)
	}
	if len(p.dead.letters) != p.handed/50 {
		t.Errorf("letters: %v", p.dead.letters)
	}
}
