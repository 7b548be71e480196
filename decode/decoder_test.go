package decode

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"ebb/event"
)

// shown is an event as the tests compare it. A key of "-" is none.
type shown struct {
	Index                   uint64
	ID, Topic, Key, Payload string
	Headers                 string
}

func show(e *event.Event) shown {
	s := shown{e.Position.Index, string(e.ID), string(e.Topic), string(e.Key), string(e.Payload), ""}
	if e.Key == nil {
		s.Key = "-"
	}
	for _, h := range e.Headers {
		s.Headers += fmt.Sprintf("%s=%s;", h.Name, h.Value)
	}
	return s
}

func TestCaptureGivesItsEvents(t *testing.T) {
	d, batch := New(Config{Epochs: epoch(7)}), event.NewBatch()
	var commits []event.LSN // of each event, by the Begin before it
	var begin beginMessage
	for _, msg := range capture(t) {
		if msg[0] == 'B' {
			begin, _ = parseBegin(msg)
		}
		if err := d.Decode(msg, batch); err != nil {
			t.Fatalf("%q: %v", msg, err)
		}
		if inside := msg[0] != 'C' && !strings.Contains(string(msg), "outside"); d.InTransaction() != inside {
			t.Fatalf("%q: InTransaction = %v", msg, !inside)
		}
		for len(commits) < len(batch.Events) {
			commits = append(commits, begin.final)
		}
	}

	var big strings.Builder
	want := []shown{
		{1, "1", "member.added", "group-1", `{"n":  1}`, "n=7;traceparent=00-ab-cd-01;"},
		{1, "2", "member.added", "-", "null", ""},
		{2, "3", "grüße.✓", "", `"žluťoučký 🐎 \u00e9"`, ""},
		// 3 and 4 are rows of app.account.
		{5, "4", "member.removed", "group-1", "[]", "=;f=1.50;o={\"a\": [1, \"}\"]};q=\"\\ ü \n;t=true;z=null;"},
		// 1 is a logical message.
		{2, "5", "after.message", "-", "1", ""},
		// The row with id 6 was rolled back.
		{1, "7", "after.alter", "group-2", "2", ""},
		{1, "8", "big", "-", "", ""},
	}
	for i := range 50 {
		want = append(want, shown{uint64(i + 1), fmt.Sprint(9 + i), "many", fmt.Sprint("k", (i+1)%3), fmt.Sprint(i + 1), ""})
	}
	want = append(want, shown{1, "59", "from.elsewhere", "-", "3", ""})
	var got []shown
	for i := range batch.Events {
		e := &batch.Events[i]
		if e.Position.Epoch != 7 || e.Position.Commit != commits[i] || e.ContentType != "application/json" || e.Origin != event.Streamed {
			t.Errorf("event %d: position %s in transaction %s, %q, origin %q", i, e.Position, commits[i], e.ContentType, e.Origin)
		}
		if i > 0 && e.Position.Compare(batch.Events[i-1].Position) <= 0 {
			t.Errorf("event %d: position %s does not follow %s", i, e.Position, batch.Events[i-1].Position)
		}
		got = append(got, show(e))
		if got[i].Topic == "big" {
			big.WriteString(got[i].Payload)
			got[i].Payload = ""
		}
	}
	if diff := gocmp.Diff(want, got); diff != "" {
		t.Errorf("events (-want +got):\n%s", diff)
	}
	if p := big.String(); len(p) != 2+600*32 || !strings.HasPrefix(p, `"c4ca4238a0b923820dcc509a6f75849b`) {
		t.Errorf("big payload: %d bytes, %.40s", len(p), p)
	}

	var at []int
	for i, m := range batch.Marks {
		at = append(at, m.Events)
		if m.Events > 0 && m.First <= commits[m.Events-1] || i > 0 && m.First <= batch.Marks[i-1].Last {
			t.Errorf("mark %d: %+v", i, m)
		}
	}
	if diff := gocmp.Diff([]int{1, 4, 5, 6, 7, 57, 58}, at); diff != "" {
		t.Errorf("marks (-want +got):\n%s", diff)
	}
	wantSkipped := Skipped{Unmapped: 2, Updates: 2, Deletes: 1, Truncates: 1, Messages: 3}
	if got := d.Skipped(); got != wantSkipped {
		t.Errorf("skipped %+v, want %+v", got, wantSkipped)
	}
	// A transaction from elsewhere carries the time that its origin gave it.
	wantTime := time.Date(2026, 1, 2, 3, 4, 5, 678901000, time.UTC)
	if got := batch.Events[len(batch.Events)-1].Time; got != wantTime || d.CommitTime() != wantTime {
		t.Errorf("time %v and %v, want %v", got, d.CommitTime(), wantTime)
	}
}

