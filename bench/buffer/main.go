// Command buffer measures what the buffer table costs: to put an event, beside a plain INSERT into a plain table; to keep it from growing, over
// many turns of its ring of partitions; to ask for the backlog and to drain it, when there is much of it; and to keep the trailing slot.
//
//	go run ./bench/buffer
//	go run ./bench/buffer --part backlog --rows 10000000
//
// It starts a Postgres server of its own. Durations are of this machine; the ratios, medians over rounds that alternate, are what travels.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"

	"ebb/bench/rig"
)

func main() { rig.Main("buffer", measure) }

// bench is what the parts share.
type bench struct {
	*rig.Rig
	out io.Writer

	rounds  int
	perPart int
	rows    int
	turns   int
	rate    int
}

func measure(ctx context.Context, args []string, out io.Writer) (code int, err error) {
	b := &bench{out: out}
	flags := flag.NewFlagSet("buffer", flag.ContinueOnError)
	part := flags.String("part", "all", "put, flat, backlog, trail or all")
	flags.IntVar(&b.rounds, "rounds", 7, "how often each way of putting is measured")
	flags.IntVar(&b.perPart, "puts", 3000, "events a round")
	flags.IntVar(&b.rows, "rows", 1_000_000, "rows in the tables while the puts are measured again, and in the backlog")
	flags.IntVar(&b.turns, "turns", 12, "turns of the ring that the load lasts; with recorded.keep of an hour, 12 are a day")
	flags.IntVar(&b.rate, "rate", 2000, "events a second of that load")
	if err := flags.Parse(args); err != nil {
		return rig.ExitUsage, nil // flag has said why
	}
	parts := map[string]func(context.Context) error{"put": b.put, "flat": b.flat, "backlog": b.backlog, "trail": b.trail}
	order := []string{"put", "flat", "backlog", "trail"}
	if *part != "all" {
		if parts[*part] == nil || flags.NArg() > 0 {
			return rig.ExitUsage, fmt.Errorf("--part %s: want put, flat, backlog, trail or all", *part)
		}
		order = []string{*part}
	}
	if b.Rig, err = rig.New(ctx); err != nil {
		return rig.ExitFailed, err
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	for _, name := range order {
		if err := b.WithServer(ctx, parts[name]); err != nil {
			return rig.ExitFailed, fmt.Errorf("%s: %w", name, err)
		}
	}
	return 0, nil
}
