// Package sql holds the schema of the buffer and the statements that maintain it.
package sql

import (
	"context"
	"embed"
	"errors"
	"fmt"
	"io/fs"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

//go:embed migrations/*.sql
var migrations embed.FS

// views holds the statements that make the views. They are no migration, because they are run again when a view is gone, as when a
// column of the buffer was dropped with CASCADE.
//
//go:embed views.sql
var views string

// ErrNoSchema says that ebb's schema is missing or older than this program.
var ErrNoSchema = errors.New("the schema is not set up")

// ringKept is how many of the buffer's 16 buckets the time for which rows are kept is spread over.
const ringKept = 8

// migrationLock keeps two setups of one database apart. The number is "ebb" in ASCII.
const migrationLock = 0x656262

type migration struct {
	version int
	name    string
	sql     string
}

// Setup describes what `ebb setup` brings about in the database, the slot apart.
type Setup struct {
	Publication string
	// Slot is whose tables these are. Tables, if there are any, are what it carries; none stand for the managed one.
	Slot   string
	Tables []Table
	// Keep is how long delivered rows stay in the buffer.
	Keep time.Duration
	// Flow are the limits on the lag of Slot, which without a name are left as they are.
	Flow Flow
}

// Apply brings the schema and the publication to what s and this program want, and returns a line for each thing that it
// changed. It may be run at any time, any number of times, by several at once.
func Apply(ctx context.Context, db *pgx.Conn, s Setup) ([]string, error) {
	all, err := load()
	if err != nil {
		return nil, err
	}
	var done []string
	err = pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
		// Names in the statements mean what they say, whatever the session's search_path is.
		if _, err := tx.Exec(ctx, "SET LOCAL search_path = pg_catalog, pg_temp"); err != nil {
			return fmt.Errorf("set the search_path: %w", err)
		}
		if _, err := tx.Exec(ctx, "SELECT pg_advisory_xact_lock($1)", migrationLock); err != nil {
			return fmt.Errorf("lock the schema: %w", err)
		}
		current, err := version(ctx, tx)
		if err != nil {
			return err
		}
		if current > len(all) {
			return fmt.Errorf("the schema has version %d and this ebb knows %d: use a newer ebb", current, len(all))
		}
		for _, m := range all[current:] {
			if _, err := tx.Exec(ctx, m.sql, pgx.QueryExecModeSimpleProtocol); err != nil {
				return fmt.Errorf("migration %s: %w", m.name, err)
			}
			if err := setVersion(ctx, tx, m); err != nil {
				return err
			}
			done = append(done, "applied migration "+m.name)
		}
		if line, err := applyViews(ctx, tx, len(done) > 0); err != nil {
			return err
		} else if line != "" {
			done = append(done, line)
		}
		changed, err := applyBucketDefault(ctx, tx, s.Keep)
		if err != nil {
			return err
		}
		if changed {
			done = append(done, "spread the buffer's buckets over twice "+s.Keep.String())
		}
		lines, err := applyTables(ctx, tx, s)
		done = append(done, lines...)
		if err != nil {
			return err
		}
		line, err := applyFlow(ctx, tx, s, current == 0)
		if line != "" {
			done = append(done, line)
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("set up the schema: %w", withHint(err))
	}
	return done, nil
}

// Script returns the statements that [Apply] runs on an empty database of the given server version, such as 150004.
func Script(s Setup, serverVersion int) (string, error) {
	all, err := load()
	if err != nil {
		return "", err
	}
	var b strings.Builder
	b.WriteString("BEGIN;\nSET LOCAL search_path = pg_catalog, pg_temp;\n")
	for _, m := range all {
		fmt.Fprintf(&b, "\n-- migration %s\n%s\n%s;\n", m.name, strings.TrimSpace(m.sql), insertVersion(m))
	}
	fmt.Fprintf(&b, "\n-- views\n%s\n", strings.TrimSpace(views))
	fmt.Fprintf(&b, "\n%s;\n\n%s\n", bucketDefault(s.Keep), scriptPublication(s, serverVersion))
	if s.Slot != "" {
		fmt.Fprintf(&b, "%s;\n\n", flowScript(s.Slot, s.Flow))
	}
	b.WriteString("COMMIT;\n")
	return b.String(), nil
}

// scriptPublication is the statement that makes the publication. What it takes of tables of one's own, and which rights on them have to be
// granted, follows from their primary keys.
func scriptPublication(s Setup, serverVersion int) string {
	var own []string
	for _, t := range orManaged(s.Tables) {
		if !t.Managed() {
			own = append(own, t.ident())
		}
	}
	if len(own) == 0 {
		return createPublication(s.Publication, serverVersion, true, nil) + ";\n"
	}
	return fmt.Sprintf("-- Setup looks up %s, makes publication %s of what is needed of them, and grants ebb_bridge what it needs on them.\n",
		strings.Join(own, ", "), quoteIdent(s.Publication))
}

// Check returns ErrNoSchema, with what to do, unless the schema is the one that this program knows.
func Check(ctx context.Context, db *pgx.Conn) error {
	all, err := load()
	if err != nil {
		return err
	}
	current, err := version(ctx, db)
	switch {
	case err != nil:
		return err
	case current == 0:
		return fmt.Errorf("%w: database %q has no ebb schema; run ebb setup", ErrNoSchema, db.Config().Database)
	case current < len(all):
		return fmt.Errorf("%w: it has version %d and this ebb needs %d; run ebb setup", ErrNoSchema, current, len(all))
	case current > len(all):
		return fmt.Errorf("%w: it has version %d and this ebb knows %d; use a newer ebb", ErrNoSchema, current, len(all))
	}
	return nil
}

// Drop removes the publication, the schema and, where nothing else needs them, the roles. All that is in the buffer is lost.
func Drop(ctx context.Context, db *pgx.Conn, publication string) ([]string, error) {
	done, err := revokeOwn(ctx, db)
	if err != nil {
		return nil, fmt.Errorf("tear down: %w", withHint(err))
	}
	for _, st := range []struct{ exists, sql, line string }{
		{"SELECT EXISTS (SELECT FROM pg_publication WHERE pubname = $1)", "DROP PUBLICATION " + quoteIdent(publication), "dropped publication " + publication},
		{"SELECT $1 <> '' AND to_regnamespace('ebb') IS NOT NULL", "DROP SCHEMA ebb CASCADE", "dropped schema ebb"},
	} {
		var exists bool
		if err := db.QueryRow(ctx, st.exists, publication).Scan(&exists); err != nil {
			return done, fmt.Errorf("tear down: %w", withHint(err))
		}
		if !exists {
			continue
		}
		if _, err := db.Exec(ctx, "SET client_min_messages = warning; "+st.sql, pgx.QueryExecModeSimpleProtocol); err != nil {
			return done, fmt.Errorf("tear down: %w", withHint(err))
		}
		done = append(done, st.line)
	}
	for _, role := range []string{"ebb_producer", "ebb_bridge"} {
		_, err := db.Exec(ctx, "DROP ROLE IF EXISTS "+role)
		var pg *pgconn.PgError
		if errors.As(err, &pg) && pg.Code == "2BP01" { // dependent_objects_still_exist
			done = append(done, fmt.Sprintf("kept role %s, which another database of this server still uses", role))
			continue
		}
		if err != nil {
			return done, fmt.Errorf("tear down: drop role %s: %w", role, withHint(err))
		}
		done = append(done, "dropped role "+role)
	}
	return done, nil
}

// revokeOwn takes back the rights on tables of one's own, which would keep the role from being dropped.
func revokeOwn(ctx context.Context, db *pgx.Conn) ([]string, error) {
	var exists bool
	if err := db.QueryRow(ctx, "SELECT to_regclass('ebb.own_table') IS NOT NULL AND to_regrole('ebb_bridge') IS NOT NULL").Scan(&exists); err != nil || !exists {
		return nil, err
	}
	rows, err := db.Query(ctx, `SELECT DISTINCT format('%I.%I', o.schema, o.name), format('%I', o.schema) FROM ebb.own_table o
		WHERE to_regclass(format('%I.%I', o.schema, o.name)) IS NOT NULL ORDER BY 1`)
	if err != nil {
		return nil, err
	}
	var table, schema string
	var statements, done []string
	if _, err := pgx.ForEachRow(rows, []any{&table, &schema}, func() error {
		statements = append(statements, "REVOKE ALL ON "+table+" FROM ebb_bridge", "REVOKE USAGE ON SCHEMA "+schema+" FROM ebb_bridge")
		done = append(done, "took back the rights on "+table)
		return nil
	}); err != nil {
		return nil, err
	}
	for _, st := range statements {
		if _, err := db.Exec(ctx, st); err != nil {
			return nil, err
		}
	}
	return done, nil
}

func load() ([]migration, error) {
	names, err := fs.Glob(migrations, "migrations/*.sql")
	if err != nil {
		return nil, fmt.Errorf("list migrations: %w", err)
	}
	var all []migration
	for i, name := range names { // sorted by name
		text, err := migrations.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("read migration: %w", err)
		}
		name = strings.TrimSuffix(strings.TrimPrefix(name, "migrations/"), ".sql")
		number, _, _ := strings.Cut(name, "_")
		if v, err := strconv.Atoi(number); err != nil || v != i+1 {
			return nil, fmt.Errorf("migration %s: want number %04d", name, i+1)
		}
		all = append(all, migration{version: i + 1, name: name, sql: string(text)})
	}
	return all, nil
}