func epoch(n uint32) event.Epochs { return event.Epochs{{Number: n}} }

func TestSkipThroughLeavesOutDeliveredEventsWhereverTheBatchIsCut(t *testing.T) {
	msgs := capture(t)
	decode := func(d *Decoder, batch *event.Batch) {
		t.Helper()
		for _, msg := range msgs {
			if err := d.Decode(msg, batch); err != nil {
				t.Fatal(err)
			}
		}
	}
	all := event.NewBatch()
	decode(New(Config{Epochs: epoch(1)}), all)
	for i := range all.Events {
		d := New(Config{Epochs: epoch(1), Skip: Skip{Through: all.Events[i].Position}})
		rest := event.NewBatch()
		decode(d, rest)
		if skipped := d.Skipped().Delivered; skipped != uint64(i+1) {
			t.Fatalf("skipped %d events through %s, want %d", skipped, all.Events[i].Position, i+1)
		}
		if diff := gocmp.Diff(all.Events[i+1:], append([]event.Event{}, rest.Events...)); diff != "" {
			t.Fatalf("after %s (-want +got):\n%s", all.Events[i].Position, diff)
		}
		if got, want := rest.Marks[len(rest.Marks)-1].Last, all.Marks[len(all.Marks)-1].Last; got != want {
			t.Fatalf("last mark %s, want %s", got, want)
		}
	}

	var cut []event.Event
	for d, i := New(Config{Epochs: epoch(1)}), 0; i < len(msgs); i++ {
		batch := event.NewBatch()
		if err := d.Decode(msgs[i], batch); err != nil {
			t.Fatal(err)
		}
		cut = append(cut, batch.Events...)
	}
	if diff := gocmp.Diff(all.Events, cut); diff != "" {
		t.Errorf("a batch for every message (-want +got):\n%s", diff)
	}
}

// The messages that the tests below build.
func begin(lsn uint64) []byte {
	b := binary.BigEndian.AppendUint64([]byte{'B'}, lsn)
	return append(b, make([]byte, 12)...)
}

func commit(lsn uint64) []byte {
	b := binary.BigEndian.AppendUint64([]byte{'C', 0}, lsn)
	return append(binary.BigEndian.AppendUint64(b, lsn+8), make([]byte, 8)...)
}

// relation builds a Relation message for ebb.buffer, with columns given as "name type".
func relation(id uint32, columns ...string) []byte {
	b := append(binary.BigEndian.AppendUint32([]byte{'R'}, id), "ebb\x00buffer\x00d"...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(columns)))
	for _, c := range columns {
		name, typ, _ := strings.Cut(c, " ")
		oid := map[string]uint32{"int8": 20, "text": 25, "json": 114, "varchar": 1043, "jsonb": 3802, "bytea": 17, "app.doc": 70000, "uuid": 2950, "pair": oidPair,
			"pairs": oidPairs}[typ]
		b = append(append(append(b, 0), name...), 0)
		b = append(binary.BigEndian.AppendUint32(b, oid), 0xff, 0xff, 0xff, 0xff)
	}
	return b
}

