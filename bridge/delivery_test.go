package bridge_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"ebb/bridge"
	"ebb/event"
	"ebb/internal/natstest"
	"ebb/internal/pgtest"
	"ebb/internal/postgres"
	"ebb/sink/cloudevent"
)

// NATS is away for longer than the server waits for a walsender's standby: the connection stays, memory stays flat while rows
// pile up, and everything flows when it is back.
func TestStreamIsAwayForLong(t *testing.T) {
	n := 120_000
	if testing.Short() {
		n = 30_000
	}
	server := pgtest.NewServer(t, postgres.Config{Settings: map[string]string{"wal_sender_timeout": "1s"}})
	f := newFixture(t, server.New(t))
	nats := natstest.New(t)
	r := f.run(f.stream(nats))
	f.put(10)
	f.streamed(nats, 10)
	walsender := func() int32 {
		return pgtest.Value[int32](t, f.db, "SELECT coalesce(max(pid), 0) FROM pg_stat_replication WHERE application_name = $1", f.slot)
	}
	pid := walsender()
	nats.Stop(t)
	began := time.Now()
	var base, most uint64
	for i := range 20 {
		f.put(n / 20)
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		if most = max(most, m.HeapAlloc); i == 0 {
			base = m.HeapAlloc
		}
	}
	pgtest.Eventually(t, patience, func() (bool, string) {
		if now := walsender(); now != pid {
			t.Fatalf("the walsender is %d and was %d", now, pid)
		}
		return time.Since(began) > 3500*time.Millisecond, "three timeouts are not over"
	})
	if grown := int64(most) - int64(base); grown > 24<<20 {
		t.Errorf("the heap grew by %d bytes while %d rows piled up", grown, n)
	}
	nats.Start(t)
	got, _ := f.streamed(nats, n+10)
	sameOrder(t, got, f.rows())
	if now := walsender(); now != pid {
		t.Errorf("the walsender is %d and was %d", now, pid)
	}
	r.stop()
}

// Whatever goes into the buffer comes out of the stream as it was.
func TestPayloadsAndNames(t *testing.T) {
	f := newFixture(t, pgtest.New(t))
	nats := natstest.New(t)
	r := f.run(f.stream(nats))
	text := func(s string) *string { return &s }
	var planes strings.Builder
	for plane := range rune(17) {
		for _, low := range []rune{0x0, 0x41, 0xD7FF, 0xFFFD, 0xFFFF} {
			if c := plane<<16 | low; c != 0 {
				planes.WriteRune(c)
			}
		}
	}
	quoted, err := json.Marshal(planes.String())
	if err != nil {
		t.Fatal(err)
	}
	type row struct {
		topic   string
		key     *string
		payload string
		headers *string
	}
	rows := []row{
		{"t", nil, `{}`, nil},
		{"t", text(""), "{ \"b\" :1,\n\t\"a\":  [ ] , \"b\": 2 }", text(`{}`)},
		{"t", text("k"), `{"nul": "\u0000", "half": "\ud800", "escaped": "\u00e4"}`, text(`{"s": "x", "n": 1.50, "o": {"a": [1, null]}, "b": true, "z": null}`)},
		{"t", text(planes.String()), string(quoted), text(`{"unicode": "ä 中 😀"}`)},
		{planes.String(), text("k"), `"` + planes.String() + `"`, nil},
		{"a.b.c", text("a.b c"), `null`, nil},
		{" sp ace ", text("  "), `" "`, nil},
		{"*", text("*"), `0`, nil},
		{">", text(">"), `[]`, nil},
		{"new\r\nline\t\x01", text("new\r\nline"), `true`, nil},
		{"..", text("%25"), `{"a":1}`, nil},
		{"", text("é"), `{"empty topic": true}`, nil},
		{strings.Repeat("t", 300), text(strings.Repeat("k", 300)), `{}`, nil},
		{strings.Repeat("ä.", 100), text(strings.Repeat("中", 100)), `{}`, nil},
		{"large", nil, `"` + strings.Repeat("x", 1<<20-2000) + `"`, nil},
	}
	put := func() {
		conn := f.db.Connect(t)
		for i, row := range rows {
			if _, err := conn.Exec(t.Context(), "INSERT INTO ebb.buffer (topic, key, payload, headers) VALUES ($1, $2, $3::text::json, $4::text::jsonb)",
				row.topic, row.key, row.payload, row.headers); err != nil {
				t.Fatalf("row %d: %v", i, err)
			}
		}
	}
	put()
	f.streamed(nats, len(rows))
	// And the same by recovery.
	f.awaitBacklog(0)
	r.stop()
	f.db.Exec(t, "SELECT pg_drop_replication_slot('"+f.slot+"')")
	put()
	r = f.run(f.stream(nats))
	got, messages := f.streamed(nats, 2*len(rows))
	sameOrder(t, got, f.rows())
	subjects := map[string]bool{}
	for i, m := range messages {
		row, origin := rows[i%len(rows)], ""
		if i >= len(rows) {
			origin = string(event.Recovered)
		}
		if string(m.Data) != row.payload {
			t.Errorf("row %d: body is %.100q, want %.100q", i, m.Data, row.payload)
		}
		decoded := func(name string) string { return string(cloudevent.AppendDecoded(nil, m.Header.Get(name))) }
		if got := decoded("ce-type"); got != row.topic {
			t.Errorf("row %d: ce-type is %q, want %q", i, got, row.topic)
		}
		key, ok := m.Header["ce-subject"]
		switch {
		case ok != (row.key != nil):
			t.Errorf("row %d: ce-subject is %q, %v; the key is NULL: %v", i, key, ok, row.key == nil)
		case ok && decoded("ce-subject") != *row.key:
			t.Errorf("row %d: ce-subject is %q, want %q", i, key, *row.key)
		}
		if got := m.Header.Get("Ebb-Origin"); got != origin {
			t.Errorf("row %d: Ebb-Origin is %q, want %q", i, got, origin)
		}
		if !strings.HasPrefix(m.Subject, "ebb.") || len(m.Subject) > 300 || strings.ContainsAny(m.Subject, " *>\r\n") {
			t.Errorf("row %d: subject is %q", i, m.Subject)
		}
		subjects[m.Subject] = true
	}
	for name, want := range map[string]string{"s": "x", "n": "1.50", "o": `{"a": [1, null]}`, "b": "true"} {
		if got := messages[2].Header.Get(name); cloudevent.AppendDecoded(nil, got) == nil || string(cloudevent.AppendDecoded(nil, got)) != want {
			t.Errorf("header %s is %q, want %q", name, got, want)
		}
	}
	r.stop()
}

