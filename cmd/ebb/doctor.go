package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/jackc/pgx/v5"
	"github.com/spf13/cobra"

	"ebb/bridge"
	"ebb/internal/config"
	"ebb/replication"
	"ebb/sql"
)

// oldestServer is the first server version (server_version_num) that ebb works with.
const oldestServer = 140000

func newDoctor(a *app) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Check the database against what ebb run needs, and print the mend of what falls short; exit with 3 then",
		Long: "Doctor looks at the server, the schema, the tables, the publication, the slot, the role that it logs in as, the flow\n" +
			"limits, the settings for COMMITs that wait for delivery, and the dead letters. Give it the configuration, and so the role, of ebb run.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, _, err := a.loadForPostgres()
			if err != nil {
				return err
			}
			return doctor(cmd.Context(), a.stdout, cfg, asJSON)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// state is how a check came out.
type state string

const (
	stateOK state = "ok"
	// stateOff is of something that is not used and need not be.
	stateOff state = "off"
	// stateWarn is of something that works now and may not for ever.
	stateWarn state = "warn"
	stateFail state = "fail"
	// stateSkipped is of a check that makes no sense before another one is mended.
	stateSkipped state = "skipped"
)

// finding is what a check has found, and how it is mended or used.
type finding struct {
	Check string `json:"check"`
	State state  `json:"state"`
	Text  string `json:"text"`
	Mend  string `json:"mend,omitempty"`
}

// patient is what checks look at.
type patient struct {
	cfg *config.Config
	db  *pgx.Conn // once the server check has passed
}

// check looks at one thing. An error is a finding too: that it could not be looked at.
type check struct {
	name string
	// needs names the checks without which this one is skipped.
	needs []string
	run   func(context.Context, *patient) (finding, error)
}

var checks = []check{
	{"server", nil, checkServer},
	{"wal_level", []string{"server"}, checkWALLevel},
	{"role", []string{"server"}, checkRole},
	{"schema", []string{"server", "role"}, checkSchema},
	{"tables", []string{"schema"}, checkTables},
	{"publication", []string{"schema", "tables"}, checkPublication},
	{"slot", []string{"schema"}, checkSlot},
	{"flow", []string{"schema"}, checkFlow},
	{"inline", []string{"schema"}, checkInline},
	{"dead_letters", []string{"schema"}, checkDead},
}

func doctor(ctx context.Context, w io.Writer, cfg *config.Config, asJSON bool) error {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	p := &patient{cfg: cfg}
	defer func() {
		if p.db != nil {
			p.db.Close(context.WithoutCancel(ctx))
		}
	}()
	findings := examine(ctx, p)
	ok := !slices.ContainsFunc(findings, func(f finding) bool { return f.State == stateFail })
	var err error
	if asJSON {
		err = json.NewEncoder(w).Encode(struct {
			OK     bool      `json:"ok"`
			Checks []finding `json:"checks"`
		}{ok, findings})
	} else {
		err = printFindings(w, findings)
	}
	if err == nil && !ok {
		return errCheck
	}
	return err
}

// examine runs all checks.
func examine(ctx context.Context, p *patient) []finding {
	var findings []finding
	unfit := map[string]bool{}
	for _, c := range checks {
		var f finding
		if i := slices.IndexFunc(c.needs, func(name string) bool { return unfit[name] }); i >= 0 {
			f = finding{State: stateSkipped, Text: "not looked at before the " + c.needs[i] + " is mended"}
		} else {
			var err error
			if f, err = c.run(ctx, p); err != nil {
				f = finding{State: stateFail, Text: text(err)}
			}
		}
		f.Check = c.name
		unfit[c.name] = f.State == stateFail || f.State == stateSkipped
		findings = append(findings, f)
	}
	return findings
}

func printFindings(w io.Writer, findings []finding) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, f := range findings {
		fmt.Fprintf(t, "%s\t%s\t%s\n", f.State, f.Check, f.Text)
		if f.Mend != "" {
			fmt.Fprintf(t, "\t\t-> %s\n", f.Mend)
		}
	}
	return t.Flush()
}

