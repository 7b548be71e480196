package webhook

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"ebb/event"
	"ebb/sink"
	"ebb/sink/sinktest"
)

// flow is a Run under way that parks.
type flow struct {
	t     *testing.T
	dead  *sinktest.DeadLetters
	in    chan *event.Batch
	stop  context.CancelFunc
	ended chan error

	mu        sync.Mutex
	delivered int
	n         int
	fed       atomic.Int64
	of        map[string]int
}

func startFlow(t *testing.T, cfg Config, dead *sinktest.DeadLetters) *flow {
	t.Helper()
	s := open(t, cfg)
	ctx, cancel := context.WithCancel(context.Background())
	f := &flow{t: t, dead: dead, in: make(chan *event.Batch), stop: cancel, ended: make(chan error, 1), of: map[string]int{}}
	go func() {
		f.ended <- s.Run(ctx, f.in, sink.Outcome{Dead: dead, Delivered: func(p sink.Progress) {
			f.mu.Lock()
			defer f.mu.Unlock()
			f.delivered += p.Events
			if p.Position.Index != uint64(f.delivered) {
				t.Errorf("%d events are delivered, up to %v", f.delivered, p.Position)
			}
		}})
	}()
	t.Cleanup(cancel)
	return f
}

// note returns the next event of a key.
func (f *flow) note(key string) note {
	f.n++
	c := note{N: f.n, Key: key}
	if key != "" {
		f.of[key]++
		c.Of = f.of[key]
	}
	return c
}

// send hands over one event of each key.
func (f *flow) send(keys ...string) {
	f.t.Helper()
	b := event.NewBatch()
	for _, key := range keys {
		b.Events = append(b.Events, noteEvent(b, f.note(key)))
	}
	select {
	case f.in <- b:
	case <-time.After(30 * time.Second):
		f.t.Fatal("nothing is read")
	case err := <-f.ended:
		f.t.Fatalf("run has ended: %v", err)
	}
}

func (f *flow) progress() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.delivered
}

func (f *flow) await(n int) {
	f.t.Helper()
	eventually(f.t, func() bool { return f.progress() >= n })
}

// finish ends the Run when all is delivered or kept.
func (f *flow) finish() {
	f.t.Helper()
	close(f.in)
	select {
	case err := <-f.ended:
		if err != nil || f.progress() != f.n {
			f.t.Fatalf("%d of %d events are delivered: %v", f.progress(), f.n, err)
		}
	case <-time.After(30 * time.Second):
		f.t.Fatalf("run goes on, with %d of %d events delivered", f.progress(), f.n)
	}
}

// letters returns the ids of what is kept, each with why.
func letters(d *sinktest.DeadLetters) (all []string) {
	for _, l := range d.Letters() {
		why := l.Reason
		if l.Retry {
			why += ", retry"
		}
		all = append(all, l.ID+" "+why)
	}
	return all
}

// TestHostileReceiverParks: whatever a receiver does, and whatever it never takes, each event is delivered or kept, those of a key in order.
func TestHostileReceiverParks(t *testing.T) {
	const events, window = 200, 60
	refused := map[int]int{0: 400, 1: 413, 2: 301, 3: 422, 4: 404}
	refuses := func(notes []note) int {
		for _, c := range notes {
			if c.N%20 == 17 && c.N <= events {
				return refused[c.N/20%5]
			}
		}
		return 0
	}
	for name, cfg := range map[string]Config{
		"binary":     {},
		"structured": {Format: Structured},
		"batch":      {Format: Batch, Batch: 8},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			random := rand.New(rand.NewPCG(seed, 0))
			dead := sinktest.NewDeadLetters(t, time.Millisecond)
			w := newWitness(t, window, max(1, cfg.Batch))
			w.dead = dead
			h := &hostility{t: t, w: w, random: rand.New(rand.NewPCG(seed, 1)), refuses: refuses}
			cfg := cfg
			cfg.URL, cfg.Window, cfg.Timeout, cfg.MaxBackoff = h.serve(t).URL+"/hook", window, 250*time.Millisecond, 20*time.Millisecond
			f := startFlow(t, cfg, dead)
			for range events / 20 {
				var keys []string
				for range 20 {
					key := ""
					if random.IntN(10) > 0 {
						key = fmt.Sprintf("key-%d", random.IntN(40))
					}
					keys = append(keys, key)
				}
				f.send(keys...)
			}
			for f.progress() < events { // a receiver has to take others meanwhile
				f.send(fmt.Sprintf("more-%d", f.n%5))
				time.Sleep(5 * time.Millisecond)
			}
			f.finish()
			w.complete(f.n)

			parked, queued, aside := 0, 0, 0
			kept := map[int]bool{}
			last := map[string]int{}
			for _, l := range dead.Letters() {
				n, err := strconv.Atoi(l.ID)
				if err != nil {
					t.Fatal(err)
				}
				kept[n] = true
				key := ""
				if l.Key != nil {
					key = *l.Key
				}
				switch {
				case l.Retry && l.Reason != sink.Queued:
					aside++
				case l.Reason == sink.Queued:
					queued++
				case refuses([]note{{N: n}}) == 0 && !strings.HasPrefix(l.Reason, "301 "): // which it answers at random, three times in a row now and then
					t.Errorf("event %d is parked for %s, %s", n, l.Reason, l.Detail)
				default:
					parked++
				}
				if key != "" && n < last[key] {
					t.Errorf("event %d of %s is kept behind event %d", n, key, last[key])
				}
				last[key] = n
			}
			for n := 17; n <= events; n += 20 {
				if !kept[n] || w.taken[n] {
					t.Errorf("event %d is kept %v, taken %v", n, kept[n], w.taken[n])
				}
			}
			t.Logf("%d events, %d acts of hostility, %d parked, %d set aside, %d behind them", f.n, h.acts, parked, aside, queued)
		})
	}
}

