package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"time"

	"github.com/jackc/pgx/v5"
	natsjs "github.com/nats-io/nats.go/jetstream"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"ebb/bridge"
	"ebb/internal/config"
	"ebb/internal/sleep"
	"ebb/sql"
)

// replayFlags are those of ebb replay.
type replayFlags struct {
	from, to       string
	dryRun, cancel bool
	json           bool

	aside          bool
	fromTable      bool
	subjectPrefix  string
	stream         string
	topics, keys   []string
	rate           float64
	sinkIsExplicit bool
}

func newReplay(a *app) *cobra.Command {
	var flags replayFlags
	cmd := &cobra.Command{
		Use:   "replay",
		Short: "Deliver again what was delivered, from a place on",
		Long: "Replay resets the slot's position: everything that was committed from a place on is delivered again, in order, with the same ids and\n" +
			"with the header Ebb-Replay, and then what is new. The bridge that leads does it; without one, the next that starts.\n\n" +
			"With --aside, the main flow is left alone, and some of the events are delivered by this command: to another sink (--sink), or\n" +
			"to the same NATS server under another prefix (--subject-prefix).\n\n" +
			"A place is an LSN (16/B374D848), a time (2026-01-02T15:04:05Z), a duration before now (90m), the id of an event, or trail, which is as far\n" +
			"back as can be. The transaction that commits there is the first one.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			flags.sinkIsExplicit = a.sink != ""
			if err := flags.check(); err != nil {
				return &usageError{err}
			}
			cfg, log, err := a.loadForPostgres()
			if err != nil {
				return err
			}
			r := &replay{flags: flags, cfg: cfg, log: log, out: a.stdout}
			return r.run(cmd.Context())
		},
	}
	f := cmd.Flags()
	f.StringVar(&flags.from, "from", "", "the `place` from which on events are delivered again")
	f.StringVar(&flags.to, "to", "", "the `place` up to which; of an aside")
	f.BoolVar(&flags.dryRun, "dry-run", false, "only say what would be delivered again")
	f.BoolVar(&flags.cancel, "cancel", false, "end the replay that is running, or that waits for a bridge")
	f.BoolVar(&flags.json, "json", false, "print JSON, a record a line")
	f.BoolVar(&flags.aside, "aside", false, "deliver beside the main flow, to another place")
	f.BoolVar(&flags.fromTable, "from-table", false, "deliver from the rows that are still in the buffer, by id; of an aside")
	f.StringVar(&flags.subjectPrefix, "subject-prefix", "", "the first token or tokens of the subjects of an aside to NATS")
	f.StringVar(&flags.stream, "stream", "", "the stream of an aside to NATS, made if it is missing (default the configured one's name and _REPLAY)")
	f.StringSliceVar(&flags.topics, "topic", nil, "deliver the events of this topic alone; of an aside; may be repeated")
	f.StringSliceVar(&flags.keys, "key", nil, "deliver the events of this key alone; of an aside; may be repeated")
	f.Float64Var(&flags.rate, "rate", 0, "deliver so many events a second at most; of an aside")
	return cmd
}

// check finds what does not go together.
func (f *replayFlags) check() error {
	now := time.Now()
	switch {
	case f.cancel && (f.from != "" || f.aside || f.dryRun):
		return errors.New("--cancel goes with no other flag")
	case f.cancel:
		return nil
	case f.from == "":
		return errors.New("--from: want the place from which on events are to be delivered again")
	case !f.aside && (f.fromTable || f.to != "" || f.subjectPrefix != "" || f.stream != "" || len(f.topics) > 0 || len(f.keys) > 0 || f.rate != 0):
		return errors.New("--from-table, --to, --subject-prefix, --stream, --topic, --key and --rate are of a replay --aside: the slot's own stream is delivered " +
			"again as a whole and to its end")
	case f.rate < 0 || math.IsNaN(f.rate) || math.IsInf(f.rate, 0):
		return fmt.Errorf("--rate %v: want a number of events a second above 0", f.rate)
	case f.aside && f.subjectPrefix == "" && !f.sinkIsExplicit:
		return errors.New("--aside: say where to, by --sink or by --subject-prefix")
	}
	from, err := bridge.ParsePlace(f.from, now)
	if err != nil {
		return fmt.Errorf("--from: %w", err)
	}
	var to bridge.Place
	if f.to != "" {
		if to, err = bridge.ParsePlace(f.to, now); err != nil {
			return fmt.Errorf("--to: %w", err)
		}
	}
	switch {
	case f.fromTable && f.dryRun:
		return errors.New("--from-table goes without --dry-run: ask the buffer, SELECT count(*) FROM ebb.events WHERE …")
	case f.fromTable && (from.LSN != 0 || from.Oldest || to.LSN != 0 || to.ID != ""):
		return errors.New("--from-table: want a time or a duration, or the id of an event as --from: rows do not say at which LSN they were committed")
	}
	return nil
}