// insert builds an Insert message. Of a value, the first byte is the kind.
func insert(id uint32, values ...string) []byte {
	b := append(binary.BigEndian.AppendUint32([]byte{'I'}, id), 'N')
	b = binary.BigEndian.AppendUint16(b, uint16(len(values)))
	for _, v := range values {
		if b = append(b, v[0]); v[0] == 't' || v[0] == 'b' {
			b = append(binary.BigEndian.AppendUint32(b, uint32(len(v)-1)), v[1:]...)
		}
	}
	return b
}

var managed = relation(1, "id int8", "topic text", "key text", "payload json", "headers jsonb")

func announce(id uint32, namespace, name string) []byte {
	return append(binary.BigEndian.AppendUint32([]byte{'Y'}, id), namespace+"\x00"+name+"\x00"...)
}

func TestOwnTable(t *testing.T) {
	for name, test := range map[string]struct {
		buffer      Buffer
		relation    []byte
		row         []byte
		want        shown
		contentType string
	}{
		"position as id, literal topic": {
			Buffer{TopicValue: "account.changed", Payload: "doc"},
			relation(1, "n int8", "doc jsonb"), insert(1, "t5", "t{}"),
			shown{1, "3:0/10:1", "account.changed", "-", "{}", ""}, "application/json",
		},
		"text": {
			Buffer{ID: "n", Topic: "n", Key: "doc", Payload: "doc"},
			relation(1, "doc text", "n int8"), insert(1, "t", "t5"),
			shown{1, "5", "5", "", "", ""}, "text/plain; charset=utf-8",
		},
		"varchar, json headers": {
			Buffer{ID: "n", TopicValue: "t", Payload: "doc", Headers: "h"},
			relation(1, "doc varchar", "n int8", "h json"), insert(1, "tx", "t5", `t{"b":1,"a":"2","b":3}`),
			shown{1, "5", "t", "-", "x", "b=1;a=2;b=3;"}, "text/plain; charset=utf-8",
		},
		"domain over json": {
			Buffer{ID: "n", TopicValue: "t", Payload: "doc"},
			relation(1, "doc app.doc", "n int8"), insert(1, "t1", "t5"),
			shown{1, "5", "t", "-", "1", ""}, "application/json",
		},
		"bytea": {
			Buffer{ID: "n", TopicValue: "t", Payload: "doc"},
			relation(1, "doc bytea", "n int8"), insert(1, `t\x00ff10`, "t5"),
			shown{1, "5", "t", "-", "\x00\xff\x10", ""}, "application/octet-stream",
		},
		"empty bytea, content type": {
			Buffer{ID: "n", TopicValue: "t", Payload: "doc", ContentType: "image/png"},
			relation(1, "doc bytea", "n int8"), insert(1, `t\x`, "t5"),
			shown{1, "5", "t", "-", "", ""}, "image/png",
		},
		"text, content type": {
			Buffer{ID: "n", TopicValue: "t", Payload: "doc", ContentType: "application/xml"},
			relation(1, "doc text", "n int8"), insert(1, "t<a/>", "t5"),
			shown{1, "5", "t", "-", "<a/>", ""}, "application/xml",
		},
		"whole row": {
			Buffer{ID: "n", TopicValue: "t"},
			relation(1, "doc json", "n int8", "note text", "data bytea"), insert(1, `t{"a":  1}`, "t5", "n", `t\x00`),
			shown{1, "5", "t", "-", `{"doc":{"a":  1},"n":5,"note":null,"data":"\\x00"}`, ""}, "application/json",
		},
		"columns that are not mapped do not matter": {
			Buffer{ID: "n", TopicValue: "t", Payload: "doc"},
			relation(1, "x int8", "doc json", "y bytea", "n int8"), insert(1, "u", "t1", "b\xff", "t5"),
			shown{1, "5", "t", "-", "1", ""}, "application/json",
		},
	} {
		t.Run(name, func(t *testing.T) {
			test.buffer.Schema, test.buffer.Table = "ebb", "buffer"
			d, batch := New(Config{Epochs: epoch(3), Buffers: []Buffer{test.buffer}}), event.NewBatch()
			for _, msg := range [][]byte{begin(16), announce(70000, "", "json"), test.relation, test.row, commit(16)} {
				if err := d.Decode(msg, batch); err != nil {
					t.Fatal(err)
				}
			}
			if diff := gocmp.Diff(test.want, show(&batch.Events[0])); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
			if got := batch.Events[0].ContentType; got != test.contentType {
				t.Errorf("content type %q, want %q", got, test.contentType)
			}
		})
	}
}