// TestPoison: an event that is rejected is parked upon its first answer, with those behind it, and nobody else notices.
func TestPoison(t *testing.T) {
	t.Parallel()
	const events, keys = 500, 20
	latencies := func(poison bool) []time.Duration {
		var mu sync.Mutex
		sent := map[int]time.Time{}
		var took []time.Duration
		asked := 0
		server := serve(t, func(rw http.ResponseWriter, r *http.Request) {
			notes, err := readNotes(r)
			if err != nil {
				t.Error(err)
			}
			mu.Lock()
			defer mu.Unlock()
			if strings.HasPrefix(notes[0].Key, "poison") {
				asked++
				rw.WriteHeader(400)
				_, _ = io.WriteString(rw, "no such \x00 thing")
				return
			}
			took = append(took, time.Since(sent[notes[0].N]))
		})
		dead := sinktest.NewDeadLetters(t, 5*time.Millisecond)
		f := startFlow(t, Config{URL: server.URL, Window: 5000}, dead)
		parked := 0
		for i := range events {
			now := time.Now()
			mu.Lock()
			sent[f.n+1] = now
			mu.Unlock()
			f.send(fmt.Sprintf("key-%d", i%keys))
			if poison && i%10 == 0 {
				parked++
				f.send(fmt.Sprintf("poison-%d", i/20)) // each of them comes twice
			}
			time.Sleep(time.Millisecond)
		}
		f.finish()
		mu.Lock()
		defer mu.Unlock()
		if got := dead.Letters(); len(got) != parked || asked != parked/2 {
			t.Errorf("%d of %d poisoned events are kept, after %d requests", len(got), parked, asked)
		} else if parked > 0 && (got[0].Reason != "400 Bad Request" || got[0].Detail != "no such \uFFFD thing" || got[0].Attempts != 1 || got[0].Retry ||
			got[0].FirstAt.IsZero() || got[0].LastAt != got[0].FirstAt) {
			t.Errorf("kept %+v", got[0])
		}
		slices.Sort(took)
		return took
	}
	at := func(d []time.Duration, percent int) time.Duration {
		return d[len(d)*percent/100].Round(10 * time.Microsecond)
	}
	without, with := latencies(false), latencies(true)
	t.Logf("half of them within %v, with poison %v; 99 percent within %v, with poison %v", at(without, 50), at(with, 50), at(without, 99), at(with, 99))
	if at(with, 50) > 5*at(without, 50)+5*time.Millisecond || at(with, 99) > 5*at(without, 99)+50*time.Millisecond {
		t.Error("poisoned events hold up others")
	}
}