// Rows that were there before the slot come first, by id, each once, however often the bridge and its sink are killed, while
// others are put; then come those from the slot.
func TestFirstStartIsKilledOftenWhileRowsKeepComing(t *testing.T) {
	n := 20_000
	if testing.Short() {
		n = 6_000
	}
	f := &fixture{t: t, db: pgtest.New(t), log: logTo(t)}
	f.slot = f.db.Name
	f.setup()
	// As if the slot were made only now, with rows there.
	f.db.Exec(t, "SELECT pg_drop_replication_slot('"+f.slot+"')", "DELETE FROM ebb.slot")
	f.put(n)
	open := f.db.Connect(t)
	tx, err := open.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), "SELECT ebb.put('t', '{}')"); err != nil {
		t.Fatal(err)
	}
	made := make(chan struct{})
	go func() {
		defer close(made)
		f.setup()
	}()
	pgtest.Eventually(t, patience, func() (bool, string) {
		waits := pgtest.Value[int64](t, f.db, "SELECT count(*) FROM pg_stat_activity WHERE application_name = $1 AND wait_event_type = 'Lock'", f.slot)
		return waits > 0, "the creation of the slot does not wait for an open transaction"
	})
	f.put(10)
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	<-made
	before := len(f.rows())

	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	random := rand.New(rand.NewPCG(seed, 0))
	s := newExactSink()
	next := 0
	s.dies = func(stored int) bool {
		if stored < next || stored >= before {
			return false
		}
		next = stored + 1 + random.IntN(n/8)
		return true
	}
	deaths := 0
	for {
		r := f.run(s)
		f.put(3)
		enough, all := s.count()+random.IntN(500), 0
		stopped, finished := deaths > 0 && random.IntN(3) == 0, false
		pgtest.Eventually(t, patience, func() (bool, string) {
			select {
			case <-r.done:
				return true, ""
			default:
			}
			all = len(f.rows())
			finished = s.count() >= all
			return finished || stopped && s.count() >= enough, fmt.Sprintf("%d of %d events are delivered", s.count(), all)
		})
		r.cancel()
		if err := r.wait(); err != nil && !errors.Is(err, errDied) {
			t.Fatal(err)
		}
		if stopped && !finished {
			continue
		}
		if finished {
			break
		}
		deaths++
	}
	r := f.run(s)
	f.awaitBacklog(0)
	r.stop()
	if deaths == 0 {
		t.Error("the sink never died")
	}
	events := s.all()
	got := ids(t, events)
	sameSet(t, got, f.rows())
	for i, e := range events {
		want := event.Streamed
		if i < before {
			want = event.Recovered
			if e.Position.String() != "1:0/0:0" {
				t.Fatalf("event %d, the first of its stream, has position %s", i, e.Position)
			}
		}
		if e.Origin != want {
			t.Fatalf("event %d of %d from before the slot has origin %q", i, before, e.Origin)
		}
	}
	if !slices.IsSorted(got[:before]) {
		t.Error("what was recovered did not come by id")
	}
}

