package sql_test

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"ebb/internal/pgtest"
	"ebb/sql"
)

// rights are what a role may do in schema ebb. Whatever else there is, is tried and must be refused: whoever adds an object decides here
// who may use it.
type rights struct {
	// relations has, by name, the privileges on all columns.
	relations map[string]string
	// columns has those on single columns.
	columns map[string]string
	// functions has a call of each function, by its signature, that succeeds.
	functions map[string]string
}

var roles = map[string]rights{
	"ebb_producer": {
		relations: map[string]string{"backlog": "SELECT", "events": "SELECT", "status": "SELECT"},
		columns: map[string]string{"buffer.topic": "INSERT", "buffer.key": "INSERT", "buffer.payload": "INSERT",
			"buffer.headers": "INSERT"},
		functions: map[string]string{
			"put(text,json,text,jsonb)":   `ebb.put('t', pg_catalog.json_in('{"a": 1}'), 'k', '{"h": "v"}')`,
			"put(text,jsonb,text,jsonb)":  `ebb.put('t', pg_catalog.jsonb_in('{"a": 1}'), 'k', '{"h": "v"}')`,
			"put(text,text,text,jsonb)":   `ebb.put('t', '{"a": 1}', 'k', '{"h": "v"}')`,
			"emit(text,json,text,jsonb)":  `pg_catalog.pg_lsn_lt(ebb.emit('t', pg_catalog.json_in('{"a": 1}'), 'k', '{"h": "v"}'), 'FFFFFFFF/0')`,
			"emit(text,jsonb,text,jsonb)": `pg_catalog.pg_lsn_lt(ebb.emit('t', pg_catalog.jsonb_in('{"a": 1}'), 'k', '{"h": "v"}'), 'FFFFFFFF/0')`,
			"emit(text,text,text,jsonb)":  `pg_catalog.pg_lsn_lt(ebb.emit('t', '{"a": 1}', 'k', '{"h": "v"}'), 'FFFFFFFF/0')`,
			"flow_state(text)":            `ebb.flow_state('s')`,
			"backlog_size()":              `(SELECT estimated FROM ebb.backlog_size())`,
			"deliver_on_commit()":         "", // raises here; see the tests of package bridge
		},
	},
	"ebb_bridge": {
		relations: map[string]string{"backlog": "SELECT", "events": "SELECT", "status": "SELECT", "flow_now": "SELECT",
			"buffer": "SELECT", "migration": "SELECT", "identity": "SELECT", "message_token": "SELECT", "removed": "SELECT", "flow": "SELECT INSERT UPDATE",
			"slot": "SELECT INSERT UPDATE DELETE", "tick": "SELECT INSERT UPDATE DELETE", "epoch": "SELECT INSERT UPDATE DELETE",
			"buffer_id_seq": "SELECT", "own_table": "SELECT INSERT UPDATE DELETE",
			"replay": "SELECT INSERT UPDATE", "dead_letter": "SELECT INSERT UPDATE DELETE"},
		columns: map[string]string{"buffer.xid": "UPDATE"},
		functions: map[string]string{
			"flow_state(text)":                      `ebb.flow_state('s')`,
			"inline_finding(text)":                  `ebb.inline_finding('s')`,
			"inline_concerns(text)":                 `ebb.inline_concerns('s')`,
			"backlog_size()":                        `(SELECT estimated FROM ebb.backlog_size())`,
			"collect(text,bigint,integer,interval)": `ebb.collect('s', 0, 0, '1h')`,
			"end_waits(text)":                       `(SELECT pg_catalog.count(*) FROM ebb.end_waits('s'))`,
		},
	},
}

// asRole returns a session of a login role that is a member of one role and nothing else.
func asRole(t *testing.T, db *pgtest.Database, role string) *pgx.Conn {
	t.Helper()
	name := strings.TrimPrefix(role, "ebb_") + "_" + db.Name
	db.Exec(t, "CREATE ROLE "+name+" LOGIN IN ROLE "+role)
	t.Cleanup(func() { db.Exec(t, "DROP OWNED BY "+name, "DROP ROLE "+name) })
	conn, err := pgx.Connect(t.Context(), strings.Replace(db.URL, "postgres@", name+"@", 1))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(t.Context()) })
	return conn
}

