package sql_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"ebb/internal/pgtest"
	"ebb/sql"
)

// inspected looks up one table.
func inspected(t *testing.T, conn *pgx.Conn, table sql.Table) sql.OwnTable {
	t.Helper()
	own, err := sql.Inspect(t.Context(), conn, []sql.Table{table})
	if err != nil {
		t.Fatal(err)
	}
	return own[0]
}

// Rows are found by the text of a primary key of any type, as a slot sends it.
func TestMarkByAnyKey(t *testing.T) {
	db := pgtest.New(t)
	db.Exec(t, "CREATE SCHEMA \"My App\"", "CREATE TYPE \"My App\".mood AS ENUM ('glad', 'it''s, \"so\"')", "CREATE DOMAIN \"My App\".code AS varchar(9)",
		"CREATE TYPE \"My App\".pair AS (a int, b text)")
	conn := db.Connect(t)
	for i, tt := range []struct{ types, values string }{
		{"int", "7"}, {"bigint", "-9223372036854775808"}, {"smallint", "1"}, {"text", `E'a\\b"c\'{}, NULL é\n'`}, {"text", "''"}, {"text", "'NULL'"},
		{"uuid", "gen_random_uuid()"}, {"timestamptz", "'2026-01-02 03:04:05.678901+05:30'"}, {"timestamptz(3)", "now()"}, {"timestamp", "'infinity'"},
		{"date", "'0044-03-15 BC'"}, {"numeric", "'NaN'"}, {"numeric(20,5)", "1.5"}, {"float8", "1e-300 / 3"}, {"boolean", "true"}, {"bytea", `'\x00ff5c'`},
		{"char(5)", "'ab'"}, {"varchar(36)", "'x'"}, {"xid8", "pg_current_xact_id()"}, {"inet", "'10.0.0.0/8'"}, {"interval", "'1 mon -2 days'"},
		{`"My App".mood`, `'it''s, "so"'`}, {`"My App".code`, "'c'"}, {"int[]", "'{1,NULL,3}'"}, {`"My App".pair`, `(1, 'x,"y')`}, {"jsonb", `'{"a": [1]}'`},
		{"pg_lsn", "'1/2'"}, {"uuid|int|text", "gen_random_uuid(), 2, 'three'"},
	} {
		name := fmt.Sprintf("Table %d", i)
		ident := pgx.Identifier{"My App", name}.Sanitize()
		types := strings.Split(tt.types, "|")
		var columns, key []string
		for j, typ := range types {
			columns = append(columns, fmt.Sprintf("\"K%d\" %s", j, typ))
			key = append(key, fmt.Sprintf("\"K%d\"", j))
		}
		db.Exec(t, fmt.Sprintf("CREATE TABLE %s (n text, x int, done boolean, %s, PRIMARY KEY (%s))", ident, strings.Join(columns, ", "), strings.Join(key, ", ")),
			fmt.Sprintf("INSERT INTO %s (%s) VALUES (%s)", ident, strings.Join(key, ", "), tt.values))
		keys := make([][]string, len(types))
		for j := range types {
			keys[j] = []string{pgtest.Value[string](t, db, fmt.Sprintf("SELECT %s::text FROM %s", key[j], ident))}
			if types[j] == "boolean" {
				keys[j][0] = "t" // as the type's output function writes it
			}
		}
		for _, delivered := range []sql.Delivered{sql.Mark, sql.Delete} {
			o := inspected(t, conn, sql.Table{Schema: "My App", Name: name, Delivered: delivered, Recorded: "done"})
			if len(o.Key) != len(types) {
				t.Fatalf("%s: the key is %v", tt.types, o.Key)
			}
			locked, err := o.Marker().Mark(t.Context(), conn, keys, []int64{0})
			if err != nil || len(locked) > 0 {
				t.Errorf("%s: %v, %v", tt.types, locked, err)
				continue
			}
			if left := pgtest.Value[int64](t, db, "SELECT count(*) FROM "+ident+" WHERE done IS NOT TRUE"); left != 0 {
				t.Errorf("%s: the row was not recorded", tt.types)
			}
		}
		if left := pgtest.Value[int64](t, db, "SELECT count(*) FROM "+ident); left != 0 {
			t.Errorf("%s: the row was not deleted", tt.types)
		}
	}
}