// The slot is dropped while the bridge is away and some events are delivered and recorded, some delivered alone, and some
// neither: each is in the stream once.
func TestLostSlot(t *testing.T) {
	f := newFixture(t, pgtest.New(t))
	nats := natstest.New(t)
	for round := range 3 {
		r := f.run(f.stream(nats))
		f.put(500)
		f.streamed(nats, round*1300+500)
		f.awaitBacklog(0)
		r.stop()
		cfg := f.config(f.stream(nats))
		cfg.TickEvery = time.Hour
		r = f.runWith(cfg) // delivers, and records nothing
		f.put(300)
		f.streamed(nats, round*1300+800)
		r.stop()
		f.put(500)
		switch round {
		case 0: // by hand
			f.db.Exec(t, "SELECT pg_drop_replication_slot('"+f.slot+"')")
		case 1: // and somebody else made another
			f.db.Exec(t, "SELECT pg_drop_replication_slot('"+f.slot+"')", "UPDATE ebb.slot SET snapshot = NULL, consistent_point = NULL",
				"SELECT pg_create_logical_replication_slot('"+f.slot+"', 'pgoutput')")
		}
	}
	r := f.run(f.stream(nats))
	f.streamed(nats, 3900)
	f.awaitBacklog(0)
	f.put(1)
	f.streamed(nats, 3901)
	r.stop()
	got, _ := f.streamed(nats, 3901)
	sameSet(t, got, f.rows())
	if role := r.role(); role != bridge.RoleNone {
		t.Errorf("stopped as %s", role)
	}
}

// However much was delivered before, a bridge that is killed leaves no more than some ticks' worth for the next one to read again.
func TestLittleIsReadAgain(t *testing.T) {
	f := newFixture(t, pgtest.New(t))
	s := newExactSink()
	cfg := f.config(s)
	cfg.TickEvery = 200 * time.Millisecond
	r := f.runWith(cfg)
	db := f.db.Connect(t)
	const transactions, rows = 400, 20
	began := time.Now()
	for range transactions {
		if _, err := db.Exec(t.Context(), "INSERT INTO ebb.buffer (topic, payload) SELECT 't', '{}' FROM generate_series(1, $1)", rows); err != nil {
			t.Fatal(err)
		}
		time.Sleep(5 * time.Millisecond) // the pace of the producer
	}
	// Killed: it has no time to say how far it has come.
	if _, err := db.Exec(t.Context(), "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = $1", f.slot); err != nil {
		t.Fatal(err)
	}
	took := time.Since(began)
	r.cancel()
	<-r.done
	var again int
	pgtest.Eventually(t, patience, func() (bool, string) {
		err := db.QueryRow(t.Context(), `SELECT count(*) FROM pg_logical_slot_peek_binary_changes($1, NULL, NULL, 'proto_version', '1', 'publication_names', 'ebb')
			WHERE get_byte(data, 0) = ascii('I')`, f.slot).Scan(&again)
		return err == nil, fmt.Sprint(err)
	})
	second := int(float64(transactions*rows) / took.Seconds())
	t.Logf("%d rows in %s; %d are read again, of %d in a second", transactions*rows, took.Round(time.Millisecond), again, second)
	if again > second {
		t.Errorf("%d rows are read again, more than the %d of a second", again, second)
	}
	r = f.run(s)
	s.await(t, transactions*rows)
	r.stop()
	sameOrder(t, ids(t, s.all()), f.rows())
}