func TestErrors(t *testing.T) {
	good := insert(1, "t1", "ttopic", "n", "t{}", "n")
	own := func(b Buffer) []Buffer {
		b.Schema, b.Table = "ebb", "buffer"
		return []Buffer{b}
	}
	type msgs = [][]byte
	for _, test := range []struct {
		is      error
		want    string
		buffers []Buffer
		msgs    msgs
	}{
		{ErrMalformed, `it is empty`, nil, msgs{{}}},
		{ErrMalformed, `'?' at byte 0: protocol version 1 has no such message`, nil, msgs{{'?'}}},
		{ErrMalformed, `'S' at byte 0: protocol version 1 has no such message; turn streaming and two_phase off`, nil, msgs{{'S', 0}}},
		{ErrMalformed, `Begin at byte 9: needs 8 bytes, has 2`, nil, msgs{begin(16)[:11]}},
		{ErrMalformed, `Begin at byte 21: 1 bytes are left over`, nil, msgs{append(begin(16), 0)}},
		{ErrMalformed, `Begin at byte 0: transaction 0/10 has not ended`, nil, msgs{begin(16), begin(17)}},
		{ErrMalformed, `Commit at byte 0: no transaction has begun`, nil, msgs{commit(16)}},
		{ErrMalformed, `Commit at byte 2: commits 0/11 in transaction 0/10`, nil, msgs{begin(16), commit(17)}},
		{ErrMalformed, `Commit at byte 2: flags 0x1, want none`, nil, msgs{append([]byte{'C', 1}, make([]byte, 24)...)}},
		{ErrMalformed, `Insert at byte 0: no transaction has begun`, nil, msgs{managed, good}},
		{ErrMalformed, `Insert at byte 1: relation 1 was not announced`, nil, msgs{begin(16), good}},
		{ErrMalformed, `Insert at byte 6: a row of 1 columns for ebb.buffer, which has 5`, nil, msgs{begin(16), managed, insert(1, "n")}},
		{ErrMalformed, `Insert at byte 9: column 1 has kind 'x'`, nil, msgs{begin(16), managed, insert(1, "x")}},
		{ErrMalformed, `Insert at byte 13: needs 4294967295 bytes, has 1`, nil, msgs{begin(16), managed, []byte("I\x00\x00\x00\x01N\x00\x01t\xff\xff\xff\xffx")}},
		{ErrMalformed, `Insert at byte 6: row 1:0/10:1 of ebb.buffer: column 4 has kind 'u', want text or null`, nil, msgs{begin(16), managed, insert(1, "t1", "tt", "n", "u", "n")}},
		{ErrMalformed, `Insert at byte 6: row 1:0/10:1 of ebb.buffer: column 1 has kind 'b', want text or null`, nil, msgs{begin(16), managed, insert(1, "b1", "tt", "n", "t1", "n")}},
		{ErrMalformed, `Relation at byte 5: the string has no end`, nil, msgs{managed[:7]}},
		{ErrMalformed, `Relation at byte 19: needs 1 bytes, has 0`, nil, msgs{append(managed[:17:17], 0xff, 0xff)}},
		{ErrMalformed, `Truncate at byte 6: needs 4 bytes, has 0`, nil, msgs{{'T', 0xff, 0xff, 0xff, 0xff, 0}}},
		{ErrMalformed, `Message at byte 2: flags 0x2, want 0 or 1`, nil, msgs{append([]byte{'M', 2}, make([]byte, 13)...)}},
		{ErrMalformed, `Message at byte 0: no transaction has begun`, nil, msgs{append([]byte{'M', 1}, make([]byte, 13)...)}},
		{ErrMalformed, `Update at byte 6: row kind 'X', want 'N'`, nil, msgs{[]byte("U\x00\x00\x00\x01X\x00\x00")}},
		{ErrMalformed, `Delete at byte 6: row kind 'N', want 'K' or 'O'`, nil, msgs{[]byte("D\x00\x00\x00\x01N\x00\x00")}},

		{ErrMapping, `ebb.buffer: column "payload" is not in the publication; run ebb setup`, nil, msgs{relation(1, "id int8", "topic text", "key text", "headers jsonb")}},
		{ErrMapping, `ebb.buffer: column "id" is not in the publication; run ebb setup`, nil, msgs{relation(1)}},
		{ErrMapping, `ebb.buffer: column "payload" has type with OID 2950; make it json, jsonb, text, varchar or bytea`, nil, msgs{relation(1, "id int8", "topic text", "key text", "payload uuid", "headers jsonb")}},
		{ErrMapping, `ebb.buffer: column "payload" has type with OID 70000; make it json, jsonb, text, varchar or bytea`, nil, msgs{relation(1, "id int8", "topic text", "key text", "payload app.doc", "headers jsonb")}},
		{ErrMapping, `ebb.buffer: column "headers" has type app.doc; make it json or jsonb`, nil, msgs{announce(70000, "app", "doc"), relation(1, "id int8", "topic text", "key text", "payload json", "headers app.doc")}},
		{ErrMapping, `ebb.buffer: column "headers" has type text; make it json or jsonb`, nil, msgs{relation(1, "id int8", "topic text", "key text", "payload json", "headers text")}},
		{ErrMapping, `table ebb.buffer: column "doc": nothing is known of the type with OID 70000`, own(Buffer{TopicValue: "t"}), msgs{relation(1, "doc app.doc")}},
		{ErrMapping, `ebb.buffer: there is no topic; name a topic column or give a value`, own(Buffer{Payload: "payload"}), msgs{managed}},

		{ErrRow, `ebb.buffer: row with id "5" at 1:0/10:1: column "doc": want bytea in hex format; set bytea_output = hex`,
			own(Buffer{ID: "n", TopicValue: "t", Payload: "doc"}), msgs{begin(16), relation(1, "n int8", "doc bytea"), insert(1, "t5", `t\\x00`)}},
		{ErrRow, `column "doc": want bytea in hex format; set bytea_output = hex`,
			own(Buffer{ID: "n", TopicValue: "t", Payload: "doc"}), msgs{begin(16), relation(1, "n int8", "doc bytea"), insert(1, "t5", `t\x0`)}},
		{ErrRow, `ebb.buffer: row with id "5" at 1:0/10:1: impossible event: column "doc": a value of the type with OID 114 is not the text of JSON at byte 0`,
			own(Buffer{ID: "n", TopicValue: "t"}), msgs{begin(16), relation(1, "n int8", "doc json"), insert(1, "t5", "t{")}},
		{ErrMalformed, `Insert at byte 6: row 1:0/10:1 of ebb.buffer: column 2 has kind 'u', want text or null`,
			own(Buffer{TopicValue: "t"}), msgs{begin(16), relation(1, "n int8", "doc json"), insert(1, "t5", "u")}},
	} {
		d, batch := New(Config{Epochs: epoch(1), Buffers: test.buffers}), event.NewBatch()
		last := len(test.msgs) - 1
		for _, msg := range test.msgs[:last] {
			if err := d.Decode(msg, batch); err != nil {
				t.Fatalf("%s: too early: %v", test.want, err)
			}
		}
		events := len(batch.Events)
		err := d.Decode(test.msgs[last], batch)
		if !errors.Is(err, test.is) || !strings.HasSuffix(fmt.Sprint(err), test.want) {
			t.Errorf("got  %v\nwant %v: … %s", err, test.is, test.want)
		}
		if len(batch.Events) != events {
			t.Errorf("%s: an event was appended", test.want)
		}
	}
}

