package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"ebb/bench/rig"
)

const (
	keys = 200
	// producers is how many sessions put, each some of the keys.
	producers = 4
	// report is how often figures are printed.
	report = 30 * time.Second
)

// measureStuck has one of the keys answered with 500, looks at the others meanwhile, and has it taken again in the end.
func (b *bench) measureStuck(ctx context.Context) error {
	r := newReceiver(0)
	defer r.Close()
	if err := b.Setup(ctx, r.URL, ""); err != nil {
		return err
	}
	db, err := b.Connect(ctx)
	if err != nil {
		return err
	}
	defer db.Close(ctx)
	p, err := b.Start(ctx, io.Discard) // it warns of the key
	if err != nil {
		return err
	}
	producing, stop := context.WithCancel(ctx)
	defer stop()
	var g errgroup.Group
	put := make([]int, producers)
	for i := range producers {
		g.Go(func() (err error) {
			put[i], err = b.produce(producing, ctx, i)
			return err
		})
	}
	fmt.Fprintf(b.out, "\n%d events/s of %d keys and the key %q:\n  %-32s %10s %10s %12s %14s %14s\n", b.rate, keys, stuckKey, "", "p50", "p99", "memory", "WAL kept", "set aside")
	look := func(what string) error {
		quantiles, _ := r.quantiles(0.5, 0.99)
		memory, err := p.Memory(ctx)
		if err != nil {
			return err
		}
		var kept, dead int64
		if err := db.QueryRow(ctx, "SELECT retained_wal_bytes, dead_letters FROM ebb.status").Scan(&kept, &dead); err != nil {
			return err
		}
		fmt.Fprintf(b.out, "  %-32s %10s %10s %9d MB %11d MB %14d\n", what, quantiles[0].Round(10*time.Microsecond), quantiles[1].Round(10*time.Microsecond),
			memory>>20, kept>>20, dead)
		_, _, err = r.count()
		return err
	}
	during := func(what string, lasts time.Duration) error {
		for began := time.Now(); time.Since(began) < lasts; {
			if err := rig.Sleep(ctx, min(report, lasts-time.Since(began))); err != nil {
				return err
			}
			if err := look(fmt.Sprintf("%s, %s", what, time.Since(began).Round(time.Second))); err != nil {
				return err
			}
		}
		return nil
	}
	r.quantiles() // of the start
	if err := during("all keys are taken", 2*report); err != nil {
		return err
	}
	r.breakKey(true)
	if err := during("one is answered with 500", b.lasts); err != nil {
		return err
	}
	r.breakKey(false)
	if err := during("it is taken again", 2*report); err != nil {
		return err
	}
	stop()
	if err := g.Wait(); err != nil {
		return err
	}
	total := 0
	for _, n := range put {
		total += n
	}
	for {
		taken, twice, err := r.count()
		if err != nil {
			return err
		}
		if taken == total {
			fmt.Fprintf(b.out, "  %d events were put, and all arrived, in the order of their keys; %d were sent twice\n", total, twice)
			break
		}
		if err := rig.Sleep(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
	_, err = p.Stop()
	return err
}

// produce puts events, a transaction each, until producing ends, and returns how many they were.
func (b *bench) produce(producing, ctx context.Context, producer int) (int, error) {
	db, err := b.Connect(ctx)
	if err != nil {
		return 0, err
	}
	defer db.Close(context.WithoutCancel(ctx))
	// The log writer would take its time, and nothing is decoded before it is flushed.
	if _, err := db.Exec(ctx, "SET synchronous_commit = on"); err != nil {
		return 0, err
	}
	next := map[string]int{}
	count := 0
	for began := time.Now(); ; count++ {
		if due := began.Add(time.Duration(count) * time.Second * producers / time.Duration(b.rate)); time.Until(due) > time.Millisecond {
			if rig.Sleep(producing, time.Until(due)) != nil {
				return count, nil
			}
		}
		if producing.Err() != nil {
			return count, nil
		}
		key := fmt.Sprintf("key-%d", producer+producers*(count%(keys/producers)))
		if producer == 0 && count%50 == 0 {
			key = stuckKey
		}
		if err := put(ctx, db, key, next[key]); err != nil {
			return count, errors.Join(errors.New("put an event"), err)
		}
		next[key]++
	}
}

func put(ctx context.Context, db *pgx.Conn, key string, number int) error {
	_, err := db.Exec(ctx, "SELECT ebb.put('t', to_json($1::text), $2)", fmt.Sprintf("%d %d", number, time.Now().UnixMicro()), key)
	return err
}
