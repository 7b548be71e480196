package main

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"ebb/internal/pgtest"
)

// TestHTTPKills: a bridge that is killed time and again delivers everything, each key in order, under ids that stay the same, and sends again
// no more than what was within the window, or what Postgres had yet to hear of.
func TestHTTPKills(t *testing.T) {
	const events, window, kills = 3000, 100, 6
	type arrival struct {
		id, key, body string
	}
	var mu sync.Mutex
	var arrivals []arrival
	receiver := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			return // of a bridge that was killed
		}
		time.Sleep(time.Duration(rand.IntN(3)) * time.Millisecond)
		mu.Lock()
		defer mu.Unlock()
		if r.Header.Get("webhook-id") != r.Header.Get("ce-id") {
			t.Errorf("webhook-id %q of event %q", r.Header.Get("webhook-id"), r.Header.Get("ce-id"))
		}
		arrivals = append(arrivals, arrival{r.Header.Get("ce-id"), r.Header.Get("ce-subject"), string(body)})
	}))
	defer receiver.Close()
	count := func() int {
		mu.Lock()
		defer mu.Unlock()
		return len(arrivals)
	}
	s := newSite(t, pgtest.New(t), receiver.URL, fmt.Sprintf("http: {window: %d}", window))
	s.setup(t)
	s.db.Exec(t, fmt.Sprintf(`DO $$BEGIN FOR n IN 1..%d LOOP
		PERFORM ebb.put('t', json_build_object('n', n), CASE WHEN n %% 10 > 0 THEN 'key-' || n %% 17 END); IF n %% 3 = 0 THEN COMMIT; END IF; END LOOP; END$$`, events))
	ids := s.ids(t)
	var starts []int // how many arrivals there were when a bridge was started again
	for range kills {
		bridge := s.streaming(t)
		want := count() + 100 + rand.IntN(300)
		pgtest.Eventually(t, 30*time.Second, func() (bool, string) { return count() >= want, fmt.Sprintf("%d arrivals", count()) })
		bridge.kill()
		// What it sent may still be on its way.
		for before := -1; before != count(); time.Sleep(50 * time.Millisecond) {
			before = count()
		}
		starts = append(starts, count())
	}
	bridge := s.streaming(t)
	s.confirms(t, 60*time.Second)
	bridge.stop(t)

	mu.Lock()
	defer mu.Unlock()
	number := map[string]int{}
	for i, id := range ids {
		number[id] = i
	}
	bodies, last := map[string]string{}, map[string]int{}
	oldest, twice := 0, 0
	for i, a := range arrivals {
		n, ok := number[a.id]
		if !ok {
			t.Fatalf("received event %q, which is none", a.id)
		}
		if slices.Contains(starts, i) && n < oldest-window-unheard {
			t.Errorf("event %d is sent again although all up to %d were delivered", n, oldest)
		}
		if n >= oldest+window {
			t.Errorf("event %d is sent although event %d is not delivered, with a window of %d", n, oldest, window)
		}
		if body, ok := bodies[a.id]; ok {
			twice++
			if body != a.body {
				t.Errorf("event %s is %s and then %s", a.id, body, a.body)
			}
		} else if a.key != "" {
			if before, ok := last[a.key]; ok && before > n {
				t.Errorf("event %d of %s arrives after event %d", n, a.key, before)
			}
			last[a.key] = n
		}
		bodies[a.id] = a.body
		for oldest < len(ids) && bodies[ids[oldest]] != "" {
			oldest++
		}
	}
	if oldest != events {
		t.Errorf("received all up to %d of %d", oldest, events)
	}
	t.Logf("%d events, %d sent again after %d kills", events, twice, kills)
	if most := kills * (window + unheard/3); twice > most { // not every kill comes at such a moment
		t.Errorf("%d events were sent again after %d kills, want %d at most", twice, kills, most)
	}
}

// TestHTTPFormats: the formats, signatures and limits of the configuration file reach the receiver.
func TestHTTPFormats(t *testing.T) {
	for format, want := range map[string]string{
		"cloudevents": "application/json",
		"structured":  "application/cloudevents+json; charset=utf-8",
		"batch":       "application/cloudevents-batch+json; charset=utf-8",
	} {
		t.Run(format, func(t *testing.T) {
			headers := make(chan http.Header, 10)
			receiver := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { headers <- r.Header }))
			defer receiver.Close()
			s := newSite(t, pgtest.New(t), receiver.URL,
				"http: {format: "+format+", gzip: true, secrets: [whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw]}")
			s.setup(t)
			bridge := s.streaming(t)
			id := s.put(t, 1)
			select {
			case h := <-headers:
				if h.Get("Content-Type") != want || h.Get("Content-Encoding") != "gzip" || h.Get("webhook-id") != id || len(h.Get("webhook-signature")) < 40 {
					t.Errorf("header %v", h)
				}
				if at, err := strconv.ParseInt(h.Get("webhook-timestamp"), 10, 64); err != nil || time.Since(time.Unix(at, 0)).Abs() > time.Minute {
					t.Errorf("webhook-timestamp %q", h.Get("webhook-timestamp"))
				}
			case <-time.After(20 * time.Second):
				t.Fatal("nothing arrives")
			}
			bridge.stop(t)
		})
	}
}
