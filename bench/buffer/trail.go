package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/jackc/pgx/v5"

	"ebb/bench/rig"
)

// stepBytes is as much log as the trailing slot is advanced by at once.
const stepBytes = 256 << 20

// trail says what the trailing slot keeps, and how long it takes to advance it by a step: of events, of what others write, and while a transaction is
// open from before that; and how fast a replay is, beside the first delivery.
func (b *bench) trail(ctx context.Context) error {
	if err := b.Setup(ctx, "stdout", ""); err != nil {
		return err
	}
	bridge, err := b.Start(ctx, os.Stderr)
	if err != nil {
		return err
	}
	defer func() { _, _ = bridge.Stop() }() // its memory is measured elsewhere
	db, err := b.Connect(ctx)
	if err != nil {
		return err
	}
	defer db.Close(ctx)
	if _, err := db.Exec(ctx, "CREATE TABLE other (pad text)"); err != nil {
		return err
	}
	events := "INSERT INTO ebb.buffer (topic, key, payload) SELECT 't', 'k' || i % 1000, $1::json FROM generate_series(1, 10000) i"
	others := "INSERT INTO other SELECT $1 FROM generate_series(1, 10000) i"
	began := time.Now()
	count, err := b.fill(ctx, db, events)
	if err != nil {
		return err
	}
	if err := awaitDrained(ctx, db); err != nil {
		return err
	}
	first := time.Since(began)

	began = time.Now()
	if err := b.Ebb(ctx, "replay", "--from", "trail"); err != nil {
		return err
	}
	fmt.Fprintf(b.out, "\n%d events: put and delivered in %s, read, counted and replayed in %s\n", count, first.Round(100*time.Millisecond),
		time.Since(began).Round(100*time.Millisecond))
	if err := b.kept(ctx, db); err != nil {
		return err
	}

	fmt.Fprintf(b.out, "to advance the trailing slot by %d MB of log:\n", stepBytes>>20)
	for _, what := range []struct {
		name, query string
		open        bool
	}{
		{"of events", events, false},
		{"of what others write", others, false},
		{"of what others write, a transaction open from before", others, true},
	} {
		var times []time.Duration
		for range 5 {
			took, err := b.advance(ctx, db, what.query, what.open)
			if err != nil {
				return err
			}
			times = append(times, took)
		}
		fmt.Fprintf(b.out, "  %-55s %6s\n", what.name, rig.Median(times).Round(time.Millisecond))
	}
	return b.kept(ctx, db)
}

// fill runs a statement until it has written a step of log, and returns how many rows that made.
func (b *bench) fill(ctx context.Context, db *pgx.Conn, query string) (rows int64, err error) {
	from, err := rig.Value[string](ctx, db, "SELECT pg_current_wal_lsn()::text")
	if err != nil {
		return 0, err
	}
	for written := int64(0); written < stepBytes; {
		tag, err := db.Exec(ctx, query, payload)
		if err != nil {
			return 0, err
		}
		rows += tag.RowsAffected()
		if written, err = rig.Value[int64](ctx, db, "SELECT pg_wal_lsn_diff(pg_current_wal_lsn(), $1::text::pg_lsn)::bigint", from); err != nil {
			return 0, err
		}
	}
	return rows, nil
}

// advance measures one step.
func (b *bench) advance(ctx context.Context, db *pgx.Conn, query string, open bool) (time.Duration, error) {
	if open {
		other, err := b.Connect(ctx)
		if err != nil {
			return 0, err
		}
		defer other.Close(ctx)
		if _, err := other.Exec(ctx, "BEGIN; SELECT pg_current_xact_id()"); err != nil {
			return 0, err
		}
	}
	if _, err := b.fill(ctx, db, query); err != nil {
		return 0, err
	}
	if err := awaitDrained(ctx, db); err != nil {
		return 0, err
	}
	time.Sleep(2 * time.Second) // for the slot to have confirmed it
	began := time.Now()
	_, err := db.Exec(ctx, "SELECT pg_replication_slot_advance('ebb_trail', confirmed_flush_lsn) FROM pg_replication_slots WHERE slot_name = 'ebb'")
	return time.Since(began), err
}

// kept says what is kept because of the trailing slot.
func (b *bench) kept(ctx context.Context, db *pgx.Conn) error {
	var wal string
	var age int64
	if err := db.QueryRow(ctx, `SELECT pg_size_pretty(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn)), age(catalog_xmin)::bigint
		FROM pg_replication_slots WHERE slot_name = 'ebb_trail'`).Scan(&wal, &age); err != nil {
		return err
	}
	_, err := fmt.Fprintf(b.out, "the trailing slot keeps %s of log, and catalog rows as of %d transactions ago\n", wal, age)
	return err
}