// denied tries a statement, which must be refused for want of rights.
func denied(t *testing.T, conn *pgx.Conn, statement string) {
	t.Helper()
	_, err := conn.Exec(t.Context(), statement)
	var pg *pgconn.PgError
	if !errors.As(err, &pg) || pg.Code != "42501" {
		t.Errorf("%s: %v, want insufficient_privilege", statement, err)
	}
}

// Each role may do what it is for, and is refused everything else.
func TestRoles(t *testing.T) {
	db := pgtest.New(t)
	apply(t, db, setup)
	owner := db.Connect(t)
	type relation struct {
		Name    string
		Kind    string
		Columns []string
	}
	rows, err := owner.Query(t.Context(), `SELECT c.relname AS name, c.relkind::text AS kind,
			ARRAY(SELECT quote_ident(attname) FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped ORDER BY attnum) AS columns
		FROM pg_class c WHERE relnamespace = 'ebb'::regnamespace AND relkind NOT IN ('i', 'I', 'c') ORDER BY 1`)
	if err != nil {
		t.Fatal(err)
	}
	relations, err := pgx.CollectRows(rows, pgx.RowToStructByName[relation])
	if err != nil || len(relations) < 25 {
		t.Fatalf("found %d relations: %v", len(relations), err)
	}
	type function struct{ Signature, Call string }
	rows, err = owner.Query(t.Context(), `SELECT replace(oid::regprocedure::text, 'ebb.', '') AS signature,
			format('ebb.%I(%s)', proname, (SELECT string_agg('NULL::' || format_type(a, NULL), ', ' ORDER BY n) FROM unnest(proargtypes) WITH ORDINALITY u(a, n))) AS call
		FROM pg_proc WHERE pronamespace = 'ebb'::regnamespace ORDER BY 1`)
	if err != nil {
		t.Fatal(err)
	}
	functions, err := pgx.CollectRows(rows, pgx.RowToStructByName[function])
	if err != nil || len(functions) < 10 {
		t.Fatalf("found %d functions: %v", len(functions), err)
	}

	for role, may := range roles {
		t.Run(role, func(t *testing.T) {
			conn := asRole(t, db, role)
			known := map[string]bool{}
			for _, r := range relations {
				known[r.Name] = true
				name := "ebb." + r.Name
				if r.Kind == "S" {
					denied(t, conn, "SELECT nextval('"+name+"')")
					denied(t, conn, "SELECT setval('"+name+"', 1)")
					if may.relations[r.Name] == "" {
						denied(t, conn, "SELECT * FROM "+name)
					}
					continue
				}
				allowed := strings.Fields(may.relations[r.Name])
				first := r.Columns[0]
				for _, privilege := range []string{"SELECT", "INSERT", "UPDATE", "DELETE", "TRUNCATE", "REFERENCES", "TRIGGER"} {
					var has bool
					if err := conn.QueryRow(t.Context(), "SELECT has_table_privilege($1, $2)", name, privilege).Scan(&has); err != nil {
						t.Fatal(err)
					}
					if has != slices.Contains(allowed, privilege) {
						t.Errorf("%s on %s: %t", privilege, name, has)
					}
				}
				for privilege, statement := range map[string]string{
					"SELECT":   "SELECT * FROM " + name,
					"INSERT":   fmt.Sprintf("INSERT INTO %s OVERRIDING SYSTEM VALUE SELECT (NULL::%[1]s).*", name),
					"UPDATE":   fmt.Sprintf("UPDATE %s SET %s = DEFAULT", name, first),
					"DELETE":   "DELETE FROM " + name,
					"TRUNCATE": "TRUNCATE " + name,
					"":         "COMMENT ON COLUMN " + name + "." + first + " IS 'mine'",
				} {
					if r.Kind == "v" && privilege != "SELECT" && privilege != "" {
						continue // nobody writes through a view; what there may be of rights is in the catalog
					}
					if !slices.Contains(allowed, privilege) {
						denied(t, conn, statement)
					}
				}
				for _, c := range r.Columns {
					for _, privilege := range []string{"SELECT", "INSERT", "UPDATE", "REFERENCES"} {
						var has bool
						if err := conn.QueryRow(t.Context(), "SELECT has_column_privilege($1, $2, $3)", name, strings.Trim(c, `"`), privilege).Scan(&has); err != nil {
							t.Fatal(err)
						}
						want := slices.Contains(allowed, privilege) || slices.Contains(strings.Fields(may.columns[r.Name+"."+c]), privilege)
						if has != want {
							t.Errorf("%s of %s.%s: %t, want %t", privilege, name, c, has, want)
						}
					}
				}
			}
			for name := range may.relations {
				if !known[name] {
					t.Errorf("there is no %s", name)
				}
			}
			left := maps.Clone(may.functions)
			for _, f := range functions {
				call, ok := left[f.Signature]
				delete(left, f.Signature)
				if !ok {
					denied(t, conn, "SELECT "+f.Call)
				} else if call != "" {
					if _, err := conn.Exec(t.Context(), "SELECT "+call); err != nil {
						t.Errorf("%s: %v", call, err)
					}
				}
				denied(t, conn, "DROP FUNCTION ebb."+f.Signature)
			}
			for signature := range left {
				t.Errorf("there is no %s", signature)
			}
			for _, statement := range []string{
				"CREATE TABLE ebb.mine (id int)", "CREATE VIEW ebb.mine AS SELECT 1", "CREATE SEQUENCE ebb.mine", "CREATE TYPE ebb.mine AS (id int)",
				"CREATE FUNCTION ebb.mine() RETURNS int LANGUAGE sql AS 'SELECT 1'", "CREATE DOMAIN ebb.mine AS int",
				"ALTER SCHEMA ebb RENAME TO mine", "DROP SCHEMA ebb CASCADE", "DROP TABLE ebb.buffer", "ALTER TABLE ebb.buffer DISABLE TRIGGER ALL",
				"ALTER TABLE ebb.buffer DETACH PARTITION ebb.buffer_00", "CREATE TRIGGER mine BEFORE INSERT ON ebb.buffer EXECUTE FUNCTION suppress_redundant_updates_trigger()",
				"CREATE INDEX ON ebb.buffer (topic)", "DROP PUBLICATION ebb", "ALTER PUBLICATION ebb SET (publish = 'update')",
				"GRANT SELECT ON ebb.buffer TO " + role, "GRANT ebb_bridge TO CURRENT_USER", "GRANT ebb_producer TO CURRENT_USER",
			} {
				if role == "ebb_bridge" && strings.HasPrefix(statement, "GRANT SELECT") {
					continue // without a grant option, that is a warning
				}
				denied(t, conn, statement)
			}
		})
	}
}

