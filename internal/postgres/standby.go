package postgres

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"ebb/event"
)

// StandbyConfig is a standby's.
type StandbyConfig struct {
	// Name is the standby's application_name on its primary, and the name of its slot there, so it may have lower-case
	// letters, digits and underscores. Left empty, it is "standby".
	Name string

	// Port on 127.0.0.1; 0 takes a free one.
	Port int

	// Settings go over those of the primary. sync_replication_slots, of Postgres 17 and later, needs no other.
	Settings map[string]string
}

// Standby makes a hot standby of this server, with a physical slot and hot_standby_feedback, and returns when it accepts
// connections. It is a server like any other, with a temporary data directory that its Close removes; its slot stays on the
// primary. What ALTER SYSTEM has set on the primary it does not take over.
//
// It needs Postgres 15 or later.
func (s *Server) Standby(ctx context.Context, config StandbyConfig) (*Server, error) {
	ctx, cancel := withStartTimeout(ctx)
	defer cancel()
	standby := &Server{
		installation: s.installation,
		account:      s.account,
		password:     s.password,
		port:         config.Port,
		fixedPort:    config.Port != 0,
		standbyName:  cmp.Or(config.Name, "standby"),
	}
	if err := standby.prepareStandby(ctx, s, config); err != nil {
		return nil, errors.Join(fmt.Errorf("prepare a standby of the server on port %d: %w", s.Port(), err), standby.removeTemp())
	}
	if err := standby.Start(ctx); err != nil {
		return nil, errors.Join(err, standby.removeTemp())
	}
	return standby, nil
}

func (s *Server) prepareStandby(ctx context.Context, primary *Server, config StandbyConfig) (err error) {
	if s.temp, err = makeTempDir(s.account); err != nil {
		return err
	}
	s.dataDir = s.temp.data()
	if err := s.backUp(ctx, primary); err != nil {
		return fmt.Errorf("take a base backup: %w", err)
	}
	s.settings = maps.Clone(primary.settings)
	maps.Copy(s.settings, map[string]string{
		// dbname is for sync_replication_slots, which asks the primary in that database; nothing else uses it.
		"primary_conninfo": fmt.Sprintf("host=127.0.0.1 port=%d user=%s password=%s dbname=postgres application_name=%s sslmode=disable",
			primary.Port(), Superuser, conninfoQuote(primary.password), s.standbyName),
		"primary_slot_name":    s.standbyName,
		"hot_standby_feedback": "on",
	})
	maps.Copy(s.settings, config.Settings)
	if err := s.configure(); err != nil {
		return err
	}
	for _, empty := range []string{"postgresql.auto.conf", "standby.signal"} {
		if err := s.writeData(empty, nil); err != nil {
			return err
		}
	}
	return nil
}

// conninfoQuote quotes a value of a libpq connection string in keyword/value form.
func conninfoQuote(value string) string {
	return "'" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(value) + "'"
}

// backUp copies the running primary by the low-level API ("Making a Base Backup Using the Low Level API" in the documentation of
// Postgres) and not by pg_basebackup, which the packages that embed Postgres leave out. WAL comes over the slot, which is made first
// so that nothing is missing.
func (s *Server) backUp(ctx context.Context, primary *Server) error {
	conn, err := pgx.Connect(ctx, primary.URL("postgres"))
	if err != nil {
		return err
	}
	defer conn.Close(context.WithoutCancel(ctx)) // ends a backup that was begun as well
	if _, err := conn.Exec(ctx, "SELECT pg_create_physical_replication_slot($1, true)", s.standbyName); err != nil {
		return fmt.Errorf("create the slot %q: %w", s.standbyName, err)
	}
	if _, err := conn.Exec(ctx, "SELECT pg_backup_start($1, true)", s.standbyName); err != nil {
		return err
	}
	if err := s.copyCluster(ctx, primary.dataDir); err != nil {
		return err
	}
	var label, tablespaces string
	// WAL is not archived, so there is nothing to wait for.
	err = conn.QueryRow(ctx, "SELECT labelfile, coalesce(spcmapfile, '') FROM pg_backup_stop(false)").Scan(&label, &tablespaces)
	if err != nil {
		return err
	}
	if strings.TrimSpace(tablespaces) != "" {
		return fmt.Errorf("the server has tablespaces outside of its data directory: %s", strings.TrimSpace(tablespaces))
	}
	return s.writeData("backup_label", []byte(label))
}

// contentsNotCopied are directories that a backup has empty: WAL, which comes over the slot; slots, which would hold WAL back for
// nobody; and what the server makes anew at every start.
var contentsNotCopied = map[string]bool{
	"pg_wal": true, "pg_replslot": true,
	"pg_dynshmem": true, "pg_notify": true, "pg_serial": true, "pg_snapshots": true, "pg_stat_tmp": true, "pg_subtrans": true,
}

// filesNotCopied belong to the primary's process, or are written for the standby.
var filesNotCopied = map[string]bool{
	"postmaster.pid": true, "postmaster.opts": true, "server.log": true, "postgresql.auto.conf": true, confName: true,
}

