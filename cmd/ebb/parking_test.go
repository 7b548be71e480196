package main

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	natsd "github.com/nats-io/nats-server/v2/server"

	"ebb/internal/natstest"
	"ebb/internal/pgtest"
)

// letter is what ebb dead prints of an event as JSON.
type letter struct {
	EventID  string          `json:"event_id"`
	Key      *string         `json:"key"`
	Payload  json.RawMessage `json:"payload"`
	Reason   string          `json:"reason"`
	Attempts int             `json:"attempts"`
	State    string          `json:"state"`
	Fault    string          `json:"fault"`
}

// letters returns what ebb dead list prints.
func (s *site) letters(t *testing.T, args ...string) []letter {
	t.Helper()
	out := s.ebb(t, append([]string{"dead", "list", "--json"}, args...)...).must(t).stdout
	var all []letter
	for d := json.NewDecoder(strings.NewReader(out)); ; {
		var l letter
		switch err := d.Decode(&l); err {
		case nil:
			all = append(all, l)
		case io.EOF:
			return all
		default:
			t.Fatalf("%q: %v", out, err)
		}
	}
}

// awaitLetters waits until so many events are in one of the states.
func (s *site) awaitLetters(t *testing.T, n int, states string) {
	t.Helper()
	pgtest.Eventually(t, 30*time.Second, func() (bool, string) {
		got := pgtest.Value[int](t, s.db, "SELECT count(*)::int FROM ebb.dead_letter WHERE state IN ("+states+")")
		return got == n, fmt.Sprintf("%d events are %s, want %d", got, states, n)
	})
}

// judge is a receiver of events that answers as it is told, and knows what it has taken.
type judge struct {
	*httptest.Server
	mu     sync.Mutex
	answer func(id, key string) int
	taken  []string
	keyOf  map[string]string
	asked  map[string]int
}

func newJudge(t *testing.T, answer func(id, key string) int) *judge {
	j := &judge{answer: answer, keyOf: map[string]string{}, asked: map[string]int{}}
	j.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.ReadAll(r.Body); err != nil {
			return // of a bridge that was killed
		}
		id, key := r.Header.Get("ce-id"), r.Header.Get("ce-subject")
		j.mu.Lock()
		defer j.mu.Unlock()
		j.asked[id]++
		if code := j.answer(id, key); code/100 != 2 {
			http.Error(w, "the judge says no", code)
			return
		}
		j.taken = append(j.taken, id)
		j.keyOf[id] = key
	}))
	t.Cleanup(j.Close)
	return j
}

func (j *judge) answers(answer func(id, key string) int) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.answer = answer
}

// count returns how often an event was taken.
func (j *judge) count() int {
	j.mu.Lock()
	defer j.mu.Unlock()
	return len(j.taken)
}

// unheard is how many events may be taken in the time that Postgres takes to hear of it on a busy machine.
const unheard = 150

// againAfter fails the test if after one of the starts, which are counts, more events were taken again than the window has, or if one was taken twice
// between two of them.
func (j *judge) againAfter(t *testing.T, starts []int, window int) {
	t.Helper()
	j.mu.Lock()
	defer j.mu.Unlock()
	before, total := map[string]bool{}, 0
	for i, from := range append([]int{0}, starts...) {
		to := len(j.taken)
		if i < len(starts) {
			to = starts[i]
		}
		now, again := map[string]bool{}, 0
		for _, id := range j.taken[from:to] {
			if now[id] {
				t.Errorf("event %s was taken twice after start %d", id, i)
			}
			if now[id] = true; before[id] {
				again++
			}
		}
		if again > window+unheard {
			t.Errorf("%d events were taken again after start %d, with a window of %d", again, i, window)
		}
		maps.Copy(before, now)
		total += again
	}
	t.Logf("%d of %d events were taken again after %d kills", total, len(before), len(starts))
}

// ids returns what was taken, each once, in the order in which it first was.
func (j *judge) ids() []string {
	j.mu.Lock()
	defer j.mu.Unlock()
	seen := map[string]bool{}
	var ids []string
	for _, id := range j.taken {
		if !seen[id] {
			ids = append(ids, id)
		}
		seen[id] = true
	}
	return ids
}

// ordered fails the test unless the events of each key were first taken in the order of their ids, which are numbers.
func (j *judge) ordered(t *testing.T) {
	t.Helper()
	last := map[string]int{}
	for _, id := range j.ids() {
		n, err := strconv.Atoi(id)
		if err != nil {
			t.Fatal(err)
		}
		if key := j.keyOf[id]; key != "" {
			if n < last[key] {
				t.Errorf("event %d of %s was taken after event %d", n, key, last[key])
			}
			last[key] = n
		}
	}
}

