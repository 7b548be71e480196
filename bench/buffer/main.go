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
	"flag"
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

func measure(ctx context.Context, args []string, out io.Writer) (int, error) {
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
	return rig.Measure(ctx, &b.Rig, *part, flags.Args(), rig.Part{Name: "put", Run: b.put}, rig.Part{Name: "flat", Run: b.flat},
		rig.Part{Name: "backlog", Run: b.backlog}, rig.Part{Name: "trail", Run: b.trail})
}
