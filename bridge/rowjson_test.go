package bridge_test

import (
	"bytes"
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"ebb/bridge"
	"ebb/decode"
	"ebb/event"
	"ebb/internal/pgtest"
	"ebb/internal/postgres"
	"ebb/replication"
	"ebb/sql"
)

// rowReader reads the rows of tables as JSON through a slot.
type rowReader struct {
	t       *testing.T
	db      *pgtest.Database
	session *pgx.Conn // set as those of ebb are
	tables  []string
	stream  *replication.Stream
	decoder *decode.Decoder
	batch   *event.Batch
	read    int
	lookUps int
	types   decode.Types
}

// newRowReader makes a slot for tables of schema public that exist. Each row's topic is its table.
func newRowReader(t *testing.T, db *pgtest.Database, tables ...string) *rowReader {
	t.Helper()
	r := &rowReader{t: t, db: db, tables: tables, batch: event.NewBatch()}
	var err error
	if r.session, err = sql.Connect(t.Context(), db.URL, db.Name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.session.Close(context.Background()) })
	if ok, err := sql.TryLead(t.Context(), r.session, db.Name); !ok || err != nil {
		t.Fatal(ok, err)
	}
	db.Exec(t, "CREATE PUBLICATION ebb FOR TABLE "+strings.Join(tables, ", ")+" WITH (publish = 'insert')")
	conn, err := replication.Connect(t.Context(), db.URL, db.Name)
	if err != nil {
		t.Fatal(err)
	}
	slot, err := conn.CreateSlot(t.Context(), db.Name)
	if err != nil {
		t.Fatal(err)
	}
	if r.stream, err = conn.Start(t.Context(), db.Name, "ebb", slot.ConsistentPoint); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.stream.Close() }) // the server may have ended it

	bridge := bridge.Config{Postgres: db.URL, Slot: db.Name, Logger: logTo(t)}
	cfg := decode.Config{Epochs: event.Epochs{{Number: 1}}, LookUp: func(oids []uint32) (_ decode.Types, asOf event.LSN, err error) {
		r.lookUps++
		r.types, asOf, err = bridge.LookUp(t.Context(), r.session.PgConn().PID(), oids)
		return r.types, asOf, err
	}}
	for _, table := range tables {
		cfg.Buffers = append(cfg.Buffers, decode.Buffer{Schema: "public", Table: table, TopicValue: table})
	}
	r.decoder = decode.New(cfg)
	return r
}

// next returns the next n rows.
func (r *rowReader) next(n int) []event.Event {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), patience)
	defer cancel()
	for len(r.batch.Events) < r.read+n {
		if err := r.stream.Fill(ctx, false); err != nil {
			r.t.Fatal(err)
		}
		if ctx.Err() != nil {
			r.t.Fatalf("%d of %d rows have come", len(r.batch.Events), r.read+n)
		}
		for {
			msg, ok, err := r.stream.Next()
			if err != nil {
				r.t.Fatal(err)
			}
			if !ok {
				break
			}
			if msg.Data == nil {
				continue
			}
			if err := r.decoder.Decode(msg.Data, r.batch); err != nil {
				r.t.Fatal(err)
			}
		}
	}
	events := r.batch.Events[r.read : r.read+n]
	r.read += n
	return events
}

// fails returns the error in which the next row ends.
func (r *rowReader) fails() error {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), patience)
	defer cancel()
	for {
		if err := r.stream.Fill(ctx, false); err != nil {
			r.t.Fatal(err)
		}
		if ctx.Err() != nil {
			r.t.Fatal("no row fails")
		}
		for {
			msg, ok, err := r.stream.Next()
			if err != nil {
				r.t.Fatal(err)
			}
			if !ok {
				break
			}
			if msg.Data == nil {
				continue
			}
			if err := r.decoder.Decode(msg.Data, r.batch); err != nil {
				return err
			}
		}
	}
}

// same compares a row, whose column n tells which one it is, with what Postgres makes of it.
func (r *rowReader) same(e *event.Event) {
	r.t.Helper()
	var key struct{ N int64 }
	if err := json.Unmarshal(e.Payload, &key); err != nil {
		r.t.Fatalf("%v: %.2000s", err, e.Payload)
	}
	var equal bool
	var want, text string
	if err := r.session.QueryRow(r.t.Context(), "SELECT to_jsonb(whole) = $1::text::jsonb, to_jsonb(whole)::text, row_to_json(whole)::text FROM "+
		string(e.Topic)+" whole WHERE n = $2",
		string(e.Payload), key.N).Scan(&equal, &want, &text); err != nil {
		r.t.Fatalf("%v: %.2000s", err, e.Payload)
	}
	if !equal {
		r.t.Errorf("row %d of %s is\n%.5000s\nand to_jsonb makes it\n%.5000s", key.N, e.Topic, e.Payload, want)
		return
	}
	// Nothing but hstore's own cast to json writes anything in another way.
	if string(e.Topic) != "extended" && string(e.Payload) != text {
		r.t.Errorf("row %d of %s is\n%.5000s\nand row_to_json makes it\n%.5000s", key.N, e.Topic, e.Payload, text)
	}
	if e.ContentType != "application/json" {
		r.t.Errorf("row %d of %s has content type %q", key.N, e.Topic, e.ContentType)
	}
	r.sameFromTable(e, key.N)
}

