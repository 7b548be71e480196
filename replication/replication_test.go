package replication

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"ebb/event"
	"ebb/internal/pgtest"
	"ebb/internal/postgres"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

// connect opens a connection that a stream will take over.
func connect(t *testing.T, db *pgtest.Database) *Conn {
	t.Helper()
	conn, err := Connect(t.Context(), db.URL, db.Name)
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// connectFor opens a connection that is closed when the test ends.
func connectFor(t *testing.T, db *pgtest.Database) *Conn {
	t.Helper()
	conn := connect(t, db)
	t.Cleanup(func() {
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
	})
	return conn
}

// stream makes a table, a publication and a slot, and starts streaming.
func stream(t *testing.T, db *pgtest.Database) *Stream {
	t.Helper()
	db.Exec(t, "CREATE TABLE buffer (id int, payload text)", "CREATE PUBLICATION pub FOR TABLE buffer")
	conn := connect(t, db)
	slot, err := conn.CreateSlot(t.Context(), db.Name)
	if err != nil {
		t.Fatal(err)
	}
	// No test is to wait for as long as ebb's own.
	if _, err := conn.exec(t.Context(), "SET tcp_user_timeout = 1000"); err != nil {
		t.Fatal(err)
	}
	s, err := conn.Start(t.Context(), db.Name, "pub", slot.ConsistentPoint)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.conn.Close() }) // most tests have closed it
	return s
}

func slots(t *testing.T, db *pgtest.Database) int64 {
	t.Helper()
	return pgtest.Value[int64](t, db, "SELECT count(*) FROM pg_replication_slots WHERE slot_name = $1", db.Name)
}

func TestSlotLife(t *testing.T) {
	db := pgtest.New(t)
	sql := db.Connect(t)
	if _, err := InspectSlot(t.Context(), sql, db.Name); !errors.Is(err, ErrNoSlot) {
		t.Fatalf("before: %v", err)
	}
	if err := CheckWALLevel(t.Context(), sql); err != nil {
		t.Fatal(err)
	}
	conn := connectFor(t, db)
	system, err := conn.Identify(t.Context())
	if err != nil || system.Database != db.Name || system.Timeline != 1 ||
		system.ID != pgtest.Value[string](t, db, "SELECT system_identifier::text FROM pg_control_system()") {
		t.Fatalf("identified %+v, %v", system, err)
	}
	db.Exec(t, "CREATE TABLE seen (xid xid8 DEFAULT pg_current_xact_id())", "INSERT INTO seen DEFAULT VALUES")
	made, err := conn.CreateSlot(t.Context(), db.Name)
	if err != nil {
		t.Fatal(err)
	}
	db.Exec(t, "INSERT INTO seen DEFAULT VALUES")
	if n := pgtest.Value[int64](t, db, "SELECT count(*) FROM seen WHERE pg_visible_in_snapshot(xid, $1::text::pg_snapshot)", made.Snapshot); n != 1 {
		t.Errorf("the snapshot %s sees %d rows, want the one from before the slot", made.Snapshot, n)
	}
	slot, err := InspectSlot(t.Context(), sql, db.Name)
	if err != nil {
		t.Fatal(err)
	}
	if slot.Plugin != Plugin || slot.Database != db.Name || slot.Active || slot.Lost() || slot.ConfirmedFlush != made.ConsistentPoint ||
		slot.Current < slot.ConfirmedFlush || slot.LagBytes() < 0 || slot.RetainedBytes() < slot.LagBytes() {
		t.Errorf("slot is %+v, made at %s", slot, made.ConsistentPoint)
	}
	if err := slot.Usable(db.Name); err != nil {
		t.Error(err)
	}
	if err := slot.Usable("other"); !errors.Is(err, ErrForeignSlot) || !strings.Contains(err.Error(), "other") {
		t.Errorf("of another database: %v", err)
	}
	if _, err := conn.CreateSlot(t.Context(), db.Name); err == nil || !strings.Contains(err.Error(), "already exists") {
		t.Errorf("made twice: %v", err)
	}
	if n := slots(t, db); n != 1 {
		t.Errorf("%d slots", n)
	}
	if err := DropSlot(t.Context(), sql, db.Name); err != nil {
		t.Fatal(err)
	}
	if _, err := InspectSlot(t.Context(), sql, db.Name); !errors.Is(err, ErrNoSlot) {
		t.Fatalf("after: %v", err)
	}
	db.Exec(t, "SELECT pg_create_physical_replication_slot('"+db.Name+"')")
	defer db.Exec(t, "SELECT pg_drop_replication_slot('"+db.Name+"')")
	if slot, err = InspectSlot(t.Context(), sql, db.Name); err != nil || !errors.Is(slot.Usable(db.Name), ErrForeignSlot) {
		t.Errorf("physical: %+v, %v", slot, err)
	}
}

