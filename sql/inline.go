package sql

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"

	"ebb/internal/session"
)

// Inline is how a server is set for COMMITs that wait for delivery.
type Inline struct {
	// Setting is synchronous_standby_names.
	Setting string
	// Concerns says that it is about the slot: it names it, or whatever standby there is.
	Concerns bool
	// Finding says why COMMIT cannot be had to wait for the slot, or is "".
	Finding string
	// Waiting are the databases all whose COMMITs wait, as their synchronous_commit is neither local nor off; this one comes first.
	// WaitingRoles are the roles for which that is so in this database. Of other databases it is unknown where this one has a setting of its
	// own, behind which that of the server cannot be seen: then MayWait has them.
	Waiting, WaitingRoles, MayWait []string
}

// ReadInline asks how the server is set, for a slot. Besides db it needs a session of its own, as db is set otherwise.
func ReadInline(ctx context.Context, db *pgx.Conn, url, slot string) (Inline, error) {
	in, err := StandbyNames(ctx, db, slot)
	if err != nil || !in.Concerns {
		return in, err
	}
	if err := in.readDefaults(ctx, url, slot); err != nil {
		return Inline{}, fmt.Errorf("read the default of synchronous_commit: %w", err)
	}
	return in, nil
}

// StandbyNames is the part of [ReadInline] that is about synchronous_standby_names.
func StandbyNames(ctx context.Context, db querier, slot string) (Inline, error) {
	var in Inline
	err := db.QueryRow(ctx, `SELECT current_setting('synchronous_standby_names'), coalesce(ebb.inline_finding($1), ''), ebb.inline_concerns($1)`, slot).
		Scan(&in.Setting, &in.Finding, &in.Concerns)
	if err != nil {
		return Inline{}, fmt.Errorf("read synchronous_standby_names: %w", withHint(err))
	}
	return in, nil
}

// readDefaults looks whose COMMITs wait although they are not asked to.
func (in *Inline) readDefaults(ctx context.Context, url, slot string) error {
	cfg, err := pgx.ParseConfig(url)
	if err != nil {
		return fmt.Errorf("postgres: %w", err)
	}
	session.Configure(&cfg.Config, slot+" doctor")
	delete(cfg.RuntimeParams, "synchronous_commit")
	db, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return fmt.Errorf("connect to Postgres: %w", err)
	}
	defer db.Close(context.WithoutCancel(ctx))
	const query = `WITH here AS (
			SELECT setting, source FROM pg_settings WHERE name = 'synchronous_commit'
		), server AS (
			SELECT CASE WHEN source NOT IN ('database', 'user', 'database user', 'client') THEN setting IN ('local', 'off') END AS local FROM here
		), set AS (
			SELECT s.setdatabase, s.setrole, split_part(c, '=', 2) IN ('local', 'off') AS local
			FROM pg_db_role_setting s, unnest(s.setconfig) c WHERE c LIKE 'synchronous_commit=%'
		), database AS (
			SELECT d.datname::text AS name, coalesce(s.local, (SELECT local FROM server)) AS local
			FROM pg_database d LEFT JOIN set s ON s.setdatabase = d.oid AND s.setrole = 0
			WHERE d.datallowconn AND NOT d.datistemplate
		)
		SELECT ARRAY(SELECT name FROM database WHERE NOT local ORDER BY name <> current_database(), name),
			ARRAY(SELECT name FROM database WHERE local IS NULL ORDER BY name <> current_database(), name),
			ARRAY(SELECT DISTINCT r.rolname::text FROM set s JOIN pg_roles r ON r.oid = s.setrole
				WHERE NOT s.local AND s.setdatabase IN (0, (SELECT oid FROM pg_database WHERE datname = current_database())) ORDER BY 1)`
	return db.QueryRow(ctx, query).Scan(&in.Waiting, &in.MayWait, &in.WaitingRoles)
}

// Wait is a session whose COMMIT waited for delivery.
type Wait struct {
	PID  int32
	Role string
	// Ended is false for one that the owner of the schema may not end.
	Ended bool
}

// EndWaits ends the sessions whose COMMIT waits for a delivery that cannot come before they have ended: a slot is not made while a transaction
// runs, and rows are not recovered before they can be seen. Otherwise it does nothing.
func EndWaits(ctx context.Context, db *pgx.Conn, slot string) ([]Wait, error) {
	rows, err := db.Query(ctx, "SELECT pid, role, ended FROM ebb.end_waits($1)", slot)
	if err != nil {
		return nil, fmt.Errorf("look for COMMITs that wait for delivery: %w", withHint(err))
	}
	waits, err := pgx.CollectRows(rows, pgx.RowToStructByPos[Wait])
	if err != nil {
		return nil, fmt.Errorf("look for COMMITs that wait for delivery: %w", withHint(err))
	}
	return waits, nil
}
