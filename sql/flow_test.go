package sql_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"ebb/internal/pgtest"
	"ebb/sql"
)

// flowFixture is a buffer with a slot, whose lag a test chooses.
type flowFixture struct {
	t    *testing.T
	db   *pgtest.Database
	conn *pgx.Conn
}

func newFlow(t *testing.T) *flowFixture {
	t.Helper()
	f := &flowFixture{t: t, db: pgtest.New(t)}
	apply(t, f.db, setup)
	f.conn = f.db.Connect(t)
	slot(t, f.db, f.db.Name, pgtest.Value[string](t, f.db, "SELECT system_identifier::text FROM pg_control_system()"))
	f.db.Exec(t, "UPDATE ebb.slot SET consistent_point = pg_current_wal_lsn()", "SELECT pg_create_logical_replication_slot('"+f.db.Name+"', 'pgoutput')")
	return f
}

func (f *flowFixture) set(flow sql.Flow) {
	f.t.Helper()
	if _, err := sql.SetFlow(f.t.Context(), f.conn, f.db.Name, flow); err != nil {
		f.t.Fatal(err)
	}
}

// write has the lag grow by some bytes, which no table holds.
func (f *flowFixture) write(bytes int) {
	f.t.Helper()
	f.db.Exec(f.t, fmt.Sprintf("SELECT pg_logical_emit_message(true, 'filler', repeat('x', %d))", bytes))
}

// drain has the lag be some bytes, or a little more.
func (f *flowFixture) drain(bytes int) {
	f.t.Helper()
	f.db.Exec(f.t, fmt.Sprintf("SELECT pg_replication_slot_advance('%s', pg_current_wal_lsn() - %d)", f.db.Name, bytes))
}

// try runs a statement, which must be refused because the buffer is full, or not.
func (f *flowFixture) try(conn *pgx.Conn, statement string, refused bool) {
	f.t.Helper()
	_, err := conn.Exec(f.t.Context(), statement)
	var pg *pgconn.PgError
	switch {
	case !refused && err != nil:
		f.t.Errorf("%s: %v", statement, err)
	case refused && (!errors.As(err, &pg) || pg.Code != "53400"):
		f.t.Errorf("%s: %v, want SQLSTATE 53400", statement, err)
	case refused:
		for _, text := range []string{pg.Message, pg.Detail, pg.Hint} {
			if text == "" {
				f.t.Errorf("%+v lacks the figures, the way out, or the hint", pg)
			}
		}
	}
}

func (f *flowFixture) state(want sql.FlowState) {
	f.t.Helper()
	if got, err := sql.ReadFlow(f.t.Context(), f.conn, f.db.Name); err != nil || got != want {
		f.t.Errorf("the flow is %s, want %s; %v", got, want, err)
	}
	if got := pgtest.Value[string](f.t, f.db, "SELECT flow FROM ebb.status"); got != string(want) {
		f.t.Errorf("in ebb.status the flow is %s, want %s", got, want)
	}
}

func (f *flowFixture) regulate(want sql.FlowState) {
	f.t.Helper()
	if now, err := sql.Regulate(f.t.Context(), f.conn, f.db.Name); err != nil || now.State != want {
		f.t.Errorf("the flow is %+v, want %s; %v", now, want, err)
	}
}

const putOne = "SELECT ebb.put('t', '{}')"

// Past the limit, put is refused, with no bridge running.
func TestFlowLimit(t *testing.T) {
	f := newFlow(t)
	const limit = 1 << 20
	producer := asProducer(t, f.db)
	f.write(limit)
	f.try(producer, putOne, false) // no limit
	f.state(sql.FlowOpen)
	f.drain(0)

	f.set(sql.Flow{Warn: limit / 2, Limit: limit})
	f.try(producer, putOne, false)
	f.state(sql.FlowOpen)
	f.write(limit * 6 / 10)
	f.try(producer, putOne, false)
	f.state(sql.FlowWarn)
	f.write(limit / 2)
	f.state(sql.FlowClosed)
	for _, put := range []string{putOne, "SELECT ebb.put('t', '{}'::json)", "SELECT ebb.put('t', '{}'::jsonb, 'k', '{}')"} {
		f.try(producer, put, true)
	}
	if _, err := producer.Exec(t.Context(), putOne); err == nil || !strings.Contains(err.Error(), fmt.Sprint(limit)) || !strings.Contains(err.Error(), f.db.Name) {
		t.Errorf("the error does not name the limit and the slot: %v", err)
	}
	before := pgtest.Value[int64](t, f.db, "SELECT count(*) FROM ebb.buffer")
	f.try(producer, `INSERT INTO ebb.buffer (topic, payload) VALUES ('t', '{}')`, false) // is limited only when that is asked for
	if n := pgtest.Value[int64](t, f.db, "SELECT count(*) FROM ebb.buffer"); n != before+1 {
		t.Errorf("%d rows after %d and one more", n, before)
	}

	f.set(sql.Flow{Warn: limit / 2, Limit: limit, OnFull: sql.Allow})
	f.state(sql.FlowWarn)
	f.try(producer, putOne, false)
	f.set(sql.Flow{Limit: 4 * limit})
	f.state(sql.FlowOpen)
	f.try(producer, putOne, false)
	f.set(sql.Flow{})
	if changed, err := sql.SetFlow(t.Context(), f.conn, f.db.Name, sql.Flow{}); err != nil || changed {
		t.Errorf("the same limits changed something: %v, %v", changed, err)
	}
}