// Rows that are locked or cannot be seen are said; those that are gone or marked are not, and nobody is waited for.
func TestMarkSkipsWhatIsLocked(t *testing.T) {
	db := pgtest.New(t)
	db.Exec(t, "CREATE TABLE t (id int PRIMARY KEY, done_at timestamptz)", "INSERT INTO t SELECT generate_series(1, 6)", "UPDATE t SET done_at = 'epoch' WHERE id = 6")
	conn, other := db.Connect(t), db.Connect(t)
	marker, err := sql.ConnectMarker(t.Context(), db.URL, "marker")
	if err != nil {
		t.Fatal(err)
	}
	defer marker.Close(context.WithoutCancel(t.Context()))
	exec := func(c *pgx.Conn, statement string) {
		t.Helper()
		if _, err := c.Exec(t.Context(), statement); err != nil {
			t.Fatal(err)
		}
	}
	ids := func(n int) [][]string {
		column := make([]string, n)
		for i := range column {
			column[i] = fmt.Sprint(i + 1)
		}
		return [][]string{column}
	}
	for _, delivered := range []sql.Delivered{sql.Mark, sql.Delete} {
		o := inspected(t, conn, sql.Table{Schema: "public", Name: "t", Delivered: delivered, Recorded: "done_at"})
		exec(conn, "BEGIN")
		exec(conn, "SELECT FROM t WHERE id IN (2, 4) FOR UPDATE")
		exec(other, "BEGIN")
		exec(other, "INSERT INTO t VALUES (8) ON CONFLICT (id) DO UPDATE SET done_at = NULL")
		var xid int64
		if err := other.QueryRow(t.Context(), "SELECT pg_current_xact_id()::text::bigint & 4294967295").Scan(&xid); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		locked, err := o.Marker().Mark(t.Context(), marker, ids(8), []int64{3, 3, 3, 3, 3, 3, 3, xid})
		if err != nil || !slices.Equal(locked, []int{1, 3, 7}) {
			t.Errorf("locked are %v, %v", locked, err)
		}
		if took := time.Since(began); took > 5*time.Second {
			t.Errorf("it took %s", took)
		}
		exec(conn, "COMMIT")
		exec(other, "COMMIT")
		exec(other, "BEGIN")
		exec(other, "LOCK TABLE t IN ACCESS EXCLUSIVE MODE")
		if locked, err := o.Marker().Mark(t.Context(), marker, ids(2), []int64{3, 3}); err != nil || len(locked) != 2 {
			t.Errorf("with the table locked: %v, %v", locked, err)
		}
		exec(other, "COMMIT")
		if locked, err := o.Marker().Mark(t.Context(), marker, ids(8), []int64{3, 3, 3, 3, 3, 3, 3, xid}); err != nil || len(locked) != 0 {
			t.Errorf("nothing is locked: %v, %v", locked, err)
		}
	}
	if left := pgtest.Value[int64](t, db, "SELECT count(*) FROM t"); left != 0 {
		t.Errorf("%d rows are left", left)
	}
}