func checkServer(ctx context.Context, p *patient) (finding, error) {
	db, err := sql.Connect(ctx, p.cfg.Postgres, p.cfg.Slot+" doctor")
	if err != nil {
		return finding{State: stateFail, Text: text(err), Mend: "start the server, or mend the postgres setting"}, nil
	}
	p.db = db
	var version string
	var number int
	var standby bool
	if err := db.QueryRow(ctx, "SELECT current_setting('server_version'), current_setting('server_version_num')::int, pg_is_in_recovery()").
		Scan(&version, &number, &standby); err != nil {
		return finding{}, err
	}
	switch {
	case number < oldestServer:
		return finding{State: stateFail, Text: "Postgres " + version, Mend: "upgrade the server to Postgres 14 or newer"}, nil
	case standby:
		return finding{State: stateFail, Text: "Postgres " + version + ", a standby",
			Mend: "name the primary in the postgres setting, or all servers with target_session_attrs=primary"}, nil
	}
	return finding{State: stateOK, Text: fmt.Sprintf("Postgres %s, database %s", version, db.Config().Database)}, nil
}

func checkWALLevel(ctx context.Context, p *patient) (finding, error) {
	err := replication.CheckWALLevel(ctx, p.db)
	if errors.Is(err, replication.ErrWALLevel) {
		return finding{State: stateFail, Text: err.Error(), Mend: "ALTER SYSTEM SET wal_level = 'logical', and restart the server"}, nil
	}
	return finding{State: stateOK, Text: "logical"}, err
}

// checkRole tries what it is about: managed services let roles replicate that do not have the attribute.
func checkRole(ctx context.Context, p *patient) (finding, error) {
	var name string
	var exists, member bool
	if err := p.db.QueryRow(ctx, `SELECT session_user::text, to_regrole('ebb_bridge') IS NOT NULL,
		coalesce(pg_has_role(to_regrole('ebb_bridge'), 'usage'), false)`).Scan(&name, &exists, &member); err != nil {
		return finding{}, err
	}
	switch {
	case !exists:
		return finding{State: stateFail, Text: "there is no role ebb_bridge", Mend: "run ebb setup"}, nil
	case !member:
		return finding{State: stateFail, Text: name + " has not the rights of ebb_bridge", Mend: "GRANT ebb_bridge TO " + quoteIdent(name)}, nil
	}
	conn, err := replication.Connect(ctx, p.cfg.Postgres, p.cfg.Slot+" doctor")
	if err == nil {
		_, err = conn.Identify(ctx)
		err = errors.Join(err, conn.Close())
	}
	if err != nil {
		return finding{State: stateFail, Text: name + " may not replicate: " + text(err), Mend: "ALTER ROLE " + quoteIdent(name) + " REPLICATION"}, nil
	}
	return finding{State: stateOK, Text: name + " may replicate, and has the rights of ebb_bridge"}, nil
}

func checkSchema(ctx context.Context, p *patient) (finding, error) {
	err := sql.Check(ctx, p.db)
	if errors.Is(err, sql.ErrNoSchema) {
		return finding{State: stateFail, Text: err.Error(), Mend: "run ebb setup, or a newer ebb"}, nil
	}
	return finding{State: stateOK, Text: "of this version"}, err
}

// checkTables looks at the tables as the bridge does when it starts.
func checkTables(ctx context.Context, p *patient) (finding, error) {
	tables := bridge.Tables(buffersOf(p.cfg))
	own, err := sql.Inspect(ctx, p.db, tables)
	if err == nil {
		err = sql.CheckRights(ctx, p.db, own)
	}
	if errors.Is(err, sql.ErrTable) {
		return finding{State: stateFail, Text: err.Error(), Mend: "do what it says, and run ebb setup"}, nil
	}
	names := make([]string, len(tables))
	for i := range tables {
		names[i] = tables[i].String()
	}
	return finding{State: stateOK, Text: strings.Join(names, ", ")}, err
}

func checkPublication(ctx context.Context, p *patient) (finding, error) {
	_, err := sql.CheckPublication(ctx, p.db, p.cfg.Publication, bridge.Tables(buffersOf(p.cfg))...)
	if errors.Is(err, sql.ErrPublication) {
		return finding{State: stateFail, Text: err.Error(), Mend: "run ebb setup"}, nil
	}
	return finding{State: stateOK, Text: p.cfg.Publication + " publishes what is inserted into them"}, err
}

