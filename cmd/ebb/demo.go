package main

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/jackc/pgx/v5"
	natsd "github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"ebb/internal/config"
	"ebb/internal/natsserver"
	"ebb/internal/postgres"
	"ebb/internal/sleep"
)

const (
	// demoPatience is how long the demo waits for an event that is under way.
	demoPatience = 15 * time.Second
	// demoQuiet is how long it waits for one that must not come.
	demoQuiet = 300 * time.Millisecond
)

func newDemo(a *app) *cobra.Command {
	var keep bool
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show the whole way on a private Postgres and NATS server, and check it",
		Long: "Demo starts a Postgres and a NATS server of its own, sets them up, runs a bridge between them and tells the story of\n" +
			"an app that moves between groups: every move is a row and an event, written in one transaction.\n\n" +
			"It needs nothing but the programs of a Postgres server, which it looks for in EBB_PG_BIN, in PATH and in\n" +
			"/usr/lib/postgresql, and downloads if there are none. It ends with a check and removes what it made.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := a.logger()
			if err != nil {
				return err
			}
			if !cmd.Flags().Changed("log-level") {
				log = slog.New(slog.DiscardHandler) // the story is told on stdout
			}
			return demo(cmd.Context(), a.stdout, log, keep)
		},
	}
	cmd.Flags().BoolVar(&keep, "keep", false, "leave everything running until interrupted, and print how to look at it")
	return cmd
}

// move is one row of the story.
type move struct {
	time, app, group string
	rollback         bool
	bridgeDown       bool
}

// The story. The article's app moves at times 001 to 004; what it did not do after all stands between.
var story = []move{
	{time: "001", app: "A1", group: "G1"},
	{time: "002", app: "A1", group: "G2"},
	{time: "003", app: "A1", group: "G9", rollback: true},
	{time: "003", app: "A1", group: "G3", bridgeDown: true},
	{time: "004", app: "A1", group: "G1"},
}

// arrival is an event as the subscriber saw it.
type arrival struct {
	ID, Topic, Key string
	Payload        membership
	// Latency is from the commit of the transaction to the arrival, by the clock of this machine.
	Latency time.Duration
}

type membership struct {
	App   string `json:"app"`
	Group string `json:"group"`
	Time  string `json:"time"`
}

// demonstration holds what the demo runs.
type demonstration struct {
	out      io.Writer
	bold     func(string) string
	dim      func(string) string
	log      *slog.Logger
	cfg      *config.Config
	db       *pgx.Conn
	arrivals chan arrival
	seen     []arrival

	stopBridge func() error
}