// What a bridge needs on the tables is granted by setup, and missed by name without it.
func TestRightsOnOwnTables(t *testing.T) {
	db := pgtest.New(t)
	role := db.Name + "_bridge"
	tables := []sql.Table{
		{Schema: "app", Name: "marked", Columns: []string{"id"}, Delivered: sql.Mark, Recorded: "done_at"},
		{Schema: "app", Name: "gone", Columns: []string{"id"}, WholeRow: true, Delivered: sql.Delete},
		{Schema: "app", Name: "kept", Columns: []string{"id"}, WholeRow: true},
	}
	db.Exec(t, "CREATE SCHEMA app", "CREATE TABLE app.marked (id uuid PRIMARY KEY, secret text, done_at timestamptz)",
		"CREATE TABLE app.gone (id uuid PRIMARY KEY, a text)", "CREATE TABLE app.kept (id uuid, a text)")
	conn := db.Connect(t)
	if _, err := sql.Apply(t.Context(), conn, setup); err != nil {
		t.Fatal(err)
	}
	db.Exec(t, "CREATE ROLE \""+role+"\" LOGIN", "GRANT ebb_bridge TO \""+role+"\"")
	t.Cleanup(func() { db.Exec(t, "DROP OWNED BY \""+role+"\"", "DROP ROLE \""+role+"\"") })
	bridge := db.Connect(t)
	if _, err := bridge.Exec(t.Context(), "SET ROLE \""+role+"\""); err != nil {
		t.Fatal(err)
	}
	check := func() error {
		t.Helper()
		own, err := sql.Inspect(t.Context(), bridge, tables)
		if err != nil {
			t.Fatal(err)
		}
		return sql.CheckRights(t.Context(), bridge, own)
	}
	missing := func(want string) {
		t.Helper()
		if err := check(); !errors.Is(err, sql.ErrTable) || !strings.Contains(err.Error(), want) {
			t.Errorf("without rights: %v, want … %s", err, want)
		}
	}
	missing("GRANT USAGE ON SCHEMA \"app\" TO ebb_bridge")
	s := sql.Setup{Publication: "ebb", Slot: "s", Tables: tables, Keep: time.Hour}
	if done := apply(t, db, s); !slices.Contains(done, `granted UPDATE ("done_at") on app.marked to ebb_bridge`) {
		t.Errorf("setup did %q", done)
	}
	if done := apply(t, db, s); len(done) != 0 {
		t.Errorf("a second setup did %q", done)
	}
	if err := check(); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct{ revoke, want string }{
		{`SELECT (done_at) ON app.marked`, `GRANT SELECT ("done_at", "id") ON "app"."marked" TO ebb_bridge`},
		{`UPDATE (done_at) ON app.marked`, `GRANT UPDATE ("done_at") ON "app"."marked" TO ebb_bridge`},
		{`DELETE ON app.gone`, `GRANT DELETE ON "app"."gone" TO ebb_bridge`},
		{`SELECT ON app.gone`, `GRANT SELECT ON "app"."gone" TO ebb_bridge`},
	} {
		db.Exec(t, "REVOKE "+tt.revoke+" FROM ebb_bridge")
		missing(tt.want)
		apply(t, db, s)
		if err := check(); err != nil {
			t.Errorf("mended by setup: %v", err)
		}
	}
	db.Exec(t, "ALTER TABLE app.gone ENABLE ROW LEVEL SECURITY")
	missing("BYPASSRLS")
	db.Exec(t, "ALTER TABLE app.gone DISABLE ROW LEVEL SECURITY")

	// With them, it can do what it has to, and no more.
	own, err := sql.Inspect(t.Context(), bridge, tables)
	if err != nil {
		t.Fatal(err)
	}
	for i := range own[:2] {
		if _, err := own[i].Marker().Mark(t.Context(), bridge, [][]string{{"00000000-0000-4000-8000-000000000001"}}, []int64{3}); err != nil {
			t.Error(err)
		}
	}
	if _, err := bridge.Exec(t.Context(), "SELECT secret FROM app.marked"); err == nil {
		t.Error("a bridge may read what it does not need")
	}

	// Another role than the owner cannot publish them.
	if _, err := sql.Apply(t.Context(), bridge, s); !errors.Is(err, sql.ErrTable) || !strings.Contains(err.Error(), "belongs to another role") {
		t.Errorf("setup by another role: %v", err)
	}
	if _, err := sql.Drop(t.Context(), conn, "ebb"); err != nil {
		t.Fatal(err)
	}
	if n := pgtest.Value[int64](t, db, "SELECT count(*) FROM information_schema.column_privileges WHERE grantee = 'ebb_bridge'"); n != 0 {
		t.Errorf("%d rights are left after teardown", n)
	}
}