// TestStuckKeysAreSetAside: a key that is not taken, and one that hangs, give way when the window is full, and are delivered later.
func TestStuckKeysAreSetAside(t *testing.T) {
	for name, cfg := range map[string]Config{
		"binary":     {},
		"structured": {Format: Structured, Timeout: 300 * time.Millisecond},
		"batch":      {Format: Batch, Batch: 10},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			const window = 100
			var mended atomic.Bool
			dead := sinktest.NewDeadLetters(t, time.Millisecond)
			w := newWitness(t, window, max(1, cfg.Batch))
			w.dead = dead
			var mu sync.Mutex
			var again []string
			server := serve(t, func(rw http.ResponseWriter, r *http.Request) {
				notes, err := readNotes(r)
				if err != nil {
					return
				}
				fails := slices.ContainsFunc(notes, func(n note) bool { return n.Key == "fails" })
				hangs := slices.ContainsFunc(notes, func(n note) bool { return n.Key == "hangs" })
				if mended.Load() {
					mu.Lock()
					defer mu.Unlock()
					for _, n := range notes {
						if n.Key == "fails" || n.Key == "hangs" {
							again = append(again, fmt.Sprintf("%s %d %s", n.Key, n.Of, r.Header.Get("Ebb-Origin")))
						}
					}
					return
				}
				w.arrive(notes, !fails && !hangs)
				switch {
				case hangs:
					<-r.Context().Done()
				case fails:
					rw.WriteHeader(500)
				}
			})
			cfg := cfg
			cfg.URL, cfg.Window, cfg.MaxBackoff = server.URL, window, 50*time.Millisecond
			f := startFlow(t, cfg, dead)
			keys := func() (all []string) {
				for i := range 30 {
					all = append(all, fmt.Sprintf("key-%d", i))
				}
				return append(all, "fails", "hangs", "", "")
			}
			start := time.Now()
			for range 6 {
				f.send(keys()...)
			}
			f.await(f.n)
			t.Logf("all are delivered or kept after %v", time.Since(start).Round(time.Millisecond))
			count := map[string]int{}
			for _, l := range dead.Letters() {
				if l.Key == nil || *l.Key != "fails" && *l.Key != "hangs" {
					t.Fatalf("event %s is kept for %s, %s", l.ID, l.Reason, l.Detail)
				}
				count[*l.Key]++
				switch n := count[*l.Key]; {
				case !l.Retry && l.Reason != sink.Queued:
					t.Errorf("event %s is kept for %s and not to be retried", l.ID, l.Reason)
				case n > 1 && l.Reason != sink.Queued, n == 1 && l.Attempts == 0, n == 1 && l.LastAt.Before(l.FirstAt):
					t.Errorf("event %d of %s is kept: %+v", n, *l.Key, l)
				case n == 1 && *l.Key == "fails" && l.Reason != "500 Internal Server Error", n == 1 && *l.Key == "hangs" && !strings.HasPrefix(l.Reason, "no answer"):
					t.Errorf("event %d of %s is kept for %s", n, *l.Key, l.Reason)
				}
			}
			if count["fails"] != 6 || count["hangs"] != 6 {
				t.Errorf("kept %v, want all six of each", count)
			}

			mended.Store(true)
			var want []string
			for _, key := range []string{"fails", "hangs"} {
				if got := dead.Retry(key, 1); got.Delivered != 1 || got.Failure != nil {
					t.Errorf("a retry of one: %+v, %+v", got, got.Failure)
				}
				if got := dead.Retry(key, 100); got.Delivered != 5 || got.Failure != nil {
					t.Errorf("a retry of five: %+v, %+v", got, got.Failure)
				}
				origin := ""
				if cfg.Format == Binary {
					origin = "retry"
				}
				for i := range 6 {
					want = append(want, fmt.Sprintf("%s %d %s", key, i+1, origin))
				}
			}
			f.send("fails", "hangs") // nothing is held any more
			f.finish()
			mu.Lock()
			defer mu.Unlock()
			rest := again[len(want):]
			slices.Sort(rest)
			if diff := cmp.Diff(append(want, "fails 7 ", "hangs 7 "), again); diff != "" {
				t.Errorf("delivered again (-want +got):\n%s", diff)
			}
		})
	}
}

// feed hands over batches of ten events, of so many keys, until it is told to stop.
func (f *flow) feed(stop <-chan struct{}, keys int) {
	for {
		b := event.NewBatch()
		for range 10 {
			b.Events = append(b.Events, noteEvent(b, f.note(fmt.Sprintf("key-%d", f.n%keys))))
		}
		select {
		case f.in <- b:
			f.fed.Store(int64(f.n))
		case <-stop:
			f.n -= 10
			return
		}
	}
}

