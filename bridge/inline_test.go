package bridge_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"ebb/internal/natstest"
	"ebb/internal/pgtest"
	"ebb/internal/postgres"
	"ebb/sql"
)

// newInline is a fixture on a server of its own, on which COMMIT can wait for delivery.
func newInline(t *testing.T, fsync bool) (*fixture, *pgtest.Server) {
	t.Helper()
	server := pgtest.NewServer(t, postgres.Config{Fsync: fsync})
	f := newFixture(t, server.New(t))
	f.enableInline(server)
	return f, server
}

func (f *fixture) enableInline(server *pgtest.Server) {
	f.t.Helper()
	for _, s := range [][2]string{{"synchronous_commit", "local"}, {"synchronous_standby_names", fmt.Sprintf(`FIRST 1 ("%s")`, f.slot)}} {
		if err := server.SetSetting(f.t.Context(), s[0], s[1]); err != nil {
			f.t.Fatal(err)
		}
	}
}

// inline is a transaction whose COMMIT has been sent.
type inline struct {
	id  int64
	pid uint32
	// done is closed when COMMIT has returned err, with notices.
	done    chan struct{}
	err     error
	notices []*pgconn.Notice
	took    time.Duration
}

// commit puts an event and sends a COMMIT that waits for its delivery. Before that, the session runs the statements.
func (f *fixture) commit(statements ...string) *inline {
	f.t.Helper()
	c := &inline{done: make(chan struct{})}
	cfg, err := pgx.ParseConfig(f.db.URL)
	if err != nil {
		f.t.Fatal(err)
	}
	cfg.OnNotice = func(_ *pgconn.PgConn, n *pgconn.Notice) { c.notices = append(c.notices, n) }
	conn, err := pgx.ConnectConfig(f.t.Context(), cfg)
	if err != nil {
		f.t.Fatal(err)
	}
	c.pid = conn.PgConn().PID()
	for _, s := range append(statements, "BEGIN", "SELECT ebb.deliver_on_commit()") {
		if _, err := conn.Exec(f.t.Context(), s); err != nil {
			f.t.Fatalf("%s: %v", s, err)
		}
	}
	if err := conn.QueryRow(f.t.Context(), `SELECT ebb.put('inline', '{"waits": true}')`).Scan(&c.id); err != nil {
		f.t.Fatal(err)
	}
	go func() {
		defer close(c.done)
		defer conn.Close(context.Background())
		began := time.Now()
		_, c.err = conn.Exec(context.Background(), "COMMIT")
		c.took = time.Since(began)
	}()
	f.t.Cleanup(func() {
		select {
		case <-c.done:
		default: // of a test that failed
			f.db.Exec(f.t, fmt.Sprintf("SELECT pg_terminate_backend(%d)", c.pid))
			<-c.done
		}
	})
	return c
}

// awaitWait waits until COMMIT waits.
func (f *fixture) awaitWait(c *inline) {
	f.t.Helper()
	pgtest.Eventually(f.t, patience, func() (bool, string) {
		select {
		case <-c.done:
			f.t.Fatalf("COMMIT has returned %v", c.err)
		default:
		}
		return f.waiting(c), "COMMIT does not wait"
	})
}

func (f *fixture) waiting(c *inline) bool {
	f.t.Helper()
	return pgtest.Value[bool](f.t, f.db, "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE pid = $1 AND wait_event = 'SyncRep')", c.pid)
}

// stillWaits checks that COMMIT does not return for some time.
func (f *fixture) stillWaits(c *inline) {
	f.t.Helper()
	select {
	case <-c.done:
		f.t.Fatalf("COMMIT has returned %v", c.err)
	case <-time.After(500 * time.Millisecond):
	}
}

func (c *inline) returns(t *testing.T) {
	t.Helper()
	select {
	case <-c.done:
	case <-time.After(patience):
		t.Fatal("COMMIT does not return")
	}
	if c.err != nil {
		t.Fatalf("COMMIT returned %v", c.err)
	}
}

// inStream reports whether the stream holds the event, without waiting.
func (f *fixture) inStream(server *natstest.Server, c *inline) bool {
	f.t.Helper()
	got, _ := f.streamed(server, 0)
	return slices.Contains(got, c.id)
}