// A buffer that was closed opens again when it has drained to four fifths of the limit. Without a bridge to close it, the lag alone counts.
func TestFlowHysteresis(t *testing.T) {
	f := newFlow(t)
	const limit = 1 << 20
	f.set(sql.Flow{Limit: limit})
	f.drain(0)
	f.regulate(sql.FlowOpen)
	f.write(limit * 9 / 10)
	f.regulate(sql.FlowOpen)
	f.try(f.conn, putOne, false)
	f.write(limit / 5)
	f.regulate(sql.FlowClosed)
	f.drain(limit * 9 / 10)
	f.try(f.conn, putOne, true)
	f.state(sql.FlowClosed)
	f.regulate(sql.FlowClosed)
	f.drain(limit * 7 / 10)
	f.try(f.conn, putOne, false)
	f.regulate(sql.FlowOpen)
	f.write(limit / 5)
	f.try(f.conn, putOne, false) // between the two, from below
	f.regulate(sql.FlowOpen)
	f.write(limit / 5)
	f.try(f.conn, putOne, true) // and nobody has closed it
	f.drain(limit * 9 / 10)
	f.try(f.conn, putOne, false)
}

// With its slot gone, the buffer fills no further than the limit from where delivery was last recorded.
func TestFlowWithoutASlot(t *testing.T) {
	f := newFlow(t)
	const limit = 1 << 20
	f.set(sql.Flow{Limit: limit})
	f.db.Exec(t, "SELECT pg_drop_replication_slot('"+f.db.Name+"')")
	f.try(f.conn, putOne, false)
	f.write(2 * limit)
	f.try(f.conn, putOne, true) // since the slot was made
	f.state(sql.FlowClosed)
	record := read(t, f.conn, f.db.Name)
	recordAll(t, f.conn, record, 1)
	f.try(f.conn, putOne, false) // since the tick
	f.state(sql.FlowOpen)
	f.write(2 * limit)
	f.try(f.conn, putOne, true)

	// One of this name that belongs to another database is none of ours.
	other := pgtest.New(t)
	other.Exec(t, "SELECT pg_create_logical_replication_slot('"+f.db.Name+"', 'pgoutput')")
	f.try(f.conn, putOne, true)

	f.db.Exec(t, "DELETE FROM ebb.tick", "DELETE FROM ebb.slot") // as before the first slot
	f.try(f.conn, putOne, false)
	f.db.Exec(t, "DELETE FROM ebb.flow")
	f.try(f.conn, putOne, false)
	f.regulate(sql.FlowOpen)
	f.set(sql.Flow{Limit: limit})
	f.try(f.conn, putOne, false)
}

