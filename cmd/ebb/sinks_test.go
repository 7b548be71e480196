package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"

	"ebb/event"
	"ebb/internal/pgtest"
)

func TestStdoutSink(t *testing.T) {
	s := newSite(t, pgtest.New(t), "stdout")
	s.setup(t)
	bridge := s.streaming(t)
	s.db.Exec(t, `SELECT ebb.put('a.b', '{"n": 1}', 'the key', '{"traceparent": "00-1-2-3"}')`,
		`BEGIN; SELECT ebb.put('a.b', '[ 2 ]'); SELECT ebb.put('c', '"line\nbreak \u2028"'); COMMIT`,
		"INSERT INTO ebb.buffer (topic, payload) SELECT 'many', to_json(n) FROM generate_series(1, 5000) n")
	ids := s.ids(t)
	pgtest.Eventually(t, 30*time.Second, func() (bool, string) {
		n := strings.Count(bridge.stdout.String(), "\n")
		return n >= len(ids), fmt.Sprintf("%d of %d lines", n, len(ids))
	})
	s.confirms(t, 40*time.Second)
	bridge.stop(t)

	type line struct {
		SpecVersion  string          `json:"specversion"`
		ID           string          `json:"id"`
		Source       string          `json:"source"`
		Type         string          `json:"type"`
		Subject      *string         `json:"subject"`
		Time         time.Time       `json:"time"`
		ContentType  string          `json:"datacontenttype"`
		Position     event.Position  `json:"ebbposition"`
		TraceParent  string          `json:"traceparent"`
		Data         json.RawMessage `json:"data"`
		decodedAsAny map[string]any
	}
	var lines []line
	var last event.Position
	var got []string
	scanner := bufio.NewScanner(strings.NewReader(bridge.stdout.String()))
	for scanner.Scan() {
		l := line{decodedAsAny: map[string]any{}}
		if err := json.Unmarshal(scanner.Bytes(), &l); err != nil {
			t.Fatalf("%q: %v", scanner.Text(), err)
		}
		if err := json.Unmarshal(scanner.Bytes(), &l.decodedAsAny); err != nil {
			t.Fatal(err)
		}
		if l.SpecVersion != "1.0" || l.Source != "ebb" || l.ContentType != "application/json" || time.Since(l.Time).Abs() > time.Minute {
			t.Fatalf("%s", scanner.Text())
		}
		if l.Position.Compare(last) <= 0 {
			t.Fatalf("%s after %s", l.Position, last)
		}
		last = l.Position
		for _, key := range []string{"ebbreplay", "ebborigin"} {
			if _, ok := l.decodedAsAny[key]; ok {
				t.Fatalf("%s does not apply: %s", key, scanner.Text())
			}
		}
		got = append(got, l.ID)
		lines = append(lines, l)
	}
	equalIDs(t, "stdout", got, ids)
	if l := lines[0]; l.Type != "a.b" || l.Subject == nil || *l.Subject != "the key" || string(l.Data) != `{"n": 1}` && string(l.Data) != `{"n":1}` || l.TraceParent != "00-1-2-3" {
		t.Errorf("the first line is %v", l.decodedAsAny)
	}
	if l := lines[1]; l.Subject != nil || l.Position.Index != 1 || l.Position.Compare(lines[2].Position) >= 0 || lines[2].Position.Commit != l.Position.Commit {
		t.Errorf("the second and the third line are %v and %v", l.decodedAsAny, lines[2].decodedAsAny)
	}
	if l := lines[2]; l.decodedAsAny["data"] != "line\nbreak \u2028" {
		t.Errorf("the third line is %v", l.decodedAsAny)
	}

	// What a run has delivered, the next one does not repeat.
	id := s.put(t, 7)
	bridge = s.streaming(t)
	pgtest.Eventually(t, 30*time.Second, func() (bool, string) {
		return strings.Contains(bridge.stdout.String(), "\n"), "no line"
	})
	bridge.stop(t)
	var l line
	if err := json.Unmarshal([]byte(bridge.stdout.String()), &l); err != nil || l.ID != id {
		t.Errorf("the second run printed %s (%v), want event %s alone", bridge.stdout.String(), err, id)
	}
}

// TestStdoutWithoutReader: a pipe that was closed ends the bridge, and what nobody took stays in the buffer.
func TestStdoutWithoutReader(t *testing.T) {
	s := newSite(t, pgtest.New(t), "stdout")
	s.setup(t)
	read, write := io.Pipe()
	read.Close()
	bridge := start(t, func(cmd *exec.Cmd) { cmd.Stdout = write }, s.args("run")...)
	bridge.logs(t, 20*time.Second, "msg=streaming")
	before := s.confirmed(t)
	s.db.Exec(t, "INSERT INTO ebb.buffer (topic, payload) SELECT 'many', to_json(n) FROM generate_series(1, 20000) n")
	s.db.Exec(t, "INSERT INTO ebb.buffer (topic, payload) SELECT 'many', to_json(n) FROM generate_series(1, 20000) n")
	if code := bridge.ended(t, 30*time.Second); code != exitFailed && code != -1 { // -1: SIGPIPE
		t.Errorf("exit code %d", code)
	}
	if got := s.confirmed(t); got < before {
		t.Errorf("confirmed went back from %s to %s", before, got)
	}
	bridge = s.streaming(t)
	pgtest.Eventually(t, 30*time.Second, func() (bool, string) {
		n := strings.Count(bridge.stdout.String(), "\n")
		return n >= 20000, fmt.Sprintf("%d lines", n)
	})
	bridge.stop(t)
}