// COMMIT returns when the event is in the stream, and not before: with NATS away, with no bridge running, and when another bridge takes over.
func TestCommitWaitsForDelivery(t *testing.T) {
	t.Parallel()
	f, _ := newInline(t, false)
	nats := natstest.New(t)

	c := f.commit() // no bridge runs
	f.awaitWait(c)
	f.stillWaits(c)
	r := f.run(f.stream(nats))
	c.returns(t)
	if len(c.notices) > 0 {
		t.Errorf("COMMIT says %v", c.notices[0])
	}
	if !f.inStream(nats, c) {
		t.Error("COMMIT has returned before delivery")
	}
	for range 20 {
		c := f.commit()
		c.returns(t)
		if !f.inStream(nats, c) {
			t.Fatal("COMMIT has returned before delivery")
		}
	}

	nats.Stop(t)
	c = f.commit()
	f.awaitWait(c)
	f.stillWaits(c)
	f.put(1) // without waiting
	nats.Start(t)
	c.returns(t)
	if !f.inStream(nats, c) {
		t.Error("COMMIT has returned before delivery")
	}

	nats.Stop(t)
	standby := f.run(f.stream(nats))
	c = f.commit()
	f.awaitWait(c)
	r.cancel()
	_ = r.wait() // it may have given up
	f.stillWaits(c)
	nats.Start(t)
	c.returns(t)
	if !f.inStream(nats, c) {
		t.Error("COMMIT has returned before delivery")
	}
	standby.stop()
	sameSet(t, func() []int64 { got, _ := f.streamed(nats, 24); return got }(), f.rows())
}

// What the bridge before had delivered, and recorded, and did not come to report, is reported by the next one at once.
func TestCommitWaitsForWhatIsConfirmed(t *testing.T) {
	t.Parallel()
	f, server := newInline(t, false)
	// The walsender's report of a delivery releases nobody while another is waited for, as during a change of the setting.
	if err := server.SetSetting(t.Context(), "synchronous_standby_names", "nobody"); err != nil {
		t.Fatal(err)
	}
	s := newExactSink()
	r := f.run(s)
	r.await("leader")
	done := f.waits("BEGIN; SET LOCAL synchronous_commit = remote_write; " + putOne + "; COMMIT")
	s.await(t, 1)
	db := f.db.Connect(t)
	pgtest.Eventually(t, patience, func() (bool, string) {
		slot := f.inspect(db)
		return slot.LagBytes() == 0, fmt.Sprintf("the slot lags by %d bytes", slot.LagBytes())
	})
	r.stop()
	f.enableInline(server)
	f.runWith(f.config(s))
	began := time.Now()
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatal("COMMIT does not return")
	}
	t.Logf("COMMIT has returned %s after the next bridge was started", time.Since(began))
	if d := time.Since(began); d > 8*time.Second {
		t.Errorf("it took %s", d)
	}
}

// A wait can be cancelled, which the client is told; the transaction has committed and is delivered. Timeouts do not end one.
func TestCommitIsCancelled(t *testing.T) {
	t.Parallel()
	f, _ := newInline(t, false)
	c := f.commit("SET statement_timeout = 200", "SET lock_timeout = 200",
		"SELECT set_config(name, '200', false) FROM pg_settings WHERE name = 'transaction_timeout'") // since Postgres 17
	f.awaitWait(c)
	f.stillWaits(c)
	f.db.Exec(t, fmt.Sprintf("SELECT pg_cancel_backend(%d)", c.pid))
	c.returns(t)
	if len(c.notices) != 1 || c.notices[0].Severity != "WARNING" || !strings.Contains(c.notices[0].Detail, "committed locally") {
		t.Errorf("COMMIT says %+v", c.notices)
	}
	ended := f.commit()
	f.awaitWait(ended)
	f.db.Exec(t, fmt.Sprintf("SELECT pg_terminate_backend(%d)", ended.pid))
	<-ended.done
	if ended.err == nil {
		t.Error("COMMIT has returned, although its session was ended")
	}
	if got := f.rows(); !slices.Equal(got, []int64{c.id, ended.id}) {
		t.Fatalf("committed are %d, want %d and %d", got, c.id, ended.id)
	}
	s := newTestSink()
	f.run(s)
	s.await(t, 2)
	sameOrder(t, ids(t, s.all()), f.rows())
}

