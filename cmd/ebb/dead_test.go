package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"ebb/bridge"
	"ebb/internal/pgtest"
	"ebb/sql"
)

// setAside inserts dead letters of the site's slot, each written as "id key reason state", where a key of - is none.
func (s *site) setAside(t *testing.T, letters ...string) {
	t.Helper()
	for i, l := range letters {
		f := strings.Fields(l)
		s.db.Exec(t, fmt.Sprintf(`INSERT INTO ebb.dead_letter (slot, event_id, topic, key, payload, content_type, headers, event_time, position, place, epoch, reason, detail,
				attempts, first_at, last_at, state)
			SELECT '%[1]s', '%[2]s', 't.' || left('%[2]s', 1), nullif('%[3]s', '-'), '{"id":  "%[2]s", "html": "<&>"}', 'application/json', '{"traceparent": "00-1"}',
				'2026-01-01 00:00:00.123456Z', '1:' || place, place, 1, '%[4]s', CASE '%[4]s' WHEN 'queued' THEN '' ELSE 'no ' || '%[2]s' || ' here' END,
				('%[4]s' <> 'queued')::int, at, at, '%[5]s'
			FROM (SELECT '0/' || to_hex(count(*) + 16) || ':1', timestamptz '2026-01-01 00:00Z' + make_interval(mins => %[6]d) FROM ebb.dead_letter) x (place, at)`,
			s.db.Name, f[0], f[1], f[2], f[3], i))
	}
}

// setAsideStates are the states of all dead letters, in order, as "id:state".
func (s *site) setAsideStates(t *testing.T) string {
	t.Helper()
	return pgtest.Value[string](t, s.db, "SELECT coalesce(string_agg(event_id || ':' || state, ' ' ORDER BY number), '') FROM ebb.dead_letter")
}

// standIn leads on the site's slot, and does nothing but what it is told to do about dead letters, when it is notified for the first time.
func (s *site) standIn(t *testing.T, deliver func(*pgx.Conn)) (resign func()) {
	t.Helper()
	conn := s.db.Connect(t)
	if ok, err := sql.TryLead(t.Context(), conn, s.db.Name); !ok || err != nil {
		t.Fatalf("the lead cannot be had: %v", err)
	}
	if _, err := conn.Exec(t.Context(), "LISTEN ebb_dead"); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	done := make(chan struct{})
	go func() {
		defer close(done)
		n, err := conn.WaitForNotification(ctx)
		if ctx.Err() != nil {
			return
		}
		if err != nil || n.Payload != s.db.Name {
			t.Errorf("notified of %+v, %v", n, err)
			return
		}
		deliver(conn)
	}()
	resign = func() {
		cancel()
		<-done
	}
	t.Cleanup(resign)
	return resign
}

// exec runs statements in a goroutine of a test.
func execAll(t *testing.T, conn *pgx.Conn, statements ...string) {
	for _, st := range statements {
		if _, err := conn.Exec(context.Background(), st); err != nil {
			t.Errorf("%s: %v", st, err)
		}
	}
}

func (s *site) dead(t *testing.T, args ...string) result {
	t.Helper()
	return s.ebb(t, append([]string{"dead"}, args...)...)
}

// records are lines of JSON.
func records(t *testing.T, out string) []map[string]any {
	t.Helper()
	var all []map[string]any
	for line := range strings.Lines(out) {
		var v map[string]any
		if err := json.Unmarshal([]byte(line), &v); err != nil {
			t.Fatalf("printed %q: %v", line, err)
		}
		all = append(all, v)
	}
	return all
}

// fieldsOf are the first words of the lines of a table, without its head.
func fieldsOf(out string) []string {
	var first []string
	for line := range strings.Lines(out) {
		first = append(first, strings.Fields(line)[0])
	}
	return first[1:]
}

