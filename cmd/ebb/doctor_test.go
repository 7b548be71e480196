package main

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"ebb/internal/natstest"
	"ebb/internal/pgtest"
	"ebb/internal/postgres"
)

// doctor runs ebb doctor --json, whose exit code must be as given, and returns the findings by check.
func (s *site) doctor(t *testing.T, code int, args ...string) map[string]finding {
	t.Helper()
	r := s.ebb(t, append([]string{"doctor", "--json"}, args...)...)
	if r.code != code || r.stderr != "" {
		t.Errorf("ebb doctor: exit code %d, want %d; %s%s", r.code, code, r.stdout, r.stderr)
	}
	var v struct {
		OK     *bool
		Checks []finding
	}
	if err := json.Unmarshal([]byte(r.stdout), &v); err != nil || v.OK == nil || *v.OK != (code == exitOK) || len(v.Checks) != len(checks) {
		t.Fatalf("ebb doctor --json printed %q: %v", r.stdout, err)
	}
	findings := map[string]finding{}
	for i, f := range v.Checks {
		if f.Check != checks[i].name || f.Text == "" || f.State == stateFail && f.Mend == "" {
			t.Errorf("finding %+v", f)
		}
		findings[f.Check] = f
	}
	return findings
}

// found checks what a doctor says of one thing, and that nothing else fails.
func found(t *testing.T, findings map[string]finding, name string, want state, words ...string) {
	t.Helper()
	for _, f := range findings {
		if f.Check != name && f.State == stateFail {
			t.Errorf("%s fails as well: %s", f.Check, f.Text)
		}
	}
	f := findings[name]
	if f.State != want {
		t.Errorf("%s is %s, want %s: %s", name, f.State, want, f.Text)
	}
	for _, word := range words {
		if !strings.Contains(f.Text+" -> "+f.Mend, word) {
			t.Errorf("%s does not say %q: %s -> %s", name, word, f.Text, f.Mend)
		}
	}
}

