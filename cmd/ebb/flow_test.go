package main

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"ebb/internal/natstest"
	"ebb/internal/pgtest"
	"ebb/internal/postgres"
)

// With flow.limit in the configuration, producers are refused while no bridge runs, and let in again when one has delivered what waits.
func TestFlowLimit(t *testing.T) {
	t.Parallel()
	broker := natstest.New(t)
	server := pgtest.NewServer(t, postgres.Config{}) // of its own: others write into the log of the shared one
	db := server.New(t)
	s := newSite(t, db, broker.URL(), "flow: {limit: 1MB}")
	if script := s.ebb(t, "setup", "--print").must(t); !strings.Contains(script.stdout, "limit_bytes = 1048576") {
		t.Error("setup --print does not have the limit")
	}
	s.setup(t)
	conn := db.Connect(t)
	put := func() error {
		_, err := conn.Exec(t.Context(), "SELECT ebb.put('t', to_json(string_agg(md5(random()::text), ''))) FROM generate_series(1, 310)")
		return err
	}
	n := 0
	var err error
	for ; err == nil && n < 1000; n++ {
		err = put()
	}
	n--
	var pg *pgconn.PgError
	if !errors.As(err, &pg) || pg.Code != "53400" || !strings.Contains(pg.Message, "1048576 bytes (1024 kB)") || !strings.Contains(pg.Hint, "ebb status") || n < 20 {
		t.Fatalf("after %d events: %v", n, err)
	}
	if v := s.statusJSON(t, exitCheck); v["flow"] != "closed" {
		t.Errorf("flow: %v", v["flow"])
	}
	if r := s.ebb(t, "status"); !strings.Contains(r.stdout, "ebb.put is refused") {
		t.Errorf("status says\n%s", r.stdout)
	}
	bridge := s.streaming(t)
	delivered(t, broker, 40*time.Second, n)
	pgtest.Eventually(t, 30*time.Second, func() (bool, string) {
		v := s.statusJSON(t, exitOK)
		return v["flow"] == "open", fmt.Sprint(v["flow"])
	})
	if err := put(); err != nil {
		t.Error(err)
	}
	delivered(t, broker, 40*time.Second, n+1)
	bridge.stop(t)

	// The configuration of the bridge that leads counts.
	other := newSite(t, db, broker.URL(), "flow: {limit: 2MB, warn: 1MB, on_full: allow}")
	bridge = other.streaming(t)
	if got := pgtest.Value[string](t, db, "SELECT concat_ws(' ', warn_bytes, limit_bytes, on_full) FROM ebb.flow"); got != "1048576 2097152 allow" {
		t.Errorf("the limits are %s", got)
	}
	bridge.logs(t, time.Second, "set the flow limits")
	bridge.stop(t)
}