func demo(ctx context.Context, out io.Writer, log *slog.Logger, keep bool) (err error) {
	d := &demonstration{out: out, log: log, bold: plain, dim: plain, arrivals: make(chan arrival, 100)}
	if f, ok := out.(*os.File); ok && term.IsTerminal(int(f.Fd())) && os.Getenv("NO_COLOR") == "" {
		d.bold, d.dim = ansi("1"), ansi("2")
	}
	started := time.Now()
	d.printf("%s\n\n", d.bold("ebb demo: an app moves between groups, and whoever subscribes hears of it"))

	installation, err := postgres.Find(ctx)
	if err != nil {
		return err
	}
	// Whoever else is on this machine reaches the port too.
	server, err := postgres.Start(ctx, postgres.Config{Installation: installation, Fsync: true, Password: rand.Text()})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, server.Close()) }()
	d.printf("  Postgres %-8s %s\n", installation.Version, d.dim(fmt.Sprintf("127.0.0.1:%d", server.Port())))

	dir, err := os.MkdirTemp("", "ebb-demo-")
	if err != nil {
		return fmt.Errorf("make a directory for the streams: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	broker, err := natsserver.Start(natsserver.Config{StoreDir: filepath.Join(dir, "nats"), SyncAlways: true, Logger: log})
	if err != nil {
		return fmt.Errorf("start the NATS server: %w", err)
	}
	defer broker.Shutdown()
	d.printf("  NATS     %-8s %s\n", natsd.VERSION, d.dim(fmt.Sprintf("127.0.0.1:%d", broker.Port())))

	cfg := config.Default()
	cfg.Postgres, cfg.Sink, cfg.Listen = server.URL("postgres"), broker.ClientURL(), ""
	cfg.Recorded.Every = 100 * time.Millisecond
	d.cfg = &cfg
	if keep {
		cfg.Listen = config.Default().Listen
	}
	if err := d.prepare(ctx); err != nil {
		return err
	}
	defer d.db.Close(context.WithoutCancel(ctx))
	unsubscribe, err := d.subscribe(ctx)
	if err != nil {
		return err
	}
	defer unsubscribe()

	d.startBridge(ctx)
	defer func() { err = errors.Join(err, d.stopBridge()) }()
	d.printf("  bridge            %s\n\n", d.dim("slot ebb to stream EBB"))
	for _, m := range story {
		if err := d.play(ctx, m); err != nil {
			return err
		}
	}
	if err := d.tables(ctx); err != nil {
		return err
	}
	if err := d.check(ctx); err != nil {
		return err
	}
	d.printf("%s\n", d.dim(fmt.Sprintf("(%s, servers and all)", time.Since(started).Round(100*time.Millisecond))))
	if !keep {
		return nil
	}
	d.printf("\nEverything is left running until you press Ctrl-C. To try:\n\n")
	d.printf("  psql %s -c \"SELECT ebb.put('membership.changed', '{\\\"app\\\":\\\"A2\\\"}', 'A2')\"\n", shellQuote(cfg.Postgres))
	d.printf("  psql %s -c 'SELECT id, topic, key, payload, recorded_at FROM ebb.events'\n", shellQuote(cfg.Postgres))
	d.printf("  nats --server %s subscribe 'ebb.>'\n", broker.ClientURL())
	d.printf("  curl http://%s/status.json\n\n", cfg.Listen)
	for {
		select {
		case a := <-d.arrivals:
			d.printArrival(a)
		case <-ctx.Done():
			d.printf("\nended\n")
			return nil
		}
	}
}

// prepare sets up the schema, as ebb setup does, and the service's own table.
func (d *demonstration) prepare(ctx context.Context) error {
	if err := setup(ctx, io.Discard, d.cfg, d.log); err != nil {
		return err
	}
	db, err := pgx.Connect(ctx, d.cfg.Postgres)
	if err != nil {
		return fmt.Errorf("connect as the service: %w", err)
	}
	d.db = db
	if _, err := db.Exec(ctx, `CREATE TABLE relationships (app text PRIMARY KEY, "group" text NOT NULL, time text NOT NULL)`); err != nil {
		return fmt.Errorf("create the service's table: %w", err)
	}
	return nil
}

// startBridge runs what ebb run runs, until stopBridge.
func (d *demonstration) startBridge(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan error, 1)
	go func() { done <- run(ctx, d.cfg, d.log, runFlags{}) }()
	d.stopBridge = func() error {
		cancel()
		d.stopBridge = func() error { return nil }
		return <-done
	}
}

// subscribe follows the stream as any subscriber would, as soon as the bridge has made it.
func (d *demonstration) subscribe(ctx context.Context) (func(), error) {
	nc, err := nats.Connect(d.cfg.Sink)
	if err != nil {
		return nil, fmt.Errorf("subscribe: %w", err)
	}
	sub, err := nc.Subscribe("ebb.>", func(m *nats.Msg) {
		a := arrival{ID: m.Header.Get("ce-id"), Topic: m.Header.Get("ce-type"), Key: m.Header.Get("ce-subject")}
		if committed, err := time.Parse(time.RFC3339Nano, m.Header.Get("ce-time")); err == nil {
			a.Latency = time.Since(committed)
		}
		if err := json.Unmarshal(m.Data, &a.Payload); err != nil {
			a.Payload.App = err.Error()
		}
		select {
		case d.arrivals <- a:
		case <-ctx.Done():
		}
	})
	if err == nil {
		err = nc.Flush()
	}
	if err != nil {
		nc.Close()
		return nil, fmt.Errorf("subscribe: %w", err)
	}
	return func() {
		// The connection goes with it.
		_ = sub.Unsubscribe()
		nc.Close()
	}, nil
}