// The setting is that of one transaction.
func TestDeliverOnCommitIsForOneTransaction(t *testing.T) {
	t.Parallel()
	f, _ := newInline(t, false)
	f.run(newTestSink())
	conn := f.db.Connect(t)
	level := func() (level string) {
		t.Helper()
		if err := conn.QueryRow(t.Context(), "SHOW synchronous_commit").Scan(&level); err != nil {
			t.Fatal(err)
		}
		return level
	}
	exec := func(statement string) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), statement); err != nil {
			t.Fatalf("%s: %v", statement, err)
		}
	}
	for _, step := range []struct{ do, want string }{
		{"BEGIN", "local"},
		{"SELECT ebb.deliver_on_commit()", "remote_write"},
		{"SELECT ebb.put('t', '{}')", "remote_write"},
		{"COMMIT", "local"},
		{"BEGIN", "local"},
		{"SAVEPOINT s", "local"},
		{"SELECT ebb.deliver_on_commit()", "remote_write"},
		{"ROLLBACK TO s", "local"},
		{"SELECT ebb.deliver_on_commit()", "remote_write"},
		{"RELEASE s", "remote_write"},
		{"ROLLBACK", "local"},
		{"SELECT ebb.put('t', '{}'), ebb.deliver_on_commit()", "local"},
	} {
		exec(step.do)
		if got := level(); got != step.want {
			t.Errorf("after %s synchronous_commit is %s, want %s", step.do, got, step.want)
		}
	}
}

// A promise that would silently not be kept is refused.
func TestDeliverOnCommitIsRefused(t *testing.T) {
	t.Parallel()
	f, server := newInline(t, false)
	other := &fixture{t: t, db: server.New(t), log: f.log}
	other.slot = other.db.Name
	physical := pgtest.Value[string](t, f.db, "SELECT slot_name FROM pg_create_physical_replication_slot('replica')")
	defer f.db.Exec(t, "SELECT pg_drop_replication_slot('"+physical+"')")
	refused := func(want string) {
		t.Helper()
		conn := f.db.Connect(t)
		_, err := conn.Exec(t.Context(), "SELECT ebb.deliver_on_commit()")
		var pg *pgconn.PgError
		switch {
		case want == "" && err != nil:
			t.Errorf("refused: %v", err)
		case want != "" && (!errors.As(err, &pg) || pg.Code != "55000" || !strings.Contains(pg.Message, want) || pg.Hint == ""):
			t.Errorf("got %v, want 55000 with %q and a hint", err, want)
		}
	}
	for _, c := range []struct{ names, want string }{
		{"%s", ""},
		{`"%s"`, ""},
		{"1 (%s)", ""},
		{`First 1 ("%s")`, ""},
		{"first 1(%s,%[1]s)", ""},
		{"", "is empty"},
		{"*", "whichever standby"},
		{`"*"`, "whichever standby"},
		{"%s, *", "whichever standby"},
		{"someone", "does not name slot"},
		{"ANY 1 (%s)", "ANY"},
		{"any 2 (%s, other)", "ANY"},
		{"%s, standby1", "when another than slot"},
		{"standby1, %s", "when another than slot"},
		{"FIRST 1 (%s, standby1)", "when another than slot"},
		{"FIRST 2 (%s, standby1)", "mixes"},
		{"2 (%s, replica)", "mixes"},
		{"FIRST 2 (%s)", "never return"},
		{"2 (%s, %[1]s)", "never return"},
		{"2 (%s, " + other.slot + ")", "mixes"}, // there is no such slot yet
	} {
		names := strings.ReplaceAll(strings.ReplaceAll(c.names, "%[1]s", f.slot), "%s", f.slot)
		if err := server.SetSetting(t.Context(), "synchronous_standby_names", names); err != nil {
			t.Fatal(err)
		}
		refused(c.want)
	}
	// Other transactions would wait now, so that setup shows that it does not.
	other.setup()
	refused("")
	if err := server.SetSetting(t.Context(), "synchronous_standby_names", f.slot); err != nil {
		t.Fatal(err)
	}
	f.db.Exec(t, "SELECT pg_drop_replication_slot('"+f.slot+"')")
	refused("is lost")
	f.db.Exec(t, "DELETE FROM ebb.slot")
	refused("there is no slot")
}

