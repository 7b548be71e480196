package decode

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"

	"ebb/event"
)

// emitCapture is what pgoutput of Postgres 15 sent for
//
//	SELECT ebb.emit('tøpic', '{"a":  "\u0000ü"}'::json, 'k', '{"h": "v", "n": [1]}'), ebb.emit('t', '1')
//
// when the token was that of emitToken.
const emitCapture = `
4200000000019f0ea00003040bc2424a6b000002da
4d0100000000019f0e48656262000000004a00112233445566778899aabbccddeeff010000000674c3b8706963000000016b000000147b2268223a202276222c20226e223a205b315d7d7b2261223a2020225c7530303030c3bc227d
4d0100000000019f0ea0656262000000001f00112233445566778899aabbccddeeff010000000174ffffffffffffffff31
430000000000019f0ea000000000019f0ed00003040bc2424a6b`

var emitToken = unhexed("00112233445566778899aabbccddeeff")

func unhexed(s string) []byte {
	b, err := hex.DecodeString(s)
	if err != nil {
		panic(err)
	}
	return b
}

func emitMessages() (msgs [][]byte) {
	for _, line := range strings.Fields(emitCapture) {
		msgs = append(msgs, unhexed(line))
	}
	return msgs
}

func TestEmittedMessages(t *testing.T) {
	d, batch := New(Config{Epochs: epoch(3), Token: emitToken, Seen: func(id []byte) { t.Errorf("row %q was seen", id) }}), event.NewBatch()
	for _, msg := range emitMessages() {
		if err := d.Decode(msg, batch); err != nil {
			t.Fatal(err)
		}
		for i := range msg { // of which nothing is kept
			msg[i] = 0
		}
	}
	var got []shown
	for i := range batch.Events {
		got = append(got, show(&batch.Events[i]))
		if e := &batch.Events[i]; e.ContentType != "application/json" || e.Origin != event.Streamed || e.Time != d.CommitTime() ||
			e.Position != (event.Position{Epoch: 3, Commit: 0x19f0ea0, Index: uint64(i + 1)}) {
			t.Errorf("event %d: %+v", i, e)
		}
	}
	want := []shown{
		{1, "3:0/19F0EA0:1", "tøpic", "k", `{"a":  "\u0000ü"}`, "h=v;n=[1];"},
		{2, "3:0/19F0EA0:2", "t", "-", "1", ""},
	}
	if diff := gocmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if got := d.Skipped(); got != (Skipped{}) {
		t.Errorf("skipped %+v", got)
	}
}

// message builds a message.
func message(transactional byte, prefix string, content []byte) []byte {
	b := append([]byte{'M', transactional}, make([]byte, 8)...)
	b = append(append(b, prefix...), 0)
	return append(binary.BigEndian.AppendUint32(b, uint32(len(content))), content...)
}

// emittedContent builds what ebb.emit writes. "-" is NULL.
func emittedContent(token []byte, topic, key, headers, payload string) []byte {
	b := append(bytes.Clone(token), emitVersion)
	for _, s := range []string{topic, key, headers} {
		if s == "-" {
			b = append(b, 0xff, 0xff, 0xff, 0xff)
			continue
		}
		b = append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
	}
	return append(b, payload...)
}

