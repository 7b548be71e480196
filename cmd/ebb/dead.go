package main

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"ebb/internal/config"
	"ebb/internal/sleep"
	"ebb/sink"
	"ebb/sql"
)

// deadFlags say which dead letters are meant, and what is printed of them.
type deadFlags struct {
	topics, keys, reasons []string
	since                 string
	all                   bool

	each   bool
	states []string
	limit  int

	yes, json bool
}

func newDead(a *app) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "dead",
		Short: "Look at the events that were set aside, and have them delivered or discarded",
		Long: "Dead letters are events that the sink refused, or whose receiver did not say yes while others were served. They are set aside in the\n" +
			"table ebb.dead_letter so that others can go on, and later events of the same key queue up behind them, in order.",
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return &usageError{fmt.Errorf("unknown command %q; ebb dead --help lists them", args[0])}
			}
			return cmd.Help()
		},
	}
	cmd.AddCommand(newDeadList(a), newDeadShow(a), newDeadRetry(a), newDeadDiscard(a))
	return cmd
}

func newDeadList(a *app) *cobra.Command {
	var flags deadFlags
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List what is set aside: the first event of each queue, and how many wait behind it",
		Long: "List prints a line for the head of each queue, which is the event because of which the others of its key wait; those that were sent or set\n" +
			"aside last come first. Filters choose the queues that have such an event: those that ebb dead retry takes with the same filters.\n" +
			"With --each, --state or --json it prints a line for each event that the filters mean: those that ebb dead discard takes.",
		Example: "  ebb dead list\n  ebb dead list --since 1h --topic order.paid\n  ebb dead list --key order-7 --each\n  ebb dead list --state discarded --json",
		Args:    noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			filter, err := flags.filter(nil)
			if err != nil {
				return &usageError{err}
			}
			states, err := flags.statesOf()
			if err != nil {
				return &usageError{err}
			}
			if flags.json && !cmd.Flags().Changed("limit") {
				flags.limit = 0
			}
			return a.withDead(cmd.Context(), flags, func(d *dead) error { return d.list(cmd.Context(), filter, states) })
		},
	}
	flags.addFilters(cmd)
	f := cmd.Flags()
	f.BoolVar(&flags.each, "each", false, "a line for each event")
	f.StringSliceVar(&flags.states, "state", nil, "a line for each event in this `state`: parked, retrying, delivered, discarded or all; may be repeated")
	f.IntVar(&flags.limit, "limit", 50, "print so many lines at most; 0: all. With --json all, unless it is given")
	f.BoolVar(&flags.json, "json", false, "print JSON, a record a line, with payload and headers")
	return cmd
}

func newDeadShow(a *app) *cobra.Command {
	var flags deadFlags
	cmd := &cobra.Command{
		Use:   "show ID...",
		Short: "Show all there is of an event, with payload, headers and queue",
		Long: "Show prints all there is of the events with these ids, whatever their state. Events of different tables may share an id: each of them is\n" +
			"shown.",
		Example: "  ebb dead show 4711",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return &usageError{errors.New("ebb dead show: want the id of an event; ebb dead list prints them")}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, ids []string) error {
			return a.withDead(cmd.Context(), flags, func(d *dead) error { return d.show(cmd.Context(), ids) })
		},
	}
	cmd.Flags().BoolVar(&flags.json, "json", false, "print JSON, a record a line")
	return cmd
}

func newDeadRetry(a *app) *cobra.Command {
	var flags deadFlags
	cmd := &cobra.Command{
		Use:   "retry [ID...]",
		Short: "Have events delivered after all, and those of their keys, in order",
		Long: "Retry has the bridge that leads deliver events which are set aside, by their ids, by filters, or all; of an event with a key it is the whole\n" +
			"queue of the key, in order. It waits until they are delivered or parked again, and ends with exit code 1 if any is. An interrupt\n" +
			"(Ctrl-C) ends the command alone. Without a bridge, the next one that starts does it.",
		Example: "  ebb dead retry 4711\n  ebb dead retry --topic order.paid --since 1h\n  ebb dead retry --all",
		Args:    cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, ids []string) error {
			filter, err := flags.choice(ids)
			if err != nil {
				return &usageError{err}
			}
			return a.withDead(cmd.Context(), flags, func(d *dead) error { return d.retry(cmd.Context(), filter) })
		},
	}
	flags.addFilters(cmd)
	f := cmd.Flags()
	f.BoolVar(&flags.all, "all", false, "everything that is set aside")
	f.BoolVar(&flags.json, "json", false, "print JSON, a record a line")
	return cmd
}

