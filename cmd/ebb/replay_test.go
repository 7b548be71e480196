package main

import (
	"encoding/json"
	"fmt"
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

	"ebb/event"
	"ebb/internal/natstest"
	"ebb/internal/pgtest"
)

// epochs returns the ids in the stream by the epoch of their delivery, in order.
func epochs(t *testing.T, server *natstest.Server) map[uint32][]string {
	t.Helper()
	by := map[uint32][]string{}
	for _, m := range server.Messages(t, "EBB") {
		at, err := event.ParsePosition(m.Header.Get("Ebb-Position"))
		if err != nil {
			t.Fatal(err)
		}
		by[at.Epoch] = append(by[at.Epoch], m.Header.Get("ce-id"))
	}
	return by
}

// The second half of what was delivered comes again, by each kind of place, with the same ids and in the same order.
func TestReplayFromEveryKindOfPlace(t *testing.T) {
	db, broker := pgtest.New(t), natstest.New(t)
	s := newSite(t, db, broker.URL())
	s.setup(t)
	s.streaming(t)
	const half = 3000
	fill := func() {
		t.Helper()
		db.Exec(t, `DO $$ BEGIN FOR i IN 1..`+strconv.Itoa(half/10)+` LOOP
			PERFORM ebb.put('t', '{"n": 1}', 'k' || i % 7) FROM generate_series(1, 10); COMMIT; END LOOP; END $$`)
	}
	fill()
	delivered(t, broker, time.Minute, half)
	s.confirms(t, 40*time.Second)
	time.Sleep(100 * time.Millisecond) // the clock of the commits is told apart by it
	middle := time.Now()
	time.Sleep(100 * time.Millisecond)
	fill()
	delivered(t, broker, time.Minute, 2*half)
	s.confirms(t, 40*time.Second)
	first := broker.Messages(t, "EBB")[half]
	at, err := event.ParsePosition(first.Header.Get("Ebb-Position"))
	if err != nil {
		t.Fatal(err)
	}
	all := s.ids(t)

	dry := s.ebb(t, "replay", "--from", at.Commit.String(), "--dry-run").must(t)
	if !strings.Contains(dry.stdout, fmt.Sprintf("events  %d, ", half)) || !strings.Contains(dry.stdout, "from    "+at.Commit.String()) {
		t.Errorf("a dry run says\n%s", dry.stdout)
	}
	var survey struct {
		Events, Bytes    int64
		From             event.LSN
		EstimatedSeconds float64 `json:"estimated_seconds"`
	}
	if err := json.Unmarshal([]byte(s.ebb(t, "replay", "--from", middle.Format(time.RFC3339Nano), "--dry-run", "--json").must(t).stdout), &survey); err != nil {
		t.Fatal(err)
	}
	if survey.Events != half || survey.Bytes == 0 || survey.From != at.Commit || survey.EstimatedSeconds <= 0 {
		t.Errorf("a dry run says %+v", survey)
	}

	total, epoch := 2*half, uint32(1)
	for _, c := range []struct {
		name, from string
		want       []string
	}{
		{"LSN", at.Commit.String(), all[half:]},
		{"time", middle.Format(time.RFC3339Nano), all[half:]},
		{"duration", time.Since(middle).Round(time.Microsecond).String(), all[half:]},
		{"event in the middle of its transaction", all[half+4], all[half:]},
		{"trail", "trail", all},
	} {
		if c.name == "duration" {
			c.from = (time.Since(middle) - 20*time.Millisecond).String() // it counts from a moment later
		}
		out := s.ebb(t, "replay", "--from", c.from).must(t).stdout
		total, epoch = total+len(c.want), epoch+1
		if want := fmt.Sprintf("is done: %d events", len(c.want)); !strings.Contains(out, want) {
			t.Errorf("%s: printed %q, want %q", c.name, out, want)
		}
		delivered(t, broker, time.Minute, total)
		equalIDs(t, c.name, epochs(t, broker)[epoch], c.want)
	}
}

