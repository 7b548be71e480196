package bridge_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"ebb/bridge"
	"ebb/internal/natstest"
	"ebb/internal/pgtest"
	"ebb/sql"
)

// fastRing has the ring of partitions turn in 1.6 seconds, and has every truncation look once more, under its lock, whether there are rows
// that the newest tick does not see.
func (f *fixture) fastRing() {
	f.t.Helper()
	f.db.Exec(f.t, "ALTER TABLE ebb.buffer ALTER COLUMN bucket SET DEFAULT ((extract(epoch FROM clock_timestamp()) * 10)::bigint % 16)::smallint",
		"CREATE TABLE truncation (undelivered bigint, total bigint)",
		`CREATE FUNCTION check_truncation() RETURNS trigger LANGUAGE plpgsql SET search_path = public AS $$
		BEGIN
			EXECUTE format('INSERT INTO truncation SELECT count(*) FILTER (WHERE NOT coalesce(pg_visible_in_snapshot(xid,
				(SELECT snapshot FROM ebb.tick ORDER BY id DESC LIMIT 1)), false)), count(*) FROM %s', TG_RELID::regclass);
			RETURN NULL;
		END $$`)
	for i := range sql.Buckets {
		f.db.Exec(f.t, fmt.Sprintf("CREATE TRIGGER zz_check BEFORE TRUNCATE ON ebb.buffer_%02d EXECUTE FUNCTION check_truncation()", i))
	}
}

