package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"ebb/bridge"
	"ebb/internal/config"
	"ebb/sql"
)

// statusTimeout bounds a status: it is asked for by health checks.
const statusTimeout = 20 * time.Second

func newStatus(a *app) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Print how delivery goes; exit with 3 when nobody delivers",
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, _, err := a.loadForPostgres()
			if err != nil {
				return err
			}
			return status(cmd.Context(), a.stdout, cfg, asJSON)
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

func status(ctx context.Context, w io.Writer, cfg *config.Config, asJSON bool) error {
	s, err := readStatus(ctx, cfg)
	if err != nil {
		return err
	}
	if asJSON {
		err = json.NewEncoder(w).Encode(s)
	} else {
		err = printStatus(w, s)
	}
	if err == nil && !s.Healthy() {
		return errCheck
	}
	return err
}

func readStatus(ctx context.Context, cfg *config.Config) (*bridge.Status, error) {
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	db, err := sql.Connect(ctx, cfg.Postgres, cfg.Slot+" status")
	if err != nil {
		return nil, err
	}
	defer db.Close(context.WithoutCancel(ctx))
	return bridge.ReadStatus(ctx, db, cfg.Slot)
}

func printStatus(w io.Writer, s *bridge.Status) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	state := "no bridge streams from it"
	if s.Slot.Active {
		state = "streaming"
	}
	fmt.Fprintf(t, "slot\t%s, %s, wal_status %s\n", s.Slot.Name, state, s.Slot.WALStatus)
	if s.Slot.Made > 1 {
		fmt.Fprintf(t, "\tmade %d times, the last time because: %s\n", s.Slot.Made, s.Slot.MadeBecause)
	}
	fmt.Fprintf(t, "leader\t%s\n", map[bool]string{true: "yes", false: "none: start ebb run"}[s.Role != bridge.RoleNone])
	fmt.Fprintf(t, "confirmed\t%s\n", s.Slot.ConfirmedLSN)
	fmt.Fprintf(t, "lag\t%s, %s\n", size(s.Slot.LagBytes), seconds(s.LagSeconds))
	fmt.Fprintf(t, "retained WAL\t%s\n", size(s.Slot.RetainedWALBytes))
	if s.Delivered.Position == nil {
		fmt.Fprintf(t, "delivered\tnothing recorded yet\n")
	} else {
		fmt.Fprintf(t, "delivered\t%d events, the last at position %s, recorded %s\n", s.Delivered.Events, s.Delivered.Position,
			s.Delivered.At.Format(time.RFC3339))
	}
	about := ""
	if s.Backlog.Estimated {
		about = "about "
	}
	fmt.Fprintf(t, "backlog\t%s%d events, the oldest %s old\n", about, s.Backlog.Events, seconds(s.Backlog.OldestAgeSeconds))
	fmt.Fprintf(t, "flow\t%s\n", map[sql.FlowState]string{sql.FlowOpen: "open", sql.FlowWarn: "warn: the lag is past flow.warn",
		sql.FlowClosed: "closed: the lag is past flow.limit, and ebb.put is refused"}[s.Flow])
	if r := s.Replay; r != nil {
		fmt.Fprintf(t, "replay\tnumber %d from %s is %s; %d of %d events so far (ebb replay --cancel ends it)\n", r.ID, r.From, r.State, r.Delivered, r.Events)
	}
	if s.Recovery != nil {
		fmt.Fprintf(t, "recovery\tof rows from before the slot, since %s; %d events so far\n", s.Recovery.Since.Format(time.RFC3339), s.Recovery.Events)
	}
	return t.Flush()
}

func seconds(s float64) string {
	return time.Duration(s * float64(time.Second)).Round(time.Millisecond).String()
}

// size prints bytes in the powers of 1024 that Postgres and the configuration use.
func size(n int64) string {
	const units = "KMGTP"
	if n < 1024 {
		return fmt.Sprintf("%d bytes", n)
	}
	v, unit := float64(n)/1024, 0
	for v >= 1024 && unit < len(units)-1 {
		v, unit = v/1024, unit+1
	}
	return fmt.Sprintf("%.1f %cB", v, units[unit])
}