type querier interface {
	QueryRow(ctx context.Context, sql string, args ...any) pgx.Row
}

type execer interface {
	Exec(ctx context.Context, sql string, args ...any) (pgconn.CommandTag, error)
}

func version(ctx context.Context, db querier) (int, error) {
	var exists bool
	if err := db.QueryRow(ctx, "SELECT to_regclass('ebb.migration') IS NOT NULL").Scan(&exists); err != nil {
		return 0, fmt.Errorf("read the schema's version: %w", withHint(err))
	}
	if !exists {
		return 0, nil
	}
	var v int
	if err := db.QueryRow(ctx, "SELECT coalesce(max(version), 0) FROM ebb.migration").Scan(&v); err != nil {
		return 0, fmt.Errorf("read the schema's version: %w", withHint(err))
	}
	return v, nil
}

func setVersion(ctx context.Context, tx pgx.Tx, m migration) error {
	if _, err := tx.Exec(ctx, insertVersion(m)); err != nil {
		return fmt.Errorf("note migration %s: %w", m.name, err)
	}
	return nil
}

func insertVersion(m migration) string {
	return fmt.Sprintf("INSERT INTO ebb.migration (version, name) VALUES (%d, %s)", m.version, quoteLiteral(m.name))
}

// bucketWidth spreads twice the time for which rows are kept over the ring, so that a bucket comes round again only when all
// in it is older than that. It is in seconds.
func bucketWidth(keep time.Duration) int64 { return max(1, int64(keep.Seconds())/ringKept) }

