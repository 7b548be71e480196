// Package rig is what measured comparisons share: a Postgres server of their own, and the program ebb beside it.
package rig

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"ebb/internal/postgres"
)

// The exit codes of a measurement.
const (
	ExitFailed = 1
	ExitUsage  = 2
)

// Main runs a measurement as a program, until it is interrupted.
func Main(name string, measure func(ctx context.Context, args []string, out io.Writer) (code int, err error)) {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	code, err := measure(ctx, os.Args[1:], os.Stdout)
	if err != nil {
		fmt.Fprintln(os.Stderr, name+":", err)
	}
	os.Exit(code)
}

// Part is a part of a measurement.
type Part struct {
	Name string
	Run  func(context.Context) error
}

// Measure runs the one of the parts that is asked for, or all of them in order, each with a new server of the rig, which it makes.
func Measure(ctx context.Context, r **Rig, asked string, rest []string, parts ...Part) (code int, err error) {
	if asked != "all" {
		names := make([]string, len(parts))
		for i, p := range parts {
			names[i] = p.Name
		}
		parts = slices.DeleteFunc(parts, func(p Part) bool { return p.Name != asked })
		if len(parts) == 0 || len(rest) > 0 {
			return ExitUsage, fmt.Errorf("--part %s: want %s or all", asked, strings.Join(names, ", "))
		}
	}
	if *r, err = New(ctx); err != nil {
		return ExitFailed, err
	}
	defer func() { err = errors.Join(err, (*r).Close()) }()
	for _, p := range parts {
		if err := (*r).WithServer(ctx, p.Run); err != nil {
			return ExitFailed, fmt.Errorf("%s: %w", p.Name, err)
		}
	}
	return 0, nil
}

// Rig is a Postgres server and ebb.
type Rig struct {
	server *postgres.Server
	dir    string
	ebb    string // the program
}

// New builds ebb from the source that it is called in.
func New(ctx context.Context) (*Rig, error) {
	dir, err := os.MkdirTemp("", "ebb-bench-")
	if err != nil {
		return nil, err
	}
	r := &Rig{dir: dir, ebb: filepath.Join(dir, "ebb")}
	if text, err := exec.CommandContext(ctx, "go", "build", "-o", r.ebb, "ebb/cmd/ebb").CombinedOutput(); err != nil {
		return nil, errors.Join(fmt.Errorf("build ebb: %w\n%s", err, text), r.Close())
	}
	return r, nil
}

// Close removes the program.
func (r *Rig) Close() error { return os.RemoveAll(r.dir) }

// WithServer runs a part of a measurement with a new server, whose database postgres is empty.
func (r *Rig) WithServer(ctx context.Context, part func(context.Context) error) (err error) {
	r.server, err = postgres.Start(ctx, postgres.Config{Settings: map[string]string{
		"max_wal_size": "4GB", "shared_buffers": "256MB", "synchronous_commit": "off", "autovacuum_naptime": "5s", "jit": "off",
	}})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.server.Close()) }()
	return part(ctx)
}

// Setup writes a configuration for the sink, with some lines of YAML, and sets up the database.
func (r *Rig) Setup(ctx context.Context, sink, config string) error {
	if err := os.WriteFile(r.config(), fmt.Appendf(nil, "postgres: %q\nsink: %q\nlisten: \"\"\n%s", r.url(), sink, config), 0o600); err != nil {
		return err
	}
	return r.Ebb(ctx, "setup")
}

// Ebb runs a command of ebb.
func (r *Rig) Ebb(ctx context.Context, command string, args ...string) error {
	args = append([]string{command, "--config", r.config()}, args...)
	if text, err := exec.CommandContext(ctx, r.ebb, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("ebb %s: %w\n%s", command, err, text)
	}
	return nil
}

// Start starts ebb run. What it writes to stdout nobody reads, and its warnings go to log.
func (r *Rig) Start(ctx context.Context, log io.Writer) (*Process, error) {
	cmd := exec.CommandContext(ctx, r.ebb, "run", "--config", r.config(), "--log-level", "warn")
	cmd.Stderr = log
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return &Process{cmd}, nil
}

func (r *Rig) config() string { return filepath.Join(r.dir, "ebb.yaml") }

func (r *Rig) url() string { return r.server.URL("postgres") }

// Connect connects to the server's database.
func (r *Rig) Connect(ctx context.Context) (*pgx.Conn, error) { return pgx.Connect(ctx, r.url()) }

// Process is a running ebb run.
type Process struct{ cmd *exec.Cmd }

// Stop ends it and returns its peak resident size in bytes.
func (p *Process) Stop() (int64, error) {
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return 0, err
	}
	if err := p.cmd.Wait(); err != nil {
		return 0, fmt.Errorf("ebb run: %w", err)
	}
	return peakMemory(p.cmd.ProcessState)
}

// Median sorts the values.
func Median[T float64 | time.Duration](values []T) T {
	slices.Sort(values)
	return values[len(values)/2]
}

// Value returns the one value of a query's result.
func Value[T any](ctx context.Context, db *pgx.Conn, query string, args ...any) (v T, err error) {
	err = db.QueryRow(ctx, query, args...).Scan(&v)
	return v, err
}

// Sleep waits.
func Sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