// TestNothingIsSetAsideWhenDown: however a receiver fails as a whole, that is back-pressure: nothing is kept, and no more is read.
func TestNothingIsSetAsideWhenDown(t *testing.T) {
	const window = 100
	var down atomic.Bool
	type scenario struct {
		*flow
		name   string
		server *httptest.Server
	}
	var all []scenario
	var feeders sync.WaitGroup
	stop := make(chan struct{})
	for _, format := range []Format{Binary, Batch} {
		for name, fail := range map[string]func(http.ResponseWriter, *http.Request){
			"hangs":    func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
			"fails":    func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(503) },
			"drops":    func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) },
			"no token": func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(401) },
			"moved":    func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(301) },
		} {
			for _, keys := range []int{3, 50} {
				if format == Batch && keys == 3 {
					continue
				}
				server := serve(t, func(w http.ResponseWriter, r *http.Request) {
					_, _ = io.Copy(io.Discard, r.Body)
					if down.Load() {
						fail(w, r)
					}
				})
				cfg := Config{URL: server.URL, Window: window, Format: format, Batch: 5, MaxBackoff: 20 * time.Millisecond}
				f := startFlow(t, cfg, sinktest.NewDeadLetters(t, time.Millisecond))
				all = append(all, scenario{f, fmt.Sprintf("%s, %d keys, format %d", name, keys, format), server})
				feeders.Go(func() { f.feed(stop, keys) })
			}
		}
	}
	for _, s := range all {
		s.await(2 * window)
	}
	down.Store(true) // in the middle
	time.Sleep(2 * time.Second)
	for _, s := range all {
		before := s.progress()
		if fed := int(s.fed.Load()); fed < before+window-20 || fed > before+window+20 {
			t.Errorf("%s: %d events are read, and %d of them delivered, with a window of %d", s.name, fed, before, window)
		}
		if got := letters(s.dead); len(got) > 0 {
			t.Errorf("%s: kept %v", s.name, got)
		}
	}
	down.Store(false)
	for _, s := range all {
		s.server.CloseClientConnections() // one that still hung while others went on would be set aside
	}
	close(stop)
	feeders.Wait()
	for _, s := range all {
		s.finish()
		if got := letters(s.dead); len(got) > 0 {
			t.Errorf("%s: kept %v", s.name, got)
		}
	}
}

// TestWrongToken: a receiver that lets nobody in from the start makes nobody's events dead letters.
func TestWrongToken(t *testing.T) {
	for _, status := range []int{301, 401, 403, 404, 405, 407} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			t.Parallel()
			var requests atomic.Int32
			server := serve(t, func(w http.ResponseWriter, _ *http.Request) {
				if requests.Add(1) < 60 {
					w.WriteHeader(status)
				}
			})
			dead := sinktest.NewDeadLetters(t, time.Millisecond)
			f := startFlow(t, Config{URL: server.URL, MaxBackoff: 5 * time.Millisecond}, dead)
			for i := range 30 {
				f.send(fmt.Sprintf("key-%d", i), "")
			}
			f.finish()
			if got := letters(dead); len(got) > 0 || requests.Load() < 60 {
				t.Errorf("kept %v after %d requests", got, requests.Load())
			}
		})
	}
}

// TestRejectionOfOne: the same answers for one key alone are about that one, in whatever format.
func TestRejectionOfOne(t *testing.T) {
	for _, format := range []Format{Binary, Structured, Batch} {
		for _, status := range []int{302, 401, 403, 404, 405, 407} {
			t.Run(fmt.Sprintf("%d, %d", format, status), func(t *testing.T) {
				t.Parallel()
				server := serve(t, func(w http.ResponseWriter, r *http.Request) {
					notes, err := readNotes(r)
					if err != nil {
						t.Error(err)
					}
					if slices.ContainsFunc(notes, func(n note) bool { return n.Key == "gone" }) {
						w.WriteHeader(status)
					}
				})
				dead := sinktest.NewDeadLetters(t, time.Millisecond)
				f := startFlow(t, Config{URL: server.URL, Format: format, MaxBackoff: 5 * time.Millisecond}, dead)
				f.send("a", "gone", "b", "gone")
				eventually(t, func() bool {
					f.send("c", "d")
					time.Sleep(time.Millisecond)
					return len(dead.Letters()) > 0
				})
				f.send("gone")
				f.finish()
				reason := fmt.Sprintf("%d %s", status, http.StatusText(status))
				if diff := cmp.Diff([]string{"2 " + reason, "4 queued"}, letters(dead)[:2]); diff != "" || len(dead.Letters()) != 3 {
					t.Errorf("kept (-want +got):\n%s\n%v", diff, letters(dead))
				}
				if l := dead.Letters()[0]; l.Attempts < patience {
					t.Errorf("parked after %d attempts", l.Attempts)
				}
			})
		}
	}
}