func TestDeadUsage(t *testing.T) {
	const nowhere = "postgres://nobody@127.0.0.1:1/none"
	for _, c := range []struct {
		args  string
		words []string
	}{
		{"dead lost", []string{`"lost"`, "ebb dead --help"}},
		{"dead list 7", []string{"ebb dead list", `"7"`}},
		{"dead list --limit -1", []string{"--limit -1"}},
		{"dead list --state odd", []string{`--state "odd"`, "parked, retrying, delivered, discarded or all"}},
		{"dead list --since soon", []string{`--since "soon"`, "90m"}},
		{"dead list --since -5m", []string{`--since "-5m"`}},
		{"dead list --since 2999-01-01T00:00:00Z", []string{"has passed"}},
		{"dead list", []string{"postgres", "EBB_POSTGRES"}},
		{"dead show --postgres " + nowhere, []string{"ebb dead show", "id", "ebb dead list"}},
		{"dead retry --postgres " + nowhere, []string{"ids", "--topic", "--all"}},
		{"dead discard --postgres " + nowhere, []string{"ids", "--topic", "--all"}},
		{"dead retry 7 --all", []string{"--all"}},
		{"dead discard --all --topic t", []string{"--all"}},
		{"dead retry --since never", []string{"--since"}},
		{"dead retry --no-wait 7", []string{"--no-wait"}},
	} {
		r := ebb(t, strings.Fields(c.args)...)
		r.fails(t, exitUsage, c.words...)
		if strings.Count(r.stderr, "\n") != 1 {
			t.Errorf("%s: more than one line: %s", c.args, r.stderr)
		}
	}
	if r := ebb(t, "dead").must(t); !strings.Contains(r.stdout, "retry") || !strings.Contains(r.stdout, "discard") {
		t.Errorf("printed %s", r.stdout)
	}
	if r := ebb(t, "dead", "retry", "--help").must(t); !strings.Contains(r.stdout, "ebb dead retry --all") {
		t.Errorf("printed %s", r.stdout)
	}
}