// A producer may write an event as it likes, and nothing that ebb decides.
func TestProducerForges(t *testing.T) {
	db := pgtest.New(t)
	apply(t, db, setup)
	conn := asRole(t, db, "ebb_producer")
	if _, err := conn.Exec(t.Context(), `INSERT INTO ebb.buffer (topic, key, payload, headers) VALUES ('t', 'k', '{}', '{"h": "v"}')`); err != nil {
		t.Error(err)
	}
	for column, value := range map[string]string{
		"xid": "'3'", "bucket": "3", "created_at": "'2000-01-01'", "id": "7",
	} {
		denied(t, conn, fmt.Sprintf("INSERT INTO ebb.buffer (topic, payload, %s) OVERRIDING SYSTEM VALUE VALUES ('t', '{}', %s)", column, value))
		denied(t, conn, fmt.Sprintf("UPDATE ebb.buffer SET %s = DEFAULT", column))
	}
	for n := range 16 {
		denied(t, conn, fmt.Sprintf("INSERT INTO ebb.buffer_%02d (topic, payload) VALUES ('t', '{}')", n))
	}
	denied(t, conn, `INSERT INTO ebb.buffer (topic, payload) VALUES ('t', '{}') RETURNING id`)
	denied(t, conn, `COPY ebb.buffer FROM STDIN`)
}