// Plain INSERTs are held to the limit when that is asked for; put is checked once in any case.
func TestFlowLimitsInserts(t *testing.T) {
	f := newFlow(t)
	const limit = 1 << 20
	f.set(sql.Flow{Limit: limit})
	f.db.Exec(t, "CREATE SCHEMA \"My own\"", "CREATE TABLE \"My own\".outbox (id bigint PRIMARY KEY)")
	insert := "INSERT INTO ebb.buffer (topic, payload) VALUES ('t', '{}')"
	own := `INSERT INTO "My own".outbox SELECT count(*) FROM "My own".outbox`
	producer := asProducer(t, f.db)
	f.db.Exec(t, "SELECT ebb.limit_inserts(true)", "SELECT ebb.limit_inserts(true)", `SELECT ebb.limit_inserts(true, '"My own".outbox')`)
	f.drain(0)
	for _, statement := range []string{insert, own, putOne} {
		f.try(f.conn, statement, false)
	}
	f.try(producer, insert, false)
	f.write(2 * limit)
	for _, statement := range []string{insert, own, putOne} {
		f.try(f.conn, statement, true)
	}
	f.try(producer, insert, true)
	f.try(producer, putOne, true)
	// Of what is put, the trigger sees to it, and nothing else: with it out of the way, put is not checked.
	f.db.Exec(t, "ALTER TABLE ebb.buffer DISABLE TRIGGER limit_inserts")
	f.try(f.conn, putOne, false)
	f.db.Exec(t, "SELECT ebb.limit_inserts(false)", "SELECT ebb.limit_inserts(false)", `SELECT ebb.limit_inserts(false, '"My own".outbox')`)
	f.try(f.conn, insert, false)
	f.try(f.conn, own, false)
	f.try(f.conn, putOne, true)
	if n := pgtest.Value[int64](t, f.db, "SELECT count(*) FROM pg_trigger WHERE tgname = 'limit_inserts'"); n != 0 {
		t.Errorf("%d triggers are left", n)
	}
}

// Setup stores the limits, and says so only when it changes them.
func TestSetupStoresTheFlowLimits(t *testing.T) {
	db := pgtest.New(t)
	s := setup
	s.Slot, s.Flow = "s", sql.Flow{Warn: 5, Limit: 7, OnFull: sql.Allow}
	script, err := sql.Script(s, 150000)
	if err != nil {
		t.Fatal(err)
	}
	db.Exec(t, script)
	if done := apply(t, db, s); len(done) != 0 {
		t.Errorf("after the script, setup did %q", done)
	}
	s.Flow.Limit = 8
	if done := apply(t, db, s); len(done) != 1 {
		t.Errorf("with another limit, setup did %q", done)
	}
	if got := pgtest.Value[string](t, db, "SELECT concat_ws(' ', slot, warn_bytes, limit_bytes, on_full) FROM ebb.flow"); got != "s 5 8 allow" {
		t.Errorf("stored %s", got)
	}
}

// BenchmarkPut measures the check for each put, with no limit, with one, and with the trigger for plain INSERTs, against a put without any check.
//
//	go test ./sql -run '^$' -bench Put -benchtime 20000x
func BenchmarkPut(b *testing.B) {
	db := pgtest.New(b)
	conn := db.Connect(b)
	if _, err := sql.Apply(b.Context(), conn, setup); err != nil {
		b.Fatal(err)
	}
	db.Exec(b, "SELECT pg_create_logical_replication_slot('"+db.Name+"', 'pgoutput')",
		`CREATE FUNCTION unchecked(topic text, payload json, key text DEFAULT NULL, headers jsonb DEFAULT NULL) RETURNS bigint
			LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
		DECLARE
			event_id bigint;
		BEGIN
			INSERT INTO ebb.buffer (topic, key, payload, headers) VALUES (unchecked.topic, unchecked.key, unchecked.payload, unchecked.headers)
			RETURNING buffer.id INTO event_id;
			RETURN event_id;
		END
		$$`)
	for _, c := range []struct {
		name, put string
		limit     int64
		trigger   bool
	}{
		{"unchecked", "public.unchecked", 0, false},
		{"no limit", "ebb.put", 0, false},
		{"limit", "ebb.put", 1 << 40, false},
		{"limit by trigger", "ebb.put", 1 << 40, true},
	} {
		if _, err := sql.SetFlow(b.Context(), conn, db.Name, sql.Flow{Limit: c.limit}); err != nil {
			b.Fatal(err)
		}
		db.Exec(b, fmt.Sprintf("SELECT ebb.limit_inserts(%t)", c.trigger))
		statement := fmt.Sprintf(`SELECT %s('t', '{"a": 1}'::json, 'k')`, c.put)
		b.Run(c.name+" in a loop in the server", func(b *testing.B) {
			if _, err := conn.Exec(b.Context(), fmt.Sprintf("DO $do$ BEGIN FOR i IN 1..%d LOOP PERFORM %s; END LOOP; END $do$", b.N,
				strings.TrimPrefix(statement, "SELECT "))); err != nil {
				b.Fatal(err)
			}
		})
		b.Run(c.name+" in transactions", func(b *testing.B) {
			for b.Loop() {
				if _, err := conn.Exec(b.Context(), statement); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