func newDeadDiscard(a *app) *cobra.Command {
	var flags deadFlags
	cmd := &cobra.Command{
		Use:   "discard [ID...]",
		Short: "Have events never be delivered",
		Long: "Discard gives events up, by their ids, by filters, or all: they stay in ebb.dead_letter, and are never delivered, not by a replay\n" +
			"either. It takes those events alone. If the first one of a queue is among them, and the next one was not refused itself, the\n" +
			"bridge delivers what is left of the queue. An event that is being sent at this moment may still arrive.",
		Example: "  ebb dead discard 4711\n  ebb dead discard --key order-7 --yes",
		Args:    cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, ids []string) error {
			filter, err := flags.choice(ids)
			if err != nil {
				return &usageError{err}
			}
			return a.withDead(cmd.Context(), flags, func(d *dead) error {
				return d.discard(cmd.Context(), filter, func(question string) error { return a.confirm(question, flags.yes) })
			})
		},
	}
	flags.addFilters(cmd)
	f := cmd.Flags()
	f.BoolVar(&flags.all, "all", false, "everything that is set aside")
	f.BoolVar(&flags.yes, "yes", false, "do not ask")
	f.BoolVar(&flags.json, "json", false, "print JSON")
	return cmd
}

// addFilters adds the flags of a filter. What is in them may have commas.
func (f *deadFlags) addFilters(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringArrayVar(&f.topics, "topic", nil, "events of this `topic`; may be repeated")
	flags.StringArrayVar(&f.keys, "key", nil, "events of this `key`; may be repeated")
	flags.StringArrayVar(&f.reasons, "reason", nil, "events whose `reason` has these words, in upper or lower case, such as 422 or queued; may be repeated")
	flags.StringVar(&f.since, "since", "", "events that were sent or set aside last since a `time` (2026-01-02T15:04:05Z), or within a duration before now (90m)")
}

// filter reads the flags that addFilters added.
func (f *deadFlags) filter(ids []string) (sql.DeadFilter, error) {
	filter := sql.DeadFilter{IDs: ids, Topics: f.topics, Keys: f.keys, Reasons: f.reasons}
	if f.limit < 0 {
		return filter, fmt.Errorf("--limit %d: want a number of lines, or 0 for all", f.limit)
	}
	if f.since == "" {
		return filter, nil
	}
	now := time.Now()
	if d, err := time.ParseDuration(f.since); err == nil && d >= 0 {
		filter.Since = now.Add(-d)
	} else if filter.Since, err = time.Parse(time.RFC3339Nano, f.since); err != nil || filter.Since.After(now) {
		return filter, fmt.Errorf("--since %q: want a duration before now such as 90m, or a time that has passed such as 2026-01-02T15:04:05Z", f.since)
	}
	return filter, nil
}

// choice reads which events are to be decided about. Nothing is decided about all of them because somebody left something out.
func (f *deadFlags) choice(ids []string) (sql.DeadFilter, error) {
	filtered := len(ids)+len(f.topics)+len(f.keys)+len(f.reasons) > 0 || f.since != ""
	switch {
	case f.all && filtered:
		return sql.DeadFilter{}, errors.New("--all goes with neither ids nor filters")
	case !f.all && !filtered:
		return sql.DeadFilter{}, errors.New("say which: ids, --topic, --key, --reason or --since, or --all")
	}
	return f.filter(ids)
}

// statesOf reads which events are listed one by one; none stand for the heads of queues.
func (f *deadFlags) statesOf() ([]sql.DeadEventState, error) {
	var states []sql.DeadEventState
	if (f.each || f.json) && len(f.states) == 0 {
		return []sql.DeadEventState{sql.DeadParked, sql.DeadRetrying}, nil
	}
	known := map[string][]sql.DeadEventState{"all": sql.DeadEventStates}
	for _, s := range sql.DeadEventStates {
		known[string(s)] = []sql.DeadEventState{s}
	}
	for _, word := range f.states {
		if known[word] == nil {
			return nil, fmt.Errorf("--state %q: want parked, retrying, delivered, discarded or all", word)
		}
		states = append(states, known[word]...)
	}
	return states, nil
}