// copyCluster copies the files of a running server. What changes or vanishes meanwhile is mended by the replay of WAL.
func (s *Server) copyCluster(ctx context.Context, from string) error {
	return filepath.WalkDir(from, func(path string, entry os.DirEntry, err error) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if errors.Is(err, os.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		name, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		if entry.IsDir() {
			dir := filepath.Join(s.dataDir, name)
			if err := os.Mkdir(dir, 0o700); err != nil {
				return err
			}
			if err := s.account.chown(dir); err != nil {
				return err
			}
			if contentsNotCopied[name] {
				return filepath.SkipDir
			}
			return nil
		}
		if filesNotCopied[name] || strings.HasPrefix(entry.Name(), "pgsql_tmp") {
			return nil
		}
		content, err := os.ReadFile(path)
		if errors.Is(err, os.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		return s.writeData(name, content)
	})
}

// writeData writes a file of the data directory.
func (s *Server) writeData(name string, content []byte) error {
	path := filepath.Join(s.dataDir, name)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		return err
	}
	return s.account.chown(path)
}

// Promote makes a standby a primary, on a new timeline, and returns when it accepts writes. What it has received is replayed first,
// also when its replay is paused; for a promotion that misses transactions, CutOff it before they commit.
func (s *Server) Promote(ctx context.Context) error {
	return s.until(ctx, "promote the standby", "SELECT pg_promote(false)", "SELECT NOT pg_is_in_recovery()")
}

// InRecovery says whether the server is a standby, which replays WAL and accepts no writes.
func (s *Server) InRecovery(ctx context.Context) (bool, error) {
	in, err := ask[bool](ctx, s, "SELECT pg_is_in_recovery()")
	if err != nil {
		return false, fmt.Errorf("ask whether the server is in recovery: %w", err)
	}
	return in, nil
}

// FlushedLSN is the end of the WAL that a primary has flushed. What has committed is before it.
func (s *Server) FlushedLSN(ctx context.Context) (event.LSN, error) {
	lsn, err := ask[string](ctx, s, "SELECT pg_current_wal_flush_lsn()::text")
	if err != nil {
		return 0, fmt.Errorf("ask for the end of WAL: %w", err)
	}
	return event.ParseLSN(lsn)
}

// WaitReplayed waits until a standby has replayed WAL up to lsn: until it shows what had committed by then.
func (s *Server) WaitReplayed(ctx context.Context, lsn event.LSN) error {
	return s.until(ctx, fmt.Sprintf("wait for the replay of %s", lsn), "",
		"SELECT coalesce(pg_last_wal_replay_lsn() >= $1::text::pg_lsn, false)", lsn.String())
}

// CutOff takes a standby's primary away from it, and returns when nothing is received any more. The standby runs on, also over
// restarts, and may be promoted. Its replay must not be paused: the process that replays is the one that ends the walreceiver.
func (s *Server) CutOff(ctx context.Context) error {
	if err := s.SetSetting(ctx, "primary_conninfo", ""); err != nil {
		return err
	}
	// pg_stat_wal_receiver does not show one that is connecting.
	return s.until(ctx, "cut the standby off", "",
		"SELECT NOT EXISTS (SELECT FROM pg_stat_activity WHERE backend_type = 'walreceiver')")
}

// Rejoin undoes CutOff, and returns when the standby receives WAL again.
func (s *Server) Rejoin(ctx context.Context) error {
	if err := s.ResetSetting(ctx, "primary_conninfo"); err != nil {
		return err
	}
	return s.until(ctx, "let the standby rejoin", "",
		"SELECT EXISTS (SELECT FROM pg_stat_wal_receiver WHERE status = 'streaming')")
}

// PauseReplay has a standby receive WAL without showing what it holds, until ResumeReplay or Promote.
func (s *Server) PauseReplay(ctx context.Context) error {
	return s.until(ctx, "pause replay", "SELECT pg_wal_replay_pause()", "SELECT pg_get_wal_replay_pause_state() = 'paused'")
}

// ResumeReplay undoes PauseReplay.
func (s *Server) ResumeReplay(ctx context.Context) error {
	return s.until(ctx, "resume replay", "SELECT pg_wal_replay_resume()", "SELECT NOT pg_is_wal_replay_paused()")
}

// ask runs a query that yields one value.
func ask[T any](ctx context.Context, s *Server, query string) (value T, err error) {
	conn, err := pgx.Connect(ctx, s.URL("postgres"))
	if err != nil {
		return value, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	err = conn.QueryRow(ctx, query).Scan(&value)
	return value, err
}

// until runs a command, unless it is empty, and then waits until a query yields true.
func (s *Server) until(ctx context.Context, step, command, query string, args ...any) error {
	ctx, cancel := withStartTimeout(ctx)
	defer cancel()
	conn, err := pgx.Connect(ctx, s.URL("postgres"))
	if err != nil {
		return fmt.Errorf("%s: %w", step, err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if command != "" {
		if _, err := conn.Exec(ctx, command); err != nil {
			return fmt.Errorf("%s: %w", step, err)
		}
	}
	for {
		var done bool
		err := conn.QueryRow(ctx, query, args...).Scan(&done)
		if err == nil && done {
			return nil
		}
		if err == nil {
			err = wait(ctx, 5*time.Millisecond)
		}
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		if err != nil {
			return fmt.Errorf("%s: %w", step, err)
		}
	}
}
