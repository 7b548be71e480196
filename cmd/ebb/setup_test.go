package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os/exec"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"ebb/event"
	"ebb/internal/natstest"
	"ebb/internal/pgtest"
	"ebb/internal/postgres"
)

func TestSetupTwice(t *testing.T) {
	s := newSite(t, pgtest.New(t), "stdout")
	first := s.ebb(t, "setup").must(t)
	for _, line := range []string{"created publication " + s.db.Name, "created slot " + s.db.Name} {
		if !slices.Contains(strings.Split(first.stdout, "\n"), line) {
			t.Errorf("does not say %q: %s", line, first.stdout)
		}
	}
	schema := s.schema(t)
	second := s.ebb(t, "setup").must(t)
	if second.stdout != "everything is set up already\n" || second.stderr != "" {
		t.Errorf("the second time it says %q and %q", second.stdout, second.stderr)
	}
	if again := s.schema(t); again != schema {
		t.Errorf("the second time changed the schema from\n%s\nto\n%s", schema, again)
	}
}

// TestPrintedSetup: what setup prints does what setup does, but for the slot.
func TestPrintedSetup(t *testing.T) {
	applied, printed := newSite(t, pgtest.New(t), "stdout"), newSite(t, pgtest.New(t), "stdout")
	script := ebb(t, applied.args("setup", "--print")...).must(t)
	if script.stderr != "" {
		t.Errorf("logged %s", script.stderr)
	}
	if n := pgtest.Value[int](t, applied.db, "SELECT count(*)::int FROM pg_namespace WHERE nspname = 'ebb'"); n != 0 {
		t.Fatal("--print has made something")
	}
	applied.setup(t)

	psql := exec.Command(pgProgram(t, "psql"), "-X", "-v", "ON_ERROR_STOP=1", "-q", "-d", printed.db.URL)
	psql.Stdin = strings.NewReader(script.stdout)
	psql.Env = environ()
	if out, err := psql.CombinedOutput(); err != nil {
		t.Fatalf("psql: %v\n%s", err, out)
	}
	if a, p := applied.schema(t), printed.schema(t); a != p {
		t.Errorf("setup makes\n%s\nand what it prints makes\n%s", a, p)
	}
	// Only the slots are left to be made.
	r := ebb(t, "setup", "--config", applied.config, "--postgres", printed.db.URL)
	r.stdout = strings.TrimSpace(r.stdout)
	if r.code == exitOK || !strings.Contains(r.stderr, "belongs to database") {
		t.Errorf("the slot is another database's: %+v", r)
	}
	applied.ebb(t, "teardown", "--yes").must(t)
	if r := ebb(t, "setup", "--config", applied.config, "--postgres", printed.db.URL).must(t); r.stdout !=
		"created slot "+applied.db.Name+"\ncreated slot "+applied.db.Name+"_trail\n" {
		t.Errorf("after the printed script setup says %q", r.stdout)
	}
}

// schema is all that setup makes in the database but the slot, as text.
func (s *site) schema(t *testing.T) string {
	t.Helper()
	dump := exec.Command(pgProgram(t, "pg_dump"), "--schema-only", "-d", s.db.URL)
	dump.Env = environ()
	var stderr bytes.Buffer
	dump.Stderr = &stderr
	out, err := dump.Output()
	if err != nil {
		t.Fatalf("pg_dump: %v\n%s", err, stderr.String())
	}
	text := regexp.MustCompile(`(?m)^\\(un)?restrict .*$`).ReplaceAllString(string(out), "") // a new key each time
	if !strings.Contains(text, "CREATE PUBLICATION") || !strings.Contains(text, "CREATE TABLE ebb.buffer") {
		t.Fatalf("the dump holds no schema:\n%s", text)
	}
	return text + pgtest.Value[string](t, s.db, "SELECT string_agg(version || ' ' || name, ', ' ORDER BY version) FROM ebb.migration")
}