// dead is one run of a command about dead letters.
type dead struct {
	flags    deadFlags
	cfg      *config.Config
	db       *pgx.Conn
	out, err io.Writer
}

// withDead calls do with a connection of a role that may see the dead letters.
func (a *app) withDead(ctx context.Context, flags deadFlags, do func(*dead) error) error {
	cfg, _, err := a.loadForPostgres()
	if err != nil {
		return err
	}
	db, err := sql.Connect(ctx, cfg.Postgres, cfg.Slot+" dead")
	if err != nil {
		return err
	}
	defer db.Close(context.WithoutCancel(ctx))
	if err := sql.CheckDead(ctx, db); err != nil {
		return err
	}
	if _, err := sql.ReadSlot(ctx, db, cfg.Slot); err != nil { // of another slot there would be nothing to see, which is no good news
		return err
	}
	return do(&dead{flags: flags, cfg: cfg, db: db, out: a.stdout, err: a.stderr})
}

// record prints a line of JSON.
func (d *dead) record(v any) error {
	e := json.NewEncoder(d.out)
	e.SetEscapeHTML(false) // payloads come out as they went in, but for blanks
	return e.Encode(v)
}

func (d *dead) list(ctx context.Context, filter sql.DeadFilter, states []sql.DeadEventState) error {
	if d.flags.json {
		_, _, err := sql.ListDead(ctx, d.db, d.cfg.Slot, filter, states, d.flags.limit, func(e *sql.DeadEvent) error { return d.record(e) })
		return err
	}
	heads := len(states) == 0
	last := map[bool]string{true: "BEHIND", false: "QUEUE"}[heads]
	t := tabwriter.NewWriter(d.out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "EVENT\tTOPIC\tKEY\tSTATE\tREASON\tATTEMPTS\tFIRST\tLAST\t%s\n", last)
	shown := int64(0)
	n, queued, err := sql.ListDead(ctx, d.db, d.cfg.Slot, filter, states, d.flags.limit, func(e *sql.DeadEvent) error {
		shown++
		place := "-"
		switch {
		case heads:
			place = strconv.FormatInt(*e.QueueLength-1, 10)
		case e.QueueLength != nil:
			place = fmt.Sprintf("%d of %d", *e.QueuePlace, *e.QueueLength)
		}
		_, err := fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%d\t%s\t%s\t%s\n", word(e.EventID, 0), word(e.Topic, columnWidth), keyWord(e.Key, columnWidth), e.State,
			word(e.Reason, columnWidth), e.Attempts, e.FirstAt.Format(time.RFC3339), e.LastAt.Format(time.RFC3339), place)
		return err
	})
	if err != nil {
		return err
	}
	if n == 0 {
		_, err := fmt.Fprintln(d.out, "there are no dead letters that match")
		return err
	}
	if err := t.Flush(); err != nil {
		return err
	}
	what := count(n, "event")
	if heads {
		what = fmt.Sprintf("%s with %s", count(n, "queue"), count(queued, "event"))
	}
	if shown < n {
		what = fmt.Sprintf("%d lines of %s; --limit 0 prints all", shown, what)
	}
	_, err = fmt.Fprintln(d.out, what)
	return err
}

const (
	// columnWidth is how much of a text is printed in a table.
	columnWidth = 40
	// sampled is how many events are named where there may be many.
	sampled = 20
)

// word is a text as it is printed in a line: what is no plain word is in quotes, so that nothing in it is taken for more than text. Of one that is
// longer than most, unless that is 0, only the beginning is printed.
func word(s string, most int) string {
	cut := ""
	if most > 0 && utf8.RuneCountInString(s) > most {
		s, cut = string([]rune(s)[:most]), "…"
	}
	if quoted := strconv.Quote(s); s == "" || s == "-" || quoted != `"`+s+`"` || strings.TrimSpace(s) != s {
		return quoted + cut
	}
	return s + cut
}

// keyWord is a key as it is printed in a line.
func keyWord(key *string, most int) string {
	if key == nil {
		return "-"
	}
	return word(*key, most)
}

