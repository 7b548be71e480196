package decode

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/jackc/pglogrepl"
	"pgregory.net/rapid"

	"ebb/event"
)

// parse parses a message of any kind into what pglogrepl makes of it.
func parse(msg []byte) (pglogrepl.Message, error) {
	row := func(values []value) *pglogrepl.TupleData {
		t := &pglogrepl.TupleData{ColumnNum: uint16(len(values))}
		for _, v := range values {
			t.Columns = append(t.Columns, &pglogrepl.TupleDataColumn{DataType: v.kind, Length: uint32(len(v.data)), Data: v.data})
		}
		return t
	}
	switch msg[0] {
	case 'B':
		m, err := parseBegin(msg)
		return &pglogrepl.BeginMessage{FinalLSN: pglogrepl.LSN(m.final), CommitTime: pgTime(m.time), Xid: m.xid}, err
	case 'C':
		m, err := parseCommit(msg)
		return &pglogrepl.CommitMessage{
			CommitLSN: pglogrepl.LSN(m.commit), TransactionEndLSN: pglogrepl.LSN(m.end), CommitTime: pgTime(m.time),
		}, err
	case 'O':
		m, err := parseOrigin(msg)
		return &pglogrepl.OriginMessage{CommitLSN: pglogrepl.LSN(m.commit), Name: string(m.name)}, err
	case 'R':
		m, err := parseRelation(msg)
		out := &pglogrepl.RelationMessage{
			RelationID: m.id, Namespace: string(m.namespace), RelationName: string(m.name),
			ReplicaIdentity: m.replicaIdentity, ColumnNum: uint16(len(m.columns)),
		}
		for _, c := range m.columns {
			out.Columns = append(out.Columns, &pglogrepl.RelationMessageColumn{
				Flags: c.flags, Name: string(c.name), DataType: c.typeID, TypeModifier: c.modifier,
			})
		}
		return out, err
	case 'Y':
		m, err := parseType(msg)
		return &pglogrepl.TypeMessage{DataType: m.id, Namespace: string(m.namespace), Name: string(m.name)}, err
	case 'I':
		var m insertMessage
		err := parseInsert(msg, &m)
		return &pglogrepl.InsertMessage{RelationID: m.relation, Tuple: row(m.row)}, err
	case 'U':
		m, err := parseUpdate(msg)
		out := &pglogrepl.UpdateMessage{RelationID: m.relation, OldTupleType: m.oldKind, NewTuple: row(m.row)}
		if m.oldKind != 0 {
			out.OldTuple = row(m.old)
		}
		return out, err
	case 'D':
		m, err := parseDelete(msg)
		return &pglogrepl.DeleteMessage{RelationID: m.relation, OldTupleType: m.oldKind, OldTuple: row(m.old)}, err
	case 'T':
		m, err := parseTruncate(msg)
		return &pglogrepl.TruncateMessage{
			RelationNum: uint32(len(m.relations)), Option: m.options, RelationIDs: m.relations,
		}, err
	case 'M':
		m, err := parseMessage(msg)
		return &pglogrepl.LogicalDecodingMessage{
			LSN: pglogrepl.LSN(m.lsn), Transactional: m.transactional, Prefix: string(m.prefix), Content: m.content,
		}, err
	}
	return nil, fmt.Errorf("unknown kind %q: %w", msg[0], ErrMalformed)
}

// peer parses a message by pglogrepl, whose panics on short input it turns into errors.
func peer(msg []byte) (m pglogrepl.Message, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	return pglogrepl.Parse(msg)
}

var samePeer = cmp.Options{
	cmpopts.IgnoreUnexported(
		pglogrepl.BeginMessage{}, pglogrepl.CommitMessage{}, pglogrepl.OriginMessage{}, pglogrepl.RelationMessage{},
		pglogrepl.TypeMessage{}, pglogrepl.InsertMessage{}, pglogrepl.UpdateMessage{}, pglogrepl.DeleteMessage{},
		pglogrepl.TruncateMessage{}, pglogrepl.LogicalDecodingMessage{}, pglogrepl.TupleData{},
	),
	cmpopts.EquateEmpty(),
	// pglogrepl counts nanoseconds, which wrap around outside of the years 1678 to 2262.
	cmp.Comparer(func(a, b time.Time) bool { return a.UnixNano() == b.UnixNano() }),
}

func TestCaptureAgreesWithPglogrepl(t *testing.T) {
	kinds := map[byte]int{}
	for _, msg := range capture(t) {
		kinds[msg[0]]++
		got, err := parse(msg)
		if err != nil {
			t.Fatalf("%q: %v", msg, err)
		}
		want, err := peer(msg)
		if err != nil {
			t.Fatalf("%q: pglogrepl: %v", msg, err)
		}
		if diff := cmp.Diff(want, got, samePeer); diff != "" {
			t.Errorf("%q (-pglogrepl +ours):\n%s", msg, diff)
		}
	}
	for _, kind := range []byte("BCORYIUDTM") {
		if kinds[kind] == 0 {
			t.Errorf("the capture has no %s message", messageName(kind))
		}
	}
}