// replay is one run of the command.
type replay struct {
	flags replayFlags
	cfg   *config.Config
	log   *slog.Logger
	out   io.Writer
}

func (r *replay) run(ctx context.Context) error {
	if r.flags.cancel {
		return r.cancel(ctx)
	}
	now := time.Now()
	from, err := bridge.ParsePlace(r.flags.from, now)
	if err != nil {
		return err
	}
	var to bridge.Place
	if r.flags.to != "" {
		if to, err = bridge.ParsePlace(r.flags.to, now); err != nil {
			return err
		}
	}
	if r.flags.fromTable {
		return r.aside(ctx, from, to, unknownTotal)
	}
	survey, err := bridge.TakeSurvey(ctx, bridgeConfig(r.cfg, r.log), from, to)
	if err != nil {
		return err
	}
	if r.flags.dryRun || survey.Events == 0 {
		return r.sayWhat(survey)
	}
	from = bridge.Place{Text: r.flags.from, LSN: survey.From}
	if r.flags.aside {
		if len(r.flags.topics)+len(r.flags.keys) > 0 {
			survey.Events = unknownTotal // only some of them
		}
		return r.aside(ctx, from, to, survey.Events)
	}
	return r.inPlace(ctx, from, survey)
}

// sayWhat prints what there is to deliver again.
func (r *replay) sayWhat(s bridge.Survey) error {
	estimate, by := s.Took, "at least, as long as it took to read them"
	if s.Rate > 0 {
		estimate, by = time.Duration(float64(s.Events)/s.Rate*float64(time.Second)), "at the rate of the last replay"
	}
	if r.flags.json {
		return r.record(struct {
			bridge.Survey
			EstimatedSeconds float64 `json:"estimated_seconds"`
		}{s, estimate.Seconds()})
	}
	if s.Events == 0 {
		_, err := fmt.Fprintf(r.out, "nothing was committed from %s on\n", r.flags.from)
		return err
	}
	_, err := fmt.Fprintf(r.out, "from    %s, committed %s\nto      %s, committed %s\nevents  %d, %s\ntime    %s %s\n",
		s.From, s.FromTime.Format(time.RFC3339), s.To, s.ToTime.Format(time.RFC3339), s.Events, size(s.Bytes), estimate.Round(100*time.Millisecond), by)
	return err
}

func (r *replay) record(v any) error { return json.NewEncoder(r.out).Encode(v) }

// inPlace asks for the replay and waits until it is done.
func (r *replay) inPlace(ctx context.Context, from bridge.Place, survey bridge.Survey) error {
	db, err := sql.Connect(ctx, r.cfg.Postgres, r.cfg.Slot)
	if err != nil {
		return err
	}
	defer db.Close(context.WithoutCancel(ctx))
	led, err := isLed(ctx, db, r.cfg.Slot)
	if err != nil {
		return err
	}
	id, err := sql.RequestReplay(ctx, db, r.cfg.Slot, from.LSN, from.Text, survey.Events)
	if err != nil {
		return err
	}
	if !led {
		if r.flags.json {
			return r.record(map[string]any{"replay": id, "state": sql.ReplayRequested, "events": survey.Events})
		}
		_, err := fmt.Fprintf(r.out, "replay %d of %d events is asked for, and no bridge runs: the next ebb run does it (ebb replay --cancel takes it back)\n", id, survey.Events)
		return err
	}
	bar := r.bar(survey.Events)
	for {
		now, err := sql.ReadReplay(ctx, db, id)
		if err == nil {
			bar.at(now.Delivered)
			if r.flags.json {
				err = r.record(map[string]any{"replay": id, "state": now.State, "events": survey.Events, "delivered": now.Delivered})
			}
		}
		if ctx.Err() != nil || err == nil && now.Active() && sleep.For(ctx, progressEvery) != nil {
			bar.end()
			if !r.flags.json {
				fmt.Fprintf(r.out, "replay %d goes on in the bridge: ebb status shows it, and ebb replay --cancel ends it\n", id)
			}
			return nil
		}
		switch {
		case err != nil:
			return err
		case now.Active():
			continue
		}
		bar.end()
		if now.State != sql.ReplayDone {
			return fmt.Errorf("replay %d was %s: %s", id, now.State, now.Detail)
		}
		if !r.flags.json {
			fmt.Fprintf(r.out, "replay %d is done: %d events in %s, in epoch %d\n", id, now.Delivered,
				now.EndedAt.Sub(*now.StartedAt).Round(time.Millisecond), now.Epoch)
		}
		return nil
	}
}

// isLed reports whether a bridge leads on a slot. One may be taking over at this moment, or starting over after a replay.
func isLed(ctx context.Context, db *pgx.Conn, slot string) (bool, error) {
	for range 8 {
		led, err := sql.HasLeader(ctx, db, slot)
		if led || err != nil {
			return led, err
		}
		if err := sleep.For(ctx, 250*time.Millisecond); err != nil {
			return false, err
		}
	}
	return false, nil
}