// printable is a text with whatever is not to be printed escaped, but for the characters in and.
func printable(s, and string) string {
	var b strings.Builder
	for _, r := range s {
		if strconv.IsPrint(r) || strings.ContainsRune(and, r) {
			b.WriteRune(r)
		} else {
			b.WriteString(strings.Trim(strconv.QuoteRune(r), "'"))
		}
	}
	return b.String()
}

// blanks are the characters that set a text of several lines.
const blanks = "\n\t"

// count is a number of things in words.
func count(n int64, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return fmt.Sprintf("%d %ss", n, thing)
}

func (d *dead) show(ctx context.Context, ids []string) error {
	printed := false
	for _, id := range ids {
		var found []*sql.DeadEvent
		if _, _, err := sql.ListDead(ctx, d.db, d.cfg.Slot, sql.DeadFilter{IDs: []string{id}}, sql.DeadEventStates, 0, func(e *sql.DeadEvent) error {
			found = append(found, e)
			return nil
		}); err != nil {
			return err
		}
		if len(found) == 0 {
			return fmt.Errorf("event %q: %w; ebb dead list --state all prints all there are", id, sql.ErrNoDeadEvent)
		}
		for _, e := range found {
			if d.flags.json {
				if err := d.record(e); err != nil {
					return err
				}
				continue
			}
			if printed {
				fmt.Fprintln(d.out)
			}
			printed = true
			if err := d.showEvent(ctx, e); err != nil {
				return err
			}
		}
	}
	return nil
}

func (d *dead) showEvent(ctx context.Context, e *sql.DeadEvent) error {
	t := tabwriter.NewWriter(d.out, 0, 0, 2, ' ', 0)
	line := func(name, format string, args ...any) {
		fmt.Fprintf(t, "%s\t"+format+"\n", append([]any{name}, args...)...)
	}
	line("event", "%s", word(e.EventID, 0))
	line("topic", "%s", word(e.Topic, 0))
	line("key", "%s", keyWord(e.Key, 0))
	line("committed", "%s, at position %s", e.EventTime.Format(time.RFC3339Nano), e.Position)
	line("state", "%s", e.State)
	if e.DecidedBy != nil && e.DecidedAt != nil {
		what := "retry asked for"
		if e.State == sql.DeadDiscarded {
			what = "discarded"
		}
		line("", "%s by %s at %s", what, word(*e.DecidedBy, 0), e.DecidedAt.Format(time.RFC3339))
	}
	if e.StreamSeq != nil && e.Destination != nil {
		line("", "at sequence number %d in %s", *e.StreamSeq, word(*e.Destination, 0))
	}
	line("reason", "%s", printable(e.Reason, ""))
	if e.Detail != "" {
		line("detail", "%s", printable(e.Detail, ""))
	}
	if e.Attempts == 0 {
		line("attempts", "0, set aside at %s", e.FirstAt.Format(time.RFC3339))
	} else {
		line("attempts", "%d, from %s to %s", e.Attempts, e.FirstAt.Format(time.RFC3339), e.LastAt.Format(time.RFC3339))
	}
	switch {
	case e.QueueLength == nil:
	case e.Key == nil:
		line("queue", "alone, as it has no key")
	default:
		ids, err := sql.QueueOf(ctx, d.db, d.cfg.Slot, *e.Key, sampled)
		if err != nil {
			return err
		}
		for i := range ids {
			ids[i] = word(ids[i], 0)
		}
		more := ""
		if n := *e.QueueLength - int64(len(ids)); n > 0 {
			more = fmt.Sprintf(", and %d more", n)
		}
		line("queue", "number %d of %d: %s%s", *e.QueuePlace, *e.QueueLength, strings.Join(ids, ", "), more)
	}
	if e.Headers != nil {
		line("headers", "%s", printable(string(e.Headers), ""))
	}
	payload, body := printable(e.ContentType, ""), printable(string(e.Payload), blanks)
	switch {
	case e.Payload == nil && e.PayloadBytes == nil:
		body = ""
		payload += ", none"
	case e.Payload == nil && utf8.Valid(e.PayloadBytes):
		body = printable(string(e.PayloadBytes), blanks)
		payload += ", " + size(int64(len(e.PayloadBytes)))
	case e.Payload == nil:
		body = base64.StdEncoding.EncodeToString(e.PayloadBytes)
		payload += ", " + size(int64(len(e.PayloadBytes))) + ", in base64"
	default:
		payload += ", " + size(int64(len(e.Payload)))
	}
	line("payload", "%s", payload)
	if err := t.Flush(); err != nil {
		return err
	}
	if body == "" {
		return nil
	}
	_, err := fmt.Fprintln(d.out, body)
	return err
}