// TestRetry: each is tried once, in order, up to the first one that fails.
func TestRetry(t *testing.T) {
	for _, format := range []Format{Binary, Structured, Batch} {
		t.Run(fmt.Sprint(format), func(t *testing.T) {
			t.Parallel()
			var mu sync.Mutex
			answer := map[int]int{1: 400}
			var got []int
			requests := 0
			server := serve(t, func(w http.ResponseWriter, r *http.Request) {
				notes, err := readNotes(r)
				if err != nil {
					t.Error(err)
				}
				mu.Lock()
				defer mu.Unlock()
				requests++
				for _, n := range notes {
					if status := answer[n.N]; status != 0 {
						w.Header().Set("Retry-After", "7")
						w.WriteHeader(status)
						_, _ = io.WriteString(w, "because")
						return
					}
				}
				for _, n := range notes {
					got = append(got, n.N)
				}
			})
			dead := sinktest.NewDeadLetters(t, time.Millisecond)
			f := startFlow(t, Config{URL: server.URL, Format: format}, dead)
			f.send(slices.Repeat([]string{"k"}, 20)...)
			f.await(20)
			f.send("other")
			f.await(21)
			now := func(answers map[int]int) {
				mu.Lock()
				defer mu.Unlock()
				answer, got, requests = answers, nil, 0
			}
			try := func(answers map[int]int, delivered int, want *sink.Failure) {
				t.Helper()
				now(answers)
				r := dead.Retry("k", 100)
				if diff := cmp.Diff(want, r.Failure); r.Delivered != delivered || diff != "" {
					t.Errorf("delivered %d, want %d; failure (-want +got):\n%s", r.Delivered, delivered, diff)
				}
			}
			second := 7 * time.Second
			try(map[int]int{1: 503}, 0, &sink.Failure{Reason: "503 Service Unavailable", Detail: "because", Attempts: 1, After: second})
			try(map[int]int{1: 404}, 0, &sink.Failure{Reason: "404 Not Found", Detail: "because", Attempts: 1, After: second}) // it may be all
			f.send("other")
			f.await(22)
			attempts := 1
			if format == Batch {
				attempts = 5 // in a batch of 20, of 10, of 5, of 2 and alone
			}
			try(map[int]int{1: 422}, 0, &sink.Failure{Rejected: true, Reason: "422 Unprocessable Entity", Detail: "because", Attempts: attempts, After: second})
			mu.Lock()
			if format == Batch && requests != attempts || format != Batch && requests != 1 {
				t.Errorf("%d requests", requests)
			}
			mu.Unlock()
			f.send("other")
			f.await(23)
			if r := dead.Retry("k", 1); r.Delivered != 0 || r.Failure == nil {
				t.Errorf("%+v, %+v", r, r.Failure)
			}
			// Of those that are behind one another, the ones before it are delivered.
			now(map[int]int{8: 410})
			r := dead.Retry("k", 100)
			mu.Lock()
			if r.Delivered != 7 || r.Failure == nil || !r.Failure.Rejected || r.Failure.Reason != "410 Gone" || !slices.Equal(got, []int{1, 2, 3, 4, 5, 6, 7}) {
				t.Errorf("delivered %d, received %v, %+v", r.Delivered, got, r.Failure)
			}
			mu.Unlock()
			try(nil, 13, nil)
			mu.Lock()
			if want := []int{8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20}; !slices.Equal(got, want) || format == Batch && requests != 1 {
				t.Errorf("received %v in %d requests", got, requests)
			}
			mu.Unlock()
			f.finish()
		})
	}
}

