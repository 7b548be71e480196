// Package pgtest gives tests databases on a real Postgres.
//
//	func TestMain(m *testing.M) { pgtest.Main(m) }
//
//	func TestSomething(t *testing.T) {
//		db := pgtest.New(t)
//		db.Exec(t, "CREATE TABLE buffer (id bigint)")
//		conn := db.Connect(t)
//		…
//	}
package pgtest

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"go.uber.org/goleak"

	"ebb/internal/postgres"
	"ebb/internal/sleep"
)

// shared is the server that the tests of one binary share. It starts when the first of them needs it.
var shared struct {
	mu     sync.Mutex
	inMain bool
	server *postgres.Server
	err    error
}

// Main runs the tests, stops the shared server, looks for leaked goroutines when the tests passed, and exits.
func Main(m *testing.M, leakOptions ...goleak.Option) {
	shared.inMain = true
	code := m.Run()
	if shared.server != nil {
		if err := shared.server.Close(); err != nil {
			fmt.Fprintln(os.Stderr, "pgtest: close the shared server:", err)
			code = max(code, 1)
		}
	}
	if code == 0 {
		if err := goleak.Find(leakOptions...); err != nil {
			fmt.Fprintln(os.Stderr, "pgtest: goroutines are left over:", err)
			code = 1
		}
	}
	os.Exit(code)
}

// fast are the settings for servers that are thrown away.
var fast = map[string]string{
	"autovacuum_naptime": "10s",
	"jit":                "off",
	"max_wal_size":       "512MB",
	"wal_sender_timeout": "20s",

	// A standby whose primary is gone may notice its promotion only when it next tries to reach that.
	"wal_retrieve_retry_interval": "100ms",
}

func sharedServer(t testing.TB) *postgres.Server {
	t.Helper()
	shared.mu.Lock()
	defer shared.mu.Unlock()
	if !shared.inMain {
		t.Fatal("pgtest: the package needs `func TestMain(m *testing.M) { pgtest.Main(m) }`, which stops the shared server")
	}
	if shared.server == nil && shared.err == nil {
		shared.server, shared.err = postgres.Start(context.Background(), postgres.Config{Settings: fast})
	}
	if shared.err != nil {
		t.Fatal(shared.err)
	}
	return shared.server
}

// Server is a private server for a test that restarts it, or needs settings of its own.
type Server struct {
	*postgres.Server
}

// NewServer starts a server that is closed when the test ends. When the test failed, the end of its log is printed.
func NewServer(t testing.TB, config postgres.Config) *Server {
	t.Helper()
	settings := maps.Clone(fast)
	maps.Copy(settings, config.Settings)
	config.Settings = settings
	server, err := postgres.Start(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	return closeWith(t, server, "Postgres server")
}

// Standby makes a hot standby of the server, which is closed when the test ends. When the test failed, the end of its log is printed.
func (s *Server) Standby(t testing.TB, config postgres.StandbyConfig) *Server {
	t.Helper()
	standby, err := s.Server.Standby(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	return closeWith(t, standby, "standby")
}

func closeWith(t testing.TB, server *postgres.Server, what string) *Server {
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("end of the log of the %s on port %d:\n%s", what, server.Port(), server.LogTail())
		}
		if err := server.Close(); err != nil {
			t.Error(err)
		}
	})
	return &Server{server}
}

// CatchUp waits until the standby shows what has committed on its primary when CatchUp is called.
func (s *Server) CatchUp(t testing.TB, primary *Server) {
	t.Helper()
	ctx, cancel := callContext(t)
	defer cancel()
	lsn, err := primary.FlushedLSN(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.WaitReplayed(ctx, lsn); err != nil {
		t.Fatal(err)
	}
}

// WaitSynced waits until the standby keeps a copy of the primary's logical slot, with all that is confirmed when WaitSynced is called. It
// needs sync_replication_slots on the standby, a slot made with failover, and a consumer that goes on confirming: a standby takes over
// only a slot that has moved past what the standby itself still has.
func (s *Server) WaitSynced(t testing.TB, primary *Server, slot string) {
	t.Helper()
	on := func(server *Server) *Database { return &Database{URL: server.URL("postgres")} }
	confirmed := Value[string](t, on(primary), "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = $1", slot)
	var hastened time.Time
	Eventually(t, time.Minute, func() (bool, string) {
		if time.Since(hastened) > 200*time.Millisecond {
			// Slots move at records of the running transactions, which come every 15 seconds, and the worker on the standby
			// looks at slots that did not move ever less, down to every 30 seconds, unless it is woken.
			on(primary).Exec(t, "SELECT pg_log_standby_snapshot()")
			on(s).Exec(t, "SELECT pg_reload_conf()")
			hastened = time.Now()
		}
		state := Value[string](t, on(s), `SELECT coalesce((
			SELECT CASE WHEN synced AND NOT temporary AND confirmed_flush_lsn >= $2::text::pg_lsn THEN ''
				ELSE format('synced %s, temporary %s, confirmed %s', synced, temporary, confirmed_flush_lsn) END
			FROM pg_replication_slots WHERE slot_name = $1), 'not there')`, slot, confirmed)
		return state == "", fmt.Sprintf("slot %s, confirmed %s on the primary, is on the standby: %s", slot, confirmed, state)
	})
}

// Database is a database of a test's own.
type Database struct {
	// Name is unique on the server, and a valid name for a slot, a publication, a role and a schema.
	Name string

	// URL logs in as the superuser.
	URL string

	server *postgres.Server
}

// New makes a database on the shared server. It is dropped, with its replication slots, when the test ends.
func New(t testing.TB) *Database {
	t.Helper()
	return newDatabase(t, sharedServer(t))
}

// New makes a database on the server. It is dropped, with its replication slots, when the test ends.
func (s *Server) New(t testing.TB) *Database {
	t.Helper()
	return newDatabase(t, s.Server)
}

// On is the same database on a standby of its server, or on one that was.
func (db *Database) On(standby *Server) *Database {
	return &Database{Name: db.Name, URL: standby.URL(db.Name), server: standby.Server}
}

var databases atomic.Int64

func newDatabase(t testing.TB, server *postgres.Server) *Database {
	t.Helper()
	name := databaseName(t.Name(), databases.Add(1))
	db := &Database{Name: name, URL: server.URL(name), server: server}
	(&Database{URL: server.URL("postgres")}).Exec(t, "CREATE DATABASE "+name)
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		if err := db.drop(ctx); err != nil {
			t.Errorf("drop the test's database: %v", err)
		}
	})
	return db
}