func all(code int) func(string, string) int { return func(string, string) int { return code } }

// TestPoisonIsParked: an event that the receiver does not want is set aside on its first answer, its key queues up behind it, and everybody else goes on,
// over a restart as well; retried, all of it arrives in order.
func TestPoisonIsParked(t *testing.T) {
	j := newJudge(t, all(200))
	s := newSite(t, pgtest.New(t), j.URL)
	s.setup(t)
	s.db.Exec(t, `SELECT ebb.put('t', json_build_object('n', n), 'key-' || n % 4) FROM generate_series(0, 19) n`)
	ids := s.ids(t)
	poison := ids[4] // of key-0, whose first one is fine
	j.answers(func(id, _ string) int {
		if id == poison {
			return http.StatusUnprocessableEntity
		}
		return 200
	})
	bridge := s.streaming(t)
	s.awaitLetters(t, 4, "'parked'")
	s.confirms(t, 40*time.Second)
	if got := len(j.ids()); got != 16 {
		t.Errorf("%d events were taken, want 16", got)
	}
	if j.asked[poison] != 1 {
		t.Errorf("the poisoned event was sent %d times", j.asked[poison])
	}
	letters := s.letters(t)
	heads := slices.DeleteFunc(slices.Clone(letters), func(l letter) bool { return l.Reason == "queued" })
	if len(letters) != 4 || len(heads) != 1 || heads[0].EventID != poison || heads[0].Attempts != 1 || heads[0].State != "parked" || !strings.Contains(heads[0].Reason, "422") ||
		string(heads[0].Payload) != `{"n":4}` {
		t.Errorf("set aside: %+v", heads)
	}
	if n := s.statusJSON(t, 0)["dead_letters"]; n != 4.0 {
		t.Errorf("status counts %v", n)
	}

	bridge.stop(t)
	bridge = s.streaming(t)
	s.db.Exec(t, `SELECT ebb.put('t', json_build_object('n', n), 'key-' || n % 4) FROM generate_series(20, 27) n`)
	s.awaitLetters(t, 6, "'parked'")
	s.confirms(t, 40*time.Second)
	ids = s.ids(t)

	if r := s.ebb(t, "dead", "retry", poison); r.code != exitFailed || !strings.Contains(r.stdout, "422") {
		t.Errorf("exit code %d, and %q", r.code, r.stdout)
	}
	s.awaitLetters(t, 6, "'parked'")
	j.answers(all(200))
	s.ebb(t, "dead", "retry", "--key", "key-0").must(t)
	s.awaitLetters(t, 6, "'delivered'")
	s.db.Exec(t, `SELECT ebb.put('t', '{}', 'key-0')`)
	pgtest.Eventually(t, 30*time.Second, func() (bool, string) {
		n := len(j.ids())
		return n == len(ids)+1, fmt.Sprintf("%d of %d events were taken", n, len(ids)+1)
	})
	bridge.stop(t)
	j.ordered(t)
	if n := len(s.letters(t)); n != 0 {
		t.Errorf("%d events are left", n)
	}
}

