package postgres

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func standby(t *testing.T, primary *Server, config StandbyConfig) *Server {
	t.Helper()
	s, err := primary.Standby(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("end of the log of the standby:\n%s", s.LogTail())
		}
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// catchUp waits until the standby shows what has committed on the primary.
func catchUp(t *testing.T, s, primary *Server) {
	t.Helper()
	lsn, err := primary.FlushedLSN(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := s.WaitReplayed(t.Context(), lsn); err != nil {
		t.Fatal(err)
	}
}

func inRecovery(t *testing.T, s *Server) bool {
	t.Helper()
	in, err := s.InRecovery(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return in
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestStandbyFollowsAndIsPromoted(t *testing.T) {
	const rows = "SELECT coalesce(string_agg(x::text, ' ' ORDER BY x), '') FROM kept"
	primary := start(t, Config{Settings: map[string]string{"max_connections": "70"}})
	exec1(t, primary, "CREATE TABLE kept (x int)")
	exec1(t, primary, "INSERT INTO kept VALUES (1)")
	exec1(t, primary, "SELECT pg_create_logical_replication_slot('logical', 'pgoutput')")
	s := standby(t, primary, StandbyConfig{Name: "second", Settings: map[string]string{"cluster_name": "copy"}})
	for setting, want := range map[string]string{
		"max_connections": "70", "cluster_name": "copy", "hot_standby_feedback": "on", "primary_slot_name": "second", "fsync": "off",
	} {
		if got := value(t, s, "SHOW "+setting); got != want {
			t.Errorf("%s is %q, want %q", setting, got, want)
		}
	}
	if got := value(t, s, rows); got != "1" {
		t.Errorf("the standby starts with rows %s", got)
	}
	if got := value(t, s, "SELECT count(*)::text FROM pg_replication_slots"); got != "0" {
		t.Errorf("the standby has %s slots of the primary", got)
	}
	exec1(t, primary, "INSERT INTO kept VALUES (2)")
	catchUp(t, s, primary)
	if got := value(t, s, rows); got != "1 2" {
		t.Errorf("the standby has rows %s", got)
	}
	attached := value(t, primary, "SELECT application_name || ' ' || (SELECT active FROM pg_replication_slots WHERE slot_name = 'second') "+
		"FROM pg_stat_replication")
	if attached != "second true" {
		t.Errorf("on the primary the standby is %q", attached)
	}
	if !inRecovery(t, s) || inRecovery(t, primary) {
		t.Error("not the standby alone is in recovery")
	}
	if err := primary.Promote(t.Context()); err == nil || !strings.Contains(err.Error(), "promote the standby") {
		t.Errorf("promote a primary: %v", err)
	}

	port := s.Port()
	must(t, s.Restart(t.Context(), Fast))
	s.Kill()
	exec1(t, primary, "INSERT INTO kept VALUES (3)")
	must(t, s.Start(t.Context()))
	catchUp(t, s, primary)
	if got := value(t, s, rows); got != "1 2 3" || s.Port() != port || !inRecovery(t, s) {
		t.Errorf("after restarts the standby has rows %s, on port %d, was %d", got, s.Port(), port)
	}

	// What is received and not replayed is not shown, and a promotion does not lose it.
	must(t, s.PauseReplay(t.Context()))
	exec1(t, primary, "INSERT INTO kept VALUES (4)")
	lsn, err := primary.FlushedLSN(t.Context())
	must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := s.WaitReplayed(ctx, lsn); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), lsn.String()) {
		t.Errorf("wait while replay is paused: %v", err)
	}
	must(t, s.ResumeReplay(t.Context()))
	must(t, s.WaitReplayed(t.Context(), lsn))
	must(t, s.PauseReplay(t.Context()))
	exec1(t, primary, "INSERT INTO kept VALUES (5)")
	must(t, primary.Stop(t.Context(), Fast)) // the walsender hands on what is left

	must(t, s.Promote(t.Context()))
	exec1(t, s, "INSERT INTO kept VALUES (6)")
	if got := value(t, s, rows); got != "1 2 3 4 5 6" || inRecovery(t, s) {
		t.Errorf("the promoted standby has rows %s", got)
	}
	if got := value(t, s, "SELECT left(pg_walfile_name(pg_current_wal_lsn()), 8)"); got != "00000002" {
		t.Errorf("it is on timeline %s", got)
	}
	must(t, s.Restart(t.Context(), Immediate))
	exec1(t, s, "INSERT INTO kept VALUES (7)")
	must(t, s.Close())
	if _, err := os.Stat(filepath.Dir(s.DataDir())); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the temporary directory is still there: %v", err)
	}
}

func TestStandbyThatIsCutOffMissesTransactions(t *testing.T) {
	const rows = "SELECT coalesce(string_agg(x::text, ' ' ORDER BY x), '') FROM kept"
	primary := start(t, Config{Password: `it's a s€cret\`})
	exec1(t, primary, "CREATE TABLE kept (x int)")
	s := standby(t, primary, StandbyConfig{})
	must(t, s.CutOff(t.Context()))
	exec1(t, primary, "INSERT INTO kept VALUES (1)")
	must(t, s.Restart(t.Context(), Fast))
	if got := value(t, s, rows); got != "" {
		t.Errorf("cut off, the standby has rows %s", got)
	}
	must(t, s.Rejoin(t.Context()))
	catchUp(t, s, primary)
	must(t, s.CutOff(t.Context()))
	exec1(t, primary, "INSERT INTO kept VALUES (2)")
	must(t, s.Promote(t.Context()))
	exec1(t, s, "INSERT INTO kept VALUES (3)")
	if got := value(t, s, rows); got != "1 3" {
		t.Errorf("promoted, the standby has rows %s", got)
	}

	// A promoted standby can have standbys.
	must(t, primary.Stop(t.Context(), Fast))
	next := standby(t, s, StandbyConfig{})
	exec1(t, s, "INSERT INTO kept VALUES (4)")
	catchUp(t, next, s)
	if got := value(t, next, rows); got != "1 3 4" {
		t.Errorf("its standby has rows %s", got)
	}
}

// TestStandbyIsMadeWhileRowsAreWritten copies files that change under it, with full_page_writes off.
func TestStandbyIsMadeWhileRowsAreWritten(t *testing.T) {
	primary := start(t, Config{})
	exec1(t, primary, "CREATE TABLE kept (x int PRIMARY KEY, y text)")
	writer := connect(t, primary)
	ctx, cancel := context.WithCancel(t.Context())
	written := make(chan int, 1)
	go func() {
		n := 0
		for ; ctx.Err() == nil; n++ {
			if _, err := writer.Exec(t.Context(), "INSERT INTO kept SELECT $1, repeat('y', 1000)", n); err != nil {
				t.Error(err)
				break
			}
		}
		written <- n
	}()
	s := standby(t, primary, StandbyConfig{})
	cancel()
	n := <-written
	catchUp(t, s, primary)
	const count = "SELECT count(*) || ' ' || sum(length(y)) || ' ' || count(DISTINCT x) FROM kept"
	if got, want := value(t, s, count), value(t, primary, count); got != want || n == 0 {
		t.Errorf("the standby has %s, the primary %s; %d rows were written", got, want, n)
	}
}

func TestStandbyErrors(t *testing.T) {
	primary := start(t, Config{})
	standby(t, primary, StandbyConfig{})
	if _, err := primary.Standby(t.Context(), StandbyConfig{}); err == nil || !strings.Contains(err.Error(), `slot "standby"`) {
		t.Errorf("a second standby of the same name: %v", err)
	}
	_, err := primary.Standby(t.Context(), StandbyConfig{Name: "b", Settings: map[string]string{"max_connections": "5"}})
	if err == nil || !strings.Contains(err.Error(), "max_connections") {
		t.Errorf("a standby with fewer connections: %v", err)
	}
	must(t, primary.Stop(t.Context(), Fast))
	if _, err := primary.Standby(t.Context(), StandbyConfig{Name: "c"}); err == nil {
		t.Error("a standby of a server that does not run")
	}
}