// sameFromTable compares a row that came by the slot with the same read from the table, as a recovery does it.
func (r *rowReader) sameFromTable(e *event.Event, n int64) {
	r.t.Helper()
	res := r.session.PgConn().ExecParams(r.t.Context(), fmt.Sprintf("SELECT * FROM %s WHERE n = %d", e.Topic, n), nil, nil, nil, nil).Read()
	if res.Err != nil {
		r.t.Fatal(res.Err)
	}
	var columns []decode.Column
	for _, f := range res.FieldDescriptions {
		columns = append(columns, decode.Column{Name: f.Name, Type: f.DataTypeOID})
	}
	types := decode.Types{}
	for oid, typ := range r.types {
		types[oid] = typ
	}
	var oids []uint32
	for _, c := range columns {
		oids = append(oids, c.Type)
	}
	if unknown := types.Unknown(oids); len(unknown) > 0 {
		r.t.Fatalf("types %d were not looked up", unknown)
	}
	encoder, err := decode.NewRowEncoder(columns, types)
	if err != nil {
		r.t.Fatal(err)
	}
	buffer, batch := decode.Buffer{Schema: "public", Table: string(e.Topic), ID: "n", TopicValue: string(e.Topic)}, event.NewBatch()
	if err := buffer.AppendRow(batch, decode.Row{ID: res.Rows[0][0], Values: res.Rows[0], Encoder: encoder, Time: e.Time}); err != nil {
		r.t.Fatal(err)
	}
	if got := batch.Events[0]; !bytes.Equal(got.Payload, e.Payload) || got.ContentType != e.ContentType {
		r.t.Errorf("row %d of %s is\n%.5000s\nby the slot, and read from the table\n%.5000s", n, e.Topic, e.Payload, got.Payload)
	}
}

// random draws values in the text form that input functions take.
type random struct{ *rand.Rand }

func (r random) pick(of ...string) string { return of[r.IntN(len(of))] }

func (r random) text() string {
	pieces := []string{"a", "B", " ", "  ", `"`, `""`, `\`, `\\`, `\"`, "'", ",", ";", "(", ")", "{", "}", "[", "]", "=>", "NULL", "null", ":", "\n", "\r", "\t",
		"\b", "\f", "\v", "\x01", "\x1f", "\x7f", "ü", "✓", "🐎", "\u2028", "\ufffd", "<&>", "/", "%", "x\\u0041", "-", "1", "t", ".", "e"}
	var b strings.Builder
	for range r.IntN(8) {
		b.WriteString(pieces[r.IntN(len(pieces))])
	}
	return b.String()
}

func (r random) json(depth int) string {
	space := r.pick("", "", " ", "\n\t")
	switch n := r.IntN(7); {
	case n == 0 && depth > 0:
		return "{" + space + "}"
	case n <= 2 && depth > 0:
		var b strings.Builder
		b.WriteString("[" + space)
		for i := range r.IntN(4) {
			if i > 0 {
				b.WriteString("," + space)
			}
			b.WriteString(r.json(depth - 1))
		}
		return b.String() + "]"
	case n <= 4 && depth > 0:
		var b strings.Builder
		b.WriteString("{" + space)
		for i := range r.IntN(4) {
			if i > 0 {
				b.WriteString(space + ",")
			}
			key, err := json.Marshal(r.text())
			if err != nil {
				panic(err)
			}
			b.WriteString(string(key) + space + ":" + r.json(depth-1))
		}
		return b.String() + "}"
	}
	s, err := json.Marshal(r.text())
	if err != nil {
		panic(err)
	}
	return r.pick("null", "true", "false", "0", "-0", "1.50", "1e5", "-12.5E-3", "123456789012345678901234567890", string(s))
}

func (r random) integer(bits int) string {
	n := int64(r.Uint64()) >> (64 - bits)
	return r.pick("0", "-1", strconv.FormatInt(math.MinInt64>>(64-bits), 10), strconv.FormatInt(math.MaxInt64>>(64-bits), 10), strconv.FormatInt(n, 10))
}

func (r random) date() string {
	return r.pick("2026-01-02", "0001-01-01", "0044-03-15 BC", "4713-01-01 BC", "5874897-12-31", "infinity", "-infinity", "1999-12-31", "10000-01-01",
		fmt.Sprintf("%04d-%02d-%02d", 1+r.IntN(9999), 1+r.IntN(12), 1+r.IntN(28)))
}

func (r random) clock() string {
	return fmt.Sprintf("%02d:%02d:%02d", r.IntN(24), r.IntN(60), r.IntN(60)) + r.pick("", ".5", ".123456", ".000001", ".100")
}