// deadCounts is what ebb dead retry prints as JSON.
type deadCounts struct {
	Events    int `json:"events"`
	Delivered int `json:"delivered"`
	Parked    int `json:"parked"`
	Discarded int `json:"discarded"`
	// Gone are those that are not there any more: in a replay their events have come by again.
	Gone     int `json:"gone"`
	Retrying int `json:"retrying"`
}

func (d *dead) retry(ctx context.Context, filter sql.DeadFilter) error {
	asked, err := sql.RetryDead(ctx, d.db, d.cfg.Slot, filter)
	if err != nil {
		return err
	}
	r := &retrying{dead: d, left: asked.Numbers}
	r.Events, r.Retrying = len(asked.Numbers), len(asked.Numbers)
	for _, id := range asked.Delivered {
		d.say("event %s is delivered already\n", word(id, 0))
	}
	if r.Events == 0 {
		if len(asked.Delivered) == 0 {
			d.say("there is nothing to retry\n")
		}
		return r.report()
	}
	others := ""
	if n := int64(r.Events) - asked.Asked; n > 0 {
		others = fmt.Sprintf(": %d as asked for, and %d of the same keys, in order", asked.Asked, n)
	}
	d.say("retrying %s in %s%s\n", count(int64(r.Events), "event"), count(asked.Queues, "queue"), others)
	return r.wait(ctx)
}

// say prints to those who do not want JSON.
func (d *dead) say(format string, args ...any) {
	if !d.flags.json {
		fmt.Fprintf(d.out, format, args...)
	}
}

// retrying is what is being retried.
type retrying struct {
	*dead
	deadCounts
	// left are the numbers of those that are not done.
	left []int64
	// refused are the first of those that are parked for a reason of their own.
	refused []sql.DeadDone
}

// report prints the counts as JSON.
func (r *retrying) report() error {
	if !r.flags.json {
		return nil
	}
	return r.record(r.deadCounts)
}

// ledEvery is after how many looks at what is retried it is asked whether there is still a bridge.
const ledEvery = 10

// wait waits until all are delivered or parked again.
func (r *retrying) wait(ctx context.Context) error {
	bar := &progress{}
	if !r.flags.json {
		f, ok := r.err.(*os.File)
		bar = newProgress(r.err, int64(r.Events), ok && term.IsTerminal(int(f.Fd())))
	}
	defer bar.end()
	for looks := 0; ; looks++ {
		err := r.look(ctx)
		if err == nil {
			bar.at(int64(r.Events - r.Retrying))
			err = r.report()
		}
		if err == nil && r.Retrying == 0 {
			bar.end()
			return r.outcome()
		}
		led := true
		if err == nil && looks%ledEvery == 0 {
			led, err = isLed(ctx, r.db, r.cfg.Slot)
		}
		if err == nil && led && looks == ledEvery && r.Retrying == r.Events {
			bar.clear()
			if err = r.sayWhy(ctx); err != nil {
				err = fmt.Errorf("find out why nothing is delivered yet: %w", err)
			}
		}
		switch {
		case ctx.Err() != nil || err == nil && led && sleep.For(ctx, progressEvery) != nil:
			bar.end()
			r.say("the retry of %s goes on in the bridge: ebb dead list --state retrying shows what is left\n", count(int64(r.Retrying), "event"))
			return nil
		case err != nil:
			bar.end()
			return fmt.Errorf("what is retried goes on all the same: %w", err)
		case !led:
			bar.end()
			r.say("no bridge runs: the next ebb run delivers %s\n", count(int64(r.Retrying), "event"))
			return r.outcome()
		}
	}
}

// sayWhy says of a retry that does not begin what it may wait for.
func (r *retrying) sayWhy(ctx context.Context) error {
	backlog, err := sql.ReadBacklog(ctx, r.db)
	if kind := r.cfg.SinkKind(); err != nil || backlog.Events == 0 || kind != config.SinkKindNATS && kind != config.SinkKindEmbedded {
		return err
	}
	r.say("nothing is retried yet: the bridge has %s to deliver, and JetStream gets no retry before those that were there when it began\n",
		count(backlog.Events, "event"))
	return nil
}