// TestRowsWithoutAnEventAreParked: a row of a table of one's own that lacks what an event needs, and that nobody can change in the log any more, is set
// aside, with its key behind it. Mended in the dead letters, it is delivered.
func TestRowsWithoutAnEventAreParked(t *testing.T) {
	j := newJudge(t, all(200))
	db := pgtest.New(t)
	db.Exec(t, "CREATE TABLE loose (n serial PRIMARY KEY, id text, topic text, key text, doc jsonb, extra jsonb, done timestamptz)")
	s := newSite(t, db, j.URL, "replay: {window: 1h}", "buffers:", "  - table: ebb.buffer", "  - {table: loose, id: id, topic: topic, key: key, payload: doc, headers: extra, delivered: mark, recorded: done}")
	s.setup(t)
	db.Exec(t, `INSERT INTO loose (id, topic, key, doc, extra) VALUES ('a', 't', 'k1', '1', '{"h": "v"}'), (NULL, 't', NULL, '2', NULL), ('c', NULL, 'k1', '3', NULL),
		('d', 't', 'k2', NULL, '{"h": "v"}'), ('e', 't', 'k3', '5', '[]'), ('f', 't', 'k1', '6', NULL), ('g', 't', 'k4', '7', NULL), ('8', 't', NULL, '8', NULL)`)
	bridge := s.streaming(t)
	s.awaitLetters(t, 6, "'parked'")
	pgtest.Eventually(t, 30*time.Second, func() (bool, string) {
		n := pgtest.Value[int](t, db, "SELECT count(*)::int FROM loose WHERE done IS NULL")
		return n == 0, fmt.Sprintf("%d rows are not marked", n)
	})
	if got := slices.Sorted(slices.Values(j.ids())); !slices.Equal(got, []string{"a", "g"}) {
		t.Errorf("taken: %q", got)
	}
	db.Exec(t, "UPDATE loose SET done = NULL") // that it comes by again changes nothing
	bridge.stop(t)
	bridge = s.streaming(t)
	got := map[string]string{}
	for _, l := range s.letters(t) {
		name := l.EventID
		if strings.Contains(name, ":") {
			name = "at a position, " + string(l.Payload)
		}
		got[name] = l.Reason + ", " + l.Fault
	}
	null := `column %q of public.loose is NULL; declare it NOT NULL`
	want := map[string]string{
		"at a position, 8": `impossible event, column "id" of public.loose is a number, 8, and so are the ids of another buffer, so that one event could be taken for ` +
			`the other: use a uuid, or put something before it`,
		"at a position, 2": "impossible event, " + fmt.Sprintf(null, "id"), "c": "impossible event, " + fmt.Sprintf(null, "topic"), "f": "queued, ",
		"d": "impossible event, " + fmt.Sprintf(null, "doc"), "e": `impossible event, column "extra" of public.loose: want a JSON object: []`,
	}
	if !maps.Equal(got, want) {
		t.Errorf("set aside\n%v, want\n%v", got, want)
	}

	if r := s.ebb(t, "dead", "retry", "--key", "k1"); r.code != exitFailed || !strings.Contains(r.stdout, `event c of key k1 is parked again: impossible event: column "topic"`) {
		t.Errorf("exit code %d, and %q", r.code, r.stdout)
	}
	db.Exec(t, "UPDATE ebb.dead_letter SET topic = 't', fault = NULL WHERE event_id = 'c'")
	db.Exec(t, "UPDATE ebb.dead_letter SET payload = '4', payload_bytes = NULL, fault = NULL WHERE event_id = 'd'")
	s.ebb(t, "dead", "retry", "c", "d").must(t)
	if got, want := j.ids(), []string{"a", "g", "c", "f", "d"}; !slices.Equal(slices.Sorted(slices.Values(got)), slices.Sorted(slices.Values(want))) ||
		slices.Index(got, "c") > slices.Index(got, "f") {
		t.Errorf("taken: %q, want %q", got, want)
	}

	// A replay leaves alone what was mended.
	s.confirms(t, 40*time.Second)
	out := s.ebb(t, "replay", "--aside", "--from", "trail", "--sink", "stdout").must(t)
	if n := strings.Count(out.stdout, "\n"); n != 3 || !strings.Contains(out.stderr, "left out rows that make no event") || !strings.Contains(out.stderr, "rows=5") {
		t.Errorf("replayed aside:\n%s%s", out.stdout, out.stderr)
	}
	s.ebb(t, "replay", "--from", "trail").must(t)
	s.awaitLetters(t, 6, "'parked'")
	s.ebb(t, "dead", "retry", "c", "d").must(t)
	bridge.stop(t)
	equalIDs(t, "after the replay", slices.Sorted(slices.Values(j.taken)), []string{"a", "a", "c", "c", "d", "d", "f", "f", "g", "g"})
}

// TestDiscarded: an event that is given up is never delivered, not by a replay either; what is behind it goes on.
func TestDiscarded(t *testing.T) {
	j := newJudge(t, all(200))
	s := newSite(t, pgtest.New(t), j.URL, "replay: {window: 1h}")
	s.setup(t)
	s.db.Exec(t, `SELECT ebb.put('t', to_json(n), 'key') FROM generate_series(1, 5) n`)
	ids := s.ids(t)
	j.answers(func(id, _ string) int {
		if id == ids[1] {
			return http.StatusBadRequest
		}
		return 200
	})
	bridge := s.streaming(t)
	s.awaitLetters(t, 4, "'parked'")
	s.ebb(t, "dead", "discard", ids[1], "--yes").must(t)
	s.awaitLetters(t, 3, "'delivered'")
	want := slices.Delete(slices.Clone(ids), 1, 2)
	equalIDs(t, "after the discard", j.ids(), want)
	if by := pgtest.Value[string](t, s.db, "SELECT decided_by FROM ebb.dead_letter WHERE state = 'discarded'"); by == "" {
		t.Error("nobody has discarded it")
	}
	s.confirms(t, 40*time.Second)
	s.ebb(t, "replay", "--from", "trail").must(t)
	bridge.stop(t)
	equalIDs(t, "after the replay", j.taken, append(slices.Clone(want), want...))
}

