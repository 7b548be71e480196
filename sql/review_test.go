package sql_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"ebb/internal/pgtest"
	"ebb/sql"
)

// F17: a bridge that has lost the lead takes back ticks although its term is over.
func TestReviewRewindOfALaterTerm(t *testing.T) {
	db := pgtest.New(t)
	ctx := t.Context()
	conn := db.Connect(t)
	if _, err := sql.Apply(ctx, conn, sql.Setup{Publication: "ebb", Keep: time.Hour}); err != nil {
		t.Fatal(err)
	}
	r, err := sql.PrepareSlot(ctx, conn, "s", "1", 1, "", "test")
	if err != nil {
		t.Fatal(err)
	}
	if err := sql.RecordSlot(ctx, conn, r, "10:10:", 16); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := sql.StoreTick(ctx, conn, r, sql.Tick{LSN: 16, Snapshot: "10:10:", Epoch: 1}, time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	other := db.Connect(t)
	if _, err := other.Exec(ctx, "BEGIN; UPDATE ebb.slot SET term = term + 1"); err != nil { // TakeTerm of the next leader, about to commit
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- sql.Rewind(context.WithoutCancel(ctx), conn, r, 1, true, "test") }()
	pgtest.Eventually(t, time.Minute, func() (bool, string) {
		return pgtest.Value[bool](t, db, "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"), "it does not wait"
	})
	if _, err := other.Exec(ctx, "COMMIT"); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, sql.ErrSuperseded) {
		t.Fatal(err)
	}
	if n := pgtest.Value[int64](t, db, "SELECT count(*) FROM ebb.tick"); n != 3 {
		t.Errorf("%d of 3 ticks are left", n)
	}
}
