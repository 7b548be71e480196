// Command torture has bridges, NATS and Postgres fail in every way that it knows, while producers write, and then compares the
// stream with what was committed.
//
//	go run ./bench/torture --rounds 2 --duration 30s
//	go run ./bench/torture --list
//
// What it does comes from a seed, which it prints. The same seed makes the same schedule and the same transactions; when exactly a
// fault meets a transaction is up to the machine, so that a seed that failed may have to be tried again.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == brokerCommand {
		os.Exit(runBroker(os.Args[2:]))
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	code, err := torture(ctx, os.Args[1:], os.Stdout)
	if err != nil {
		fmt.Fprintln(os.Stderr, "torture:", err)
	}
	os.Exit(code)
}

// options are those of the command line.
type options struct {
	out      io.Writer
	program  string // ebb
	kinds    []kind
	duration time.Duration
	faults   int
	bridges  int
	rate     float64
	styles   []style
	verbose  bool
}

const (
	exitOK       = 0
	exitViolated = 1
	exitUsage    = 2
)

func torture(ctx context.Context, args []string, out io.Writer) (int, error) {
	o := options{out: out}
	flags := flag.NewFlagSet("torture", flag.ContinueOnError)
	seed := flags.Uint64("seed", 0, "seed of the first round; the next ones count up (default: from the clock)")
	flags.DurationVar(&o.duration, "duration", 40*time.Second, "how long faults come in a round; waiting until all is delivered comes on top")
	flags.IntVar(&o.faults, "faults", 0, "how many faults a round has at most (default: as many as the duration has room for)")
	rounds := flags.Int("rounds", 1, "how many rounds, each on fresh servers")
	total := flags.Duration("total", 0, "begin rounds until so much time is over, instead of counting them")
	only := flags.String("only", "", "kinds of faults to use, with commas; a star at the end stands for anything")
	skip := flags.String("skip", "", "kinds of faults to leave out")
	list := flags.Bool("list", false, "print the kinds of faults, and do nothing")
	plan := flags.Bool("plan", false, "print the schedule, and do nothing")
	flags.IntVar(&o.bridges, "bridges", 3, "how many bridges")
	flags.Float64Var(&o.rate, "rate", 600, "about how many rows are written in a second")
	producers := flags.String("producers", defaultStyles, "how each producer writes: "+strings.Join(styleNames, ", "))
	takeovers := flags.Int("takeover", 0, "instead of faults, kill the leader of two bridges so many times, and measure how long nothing is delivered")
	race := flags.Bool("race", false, "build ebb with the race detector")
	keep := flags.String("keep", "", "keep the logs of all rounds in this directory (default: of those that failed, in a temporary one)")
	asJSON := flags.String("json", "", "write the report to this file")
	markdown := flags.Bool("markdown", false, "print the table of faults in Markdown as well")
	flags.BoolVar(&o.verbose, "v", false, "print every fault as it comes")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return exitOK, nil
		}
		return exitUsage, nil // flag has said what
	}
	var err error
	if o.kinds, err = chooseKinds(*only, *skip); err != nil {
		return exitUsage, err
	}
	if o.styles, err = parseStyles(*producers); err != nil {
		return exitUsage, err
	}
	if flags.NArg() > 0 || o.bridges < 1 || o.rate <= 0 || o.duration <= 0 || *rounds < 1 {
		return exitUsage, errors.New("there are no arguments, and --bridges, --rate, --duration and --rounds must be more than 0")
	}
	if *seed == 0 {
		*seed = uint64(time.Now().UnixNano())
	}
	switch {
	case *list:
		for _, k := range o.kinds {
			fmt.Fprintf(out, "%-24s %s\n", k.name, k.what)
		}
		return exitOK, nil
	case *plan:
		fmt.Fprintf(out, "seed %d\n", *seed)
		for _, f := range makeSchedule(*seed, o.kinds, o.duration, o.faults) {
			fmt.Fprintln(out, f)
		}
		return exitOK, nil
	}

	work, err := makeWorkDir()
	if err != nil {
		return exitViolated, err
	}
	defer os.RemoveAll(work)
	if o.program, err = buildEbb(ctx, work, *race); err != nil {
		return exitViolated, err
	}
	if *takeovers > 0 {
		return measureTakeovers(ctx, o, *seed, *takeovers, work)
	}
	report := runReport{Command: "go run ./bench/torture " + strings.Join(args, " ")}
	began := time.Now()
	for n := uint64(0); ctx.Err() == nil && (*total > 0 && time.Since(began) < *total || *total == 0 && n < uint64(*rounds)); n++ {
		one, err := oneRound(ctx, o, *seed+n, work, *keep, args)
		if one != nil {
			report.Rounds = append(report.Rounds, one)
		}
		if err != nil && ctx.Err() == nil {
			return exitViolated, fmt.Errorf("seed %d: %w", *seed+n, err)
		}
	}
	report.Seconds = time.Since(began).Seconds()
	report.sum()
	if err := report.table(out); err != nil {
		return exitViolated, err
	}
	if *markdown {
		report.markdown(out)
	}
	if *asJSON != "" {
		if err := writeJSON(*asJSON, &report); err != nil {
			return exitViolated, err
		}
	}
	if ctx.Err() != nil {
		return exitViolated, errors.New("interrupted")
	}
	if !report.OK {
		return exitViolated, nil
	}
	return exitOK, nil
}