// The creation of a slot waits for a transaction that has written; who is in the way is named; giving up leaves no slot.
func TestCreateSlotGivesUp(t *testing.T) {
	db := pgtest.New(t)
	db.Exec(t, "CREATE TABLE other (v int)")
	tx, err := db.Connect(t).Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), "INSERT INTO other VALUES (42)"); err != nil {
		t.Fatal(err)
	}
	lines, err := Waiters(t.Context(), db.Connect(t))
	if err != nil || len(lines) != 1 || !strings.Contains(lines[0], "INSERT INTO other") || !strings.Contains(lines[0], "idle in transaction") {
		t.Errorf("in the way: %q, %v", lines, err)
	}
	conn := connect(t, db)
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := conn.CreateSlot(ctx, db.Name); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v, want DeadlineExceeded", err)
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	pgtest.Eventually(t, 5*time.Second, func() (bool, string) { return slots(t, db) == 0, "the slot is still there" })
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := connectFor(t, db).CreateSlot(t.Context(), db.Name); err != nil {
		t.Fatal(err)
	}
	if n := slots(t, db); n != 1 {
		t.Errorf("%d slots", n)
	}
}

func TestStartErrors(t *testing.T) {
	db := pgtest.New(t)
	_, err := connect(t, db).Start(t.Context(), "none", "pub", 1)
	if err == nil || !strings.Contains(err.Error(), `slot "none"`) {
		t.Errorf("got %v", err)
	}
	s := stream(t, db)
	_, err = connect(t, db).Start(t.Context(), db.Name, "pub", 1)
	var refused *pgconn.PgError
	if !errors.As(err, &refused) || refused.Code != "55006" /* object_in_use */ || IsPermanent(err) {
		t.Errorf("in use: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	// It is free at once.
	if slot, err := InspectSlot(t.Context(), db.Connect(t), db.Name); err != nil || slot.Active {
		t.Errorf("after Close: %+v, %v", slot, err)
	}
	if _, err := Connect(t.Context(), strings.Replace(db.URL, db.Name, "no_such_database", 1), "x"); !IsPermanent(err) {
		t.Errorf("no such database: %v", err)
	}
}

// inserts reads n Insert messages and returns the length of the longest.
func inserts(t *testing.T, s *Stream, n int) int {
	t.Helper()
	longest := 0
	for n > 0 {
		msg, err := next(t, s)
		if err != nil {
			t.Fatal(err)
		}
		if len(msg.Data) > 0 && msg.Data[0] == 'I' {
			n--
			longest = max(longest, len(msg.Data))
		}
	}
	return longest
}

// Rows larger than a gulp, and many small ones.
func TestRowsOfAllSizes(t *testing.T) {
	db := pgtest.New(t)
	s := stream(t, db)
	db.Exec(t, "INSERT INTO buffer SELECT i, 'x' FROM generate_series(1, 20000) i")
	inserts(t, s, 20_000)
	db.Exec(t, "INSERT INTO buffer SELECT i, repeat('x', i * 50000) FROM generate_series(1, 20) i")
	inserts(t, s, 20)
	db.Exec(t, "INSERT INTO buffer VALUES (1, repeat('y', 20 << 20))", "INSERT INTO buffer VALUES (2, '')")
	if n := inserts(t, s, 2); n < 20<<20 {
		t.Errorf("the longest had %d bytes", n)
	}
	db.Exec(t, "INSERT INTO buffer SELECT i, 'x' FROM generate_series(1, 10) i")
	inserts(t, s, 10)
	if len(s.buf) != gulpSize {
		t.Errorf("the buffer keeps %d bytes", len(s.buf))
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// While delivery blocks for longer than the server waits for a standby, or its kernel for room in the client's socket, the connection stays.
func TestStatusWhileDeliveryBlocks(t *testing.T) {
	server := pgtest.NewServer(t, postgres.Config{Settings: map[string]string{"wal_sender_timeout": "1s"}})
	db := server.New(t)
	s := stream(t, db)
	pid := func() int32 {
		return pgtest.Value[int32](t, db, "SELECT coalesce(max(active_pid), 0) FROM pg_replication_slots WHERE slot_name = $1", db.Name)
	}
	before := pid()
	db.Exec(t, "INSERT INTO buffer SELECT i, repeat('x', 1000) FROM generate_series(1, 50000) i") // more than sockets hold
	for name, blocked := range map[string]func(context.Context) error{
		"Hand": func(ctx context.Context) error { return s.Hand(ctx, make(chan *event.Batch), event.NewBatch()) },
		"Wait": func(ctx context.Context) error { return s.Wait(ctx, make(chan struct{})) },
	} {
		ctx, cancel := context.WithTimeout(t.Context(), 3500*time.Millisecond)
		if err := blocked(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%s: %v", name, err)
		}
		cancel()
		if now := pid(); now != before {
			t.Fatalf("%s: the walsender is %d and was %d", name, now, before)
		}
	}
	inserts(t, s, 50_000)
	if now := pid(); now != before {
		t.Errorf("the walsender is %d and was %d", now, before)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

// What is confirmed reaches the server at once, and all three positions of it.
func TestConfirmReachesTheServer(t *testing.T) {
	db := pgtest.New(t)
	s := stream(t, db)
	s.interval = time.Hour
	sql := db.Connect(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		for ctx.Err() == nil {
			if err := s.Fill(ctx, false); err != nil {
				done <- err
				return
			}
			for {
				if _, ok, err := s.Next(); err != nil {
					done <- err
					return
				} else if !ok {
					break
				}
			}
		}
		done <- nil
	}()
	// Until the server knows a flush position, it does not count for a COMMIT that waits.
	pgtest.Eventually(t, 2*time.Second, func() (bool, string) {
		return pgtest.Value[bool](t, db, "SELECT flush_lsn IS NOT NULL FROM pg_stat_replication WHERE application_name = $1", db.Name), "the server was told nothing"
	})
	for range 20 {
		db.Exec(t, "INSERT INTO buffer VALUES (1, 'x')")
		var text string
		if err := sql.QueryRow(t.Context(), "SELECT pg_current_wal_flush_lsn()::text").Scan(&text); err != nil {
			t.Fatal(err)
		}
		lsn, err := event.ParseLSN(text)
		if err != nil {
			t.Fatal(err)
		}
		s.Confirm(lsn, lsn)
		pgtest.Eventually(t, time.Second, func() (bool, string) {
			var reached bool
			var positions string
			err := sql.QueryRow(t.Context(), `SELECT coalesce((write_lsn, flush_lsn, replay_lsn) = ($2::text::pg_lsn, $2::text::pg_lsn, $2::text::pg_lsn), false),
				format('%s %s %s', write_lsn, flush_lsn, replay_lsn) FROM pg_stat_replication WHERE application_name = $1`, db.Name, text).
				Scan(&reached, &positions)
			if err != nil && !errors.Is(err, pgx.ErrNoRows) {
				t.Fatal(err)
			}
			return reached, fmt.Sprintf("the server knows %s, want %s", positions, text)
		})
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
