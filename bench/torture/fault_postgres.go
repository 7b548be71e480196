package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"ebb/event"
	"ebb/internal/postgres"
	"ebb/internal/sleep"
)

func (r *round) stopPostgresImmediately(f fault) error { return r.stopPostgres(f, postgres.Immediate) }

func (r *round) stopPostgresFast(f fault) error { return r.stopPostgres(f, postgres.Fast) }

// stopMost is how long a shutdown may take: a bridge that sleeps is waited for until wal_sender_timeout is over.
const stopMost = 60 * time.Second

func (r *round) stopPostgres(f fault, mode postgres.StopMode) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.ctx), stopMost)
	defer cancel()
	began := time.Now()
	if err := r.postgres.Stop(ctx, mode); err != nil {
		r.fail("Postgres hangs", fmt.Sprintf("its %s shutdown had not ended after %s: %v", mode, stopMost, err))
		r.postgres.Kill()
	}
	r.mu.Lock()
	r.report.SlowestStop = max(r.report.SlowestStop, time.Since(began).Seconds())
	r.mu.Unlock()
	r.wait(f.lasts)
	starting, cancel := context.WithTimeout(context.WithoutCancel(r.ctx), 2*time.Minute)
	defer cancel()
	return r.postgres.Start(starting)
}

// asAdmin runs something in a session of its own.
func (r *round) asAdmin(timeout time.Duration, do func(context.Context, *pgx.Conn) error) error {
	ctx, cancel := context.WithTimeout(r.ctx, timeout)
	defer cancel()
	db, err := pgx.Connect(ctx, r.postgres.URL(database))
	if err != nil {
		return err
	}
	defer db.Close(context.WithoutCancel(ctx))
	return do(ctx, db)
}

const (
	// ofBridges are the sessions of all bridges.
	ofBridges = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = '" + bridgeRole + "'"
	// ofLeader are the session that holds the leader's lock, and the walsender.
	ofLeader = `SELECT pg_terminate_backend(pid) FROM (
		SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted
		UNION SELECT active_pid FROM pg_replication_slots WHERE slot_name = '` + slot + `' AND active_pid IS NOT NULL) p`
	ofWalsender = "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE active_pid IS NOT NULL AND slot_name = '" + slot + "'"
)

func (r *round) terminate(sessions string) error {
	return r.asAdmin(20*time.Second, func(ctx context.Context, db *pgx.Conn) error {
		tag, err := db.Exec(ctx, sessions)
		if err == nil && tag.RowsAffected() == 0 {
			return errors.New("there was no session to end")
		}
		return err
	})
}

func (r *round) endSessions(fault) error  { return r.terminate(ofBridges) }
func (r *round) endWalsender(fault) error { return r.terminate(ofWalsender) }
func (r *round) terminateLeader() error   { return r.terminate(ofLeader) }

// dropSlot drops the slot, which then comes back from the trailing one.
func (r *round) dropSlot(fault) error { return r.drop() }

// dropSlots drops the trailing slot as well, so that what was not delivered comes from the buffer.
func (r *round) dropSlots(fault) error { return r.drop(slot + "_trail") }

// drop drops the slot, as often as it takes to be faster than the bridge, after others that need not be there.
func (r *round) drop(others ...string) error {
	return r.asAdmin(30*time.Second, func(ctx context.Context, db *pgx.Conn) error {
		for {
			if _, err := db.Exec(ctx, ofWalsender); err != nil {
				return err
			}
			if _, err := db.Exec(ctx, "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = ANY ($1) AND NOT active",
				others); err != nil {
				return err
			}
			_, err := db.Exec(ctx, "SELECT pg_drop_replication_slot($1)", slot)
			if refused := (*pgconn.PgError)(nil); !errors.As(err, &refused) || refused.Code != "55006" { // in use
				return err
			}
			if err := sleep.For(ctx, 5*time.Millisecond); err != nil {
				return err
			}
		}
	})
}