func TestResetForgetsTheConnection(t *testing.T) {
	d, batch := New(Config{}), event.NewBatch()
	row := insert(1, "t1", "tt", "n", "t1", "n")
	for _, msg := range [][]byte{begin(16), managed, row} {
		if err := d.Decode(msg, batch); err != nil {
			t.Fatal(err)
		}
	}
	d.Reset()
	if d.InTransaction() {
		t.Error("still in the transaction")
	}
	if err := cmp.Or(d.Decode(begin(32), batch), d.Decode(row, batch)); !errors.Is(err, ErrMalformed) {
		t.Errorf("a row of a relation that was forgotten: %v", err)
	}
}

func TestRecoveredRowGivesTheEventOfTheSlot(t *testing.T) {
	d, streamed, recovered := New(Config{Epochs: epoch(1)}), event.NewBatch(), event.NewBatch()
	for _, msg := range [][]byte{begin(16), managed, insert(1, "t7", "tt", "t", "t[1]", `t{"a":"b","n":1}`)} {
		if err := d.Decode(msg, streamed); err != nil {
			t.Fatal(err)
		}
	}
	want := streamed.Events[0]
	want.Position, want.Origin = event.Position{Epoch: 1}, event.Recovered
	want.Time = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)

	managed := Managed()
	row := Row{
		ID: []byte("7"), Topic: []byte("t"), Key: []byte{}, Payload: []byte("[1]"), Headers: []byte(`{"a":"b","n":1}`),
		PayloadType: 114, Time: want.Time.In(time.FixedZone("", 3600)), Position: want.Position,
	}
	if err := managed.AppendRow(recovered, row); err != nil {
		t.Fatal(err)
	}
	clear(row.Payload) // AppendRow has not kept it
	if diff := gocmp.Diff([]event.Event{want}, recovered.Events); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}

	for want, err := range map[string]error{
		`row at 1:0/0:0: column "id" of ebb.buffer is NULL; declare it NOT NULL`:               managed.AppendRow(recovered, Row{Position: want.Position, PayloadType: 114}),
		`column "payload" has type with OID 2950; make it json, jsonb, text, varchar or bytea`: managed.AppendRow(recovered, Row{PayloadType: 2950}),
		`ebb.own has no id column, and a row that is recovered has no position of its own`:     (&Buffer{Schema: "ebb", Table: "own"}).AppendRow(recovered, Row{}),
	} {
		if !strings.HasSuffix(fmt.Sprint(err), want) || !errors.Is(err, ErrRow) && !errors.Is(err, ErrMapping) {
			t.Errorf("got %v, want … %s", err, want)
		}
	}
}