// anyMessage draws a valid message.
func anyMessage(t *rapid.T) []byte {
	be := binary.BigEndian
	u16 := func(b []byte, v int) []byte { return be.AppendUint16(b, uint16(v)) }
	u32 := func(b []byte) []byte { return be.AppendUint32(b, rapid.Uint32().Draw(t, "uint32")) }
	u64 := func(b []byte) []byte { return be.AppendUint64(b, rapid.Uint64().Draw(t, "uint64")) }
	str := func(b []byte) []byte {
		return append(append(b, rapid.StringMatching(`[a-zü ]{0,8}`).Draw(t, "string")...), 0)
	}
	blob := func(b []byte) []byte {
		p := rapid.SliceOfN(rapid.Byte(), 0, 20).Draw(t, "bytes")
		return append(be.AppendUint32(b, uint32(len(p))), p...)
	}
	count := func(least int) int { return rapid.IntRange(least, 5).Draw(t, "count") }
	one := func(of string) byte { return rapid.SampledFrom([]byte(of)).Draw(t, "kind") }
	row := func(b []byte, least int) []byte {
		n := count(least)
		b = u16(b, n)
		for range n {
			kind := one("ntub")
			if b = append(b, kind); kind == 't' || kind == 'b' {
				b = blob(b)
			}
		}
		return b
	}

	kind := one("BCORYIUDTM")
	b := []byte{kind}
	switch kind {
	case 'B':
		b = u32(u64(u64(b)))
	case 'C':
		b = u64(u64(u64(append(b, 0))))
	case 'O':
		b = str(u64(b))
	case 'R':
		n := count(0)
		b = u16(append(str(str(u32(b))), one("dnfi")), n)
		for range n {
			b = u32(u32(str(append(b, one("\x00\x01")))))
		}
	case 'Y':
		b = str(str(u32(b)))
	case 'I':
		b = row(append(u32(b), 'N'), 1) // pglogrepl refuses a row of no columns
	case 'U':
		b = u32(b)
		if old := one("KO-"); old != '-' {
			b = row(append(b, old), 0)
		}
		b = row(append(b, 'N'), 0)
	case 'D':
		b = row(append(u32(b), one("KO")), 0)
	case 'T':
		n := count(1) // pglogrepl refuses a truncation of no tables
		b = append(be.AppendUint32(b, uint32(n)), one("\x00\x01\x02\x03"))
		for range n {
			b = u32(b)
		}
	case 'M':
		b = blob(str(u64(append(b, one("\x00\x01")))))
	}
	return b
}

func TestAnyMessageAgreesWithPglogrepl(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		msg := anyMessage(t)
		got, err := parse(msg)
		if err != nil {
			t.Fatal(err)
		}
		want, err := peer(msg)
		if err != nil {
			t.Fatalf("pglogrepl: %v", err)
		}
		if diff := cmp.Diff(want, got, samePeer); diff != "" {
			t.Errorf("-pglogrepl +ours:\n%s", diff)
		}
	})
}

func TestCutOrPaddedMessageIsMalformed(t *testing.T) {
	for _, msg := range capture(t) {
		if len(msg) > 1000 {
			continue
		}
		for n := 1; n < len(msg); n++ {
			if _, err := parse(msg[:n]); !errors.Is(err, ErrMalformed) {
				t.Fatalf("%q cut to %d bytes: %v", msg, n, err)
			}
		}
		if _, err := parse(append(bytes.Clone(msg), 0)); !errors.Is(err, ErrMalformed) {
			t.Fatalf("%q and a zero: %v", msg, err)
		}
	}
}

func FuzzDecode(f *testing.F) {
	msgs := capture(f)
	for _, msg := range msgs {
		f.Add(msg)
	}
	f.Fuzz(func(t *testing.T, msg []byte) {
		d, batch := New(Config{}), event.NewBatch()
		defer batch.Release()
		for _, before := range msgs[:2] { // Begin and the Relation of ebb.buffer
			if err := d.Decode(before, batch); err != nil {
				t.Fatal(err)
			}
		}
		err := d.Decode(msg, batch)
		if err != nil && !errors.Is(err, ErrMalformed) && !errors.Is(err, ErrMapping) && !errors.Is(err, ErrRow) {
			t.Errorf("error without a sentinel: %v", err)
		}
		if len(msg) == 0 {
			return
		}
		got, err := parse(msg)
		if err != nil {
			return // and pglogrepl may allocate what a lying length says
		}
		want, err := peer(msg)
		if err != nil {
			return
		}
		if diff := cmp.Diff(want, got, samePeer); diff != "" {
			t.Errorf("-pglogrepl +ours:\n%s", diff)
		}
	})
}