func checkSlot(ctx context.Context, p *patient) (finding, error) {
	record, err := sql.ReadSlot(ctx, p.db, p.cfg.Slot)
	if errors.Is(err, sql.ErrNoRecord) {
		return finding{State: stateFail, Text: err.Error(), Mend: "run ebb setup"}, nil
	}
	if err != nil {
		return finding{}, err
	}
	const run = "start ebb run: it makes the slot anew, and delivers from the buffer what it held"
	slot, err := replication.InspectSlot(ctx, p.db, p.cfg.Slot)
	switch {
	case errors.Is(err, replication.ErrNoSlot):
		return finding{State: stateFail, Text: err.Error(), Mend: run}, nil
	case err != nil:
		return finding{}, err
	}
	if err := slot.Usable(p.db.Config().Database); err != nil {
		return finding{State: stateFail, Text: err.Error(), Mend: "drop that slot, or choose another name for the slot setting"}, nil
	}
	switch {
	case slot.Lost():
		return finding{State: stateFail, Text: fmt.Sprintf("slot %q is lost (wal_status %s) %s", slot.Name, slot.WALStatus, slot.Invalidated),
			Mend: run + "; raise max_slot_wal_keep_size"}, nil
	case !record.Made:
		return finding{State: stateFail, Text: fmt.Sprintf("slot %q is to be made anew: %s", slot.Name, record.MadeBecause), Mend: run}, nil
	case slot.WALStatus == "unreserved":
		return finding{State: stateWarn, Text: fmt.Sprintf("slot %q is about to be lost (wal_status %s)", slot.Name, slot.WALStatus),
			Mend: "start ebb run and its sink, or raise max_slot_wal_keep_size, before the next checkpoint"}, nil
	case !slot.Active:
		return finding{State: stateWarn, Text: fmt.Sprintf("no bridge streams from slot %q, which retains %s of WAL", slot.Name, size(slot.RetainedBytes())),
			Mend: "start ebb run"}, nil
	}
	return finding{State: stateOK, Text: fmt.Sprintf("a bridge streams from %s, wal_status %s", slot.Name, slot.WALStatus)}, nil
}

func checkFlow(ctx context.Context, p *patient) (finding, error) {
	want := flowOf(p.cfg)
	slot, have, err := sql.StoredFlow(ctx, p.db)
	if err != nil {
		return finding{}, err
	}
	if slot != p.cfg.Slot || have != want {
		return finding{State: stateWarn, Text: fmt.Sprintf("the limits in force are not those of the configuration: warn %s, limit %s, on_full %s on slot %q",
			config.Size(have.Warn), config.Size(have.Limit), have.OnFull, slot), Mend: "run ebb setup, or start ebb run anew"}, nil
	}
	f, err := flowFinding(ctx, p.db, want)
	if err == nil && f.State == "" {
		f = finding{State: stateOK, Text: fmt.Sprintf("warn %s, limit %s, on_full %s", config.Size(want.Warn), config.Size(want.Limit), want.OnFull)}
	}
	return f, err
}

// flowFinding says what is wrong with the limits on this server, or nothing.
func flowFinding(ctx context.Context, db *pgx.Conn, f sql.Flow) (finding, error) {
	retained, err := sql.MaxRetained(ctx, db)
	if err != nil || retained < 0 {
		return finding{}, err
	}
	for _, limit := range []struct {
		key   string
		bytes int64
	}{{"flow.limit", f.Limit}, {"flow.warn", f.Warn}} {
		if limit.bytes >= retained && limit.bytes > 0 {
			return finding{State: stateWarn,
				Text: fmt.Sprintf("max_slot_wal_keep_size, %s, gives the slot up before its lag reaches %s, %s", config.Size(retained), limit.key, config.Size(limit.bytes)),
				Mend: fmt.Sprintf("set max_slot_wal_keep_size well above %s, or %s well below %[1]s", config.Size(limit.bytes), limit.key)}, nil
		}
	}
	return finding{}, nil
}

func checkInline(ctx context.Context, p *patient) (finding, error) {
	return inlineFinding(ctx, p.db, p.cfg)
}