// shadow makes a schema in which everything that ebb's functions use by name has a namesake which raises an error.
const shadow = `
CREATE SCHEMA evil;
DO $$
DECLARE
	f record;
	t text;
BEGIN
	-- Operators and functions that would be chosen over the real ones if they came first.
	FOR f IN SELECT DISTINCT p.oid, p.proname, pg_get_function_arguments(p.oid) AS arguments, pg_get_function_result(p.oid) AS result
		FROM pg_proc p WHERE p.pronamespace = 'pg_catalog'::regnamespace AND p.prokind = 'f' AND p.proname IN
			('now', 'clock_timestamp', 'pg_current_xact_id', 'current_setting', 'set_config', 'pg_current_wal_lsn', 'pg_wal_lsn_diff', 'pg_is_in_recovery',
			'pg_get_replication_slots', 'pg_control_system', 'current_database', 'lower', 'replace', 'substr', 'length', 'pg_size_pretty', 'cardinality',
			'unnest', 'jsonb_typeof', 'regexp_matches', 'pg_visible_in_snapshot', 'pg_current_snapshot', 'pg_terminate_backend', 'pg_last_wal_replay_lsn')
	LOOP
		BEGIN
			EXECUTE format('CREATE FUNCTION evil.%I(%s) RETURNS %s LANGUAGE plpgsql AS ''BEGIN RAISE EXCEPTION ''''trapped in %s''''; END''',
				f.proname, f.arguments, f.result, f.proname);
		EXCEPTION WHEN OTHERS THEN
			NULL; -- some cannot be had, such as those with OUT parameters of their own
		END;
	END LOOP;
	FOR f IN SELECT o.oprname, o.oprleft::regtype AS l, o.oprright::regtype AS r, o.oprresult::regtype AS result FROM pg_operator o
		WHERE o.oprkind = 'b' AND o.oprname IN ('=', '<>', '<', '>', '<=', '>=', '&&', '||', '/', '%', '*', '-', '~~', '->>')
			AND o.oprleft::regtype::text IN ('text', 'name', 'bigint', 'integer', 'smallint', 'boolean', 'pg_lsn', 'numeric', 'oid', 'anyarray', 'json', 'jsonb')
	LOOP
		EXECUTE format('CREATE FUNCTION evil.%I(%s, %s) RETURNS %s LANGUAGE plpgsql AS ''BEGIN RAISE EXCEPTION ''''trapped in %s''''; END''',
			'op_' || md5(f.oprname || f.l || f.r), f.l, f.r, f.result, replace(f.oprname, '%', 'mod'));
		EXECUTE format('CREATE OPERATOR evil.%s (LEFTARG = %s, RIGHTARG = %s, FUNCTION = evil.%I)', f.oprname, f.l, f.r, 'op_' || md5(f.oprname || f.l || f.r));
	END LOOP;
	FOREACH t IN ARRAY ARRAY['json', 'jsonb', 'text', 'regclass', 'name', 'pg_lsn', 'xid8'] LOOP
		EXECUTE format('CREATE DOMAIN evil.%I AS pg_catalog.point', t);
	END LOOP;
	FOREACH t IN ARRAY ARRAY['buffer', 'flow', 'flow_now', 'slot', 'tick', 'pg_database', 'pg_replication_slots', 'pg_stat_activity', 'pg_trigger'] LOOP
		EXECUTE format('CREATE TABLE evil.%I (trapped point)', t);
	END LOOP;
END
$$;
CREATE FUNCTION evil.check_flow() RETURNS boolean LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''trapped''; END';
CREATE FUNCTION evil.put(pg_catalog.text, pg_catalog.json, pg_catalog.text, pg_catalog.jsonb) RETURNS bigint LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION ''trapped''; END';
GRANT USAGE ON SCHEMA evil TO PUBLIC;
GRANT ALL ON ALL TABLES IN SCHEMA evil TO PUBLIC;
`

