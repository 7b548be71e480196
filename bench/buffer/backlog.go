package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/jackc/pgx/v5"

	"ebb/bench/rig"
)

// backlog fills the buffer while no bridge runs, asks how much waits, and has a bridge drain it.
func (b *bench) backlog(ctx context.Context) error {
	if err := b.Setup(ctx, "stdout", ""); err != nil {
		return err
	}
	db, err := b.Connect(ctx)
	if err != nil {
		return err
	}
	defer db.Close(ctx)
	for left := b.rows; left > 0; left -= 10_000 {
		if _, err := db.Exec(ctx, "INSERT INTO ebb.buffer (topic, key, payload) SELECT 't' || i % 10, 'k' || i % 1000, $1::json FROM generate_series(1, $2) i",
			payload, min(left, 10_000)); err != nil {
			return err
		}
	}
	fmt.Fprintf(b.out, "\na backlog of %d rows, no bridge running:\n", b.rows)
	for _, query := range []string{
		"SELECT events FROM ebb.backlog_size()",
		"SELECT backlog FROM ebb.status",
		"SELECT count(*) FROM ebb.backlog",
	} {
		var times []time.Duration
		var n int64
		for range 5 {
			began := time.Now()
			if n, err = rig.Value[int64](ctx, db, query); err != nil {
				return err
			}
			times = append(times, time.Since(began))
		}
		fmt.Fprintf(b.out, "  %-40s %10d   %9s\n", query, n, rig.Median(times).Round(100*time.Microsecond))
	}
	bridge, err := b.Start(ctx, os.Stderr)
	if err != nil {
		return err
	}
	began := time.Now()
	err = awaitDrained(ctx, db)
	took := time.Since(began)
	peak, stopErr := bridge.Stop()
	if err := errors.Join(err, stopErr); err != nil {
		return err
	}
	fmt.Fprintf(b.out, "  drained in %s, %d events/s, peak memory of ebb run %d MB\n", took.Round(time.Second), int64(float64(b.rows)/took.Seconds()), peak>>20)
	return nil
}

func awaitDrained(ctx context.Context, db *pgx.Conn) error {
	for {
		n, err := rig.Value[int64](ctx, db, "SELECT events FROM ebb.backlog_size()")
		if err != nil || n == 0 {
			return err
		}
		select {
		case <-time.After(100 * time.Millisecond):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