func TestDeadList(t *testing.T) {
	s := newSite(t, pgtest.New(t), "stdout")
	s.dead(t, "list").fails(t, exitFailed, "ebb setup")
	s.setup(t)
	newSite(t, &pgtest.Database{Name: "another", URL: s.db.URL}, "stdout").dead(t, "list").fails(t, exitFailed, `slot "another"`, "ebb setup")
	if r := s.dead(t, "list").must(t); r.stdout != "there are no dead letters that match\n" {
		t.Errorf("printed %q", r.stdout)
	}
	if r := s.dead(t, "list", "--json").must(t); r.stdout != "" {
		t.Errorf("printed %q", r.stdout)
	}
	s.setAside(t, "a1 order-7 rejected parked", "b1 order-8 timeout retrying", "a2 order-7 queued parked", "x - rejected parked", "d order-7 rejected discarded")
	want := `EVENT  TOPIC  KEY      STATE     REASON    ATTEMPTS  FIRST                 LAST                  BEHIND
x      t.x    -        parked    rejected  1         2026-01-01T00:03:00Z  2026-01-01T00:03:00Z  0
b1     t.b    order-8  retrying  timeout   1         2026-01-01T00:01:00Z  2026-01-01T00:01:00Z  0
a1     t.a    order-7  parked    rejected  1         2026-01-01T00:00:00Z  2026-01-01T00:00:00Z  1
3 queues with 4 events
`
	if r := s.dead(t, "list").must(t); r.stdout != want {
		t.Errorf("printed\n%s\nwant\n%s", r.stdout, want)
	}
	for _, c := range []struct {
		args string
		want []string
		last string
	}{
		{"--limit 2", []string{"x", "b1"}, "2 lines of 3 queues with 4 events; --limit 0 prints all"},
		{"--key order-7", []string{"a1"}, "1 queue with 2 events"},
		{"--reason queued", []string{"a1"}, "1 queue with 2 events"},
		{"--reason queued --each", []string{"a2"}, "1 event"},
		{"--topic t.x --topic t.b", []string{"x", "b1"}, "2 queues with 2 events"},
		{"--since 2026-01-01T00:02:30Z", []string{"x"}, "1 queue with 1 event"},
		{"--each --limit 3", []string{"x", "a2", "b1"}, "3 lines of 4 events; --limit 0 prints all"},
		{"--state discarded,retrying", []string{"d", "b1"}, "2 events"},
		{"--state all --key order-7", []string{"d", "a2", "a1"}, "3 events"},
		{"--state parked --each", []string{"x", "a2", "a1"}, "3 events"},
	} {
		lines := strings.Split(strings.TrimSpace(s.dead(t, append([]string{"list"}, strings.Fields(c.args)...)...).must(t).stdout), "\n")
		got := fieldsOf(strings.Join(lines[:len(lines)-1], "\n"))
		if last := lines[len(lines)-1]; !slices.Equal(got, c.want) || last != c.last {
			t.Errorf("%s: listed %q and %q, want %q and %q", c.args, got, last, c.want, c.last)
		}
	}
	if r := s.dead(t, "list", "--each", "--key", "order-7").must(t); !strings.Contains(r.stdout, "2 of 2\n") {
		t.Errorf("printed %s", r.stdout)
	}

	s.db.Exec(t, fmt.Sprintf(`INSERT INTO ebb.dead_letter (slot, event_id, topic, key, payload_bytes, content_type, event_time, position, place, epoch, reason, attempts, first_at, last_at, state)
		SELECT '%s', 'n' || n, 't', E'\x1b[31m' || repeat('k', 100), '\xff00', 'x/y', now(), '1:0/10:1', '0/10:1', 1, 'rejected', 1, now(), now(), 'parked' FROM generate_series(1, 100) n`, s.db.Name))
	// JSON is not cut short unless that is asked for.
	all := records(t, s.dead(t, "list", "--each", "--json").must(t).stdout)
	if len(all) != 104 || len(records(t, s.dead(t, "list", "--each", "--json", "--limit", "7").must(t).stdout)) != 7 {
		t.Errorf("%d records", len(all))
	}
	if got := all[0]; got["payload"] != nil || got["payload_bytes"] != "/wA=" || got["headers"] != nil {
		t.Errorf("the first record is %v", got)
	}
	lines := strings.Split(s.dead(t, "list", "--each").must(t).stdout, "\n")
	if len(lines) != 53 || strings.Contains(strings.Join(lines, ""), "\x1b") || !strings.Contains(lines[1], `"\x1b[31mkkk`) || strings.Contains(lines[1], strings.Repeat("k", 50)) {
		t.Errorf("%d lines, the second of which is %q", len(lines), lines[1])
	}

	one := records(t, s.dead(t, "list", "--key", "order-7", "--json").must(t).stdout)
	if len(one) != 2 {
		t.Fatalf("%d records", len(one))
	}
	head := one[slices.IndexFunc(one, func(r map[string]any) bool { return r["queue_place"] == 1.0 })]
	if got, want := keys(head), []string{"attempts", "content_type", "decided_at", "decided_by", "destination", "detail", "event_id", "event_time", "fault", "first_at", "headers", "key",
		"last_at", "number", "payload", "payload_bytes", "position", "queue_length", "queue_place", "reason", "state", "stream_seq", "topic"}; !slices.Equal(got, want) {
		t.Errorf("a record has %q, want %q", got, want)
	}
	if got := head; got["event_id"] != "a1" || got["queue_length"] != 2.0 || got["state"] != "parked" || got["key"] != "order-7" || got["decided_by"] != nil ||
		got["first_at"] != "2026-01-01T00:00:00Z" || got["headers"].(map[string]any)["traceparent"] != "00-1" {
		t.Errorf("the record is %v", got)
	}
}