// What is wrong with one row, which nobody can mend in the log, is a fault of its event. The rows around it are not concerned.
func TestFaults(t *testing.T) {
	own := func(b Buffer) []Buffer {
		b.Schema, b.Table = "ebb", "buffer"
		return []Buffer{b}
	}
	managed := relation(1, "id int8", "topic text", "key text", "payload json", "headers jsonb")
	bytea := relation(1, "n int8", "payload bytea")
	place := event.Position{Epoch: 1, Commit: 16, Index: 1}
	for _, test := range []struct {
		buffers []Buffer
		table   []byte
		row     []byte
		want    event.Event
	}{
		{nil, managed, insert(1, "n", "tt", "tk", "t1", "n"),
			event.Event{ID: []byte("1:0/10:1"), Topic: []byte("t"), Key: []byte("k"), Payload: []byte("1"), Fault: `column "id" of ebb.buffer is NULL; declare it NOT NULL`}},
		{nil, managed, insert(1, "t"+strings.Repeat("9", 1001), "tt", "n", "t1", "n"),
			event.Event{ID: []byte("1:0/10:1"), Topic: []byte("t"), Payload: []byte("1"), Fault: `column "id" of ebb.buffer has 1001 bytes, and an id has 1000 at most: ` + strings.Repeat("9", 1000) + `... (1001 bytes)`}},
		{own(Buffer{ID: "n", NotNumber: true, TopicValue: "t", Payload: "payload"}), bytea, insert(1, "t5", `t\x61`),
			event.Event{ID: []byte("1:0/10:1"), Topic: []byte("t"), Payload: []byte("a"), ContentType: "application/octet-stream",
				Fault: `column "n" of ebb.buffer is a number, 5, and so are the ids of another buffer, so that one event could be taken for the other: use a uuid, or put something before it`}},
		{nil, managed, insert(1, "t9", "n", "n", "t1", "n"),
			event.Event{ID: []byte("9"), Payload: []byte("1"), Fault: `column "topic" of ebb.buffer is NULL; declare it NOT NULL`}},
		{nil, managed, insert(1, "t9", "tt", "n", "n", "t{\"a\":\"b\"}"),
			event.Event{ID: []byte("9"), Topic: []byte("t"), Headers: []event.Header{{Name: []byte("a"), Value: []byte("b")}},
				Fault: `column "payload" of ebb.buffer is NULL; declare it NOT NULL`}},
		{nil, managed, insert(1, "t9", "tt", "n", "t1", "t[]"),
			event.Event{ID: []byte("9"), Topic: []byte("t"), Payload: []byte("1"), Fault: `column "headers" of ebb.buffer: want a JSON object: []`}},
		{nil, managed, insert(1, "t9", "tt", "n", "t1", "t{"),
			event.Event{ID: []byte("9"), Topic: []byte("t"), Payload: []byte("1"), Fault: `column "headers" of ebb.buffer: want a JSON object: {`}},
		{nil, managed, insert(1, "t9", "tt", "n", "t1", "t null"), event.Event{ID: []byte("9"), Topic: []byte("t"), Payload: []byte("1")}},
		{nil, managed, insert(1, "t9", "n", "n", "n", "t"+strings.Repeat("x", 1001)),
			event.Event{ID: []byte("9"), Fault: `column "topic" of ebb.buffer is NULL; declare it NOT NULL, and column "payload" of ebb.buffer is NULL; declare it NOT NULL, ` +
				`and column "headers" of ebb.buffer: want a JSON object: ` + strings.Repeat("x", 1000) + `... (1001 bytes)`}},
		{own(Buffer{ID: "n", TopicValue: "t", Payload: "payload"}), bytea, insert(1, "t5", "n"),
			event.Event{ID: []byte("5"), Topic: []byte("t"), ContentType: "application/octet-stream", Fault: `column "payload" of ebb.buffer is NULL; declare it NOT NULL`}},
	} {
		d, batch := New(Config{Epochs: epoch(1), Buffers: test.buffers}), event.NewBatch()
		stream := [][]byte{begin(16), test.table, test.row, test.row, commit(16)}
		for _, msg := range stream {
			if err := d.Decode(msg, batch); err != nil {
				t.Fatal(err)
			}
		}
		if len(batch.Events) != 2 {
			t.Fatalf("%d events, want 2", len(batch.Events))
		}
		test.want.Position, test.want.ContentType = place, cmp.Or(test.want.ContentType, jsonType)
		test.want.Time = batch.Events[0].Time
		if diff := gocmp.Diff(test.want, batch.Events[0]); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		if a, b := batch.Events[0].Fault, batch.Events[1].Fault; a != b {
			t.Errorf("the same row again has fault %q, want %q", b, a)
		}
	}
}

