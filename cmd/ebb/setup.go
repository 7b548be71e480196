package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/spf13/cobra"

	"ebb/bridge"
	"ebb/internal/config"
	"ebb/replication"
	"ebb/sql"
)

// printedFor is the server version that the script of setup --print is written for; older ones have no column lists.
const printedFor = 150000

func newSetup(a *app) *cobra.Command {
	var printOnly bool
	var timeout time.Duration
	cmd := &cobra.Command{
		Use:   "setup",
		Short: "Create or upgrade the buffer, the roles, the publication and the slot",
		Long: "Setup creates or upgrades what the bridge needs in the database: schema ebb with the buffer table, the roles\n" +
			"ebb_producer and ebb_bridge, the publication and the replication slot. It may be run at any time, again and again.\n\n" +
			"The role that ebb run logs in as needs the attribute REPLICATION, which is not inherited by membership and also\n" +
			"allows base backups (ALTER ROLE name REPLICATION; managed services have a role to grant instead), and\n" +
			"GRANT ebb_bridge TO name.\n\n" +
			"To have COMMITs wait for delivery (ebb.deliver_on_commit()), set synchronous_commit = local for every database of the\n" +
			"server, and then synchronous_standby_names = 'FIRST 1 (\"SLOT\")'. While no bridge runs, such COMMITs hang until one does.\n" +
			"ebb doctor checks that.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, log, err := a.load()
			if err != nil {
				return err
			}
			if printOnly {
				return printSetup(a.stdout, cfg)
			}
			if err := cfg.RequirePostgres(); err != nil {
				return err
			}
			ctx, cancel := context.WithTimeoutCause(cmd.Context(), timeout, fmt.Errorf("gave up after %s (--timeout)", timeout))
			defer cancel()
			return setup(ctx, a.stdout, cfg, log)
		},
	}
	cmd.Flags().BoolVar(&printOnly, "print", false, "print the SQL instead of running it")
	cmd.Flags().DurationVar(&timeout, "timeout", time.Minute, "how long to wait for transactions that have written to end")
	return cmd
}

func setupOf(cfg *config.Config) sql.Setup {
	return sql.Setup{Publication: cfg.Publication, Slot: cfg.Slot, Tables: bridge.Tables(buffersOf(cfg)), Keep: cfg.Recorded.Keep, Flow: flowOf(cfg)}
}

// flowOf returns the flow limits. A warning that nobody has asked for comes at the limit at the latest.
func flowOf(cfg *config.Config) sql.Flow {
	f := sql.Flow{Warn: int64(cfg.Flow.Warn), Limit: int64(cfg.Flow.Limit), OnFull: sql.OnFull(cfg.Flow.OnFull)}
	if f.Limit > 0 {
		f.Warn = min(f.Warn, f.Limit)
	}
	return f
}

func printSetup(w io.Writer, cfg *config.Config) error {
	script, err := sql.Script(setupOf(cfg), printedFor)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s\n-- The slot %q comes last, and its trailing slot. Setup makes it on a replication connection, together with a record of its snapshot,\n"+
		"-- so that the rows which were in the buffer before it are delivered as well.\n\n"+
		"-- To have COMMITs wait for delivery, by ebb.deliver_on_commit(), set this, in this order. While no bridge runs, they hang until one does.\n"+
		"-- %s;\n-- %s;\n", script, cfg.Slot, setLocal, setStandbyNames(cfg.Slot))
	return err
}

// setup brings the database to what cfg wants and prints what it did.
func setup(ctx context.Context, w io.Writer, cfg *config.Config, log *slog.Logger) error {
	db, err := sql.Connect(ctx, cfg.Postgres, cfg.Slot)
	if err != nil {
		return err
	}
	defer db.Close(context.WithoutCancel(ctx))
	if err := replication.CheckWALLevel(ctx, db); err != nil {
		return err
	}
	others, err := otherSlots(ctx, db, cfg.Slot)
	if err != nil {
		return err
	}
	if len(others) > 0 {
		return fmt.Errorf("the buffer has slot %q already, and one is all it can have: use that (slot), or give it up by "+
			"SELECT pg_drop_replication_slot('%[1]s') and DELETE FROM ebb.slot WHERE name = '%[1]s'", others[0])
	}
	done, err := sql.Apply(ctx, db, setupOf(cfg))
	if err != nil {
		return err
	}
	slots := bridgeConfig(cfg, log)
	made, err := bridge.EnsureSlot(ctx, db, slots)
	if made {
		done = append(done, "created slot "+cfg.Slot)
	}
	if err == nil {
		var did string
		if did, err = bridge.EnsureTrail(ctx, db, slots); did != "" {
			done = append(done, did)
		}
	}
	for _, line := range done {
		fmt.Fprintln(w, line)
	}
	if err != nil {
		if cause := context.Cause(ctx); cause != nil && !errors.Is(err, cause) {
			err = fmt.Errorf("%w: %w", err, cause)
		}
		return err
	}
	if len(done) == 0 {
		fmt.Fprintln(w, "everything is set up already")
	}
	return sayOfSettings(ctx, db, cfg, log, made)
}

// sayOfSettings logs what is wrong with the server's settings for what is configured or used, and, at first, what could be used.
func sayOfSettings(ctx context.Context, db *pgx.Conn, cfg *config.Config, log *slog.Logger, first bool) error {
	flow, err := flowFinding(ctx, db, flowOf(cfg))
	if err != nil {
		return err
	}
	inline, err := inlineFinding(ctx, db, cfg)
	if err != nil {
		return err
	}
	for _, f := range []finding{flow, inline} {
		switch {
		case f.State == stateWarn || f.State == stateFail:
			log.Warn(f.Text, "mend", f.Mend)
		case f.State == stateOff && first:
			var mend []any
			if f.Mend != "" {
				mend = []any{"mend", f.Mend}
			}
			log.Info(f.Text, mend...)
		}
	}
	return nil
}