// oneRound runs a round, prints what became of it, and keeps its logs if it failed.
func oneRound(ctx context.Context, o options, seed uint64, work, keep string, args []string) (*roundReport, error) {
	fmt.Fprintf(o.out, "seed %d\n", seed)
	dir := filepath.Join(work, fmt.Sprintf("round-%d", seed))
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make a directory: %w", err)
	}
	r, err := runRound(ctx, o, seed, dir)
	fmt.Fprintln(o.out, r.line())
	good := err == nil && r.ok()
	switch {
	case keep != "" || !good && ctx.Err() == nil:
		kept := keep
		if kept == "" {
			kept = os.TempDir()
		}
		kept = filepath.Join(kept, fmt.Sprintf("ebb-torture-logs-%d", seed))
		if moveErr := keepLogs(dir, kept); moveErr != nil {
			return r, errors.Join(err, moveErr)
		}
		fmt.Fprintf(o.out, "logs: %s\n", kept)
	}
	if !good && ctx.Err() == nil {
		r.failures(o.out)
		fmt.Fprintf(o.out, "again: go run ./bench/torture %s\n", strings.Join(commandFor(seed, args), " "))
	}
	return r, errors.Join(err, os.RemoveAll(dir))
}

// commandFor are the arguments of one round with the seed: those that were given, without the ones that it replaces.
func commandFor(seed uint64, args []string) []string {
	command := []string{fmt.Sprintf("--seed=%d", seed), "--rounds=1"}
	replaced := map[string]bool{"seed": true, "rounds": true, "total": true, "json": true, "keep": true}
	for i := 0; i < len(args); i++ {
		name, _, has := strings.Cut(strings.TrimLeft(args[i], "-"), "=")
		if strings.HasPrefix(args[i], "-") && replaced[name] {
			if !has {
				i++
			}
			continue
		}
		command = append(command, args[i])
	}
	return command
}

func keepLogs(from, to string) error {
	if err := os.RemoveAll(to); err != nil {
		return fmt.Errorf("keep the logs: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return fmt.Errorf("keep the logs: %w", err)
	}
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		return fmt.Errorf("keep the logs: %w", err)
	}
	return nil
}

func writeJSON(path string, report *runReport) error {
	file, err := os.Create(path)
	if err != nil {
		return fmt.Errorf("write the report: %w", err)
	}
	return errors.Join(report.json(file), file.Close())
}

// buildEbb builds the program under test.
func buildEbb(ctx context.Context, dir string, race bool) (string, error) {
	path := filepath.Join(dir, "ebb")
	args := []string{"build", "-o", path}
	if race {
		args = append(args, "-race")
	}
	if out, err := exec.CommandContext(ctx, "go", append(args, "ebb/cmd/ebb")...).CombinedOutput(); err != nil {
		return "", fmt.Errorf("build ebb: %w: %s", err, out)
	}
	return path, nil
}