func TestStatus(t *testing.T) {
	broker := natstest.New(t)
	s := newSite(t, pgtest.New(t), broker.URL())
	s.setup(t)
	s.put(t, 1)

	// Nobody delivers.
	v := s.statusJSON(t, exitCheck)
	for path, want := range map[string][]string{
		"":          {"backlog", "dead_letters", "delivered", "flow", "lag_seconds", "recovery", "replay", "role", "slot"},
		"slot":      {"active", "confirmed_lsn", "lag_bytes", "name", "retained_wal_bytes", "wal_status"},
		"delivered": {"at", "events", "position"},
		"backlog":   {"estimated", "events", "oldest_age_seconds"},
	} {
		object := any(v)
		if path != "" {
			object = v[path]
		}
		if got := keys(object); !slices.Equal(got, want) {
			t.Errorf("the keys of %q are %q, want %q", path, got, want)
		}
	}
	slot, backlog := v["slot"].(map[string]any), v["backlog"].(map[string]any)
	if slot["name"] != s.db.Name || slot["active"] != false || slot["wal_status"] != "reserved" || slot["lag_bytes"].(float64) <= 0 ||
		slot["retained_wal_bytes"].(float64) < slot["lag_bytes"].(float64) {
		t.Errorf("slot: %v", slot)
	}
	if _, err := event.ParseLSN(slot["confirmed_lsn"].(string)); err != nil {
		t.Error(err)
	}
	if backlog["events"] != 1.0 || backlog["estimated"] != false || backlog["oldest_age_seconds"].(float64) <= 0 || v["lag_seconds"].(float64) <= 0 {
		t.Errorf("backlog: %v, lag_seconds: %v", backlog, v["lag_seconds"])
	}
	if want := map[string]any{"position": nil, "events": 0.0, "at": nil}; !reflect.DeepEqual(v["delivered"], want) {
		t.Errorf("delivered: %v", v["delivered"])
	}
	if v["role"] != "none" || v["flow"] != "open" || v["dead_letters"] != 0.0 || v["replay"] != nil {
		t.Errorf("status: %v", v)
	}
	text := s.ebb(t, "status")
	if text.code != exitCheck || text.stderr != "" {
		t.Errorf("exit code %d, want %d; stderr %q", text.code, exitCheck, text.stderr)
	}
	for _, word := range []string{s.db.Name, "no bridge streams from it", "ebb run", "1 events"} {
		if !strings.Contains(text.stdout, word) {
			t.Errorf("does not say %q:\n%s", word, text.stdout)
		}
	}

	// Somebody does.
	bridge := s.streaming(t)
	delivered(t, broker, 40*time.Second, 1)
	position := broker.Messages(t, "EBB")[0].Header.Get("Ebb-Position")
	pgtest.Eventually(t, 30*time.Second, func() (bool, string) {
		v = s.statusJSON(t, exitOK)
		return v["backlog"].(map[string]any)["events"] == 0.0, fmt.Sprint(v["backlog"])
	})
	slot = v["slot"].(map[string]any)
	d := v["delivered"].(map[string]any)
	if slot["active"] != true || v["role"] != "leader" || d["position"] != position || d["events"] != 1.0 || v["recovery"] != nil || v["lag_seconds"] != 0.0 {
		t.Errorf("status: %v; the event is at %s", v, position)
	}
	if at, err := time.Parse(time.RFC3339Nano, d["at"].(string)); err != nil || time.Since(at).Abs() > time.Minute {
		t.Errorf("delivered at %v: %v", d["at"], err)
	}
	text = s.ebb(t, "status").must(t)
	for _, word := range []string{"streaming", position, "0 events"} {
		if !strings.Contains(text.stdout, word) {
			t.Errorf("does not say %q:\n%s", word, text.stdout)
		}
	}
	bridge.stop(t)
	s.statusJSON(t, exitCheck)
}

func TestVersion(t *testing.T) {
	r := ebb(t, "version").must(t)
	if !regexp.MustCompile(`^ebb \S+ \(go\S+.*, \w+/\w+\)\n$`).MatchString(r.stdout) || r.stderr != "" {
		t.Errorf("printed %q and %q", r.stdout, r.stderr)
	}
	r = ebb(t, "version", "--json").must(t)
	var v map[string]any
	if err := json.Unmarshal([]byte(r.stdout), &v); err != nil || !slices.Equal(keys(v), []string{"arch", "go", "os", "version"}) {
		t.Errorf("printed %s: %v", r.stdout, err)
	}
	if r := ebb(t).must(t); !strings.Contains(r.stdout, "setup") || r.stderr != "" {
		t.Errorf("without a command it prints %q and %q", r.stdout, r.stderr)
	}
}

// TestSecretsStaySecret runs everything with passwords, right and wrong, at the highest log level.
func TestSecretsStaySecret(t *testing.T) {
	const secret, wrong = "s3cr3t-pa55word", "wr0ng-pa55word"
	server := pgtest.NewServer(t, postgres.Config{Password: secret})
	db := server.New(t)
	s := newSite(t, db, "nats://me:"+secret+"@127.0.0.1:1")
	dsn := fmt.Sprintf("host=127.0.0.1 port=%d user=postgres dbname=%s sslmode=disable password=", server.Port(), db.Name)
	debug := []string{"--log-level", "debug"}
	check := func(name string, stdout, stderr string) {
		t.Helper()
		for _, s := range []string{secret, wrong} {
			if strings.Contains(stdout+stderr, s) {
				t.Errorf("%s tells the password: %s%s", name, stdout, stderr)
			}
		}
	}
	for _, args := range [][]string{
		{"setup"}, {"setup", "--postgres", dsn + secret}, {"setup", "--print"}, {"status"}, {"status", "--json"}, {"doctor"},
	} {
		r := s.ebb(t, append(debug, args...)...)
		if r.code != exitOK && r.code != exitCheck {
			t.Errorf("%s: exit code %d: %s", args, r.code, r.stderr)
		}
		check(args[0], r.stdout, r.stderr)
	}
	for _, url := range []string{dsn + wrong, strings.Replace(db.URL, secret, wrong, 1)} {
		for _, command := range [][]string{{"setup"}, {"run"}, {"status"}, {"teardown", "--yes"}} {
			r := s.ebb(t, append(append(debug, command...), "--postgres", url)...)
			r.fails(t, exitFailed, "password authentication failed")
			check(command[0]+" with a wrong password", r.stdout, r.stderr)
		}
	}
	for _, url := range []string{"postgres://me:" + secret + "@[::1", "host=x password=" + secret + " nonsense"} {
		r := ebb(t, "setup", "--postgres", url)
		r.fails(t, exitUsage, "--postgres")
		check("an impossible URL", r.stdout, r.stderr)
	}
	s.put(t, 1)
	for url, waiting := range map[string]string{
		"http://me:" + secret + "@127.0.0.1:1/hook?token=" + secret: "event not delivered",
		"nats://me:" + secret + "@127.0.0.1:1":                      "waiting for the stream",
	} {
		bridge := start(t, nil, s.args(append(debug, "run", "--sink", url)...)...)
		bridge.logs(t, 20*time.Second, waiting)
		bridge.kill() // as it cannot deliver, a drain would take seconds
		check("run", bridge.stdout.String(), bridge.stderr.String())
	}
	r := s.ebb(t, "teardown", "--yes").must(t)
	check("teardown", r.stdout, r.stderr)
}
