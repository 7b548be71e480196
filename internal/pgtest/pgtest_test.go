package pgtest

import (
	"fmt"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"ebb/internal/postgres"
)

func TestMain(m *testing.M) { Main(m) }

func TestNewIsADatabaseOfItsOwn(t *testing.T) {
	one, two := New(t), New(t)
	if one.Name == two.Name {
		t.Fatalf("two databases named %s", one.Name)
	}
	one.Exec(t, "CREATE TABLE a (x int)", "INSERT INTO a VALUES (1); INSERT INTO a VALUES (2)")
	if n := Value[int](t, one, "SELECT count(*) FROM a WHERE x > $1", 0); n != 2 {
		t.Errorf("%d rows, want 2", n)
	}
	if there := Value[bool](t, two, "SELECT to_regclass('a') IS NOT NULL"); there {
		t.Error("the table is in the other database too")
	}
	if fsync := Value[string](t, one, "SHOW fsync"); fsync != "off" {
		t.Errorf("fsync is %s", fsync)
	}
}

// read opens a connection that streams from the slot of the database's name.
func read(t *testing.T, db *Database) *pgconn.PgConn {
	t.Helper()
	db.Exec(t, "CREATE PUBLICATION p")
	stream, err := pgconn.Connect(t.Context(), db.URL+"&replication=database")
	if err != nil {
		t.Fatal(err)
	}
	stream.Frontend().SendQuery(&pgproto3.Query{String: "START_REPLICATION SLOT " + db.Name +
		" LOGICAL 0/0 (proto_version '1', publication_names 'p')"})
	if err := stream.Frontend().Flush(); err != nil {
		t.Fatal(err)
	}
	Eventually(t, 5*time.Second, func() (bool, string) {
		return Value[bool](t, db, "SELECT active FROM pg_replication_slots WHERE slot_name = $1", db.Name), "slot is not active"
	})
	return stream
}

func TestDatabaseIsDroppedWithItsSlots(t *testing.T) {
	other := New(t)
	var name string
	t.Run("in use", func(t *testing.T) {
		db := New(t)
		name = db.Name
		db.Exec(t, "SELECT pg_create_logical_replication_slot('"+db.Name+"_idle', 'pgoutput')",
			"SELECT pg_create_logical_replication_slot('"+db.Name+"', 'pgoutput')")
		// A session and a walsender that the test forgets to end.
		forgotten, err := pgx.Connect(t.Context(), db.URL)
		if err != nil {
			t.Fatal(err)
		}
		read(t, db)
		_ = forgotten
	})
	if n := Value[int](t, other, "SELECT count(*) FROM pg_replication_slots WHERE database = $1", name); n != 0 {
		t.Errorf("%d slots are left", n)
	}
	if n := Value[int](t, other, "SELECT count(*) FROM pg_database WHERE datname = $1", name); n != 0 {
		t.Errorf("database is left")
	}
}

// A walsender outlives its connection for a moment.
func TestExecWaitsForASlotInUse(t *testing.T) {
	db := New(t)
	db.Exec(t, "SELECT pg_create_logical_replication_slot('"+db.Name+"', 'pgoutput')")
	stream := read(t, db)
	closed := time.AfterFunc(100*time.Millisecond, func() { stream.Conn().Close() })
	defer closed.Stop()
	db.Exec(t, "SELECT pg_drop_replication_slot('"+db.Name+"')")
}

func TestNewServerIsPrivateAndMayBeStopped(t *testing.T) {
	server := NewServer(t, postgres.Config{Settings: map[string]string{"max_connections": "17"}})
	db := server.New(t)
	if got := Value[string](t, db, "SHOW max_connections"); got != "17" {
		t.Errorf("max_connections is %s", got)
	}
	db.Exec(t, "CREATE TABLE a (x int)")
	if err := server.Restart(t.Context(), postgres.Fast); err != nil {
		t.Fatal(err)
	}
	Value[int](t, db, "SELECT count(*) FROM a")
	if err := server.Stop(t.Context(), postgres.Fast); err != nil {
		t.Fatal(err)
	}
}

func TestStandbyTakesOver(t *testing.T) {
	primary := NewServer(t, postgres.Config{})
	db := primary.New(t)
	standby := primary.Standby(t, postgres.StandbyConfig{})
	db.Exec(t, "CREATE TABLE a (x int)", "INSERT INTO a VALUES (1)")
	standby.CatchUp(t, primary)
	primary.Kill()
	if err := standby.Promote(t.Context()); err != nil {
		t.Fatal(err)
	}
	promoted := db.On(standby)
	promoted.Exec(t, "INSERT INTO a VALUES (2)")
	if n := Value[int](t, promoted, "SELECT sum(x) FROM a"); n != 3 {
		t.Errorf("sum is %d, want 3", n)
	}
}

func TestDatabaseName(t *testing.T) {
	got := databaseName("TestÜber/größe="+strings.Repeat("x", 100), 7)
	if len(got) > 50 || strings.Trim(got, "abcdefghijklmnopqrstuvwxyz0123456789_") != "" || !strings.HasPrefix(got, "t7_") {
		t.Errorf("name %q", got)
	}
}

func TestEventuallyFailsWithTheLastReason(t *testing.T) {
	fake := &failingT{TB: t}
	done := make(chan struct{})
	go func() {
		defer close(done)
		n := 0
		Eventually(fake, 25*time.Millisecond, func() (bool, string) { n++; return false, fmt.Sprint("try ", n) })
	}()
	<-done
	if !strings.Contains(fake.message, "not within 25ms: try ") || strings.HasSuffix(fake.message, "try 1") {
		t.Errorf("message %q", fake.message)
	}
}

type failingT struct {
	testing.TB
	message string
}

func (f *failingT) Helper() {}

func (f *failingT) Fatalf(format string, args ...any) {
	f.message = fmt.Sprintf(format, args...)
	runtime.Goexit()
}
