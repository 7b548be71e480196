package decode

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"
	"unicode/utf8"

	"ebb/event"
)

// The types that the tests below make up.
const (
	oidPair     = 70001 + iota // (a int, "b""" text)
	oidPairs                   // pair[]
	oidNested                  // (p pair, ps pair[], n int[])
	oidDropped                 // (a int, b text), b of which was dropped, (c text)
	oidNothing                 // ()
	oidOne                     // (x text)
	oidDictType                // hstore
	oidDictArray
	oidPosint  // domain over int4
	oidPosint2 // domain over posint
	oidInts    // domain over int[]
	oidIntsArray
)

var testTypes = Types{
	oidPair:      {Kind: Composite, Attributes: []Attribute{{Name: "a", Type: oidInt4}, {Name: `b"`, Type: oidText}}},
	oidPairs:     {Kind: Array, Element: oidPair, Delimiter: ','},
	oidNested:    {Kind: Composite, Attributes: []Attribute{{Name: "p", Type: oidPair}, {Name: "ps", Type: oidPairs}, {Name: "n", Type: 1007}}},
	oidDropped:   {Kind: Composite, Attributes: []Attribute{{Name: "a", Type: oidInt4}, {Dropped: true}, {Name: "c", Type: oidText}}},
	oidNothing:   {Kind: Composite},
	oidOne:       {Kind: Composite, Attributes: []Attribute{{Name: "x", Type: oidText}}},
	oidDictType:  {Kind: HStore},
	oidDictArray: {Kind: Array, Element: oidDictType, Delimiter: ','},
	oidPosint:    {Kind: Domain, Base: oidInt4},
	oidPosint2:   {Kind: Domain, Base: oidPosint},
	oidInts:      {Kind: Domain, Base: 1007},
	oidIntsArray: {Kind: Array, Element: oidInts, Delimiter: ','},
}

func encoderOf(tb testing.TB, oid uint32) *RowEncoder {
	tb.Helper()
	e, err := NewRowEncoder([]Column{{"v", oid}}, testTypes)
	if err != nil {
		tb.Fatal(err)
	}
	return e
}