// What ebb.emit has not written is no event, and counts in the position all the same.
func TestForgedMessages(t *testing.T) {
	other := bytes.Clone(emitToken)
	other[15]++
	d, batch := New(Config{Epochs: epoch(1), Token: emitToken}), event.NewBatch()
	for _, msg := range [][]byte{
		message(0, "ebb", emittedContent(emitToken, "t", "-", "-", "1")), // outside of a transaction, where ebb.emit writes none
		begin(16), managed,
		message(1, "ebb", emittedContent(other, "t", "-", "-", "1")),
		message(1, "ebb", emittedContent(nil, "t", "-", "-", "1")),
		message(1, "ebb", emitToken[:15]),
		message(1, "ebb", nil),
		message(1, "ebb2", emittedContent(emitToken, "t", "-", "-", "1")),
		message(1, "", emittedContent(emitToken, "t", "-", "-", "1")),
		message(0, "other", nil),
		insert(1, "t7", "tt", "n", "t1", "n"),
		message(1, "ebb", emittedContent(emitToken, "", "", "{}", "2")),
		commit(16),
	} {
		if err := d.Decode(msg, batch); err != nil {
			t.Fatal(err)
		}
	}
	var got []shown
	for i := range batch.Events {
		got = append(got, show(&batch.Events[i]))
	}
	if diff := gocmp.Diff([]shown{{7, "7", "t", "-", "1", ""}, {8, "1:0/10:8", "", "", "2", ""}}, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if got, want := d.Skipped(), (Skipped{Messages: 3, Forged: 5}); got != want {
		t.Errorf("skipped %+v, want %+v", got, want)
	}
}

func TestEmittedErrors(t *testing.T) {
	good := string(emittedContent(nil, "topic", "-", "-", "1"))
	for _, test := range []struct {
		is            error
		content, want string
	}{
		{ErrMalformed, "", "content of ebb.emit: it is empty"},
		{ErrMalformed, "\x02", "content of ebb.emit: it has version 2, and this ebb knows 1 alone: use a newer one"},
		{ErrMalformed, good[:4], "content of ebb.emit: topic: needs 4 bytes, has 3"},
		{ErrMalformed, good[:9], "content of ebb.emit: topic: has 5 bytes, of 4 that there are"},
		{ErrMalformed, "\x01\x7f\xff\xff\xffx", "content of ebb.emit: topic: has 2147483647 bytes, of 1 that there are"},
		{ErrMalformed, "\x01\xff\xff\xff\xfex", "content of ebb.emit: topic: has -2 bytes, of 1 that there are"},
		{ErrMalformed, good[:13], "content of ebb.emit: key: needs 4 bytes, has 3"},
		{ErrMalformed, good[:len(good)-1], "content of ebb.emit: there is no payload"},
		{ErrMalformed, string(emittedContent(nil, "-", "k", "-", "1")), "content of ebb.emit: the topic is NULL"},
	} {
		d, batch := New(Config{Epochs: epoch(1), Token: emitToken}), event.NewBatch()
		if err := d.Decode(begin(16), batch); err != nil {
			t.Fatal(err)
		}
		err := d.Decode(message(1, "ebb", append(bytes.Clone(emitToken), test.content...)), batch)
		if !errors.Is(err, test.is) || !strings.HasSuffix(fmt.Sprint(err), test.want) {
			t.Errorf("got  %v\nwant %v: … %s", err, test.is, test.want)
		}
		if len(batch.Events) > 0 {
			t.Errorf("%s: an event was appended", test.want)
		}
	}
}

// Events of messages are left out by position, by number and by id like those of rows, and are counted with them.
func TestSkipAmongMessages(t *testing.T) {
	const forged, row = 2, 3 // their indexes
	emit := message(1, "ebb", emittedContent(emitToken, "t", "-", "-", "1"))
	msgs := [][]byte{
		begin(16), managed, emit, message(1, "ebb", nil), insert(1, "t7", "tt", "n", "t1", "n"), emit, emit, commit(16), begin(32), emit, commit(32),
	}
	at := func(commit event.LSN, index uint64) event.Position {
		return event.Position{Epoch: 1, Commit: commit, Index: index}
	}
	all := []string{"1:0/10:1", "7", "1:0/10:4", "1:0/10:5", "1:0/20:1"}
	run := func(skip Skip) (ids []string, err error) {
		d, batch := New(Config{Epochs: epoch(1), Token: emitToken, Skip: skip}), event.NewBatch()
		for _, msg := range msgs {
			if err := d.Decode(msg, batch); err != nil {
				return nil, err
			}
		}
		for _, e := range batch.Events {
			ids = append(ids, string(e.ID))
		}
		return ids, nil
	}
	aside := func(place event.Position) func([]byte, event.Position) bool {
		return func(id []byte, at event.Position) bool { return string(id) == "1:0/10:4" && at == place }
	}
	for _, test := range []struct {
		name string
		skip Skip
		want []string
		err  error
	}{
		{"nothing", Skip{}, all, nil},
		{"the tail is a message", Skip{Through: at(16, 4), ID: "1:0/10:4", Comes: true}, all[3:], nil},
		{"the tail is a row behind a message", Skip{Through: at(16, row), ID: "7", Comes: true}, all[2:], nil},
		{"the tail is the last message", Skip{Through: at(32, 1), ID: "1:0/20:1", Comes: true}, nil, nil},
		{"a row where the tail is a message", Skip{Through: at(16, row), ID: "1:0/10:3"}, nil, ErrPositions},
		{"a message where the tail is a row", Skip{Through: at(16, 4), ID: "8"}, nil, ErrPositions},
		{"no event where the tail is one", Skip{Through: at(16, forged), ID: "1:0/10:2"}, nil, ErrPositions},
		{"counted", Skip{Through: at(16, 4), Counted: true, Since: at(16, 1), Count: 2}, all[3:], nil},
		{"counted with the forged one", Skip{Through: at(16, 4), Counted: true, Since: at(16, 1), Count: 3}, nil, ErrCount},
		{"more", Skip{Through: at(16, 1), More: 2}, all[3:], nil},
		{"counted without what was set aside", Skip{Through: at(16, 5), Counted: true, Since: at(16, 1), Count: 2, Aside: aside(at(16, 4))}, all[4:], nil},
		{"set aside in another epoch", Skip{Through: at(16, 5), Counted: true, Since: at(16, 1), Count: 2, Aside: aside(event.Position{Epoch: 2, Commit: 16, Index: 4})},
			nil, ErrCount},
		{"what was set aside among more", Skip{Through: at(16, 1), More: 2, Aside: aside(at(16, 4))}, []string{all[2], all[4]}, nil},
		{"held", Skip{Through: at(16, 1), Held: func(id []byte) bool { return string(id) == "1:0/10:4" || string(id) == "7" }}, all[3:], nil},
	} {
		got, err := run(test.skip)
		if !errors.Is(err, test.err) || err != nil && test.err == nil {
			t.Errorf("%s: %v, want %v", test.name, err, test.err)
		}
		if diff := gocmp.Diff(test.want, got); err == nil && diff != "" {
			t.Errorf("%s (-want +got):\n%s", test.name, diff)
		}
	}
}

func FuzzEmitted(f *testing.F) {
	for _, msg := range emitMessages()[1:3] {
		f.Add(msg[18+16:])
	}
	f.Add(emittedContent(nil, "t", "k", "{}", "1"))
	f.Add([]byte("\x01\x7f\xff\xff\xff"))
	f.Fuzz(func(t *testing.T, content []byte) {
		m, err := parseEmitted(content)
		if err != nil {
			if !errors.Is(err, ErrMalformed) {
				t.Errorf("error without a sentinel: %v", err)
			}
			return
		}
		// What was understood is all that there was.
		show := func(b []byte) string {
			if b == nil {
				return "-"
			}
			return string(b)
		}
		if m.key != nil && string(m.key) == "-" || m.headers != nil && string(m.headers) == "-" || string(m.topic) == "-" {
			return
		}
		if back := emittedContent(nil, show(m.topic), show(m.key), show(m.headers), string(m.payload)); !bytes.Equal(back, content) {
			t.Errorf("%q came back as %q", content, back)
		}
	})
}

func TestEmittedAllocatesNothing(t *testing.T) {
	d, batch := New(Config{Epochs: epoch(1), Token: emitToken}), event.NewBatch()
	msg := message(1, "ebb", emittedContent(emitToken, "member.added", "group-1", "-", `{"a": 1}`))
	if err := d.Decode(begin(16), batch); err != nil {
		t.Fatal(err)
	}
	allocs := testing.AllocsPerRun(100, func() {
		batch.Reset()
		if err := d.Decode(msg, batch); err != nil {
			t.Fatal(err)
		}
	})
	if allocs != 0 || len(batch.Events) != 1 {
		t.Errorf("%v allocations for %d events", allocs, len(batch.Events))
	}
}