// TestRetryEndsWithRun: a retry does not outlive its Run, and says what came of it.
func TestRetryEndsWithRun(t *testing.T) {
	for name, end := range map[string]func(*flow){
		"closed":    func(f *flow) { close(f.in) },
		"cancelled": func(f *flow) { f.stop() },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			arrived := make(chan struct{})
			server := serve(t, func(w http.ResponseWriter, r *http.Request) {
				notes, err := readNotes(r)
				switch {
				case err != nil:
				case r.Header.Get("Ebb-Origin") == "":
					w.WriteHeader(400)
				case notes[0].N == 3:
					close(arrived)
					<-r.Context().Done()
				}
			})
			dead := sinktest.NewDeadLetters(t, time.Millisecond)
			f := startFlow(t, Config{URL: server.URL}, dead)
			f.send("k", "k", "k", "k")
			f.await(4)
			ended := dead.Hand("k", 10)
			<-arrived
			end(f)
			err := <-f.ended
			if (err == nil) != (name == "closed") {
				t.Errorf("run: %v", err)
			}
			select {
			case r := <-ended:
				if r.Delivered != 2 || r.Failure != nil {
					t.Errorf("%+v, %+v", r, r.Failure)
				}
			default:
				t.Error("the Run has ended, and the retry has not")
			}
		})
	}
}

// TestBlock: where nothing is to be parked, what is rejected and what is stuck hold up their keys, and retries go on.
func TestBlock(t *testing.T) {
	t.Parallel()
	var mended atomic.Bool
	server := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if id := r.Header.Get("Ce-Id"); (id == "1" || id == "2") && !mended.Load() {
			w.WriteHeader(400)
		}
	})
	dead := sinktest.NewDeadLetters(t, time.Millisecond)
	dead.Park([]sink.Letter{{Event: &event.Event{ID: []byte("0"), Topic: []byte("t"), Key: []byte("held")}, Reason: "x"}}, func() {})
	s := open(t, Config{URL: server.URL, Window: 10, MaxBackoff: 5 * time.Millisecond})
	in := make(chan *event.Batch, 1)
	ended := make(chan error, 1)
	var delivered atomic.Int32
	go func() {
		ended <- s.Run(context.Background(), in, sink.Outcome{Dead: dead, Block: true, Delivered: func(p sink.Progress) { delivered.Add(int32(p.Events)) }})
	}()
	b := event.NewBatch()
	for i, key := range []string{"a", "b", "c", "held", "c", "c", "c", "c", "c", "c", "c", "c"} {
		b.Events = append(b.Events, noteEvent(b, note{N: i + 1, Key: key, Of: 1}))
	}
	in <- b
	dead.Await("what is held is kept", func(all []sinktest.Letter) bool { return len(all) == 2 && all[1].Committed })
	time.Sleep(minStuck + 200*time.Millisecond)
	if got := letters(dead); delivered.Load() > 0 || len(got) != 2 {
		t.Errorf("%d events delivered, kept %v", delivered.Load(), got)
	}
	if r := dead.Retry("held", 10); r.Delivered != 2 {
		t.Errorf("%+v, %+v", r, r.Failure)
	}
	mended.Store(true)
	close(in)
	if err := <-ended; err != nil || delivered.Load() != 12 {
		t.Errorf("%d events delivered: %v", delivered.Load(), err)
	}
}

// TestMemory: behind a key that is stuck, or a receiver that is away, a trickle takes what its events take, and not what its batches do.
func TestMemory(t *testing.T) {
	const window = 3000
	for name, format := range map[string]Format{"binary": Binary, "structured": Structured} {
		t.Run(name, func(t *testing.T) {
			server := serve(t, func(w http.ResponseWriter, r *http.Request) {
				body, _ := io.ReadAll(r.Body)
				if bytes.Contains(body, []byte("stuck")) {
					w.WriteHeader(500)
				}
			})
			s := open(t, Config{URL: server.URL, Window: window, Format: format})
			in := make(chan *event.Batch)
			ctx, cancel := context.WithCancel(context.Background())
			ended := make(chan error, 1)
			go func() { ended <- s.Run(ctx, in, sink.Outcome{Delivered: func(sink.Progress) { t.Error("delivered") }}) }()
			before := heapSize()
			for i := range window {
				b := event.NewBatch()
				key := fmt.Sprintf("key-%d", i)
				if i == 0 {
					key = "stuck"
				}
				b.Events = append(b.Events, noteEvent(b, note{N: i + 1, Key: key, Of: 1}))
				in <- b
			}
			if grown := int64(heapSize()) - int64(before); grown > 8<<20 {
				t.Errorf("%d events take %d KB", window, grown>>10)
			} else {
				t.Logf("%d events take %d KB", window, grown>>10)
			}
			cancel()
			if err := <-ended; !errors.Is(err, context.Canceled) {
				t.Errorf("run: %v", err)
			}
		})
	}
}

func heapSize() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}