func TestDeadShow(t *testing.T) {
	s := newSite(t, pgtest.New(t), "stdout")
	s.setup(t)
	s.setAside(t, "a1 order-7 rejected parked", "a2 order-7 queued parked", "x - rejected discarded", "x - rejected parked")
	want := `event      a1
topic      t.a
key        order-7
committed  2026-01-01T00:00:00.123456Z, at position 1:0/10:1
state      parked
reason     rejected
detail     no a1 here
attempts   1, from 2026-01-01T00:00:00Z to 2026-01-01T00:00:00Z
queue      number 1 of 2: a1, a2
headers    {"traceparent": "00-1"}
payload    application/json, 28 bytes
{"id":  "a1", "html": "<&>"}
`
	if r := s.dead(t, "show", "a1").must(t); r.stdout != want {
		t.Errorf("printed\n%s\nwant\n%s", r.stdout, want)
	}
	if r := s.dead(t, "show", "a2").must(t); !strings.Contains(r.stdout, "attempts   0, set aside at 2026-01-01T00:01:00Z\n") || !strings.Contains(r.stdout, "number 2 of 2: a1, a2") {
		t.Errorf("printed\n%s", r.stdout)
	}
	s.db.Exec(t, "UPDATE ebb.dead_letter SET decided_by = 'ops', decided_at = '2026-01-02 00:00Z' WHERE state = 'discarded'")
	r := s.dead(t, "show", "x").must(t)
	for _, word := range []string{"state      parked\n", "state      discarded\n           discarded by ops at 2026-01-02T00:00:00Z\n", "queue      alone, as it has no key\n"} {
		if strings.Count(r.stdout, "event      x\n") != 2 || strings.Count(r.stdout, word) != 1 {
			t.Errorf("printed without %q\n%s", word, r.stdout)
		}
	}
	s.dead(t, "show", "none").fails(t, exitFailed, `"none"`, "ebb dead list")
	if all := records(t, s.dead(t, "show", "x", "a1", "--json").must(t).stdout); len(all) != 3 || all[2]["event_id"] != "a1" ||
		all[2]["payload"].(map[string]any)["html"] != "<&>" {
		t.Errorf("printed %v", all)
	}
	if r := s.dead(t, "show", "a1", "--json").must(t); !strings.Contains(r.stdout, `"payload":{"id":"a1","html":"<&>"}`) {
		t.Errorf("the payload is changed: %s", r.stdout)
	}

	// What a producer or a receiver wrote is no command to the terminal.
	s.db.Exec(t, `UPDATE ebb.dead_letter SET detail = E'\x1b[2J', payload = NULL, payload_bytes = 'two\012lines \033[2J', stream_seq = 7, destination = 'nats EBB' WHERE event_id = 'a1'`,
		`UPDATE ebb.dead_letter SET payload = NULL, payload_bytes = '\xff', decided_by = 'ops', decided_at = now() WHERE event_id = 'a2'`)
	r = s.dead(t, "show", "a1", "a2").must(t)
	for _, word := range []string{`detail     \x1b[2J`, "two\nlines \\x1b[2J\n", "in base64\n/w==\n", "at sequence number 7 in nats EBB", "retry asked for by ops at"} {
		if !strings.Contains(r.stdout, word) {
			t.Errorf("printed without %q\n%s", word, r.stdout)
		}
	}
	if strings.Contains(r.stdout, "\x1b") {
		t.Errorf("printed %q", r.stdout)
	}

	for i := range 30 {
		s.setAside(t, fmt.Sprintf("m%d many queued parked", i))
	}
	if r := s.dead(t, "show", "m25").must(t); !strings.Contains(r.stdout, "number 26 of 30: m0, m1,") || !strings.Contains(r.stdout, "m19, and 10 more\n") {
		t.Errorf("printed\n%s", r.stdout)
	}
}