// A COMMIT that waits for delivery holds up the making of the slot without which it never returns. Its session is ended, without an answer,
// and what it has committed is delivered.
func TestSlotLostWhileCommitsWait(t *testing.T) {
	t.Parallel()
	f, _ := newInline(t, false)
	s := newExactSink()
	r := f.run(s)
	f.put(1)
	s.await(t, 1)
	r.stop()
	first, second := f.commit(), f.commit()
	f.awaitWait(first)
	f.awaitWait(second)
	f.db.Exec(t, "SELECT pg_drop_replication_slot('"+f.slot+"')")
	f.run(s)
	for _, c := range []*inline{first, second} {
		select {
		case <-c.done:
		case <-time.After(patience):
			t.Fatal("COMMIT does not return")
		}
		if c.err == nil {
			t.Error("COMMIT has returned as if all was well")
		}
	}
	s.await(t, 3)
	f.awaitBacklog(0)
	sameSet(t, ids(t, s.all()), f.rows())
	c := f.commit()
	c.returns(t)
	if got := ids(t, s.all()); !slices.Contains(got, c.id) {
		t.Errorf("delivered %d without %d", got, c.id)
	}
}

// What is ended, by whom, and when.
func TestEndWaits(t *testing.T) {
	t.Parallel()
	server := pgtest.NewServer(t, postgres.Config{})
	db := server.New(t)
	f := &fixture{t: t, db: db, slot: db.Name, log: logTo(t)}
	db.Exec(t, "CREATE ROLE owner LOGIN CREATEROLE", "ALTER DATABASE "+db.Name+" OWNER TO owner")
	as := func(role string) *pgx.Conn {
		t.Helper()
		conn, err := sql.Connect(t.Context(), strings.Replace(db.URL, "postgres@", role+"@", 1), "test")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close(context.Background()) })
		return conn
	}
	if _, err := sql.Apply(t.Context(), as("owner"), sql.Setup{Publication: "ebb", Keep: time.Hour}); err != nil {
		t.Fatal(err)
	}
	db.Exec(t, "CREATE ROLE bridge LOGIN IN ROLE ebb_bridge", "CREATE ROLE service LOGIN IN ROLE ebb_producer")
	f.setup()
	f.enableInline(server)
	bridge := as("bridge")
	f.db = &pgtest.Database{Name: db.Name, URL: strings.Replace(db.URL, "postgres@", "service@", 1)}
	c := f.commit()
	f.db = db
	f.awaitWait(c)
	ends := func(when string, want ...sql.Wait) {
		t.Helper()
		got, err := sql.EndWaits(t.Context(), bridge, f.slot)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: ended %+v, want %+v; %v", when, got, want, err)
		}
	}
	of := sql.Wait{PID: int32(c.pid), Role: "service"}
	db.Exec(t, "GRANT pg_monitor, pg_signal_backend TO owner", "UPDATE ebb.slot SET recovered_at = now()")
	ends("with a slot that is made")
	db.Exec(t, "UPDATE ebb.slot SET snapshot = NULL", "REVOKE pg_monitor, pg_signal_backend FROM owner")
	ends("with an owner who sees nobody")
	db.Exec(t, "GRANT pg_monitor TO owner")
	ends("with an owner who may end nobody", of)
	db.Exec(t, "GRANT pg_signal_backend TO owner")
	if err := server.SetSetting(t.Context(), "synchronous_standby_names", "standby1, "+f.slot); err != nil {
		t.Fatal(err)
	}
	if _, err := bridge.Exec(t.Context(), "SELECT 1"); err != nil { // it has the setting when it has been idle
		t.Fatal(err)
	}
	ends("where others may be waited for")
	f.enableInline(server)
	f.stillWaits(c)
	of.Ended = true
	ends("with an owner who may", of)
	<-c.done
	if c.err == nil {
		t.Error("COMMIT has returned as if all was well")
	}
	ends("when nobody waits any more")
}

// Setup makes a slot while COMMITs wait, and never waits itself, although no bridge runs and all sessions wait by default.
func TestSetupWhileANameIsSet(t *testing.T) {
	t.Parallel()
	server := pgtest.NewServer(t, postgres.Config{})
	db := server.New(t)
	if err := server.SetSetting(t.Context(), "synchronous_standby_names", db.Name); err != nil {
		t.Fatal(err)
	}
	f := newFixture(t, db)
	f.setup() // again
	s := newTestSink()
	f.run(s)
	f.put(1) // waits for delivery
	if n := s.count(); n != 1 {
		t.Errorf("%d events are delivered", n)
	}
	if err := server.ResetSetting(t.Context(), "synchronous_standby_names"); err != nil { // or the database could not be dropped
		t.Fatal(err)
	}
}