// What was delivered under an id that is a number is known again when another buffer has come whose ids are numbers.
func TestLeaveOutByTheIDOfBefore(t *testing.T) {
	buffers := []Buffer{{Schema: "ebb", Table: "buffer", ID: "id", NotNumber: true, TopicValue: "t", Payload: "payload"}}
	at := func(index uint64) event.Position { return event.Position{Epoch: 1, Commit: 16, Index: index} }
	is := func(id string) func([]byte) bool { return func(b []byte) bool { return string(b) == id } }
	for _, test := range []struct {
		name string
		skip Skip
		want []string
	}{
		{"nothing", Skip{}, []string{"1:0/10:1", "1:0/10:2", "1:0/10:3"}},
		{"the tail", Skip{Through: at(2), ID: "8", Comes: true}, []string{"1:0/10:3"}},
		{"the tail, by position", Skip{Through: at(2), ID: "1:0/10:2", Comes: true}, []string{"1:0/10:3"}},
		{"another table's event of that id is held", Skip{Through: at(1), ID: "7", Held: is("8")}, []string{"1:0/10:2", "1:0/10:3"}},
		{"held, by position", Skip{Through: at(1), ID: "7", Held: is("1:0/10:2")}, []string{"1:0/10:3"}},
		{"set aside", Skip{Through: at(3), ID: "9", Counted: true, Count: 2, Aside: func(id []byte, _ event.Position) bool { return is("8")(id) }}, nil},
	} {
		d, batch := New(Config{Epochs: epoch(1), Buffers: buffers, Skip: test.skip}), event.NewBatch()
		for _, msg := range [][]byte{begin(16), managed, insert(1, "t7", "tt", "n", "t1", "n"), insert(1, "t8", "tt", "n", "t1", "n"),
			insert(1, "t9", "tt", "n", "t1", "n"), commit(16)} {
			if err := d.Decode(msg, batch); err != nil {
				t.Fatalf("%s: %v", test.name, err)
			}
		}
		var got []string
		for _, e := range batch.Events {
			got = append(got, string(e.ID))
		}
		if diff := gocmp.Diff(test.want, got); diff != "" {
			t.Errorf("%s (-want +got):\n%s", test.name, diff)
		}
	}
}