// databaseName makes a name of lower-case letters, digits and underscores (all that a slot's name may have), that starts with a
// letter and is short enough for a suffix such as _trail within the 63 bytes of an identifier.
func databaseName(test string, n int64) string {
	var name strings.Builder
	for _, r := range strings.ToLower(test) {
		if name.Len() == 40 {
			break
		}
		if r < 'a' || r > 'z' {
			if r < '0' || r > '9' {
				r = '_'
			}
		}
		name.WriteRune(r)
	}
	return "t" + strconv.FormatInt(n, 10) + "_" + strings.TrimPrefix(name.String(), "test")
}

// drop removes the database and its slots, whatever still uses them. On a server that does not run there is nothing to do: only
// private ones are stopped, and their data goes with them.
func (db *Database) drop(ctx context.Context) error {
	select {
	case <-db.server.Done():
		return nil
	default:
	}
	conn, err := pgx.Connect(ctx, db.server.URL("postgres"))
	if err != nil {
		return err
	}
	defer conn.Close(ctx)
	// Nobody may come back between the steps.
	if _, err := conn.Exec(ctx, "ALTER DATABASE "+db.Name+" ALLOW_CONNECTIONS false"); err != nil {
		if pgErr := (*pgconn.PgError)(nil); errors.As(err, &pgErr) && pgErr.Code == "3D000" {
			return nil // the test dropped it
		}
		return err
	}
	const slots = `
		SELECT slot_name, pg_terminate_backend(active_pid) IS NOT NULL AS was_active
		FROM pg_replication_slots WHERE database = $1`
	for {
		rows, _ := conn.Query(ctx, slots, db.Name)
		left, err := pgx.CollectRows(rows, pgx.RowToStructByName[struct {
			SlotName  string
			WasActive bool
		}])
		if err != nil {
			return fmt.Errorf("look for slots: %w", err)
		}
		if len(left) == 0 {
			break
		}
		for _, slot := range left {
			if slot.WasActive {
				continue // until its walsender has ended
			}
			_, err := conn.Exec(ctx, "SELECT pg_drop_replication_slot($1)", slot.SlotName)
			pgErr := (*pgconn.PgError)(nil)
			if err != nil && !inUse(err) && !(errors.As(err, &pgErr) && pgErr.Code == "42704") {
				// Gone meanwhile (a temporary slot), or still in use, is not an error: the next round sees.
				return fmt.Errorf("drop slot %q: %w", slot.SlotName, err)
			}
		}
		if err := sleep.For(ctx, 5*time.Millisecond); err != nil {
			return fmt.Errorf("drop the slots of %s: %w", db.Name, err)
		}
	}
	_, err = conn.Exec(ctx, "DROP DATABASE "+db.Name+" WITH (FORCE)")
	return err
}

// callContext bounds one call. It is not the test's own context, which has ended when cleanups run.
func callContext(t testing.TB) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
}

// Connect opens a session that is closed when the test ends.
func (db *Database) Connect(t testing.TB) *pgx.Conn {
	t.Helper()
	ctx, cancel := callContext(t)
	defer cancel()
	conn, err := pgx.Connect(ctx, db.URL)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

// Exec runs the statements in a session of their own, each in its own transaction. One of them may itself be several, divided by
// semicolons; these then share a transaction. A slot that is still in use is waited for: the walsender of a connection that was
// closed takes a moment to notice. A test with many statements is faster with Connect.
func (db *Database) Exec(t testing.TB, statements ...string) {
	t.Helper()
	ctx, cancel := callContext(t)
	defer cancel()
	conn, err := pgx.Connect(ctx, db.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	for _, statement := range statements {
		for {
			_, err := conn.PgConn().Exec(ctx, statement).ReadAll()
			if err == nil {
				break
			}
			if !inUse(err) || sleep.For(ctx, 5*time.Millisecond) != nil {
				t.Fatalf("%s: %v", statement, err)
			}
		}
	}
}

// inUse reports whether Postgres refused because something, such as a slot, is in use by another session.
func inUse(err error) bool {
	var refused *pgconn.PgError
	return errors.As(err, &refused) && refused.Code == "55006"
}

// Value runs a query in a session of its own and returns the single value it yields.
func Value[T any](t testing.TB, db *Database, query string, args ...any) T {
	t.Helper()
	ctx, cancel := callContext(t)
	defer cancel()
	conn, err := pgx.Connect(ctx, db.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(ctx)
	var value T
	if err := conn.QueryRow(ctx, query, args...).Scan(&value); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return value
}

// Eventually waits until cond holds. The string that cond returns with false says why not; the last one is in the failure.
func Eventually(t testing.TB, timeout time.Duration, cond func() (bool, string)) {
	t.Helper()
	deadline := time.Now().Add(timeout)
	for {
		ok, reason := cond()
		if ok {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s", timeout, reason)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
