// Command ebb is the event buffer bridge: it carries the rows that a service writes into a buffer table of Postgres to NATS
// JetStream or an HTTP server.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/spf13/cobra"

	"ebb/internal/config"
)

// Exit codes.
const (
	exitOK     = 0
	exitFailed = 1
	exitUsage  = 2
	exitCheck  = 3
)

// errCheck says that a command did its work and found something wanting, which it has printed.
var errCheck = errors.New("a check fell short")

// usageError is a command line that cannot be understood.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

func main() {
	// The first signal asks for an end in good order. From then on signals have their default action, so that a second one
	// ends the program at once.
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	os.Exit(execute(ctx, os.Args[1:], os.Stdin, os.Stdout, os.Stderr))
}

// execute runs a command line and returns the exit code.
func execute(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	root := newRoot(&app{stdin: stdin, stdout: stdout, stderr: stderr})
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	err := root.ExecuteContext(ctx)
	if err == nil {
		return exitOK
	}
	if errors.Is(err, errCheck) {
		return exitCheck
	}
	fmt.Fprintln(stderr, "ebb:", text(err))
	var usage *usageError
	var cfg *config.Error
	if errors.As(err, &usage) || errors.As(err, &cfg) {
		return exitUsage
	}
	return exitFailed
}

// text is what is printed of an error. That of a connection has a line for each address and for each attempt with and without
// TLS, of which many are the same.
func text(err error) string {
	var connect *pgconn.ConnectError
	if !errors.As(err, &connect) {
		return err.Error()
	}
	lines := strings.Split(err.Error(), "\n")
	for i := range lines {
		lines[i] = strings.TrimSpace(lines[i])
	}
	lines = slices.Compact(lines)
	return strings.ReplaceAll(strings.Join(lines, "; "), ":; ", ": ")
}

// app is what all commands share.
type app struct {
	stdin          io.Reader
	stdout, stderr io.Writer

	file, postgres, sink string
	logLevel, logFormat  string
}

func newRoot(a *app) *cobra.Command {
	root := &cobra.Command{
		Use:   "ebb",
		Short: "ebb carries events from a buffer table in Postgres to NATS JetStream or an HTTP server",
		Long: "ebb, the event buffer bridge, takes the rows that a service writes into a buffer table inside its own transaction,\n" +
			"reads them from a logical replication slot, delivers them to NATS JetStream or an HTTP server, and confirms them\n" +
			"only after delivery.",
		SilenceUsage:      true,
		SilenceErrors:     true,
		CompletionOptions: cobra.CompletionOptions{HiddenDefaultCmd: true},
	}
	flags := root.PersistentFlags()
	flags.StringVar(&a.file, "config", "", "configuration `file` (default ebb.yaml when present)")
	flags.StringVar(&a.postgres, "postgres", "", "Postgres `URL` or DSN (else EBB_POSTGRES, else DATABASE_URL)")
	flags.StringVar(&a.sink, "sink", "", "`URL` of the sink, or stdout or embedded (else EBB_SINK)")
	flags.StringVar(&a.logLevel, "log-level", "info", "debug, info, warn or error")
	flags.StringVar(&a.logFormat, "log-format", "text", "text or json")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &usageError{err} })
	root.AddCommand(newSetup(a), newRun(a), newStatus(a), newDoctor(a), newReplay(a), newDead(a), newDemo(a), newTeardown(a), newVersion(a))
	for _, cmd := range root.Commands() {
		if !cmd.HasSubCommands() {
			cmd.Args = noArgs
		}
	}
	root.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return &usageError{fmt.Errorf("unknown command %q; ebb --help lists them", args[0])}
		}
		return cmd.Help()
	}
	root.Args = cobra.ArbitraryArgs
	return root
}

func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return &usageError{fmt.Errorf("%s takes no argument, got %q", cmd.CommandPath(), args[0])}
	}
	return nil
}

// logger returns the logger that the flags ask for; it writes to stderr.
func (a *app) logger() (*slog.Logger, error) {
	var level slog.Level
	if err := level.UnmarshalText([]byte(a.logLevel)); err != nil {
		return nil, &usageError{fmt.Errorf("--log-level %q: want debug, info, warn or error", a.logLevel)}
	}
	options := &slog.HandlerOptions{Level: level}
	switch a.logFormat {
	case "text":
		return slog.New(slog.NewTextHandler(a.stderr, options)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(a.stderr, options)), nil
	default:
		return nil, &usageError{fmt.Errorf("--log-format %q: want text or json", a.logFormat)}
	}
}

// loadForPostgres is load for a command that cannot do without a Postgres.
func (a *app) loadForPostgres() (*config.Config, *slog.Logger, error) {
	cfg, log, err := a.load()
	if err == nil {
		err = cfg.RequirePostgres()
	}
	return cfg, log, err
}

// load reads the configuration and makes the logger.
func (a *app) load() (*config.Config, *slog.Logger, error) {
	log, err := a.logger()
	if err != nil {
		return nil, nil, err
	}
	sources := config.Sources{File: a.file, FileRequired: a.file != "", Flags: config.Flags{Postgres: a.postgres, Sink: a.sink}}
	if a.file == "" {
		sources.File = "ebb.yaml"
	}
	cfg, err := config.Load(sources)
	if err != nil {
		return nil, nil, err
	}
	return cfg, log, nil
}