// warm returns a decoder and a transaction of one insert with a payload of 250 bytes, for which the decoder and the batch have
// memory.
func warm(tb testing.TB, headers string) (*Decoder, *event.Batch, [][]byte) {
	d, batch := New(Config{Epochs: epoch(1)}), event.NewBatch()
	payload := `t"` + strings.Repeat("x", 248) + `"`
	tx := [][]byte{begin(16), insert(1, "t123456", "tmember.added", "tgroup-1", payload, headers), commit(16)}
	for _, msg := range append([][]byte{managed}, tx...) {
		if err := d.Decode(msg, batch); err != nil {
			tb.Fatal(err)
		}
	}
	return d, batch, tx
}

var hotHeaders = map[string]string{
	"no headers":  "n",
	"traceparent": `t{"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}`,
}

func TestDecodeAllocatesNothing(t *testing.T) {
	for name, headers := range hotHeaders {
		d, batch, tx := warm(t, headers)
		allocs := testing.AllocsPerRun(100, func() {
			batch.Reset()
			for _, msg := range tx {
				if err := d.Decode(msg, batch); err != nil {
					t.Fatal(err)
				}
			}
		})
		if allocs != 0 || len(batch.Events) != 1 {
			t.Errorf("%s: %v allocations for %d events", name, allocs, len(batch.Events))
		}
	}
}

func BenchmarkDecode(b *testing.B) {
	for name, headers := range hotHeaders {
		b.Run(name, func(b *testing.B) {
			d, batch, tx := warm(b, headers)
			if err := d.Decode(tx[0], batch); err != nil {
				b.Fatal(err)
			}
			b.SetBytes(int64(len(tx[1])))
			b.ReportAllocs()
			for b.Loop() {
				if len(batch.Events) == 1000 {
					batch.Reset()
				}
				if err := d.Decode(tx[1], batch); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