// TestBlock: with on_reject: block, what the receiver does not want holds up the rest, and nothing is set aside.
func TestBlock(t *testing.T) {
	j := newJudge(t, all(200))
	s := newSite(t, pgtest.New(t), j.URL, "http: {on_reject: block, window: 10}")
	s.setup(t)
	s.db.Exec(t, `SELECT ebb.put('t', to_json(n), 'key-' || n) FROM generate_series(1, 30) n`)
	ids := s.ids(t)
	j.answers(func(id, _ string) int {
		if id == ids[2] {
			return http.StatusBadRequest
		}
		return 200
	})
	bridge := s.streaming(t)
	pgtest.Eventually(t, 30*time.Second, func() (bool, string) {
		n := len(j.ids())
		return n == 11, fmt.Sprintf("%d events were taken, want two and what the window holds", n)
	})
	time.Sleep(300 * time.Millisecond)
	if n := len(j.ids()); n != 11 {
		t.Errorf("%d events were taken", n)
	}
	s.awaitLetters(t, 0, "'parked', 'retrying'")
	j.answers(all(200))
	s.confirms(t, 60*time.Second)
	bridge.stop(t)
}

// TestParkingKills: whatever a bridge was doing when it was killed, what is committed is delivered, or set aside; and what is retried arrives in the order of its key.
func TestParkingKills(t *testing.T) {
	kills := 20
	if testing.Short() {
		kills = 5
	}
	const events, window = 4000, 50
	var poison map[string]bool
	j := newJudge(t, all(200))
	s := newSite(t, pgtest.New(t), j.URL, fmt.Sprintf("http: {window: %d}", window))
	s.setup(t)
	s.db.Exec(t, fmt.Sprintf(`DO $$BEGIN FOR n IN 1..%d LOOP
		PERFORM ebb.put('t', json_build_object('n', n), CASE WHEN n %% 10 > 0 THEN 'key-' || n %% 37 END); IF n %% 3 = 0 THEN COMMIT; END IF; END LOOP; END$$`, events))
	ids := s.ids(t)
	poison = map[string]bool{}
	for range events / 100 {
		poison[ids[rand.IntN(len(ids))]] = true
	}
	j.answers(func(id, key string) int {
		time.Sleep(time.Millisecond / 2) // one answer after the other
		switch {
		case poison[id]:
			return http.StatusBadRequest
		case key == "key-1":
			return http.StatusInternalServerError // it never says yes, and is set aside once the window is full
		case rand.IntN(50) == 0:
			return http.StatusServiceUnavailable
		}
		return 200
	})
	handled := func() int {
		return len(j.ids()) + pgtest.Value[int](t, s.db, "SELECT count(*)::int FROM ebb.dead_letter WHERE state IN ('parked', 'retrying')")
	}
	var starts []int // how much was taken when a bridge was started again
	for range kills {
		bridge := s.streaming(t)
		want := handled() + rand.IntN(events/kills)
		pgtest.Eventually(t, 60*time.Second, func() (bool, string) {
			n := handled()
			return n >= min(want, events), fmt.Sprintf("%d events are delivered or set aside, want %d", n, want)
		})
		bridge.kill()
		// What it sent may still be on its way.
		for before := -1; before != j.count(); time.Sleep(50 * time.Millisecond) {
			before = j.count()
		}
		starts = append(starts, j.count())
	}
	bridge := s.streaming(t)
	s.confirms(t, 120*time.Second)
	j.againAfter(t, starts, window)
	parked := map[string]bool{}
	for _, l := range s.letters(t, "--each") {
		parked[l.EventID] = true
	}
	for _, id := range j.ids() {
		if poison[id] {
			t.Errorf("event %s was taken", id)
		}
		delete(parked, id)
	}
	if n := len(j.ids()) + len(parked); n != events {
		t.Errorf("%d events are delivered and %d set aside, of %d", len(j.ids()), len(parked), events)
	}
	for id := range maps.Keys(poison) {
		if !parked[id] {
			t.Errorf("event %s is not set aside", id)
		}
	}
	j.answers(all(200))
	s.ebb(t, "dead", "retry", "--all").must(t)
	pgtest.Eventually(t, 60*time.Second, func() (bool, string) {
		n := len(j.ids())
		return n == events, fmt.Sprintf("%d of %d events were taken", n, events)
	})
	bridge.stop(t)
	j.ordered(t)
	s.awaitLetters(t, 0, "'parked', 'retrying'")
}