// Rows that are delivered and old enough go, whole partitions at a time, while producers write, some of them for long and into partitions
// whose turn to be emptied has come. None goes that is not recorded as delivered.
func TestCollection(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	f.fastRing()
	s := newExactSink()
	cfg := f.config(s)
	cfg.Keep = 300 * time.Millisecond
	r := f.runWith(cfg)

	var mu sync.Mutex
	var committed []int64
	var producers sync.WaitGroup
	ctx, cancel := context.WithTimeout(t.Context(), 6*time.Second)
	defer cancel()
	for range 4 {
		db := f.db.Connect(t)
		producers.Go(func() {
			for ctx.Err() == nil {
				var ids []int64
				tx, err := db.Begin(t.Context())
				if err != nil {
					t.Error(err)
					return
				}
				for range 1 + rand.IntN(3) {
					into := "DEFAULT"
					if rand.IntN(2) == 0 {
						into = fmt.Sprint(rand.IntN(sql.Buckets))
					}
					var id int64
					if err := tx.QueryRow(t.Context(), "INSERT INTO ebb.buffer (topic, payload, bucket) VALUES ('t', '{}', "+into+") RETURNING id").
						Scan(&id); err != nil {
						t.Error(err)
						return
					}
					ids = append(ids, id)
					time.Sleep(time.Duration(rand.IntN(20)) * time.Millisecond)
				}
				if rand.IntN(5) == 0 {
					err = tx.Rollback(t.Context())
				} else if err = tx.Commit(t.Context()); err == nil {
					mu.Lock()
					committed = append(committed, ids...)
					mu.Unlock()
				}
				if err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	producers.Wait()
	f.awaitBacklog(0)
	pgtest.Eventually(t, patience, func() (bool, string) {
		n := pgtest.Value[int64](t, f.db, "SELECT count(*) FROM ebb.buffer")
		return n == 0, fmt.Sprintf("%d rows are left", n)
	})
	r.stop()
	sameSet(t, ids(t, s.all()), committed)
	type truncations struct{ Undelivered, Rows, Times int64 }
	var got truncations
	if err := f.db.Connect(t).QueryRow(t.Context(), "SELECT sum(undelivered), sum(total), count(*) FROM truncation").
		Scan(&got.Undelivered, &got.Rows, &got.Times); err != nil {
		t.Fatal(err)
	}
	if got.Undelivered != 0 || got.Rows != int64(len(committed)) || got.Times < 4 {
		t.Errorf("truncations: %+v, with %d rows committed", got, len(committed))
	}
	if n := pgtest.Value[int64](t, f.db, "SELECT sum(pg_relation_size(inhrelid))::bigint FROM pg_inherits WHERE inhparent = 'ebb.buffer'::regclass"); n > 2*8192 {
		t.Errorf("the empty buffer takes %d bytes", n)
	}
}

// A partition stays while something in it is undelivered, or while a transaction has written to it, and that is said.
func TestCollectionWaits(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	f.fastRing()
	var said lockedBuffer
	f.log = slog.New(slog.NewTextHandler(&said, &slog.HandlerOptions{Level: slog.LevelDebug}))
	awaitLog := func(what string) {
		t.Helper()
		pgtest.Eventually(t, patience, func() (bool, string) { return strings.Contains(said.String(), what), said.String() })
	}
	s := newExactSink()
	cfg := f.config(s)
	cfg.Keep = 400 * time.Millisecond

	s.block()
	r := f.runWith(cfg)
	f.db.Exec(t, "INSERT INTO ebb.buffer (topic, payload, bucket) VALUES ('t', '{}', 3)")
	awaitLog("it holds events that are not recorded as delivered\" bucket=3")
	if n := len(f.rows()); n != 1 {
		t.Fatalf("the buffer has %d rows, want 1", n)
	}
	s.unblock()
	pgtest.Eventually(t, patience, func() (bool, string) { return len(f.rows()) == 0, "the row stays" })

	db := f.db.Connect(t)
	tx, err := db.Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), "INSERT INTO ebb.buffer (topic, payload, bucket) VALUES ('t', '{}', 5)"); err != nil {
		t.Fatal(err)
	}
	f.db.Exec(t, "INSERT INTO ebb.buffer (topic, payload, bucket) VALUES ('t', '{}', 5)")
	awaitLog("a transaction that uses it is open (see pg_locks)\" bucket=5")
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	pgtest.Eventually(t, patience, func() (bool, string) { return len(f.rows()) == 0, "the rows stay" })
	r.stop()
	if got := ids(t, s.all()); len(got) != 3 {
		t.Errorf("delivered %d, want 3 events", got)
	}
	if strings.Contains(said.String(), "delivered rows are not collected") {
		t.Error(said.String())
	}
}

// A bridge whose term is over collects nothing: the one after it may have taken back what it goes by.
func TestCollectionOfAnOldTerm(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	f.put(1)
	s := newExactSink()
	r := f.run(s)
	f.settle()
	r.stop()
	f.db.Exec(t, "UPDATE ebb.tick SET delivered_at = delivered_at - interval '1 day'")
	db := f.db.Connect(t)
	record, err := sql.ReadSlot(t.Context(), db, f.slot)
	if err != nil {
		t.Fatal(err)
	}
	written := pgtest.Value[int](t, f.db, "SELECT bucket FROM ebb.buffer")
	f.db.Exec(t, fmt.Sprintf("ALTER TABLE ebb.buffer ALTER COLUMN bucket SET DEFAULT %d", (written+8)%sql.Buckets))
	if _, err := sql.TakeTerm(t.Context(), db, f.slot); err != nil {
		t.Fatal(err)
	}
	if got, err := sql.Collect(t.Context(), db, record, written, time.Hour); !errors.Is(err, sql.ErrSuperseded) {
		t.Fatalf("collected: %q, %v", got, err)
	}
	record.Term++
	for _, want := range []sql.Collected{sql.CollectedEmptied, sql.CollectedEmpty} {
		if got, err := sql.Collect(t.Context(), db, record, written, time.Hour); got != want || err != nil {
			t.Fatalf("collected: %q, %v, want %q", got, err, want)
		}
	}
}

// What was collected cannot be delivered again. A stream that has forgotten no more than the buffer still holds is filled up from it; one that
// has forgotten more stops the bridge.
func TestForgottenAfterCollection(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	server := natstest.New(t)
	f.put(10)
	f.delivered(server, 10)
	f.db.Exec(t, "UPDATE ebb.tick SET delivered_at = delivered_at - interval '1 day'",
		fmt.Sprintf("ALTER TABLE ebb.buffer ALTER COLUMN bucket SET DEFAULT %d", (pgtest.Value[int](t, f.db, "SELECT bucket FROM ebb.buffer LIMIT 1")+8)%sql.Buckets))
	cfg := f.config(f.stream(server))
	cfg.Keep = 8 * time.Hour
	r := f.runWith(cfg)
	r.await(bridge.RoleLeader)
	r.stop()
	db := f.db.Connect(t)
	record, err := sql.ReadSlot(t.Context(), db, f.slot)
	if err != nil {
		t.Fatal(err)
	}
	emptied := 0
	for bucket := range sql.Buckets {
		got, err := sql.Collect(t.Context(), db, record, bucket, 8*time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		if got == sql.CollectedEmptied {
			emptied++
		}
	}
	if emptied != 1 {
		t.Fatalf("emptied %d partitions, want 1", emptied)
	}
	f.put(5)
	f.delivered(server, 15)
	_, messages := f.streamed(server, 15)

	f.forgetBehind(server, messages, 12)
	r = f.run(f.stream(server))
	f.streamed(server, 15)
	f.settle()
	r.stop()
	got, messages := f.streamed(server, 15)
	if slices.Sort(got); !slices.Equal(got[10:], f.rows()) || slices.Contains(got, 0) {
		t.Errorf("delivered %d; the buffer has %d", got, f.rows())
	}

	f.forgetBehind(server, messages, 5)
	if err := f.run(f.stream(server)).wait(); err == nil || !strings.Contains(err.Error(), "--accept-gap") {
		t.Errorf("ended with %v", err)
	}
}
