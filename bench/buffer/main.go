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
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"ebb/internal/postgres"
)

const (
	exitFailed = 1
	exitUsage  = 2
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	code, err := measure(ctx, os.Args[1:], os.Stdout)
	if err != nil {
		fmt.Fprintln(os.Stderr, "buffer:", err)
	}
	os.Exit(code)
}

// bench is what the parts share.
type bench struct {
	out    io.Writer
	dir    string
	ebb    string // the program
	server *postgres.Server

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
		return exitUsage, nil // flag has said why
	}
	parts := map[string]func(context.Context) error{"put": b.put, "flat": b.flat, "backlog": b.backlog, "trail": b.trail}
	order := []string{"put", "flat", "backlog", "trail"}
	if *part != "all" {
		if parts[*part] == nil || flags.NArg() > 0 {
			return exitUsage, fmt.Errorf("--part %s: want put, flat, backlog, trail or all", *part)
		}
		order = []string{*part}
	}
	if b.dir, err = os.MkdirTemp("", "ebb-buffer-"); err != nil {
		return exitFailed, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	b.ebb = filepath.Join(b.dir, "ebb")
	if text, err := exec.CommandContext(ctx, "go", "build", "-o", b.ebb, "ebb/cmd/ebb").CombinedOutput(); err != nil {
		return exitFailed, fmt.Errorf("build ebb: %w\n%s", err, text)
	}
	for _, name := range order {
		if err := b.withServer(ctx, parts[name]); err != nil {
			return exitFailed, fmt.Errorf("%s: %w", name, err)
		}
	}
	return 0, nil
}

// withServer runs a part with a new server.
func (b *bench) withServer(ctx context.Context, part func(context.Context) error) (err error) {
	b.server, err = postgres.Start(ctx, postgres.Config{Settings: map[string]string{
		"max_wal_size": "4GB", "shared_buffers": "256MB", "synchronous_commit": "off", "autovacuum_naptime": "5s", "jit": "off",
	}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.server.Close()) }()
	return part(ctx)
}

// setup sets up a database, which is the server's only one.
func (b *bench) setup(ctx context.Context, config string) error {
	file := filepath.Join(b.dir, "ebb.yaml")
	if err := os.WriteFile(file, []byte(fmt.Sprintf("postgres: %q\nsink: stdout\nlisten: \"\"\n%s", b.url(), config)), 0o600); err != nil {
		return err
	}
	if text, err := exec.CommandContext(ctx, b.ebb, "setup", "--config", file).CombinedOutput(); err != nil {
		return fmt.Errorf("ebb setup: %w\n%s", err, text)
	}
	return nil
}

// run starts ebb run, whose events nobody reads. stop ends it and returns its peak resident size in bytes.
func (b *bench) run(ctx context.Context) (stop func() (int64, error), err error) {
	cmd := exec.CommandContext(ctx, b.ebb, "run", "--config", filepath.Join(b.dir, "ebb.yaml"), "--log-level", "warn")
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return func() (int64, error) {
		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			return 0, err
		}
		if err := cmd.Wait(); err != nil {
			return 0, fmt.Errorf("ebb run: %w", err)
		}
		return peakMemory(cmd.ProcessState)
	}, nil
}

func (b *bench) url() string { return b.server.URL("postgres") }

func (b *bench) connect(ctx context.Context) (*pgx.Conn, error) { return pgx.Connect(ctx, b.url()) }

func median[T float64 | time.Duration](values []T) T {
	slices.Sort(values)
	return values[len(values)/2]
}

func value[T any](ctx context.Context, db *pgx.Conn, query string, args ...any) (v T, err error) {
	err = db.QueryRow(ctx, query, args...).Scan(&v)
	return v, err
}