// look counts what is done.
func (r *retrying) look(ctx context.Context) error {
	done, err := sql.RetriedDead(ctx, r.db, r.left)
	if err != nil {
		return err
	}
	settled := map[int64]bool{}
	for i := range done {
		settled[done[i].Number] = true
		switch done[i].State {
		case sql.DeadDelivered:
			r.Delivered++
		case sql.DeadDiscarded:
			r.Discarded++
		case sql.DeadParked:
			r.Parked++
			if done[i].Reason != sink.Queued && len(r.refused) < sampled {
				r.refused = append(r.refused, done[i])
			}
		default:
			r.Gone++
		}
	}
	left := r.left[:0]
	for _, n := range r.left {
		if !settled[n] {
			left = append(left, n)
		}
	}
	r.left, r.Retrying = left, len(left)
	return nil
}

// outcome says what came of what is done.
func (r *retrying) outcome() error {
	for _, n := range []struct {
		events int
		became string
	}{
		{r.Delivered, "delivered"},
		{r.Discarded, "discarded meanwhile"},
		{r.Gone, "not there any more, as a replay has come by, or long delivered"},
	} {
		if n.events > 0 {
			r.say("%s %s\n", count(int64(n.events), "event"), n.became)
		}
	}
	if r.Parked == 0 {
		return nil
	}
	for i := range r.refused {
		e := &r.refused[i]
		of := ""
		if e.Key != nil {
			of = " of key " + keyWord(e.Key, columnWidth)
		}
		r.say("event %s%s is parked again: %s\n", word(e.EventID, 0), of, printable(strings.TrimSuffix(e.Reason+": "+e.Detail, ": "), ""))
	}
	if r.Parked == 1 {
		return errors.New("1 event is parked again; ebb dead list shows it")
	}
	return fmt.Errorf("%s are parked again; ebb dead list shows them", count(int64(r.Parked), "event"))
}

// discard gives up the events that confirm, which is given a question, is asked about, and no others.
func (d *dead) discard(ctx context.Context, filter sql.DeadFilter, confirm func(string) error) error {
	chosen, err := sql.ChooseDead(ctx, d.db, d.cfg.Slot, filter)
	if err != nil {
		return err
	}
	delivered := chosen.Delivered
	var done sql.DeadDiscard
	if n := len(chosen.Events); n > 0 {
		if err := confirm(fmt.Sprintf("Discard %s of slot %s, never to be delivered: %s?", count(int64(n), "event"), d.cfg.Slot, sampleOf(chosen.Events))); err != nil {
			return err
		}
		if done, err = sql.DiscardDead(ctx, d.db, d.cfg.Slot, chosen.Numbers()); err != nil {
			return err
		}
		delivered = append(delivered, done.Delivered...)
		d.say("discarded %s\n", count(done.Discarded, "event"))
		if done.Freed > 0 {
			d.say("the bridge delivers what was queued behind: %s\n", count(done.Freed, "event"))
		}
		if done.Gone > 0 {
			d.say("%s discarded by somebody else meanwhile, or moved by a replay\n", count(done.Gone, "event"))
		}
	} else if len(delivered) == 0 {
		d.say("there is nothing to discard\n")
	}
	if d.flags.json {
		if err := d.record(map[string]int64{"discarded": done.Discarded, "retrying": done.Freed, "delivered": int64(len(delivered)), "gone": done.Gone}); err != nil {
			return err
		}
	}
	switch n := len(delivered); n {
	case 0:
		return nil
	case 1:
		return fmt.Errorf("event %s is delivered already", word(delivered[0], 0))
	default:
		return fmt.Errorf("%d events are delivered already: event %s and others", n, word(delivered[0], 0))
	}
}

// sampleOf names the first of some events.
func sampleOf(events []sql.DeadEvent) string {
	const most = 5
	var names []string
	for i := range events[:min(most, len(events))] {
		e := &events[i]
		name := word(e.EventID, 0) + " (" + word(e.Topic, columnWidth)
		if e.Key != nil {
			name += ", key " + keyWord(e.Key, columnWidth)
		}
		names = append(names, name+")")
	}
	if n := len(events) - len(names); n > 0 {
		names = append(names, fmt.Sprintf("and %d more", n))
	}
	return strings.Join(names, ", ")
}