func (r *replay) cancel(ctx context.Context) error {
	db, err := sql.Connect(ctx, r.cfg.Postgres, r.cfg.Slot)
	if err != nil {
		return err
	}
	defer db.Close(context.WithoutCancel(ctx))
	if err := sql.Check(ctx, db); err != nil {
		return err
	}
	ended, ok, err := sql.CancelReplay(ctx, db, r.cfg.Slot)
	if err != nil {
		return err
	}
	if !ok {
		return errors.New("there is no replay to cancel")
	}
	if r.flags.json {
		return r.record(map[string]any{"replay": ended.ID, "state": ended.State, "delivered": ended.Delivered})
	}
	_, err = fmt.Fprintf(r.out, "replay %d is cancelled; %d events were delivered since it began\n", ended.ID, ended.Delivered)
	return err
}

// aside delivers to another place.
func (r *replay) aside(ctx context.Context, from, to bridge.Place, total int64) (err error) {
	cfg, err := r.asideConfig()
	if err != nil {
		return err
	}
	destination, stop, err := openSink(cfg, r.log)
	if err != nil {
		return err
	}
	defer stop()
	defer func() { err = errors.Join(err, destination.Close()) }()
	bc := bridgeConfig(r.cfg, r.log)
	bc.Sink = destination
	bar := r.bar(total)
	if cfg.Sink == "stdout" {
		bar = &progress{} // among the events
	}
	defer bar.end()
	var n, leftOut int64
	var first string
	err = bridge.RunAside(ctx, bc, bridge.Aside{From: from, To: to, FromTable: r.flags.fromTable, Topics: r.flags.topics, Keys: r.flags.keys, Rate: r.flags.rate,
		Delivered: func(events int) {
			n += int64(events)
			bar.at(n)
		},
		LeftOut: func(id, fault string) {
			if leftOut++; leftOut == 1 {
				first = fmt.Sprintf("event %s: %s", id, fault)
			}
		}})
	bar.end()
	if leftOut > 0 {
		r.log.Warn("left out rows that make no event", "rows", leftOut, "first", first)
	}
	var api *natsjs.APIError
	switch {
	case errors.As(err, &api) && api.ErrorCode == subjectsOverlap:
		return fmt.Errorf("--subject-prefix %s: another stream has subjects that begin so: %w; choose another prefix", r.flags.subjectPrefix, err)
	case err != nil:
		return fmt.Errorf("after %d events: %w", n, err)
	case r.flags.json && cfg.Sink != "stdout":
		return r.record(map[string]any{"delivered": n, "left_out": leftOut})
	case cfg.Sink != "stdout":
		fmt.Fprintf(r.out, "delivered %d events\n", n)
	}
	return nil
}

// asideConfig is the configuration of the sink of an aside, which must not be where the main flow goes.
func (r *replay) asideConfig() (*config.Config, error) {
	cfg := *r.cfg
	if err := cfg.RequireSink(); err != nil {
		return nil, err
	}
	switch cfg.SinkKind() {
	case config.SinkKindEmbedded:
		return nil, &usageError{errors.New("--aside: the embedded server is inside ebb run: give its URL by --sink, such as nats://" + cfg.Embedded.Listen)}
	case config.SinkKindNATS:
		if r.flags.subjectPrefix == "" {
			return nil, &usageError{errors.New("--aside to NATS: want --subject-prefix, so that what is delivered again is not mixed with the main flow")}
		}
		main := cfg.NATS.Stream
		if cfg.NATS.Stream = r.flags.stream; cfg.NATS.Stream == "" {
			cfg.NATS.Stream = main + "_REPLAY"
		}
		if cfg.NATS.Stream == main {
			return nil, &usageError{fmt.Errorf("--stream %s: it is that of the main flow; name another one", main)}
		}
		cfg.NATS.Subject = r.flags.subjectPrefix + ".{topic}"
		cfg.NATS.CreateStream, cfg.NATS.Exclusive = true, false
	default:
		if r.flags.subjectPrefix != "" || r.flags.stream != "" {
			return nil, &usageError{errors.New("--subject-prefix and --stream are of an aside to NATS")}
		}
	}
	return &cfg, nil
}

// progressEvery is how often progress is looked at, and linesEvery how often it is printed where there is no terminal.
const (
	progressEvery = 500 * time.Millisecond
	linesEvery    = 5 * time.Second
)

// subjectsOverlap is the code of JetStream's error about a stream whose subjects another one has.
const subjectsOverlap natsjs.ErrorCode = 10065

// unknownTotal is the total of an aside that nobody has counted.
const unknownTotal = -1

// bar shows progress towards a total.
func (r *replay) bar(total int64) *progress {
	if r.flags.json {
		return &progress{}
	}
	f, ok := r.out.(*os.File)
	return newProgress(r.out, total, ok && term.IsTerminal(int(f.Fd())))
}
