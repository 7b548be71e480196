package main

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// stuckKey is the key that is answered with 500.
const stuckKey = "stuck"

// receiver is the other side. The payload of an event is the number that it has among those of its key, and the time at which it was put.
type receiver struct {
	*httptest.Server
	delay time.Duration

	mu        sync.Mutex
	broken    bool
	taken     int
	next      map[string]int // the number that a key's next event has
	twice     int
	latencies []time.Duration // of the events of other keys
	err       error
	changed   chan struct{}
}

func newReceiver(delay time.Duration) *receiver {
	r := &receiver{delay: delay, next: map[string]int{}, changed: make(chan struct{}, 1)}
	r.Server = httptest.NewServer(r)
	return r
}

func (r *receiver) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	body, err := io.ReadAll(req.Body)
	if err != nil {
		return // of a bridge that is stopped
	}
	time.Sleep(r.delay)
	if code := r.take(req.Header.Get("Ce-Subject"), string(body)); code != 0 {
		w.WriteHeader(code)
	}
}

// take takes an event, or returns the status of the answer that says that it is not taken.
func (r *receiver) take(key, body string) int {
	r.mu.Lock()
	defer r.mu.Unlock()
	if key == stuckKey && r.broken {
		return http.StatusInternalServerError
	}
	number, micros, ok := strings.Cut(strings.Trim(body, `"`), " ")
	n, err := strconv.Atoi(number)
	at, timeErr := strconv.ParseInt(micros, 10, 64)
	switch {
	case !ok || err != nil || timeErr != nil:
		r.fail(fmt.Errorf("a payload is %s", body))
	case n < r.next[key]:
		r.twice++
	case n > r.next[key]:
		r.fail(fmt.Errorf("event %d of %s arrives where event %d was to", n, key, r.next[key]))
	default:
		r.next[key]++
		r.taken++
		if key != stuckKey {
			r.latencies = append(r.latencies, time.Since(time.UnixMicro(at)))
		}
	}
	select {
	case r.changed <- struct{}{}:
	default:
	}
	return 0
}

func (r *receiver) fail(err error) {
	if r.err == nil {
		r.err = err
	}
}

func (r *receiver) breakKey(broken bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.broken = broken
}

// quantiles returns those of the latencies since it was last called, and how many they were.
func (r *receiver) quantiles(q ...float64) ([]time.Duration, int) {
	r.mu.Lock()
	latencies := r.latencies
	r.latencies = nil
	r.mu.Unlock()
	out := make([]time.Duration, len(q))
	if len(latencies) == 0 {
		return out, 0
	}
	slices.Sort(latencies)
	for i, q := range q {
		out[i] = latencies[int(q*float64(len(latencies)-1))]
	}
	return out, len(latencies)
}

// count returns how many events have arrived, each once, and the first thing that was wrong.
func (r *receiver) count() (taken, twice int, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.taken, r.twice, r.err
}