// play makes one move and waits for what the subscriber sees of it.
func (d *demonstration) play(ctx context.Context, m move) error {
	if m.bridgeDown {
		if err := d.stopBridge(); err != nil {
			return err
		}
		d.printf("  %s\n", d.dim("the bridge is stopped"))
	}
	id, err := d.commit(ctx, m)
	if err != nil {
		return err
	}
	what := fmt.Sprintf("  %s  %s moves to %s", m.time, m.app, m.group)
	if m.rollback || m.bridgeDown {
		if m.rollback {
			d.printf("%s, and the transaction is rolled back\n", what)
		} else {
			d.printf("%s, and event %d waits in the buffer\n", what, id)
		}
		select {
		case a := <-d.arrivals:
			d.printArrival(a)
			return fmt.Errorf("event %s arrived, which it must not", a.ID)
		case <-time.After(demoQuiet):
		case <-ctx.Done():
			return ctx.Err()
		}
		if m.rollback {
			return nil
		}
		d.startBridge(ctx)
		d.printf("  %s\n", d.dim("the bridge is started again"))
	} else {
		d.printf("%s\n", what)
	}
	select {
	case a := <-d.arrivals:
		d.printArrival(a)
		return nil
	case <-time.After(demoPatience):
		return fmt.Errorf("event %d did not arrive within %s", id, demoPatience)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// commit changes the service's table and puts the event, in one transaction.
func (d *demonstration) commit(ctx context.Context, m move) (id int64, err error) {
	tx, err := d.db.Begin(ctx)
	if err != nil {
		return 0, fmt.Errorf("move at %s: %w", m.time, err)
	}
	defer func() {
		if rollbackErr := tx.Rollback(context.WithoutCancel(ctx)); !errors.Is(rollbackErr, pgx.ErrTxClosed) {
			err = errors.Join(err, rollbackErr)
		}
	}()
	if _, err := tx.Exec(ctx, `INSERT INTO relationships (app, "group", time) VALUES ($1, $2, $3)
		ON CONFLICT (app) DO UPDATE SET "group" = excluded."group", time = excluded.time`, m.app, m.group, m.time); err != nil {
		return 0, fmt.Errorf("move at %s: %w", m.time, err)
	}
	payload, err := json.Marshal(membership{App: m.app, Group: m.group, Time: m.time})
	if err != nil {
		return 0, fmt.Errorf("move at %s: %w", m.time, err)
	}
	if err := tx.QueryRow(ctx, "SELECT ebb.put('membership.changed', $1::json, $2)", payload, m.app).Scan(&id); err != nil {
		return 0, fmt.Errorf("move at %s: %w", m.time, err)
	}
	if m.rollback {
		return id, nil
	}
	if err := tx.Commit(ctx); err != nil {
		return 0, fmt.Errorf("move at %s: %w", m.time, err)
	}
	return id, nil
}

func (d *demonstration) printArrival(a arrival) {
	d.seen = append(d.seen, a)
	d.printf("       %s event %s, %s of %s: group %s  %s\n", d.bold("->"), a.ID, a.Topic, a.Key, a.Payload.Group,
		d.dim(fmt.Sprintf("%.1f ms after the commit", float64(a.Latency.Microseconds())/1000)))
}

// tables prints the two tables of the article, once delivery of everything is recorded.
func (d *demonstration) tables(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, demoPatience)
	defer cancel()
	for recorded := false; !recorded; {
		if err := d.db.QueryRow(ctx, "SELECT bool_and(recorded_at IS NOT NULL) FROM ebb.events").Scan(&recorded); err != nil {
			return fmt.Errorf("wait for delivery to be recorded: %w", err)
		}
		if !recorded {
			if err := sleep.For(ctx, 10*time.Millisecond); err != nil {
				return fmt.Errorf("delivery was not recorded: %w", err)
			}
		}
	}
	if err := d.table(ctx, "relationships: where the app is now", `SELECT app AS "App", "group" AS "Group", time AS "Time" FROM relationships`); err != nil {
		return err
	}
	return d.table(ctx, "ebb.events: how it got there", `SELECT payload->>'app' AS "App", payload->>'group' AS "Group", payload->>'time' AS "Time",
		to_char(recorded_at, 'HH24:MI:SS.MS') AS "Recorded" FROM ebb.events ORDER BY id`)
}

func (d *demonstration) table(ctx context.Context, title, query string) error {
	rows, err := d.db.Query(ctx, query)
	if err != nil {
		return fmt.Errorf("read %s: %w", title, err)
	}
	defer rows.Close()
	d.printf("\n  %s\n", title)
	t := tabwriter.NewWriter(d.out, 0, 0, 3, ' ', 0)
	var names []string
	for _, f := range rows.FieldDescriptions() {
		names = append(names, f.Name)
	}
	fmt.Fprintf(t, "    %s\n", strings.Join(names, "\t"))
	for rows.Next() {
		values, err := rows.Values()
		if err != nil {
			return fmt.Errorf("read %s: %w", title, err)
		}
		for i, v := range values {
			fmt.Fprintf(t, "%s%v", map[bool]string{true: "    ", false: "\t"}[i == 0], v)
		}
		fmt.Fprintln(t)
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("read %s: %w", title, err)
	}
	return t.Flush()
}

// check compares the stream with what was committed.
func (d *demonstration) check(ctx context.Context) error {
	var want []membership
	for _, m := range story {
		if !m.rollback {
			want = append(want, membership{App: m.app, Group: m.group, Time: m.time})
		}
	}
	got, err := d.stream(ctx)
	if err != nil {
		return err
	}
	wrong := len(got) != len(want) || len(d.seen) != len(want)
	for i := 0; i < len(want) && !wrong; i++ {
		wrong = got[i] != want[i] || d.seen[i].Payload != want[i]
	}
	if wrong {
		return fmt.Errorf("check failed: committed %v, the stream holds %v, the subscriber saw %v", want, got, d.seen)
	}
	d.printf("\n%s %d moves committed, %d events in the stream, in order, none missing, none twice; the move that was rolled back is not among them.\n",
		d.bold("ok:"), len(want), len(got))
	return nil
}

// stream reads back all that the stream holds.
func (d *demonstration) stream(ctx context.Context) ([]membership, error) {
	nc, err := nats.Connect(d.cfg.Sink)
	if err != nil {
		return nil, fmt.Errorf("read the stream back: %w", err)
	}
	defer nc.Close()
	js, err := jetstream.New(nc)
	if err != nil {
		return nil, fmt.Errorf("read the stream back: %w", err)
	}
	stream, err := js.Stream(ctx, d.cfg.NATS.Stream)
	if err != nil {
		return nil, fmt.Errorf("read the stream back: %w", err)
	}
	var all []membership
	state := stream.CachedInfo().State
	for seq := state.FirstSeq; seq <= state.LastSeq; seq++ {
		m, err := stream.GetMsg(ctx, seq)
		if err != nil {
			return nil, fmt.Errorf("read message %d back: %w", seq, err)
		}
		var v membership
		if err := json.Unmarshal(m.Data, &v); err != nil {
			return nil, fmt.Errorf("read message %d back: %w", seq, err)
		}
		all = append(all, v)
	}
	return all, nil
}

// printf writes a piece of the story. That nobody reads it does not change how it ends.
func (d *demonstration) printf(format string, args ...any) {
	_, _ = fmt.Fprintf(d.out, format, args...)
}

func plain(s string) string { return s }

func ansi(code string) func(string) string {
	return func(s string) string { return "\x1b[" + code + "m" + s + "\x1b[0m" }
}

func shellQuote(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