func (r random) timestamp() string {
	date := r.date()
	switch {
	case strings.HasSuffix(date, "infinity"):
		return date
	case strings.HasPrefix(date, "5874897"):
		date = "294276-12-31"
	case strings.HasPrefix(date, "4713"):
		return "4713-06-01 " + r.clock() + " BC"
	}
	day, era, _ := strings.Cut(date, " ")
	return strings.TrimSpace(day + " " + r.clock() + " " + era)
}

func (r random) hex(n int) string {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return hex.EncodeToString(b)
}

// values has a generator for each built-in type that takes a value.
func (r random) values(user string) map[string]func() string {
	fixed := func(of ...string) func() string { return func() string { return r.pick(of...) } }
	span := func(value func() string) (one, many func() string) {
		// A range whose ends are the wrong way round is refused, so that both are of one value, or one is open.
		one = func() string {
			a := value()
			return r.pick("empty", "(,)", fmt.Sprintf("[%q,%q]", a, a), fmt.Sprintf("(,%q]", a), fmt.Sprintf("[%q,)", a))
		}
		return one, func() string {
			return r.pick("{}", "{(,)}", "{"+one()+"}", "{ "+one()+","+one()+"}")
		}
	}
	int4range, int4multirange := span(func() string { return strconv.Itoa(r.IntN(1000) - 500) })
	int8range, int8multirange := span(func() string { return strconv.Itoa(r.IntN(1000) - 500) })
	numrange, nummultirange := span(fixed("1.50", "-2", "1e10", "NaN"))
	tsrange, tsmultirange := span(r.timestamp)
	tstzrange, tstzmultirange := span(r.timestamp)
	daterange, datemultirange := span(fixed("2026-01-02", "infinity", "0044-03-15 BC"))
	return map[string]func() string{
		"bool": fixed("t", "f"), "bytea": func() string { return `\x` + r.hex(r.IntN(20)) }, "char": fixed("", "a", `"`, `\`, "{", " "),
		"name": r.text, "int8": func() string { return r.integer(64) }, "int2": func() string { return r.integer(16) },
		"int2vector": fixed("", "1", "1 2 -3"), "int4": func() string { return r.integer(32) }, "regproc": fixed("now", "-", "pg_catalog.current_database"),
		"text": r.text, "oid": fixed("0", "4294967295", "1259"), "tid": fixed("(0,1)", "(4294967295,65535)"), "xid": fixed("3", "4294967295"),
		"cid": fixed("0", "7"), "oidvector": fixed("", "1", "4294967295 2"), "json": func() string { return r.json(3) }, "xml": fixed("<a b=\"c\">&amp;</a>", "x"),
		"point": fixed("(1.5,2)", "(-1e300,NaN)", "(Infinity,0)"), "lseg": fixed("[(1,2),(3,4.25)]"), "path": fixed("((1,2),(3,4))", "[(1,2),(3,4)]"),
		"box": fixed("(3,4),(1,2)", "(1e10,4),(1,-0.5)"), "polygon": fixed("((0,0),(1,1),(2,0))"), "line": fixed("{1,2,3}"), "cidr": fixed("10.1.0.0/16", "2001:db8::/32"),
		"float4": fixed("0", "-0", "NaN", "Infinity", "-Infinity", "1e-45", "3.4028235e38", "0.1", "1e10", fmt.Sprint(r.Float32())),
		"float8": func() string {
			f := math.Float64frombits(r.Uint64())
			if math.IsNaN(f) || math.IsInf(f, 0) {
				f = r.NormFloat64()
			}
			return r.pick("0", "-0", "NaN", "Infinity", "-Infinity", "5e-324", "1.7976931348623157e308", "0.1", "1e15", "1e16", strconv.FormatFloat(f, 'g', -1, 64))
		},
		"circle": fixed("<(1,2),3>"), "macaddr8": fixed("08:00:2b:01:02:03:04:05"), "money": fixed("0", "-1234.56", "92233720368547758.07"),
		"macaddr": fixed("08:00:2b:01:02:03"), "inet": fixed("10.1.2.3", "10.1.2.3/8", "::1", "2001:db8::1/32"), "aclitem": fixed("=r/"+user, user+"=arwdDxt/"+user),
		"bpchar": r.text, "varchar": r.text, "date": r.date, "time": r.clock, "timestamp": r.timestamp,
		"timestamptz": func() string {
			ts := r.timestamp()
			if strings.HasSuffix(ts, "infinity") || strings.HasSuffix(ts, "BC") || strings.HasPrefix(ts, "294276") {
				return ts
			}
			return ts + r.pick("+00", "Z", "+05:30", "-12", " Europe/Berlin", "+01:02:03")
		},
		"interval": fixed("0", "1 year 2 mons -3 days 04:05:06.789", "-1 day", "-178000000 years", "00:00:00.000001", "1 day -1 sec"),
		"timetz":   func() string { return r.clock() + r.pick("+00", "-12:30", "+15:59:59") }, "bit": fixed("", "1", "0101"), "varbit": fixed("", "1", "0101"),
		"numeric": func() string {
			digits := make([]byte, 1+r.IntN(60))
			for i := range digits {
				digits[i] = byte('0' + r.IntN(10))
			}
			n := string(digits)
			return r.pick("0", "NaN", "Infinity", "-Infinity", "1.50", "0.000", "-0.0000001", "1e400", "1e-400", n, "-"+n+".5", "0."+n)
		},
		"refcursor": r.text, "regprocedure": fixed("now()", "-"), "regoper": fixed("^@", "0"), "regoperator": fixed("+(integer,integer)"),
		"regclass": fixed("pg_class", "0", "pg_catalog.pg_type"), "regtype": fixed("integer", `"char"`, "timestamp with time zone", "int[]"),
		"uuid": func() string { return r.hex(16) }, "txid_snapshot": fixed("10:20:10,14,15"), "pg_lsn": fixed("0/0", "16/B374D848"),
		"tsvector": fixed("", `'a':1 'it''s':2A`, `'\\':3`), "tsquery": fixed("'a' & !'b'", `'it''s' | 'x':*`), "regconfig": fixed("english", "simple"),
		"regdictionary": fixed("simple"), "jsonb": func() string { return r.json(3) },
		"int4range": int4range, "numrange": numrange, "tsrange": tsrange, "tstzrange": tstzrange, "daterange": daterange, "int8range": int8range,
		"jsonpath": fixed(`$."a\"b"[*] ? (@ > 1)`, "strict $"), "regnamespace": fixed("pg_catalog", "0"), "regrole": fixed(user), "regcollation": fixed(`"C"`),
		"int4multirange": int4multirange, "nummultirange": nummultirange, "tsmultirange": tsmultirange, "tstzmultirange": tstzmultirange,
		"datemultirange": datemultirange, "int8multirange": int8multirange,
		"pg_snapshot": fixed("10:20:10,14,15"), "xid8": fixed("0", "18446744073709551615"),
	}
}

// array draws the text of an array.
func (r random) array(value func() string, delimiter string) string {
	element := func() string {
		if r.IntN(5) == 0 {
			return "NULL"
		}
		return `"` + strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(value()) + `"`
	}
	list := func(n int, of func() string) string {
		var all []string
		for range n {
			all = append(all, of())
		}
		return "{" + strings.Join(all, delimiter) + "}"
	}
	switch r.IntN(6) {
	case 0:
		return "{}"
	case 1:
		return "[2:3]=" + list(2, element)
	case 2:
		return list(2, func() string { return list(3, element) })
	case 3:
		return "[-1:0][0:0][7:8]=" + list(2, func() string { return list(1, func() string { return list(2, element) }) })
	}
	return list(1+r.IntN(4), element)
}

func quote(s string) string { return "'" + strings.ReplaceAll(s, "'", "''") + "'" }

// seed is one of its own in every run, or that in EBB_TEST_SEED.
func seed(t *testing.T) random {
	n := uint64(time.Now().UnixNano())
	if s := os.Getenv("EBB_TEST_SEED"); s != "" {
		var err error
		if n, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("EBB_TEST_SEED=%d", n)
	return random{rand.New(rand.NewPCG(n, 0))}
}

// Rows of every built-in type, and of arrays of it, come through a slot as to_jsonb makes them.
func TestRowsOfBuiltInTypes(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	r := seed(t)
	conn := db.Connect(t)
	values := r.values(conn.Config().User)

	rows, err := conn.Query(t.Context(), `SELECT t.typname::text, a.typname::text, t.typdelim::text FROM pg_type t LEFT JOIN pg_type a ON a.oid = t.typarray
		WHERE t.oid < 10000 AND t.typtype IN ('b', 'r', 'm') AND t.typcategory <> 'A' OR t.typname IN ('int2vector', 'oidvector') ORDER BY t.oid`)
	if err != nil {
		t.Fatal(err)
	}
	type kind struct{ name, array, delimiter string }
	kinds, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (kind, error) {
		var k kind
		var array *string
		err := row.Scan(&k.name, &array, &k.delimiter)
		if array != nil {
			k.array = *array
		}
		return k, err
	})
	if err != nil {
		t.Fatal(err)
	}
	columns := []string{"n bigint"}
	var draw []func() string
	drawn, arrays := 0, 0
	for _, k := range kinds {
		name := "pg_catalog." + pgx.Identifier{k.name}.Sanitize()
		var pg *pgconn.PgError
		if _, err := conn.Exec(t.Context(), "CREATE TEMP TABLE probe (c "+name+")"); errors.As(err, &pg) && pg.Code == "42P16" {
			continue // no column can have it
		} else if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Exec(t.Context(), "DROP TABLE probe"); err != nil {
			t.Fatal(err)
		}
		value, ok := values[k.name]
		if ok {
			_, err := conn.Exec(t.Context(), "SELECT "+quote(value())+"::"+name)
			if errors.As(err, &pg) && pg.Code == "0A000" { // as xml without libxml
				t.Logf("this server takes no values of %s: %v", k.name, err)
				ok = false
			} else if err != nil {
				t.Errorf("type %s: %v", k.name, err)
			}
		} else if _, err := conn.Exec(t.Context(), "SELECT 'x'::"+name); !errors.As(err, &pg) || pg.Code != "0A000" {
			t.Errorf("type %s, which takes values, is not tested: %v", k.name, err)
		}
		columns = append(columns, pgx.Identifier{"c_" + k.name}.Sanitize()+" "+name)
		if !ok {
			draw = append(draw, func() string { return "NULL" })
		} else {
			drawn++
			draw = append(draw, func() string {
				if r.IntN(8) == 0 {
					return "NULL"
				}
				return quote(value()) + "::" + name
			})
		}
		if k.array == "" {
			continue
		}
		arrays++
		array := "pg_catalog." + pgx.Identifier{k.array}.Sanitize()
		columns = append(columns, pgx.Identifier{k.array}.Sanitize()+" "+array)
		draw = append(draw, func() string {
			switch {
			case !ok:
				return "'{NULL,NULL}'::" + array
			case r.IntN(8) == 0:
				return "NULL"
			}
			return quote(r.array(value, k.delimiter)) + "::" + array
		})
	}
	if drawn < 70 || arrays < 70 {
		t.Errorf("values of %d types and %d arrays are tested", drawn, arrays)
	}
	// A row of arrays must fit on a page.
	const perTable = 40
	var tables []string
	var draws [][]func() string
	for i := 1; i < len(columns); i += perTable {
		end := min(i+perTable, len(columns))
		table := fmt.Sprintf("builtin%d", len(tables))
		db.Exec(t, "CREATE TABLE "+table+" (n bigint, "+strings.Join(columns[i:end], ", ")+")")
		tables, draws = append(tables, table), append(draws, draw[i-1:end-1])
	}
	reader := newRowReader(t, db, tables...)
	const each = 60
	for n := range each {
		for i, table := range tables {
			row := []string{strconv.Itoa(n)}
			for _, d := range draws[i] {
				row = append(row, d())
			}
			if _, err := conn.Exec(t.Context(), "INSERT INTO "+table+" VALUES ("+strings.Join(row, ", ")+")"); err != nil {
				t.Fatal(err)
			}
		}
	}
	events := reader.next(each * len(tables))
	for i := range events {
		reader.same(&events[i])
	}
	if reader.lookUps > 0 {
		t.Errorf("built-in types were looked up %d times", reader.lookUps)
	}
}

// What the text of values depends on is as ebb's sessions have it, whatever the database or the role says.
func TestRowsAndSettings(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	for _, set := range []string{"datestyle = 'German, DMY'", "timezone = 'Asia/Kolkata'", "intervalstyle = 'iso_8601'", "bytea_output = 'escape'",
		"extra_float_digits = -5", "quote_all_identifiers = on"} {
		db.Exec(t, "ALTER DATABASE "+db.Name+" SET "+set)
	}
	db.Exec(t, "CREATE TABLE settings (n bigint, d date, t timestamp, z timestamptz, i interval, b bytea, f float8, g float4, c regclass)")
	reader := newRowReader(t, db, "settings")
	db.Exec(t, `INSERT INTO settings VALUES (1, '2026-01-02', '2026-01-02 03:04:05.6', '2026-01-02 03:04:05.6Z', '1 day 02:00', '\x00ff', 0.1::float8 + 0.2, 0.1, 'pg_class')`)
	events := reader.next(1)
	want := `{"n":1,"d":"2026-01-02","t":"2026-01-02T03:04:05.6","z":"2026-01-02T03:04:05.6+00:00","i":"1 day 02:00:00","b":"\\x00ff",` +
		`"f":0.30000000000000004,"g":0.1,"c":"pg_class"}`
	if got := string(events[0].Payload); got != want {
		t.Errorf("the row is\n%s, want\n%s", got, want)
	}
	reader.same(&events[0])
}

// Rows of types of one's own, nested in each other, come through a slot as to_jsonb makes them.
func TestRowsOfOwnTypes(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	r := seed(t)
	db.Exec(t, `
		CREATE TYPE mood AS ENUM ('fine', 'it''s "so-so", \ok', 'NULL', ' {} ', '');
		CREATE DOMAIN posint AS int CHECK (VALUE > 0);
		CREATE DOMAIN posint2 AS posint;
		CREATE DOMAIN ints AS int[];
		CREATE DOMAIN moment AS timestamptz;
		CREATE DOMAIN doc AS jsonb;
		CREATE DOMAIN yes AS bool;
		CREATE TYPE inside AS (a int, "b ""x"" \ü" text, c timestamptz, d int[], e doc, f bytea, g yes);
		CREATE TYPE outside AS (i inside, l inside[], m mood, n numeric, h ints, b box[], v int2vector);
		CREATE DOMAIN dinside AS inside;
		CREATE DOMAIN boxes AS box[];
		CREATE TYPE nothing AS ();
		CREATE TYPE one AS (x text);
		CREATE TYPE textrange AS RANGE (subtype = text);
		CREATE TABLE other (id int, gone mood, "note 1" text);
		ALTER TABLE other DROP COLUMN gone;
		CREATE TYPE deep AS (o outside[], d dinside[], t other)`)
	conn := db.Connect(t)
	user := conn.Config().User
	values := r.values(user)
	null := func(of func() string) func() string {
		return func() string {
			if r.IntN(6) == 0 {
				return "NULL"
			}
			return of()
		}
	}
	lit := func(builtin, as string) func() string {
		return null(func() string { return quote(values[builtin]()) + "::" + as })
	}
	row := func(as string, of ...func() string) func() string {
		return null(func() string {
			var fields []string
			for _, f := range of {
				fields = append(fields, f())
			}
			return "ROW(" + strings.Join(fields, ", ") + ")::" + as
		})
	}
	list := func(as string, of func() string) func() string {
		return null(func() string {
			var all []string
			for range r.IntN(4) {
				all = append(all, of())
			}
			return "ARRAY[" + strings.Join(all, ", ") + "]::" + as
		})
	}
	array := func(builtin, delimiter, as string) func() string {
		return null(func() string { return quote(r.array(values[builtin], delimiter)) + "::" + as })
	}
	mood := null(func() string { return quote(r.pick("fine", `it's "so-so", \ok`, "NULL", " {} ", "")) + "::mood" })
	posint := func(as string) func() string {
		return null(func() string { return strconv.Itoa(1+r.IntN(1000)) + "::" + as })
	}
	ints := array("int4", ",", "ints")
	doc, inside := lit("jsonb", "doc"), func(as string) func() string {
		return row(as, lit("int4", "int"), lit("text", "text"), lit("timestamptz", "timestamptz"), array("int4", ",", "int[]"), lit("jsonb", "doc"),
			lit("bytea", "bytea"), lit("bool", "yes"))
	}
	outside := row("outside", inside("inside"), list("inside[]", inside("inside")), mood, lit("numeric", "numeric"), ints, array("box", ";", "box[]"),
		lit("int2vector", "int2vector"))
	other := row("other", lit("int4", "int"), lit("text", "text"))
	textrange := null(func() string { a := quote(r.text()); return "textrange(" + a + ", " + a + ", '[]')" })

	var columns []string
	var draw []func() string
	for i, c := range []struct {
		as string
		of func() string
	}{
		{"mood", mood}, {"mood[]", list("mood[]", mood)}, {"posint", posint("posint")}, {"posint2", posint("posint2")},
		{"posint2[]", list("posint2[]", posint("posint2"))}, {"ints", ints}, {"ints[]", list("ints[]", ints)}, {"moment", lit("timestamptz", "moment")},
		{"doc", doc}, {"doc[]", list("doc[]", doc)}, {"inside", inside("inside")}, {"inside[]", list("inside[]", inside("inside"))}, {"outside", outside},
		{"outside[]", list("outside[]", outside)}, {"dinside", inside("dinside")}, {"dinside[]", list("dinside[]", inside("dinside"))},
		{"nothing", func() string { return r.pick("NULL", "'()'") + "::nothing" }}, {"nothing[]", func() string { return "'{NULL,()}'::nothing[]" }},
		{"one", row("one", lit("text", "text"))}, {"one[]", list("one[]", row("one", lit("text", "text")))}, {"boxes", array("box", ";", "boxes")},
		{"boxes[]", list("boxes[]", array("box", ";", "boxes"))}, {"textrange", textrange}, {"textrange[]", list("textrange[]", textrange)},
		{"textmultirange", null(func() string { return "textmultirange(" + strings.TrimSuffix(textrange(), "::textrange") + ")" })}, {"other", other}, {"other[]", list("other[]", other)},
		{"deep", row("deep", list("outside[]", outside), list("dinside[]", inside("dinside")), other)},
		{"information_schema.yes_or_no", func() string { return r.pick("NULL", "'YES'") }},
		{"information_schema.cardinal_number[]", list("information_schema.cardinal_number[]", func() string { return "5" })},
		{"pg_am", func() string { return "(SELECT a FROM pg_am a WHERE oid = 2)" }}, {"varchar(5)[]", list("varchar(5)[]", func() string { return quote(`a"\`) })},
		{"char(6)", func() string { return "'a '" }}, {`"char"`, func() string { return "''" }},
	} {
		columns, draw = append(columns, fmt.Sprintf("%s %s", pgx.Identifier{fmt.Sprintf("%d, \"%s\"\\ü\n", i, c.as)}.Sanitize(), c.as)), append(draw, c.of)
	}
	db.Exec(t, "CREATE TABLE own (n bigint, "+strings.Join(columns, ", ")+")")
	reader := newRowReader(t, db, "own")
	const rows = 150
	for n := range rows {
		row := []string{strconv.Itoa(n)}
		for _, d := range draw {
			row = append(row, d())
		}
		if _, err := conn.Exec(t.Context(), "INSERT INTO own VALUES ("+strings.Join(row, ", ")+")"); err != nil {
			t.Fatal(err)
		}
	}
	events := reader.next(rows)
	for i := range events {
		reader.same(&events[i])
	}
	if n := reader.lookUps; n < 1 || n > 3 { // not for every row
		t.Errorf("types were looked up %d times", reader.lookUps)
	}
}

// hstore is an object, as by its own cast to json; other types of extensions are strings.
func TestRowsOfExtensions(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	r := seed(t)
	conn := db.Connect(t)
	columns, draw := []string{"n bigint"}, []func() string{}
	for _, x := range []struct {
		extension string
		value     func() string
	}{
		{"hstore", func() string {
			var pairs []string
			for range r.IntN(4) {
				value := quote(r.text())
				if r.IntN(4) == 0 {
					value = "NULL"
				}
				pairs = append(pairs, "odd.hstore("+quote(r.text())+", "+value+")")
			}
			return "(''::odd.hstore || " + strings.Join(append(pairs, "''"), " || ") + ")"
		}},
		{"citext", func() string { return quote(r.text()) }},
		{"ltree", func() string { return "'a.b.c'" }},
		{"cube", func() string { return "'(1,2),(3,4)'" }},
		{"isn", nil},
	} {
		if _, err := conn.Exec(t.Context(), "CREATE SCHEMA IF NOT EXISTS odd; SET search_path = odd, public; CREATE EXTENSION "+x.extension+" SCHEMA odd"); err != nil {
			t.Logf("the server has no extension %s, which is not tested: %v", x.extension, err)
			continue
		}
		name, value := x.extension, x.value
		if name == "isn" {
			name, value = "issn", func() string { return "'1436-4522'" }
		}
		columns = append(columns, name+" odd."+name, name+"s odd."+name+"[]")
		draw = append(draw, value, func() string { return "ARRAY[" + value() + ", NULL, " + value() + "]::odd." + name + "[]" })
		if name == "hstore" {
			db.Exec(t, "CREATE DOMAIN dict AS odd.hstore", "CREATE TYPE holder AS (h odd.hstore, d dict[])")
			columns = append(columns, "dict dict", "holder holder")
			draw = append(draw, value, func() string { return "ROW(" + value() + ", ARRAY[" + value() + "]::dict[])::holder" })
		}
	}
	if len(draw) == 0 {
		t.Log("there are no extensions to test with")
	}
	db.Exec(t, "CREATE TABLE extended ("+strings.Join(columns, ", ")+")")
	reader := newRowReader(t, db, "extended")
	const rows = 100
	for n := range rows {
		row := []string{strconv.Itoa(n)}
		for _, d := range draw {
			row = append(row, d())
		}
		if _, err := conn.Exec(t.Context(), "INSERT INTO extended VALUES ("+strings.Join(row, ", ")+")"); err != nil {
			t.Fatal(err)
		}
	}
	events := reader.next(rows)
	for i := range events {
		reader.same(&events[i])
	}
}

// Values of megabytes, which are stored out of line.
func TestRowsOfLargeValues(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(t, "CREATE TYPE pair AS (a text, b jsonb)", "CREATE TABLE large (n bigint, t text, b bytea, j jsonb, x json, a text[], c pair[])")
	reader := newRowReader(t, db, "large")
	db.Exec(t, `INSERT INTO large SELECT n, t, convert_to(t, 'UTF8'), j, j::text::json, ARRAY[t, NULL, t], ARRAY[ROW(t, j)::pair, ROW(NULL, NULL)::pair]
		FROM generate_series(1, 3) n, LATERAL (SELECT string_agg(md5((n * i)::text) || E'"\\\n{ü', '') AS t FROM generate_series(1, 30000) i) x,
		LATERAL (SELECT jsonb_build_object('t', t, 'a', jsonb_build_array(t, n))) y (j)`)
	events := reader.next(3)
	for i := range events {
		if len(events[i].Payload) < 10<<20 {
			t.Errorf("row %d has %d bytes", i, len(events[i].Payload))
		}
		reader.same(&events[i])
	}
}

// A composite type may be altered between its values, and between a row and its decoding. The server says nothing of that.
func TestRowsOfAlteredTypes(t *testing.T) {
	t.Parallel()
	db := pgtest.NewServer(t, postgres.Config{}).New(t) // others could have the server send the relation anew, by many changes of theirs to the catalog
	db.Exec(t, "CREATE TYPE thing AS (a int, b text)", "CREATE TYPE holder AS (t thing, l thing[])", "CREATE TABLE changing (n bigint, t thing, h holder)")
	reader := newRowReader(t, db, "changing")
	insert := func(n int, value string) {
		db.Exec(t, fmt.Sprintf("INSERT INTO changing VALUES (%d, %s, ROW(%[2]s, ARRAY[%[2]s, NULL])::holder)", n, value))
	}
	// came checks the next rows, given the thing in them.
	came := func(want ...string) {
		t.Helper()
		for i, e := range reader.next(len(want)) {
			_, rest, _ := strings.Cut(string(e.Payload), ",")
			if whole := fmt.Sprintf(`"t":%s,"h":{"t":%[1]s,"l":[%[1]s,null]}}`, want[i]); rest != whole {
				t.Errorf("a row is %s, want … %s", e.Payload, whole)
			}
		}
	}
	insert(1, `ROW(1, 'x')::thing`)
	came(`{"a":1,"b":"x"}`)
	// The decoder's types are from before.
	db.Exec(t, "ALTER TYPE thing ADD ATTRIBUTE c date")
	insert(2, `ROW(2, '', '2026-01-02')::thing`)
	insert(3, `ROW(3, 'y', NULL)::thing`)
	came(`{"a":2,"b":"","c":"2026-01-02"}`, `{"a":3,"b":"y","c":null}`)
	db.Exec(t, "ALTER TYPE thing DROP ATTRIBUTE b")
	insert(4, `ROW(4, '2026-01-03')::thing`)
	came(`{"a":4,"c":"2026-01-03"}`)
	// They are from behind it: with ALTER TABLE, the server sends the relation anew, whose types are read again.
	for n := 5; n < 10; n++ {
		insert(n, `ROW(5, NULL)::thing`)
	}
	db.Exec(t, "ALTER TYPE thing ADD ATTRIBUTE d text", "ALTER TABLE changing REPLICA IDENTITY FULL")
	insert(10, `ROW(10, NULL, 'q')::thing`)
	lookUps := reader.lookUps
	same := `{"a":5,"c":null}`
	came(same, same, same, same, same, `{"a":10,"c":null,"d":"q"}`)
	if n := reader.lookUps - lookUps; n > 2 {
		t.Errorf("types were looked up %d times", n)
	}
}

// A value of which it cannot be told what its attributes were ends the bridge.
func TestRowsOfUnknownAttributes(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(t, "CREATE TYPE thing AS (a int, b text, c text)", "CREATE TABLE unclear (n bigint, t thing)")
	reader := newRowReader(t, db, "unclear")
	db.Exec(t, "INSERT INTO unclear VALUES (1, (1, 'b', 'c'))", "ALTER TYPE thing ADD ATTRIBUTE d text", "ALTER TYPE thing DROP ATTRIBUTE b",
		"ALTER TYPE thing DROP ATTRIBUTE c")
	if err := reader.fails(); !errors.Is(err, decode.ErrRow) || !strings.Contains(err.Error(), "ALTER TYPE") {
		t.Errorf("decoding it: %v", err)
	}
}

// Types that are read from the catalog now, behind rows of them, fit these if they can.
func TestRowsFromBeforeTheirTypes(t *testing.T) {
	t.Parallel()
	db := pgtest.NewServer(t, postgres.Config{}).New(t) // see above
	db.Exec(t, "CREATE TYPE grown AS (a int, b text)", "CREATE TYPE shrunk AS (a int, b text, c text)", "CREATE TABLE before (n bigint, g grown, gs grown[], s shrunk)")
	reader := newRowReader(t, db, "before")
	const rows = 50
	for n := range rows {
		db.Exec(t, fmt.Sprintf("INSERT INTO before VALUES (%d, (1, ''), ARRAY[(2, NULL)::grown, (NULL, 'x')::grown], (3, 'gone', 'c'))", n))
	}
	db.Exec(t, "ALTER TYPE grown ADD ATTRIBUTE c date", "ALTER TYPE shrunk DROP ATTRIBUTE b")
	for _, e := range reader.next(rows) {
		reader.same(&e)
	}
	if reader.lookUps != 1 {
		t.Errorf("types were looked up %d times", reader.lookUps)
	}
}

// A type may be dropped between a row and its decoding.
func TestRowsOfDroppedTypes(t *testing.T) {
	t.Parallel()
	db := pgtest.New(t)
	db.Exec(t, "CREATE TYPE mood AS ENUM ('fine')", "CREATE TYPE pair AS (a int)", "CREATE TABLE short (n bigint, m mood, p pair, t text)")
	reader := newRowReader(t, db, "short")
	db.Exec(t, "INSERT INTO short VALUES (1, 'fine', ROW(5)::pair, 'x')", "ALTER TABLE short DROP COLUMN m, DROP COLUMN p", "DROP TYPE mood, pair",
		"INSERT INTO short VALUES (2, 'y')")
	events := reader.next(2)
	if got, want := string(events[0].Payload), `{"n":1,"m":"fine","p":"(5)","t":"x"}`; got != want {
		t.Errorf("the row is %s, want %s", got, want)
	}
	reader.same(&events[1])
}
