package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"
)

const (
	// keep is the shortest recorded.keep that ebb takes; the ring turns once in ringTurn then.
	keep     = "10s"
	ringTurn = 16 * time.Second
)

// flat has a bridge deliver and collect while events come at a steady rate, for some turns of the ring, and says after each one how large the
// buffer is, how long the slowest put took, and what vacuum had to do.
func (b *bench) flat(ctx context.Context) error {
	if err := b.Setup(ctx, "stdout", "recorded: {keep: "+keep+"}\n"); err != nil {
		return err
	}
	bridge, err := b.Start(ctx, os.Stderr)
	if err != nil {
		return err
	}
	err = b.load(ctx)
	peak, stopErr := bridge.Stop()
	fmt.Fprintf(b.out, "peak memory of ebb run: %d MB\n", peak>>20)
	return errors.Join(err, stopErr)
}

func (b *bench) load(ctx context.Context) error {
	db, err := b.Connect(ctx)
	if err != nil {
		return err
	}
	defer db.Close(ctx)
	fmt.Fprintf(b.out, "\n%d events/s for %d turns of the ring:\n  turn    put so far      rows   size on disk   slowest put   99.9%%   vacuums, analyzes\n", b.rate, b.turns)
	every := time.Second / time.Duration(b.rate)
	began, n := time.Now(), 0
	for turn := 1; turn <= b.turns; turn++ {
		var times []time.Duration
		for time.Since(began) < time.Duration(turn)*ringTurn {
			for ; n < int(time.Since(began)/every); n++ {
				at := time.Now()
				if _, err := db.Exec(ctx, "SELECT ebb.put('order.paid', $1::json, 'order-7')", payload); err != nil {
					return err
				}
				times = append(times, time.Since(at))
			}
			time.Sleep(time.Millisecond)
		}
		var rows, vacuums int64
		var size string
		if err := db.QueryRow(ctx, `SELECT (SELECT count(*) FROM ebb.buffer), pg_size_pretty(sum(pg_total_relation_size(i.inhrelid))),
				sum(s.vacuum_count + s.autovacuum_count + s.analyze_count + s.autoanalyze_count)::bigint
			FROM pg_inherits i JOIN pg_stat_all_tables s ON s.relid = i.inhrelid WHERE i.inhparent = 'ebb.buffer'::regclass`).
			Scan(&rows, &size, &vacuums); err != nil {
			return err
		}
		slices.Sort(times)
		fmt.Fprintf(b.out, "  %4d  %12d  %8d   %12s   %11s  %6s   %17d\n", turn, n, rows, size, times[len(times)-1].Round(100*time.Microsecond),
			times[len(times)*999/1000].Round(10*time.Microsecond), vacuums)
	}
	return nil
}