func bucketDefault(keep time.Duration) string {
	return fmt.Sprintf("ALTER TABLE ebb.buffer ALTER COLUMN bucket SET DEFAULT "+
		"(extract(epoch FROM clock_timestamp())::bigint / %d %% %d)::smallint", bucketWidth(keep), 2*ringKept)
}

// applyViews makes the views when the schema has changed, or when one of them is gone, of which it returns a line.
func applyViews(ctx context.Context, tx pgx.Tx, changed bool) (string, error) {
	var have int
	if err := tx.QueryRow(ctx, `SELECT count(*) FROM pg_class WHERE oid IN (to_regclass('ebb.events'), to_regclass('ebb.backlog'),
		to_regclass('ebb.status')) AND relkind = 'v'`).Scan(&have); err != nil {
		return "", fmt.Errorf("look for the views: %w", err)
	}
	if have == 3 && !changed {
		return "", nil
	}
	if err := checkColumns(ctx, tx); err != nil {
		return "", err
	}
	if _, err := tx.Exec(ctx, views, pgx.QueryExecModeSimpleProtocol); err != nil {
		return "", fmt.Errorf("make the views: %w", err)
	}
	if changed {
		return "", nil
	}
	return "made the views anew", nil
}

// applyBucketDefault reports whether it had to change the default, which locks the buffer against producers for a moment.
func applyBucketDefault(ctx context.Context, tx pgx.Tx, keep time.Duration) (bool, error) {
	var width int64
	err := tx.QueryRow(ctx, `SELECT substring(pg_get_expr(d.adbin, d.adrelid) FROM '/ \(?(\d+)')::bigint
		FROM pg_attrdef d JOIN pg_attribute a ON (a.attrelid, a.attnum) = (d.adrelid, d.adnum)
		WHERE d.adrelid = 'ebb.buffer'::regclass AND a.attname = 'bucket'`).Scan(&width)
	if err != nil {
		return false, fmt.Errorf("read the default of ebb.buffer.bucket: %w", err)
	}
	if width == bucketWidth(keep) {
		return false, nil
	}
	if _, err := tx.Exec(ctx, bucketDefault(keep)); err != nil {
		return false, fmt.Errorf("set the default of ebb.buffer.bucket: %w", err)
	}
	return true, nil
}

// withHint names the mend where the server's words do not.
func withHint(err error) error {
	var pg *pgconn.PgError
	if !errors.As(err, &pg) {
		return err
	}
	switch pg.Code {
	case "42501": // insufficient_privilege
		return fmt.Errorf("%w; setup and teardown need a role that may create schemas, roles and publications; "+
			"run needs GRANT ebb_bridge TO its role", err)
	case "42704", "42883": // undefined_object, undefined_function
		return fmt.Errorf("%w; ebb needs Postgres 14 or newer", err)
	}
	return err
}

func quoteIdent(s string) string { return pgx.Identifier{s}.Sanitize() }

func quoteLiteral(s string) string { return "'" + strings.ReplaceAll(s, "'", "''") + "'" }
