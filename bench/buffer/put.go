package main

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"

	"ebb/bench/rig"
)

// ways are the ways of putting an event that are compared; the first one is the reference.
var ways = []struct{ name, query string }{
	{"INSERT into a plain table", "INSERT INTO plain (topic, key, payload) VALUES ($1, $2, $3)"},
	{"INSERT into ebb.buffer", "INSERT INTO ebb.buffer (topic, key, payload) VALUES ($1, $2, $3)"},
	{"ebb.put", "SELECT ebb.put($1, $3::json, $2)"},
}

// plain is what one would have without the ring, the transaction's id and the views.
const plain = `CREATE TABLE plain (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, topic text NOT NULL, key text, payload json NOT NULL,
	headers jsonb, created_at timestamptz NOT NULL DEFAULT clock_timestamp())`

const payload = `{"order": 7, "customer": 1000123, "total": "12.50", "currency": "EUR", "lines": [{"sku": "a-1", "n": 2}, {"sku": "b-7", "n": 1}], "note": "a payload of the usual size, some two hundred bytes"}`

// put compares the ways, a transaction an event, in empty tables and in ones that hold rows.
func (b *bench) put(ctx context.Context) error {
	if err := b.Setup(ctx, "stdout", ""); err != nil {
		return err
	}
	db, err := b.Connect(ctx)
	if err != nil {
		return err
	}
	defer db.Close(ctx)
	if _, err := db.Exec(ctx, plain); err != nil {
		return err
	}
	for _, rows := range []int{0, b.rows} {
		if rows > 0 {
			for _, table := range []string{"plain", "ebb.buffer"} {
				if _, err := db.Exec(ctx, "INSERT INTO "+table+" (topic, key, payload) SELECT 't', 'k' || i % 1000, $1::json FROM generate_series(1, $2) i",
					payload, rows); err != nil {
					return err
				}
			}
			if _, err := db.Exec(ctx, "CHECKPOINT"); err != nil {
				return err
			}
		}
		times := make([][]time.Duration, len(ways))
		ratios := make([][]float64, len(ways))
		for range b.rounds {
			for i, way := range ways {
				took, err := b.time(ctx, db, way.query)
				if err != nil {
					return fmt.Errorf("%s: %w", way.name, err)
				}
				times[i] = append(times[i], took)
				ratios[i] = append(ratios[i], float64(took)/float64(times[0][len(times[0])-1]))
			}
		}
		fmt.Fprintf(b.out, "\nputs, one in a transaction, into tables of %d rows:\n", rows)
		for i, way := range ways {
			fmt.Fprintf(b.out, "  %-28s %8s an event   × %.2f\n", way.name, rig.Median(times[i]).Round(100*time.Nanosecond), rig.Median(ratios[i]))
		}
	}
	return nil
}

// time returns how long one event takes.
func (b *bench) time(ctx context.Context, db *pgx.Conn, query string) (time.Duration, error) {
	began := time.Now()
	for i := range b.perPart {
		if _, err := db.Exec(ctx, query, "order.paid", fmt.Sprintf("order-%d", i%1000), payload); err != nil {
			return 0, err
		}
	}
	return time.Since(began) / time.Duration(b.perPart), nil
}