// checkDead notes what waits for somebody to decide about it. What the bridge retries by itself is said of the receiver.
func checkDead(ctx context.Context, p *patient) (finding, error) {
	parked, retrying, err := sql.CountDead(ctx, p.db, p.cfg.Slot)
	switch {
	case err != nil:
		return finding{}, err
	case parked > 0:
		return finding{State: stateWarn, Text: fmt.Sprintf("%s parked, and %d being retried", count(parked, "event"), retrying),
			Mend: "look at them by ebb dead list, and have them delivered by ebb dead retry, or given up by ebb dead discard"}, nil
	case retrying > 0:
		return finding{State: stateWarn, Text: count(retrying, "event") + " being retried, as the receiver has not taken them",
			Mend: "look at why by ebb dead list; the bridge delivers them when the receiver takes them"}, nil
	}
	return finding{State: stateOK, Text: "nothing is set aside"}, nil
}

// inlineFinding says how the server is set for COMMITs that wait for delivery.
func inlineFinding(ctx context.Context, db *pgx.Conn, cfg *config.Config) (finding, error) {
	in, err := sql.ReadInline(ctx, db, cfg.Postgres, cfg.Slot)
	if err != nil {
		return finding{}, err
	}
	set := setStandbyNames(cfg.Slot)
	switch {
	case !in.Concerns && in.Setting == "":
		return finding{State: stateOff, Text: "COMMIT cannot wait for delivery: synchronous_standby_names is empty",
			Mend: "to use ebb.deliver_on_commit(): " + setLocal + "; " + set + ". While no bridge runs, COMMITs that wait for delivery hang until one does"}, nil
	case !in.Concerns:
		return finding{State: stateOff, Text: fmt.Sprintf("COMMIT cannot wait for delivery: synchronous_standby_names is %q, of standbys that ebb cannot be mixed with",
			in.Setting)}, nil
	case in.Finding != "":
		return finding{State: stateFail, Text: in.Finding, Mend: set}, nil
	case len(in.Waiting) > 0 && in.Waiting[0] == db.Config().Database:
		return finding{State: stateFail, Text: "every COMMIT waits for delivery by default, in " + databases(in.Waiting), Mend: localFor(in.Waiting)}, nil
	case len(in.WaitingRoles) > 0:
		return finding{State: stateFail, Text: "every COMMIT of these roles waits for delivery by default: " + strings.Join(in.WaitingRoles, ", "),
			Mend: fmt.Sprintf("ALTER ROLE %s SET synchronous_commit = local", quoteIdent(in.WaitingRoles[0]))}, nil
	case len(in.Waiting) > 0:
		return finding{State: stateWarn, Text: "every COMMIT waits for this bridge by default in " + databases(in.Waiting), Mend: localFor(in.Waiting)}, nil
	}
	led, err := sql.HasLeader(ctx, db, cfg.Slot)
	switch {
	case err != nil:
		return finding{}, err
	case !led:
		return finding{State: stateWarn, Text: "COMMITs that wait for delivery hang, as no bridge runs",
			Mend: "start ebb run, or two of it; a wait is ended by pg_cancel_backend(pid), which leaves its transaction committed"}, nil
	case len(in.MayWait) > 0:
		return finding{State: stateWarn, Text: "every COMMIT waits for this bridge by default in " + databases(in.MayWait) +
			", unless the server's configuration file has synchronous_commit = local", Mend: localFor(in.MayWait)}, nil
	}
	return finding{State: stateOK, Text: fmt.Sprintf("COMMIT can wait for delivery: synchronous_standby_names is %q, and others do not wait", in.Setting)}, nil
}

// setLocal and setStandbyNames have COMMITs wait that are asked to, and no others, when they are set in this order.
const setLocal = "ALTER SYSTEM SET synchronous_commit = 'local'"

func setStandbyNames(slot string) string {
	return fmt.Sprintf(`ALTER SYSTEM SET synchronous_standby_names = 'FIRST 1 ("%s")'; SELECT pg_reload_conf()`, slot)
}

func databases(names []string) string {
	if len(names) == 1 {
		return "database " + names[0]
	}
	return "databases " + strings.Join(names, ", ")
}

func localFor(names []string) string {
	return fmt.Sprintf("ALTER DATABASE %s SET synchronous_commit = local, and so for each of them, or for all of the server ALTER SYSTEM SET synchronous_commit = 'local'; "+
		"SELECT pg_reload_conf(). It counts for sessions that begin afterwards", quoteIdent(names[0]))
}

func quoteIdent(name string) string { return pgx.Identifier{name}.Sanitize() }