// While events come at a steady rate, a replay loses, doubles and misplaces none of them.
func TestReplayUnderLoad(t *testing.T) {
	db, broker := pgtest.New(t), natstest.New(t)
	s := newSite(t, db, broker.URL())
	s.setup(t)
	s.streaming(t)
	stop := make(chan struct{})
	var producers sync.WaitGroup
	halt := sync.OnceFunc(func() {
		close(stop)
		producers.Wait()
	})
	defer halt()
	for range 2 {
		conn := db.Connect(t)
		producers.Go(func() {
			every := time.NewTicker(time.Millisecond)
			defer every.Stop()
			for {
				select {
				case <-stop:
					return
				case <-every.C:
				}
				if _, err := conn.Exec(t.Context(), "SELECT ebb.put('t', '{}')"); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	time.Sleep(2 * time.Second)
	for i := range 3 {
		s.ebb(t, "replay", "--from", []string{"1s", "trail", "500ms"}[i]).must(t)
	}
	time.Sleep(time.Second)
	halt()
	s.confirms(t, 30*time.Second)

	// In each epoch events come in the order in which they were first delivered; together the epochs hold every row.
	by := epochs(t, broker)
	var first []string
	for epoch := uint32(1); epoch <= 4; epoch++ {
		ids := by[epoch]
		if len(ids) == 0 {
			t.Fatalf("nothing was delivered in epoch %d", epoch)
		}
		if epoch == 1 {
			first = ids
			continue
		}
		at := slices.Index(first, ids[0])
		if at < 0 {
			t.Fatalf("epoch %d begins with event %s, which was not delivered before", epoch, ids[0])
		}
		again := min(len(first)-at, len(ids))
		equalIDs(t, fmt.Sprintf("epoch %d", epoch), ids[:again], first[at:at+again])
		if again < len(first)-at {
			t.Fatalf("epoch %d ends before what it repeats does", epoch)
		}
		first = append(first, ids[again:]...)
	}
	slices.SortFunc(first, func(a, b string) int { return len(a)*1000 - len(b)*1000 + strings.Compare(a, b) })
	equalIDs(t, "all epochs", first, s.ids(t))
}

func TestReplayWithoutABridge(t *testing.T) {
	db, broker := pgtest.New(t), natstest.New(t)
	s := newSite(t, db, broker.URL())
	s.setup(t)
	s.ebb(t, "replay", "--from", "trail").must(t)
	bridge := s.streaming(t)
	for i := range 5 {
		s.put(t, i)
	}
	delivered(t, broker, time.Minute, 5)
	s.confirms(t, 40*time.Second)
	bridge.stop(t)

	out := s.ebb(t, "replay", "--from", "trail").must(t).stdout
	if !strings.Contains(out, "no bridge runs: the next ebb run does it") {
		t.Errorf("printed %q", out)
	}
	s.ebb(t, "replay", "--from", "trail").fails(t, 1, "another replay has not ended", "--cancel")
	out = s.ebb(t, "replay", "--cancel").must(t).stdout
	if !strings.Contains(out, "is cancelled") {
		t.Errorf("printed %q", out)
	}
	s.ebb(t, "replay", "--cancel").fails(t, 1, "no replay to cancel")
	s.ebb(t, "replay", "--from", "trail").must(t)
	var status struct {
		Replay *struct {
			State  string
			Events int64
		}
	}
	if err := json.Unmarshal([]byte(s.ebb(t, "status", "--json").stdout), &status); err != nil || status.Replay == nil ||
		status.Replay.State != "requested" || status.Replay.Events != 5 {
		t.Errorf("status says %+v (%v)", status.Replay, err)
	}
	if out := s.ebb(t, "status"); !strings.Contains(out.stdout, "is requested; 0 of 5 events so far") {
		t.Errorf("status prints\n%s", out.stdout)
	}
	s.streaming(t)
	delivered(t, broker, time.Minute, 10)
	equalIDs(t, "the replay", epochs(t, broker)[2], s.ids(t))
}

func TestReplayRefuses(t *testing.T) {
	db, broker := pgtest.New(t), natstest.New(t)
	s := newSite(t, db, broker.URL())
	s.setup(t)
	for _, c := range []struct {
		args []string
		code int
		want []string
	}{
		{nil, 2, []string{"--from"}},
		{[]string{"--from", "-5m"}, 2, []string{"in the future"}},
		{[]string{"--from", "2999-01-01T00:00:00Z"}, 2, []string{"in the future"}},
		{[]string{"--from", "1h", "--topic", "t"}, 2, []string{"--aside"}},
		{[]string{"--from", "1h", "--aside"}, 2, []string{"--sink", "--subject-prefix"}},
		{[]string{"--from", "0/1", "--aside", "--from-table", "--sink", "stdout"}, 2, []string{"--from-table", "LSN"}},
		{[]string{"--cancel", "--from", "1h"}, 2, []string{"--cancel"}},
		{[]string{"--from", "0/1"}, 1, []string{"out of reach", "the oldest position in reach is"}},
		{[]string{"--from", "no-such-event"}, 1, []string{"out of reach", "no-such-event"}},
	} {
		s.ebb(t, append([]string{"replay"}, c.args...)...).fails(t, c.code, c.want...)
	}
	s.put(t, 1)
	s.ebb(t, "replay", "--from", "trail", "--to", "no-such-event", "--aside", "--sink", "stdout").fails(t, 1, "up to which", "no-such-event")
	s.ebb(t, "replay", "--from", "trail", "--aside", "--sink", broker.URL()).fails(t, 2, "--subject-prefix")
	s.ebb(t, "replay", "--from", "trail", "--aside", "--subject-prefix", "again", "--stream", "EBB").fails(t, 2, "that of the main flow")

	s.streaming(t)
	delivered(t, broker, time.Minute, 1)
	s.ebb(t, "replay", "--from", "trail", "--aside", "--subject-prefix", "ebb").fails(t, 1, "--subject-prefix ebb", "choose another prefix")

	none := newSite(t, pgtest.New(t), broker.URL(), "replay: {window: 0s}")
	none.setup(t)
	none.ebb(t, "replay", "--from", "trail").fails(t, 1, "out of reach", "replay.window")
}

// A replay aside delivers some of the events to another place, several at once, and leaves the main flow alone.
func TestReplayAside(t *testing.T) {
	db, broker := pgtest.New(t), natstest.New(t)
	s := newSite(t, db, broker.URL())
	s.setup(t)
	s.streaming(t)
	for i := range 40 {
		db.Exec(t, fmt.Sprintf("SELECT ebb.put('t%d', '{\"i\": %d}', 'k%d')", i%2, i, i%4))
	}
	delivered(t, broker, time.Minute, 40)
	s.confirms(t, 40*time.Second)
	all := s.ids(t)
	var every4 []string
	for i := 1; i < 40; i += 4 {
		every4 = append(every4, all[i])
	}

	var mu sync.Mutex
	var received []string
	receiver := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		received = append(received, r.Header.Get("ce-id"))
	}))
	defer receiver.Close()
	var both sync.WaitGroup
	both.Go(func() {
		began := time.Now()
		out := s.ebb(t, "replay", "--aside", "--from", "trail", "--topic", "t1", "--key", "k1", "--sink", receiver.URL, "--rate", "10")
		if out.code != 0 || !strings.Contains(out.stdout, "delivered 10 events") {
			t.Errorf("aside to HTTP: %+v", out)
		}
		if took := time.Since(began); took < 800*time.Millisecond {
			t.Errorf("10 events at 10 a second took %s", took)
		}
	})
	out := s.ebb(t, "replay", "--aside", "--from", all[10], "--to", all[19], "--sink", "stdout").must(t)
	var printed []string
	for line := range strings.Lines(out.stdout) {
		var e struct{ ID string }
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		printed = append(printed, e.ID)
	}
	equalIDs(t, "stdout", printed, all[10:20])
	printed = nil
	out = s.ebb(t, "replay", "--aside", "--from", all[30], "--from-table", "--topic", "t0", "--sink", "stdout").must(t)
	for line := range strings.Lines(out.stdout) {
		var e struct{ ID, Ebborigin string }
		if err := json.Unmarshal([]byte(line), &e); err != nil || e.Ebborigin != "recovered" {
			t.Fatalf("%q: %v", line, err)
		}
		printed = append(printed, e.ID)
	}
	equalIDs(t, "from the table", printed, []string{all[30], all[32], all[34], all[36], all[38]})
	s.ebb(t, "replay", "--aside", "--from", "trail", "--subject-prefix", "again").must(t)
	var again []string
	for _, m := range broker.Messages(t, "EBB_REPLAY") {
		again = append(again, m.Header.Get("ce-id"))
		if !strings.HasPrefix(m.Subject, "again.t") {
			t.Errorf("subject %s", m.Subject)
		}
	}
	equalIDs(t, "the other stream", again, all)
	both.Wait()
	equalIDs(t, "HTTP", received, every4)

	s.put(t, 1)
	delivered(t, broker, time.Minute, 41)
	if len(epochs(t, broker)) != 1 {
		t.Error("the main flow has been replayed")
	}
	if n := pgtest.Value[int64](t, db, "SELECT count(*) FROM pg_replication_slots WHERE slot_name LIKE 'ebb_tap%' AND database = current_database()"); n != 0 {
		t.Errorf("%d slots are left over", n)
	}
}

// Rows of tables of one's own, and messages without a table, are replayed as well, with the ids that they had.
func TestReplayOfOwnTablesAndMessages(t *testing.T) {
	db, broker := pgtest.New(t), natstest.New(t)
	db.Exec(t, "CREATE TYPE mood AS ENUM ('glad', 'sad')", `CREATE TABLE outbox (app text, "group" text, kind mood, recorded timestamptz, n int PRIMARY KEY)`)
	s := newSite(t, db, broker.URL(), `buffers: [{table: outbox, topic: {value: changed}, key: group, delivered: mark}, {table: ebb.buffer}]`)
	s.setup(t)
	s.streaming(t)
	for i := range 5 {
		db.Exec(t, fmt.Sprintf(`BEGIN; INSERT INTO outbox VALUES ('a', 'g', 'glad', NULL, %d); SELECT ebb.emit('m', '{"n": %[1]d}'); SELECT ebb.put('p', '{}'); COMMIT`, i))
	}
	delivered(t, broker, time.Minute, 15)
	s.confirms(t, 40*time.Second)
	first := epochs(t, broker)[1]
	out := s.ebb(t, "replay", "--aside", "--from", first[3], "--sink", "stdout").must(t)
	var printed []string
	for line := range strings.Lines(out.stdout) {
		var e struct{ ID string }
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		printed = append(printed, e.ID)
	}
	equalIDs(t, "aside", printed, first[3:])
	s.ebb(t, "replay", "--from", first[4]).must(t)
	delivered(t, broker, time.Minute, 15+12)
	equalIDs(t, "in place", epochs(t, broker)[2], first[3:])
	pgtest.Eventually(t, time.Minute, func() (bool, string) {
		return pgtest.Value[int64](t, db, "SELECT count(*) FROM outbox WHERE recorded IS NULL") == 0, "rows are not marked"
	})
}

// Bridges are killed at random while replays follow one another and events keep coming. In each epoch every event stands once and in order, from
// where the replay began up to where the next epoch does, and nothing is missing.
func TestReplayKilledAtRandom(t *testing.T) {
	kills := 50
	if testing.Short() {
		kills = 15
	}
	db, broker := pgtest.New(t), natstest.New(t)
	s := newSite(t, db, broker.URL())
	s.setup(t)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	put := func(n int) {
		db.Exec(t, `DO $$ BEGIN FOR i IN 1..`+strconv.Itoa(n)+` LOOP PERFORM ebb.put('t', '{"n": 1}'); COMMIT; END LOOP; END $$`)
	}
	put(300)
	first := s.streaming(t)
	delivered(t, broker, time.Minute, 300)
	s.confirms(t, 40*time.Second)
	first.stop(t)

	ask := func() { // for another replay, if the last one has ended
		ids := s.ids(t)
		from := ids[random.IntN(len(ids))]
		out := s.ebb(t, "replay", "--from", from)
		if out.code != 0 && !strings.Contains(out.stderr, "another replay has not ended") {
			t.Fatalf("replay: %+v", out)
		}
	}
	for range kills {
		put(random.IntN(20))
		if random.IntN(3) == 0 {
			ask()
		}
		p := s.run(t)
		time.Sleep(time.Duration(random.IntN(700)) * time.Millisecond)
		p.kill()
	}
	put(10)
	s.streaming(t)
	s.confirms(t, time.Minute)
	if n := pgtest.Value[int64](t, db, "SELECT count(*) FROM ebb.replay WHERE state <> 'done'"); n != 0 {
		t.Errorf("%d replays are not done", n)
	}
	replays := pgtest.Value[int64](t, db, "SELECT count(*) FROM ebb.replay")
	t.Logf("%d replays", replays)

	// One session commits after the other, so that ids are in commit order.
	by := epochs(t, broker)
	if len(by) != int(replays)+1 {
		t.Errorf("%d epochs, want one more than the %d replays", len(by), replays)
	}
	all := s.ids(t)
	end := 0 // how many of all were delivered so far, in whichever epoch
	for _, epoch := range slices.Sorted(maps.Keys(by)) {
		ids := by[epoch]
		at := slices.Index(all, ids[0])
		if at < 0 || at > end || at+len(ids) > len(all) {
			t.Fatalf("epoch %d begins at event %s, with %d events delivered before", epoch, ids[0], end)
		}
		equalIDs(t, fmt.Sprintf("epoch %d", epoch), ids, all[at:at+len(ids)])
		if at+len(ids) < end {
			t.Fatalf("epoch %d ends at event %d, and %d were delivered before it", epoch, at+len(ids), end)
		}
		end = at + len(ids)
	}
	if end != len(all) {
		t.Errorf("%d of %d events are delivered", end, len(all))
	}
}
