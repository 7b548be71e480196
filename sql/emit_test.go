package sql_test

import (
	"errors"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"ebb/internal/pgtest"
	"ebb/internal/postgres"
	"ebb/sql"
)

// Who may emit, who may know the token, and what is refused.
func TestEmit(t *testing.T) {
	db := pgtest.New(t)
	apply(t, db, setup)
	producer := asProducer(t, db)
	for _, call := range []struct {
		sql  string
		args []any
	}{
		{`SELECT ebb.emit('t', '{}')`, nil},
		{`SELECT ebb.emit('t', $1::json, 'k', '{"h":"v"}')`, []any{"{}"}},
		{`SELECT ebb.emit('t', $1::text, key => 'k')`, []any{"{}"}},
		{`SELECT ebb.emit('t', $1::jsonb)`, []any{"{}"}},
		{`SELECT ebb.emit('t', $1, $2, NULL)`, []any{"{}", "k"}},
	} {
		var ok bool
		if err := producer.QueryRow(t.Context(), `SELECT pg_typeof(e) = 'pg_lsn'::regtype AND e > '0/0' FROM (`+call.sql+`) s(e)`, call.args...).
			Scan(&ok); err != nil || !ok {
			t.Errorf("%s: %v, %v", call.sql, ok, err)
		}
	}
	refused := func(conn *pgx.Conn, code string, statements ...string) {
		t.Helper()
		for _, statement := range statements {
			_, err := conn.PgConn().Exec(t.Context(), statement).ReadAll()
			var pg *pgconn.PgError
			if !errors.As(err, &pg) || pg.Code != code {
				t.Errorf("%s: %v, want SQLSTATE %s", statement, err, code)
			}
		}
	}
	refused(producer, "42501", `SELECT token FROM ebb.message_token`, `UPDATE ebb.message_token SET token = gen_random_uuid()`,
		`CREATE OR REPLACE FUNCTION ebb.emit(topic text, payload json, key text, headers jsonb) RETURNS pg_lsn LANGUAGE sql AS 'SELECT NULL'`)
	refused(producer, "23502", `SELECT ebb.emit(NULL, '{}')`, `SELECT ebb.emit('t', NULL::json)`, `SELECT ebb.emit('t', NULL::text)`)
	refused(producer, "23514", `SELECT ebb.emit('t', '{}', headers => '[]')`, `SELECT ebb.emit('t', '{}', headers => 'null')`)
	refused(producer, "22P02", `SELECT ebb.emit('t', '{')`)

	// Somebody who is no producer, and one who is a bridge.
	stranger, bridge := db.Connect(t), db.Connect(t)
	db.Exec(t, "CREATE ROLE s"+db.Name, "GRANT USAGE ON SCHEMA ebb TO s"+db.Name, "CREATE ROLE b"+db.Name+" IN ROLE ebb_bridge")
	t.Cleanup(func() { db.Exec(t, "DROP OWNED BY s"+db.Name, "DROP ROLE s"+db.Name, "DROP ROLE b"+db.Name) })
	if _, err := stranger.Exec(t.Context(), "SET ROLE s"+db.Name); err != nil {
		t.Fatal(err)
	}
	if _, err := bridge.Exec(t.Context(), "SET ROLE b"+db.Name); err != nil {
		t.Fatal(err)
	}
	for _, overload := range []string{"json", "jsonb", "text"} {
		refused(stranger, "42501", `SELECT ebb.emit('t', '{}'::`+overload+`)`)
		refused(bridge, "42501", `SELECT ebb.emit('t', '{}'::`+overload+`)`)
	}
	refused(stranger, "42501", `SELECT token FROM ebb.message_token`)
	refused(bridge, "42501", `UPDATE ebb.message_token SET token = gen_random_uuid()`)
	token, err := sql.MessageToken(t.Context(), bridge)
	if err != nil || len(token) != 16 {
		t.Errorf("a bridge reads token %x, %v", token, err)
	}
}

// A message that no slot can read would be lost without a word.
func TestEmitNeedsALogicalLog(t *testing.T) {
	server := pgtest.NewServer(t, postgres.Config{Settings: map[string]string{"wal_level": "replica"}})
	db := server.New(t)
	apply(t, db, setup)
	conn := db.Connect(t)
	var pg *pgconn.PgError
	if _, err := conn.Exec(t.Context(), "SELECT ebb.emit('t', '{}')"); !errors.As(err, &pg) || pg.Code != "55000" {
		t.Errorf("emit with wal_level = replica: %v", err)
	}
}

// Messages fill the log as rows do, and are held to the same limit.
func TestEmitIsLimited(t *testing.T) {
	db := pgtest.New(t)
	apply(t, db, setup)
	conn := db.Connect(t)
	system := pgtest.Value[string](t, db, "SELECT system_identifier::text FROM pg_control_system()")
	r := slot(t, db, "s", system)
	recordAll(t, conn, r, 0)
	db.Exec(t, "UPDATE ebb.flow SET slot = 's', limit_bytes = 100000")
	emit := "SELECT ebb.emit('t', '{}')"
	db.Exec(t, emit, "SELECT pg_logical_emit_message(true, 'other', repeat('x', 200000))")
	_, err := conn.Exec(t.Context(), emit)
	if pg := (*pgconn.PgError)(nil); !errors.As(err, &pg) || pg.Code != "53400" {
		t.Errorf("past the limit: %v", err)
	}
}