// A schema full of traps before all others in the search_path, and temporary tables of the same names, change nothing.
func TestSearchPathTricks(t *testing.T) {
	db := pgtest.New(t)
	apply(t, db, setup)
	db.Exec(t, shadow)
	if n := pgtest.Value[int](t, db, "SELECT count(*)::int FROM pg_operator WHERE oprnamespace = 'evil'::regnamespace"); n < 50 {
		t.Fatalf("only %d operators are shadowed", n)
	}
	owner := db.Connect(t)
	if _, err := sql.SetFlow(t.Context(), owner, "s", sql.Flow{Warn: 1, Limit: 1 << 50}); err != nil {
		t.Fatal(err)
	}
	db.Exec(t, "SELECT pg_create_logical_replication_slot('"+db.Name+"', 'pgoutput')", "UPDATE ebb.flow SET slot = '"+db.Name+"'")
	slot(t, db, "s", "1")
	for role, may := range roles {
		t.Run(role, func(t *testing.T) {
			conn := asRole(t, db, role)
			call := func(conn *pgx.Conn, call string) string {
				t.Helper()
				var got string
				if err := conn.QueryRow(t.Context(), fmt.Sprintf("SELECT pg_catalog.concat(%s)", call)).Scan(&got); err != nil {
					t.Errorf("%s: %v", call, err)
				}
				return got
			}
			without := map[string]string{}
			for _, c := range may.functions {
				if c != "" {
					without[c] = call(conn, c)
				}
			}
			if _, err := conn.Exec(t.Context(), `SET search_path = evil, pg_temp, pg_catalog;
				CREATE TEMP TABLE buffer (trapped pg_catalog.point); CREATE TEMP TABLE flow (trapped pg_catalog.point);
				CREATE TEMP TABLE flow_now (trapped pg_catalog.point); CREATE TEMP TABLE pg_database (trapped pg_catalog.point)`); err != nil {
				t.Fatal(err)
			}
			if _, err := conn.Exec(t.Context(), "SELECT 1::bigint > 0::bigint"); err == nil || !strings.Contains(err.Error(), "trapped") {
				t.Fatalf("the traps do not work: %v", err)
			}
			for c, want := range without {
				got := call(conn, c)
				if strings.HasPrefix(c, "ebb.put") {
					if got == "" || got == want {
						t.Errorf("%s returned %q and %q", c, want, got)
					}
					same := pgtest.Value[bool](t, db, `SELECT a.topic = b.topic AND a.key = b.key AND a.payload::text = b.payload::text AND a.headers = b.headers
						AND b.xid <> a.xid AND b.xid < pg_snapshot_xmax(pg_current_snapshot()) AND b.created_at >= a.created_at
						FROM ebb.buffer a, ebb.buffer b WHERE a.id::text = $1 AND b.id::text = $2`, want, got)
					if !same {
						t.Errorf("%s stored something else", c)
					}
				} else if got != want {
					t.Errorf("%s returned %q without the traps, and %q", c, want, got)
				}
			}
			for view := range may.relations {
				if view == "backlog" || view == "events" || view == "status" || view == "flow_now" {
					if _, err := conn.Exec(t.Context(), "SELECT * FROM ebb."+view); err != nil {
						t.Errorf("%s: %v", view, err)
					}
				}
			}
			if role == "ebb_producer" {
				const insert = "INSERT INTO ebb.buffer (topic, payload) VALUES ('t', '{}')"
				if _, err := conn.Exec(t.Context(), insert); err != nil {
					t.Error(err)
				}
				db.Exec(t, "SELECT ebb.limit_inserts(true)", "UPDATE ebb.flow SET limit_bytes = 1")
				for _, statement := range []string{insert, "SELECT ebb.put('t', '{}')"} {
					_, err := conn.Exec(t.Context(), statement)
					var pg *pgconn.PgError
					if !errors.As(err, &pg) || pg.Code != "53400" {
						t.Errorf("%s: %v, want SQLSTATE 53400", statement, err)
					}
				}
				db.Exec(t, "SELECT ebb.limit_inserts(false)")
				_, err := conn.Exec(t.Context(), "SELECT ebb.deliver_on_commit()")
				var pg *pgconn.PgError
				if !errors.As(err, &pg) || pg.Code != "55000" {
					t.Errorf("deliver_on_commit: %v, want SQLSTATE 55000", err)
				}
			}
		})
	}
	// The owner removes rows with such a path.
	conn := db.Connect(t)
	if _, err := conn.Exec(t.Context(), "SET search_path = evil, pg_temp, pg_catalog; DELETE FROM ebb.buffer"); err != nil {
		t.Error(err)
	}
	if _, err := conn.Exec(t.Context(), "SELECT ebb.limit_inserts(true), ebb.limit_inserts(false)"); err != nil {
		t.Error(err)
	}
	if err := sql.Check(t.Context(), owner); err != nil {
		t.Error(err)
	}
	// So does setup.
	done, err := sql.Apply(t.Context(), conn, sql.Setup{Publication: "other", Keep: setup.Keep * 2, Slot: "s"})
	if err != nil || len(done) == 0 {
		t.Errorf("setup did %q, %v", done, err)
	}
}
