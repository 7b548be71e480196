package bridge_test

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	"ebb/bridge"
	"ebb/internal/pgtest"
	"ebb/internal/postgres"
	"ebb/sql"
)

func (f *fixture) flow() sql.FlowState {
	f.t.Helper()
	s, err := bridge.ReadStatus(f.t.Context(), f.db.Connect(f.t), f.slot)
	if err != nil {
		f.t.Fatal(err)
	}
	return s.Flow
}

func (f *fixture) awaitFlow(want sql.FlowState) {
	f.t.Helper()
	db := f.db.Connect(f.t)
	pgtest.Eventually(f.t, patience, func() (bool, string) {
		s, err := bridge.ReadStatus(f.t.Context(), db, f.slot)
		if err != nil {
			f.t.Fatal(err)
		}
		return s.Flow == want, fmt.Sprintf("the flow is %s with a lag of %d bytes, want %s", s.Flow, s.Slot.LagBytes, want)
	})
}

// fill puts events of 10 KB until that is refused, and returns how many.
func (f *fixture) fill(most int) int {
	f.t.Helper()
	conn := f.db.Connect(f.t)
	for n := range most {
		if _, err := conn.Exec(f.t.Context(), "SELECT ebb.put('t', to_json(string_agg(md5(random()::text), ''))) FROM generate_series(1, 310)"); err != nil {
			if !strings.Contains(err.Error(), "53400") {
				f.t.Fatal(err)
			}
			return n
		}
	}
	return most
}

// While the sink is down the buffer fills up to the limit; the bridge closes it, and opens it again when it has drained. While the bridge is
// down, the limit holds as well.
func TestFlow(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.NewServer(t, postgres.Config{}).New(t)) // on a shared one others write into the log
	logs := &lockedBuffer{}
	f.log = slog.New(slog.NewTextHandler(logs, nil))
	s := newExactSink()
	cfg := f.config(s)
	const limit = 2 << 20
	cfg.Flow = sql.Flow{Warn: limit / 2, Limit: limit}
	r := f.runWith(cfg)
	f.put(1)
	s.await(t, 1)
	f.awaitBacklog(0)
	if got := f.flow(); got != sql.FlowOpen {
		t.Errorf("with a sink that keeps up the flow is %s", got)
	}
	s.block()
	n := f.fill(1000)
	if n < 50 || n == 1000 {
		t.Fatalf("%d events of 10 KB were taken within %d bytes", n, limit)
	}
	closed := func() bool { return pgtest.Value[bool](t, f.db, "SELECT closed FROM ebb.flow") }
	pgtest.Eventually(t, patience, func() (bool, string) { return closed(), "the bridge has not closed the buffer" })
	f.awaitFlow(sql.FlowClosed)
	s.unblock()
	s.await(t, n+1)
	f.awaitFlow(sql.FlowOpen)
	pgtest.Eventually(t, patience, func() (bool, string) { return !closed(), "the bridge has not opened the buffer" })
	if more := f.fill(10); more != 10 {
		t.Errorf("%d events were taken after the buffer has drained", more)
	}
	s.await(t, n+11)
	f.awaitBacklog(0)
	r.stop()
	for _, line := range []string{"the buffer is full", "the buffer has drained"} {
		if c := strings.Count(logs.String(), line); c != 1 {
			t.Errorf("%q is logged %d times:\n%s", line, c, logs)
		}
	}

	if more := f.fill(1000); more < 50 || more == 1000 {
		t.Errorf("%d events of 10 KB were taken within %d bytes, with no bridge running", more, limit)
	}
	// Another configuration counts from the start of the bridge on.
	cfg.Flow.OnFull = sql.Allow
	s.block()
	r = f.runWith(cfg)
	f.awaitFlow(sql.FlowWarn)
	if more := f.fill(10); more != 10 {
		t.Errorf("%d events were taken with on_full: allow", more)
	}
	s.unblock()
	f.awaitFlow(sql.FlowOpen)
	f.awaitBacklog(0)
	r.stop()
	sameOrder(t, ids(t, s.all()), f.rows())
}

// A delivered row that somebody has locked holds up the slot: then the bridge looks after the limits as well.
func TestFlowWhileARowIsLocked(t *testing.T) {
	t.Parallel()
	f := newOwnFixture(t, pgtest.NewServer(t, postgres.Config{}).New(t), own("marked", sql.Mark), bridge.Managed())
	f.create("marked")
	f.mustSetup()
	s := newExactSink()
	cfg := f.config(s)
	const limit = 1 << 20
	cfg.Flow = sql.Flow{Warn: limit / 2, Limit: limit}
	r := f.runWith(cfg)
	r.await(bridge.RoleLeader)
	conn := f.db.Connect(t)
	f.insert("marked", 1)
	f.left(0, "marked WHERE done_at IS NULL")
	s.block()
	f.insert("marked", 1)
	if _, err := conn.Exec(t.Context(), "BEGIN; SELECT FROM marked WHERE done_at IS NULL FOR UPDATE"); err != nil {
		t.Fatal(err)
	}
	s.unblock()
	s.await(t, 2)
	f.fill(1000)
	closed := func() bool { return pgtest.Value[bool](t, f.db, "SELECT closed FROM ebb.flow") }
	pgtest.Eventually(t, patience, func() (bool, string) { return closed(), "the bridge has not closed the buffer" })
	if _, err := conn.Exec(t.Context(), "ROLLBACK"); err != nil {
		t.Fatal(err)
	}
	pgtest.Eventually(t, patience, func() (bool, string) { return !closed(), "the bridge has not opened the buffer" })
	f.left(0, "marked WHERE done_at IS NULL")
	r.stop()
}

// A flow that warns does so once in a while, not once a tick.
func TestFlowWarns(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.NewServer(t, postgres.Config{}).New(t))
	logs := &lockedBuffer{}
	f.log = slog.New(slog.NewTextHandler(logs, nil))
	s := newExactSink()
	cfg := f.config(s)
	cfg.TickEvery = 10 * time.Millisecond
	cfg.Flow = sql.Flow{Warn: 100 << 10}
	r := f.runWith(cfg)
	r.await(bridge.RoleLeader)
	s.block()
	if n := f.fill(100); n != 100 {
		t.Errorf("%d events were taken, without a limit", n)
	}
	pgtest.Eventually(t, patience, func() (bool, string) { return strings.Contains(logs.String(), "flow.warn"), "no warning" })
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	<-ctx.Done()
	if n := strings.Count(logs.String(), "flow.warn"); n != 1 {
		t.Errorf("warned %d times", n)
	}
	f.awaitFlow(sql.FlowWarn)
	s.unblock()
	pgtest.Eventually(t, patience, func() (bool, string) {
		return strings.Contains(logs.String(), "has drained"), "no word that it has drained"
	})
	r.stop()
}
