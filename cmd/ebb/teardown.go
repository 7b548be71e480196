package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"ebb/internal/config"
	"ebb/replication"
	"ebb/sql"
)

func newTeardown(a *app) *cobra.Command {
	var yes bool
	cmd := &cobra.Command{
		Use:   "teardown",
		Short: "Remove the slot, the publication, the schema with all that is in the buffer, and the roles",
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, _, err := a.loadForPostgres()
			if err != nil {
				return err
			}
			confirm := func(question string) error { return a.confirm(question, yes) }
			return teardown(cmd.Context(), a.stdout, cfg, confirm)
		},
	}
	cmd.Flags().BoolVar(&yes, "yes", false, "do not ask")
	return cmd
}

// confirm asks a question that needs a yes. Without a terminal there is nobody to ask.
func (a *app) confirm(question string, yes bool) error {
	if yes {
		return nil
	}
	in, ok := a.stdin.(*os.File)
	if !ok || !term.IsTerminal(int(in.Fd())) {
		return &usageError{errors.New("this needs a yes and there is no terminal to ask on: give --yes")}
	}
	fmt.Fprintf(a.stderr, "%s [y/N] ", question)
	line, err := bufio.NewReader(in).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read the answer: %w", err)
	}
	if answer := strings.ToLower(strings.TrimSpace(line)); answer != "y" && answer != "yes" {
		return errors.New("nothing was changed")
	}
	return nil
}

// otherSlots returns the other slots of a buffer that may not be there.
func otherSlots(ctx context.Context, db *pgx.Conn, slot string) ([]string, error) {
	if err := sql.Check(ctx, db); errors.Is(err, sql.ErrNoSchema) {
		return nil, nil
	}
	return sql.OtherSlots(ctx, db, slot)
}

// teardown removes what setup made. The stream keeps what was delivered.
func teardown(ctx context.Context, w io.Writer, cfg *config.Config, confirm func(string) error) error {
	db, err := sql.Connect(ctx, cfg.Postgres, cfg.Slot)
	if err != nil {
		return err
	}
	defer db.Close(context.WithoutCancel(ctx))
	database := db.Config().Database
	led, err := sql.HasLeader(ctx, db, cfg.Slot)
	if err != nil {
		return err
	}
	if led {
		return fmt.Errorf("a bridge is running on slot %q: stop it first", cfg.Slot)
	}
	others, err := otherSlots(ctx, db, cfg.Slot)
	if err != nil {
		return err
	}
	if len(others) > 0 {
		return fmt.Errorf("the buffer belongs to slot %s and not to %s: give --config the one with that slot", strings.Join(others, ", "), cfg.Slot)
	}
	if err := confirm(fmt.Sprintf("Remove slot %s, publication %s and schema ebb with all its events from database %s?",
		cfg.Slot, cfg.Publication, database)); err != nil {
		return err
	}

	var inline sql.Inline
	if sql.Check(ctx, db) == nil {
		if inline, err = sql.StandbyNames(ctx, db, cfg.Slot); err != nil {
			return err
		}
	}
	for _, name := range []string{cfg.Slot, replication.TrailOf(cfg.Slot)} {
		slot, err := replication.InspectSlot(ctx, db, name)
		switch {
		case errors.Is(err, replication.ErrNoSlot):
		case err != nil:
			return err
		case slot.Usable(database) != nil:
			fmt.Fprintf(w, "kept slot %s: %v\n", name, slot.Usable(database))
		default:
			if err := replication.DropSlot(ctx, db, name); err != nil {
				return err
			}
			fmt.Fprintln(w, "dropped slot", name)
		}
	}
	done, err := sql.Drop(ctx, db, cfg.Publication)
	for _, line := range done {
		fmt.Fprintln(w, line)
	}
	if inline.Concerns {
		fmt.Fprintf(w, "synchronous_standby_names is still %q: reset it, or COMMITs that wait for a standby hang for ever\n", inline.Setting)
	}
	return err
}