// The same when the slot is made already, and its recovery would wait for a COMMIT that waits for what comes behind the recovery.
func TestRecoveryWhileACommitWaits(t *testing.T) {
	t.Parallel()
	server := pgtest.NewServer(t, postgres.Config{})
	f := newFixture(t, server.New(t))
	f.db.Exec(t, "SELECT pg_drop_replication_slot('"+f.slot+"')")
	begin := func() (*pgx.Conn, string) {
		conn := f.db.Connect(t)
		if _, err := conn.Exec(t.Context(), "SET synchronous_commit = local; BEGIN"); err != nil {
			t.Fatal(err)
		}
		var xid string
		if err := conn.QueryRow(t.Context(), "SELECT pg_current_xact_id()::text").Scan(&xid); err != nil {
			t.Fatal(err)
		}
		return conn, xid
	}
	awaited := func(xid string) {
		t.Helper()
		pgtest.Eventually(t, patience, func() (bool, string) {
			return pgtest.Value[bool](t, f.db, "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted AND transactionid::text = $1)", xid), "nobody waits for " + xid
		})
	}
	commit := func(conn *pgx.Conn) {
		t.Helper()
		if _, err := conn.Exec(t.Context(), "COMMIT"); err != nil {
			t.Fatal(err)
		}
	}
	// It waits for somebody else, whose waits are none of the bridge's, until it is in the snapshot of the slot.
	if err := server.SetSetting(t.Context(), "synchronous_standby_names", "nobody"); err != nil {
		t.Fatal(err)
	}
	x0, id0 := begin()
	s := newExactSink()
	f.run(s)
	awaited(id0)
	x1, id1 := begin()
	commit(x0)
	awaited(id1)
	waiting, err := pgx.Connect(t.Context(), f.db.URL)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		defer waiting.Close(context.Background())
		_, err := waiting.Exec(context.Background(), putOne)
		done <- err
	}()
	pgtest.Eventually(t, patience, func() (bool, string) {
		return pgtest.Value[bool](t, f.db, "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'SyncRep')"), "nobody waits"
	})
	commit(x1)
	pgtest.Eventually(t, patience, func() (bool, string) {
		return pgtest.Value[bool](t, f.db, "SELECT snapshot IS NOT NULL FROM ebb.slot"), "the slot is not made"
	})
	select {
	case err := <-done:
		t.Fatalf("what waits for somebody else was ended: %v", err)
	case <-time.After(500 * time.Millisecond):
	}
	f.enableInline(server)
	if err := <-done; err == nil {
		t.Error("COMMIT has returned as if all was well")
	}
	s.await(t, 1)
	f.awaitBacklog(0)
	sameSet(t, ids(t, s.all()), f.rows())
}

// How much longer an inline commit takes, and that the others take no longer.
func TestInlineLatency(t *testing.T) {
	f, _ := newInline(t, true)
	f.run(f.stream(natstest.New(t)))
	conn := f.db.Connect(t)
	const n = 200
	measure := func(statement string) time.Duration {
		t.Helper()
		var took []time.Duration
		for range n {
			began := time.Now()
			if _, err := conn.PgConn().Exec(t.Context(), statement).ReadAll(); err != nil {
				t.Fatal(err)
			}
			took = append(took, time.Since(began))
		}
		slices.Sort(took)
		t.Logf("%-60s median %s, 95 %% %s, longest %s", statement, took[n/2], took[n*95/100], took[n-1])
		return took[n/2]
	}
	const put = `SELECT ebb.put('t', '{"a": 1}')`
	measure(put)
	plain := measure("BEGIN; " + put + "; COMMIT")
	inlined := measure("BEGIN; SELECT ebb.deliver_on_commit(); " + put + "; COMMIT")
	after := measure("BEGIN; " + put + "; COMMIT")
	if inlined > plain+20*time.Millisecond {
		t.Errorf("an inline commit takes %s, a plain one %s: something waits for a timer", inlined, plain)
	}
	if after > plain+20*time.Millisecond {
		t.Errorf("a transaction that does not wait takes %s after those that did, and %s before", after, plain)
	}
	t.Logf("plain %s, inline %s (%.1f times), plain again %s", plain, inlined, float64(inlined)/float64(plain), after)
}
