// Command http measures delivery to an HTTP receiver: how much faster several connections are than one, beside a plain loop around an
// http.Client; and what the other keys notice of one that is answered with 500 for minutes.
//
//	go run ./bench/http
//	go run ./bench/http --part stuck --for 5m --rate 2000
//
// It starts a Postgres server and a receiver of its own. Rates and durations are of this machine; the ratios are what travels.
package main

import (
	"context"
	"flag"
	"io"
	"time"

	"ebb/bench/rig"
)

func main() { rig.Main("http", measure) }

// bench is what the parts share.
type bench struct {
	*rig.Rig
	out io.Writer

	rounds int
	events int
	rate   int
	lasts  time.Duration
}

func measure(ctx context.Context, args []string, out io.Writer) (int, error) {
	b := &bench{out: out}
	flags := flag.NewFlagSet("http", flag.ContinueOnError)
	part := flags.String("part", "all", "rate, stuck or all")
	flags.IntVar(&b.rounds, "rounds", 5, "how often the rates are measured")
	flags.IntVar(&b.events, "events", 20_000, "events of a measured rate")
	flags.IntVar(&b.rate, "rate", 2000, "events a second while a key is stuck")
	flags.DurationVar(&b.lasts, "for", 5*time.Minute, "how long the key is stuck")
	if err := flags.Parse(args); err != nil {
		return rig.ExitUsage, nil // flag has said why
	}
	return rig.Measure(ctx, &b.Rig, *part, flags.Args(), rig.Part{Name: "rate", Run: b.measureRate}, rig.Part{Name: "stuck", Run: b.measureStuck})
}