// TestTooLargeForTheStreamIsParked: what a stream does not take is set aside, with what is behind it of its key, and stands in the stream once after it was retried, whatever
// is killed in between.
func TestTooLargeForTheStreamIsParked(t *testing.T) {
	maxPayload := int32(64 << 10)
	broker := natstest.New(t, natstest.Adjust(func(o *natsd.Options) { o.MaxPayload = maxPayload }))
	s := newSite(t, pgtest.New(t), broker.URL())
	s.setup(t)
	bridge := s.streaming(t)
	s.db.Exec(t, `SELECT ebb.put('t', '{}', 'a') FROM generate_series(1, 3)`,
		`BEGIN; SELECT ebb.put('t', json_build_object('x', repeat('x', 100000)), 'a'); SELECT ebb.put('t', '{}', 'b'); SELECT ebb.put('t', '{}', 'a'); COMMIT`,
		`SELECT ebb.put('t', '{}', 'b', '{"ce-id": "forged"}')`, `SELECT ebb.put('t', '{}', NULL, '{"Nats-Msg-Id": "7"}')`, `SELECT ebb.put('t', '{}', 'c')`,
		`SELECT ebb.put('t', json_build_object('x', repeat('x', 100000)))`) // the last event of all
	ids := s.ids(t)
	s.awaitLetters(t, 5, "'parked'")
	s.confirms(t, 40*time.Second)
	want := []string{ids[0], ids[1], ids[2], ids[4], ids[8]}
	equalIDs(t, "delivered", streamIDs(t, broker), want)
	bridge.kill()

	bridge = s.streaming(t)
	s.db.Exec(t, `SELECT ebb.put('t', '{}', 'a')`, `SELECT ebb.put('t', '{}', 'c')`)
	s.awaitLetters(t, 6, "'parked'")
	ids = s.ids(t)
	want = append(want, ids[11])
	s.confirms(t, 40*time.Second)
	equalIDs(t, "after a kill", streamIDs(t, broker), want)
	// The two whose headers are wrong never fit.
	s.ebb(t, "dead", "discard", ids[6], ids[7], "--yes").must(t)

	broker.Stop(t)
	s.db.Exec(t, `SELECT ebb.put('t', '{}', 'd')`)
	retry := start(t, nil, s.args("dead", "retry", "--all")...)
	pgtest.Eventually(t, 30*time.Second, func() (bool, string) {
		const why = "nothing is retried yet: the bridge has 1 event to deliver"
		return strings.Contains(retry.stdout.String(), why), "not said: " + why
	})
	maxPayload = 1 << 20
	broker.Start(t)
	if code := retry.ended(t, 30*time.Second); code != 0 {
		t.Errorf("exit code %d of the retry", code)
	}
	bridge.kill() // before a tick, perhaps
	bridge = s.streaming(t)
	s.db.Exec(t, `SELECT ebb.put('t', '{}', 'a')`)
	delivered(t, broker, 40*time.Second, 12)
	s.confirms(t, 40*time.Second)
	bridge.stop(t)
	ids = s.ids(t)
	got := streamIDs(t, broker)
	equalIDs(t, "before the retry", got[:6], want)
	var ofA []string
	for _, m := range broker.Messages(t, "EBB") {
		if m.Header.Get("ce-subject") == "a" {
			ofA = append(ofA, m.Header.Get("ce-id"))
		}
		if id := m.Header.Get("ce-id"); (m.Header.Get("Ebb-Origin") == "retry") != slices.Contains([]string{ids[3], ids[5], ids[9], ids[10]}, id) {
			t.Errorf("event %s has origin %q", id, m.Header.Get("Ebb-Origin"))
		}
	}
	equalIDs(t, "of key a", ofA, []string{ids[0], ids[1], ids[2], ids[3], ids[5], ids[10], ids[13]})
	slices.Sort(got)
	if n := len(slices.Compact(got)); n != 12 {
		t.Errorf("%d events stand in the stream, want 12", n)
	}
}