// rowValues are texts with what they are as JSON; "" says that they are none. Those that Postgres writes are compared with to_jsonb in the
// tests of package bridge; here are those as well that it never does.
var rowValues = []struct {
	oid        uint32
	text, want string
}{
	{oidBool, "t", "true"}, {oidBool, "false", "false"}, {oidBool, "x", ""}, {oidBool, "", ""},
	{oidInt4, "-5", "-5"}, {oidPosint2, "7", "7"}, {oidNumeric, "1.50", "1.50"}, {oidFloat8, "1e+300", "1e+300"}, {oidFloat8, "-0", "-0"},
	{oidNumeric, "NaN", `"NaN"`}, {oidFloat4, "-Infinity", `"-Infinity"`}, {oidInt4, "01", `"01"`}, {oidInt4, "", `""`}, {oidInt4, "1.", `"1."`},
	{oidInt4, "-", `"-"`}, {oidInt4, "1e", `"1e"`}, {oidInt4, "1e+", `"1e+"`}, {oidInt4, ".5", `".5"`}, {oidInt4, "1 ", `"1 "`}, {oidInt4, "+1", `"+1"`},
	{oidText, "a\"\\/\b\f\n\r\t\v\x00\x7fü🐎", `"a\"\\/\b\f\n\r\t\u000b\u0000` + "\x7fü🐎\""},
	{oidText, "\xff\xc3(\xed\xa0\x80", `"` + "\ufffd\ufffd(\ufffd\ufffd\ufffd" + `"`}, {oidText, "\ufffd", "\"\ufffd\""},
	{oidJSON, "{\"a\":  1,\n \"a\": 2}", "{\"a\":  1,\n \"a\": 2}"}, {oidJSON, "", ""}, {oidJSON, "{", ""}, {oidJSONB, `1,"x":2`, ""},
	{oidJSON, "\"\xff\"", "\"\ufffd\""},
	{oidTimestamp, "2026-01-02 03:04:05.6", `"2026-01-02T03:04:05.6"`}, {oidTimestamp, "0044-03-15 03:04:05 BC", `"0044-03-15T03:04:05 BC"`},
	{oidTimestamp, "-infinity", `"-infinity"`}, {oidTimestampTZ, "infinity", `"infinity"`}, {oidTimestamp, "", `""`},
	{oidTimestampTZ, "2026-01-02 03:04:05+00", `"2026-01-02T03:04:05+00:00"`}, {oidTimestampTZ, "2026-01-02 03:04:05-03:30", `"2026-01-02T03:04:05-03:30"`},
	{oidTimestampTZ, "1800-01-02 03:04:05+00:53:28", `"1800-01-02T03:04:05+00:53:28"`}, {oidTimestampTZ, "0044-03-15 03:04:05-11 BC", `"0044-03-15T03:04:05-11:00 BC"`},
	{oidTimestampTZ, "Fri Jan 02 03:04:05 2026 UTC", `"Fri Jan 02 03:04:05 2026 UTC"`}, {oidTimestamp, `2026-01-02 "`, `"2026-01-02 \""`},
	{1082, "2026-01-02", `"2026-01-02"`}, {oidBytea, `\x00`, `"\\x00"`},

	{1007, "{}", "[]"}, {1007, "{1,NULL,3}", "[1,null,3]"}, {1007, "[2:3]={1,2}", "[1,2]"}, {1007, "[-1:0][0:0]={{1},{2}}", "[[1],[2]]"},
	{1007, "{{{{{{1}}}}}}", "[[[[[[1]]]]]]"}, {1007, "{{{{{{{1}}}}}}}", ""}, {1009, `{"a\"b\\c","NULL",NULL,"",null}`, `["a\"b\\c","NULL",null,"","null"]`},
	{1009, `{"a,b",c d,"{}"}`, `["a,b","c d","{}"]`}, {oidBoxArray, "{(3,4),(1,2);(1,1),(0,0)}", `["(3,4),(1,2)","(1,1),(0,0)"]`},
	{1000, "{t,f,NULL}", "[true,false,null]"}, {199, `{"{\"a\": [1]}"}`, `[{"a": [1]}]`}, {oidIntsArray, `{"{1,2}",NULL,"{}"}`, "[[1,2],null,[]]"},
	{1007, "", ""}, {1007, "{", ""}, {1007, "{1", ""}, {1007, "{1,", ""}, {1007, "{1,}", ""}, {1007, "{,1}", ""}, {1007, "{1}x", ""}, {1007, "1}", ""}, {1009, `{"a}`, ""},
	{1009, `{"a"b}`, ""}, {1009, `{a"b"}`, ""}, {1009, `{"a\`, ""}, {1009, `{a\b}`, ""}, {1007, "[1:2]", ""}, {1007, "[x]={1}", ""}, {1007, "{{1}", ""}, {1009, "{a{b}}", ""},
	{1007, "{{1}2}", ""}, {1000, "{x}", ""},

	{oidInt2Vector, "", "[]"}, {oidInt2Vector, "1 -2", "[1,-2]"}, {oidOIDVector, "1 4294967295", `["1","4294967295"]`}, {1006, `{"1 2",3,""}`, "[[1,2],[3],[]]"},
	{oidInt2Vector, " 1", ""}, {oidInt2Vector, "1 ", ""}, {oidInt2Vector, "1  2", ""},

	{oidPair, "(1,x)", `{"a":1,"b\"":"x"}`}, {oidPair, `(,"")`, `{"a":null,"b\"":""}`}, {oidPair, "(,)", `{"a":null,"b\"":null}`},
	{oidPair, `(1,"a""b\\c,(d)")`, `{"a":1,"b\"":"a\"b\\c,(d)"}`}, {oidPair, `(1," ")`, `{"a":1,"b\"":" "}`},
	{oidPairs, `{"(1,\"a\"\"\\\\b\")",NULL}`, `[{"a":1,"b\"":"a\"\\b"},null]`},
	{oidNested, `("(1,"" x"")","{""(2,\\""y\\"")"",NULL}","{3,4}")`, `{"p":{"a":1,"b\"":" x"},"ps":[{"a":2,"b\"":"y"},null],"n":[3,4]}`},
	{oidNothing, "()", "{}"}, {oidOne, "()", `{"x":null}`}, {oidOne, `("")`, `{"x":""}`}, {oidDropped, "(1,x)", `{"a":1,"c":"x"}`},
	{oidPair, "", ""}, {oidPair, "(", ""}, {oidPair, "(1,x", ""}, {oidPair, "1,x)", ""}, {oidPair, "(1,x)y", ""}, {oidPair, "(1,x,y)", ""}, {oidPair, "(1)", ""},
	{oidPair, `(1,"x)`, ""}, {oidPair, `(1,"x"y)`, ""}, {oidPair, `(1,x"y")`, ""}, {oidPair, `(1,"x\`, ""}, {oidPair, "(1,(x)", ""}, {oidNothing, "(1)", ""},
	{oidNothing, "(,)", ""}, {oidDropped, "(1,x,y)", ""}, {oidOne, "(,)", ""}, {oidNested, "((1,x),,)", ""},

	{oidDictType, "", "{}"}, {oidDictType, `"a"=>"1", "b"=>NULL, ""=>""`, `{"a":"1","b":null,"":""}`}, {oidDictType, `"a\"\\"=>"\"=>\\"`, `{"a\"\\":"\"=>\\"}`},
	{oidDictType, `"NULL"=>"NULL"`, `{"NULL":"NULL"}`}, {oidDictArray, `{"\"a\"=>\"\\\"\"",NULL}`, `[{"a":"\""},null]`},
	{oidDictType, `"a"`, ""}, {oidDictType, `"a"=>`, ""}, {oidDictType, `"a"=>1`, ""}, {oidDictType, `a=>"1"`, ""}, {oidDictType, `"a"=>"1",`, ""},
	{oidDictType, `"a"=>"1", `, ""}, {oidDictType, `"a"=>"1" "b"=>"2"`, ""}, {oidDictType, `"a"=>"1`, ""}, {oidDictType, `"a"=>NULLx`, ""}, {oidDictType, ` "a"=>"1"`, ""},
}

func TestRowValues(t *testing.T) {
	for _, test := range rowValues {
		e := encoderOf(t, test.oid)
		for range 2 { // the second time with a scratch that was used
			got, err := e.Append([]byte("before"), [][]byte{[]byte(test.text)})
			want := "before"
			if test.want != "" {
				want = `before{"v":` + test.want + "}"
			}
			if string(got) != want || (err == nil) != (test.want != "") {
				t.Errorf("%d %q: got %s, %v; want %s", test.oid, test.text, got, err, want)
			}
			if err != nil && (!errors.Is(err, ErrRow) || !strings.Contains(err.Error(), `column "v"`)) {
				t.Errorf("%d %q: %v", test.oid, test.text, err)
			}
			if len(e.scratch) > 0 {
				t.Errorf("%d %q: %d bytes are left in the scratch", test.oid, test.text, len(e.scratch))
			}
		}
	}
}

// A composite value may be from before attributes were added, or dropped, if the types are from a later time.
func TestRowValuesFromBeforeTheirTypes(t *testing.T) {
	for _, test := range []struct {
		oid        uint32
		text, want string
	}{
		{oidPair, "(1)", `{"a":1,"b\"":null}`}, {oidPair, "()", `{"a":null,"b\"":null}`}, {oidPair, "(1,x,y)", ""},
		{oidNested, `("(1)","{(2),(3)}")`, `{"p":{"a":1,"b\"":null},"ps":[{"a":2,"b\"":null},{"a":3,"b\"":null}],"n":null}`},
		{oidDropped, "(1,x,y)", `{"a":1,"c":"y"}`}, {oidDropped, "(1,x)", `{"a":1,"c":"x"}`}, {oidDropped, "(1)", ""}, {oidDropped, "(1,x,y,z)", ""},
	} {
		e := encoderOf(t, test.oid)
		e.later = true
		got, err := e.Append(nil, [][]byte{[]byte(test.text)})
		if test.want != "" && (err != nil || string(got) != `{"v":`+test.want+"}") {
			t.Errorf("%q: got %s, %v; want %s", test.text, got, err, test.want)
		}
		changed := (*UnknownTypeError)(nil)
		if test.want == "" && (!errors.As(err, &changed) || !changed.Changed || changed.Column != "v" || changed.OID != test.oid) {
			t.Errorf("%q: got %s, %v", test.text, got, err)
		}
	}
}

func TestRowEncoder(t *testing.T) {
	e, err := NewRowEncoder([]Column{{"a", oidInt4}, {"\"\\\nü\xff", oidText}, {"p", oidPair}}, testTypes)
	if err != nil {
		t.Fatal(err)
	}
	got, err := e.Append(nil, [][]byte{[]byte("1"), nil, []byte("(2,)")})
	if want := `{"a":1,"\"\\\nü` + "\ufffd" + `":null,"p":{"a":2,"b\"":null}}`; err != nil || string(got) != want {
		t.Errorf("got %s, %v, want %s", got, err, want)
	}
	if _, err := e.Append(nil, [][]byte{nil}); !errors.Is(err, ErrRow) {
		t.Errorf("too few values: %v", err)
	}
	if e, err := NewRowEncoder(nil, nil); err != nil {
		t.Error(err)
	} else if got, err := e.Append(nil, nil); err != nil || string(got) != "{}" {
		t.Errorf("a row without columns is %s, %v", got, err)
	}

	unknown := (*UnknownTypeError)(nil)
	if _, err := NewRowEncoder([]Column{{"a", oidInt4}, {"b", oidPairs}}, Types{oidPairs: testTypes[oidPairs]}); !errors.As(err, &unknown) ||
		unknown.OID != oidPair || unknown.Column != "b" || unknown.Changed || !errors.Is(err, ErrMapping) {
		t.Errorf("an element that is not known: %v", err)
	}
	for name, types := range map[string]Types{
		"made of itself": {1: {Kind: Composite, Attributes: []Attribute{{Name: "a", Type: 2}}}, 2: {Kind: Array, Element: 1}},
		"of no kind":     {1: {}},
	} {
		if _, err := NewRowEncoder([]Column{{"a", 1}}, types); !errors.Is(err, ErrMapping) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if got := testTypes.Unknown([]uint32{oidInt4, oidPair, 5, 1007, 6}); fmt.Sprint(got) != "[5 6]" {
		t.Errorf("unknown are %d", got)
	}
}

// The rows that come by the slot and those that are read from the table are the same; without an encoder there is an error.
func TestRecoveredWholeRow(t *testing.T) {
	buffer := Buffer{Schema: "ebb", Table: "buffer", ID: "n", TopicValue: "t"}
	d, streamed, recovered := New(Config{Epochs: epoch(1), Buffers: []Buffer{buffer}, LookUp: func(oids []uint32) (Types, event.LSN, error) {
		if fmt.Sprint(oids) != "[70000]" {
			t.Errorf("looked up %d", oids)
		}
		return Types{70000: {Kind: Domain, Base: oidJSON}}, 5, nil
	}}), event.NewBatch(), event.NewBatch()
	for _, msg := range [][]byte{begin(16), relation(1, "n int8", "doc app.doc", "x text"), insert(1, "t5", `t{"a": 1}`, "n")} {
		if err := d.Decode(msg, streamed); err != nil {
			t.Fatal(err)
		}
	}
	row := Row{ID: []byte("5"), Values: [][]byte{[]byte("5"), []byte(`{"a": 1}`), nil}}
	if err := buffer.AppendRow(recovered, row); !errors.Is(err, ErrMapping) {
		t.Errorf("without an encoder: %v", err)
	}
	var err error
	if row.Encoder, err = NewRowEncoder([]Column{{"n", oidInt8}, {"doc", oidJSON}, {"x", oidText}}, nil); err != nil {
		t.Fatal(err)
	}
	if err := buffer.AppendRow(recovered, row); err != nil {
		t.Fatal(err)
	}
	a, b := streamed.Events[0], recovered.Events[0]
	if want := `{"n":5,"doc":{"a": 1},"x":null}`; string(a.Payload) != want || string(b.Payload) != want || b.ContentType != a.ContentType {
		t.Errorf("streamed %s %s, recovered %s %s, want %s", a.Payload, a.ContentType, b.Payload, b.ContentType, want)
	}
	row.Values[1] = []byte("{")
	if err := buffer.AppendRow(recovered, row); !errors.Is(err, ErrRow) || !strings.Contains(err.Error(), `ebb.buffer: row with id "5"`) {
		t.Errorf("a row that is none: %v", err)
	}
}

// What alters a type can be in the log already, and be decoded, before it is seen in the catalog: while it waits for a synchronous standby.
func TestTypesReadTooEarly(t *testing.T) {
	early := Types{70000: {Kind: Composite, Attributes: []Attribute{{Name: "a", Type: oidInt4}}}}
	now := Types{70000: {Kind: Composite, Attributes: []Attribute{{Name: "a", Type: oidInt4}, {Name: "b", Type: oidInt4}}}}
	lookUps := 0
	d, batch := New(Config{Epochs: epoch(1), Buffers: []Buffer{{Schema: "ebb", Table: "buffer", TopicValue: "t"}}, LookUp: func([]uint32) (Types, event.LSN, error) {
		if lookUps++; lookUps == 1 {
			return early, 1 << 40, nil
		}
		return now, 1 << 40, nil
	}}), event.NewBatch()
	for _, msg := range [][]byte{begin(16), relation(1, "v app.doc"), insert(1, "t(1)"), insert(1, "t(1,2)"), insert(1, "t(3,4)")} {
		if err := d.Decode(msg, batch); err != nil {
			t.Fatal(err)
		}
	}
	for i, want := range []string{`{"v":{"a":1}}`, `{"v":{"a":1,"b":2}}`, `{"v":{"a":3,"b":4}}`} {
		if got := string(batch.Events[i].Payload); got != want {
			t.Errorf("row %d is %s, want %s", i+1, got, want)
		}
	}
	if lookUps != 2 {
		t.Errorf("types were looked up %d times", lookUps)
	}
}

// The error of a look-up ends the Decode, and the batch stays as it was.
func TestFailedLookUp(t *testing.T) {
	down := errors.New("down")
	d, batch := New(Config{Buffers: []Buffer{{Schema: "ebb", Table: "buffer", TopicValue: "t"}}, LookUp: func([]uint32) (Types, event.LSN, error) {
		return nil, 0, down
	}}), event.NewBatch()
	if err := d.Decode(begin(16), batch); err != nil {
		t.Fatal(err)
	}
	if err := d.Decode(relation(1, "doc app.doc"), batch); !errors.Is(err, down) {
		t.Errorf("got %v", err)
	}
}

// fuzzValue checks that what comes out for a text is valid JSON, in UTF-8, or an error.
func fuzzValue(f *testing.F, oids ...uint32) {
	for _, test := range rowValues {
		for _, oid := range oids {
			if test.oid == oid {
				f.Add([]byte(test.text))
			}
		}
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		for _, oid := range oids {
			for _, later := range []bool{false, true} {
				e := encoderOf(t, oid)
				e.later = later
				got, err := e.Append(nil, [][]byte{text})
				if err != nil {
					if !errors.Is(err, ErrRow) {
						t.Errorf("error without a sentinel: %v", err)
					}
					continue
				}
				if !json.Valid(got) || !utf8.Valid(got) {
					t.Errorf("type %d makes %q of %q", oid, got, text)
				}
			}
		}
	})
}

func FuzzValidJSON(f *testing.F) {
	for _, seed := range []string{
		`{}`, ` { "a" : [ 1 , -2.5e+3 , "\u00fF\n" , true , false , null , { } , [ ] ] , "" : {"b":[[]]} } `, `"`, `"\x"`, `"\u12g4"`, "\"\n\"", `[1,]`, `{"a"}`,
		`{"a":}`, `{1:2}`, `{,}`, `[}`, `{]`, `01`, `-`, `1.`, `.5`, `1e`, `nul`, `truefalse`, `1 2`, ``, ` `, `[`, `{"a":1`, `]`, `,`, `1-2`, "\"\xff\"",
	} {
		f.Add([]byte(seed))
	}
	var stack []byte
	f.Fuzz(func(t *testing.T, text []byte) {
		var got bool
		if got, stack = validJSON(text, stack); got != json.Valid(text) {
			t.Errorf("%q is valid: %v, says encoding/json: %v", text, got, !got)
		}
	})
}

// Postgres takes JSON that is deeper than encoding/json does.
func TestDeepJSON(t *testing.T) {
	const deep = 1 << 20
	text := strings.Repeat(`[{"a":`, deep) + "1" + strings.Repeat("}]", deep)
	got, err := encoderOf(t, oidJSON).Append(nil, [][]byte{[]byte(text)})
	if err != nil || string(got) != `{"v":`+text+"}" {
		t.Errorf("it became %d bytes, %v", len(got), err)
	}
	if _, err := encoderOf(t, oidJSON).Append(nil, [][]byte{[]byte(text[:len(text)-1])}); !errors.Is(err, ErrRow) {
		t.Errorf("a bracket is missing: %v", err)
	}
}

func FuzzScalar(f *testing.F) {
	fuzzValue(f, oidBool, oidNumeric, oidText, oidJSON, oidTimestamp, oidTimestampTZ)
}

func FuzzArray(f *testing.F) {
	fuzzValue(f, 1007, 1009, 199, 1000, oidBoxArray, oidIntsArray, oidPairs, oidDictArray, 1006, oidInt2Vector)
}

func FuzzComposite(f *testing.F) {
	fuzzValue(f, oidPair, oidNested, oidDropped, oidNothing, oidOne)
}

func FuzzHStore(f *testing.F) { fuzzValue(f, oidDictType) }

// Whatever the server may send, an event of a whole row or of a message has a payload that is JSON, or there is an error.
func FuzzDecodeWholeRow(f *testing.F) {
	before := [][]byte{begin(16), relation(1, "n int8", "doc jsonb", "x text", "p pair", "ps pairs")}
	f.Add(insert(1, "t5", `t{"a": 1}`, "n", "t(1,x)", `t{"(1,x)"}`))
	f.Add(insert(1, "u", "b", "t", "n", "n"))
	f.Add(relation(2, "n int8"))
	f.Add(message(1, "ebb", emittedContent(emitToken, "t", "k", `{"a": 1}`, "1")))
	f.Add(message(1, "ebb", emitToken))
	f.Fuzz(func(t *testing.T, msg []byte) {
		d, batch := New(Config{Token: emitToken, Buffers: []Buffer{{Schema: "ebb", Table: "buffer", TopicValue: "t"}},
			LookUp: func([]uint32) (Types, event.LSN, error) { return testTypes, 0, nil }}), event.NewBatch()
		defer batch.Release()
		for _, before := range before {
			if err := d.Decode(before, batch); err != nil {
				t.Fatal(err)
			}
		}
		if err := d.Decode(msg, batch); err != nil && !errors.Is(err, ErrMalformed) && !errors.Is(err, ErrMapping) && !errors.Is(err, ErrRow) {
			t.Errorf("error without a sentinel: %v", err)
		}
		for _, e := range batch.Events {
			if row := msg[0] == 'I'; row && (!json.Valid(e.Payload) || !utf8.Valid(e.Payload)) {
				t.Errorf("the row is %q", e.Payload)
			}
		}
	})
}

// benchRow is a row as applications have them.
func benchRow(tb testing.TB) (*RowEncoder, [][]byte) {
	e, err := NewRowEncoder([]Column{
		{"id", oidInt8}, {"name", oidText}, {"active", oidBool}, {"balance", oidNumeric}, {"created_at", oidTimestampTZ}, {"tags", 1009}, {"address", oidPair},
		{"settings", oidJSONB}, {"note", oidText},
	}, testTypes)
	if err != nil {
		tb.Fatal(err)
	}
	return e, [][]byte{
		[]byte("123456"), []byte("Ada \"Countess\" Lovelace"), []byte("t"), []byte("1234.50"), []byte("2026-01-02 03:04:05.678901+00"),
		[]byte(`{a,"b c",NULL,"d\"e"}`), []byte(`(7,"Main ""St."", 1")`), []byte(`{"theme": "dark", "limits": [1, 2, 3]}`), nil,
	}
}

func TestRowEncoderAllocatesNothing(t *testing.T) {
	e, values := benchRow(t)
	dst, err := e.Append(nil, values)
	if err != nil {
		t.Fatal(err)
	}
	if allocs := testing.AllocsPerRun(100, func() {
		if dst, err = e.Append(dst[:0], values); err != nil {
			t.Fatal(err)
		}
	}); allocs != 0 {
		t.Errorf("%v allocations", allocs)
	}
}

func BenchmarkRow(b *testing.B) {
	b.Run("encoder", func(b *testing.B) {
		e, values := benchRow(b)
		dst, err := e.Append(nil, values)
		if err != nil {
			b.Fatal(err)
		}
		b.SetBytes(int64(len(dst)))
		b.ReportAllocs()
		for b.Loop() {
			if dst, err = e.Append(dst[:0], values); err != nil {
				b.Fatal(err)
			}
		}
	})
	// For scale: encoding/json writes a struct of which everything is parsed already.
	b.Run("encoding/json", func(b *testing.B) {
		e, values := benchRow(b)
		text, err := e.Append(nil, values)
		if err != nil {
			b.Fatal(err)
		}
		var row struct {
			ID        int64           `json:"id"`
			Name      string          `json:"name"`
			Active    bool            `json:"active"`
			Balance   json.Number     `json:"balance"`
			CreatedAt string          `json:"created_at"`
			Tags      []*string       `json:"tags"`
			Address   map[string]any  `json:"address"`
			Settings  json.RawMessage `json:"settings"`
			Note      *string         `json:"note"`
		}
		if err := json.Unmarshal(text, &row); err != nil {
			b.Fatal(err)
		}
		b.SetBytes(int64(len(text)))
		b.ReportAllocs()
		for b.Loop() {
			if _, err := json.Marshal(&row); err != nil {
				b.Fatal(err)
			}
		}
	})
}