// Retry has the bridge deliver a queue, and says what came of it.
func TestDeadRetry(t *testing.T) {
	s := newSite(t, pgtest.New(t), "stdout")
	s.setup(t)
	reset := func(letters ...string) {
		t.Helper()
		s.db.Exec(t, "DELETE FROM ebb.dead_letter")
		s.setAside(t, letters...)
	}

	// Without a bridge.
	reset("a1 order-7 rejected parked", "a2 order-7 queued parked", "d - rejected delivered", "g - rejected discarded")
	r := s.dead(t, "retry", "a2").must(t)
	if r.stdout != "retrying 2 events in 1 queue: 1 as asked for, and 1 of the same keys, in order\nno bridge runs: the next ebb run delivers 2 events\n" {
		t.Errorf("printed %q", r.stdout)
	}
	if got := s.setAsideStates(t); got != "a1:retrying a2:retrying d:delivered g:discarded" {
		t.Errorf("now %s", got)
	}
	if r := s.dead(t, "retry", "--all", "--json").must(t); r.stdout != `{"events":2,"delivered":0,"parked":0,"discarded":0,"gone":0,"retrying":2}`+"\n" {
		t.Errorf("printed %q", r.stdout)
	}
	s.dead(t, "retry", "a1", "none").fails(t, exitFailed, `"none"`, "no such dead letter")
	s.dead(t, "retry", "g").fails(t, exitFailed, `"g"`, "discarded")
	if r := s.dead(t, "retry", "d").must(t); r.stdout != "event d is delivered already\n" {
		t.Errorf("printed %q", r.stdout)
	}
	if r := s.dead(t, "retry", "--topic", "none").must(t); r.stdout != "there is nothing to retry\n" {
		t.Errorf("printed %q", r.stdout)
	}
	if r := s.dead(t, "retry", "--topic", "none", "--json").must(t); r.stdout != `{"events":0,"delivered":0,"parked":0,"discarded":0,"gone":0,"retrying":0}`+"\n" {
		t.Errorf("printed %q", r.stdout)
	}

	t.Run("all are delivered", func(t *testing.T) {
		reset("a1 order-7 rejected parked", "a2 order-7 queued parked", "b1 order-8 rejected parked")
		resign := s.standIn(t, func(conn *pgx.Conn) {
			execAll(t, conn, "UPDATE ebb.dead_letter SET state = 'delivered' WHERE event_id = 'a1'", "SELECT pg_sleep(0.7)",
				"UPDATE ebb.dead_letter SET state = 'delivered' WHERE state = 'retrying'")
		})
		defer resign()
		r := s.dead(t, "retry", "--key", "order-7").must(t)
		if r.stdout != "retrying 2 events in 1 queue\n2 events delivered\n" || r.stderr != "" {
			t.Errorf("printed %q and %q", r.stdout, r.stderr)
		}
		if got := s.setAsideStates(t); got != "a1:delivered a2:delivered b1:parked" {
			t.Errorf("now %s", got)
		}
	})
	t.Run("some are parked again", func(t *testing.T) {
		reset("a1 order-7 rejected parked", "a2 order-7 queued parked", "a3 order-7 queued parked", "x - rejected parked", "y - rejected parked", "z - rejected parked")
		resign := s.standIn(t, func(conn *pgx.Conn) {
			execAll(t, conn, "UPDATE ebb.dead_letter SET state = 'delivered' WHERE event_id = 'a1'",
				"UPDATE ebb.dead_letter SET state = 'parked', reason = CASE event_id WHEN 'a2' THEN 'HTTP 422' ELSE reason END, detail = E'bad\ntotal' WHERE event_id IN ('a2', 'a3')",
				"UPDATE ebb.dead_letter SET state = 'discarded' WHERE event_id = 'x'", "UPDATE ebb.dead_letter SET state = 'parked' WHERE event_id = 'y'",
				"UPDATE ebb.dead_letter SET number = DEFAULT WHERE event_id = 'z'")
		})
		defer resign()
		r := s.dead(t, "retry", "--all")
		want := "retrying 6 events in 4 queues\n1 event delivered\n1 event discarded meanwhile\n1 event not there any more, as a replay has come by, or long delivered\n" +
			"event a2 of key order-7 is parked again: HTTP 422: bad\\ntotal\nevent y is parked again: rejected: no y here\n"
		if r.code != exitFailed || r.stdout != want || r.stderr != "ebb: 3 events are parked again; ebb dead list shows them\n" {
			t.Errorf("exit code %d, printed %q and %q, want %q", r.code, r.stdout, r.stderr, want)
		}
	})
	t.Run("as JSON", func(t *testing.T) {
		reset("x - rejected parked", "y - rejected parked")
		resign := s.standIn(t, func(conn *pgx.Conn) {
			execAll(t, conn, "UPDATE ebb.dead_letter SET state = CASE event_id WHEN 'x' THEN 'delivered' ELSE 'parked' END")
		})
		defer resign()
		r := s.dead(t, "retry", "--all", "--json")
		all := records(t, r.stdout)
		if last := all[len(all)-1]; r.code != exitFailed || last["delivered"] != 1.0 || last["parked"] != 1.0 || last["retrying"] != 0.0 {
			t.Errorf("exit code %d, printed %s", r.code, r.stdout)
		}
		if r.stderr != "ebb: 1 event is parked again; ebb dead list shows it\n" {
			t.Errorf("stderr is %q", r.stderr)
		}
	})
	t.Run("interrupted", func(t *testing.T) {
		reset("x - rejected parked", "y - rejected parked")
		began := make(chan struct{})
		resign := s.standIn(t, func(conn *pgx.Conn) {
			execAll(t, conn, "UPDATE ebb.dead_letter SET state = 'delivered' WHERE event_id = 'x'")
			close(began)
		})
		defer resign()
		p := start(t, nil, s.args("dead", "retry", "--all")...)
		<-began
		p.logsNothing(t, time.Second)
		if err := p.cmd.Process.Signal(syscall.SIGINT); err != nil {
			t.Fatal(err)
		}
		if code := p.ended(t, 30*time.Second); code != exitOK || !strings.HasSuffix(p.stdout.String(),
			"\nthe retry of 1 event goes on in the bridge: ebb dead list --state retrying shows what is left\n") {
			t.Errorf("exit code %d, printed %q", code, p.stdout.String())
		}
		if got := s.setAsideStates(t); got != "x:delivered y:retrying" {
			t.Errorf("now %s", got)
		}
	})
	t.Run("the bridge ends", func(t *testing.T) {
		reset("x - rejected parked", "y - rejected parked")
		resign := s.standIn(t, func(conn *pgx.Conn) {
			execAll(t, conn, "UPDATE ebb.dead_letter SET state = 'parked' WHERE event_id = 'x'", "SELECT pg_sleep(1)")
			conn.Close(context.Background())
		})
		defer resign()
		r := s.dead(t, "retry", "--all")
		if r.code != exitFailed || !strings.Contains(r.stdout, "\nno bridge runs: the next ebb run delivers 1 event\nevent x is parked again") {
			t.Errorf("exit code %d, printed %q and %q", r.code, r.stdout, r.stderr)
		}
	})
	t.Run("the server ends the session", func(t *testing.T) {
		reset("x - rejected parked")
		resign := s.standIn(t, func(conn *pgx.Conn) {
			execAll(t, conn, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = '"+s.db.Name+" dead'")
		})
		defer resign()
		r := s.dead(t, "retry", "x")
		if r.code != exitFailed || !strings.Contains(r.stderr, "what is retried goes on all the same") {
			t.Errorf("exit code %d, printed %q and %q", r.code, r.stdout, r.stderr)
		}
	})
}

// logsNothing checks that the program is still at work after a while, without having said anything on stderr.
func (p *program) logsNothing(t *testing.T, d time.Duration) {
	t.Helper()
	select {
	case <-p.done:
		t.Fatalf("it has ended: %s", p.cmd.ProcessState)
	case <-time.After(d):
	}
	if p.stderr.String() != "" {
		t.Errorf("stderr is %q", p.stderr.String())
	}
}

func TestDeadDiscard(t *testing.T) {
	s := newSite(t, pgtest.New(t), "stdout")
	s.setup(t)
	s.setAside(t, "a1 order-7 rejected parked", "a2 order-7 queued parked", "a3 order-7 queued parked", "x - rejected parked", "d - rejected delivered")
	before := s.setAsideStates(t)
	s.dead(t, "discard", "x").fails(t, exitUsage, "--yes")
	s.dead(t, "discard", "x", "none", "--yes").fails(t, exitFailed, `"none"`)
	s.dead(t, "discard", "d", "--yes").fails(t, exitFailed, "event d is delivered already")
	if r := s.dead(t, "discard", "--topic", "none").must(t); r.stdout != "there is nothing to discard\n" {
		t.Errorf("printed %q", r.stdout)
	}
	if after := s.setAsideStates(t); after != before {
		t.Errorf("changed to %s", after)
	}
	if r := s.dead(t, "discard", "a1", "--yes").must(t); r.stdout != "discarded 1 event\nthe bridge delivers what was queued behind: 2 events\n" {
		t.Errorf("printed %q", r.stdout)
	}
	if r := s.dead(t, "discard", "a1", "--yes").must(t); r.stdout != "there is nothing to discard\n" {
		t.Errorf("printed %q", r.stdout)
	}
	r := s.dead(t, "discard", "x", "d", "--yes")
	if r.code != exitFailed || r.stdout != "discarded 1 event\n" || !strings.Contains(r.stderr, "event d is delivered already") {
		t.Errorf("exit code %d, printed %q and %q", r.code, r.stdout, r.stderr)
	}
	if got := s.setAsideStates(t); got != "a1:discarded a2:retrying a3:retrying x:discarded d:delivered" {
		t.Errorf("now %s", got)
	}
	if r := s.dead(t, "discard", "--all", "--yes", "--json").must(t); r.stdout != `{"delivered":0,"discarded":2,"gone":0,"retrying":0}`+"\n" {
		t.Errorf("printed %q", r.stdout)
	}
}

// What is discarded is what was asked about: not what has come since, nor what was delivered meanwhile.
func TestDeadDiscardAsks(t *testing.T) {
	s := newSite(t, pgtest.New(t), "stdout")
	s.setup(t)
	for i := range 8 {
		s.setAside(t, fmt.Sprintf("x%d - rejected parked", i))
	}
	conn := s.db.Connect(t)
	cfg, _, err := (&app{file: s.config, logLevel: "info", logFormat: "text"}).load()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	d := &dead{cfg: cfg, db: conn, out: &out, err: &out}
	var question string
	err = d.discard(t.Context(), sql.DeadFilter{}, func(q string) error {
		question = q
		s.db.Exec(t, "UPDATE ebb.dead_letter SET state = 'delivered' WHERE event_id IN ('x1', 'x2')", "UPDATE ebb.dead_letter SET number = DEFAULT WHERE event_id = 'x3'")
		s.setAside(t, "late - rejected parked")
		return nil
	})
	if want := fmt.Sprintf("Discard 8 events of slot %s, never to be delivered: x0 (t.x), x1 (t.x), x2 (t.x), x3 (t.x), x4 (t.x), and 3 more?", s.db.Name); question != want {
		t.Errorf("asked %q, want %q", question, want)
	}
	if err == nil || err.Error() != "2 events are delivered already: event x1 and others" {
		t.Errorf("error %v", err)
	}
	if want := "discarded 5 events\n1 event discarded by somebody else meanwhile, or moved by a replay\n"; out.String() != want {
		t.Errorf("printed %q, want %q", out.String(), want)
	}
	if got := s.setAsideStates(t); got != "x0:discarded x1:delivered x2:delivered x4:discarded x5:discarded x6:discarded x7:discarded x3:parked late:parked" {
		t.Errorf("now %s", got)
	}
	no := errors.New("no")
	if err := d.discard(t.Context(), sql.DeadFilter{IDs: []string{"late"}}, func(string) error { return no }); !errors.Is(err, no) {
		t.Errorf("a no gives %v", err)
	}
	if got := s.setAsideStates(t); !strings.HasSuffix(got, "late:parked") {
		t.Errorf("discarded in spite of a no: %s", got)
	}
}

// Members of ebb_bridge decide; a producer is told what it lacks.
func TestDeadRoles(t *testing.T) {
	s := newSite(t, pgtest.New(t), "stdout")
	s.setup(t)
	s.setAside(t, "x - rejected parked", "y - rejected parked")
	for _, role := range []string{"bridge", "producer"} {
		name := "t_" + role + "_of_" + s.db.Name
		s.setupRole(t, name, "")
		s.db.Exec(t, "GRANT ebb_"+role+" TO "+name)
		for _, args := range []string{"list", "show x", "retry x", "discard y --yes"} {
			r := ebbWith(t, func(cmd *exec.Cmd) { cmd.Env = environ() }, s.args(append([]string{"dead", "--postgres", s.urlOf(name)}, strings.Fields(args)...)...)...)
			if role == "bridge" {
				r.must(t)
			} else {
				r.fails(t, exitFailed, name, "GRANT ebb_bridge TO")
			}
		}
	}
	if got := pgtest.Value[string](t, s.db, "SELECT string_agg(event_id || ' ' || state || ' by ' || decided_by, ', ' ORDER BY number) FROM ebb.dead_letter"); got !=
		fmt.Sprintf("x retrying by t_bridge_of_%s, y discarded by t_bridge_of_%[1]s", s.db.Name) {
		t.Errorf("now %s", got)
	}
}

// Status and doctor name what is set aside, and where to look.
func TestDeadIsNamed(t *testing.T) {
	var b strings.Builder
	if err := printStatus(&b, &bridge.Status{DeadLetters: 3}); err != nil || !strings.Contains(b.String(), "\ndead letters  3 events set aside: ebb dead list shows them") {
		t.Errorf("%v\n%s", err, b.String())
	}
	b.Reset()
	if err := printStatus(&b, &bridge.Status{}); err != nil || strings.Contains(b.String(), "dead") {
		t.Errorf("%v\n%s", err, b.String())
	}

	s := newSite(t, pgtest.New(t), "stdout")
	s.setup(t)
	found(t, s.doctor(t, exitOK), "dead_letters", stateOK, "nothing is set aside")
	s.setAside(t, "x - rejected delivered", "y - rejected discarded", "a - timeout retrying")
	found(t, s.doctor(t, exitOK), "dead_letters", stateWarn, "1 event being retried", "ebb dead list")
	s.setAside(t, "b - rejected parked", "c - rejected parked")
	found(t, s.doctor(t, exitOK), "dead_letters", stateWarn, "2 events parked, and 1 being retried", "ebb dead list", "ebb dead retry", "ebb dead discard")
}

// The SQL of the guide works.
func TestDeadLettersGuide(t *testing.T) {
	guide, err := os.ReadFile("../../docs/dead-letters.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := strings.Split(string(guide), "```sql\n")[1:]
	if len(blocks) != 4 {
		t.Fatalf("the guide has %d blocks of SQL", len(blocks))
	}
	for i := range blocks {
		blocks[i], _, _ = strings.Cut(blocks[i], "```")
	}
	s := newSite(t, pgtest.New(t), "stdout")
	s.setup(t)
	s.db.Exec(t, "CREATE TABLE orders (id int, state text)", "INSERT INTO orders VALUES (7, 'paid')", "CREATE ROLE support_"+s.db.Name)
	t.Cleanup(func() { s.db.Exec(t, "DROP OWNED BY support_"+s.db.Name, "DROP ROLE support_"+s.db.Name) })
	s.setAside(t, "4711 order-7 rejected discarded", "4715 order-7 queued parked", "old - rejected discarded")
	s.db.Exec(t, "UPDATE ebb.dead_letter SET decided_at = now() - CASE event_id WHEN 'old' THEN interval '2 years' ELSE '0' END WHERE state = 'discarded'")
	for statement := range strings.SplitSeq(blocks[0], ";") {
		if strings.Contains(statement, "orders") {
			if got := pgtest.Value[string](t, s.db, "SELECT o.topic FROM ("+statement+") o (id, order_state, topic, state, reason, detail)"); got != "t.4" {
				t.Errorf("of order 7 there is %s", got)
			}
		}
		s.db.Exec(t, statement)
	}
	s.db.Exec(t, "UPDATE ebb.dead_letter SET fault = 'x' WHERE event_id = '4715'")
	s.db.Exec(t, blocks[1])
	if got := pgtest.Value[string](t, s.db, "SELECT (payload ->> 'order') || coalesce(fault, '') FROM ebb.dead_letter WHERE event_id = '4715'"); got != "7" {
		t.Errorf("mended: %s", got)
	}
	s.db.Exec(t, blocks[2])
	if got := s.setAsideStates(t); got != "4711:discarded 4715:parked" {
		t.Errorf("now %s", got)
	}
	s.db.Exec(t, blocks[3])
	if got := pgtest.Value[string](t, s.db, "SELECT topic || ' ' || key || ' ' || (payload ->> 'id') || ' ' || (headers ->> 'traceparent') FROM ebb.buffer"); got != "t.4 order-7 4711 00-1" {
		t.Errorf("put again: %s", got)
	}
	_, grant, ok := strings.Cut(string(guide), "(`GRANT ")
	grant, _, _ = strings.Cut(grant, "`)")
	if !ok {
		t.Fatal("the guide grants nothing")
	}
	for statement := range strings.SplitSeq("GRANT "+strings.ReplaceAll(grant, "support", "support_"+s.db.Name), ";") {
		s.db.Exec(t, statement)
	}
	s.db.Exec(t, "SET ROLE support_"+s.db.Name+"; SELECT * FROM ebb.dead_letter; RESET ROLE")
}