func TestDoctor(t *testing.T) {
	t.Parallel()
	server := pgtest.NewServer(t, postgres.Config{})
	db := server.New(t)
	broker := natstest.New(t)
	s := newSite(t, db, broker.URL(), "flow: {limit: 64MB}")
	set := func(name, value string) {
		t.Helper()
		if err := server.SetSetting(t.Context(), name, value); err != nil {
			t.Fatal(err)
		}
	}
	reset := func(name string) {
		t.Helper()
		if err := server.ResetSetting(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	nowhere := strings.Replace(db.URL, db.Name, "nowhere", 1)
	found(t, s.doctor(t, exitCheck, "--postgres", nowhere), "server", stateFail, "nowhere", "does not exist")
	found(t, s.doctor(t, exitCheck), "role", stateFail, "ebb_bridge", "ebb setup")

	if r := s.ebb(t, "setup").must(t); !strings.Contains(r.stderr, "hang") || !strings.Contains(r.stderr, "FIRST 1") {
		t.Errorf("setup does not say what to set: %s", r.stderr)
	}
	findings := s.doctor(t, exitOK)
	found(t, findings, "slot", stateWarn, "no bridge", "ebb run")
	found(t, findings, "flow", stateOK, "64MB")
	found(t, findings, "inline", stateOff, "synchronous_standby_names is empty", "hang", `FIRST 1 ("`+db.Name+`")`, "local")
	text := s.ebb(t, "doctor").must(t)
	if !strings.Contains(text.stdout, "-> start ebb run") || strings.Count(text.stdout, "\n") < len(checks) {
		t.Errorf("printed\n%s", text.stdout)
	}

	name := db.Name + "_r"
	db.Exec(t, "CREATE ROLE "+name+" LOGIN")
	as := func() map[string]finding { return s.doctor(t, exitCheck, "--postgres", s.urlOf(name)) }
	found(t, as(), "role", stateFail, name, "GRANT ebb_bridge TO")
	db.Exec(t, "GRANT ebb_bridge TO "+name)
	found(t, as(), "role", stateFail, name, "ALTER ROLE", "REPLICATION")
	db.Exec(t, "ALTER ROLE "+name+" REPLICATION")
	found(t, s.doctor(t, exitOK, "--postgres", s.urlOf(name)), "role", stateOK)

	bridge := start(t, nil, s.args("run", "--postgres", s.urlOf(name))...)
	bridge.logs(t, 20*time.Second, "msg=streaming")
	found(t, s.doctor(t, exitOK), "slot", stateOK, "reserved")

	// Limits.
	set("max_slot_wal_keep_size", "64MB")
	found(t, s.doctor(t, exitOK), "flow", stateWarn, "max_slot_wal_keep_size", "flow.limit", "64MB")
	if r := s.ebb(t, "setup").must(t); !strings.Contains(r.stderr, "max_slot_wal_keep_size") {
		t.Errorf("setup does not warn: %s", r.stderr)
	}
	reset("max_slot_wal_keep_size")
	db.Exec(t, "UPDATE ebb.flow SET limit_bytes = 7")
	found(t, s.doctor(t, exitOK), "flow", stateWarn, "limit 7,", "ebb setup")
	if r := s.ebb(t, "setup").must(t); r.stdout != "set the flow limits\n" || r.stderr != "" {
		t.Errorf("setup says %q and %q", r.stdout, r.stderr)
	}

	// COMMITs that wait for delivery.
	for _, c := range []struct{ names, words string }{
		{"*", "whichever"},
		{"ANY 1 (%s, a)", "ANY"},
		{"ANY 1 (%s)", "ANY"},
		{"%s, standby1", "another"},
		{"FIRST 2 (standby1, %s)", "mixes"},
	} {
		set("synchronous_commit", "local")
		set("synchronous_standby_names", strings.ReplaceAll(c.names, "%s", db.Name))
		found(t, s.doctor(t, exitCheck), "inline", stateFail, c.words, `FIRST 1 ("`+db.Name+`")`)
		if r := s.ebb(t, "setup").must(t); !strings.Contains(r.stderr, c.words) {
			t.Errorf("setup with %s says %s", c.names, r.stderr)
		}
	}
	set("synchronous_standby_names", "standby1, standby2")
	found(t, s.doctor(t, exitOK), "inline", stateOff, "standby1")
	set("synchronous_standby_names", fmt.Sprintf(`FIRST 1 ("%s")`, db.Name))
	found(t, s.doctor(t, exitOK), "inline", stateOK)
	reset("synchronous_commit")
	found(t, s.doctor(t, exitCheck), "inline", stateFail, "every COMMIT waits", db.Name, "postgres", "ALTER DATABASE", "local")
	db.Exec(t, "ALTER DATABASE "+db.Name+" SET synchronous_commit = local")
	found(t, s.doctor(t, exitOK), "inline", stateWarn, "database postgres", "ALTER DATABASE")
	db.Exec(t, "ALTER ROLE "+name+" SET synchronous_commit = on")
	found(t, s.doctor(t, exitCheck), "inline", stateFail, "every COMMIT of these roles", name, "ALTER ROLE")
	db.Exec(t, "ALTER ROLE "+name+" RESET synchronous_commit")
	db.Exec(t, "ALTER DATABASE postgres SET synchronous_commit = local")
	found(t, s.doctor(t, exitOK), "inline", stateOK)
	bridge.stop(t)
	found(t, s.doctor(t, exitOK), "inline", stateWarn, "hang", "pg_cancel_backend")
	if r := s.ebb(t, "setup").must(t); !strings.Contains(r.stderr, "hang") {
		t.Errorf("setup with no bridge running says %s", r.stderr)
	}
	reset("synchronous_standby_names")

	// What is broken.
	db.Exec(t, "ALTER PUBLICATION "+db.Name+" SET (publish = 'update')")
	found(t, s.doctor(t, exitCheck), "publication", stateFail, "inserts", "ebb setup")
	s.setup(t)
	db.Exec(t, "UPDATE ebb.slot SET snapshot = NULL")
	found(t, s.doctor(t, exitCheck), "slot", stateFail, "made anew", "ebb run")
	db.Exec(t, "SELECT pg_drop_replication_slot('"+db.Name+"')")
	found(t, s.doctor(t, exitCheck), "slot", stateFail, "does not exist", "ebb run")
	db.Exec(t, "SELECT pg_create_logical_replication_slot('"+db.Name+"', 'test_decoding')")
	found(t, s.doctor(t, exitCheck), "slot", stateFail, "test_decoding")
	db.Exec(t, "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots", "DELETE FROM ebb.migration WHERE version > 1")
	found(t, s.doctor(t, exitCheck), "schema", stateFail, "version 1", "ebb setup")
	set("wal_level", "replica")
	if err := server.Restart(t.Context(), postgres.Fast); err != nil {
		t.Fatal(err)
	}
	if f := s.doctor(t, exitCheck)["wal_level"]; f.State != stateFail || !strings.Contains(f.Mend, "wal_level") {
		t.Errorf("wal_level: %+v", f)
	}
	if err := server.Stop(t.Context(), postgres.Fast); err != nil {
		t.Fatal(err)
	}
	found(t, s.doctor(t, exitCheck), "server", stateFail, "refused", "start the server")
}

// Setup by an owner that is no superuser, run and put by roles that may do that alone.
func TestRolesOfTheirOwn(t *testing.T) {
	t.Parallel()
	server := pgtest.NewServer(t, postgres.Config{})
	db := server.New(t)
	broker := natstest.New(t)
	s := newSite(t, db, broker.URL(), "flow: {limit: 64MB}")
	db.Exec(t, "CREATE ROLE owner LOGIN CREATEROLE REPLICATION", "ALTER DATABASE "+db.Name+" OWNER TO owner")
	s.ebb(t, "setup", "--postgres", s.urlOf("owner")).must(t)
	(&pgtest.Database{URL: s.urlOf("owner")}).Exec(t, "CREATE ROLE service LOGIN IN ROLE ebb_producer")
	db.Exec(t, "CREATE ROLE bridge LOGIN REPLICATION IN ROLE ebb_bridge")
	found(t, s.doctor(t, exitOK, "--postgres", s.urlOf("bridge")), "role", stateOK)
	bridge := start(t, nil, s.args("run", "--postgres", s.urlOf("bridge"))...)
	bridge.logs(t, 20*time.Second, "msg=streaming")

	for _, setting := range [][2]string{{"synchronous_commit", "local"}, {"synchronous_standby_names", db.Name}} {
		if err := server.SetSetting(t.Context(), setting[0], setting[1]); err != nil {
			t.Fatal(err)
		}
	}
	service := &pgtest.Database{URL: s.urlOf("service")}
	service.Exec(t, "SELECT ebb.put('t', '{}')", "INSERT INTO ebb.buffer (topic, payload) VALUES ('t', '{}')",
		"SELECT ebb.deliver_on_commit(), ebb.put('t', '{}')")
	if n := len(broker.Messages(t, "EBB")); n != 3 {
		t.Errorf("%d messages are in the stream when COMMIT has returned, want 3", n)
	}
	pgtest.Eventually(t, 30*time.Second, func() (bool, string) {
		n := pgtest.Value[int](t, service, "SELECT backlog::int FROM ebb.status")
		return n == 0, fmt.Sprintf("%d events in the backlog", n)
	})
	if flow := pgtest.Value[string](t, service, "SELECT flow FROM ebb.status"); flow != "open" {
		t.Errorf("the flow is %s", flow)
	}
	if v := s.statusJSON(t, exitOK); v["flow"] != "open" {
		t.Errorf("status: %v", v)
	}
	bridge.stop(t)
	pgtest.Eventually(t, 30*time.Second, func() (bool, string) { // its sessions end a moment later
		return pgtest.Value[bool](t, service, "SELECT NOT leader AND NOT active FROM ebb.status"), "a bridge leads still"
	})
	if r := s.ebb(t, "teardown", "--yes", "--postgres", s.urlOf("owner")).must(t); !strings.Contains(r.stdout, "reset it") {
		t.Errorf("teardown does not say that a setting is left: %s", r.stdout)
	}
}