// invalidateSlot holds the leader's lock itself, so that no bridge streams, has the log go on for some segments, and then limits what
// slots may keep. The witness must not be hit.
func (r *round) invalidateSlot(fault) (err error) {
	return r.asAdmin(60*time.Second, func(ctx context.Context, db *pgx.Conn) error {
		for locked := false; !locked; {
			if _, err := db.Exec(ctx, ofBridges); err != nil {
				return err
			}
			if err := db.QueryRow(ctx, "SELECT pg_try_advisory_lock(hashtextextended('ebb leader on ' || $1::text, 0))", slot).Scan(&locked); err != nil {
				return err
			}
		}
		const segments, segment = 6, 16 << 20
		for range segments {
			if _, err := db.Exec(ctx, "SELECT pg_logical_emit_message(false, 'torture', 'x')"); err != nil {
				return err
			}
			if _, err := db.Exec(ctx, "SELECT pg_switch_wal()"); err != nil {
				return err
			}
		}
		// The witness's slot lets go of the log when it has confirmed what stands behind a snapshot of the running transactions, which a
		// checkpoint writes, and when those that ran then have ended.
		for {
			if _, err := db.Exec(ctx, "CHECKPOINT"); err != nil {
				return err
			}
			if err := r.witness.catchUp(ctx); err != nil {
				return err
			}
			if err := r.witness.advance(ctx, db); err != nil {
				return err
			}
			keeps, err := readLSN(ctx, db, "SELECT restart_lsn::text FROM pg_replication_slots WHERE slot_name = $1", witnessSlot)
			if err != nil {
				return err
			}
			now, err := readLSN(ctx, db, "SELECT pg_current_wal_lsn()::text")
			if err != nil {
				return err
			}
			if keeps+segment > now {
				break
			}
			if err := sleep.For(ctx, 300*time.Millisecond); err != nil {
				return fmt.Errorf("the witness still needs the log from %s on, at %s: %w", keeps, now, err)
			}
		}
		if err := r.postgres.SetSetting(ctx, "max_slot_wal_keep_size", "48MB"); err != nil {
			return err
		}
		_, err := db.Exec(ctx, "CHECKPOINT")
		err = errors.Join(err, r.postgres.ResetSetting(context.WithoutCancel(ctx), "max_slot_wal_keep_size"))
		if err != nil {
			return err
		}
		var status string
		if err := db.QueryRow(ctx, "SELECT wal_status FROM pg_replication_slots WHERE slot_name = $1", slot).Scan(&status); err != nil {
			return err
		}
		if status != "lost" {
			return fmt.Errorf("the slot is %s", status)
		}
		return nil
	})
}

func readLSN(ctx context.Context, db *pgx.Conn, query string, args ...any) (event.LSN, error) {
	var text string
	if err := db.QueryRow(ctx, query, args...).Scan(&text); err != nil {
		return 0, err
	}
	return event.ParseLSN(text)
}

func (r *round) dropFromPublication(f fault) error {
	return r.damagePublication(f, "ALTER PUBLICATION "+slot+" DROP TABLE ebb.buffer")
}

func (r *round) stopPublishingInserts(f fault) error {
	return r.damagePublication(f, "ALTER PUBLICATION "+slot+" SET (publish = 'update')")
}

const (
	// noticed is how long it may take until the bridges have stopped; one that sleeps or is cut off takes longer.
	noticed = 20 * time.Second
	// lateNotice is how long after the mending one may still have read what was before.
	lateNotice = 15 * time.Second
)

// damagePublication damages it, waits until the bridges have stopped, and has ebb setup mend it, as an operator would.
func (r *round) damagePublication(f fault, statement string) error {
	r.fleet.excuse(`publication "`+slot+`"`, 2*time.Minute)
	defer r.fleet.release(lateNotice)
	if err := r.asAdmin(20*time.Second, func(ctx context.Context, db *pgx.Conn) error {
		_, err := db.Exec(ctx, statement)
		return err
	}); err != nil {
		return err
	}
	r.wait(f.lasts)
	for began := time.Now(); r.fleet.running() > 0 && time.Since(began) < noticed && r.ctx.Err() == nil; {
		r.wait(50 * time.Millisecond)
	}
	ctx, cancel := context.WithTimeout(r.ctx, time.Minute)
	defer cancel()
	for {
		out, err := r.ebb(ctx, "setup", "--timeout", "20s")
		if err == nil {
			return nil
		}
		if sleep.For(ctx, 300*time.Millisecond) != nil {
			if r.ctx.Err() == nil {
				r.fail("setup", fmt.Sprintf("ebb setup did not mend the publication within a minute: %v: %s", err, out))
			}
			return err
		}
	}
}