func TestHTTPSink(t *testing.T) {
	type request struct {
		header http.Header
		body   string
		method string
	}
	var mu sync.Mutex
	var accepted []request
	attempts := map[string]int{}
	receiver := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			t.Error(err)
		}
		mu.Lock()
		defer mu.Unlock()
		id := r.Header.Get("ce-id")
		attempts[id]++
		if attempts[id] <= 2 && (len(accepted) == 0 || len(accepted) == 3) { // the first and the fourth event
			w.WriteHeader(http.StatusInternalServerError)
			return
		}
		accepted = append(accepted, request{r.Header.Clone(), string(body), r.Method})
		w.WriteHeader(http.StatusNoContent)
	}))
	defer receiver.Close()

	s := newSite(t, pgtest.New(t), receiver.URL+"/hook")
	s.setup(t)
	bridge := s.streaming(t)
	s.db.Exec(t, `SELECT ebb.put('t/ü', '{"n":  1}', 'clé "1"', '{"traceparent": "00-1-2-3"}')`)
	for n := 2; n <= 20; n++ { // of one key, so in order
		s.db.Exec(t, fmt.Sprintf(`SELECT ebb.put('numbers', '{"n": %d}', 'clé "1"')`, n))
	}
	ids := s.ids(t)
	pgtest.Eventually(t, 30*time.Second, func() (bool, string) {
		mu.Lock()
		defer mu.Unlock()
		return len(accepted) >= len(ids), fmt.Sprintf("%d of %d events", len(accepted), len(ids))
	})
	s.confirms(t, 40*time.Second)
	bridge.stop(t)

	mu.Lock()
	defer mu.Unlock()
	var got []string
	for _, r := range accepted {
		got = append(got, r.header.Get("ce-id"))
	}
	equalIDs(t, "the receiver", got, ids)
	for i, id := range ids {
		if want := map[bool]int{true: 3, false: 1}[i == 0 || i == 3]; attempts[id] != want {
			t.Errorf("event %s was sent %d times, want %d", id, attempts[id], want)
		}
	}
	first := accepted[0]
	for name, want := range map[string]string{
		"ce-specversion": "1.0", "ce-source": "ebb", "ce-type": "t/%C3%BC", "ce-subject": "cl%C3%A9%20%221%22", "content-type": "application/json",
		"traceparent": "00-1-2-3",
	} {
		if got := first.header.Get(name); got != want {
			t.Errorf("header %s is %q, want %q", name, got, want)
		}
	}
	if _, err := event.ParsePosition(first.header.Get("Ebb-Position")); err != nil {
		t.Errorf("%v in %v", err, first.header)
	}
	if first.body != `{"n":  1}` || first.method != http.MethodPost {
		t.Errorf("%s %s", first.method, first.body)
	}
	if !strings.Contains(bridge.stderr.String(), "500") {
		t.Errorf("the log says nothing of the 500s: %s", bridge.stderr.String())
	}
}

// TestHTTPReceiverThatHangs: the drain has an end, and a second signal ends it at once.
func TestHTTPReceiverThatHangs(t *testing.T) {
	t.Parallel() // it waits more than it works
	release := make(chan struct{})
	called := make(chan struct{}, 100)
	receiver := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		called <- struct{}{}
		select {
		case <-release:
		case <-r.Context().Done():
		}
	}))
	defer receiver.Close()
	defer close(release)
	s := newSite(t, pgtest.New(t), receiver.URL)
	s.setup(t)
	bridge := s.streaming(t)
	witness := s.witness(t)
	s.put(t, 1)
	awaitCall(t, called)
	bridge.endsBySecondSignal(t)

	bridge = s.run(t)
	awaitCall(t, called)
	bridge.stop(t) // within the ten seconds that container engines give
	if !strings.Contains(bridge.stderr.String(), "had not delivered 1 events") {
		t.Errorf("does not say that something is left: %s", bridge.stderr.String())
	}
	// What others wrote before the event may be confirmed, the event may not.
	if got, end := s.confirmed(t), witness.transactions(t)[0].end; got >= end {
		t.Errorf("confirmed %s, past the undelivered event's end %s", got, end)
	}
}

func awaitCall(t *testing.T, called <-chan struct{}) {
	t.Helper()
	select {
	case <-called:
	case <-time.After(20 * time.Second):
		t.Fatal("the receiver is not called")
	}
}
