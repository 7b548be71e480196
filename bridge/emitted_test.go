package bridge_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"ebb/event"
	"ebb/internal/natstest"
	"ebb/internal/pgtest"
	"ebb/sink"
)

// payloads returns what was delivered, with an "m" before that of a message, whose id is its position.
func payloads(t *testing.T, events []event.Event) []string {
	t.Helper()
	var all []string
	for _, e := range events {
		switch isMessage := strings.Contains(string(e.ID), ":"); {
		case isMessage && string(e.ID) != e.Position.String():
			t.Errorf("message %s at %s has id %s", e.Payload, e.Position, e.ID)
		case isMessage:
			all = append(all, "m"+string(e.Payload))
		default:
			all = append(all, string(e.Payload))
		}
	}
	return all
}

func same(t *testing.T, got []string, want ...string) {
	t.Helper()
	if diff := gocmp.Diff(want, got); diff != "" {
		t.Errorf("delivered (-want +got):\n%s", diff)
	}
}

// mix commits rows and messages, some of them forged or rolled back, in several transactions, and returns what is to be delivered.
func (f *fixture) mix() []string {
	f.t.Helper()
	f.db.Exec(f.t,
		`SELECT ebb.emit('t', '1')`,
		`SELECT ebb.put('t', '2'), ebb.emit('t', '3', 'k'), ebb.put('t', '4')`,
		`SELECT pg_logical_emit_message(true, 'ebb', 'forged'), ebb.emit('t', '5'), ebb.emit('t', '6'), pg_logical_emit_message(true, 'other', ''), ebb.put('t', '7')`,
		`BEGIN; SELECT ebb.emit('t', '"rolled back"'); SELECT ebb.put('t', '"rolled back"'); ROLLBACK`,
		`BEGIN; SELECT ebb.emit('t', '8'); SAVEPOINT a; SELECT ebb.emit('t', '"rolled back"'); ROLLBACK TO a; SELECT ebb.put('t', '9'); RELEASE a; COMMIT`,
		`SELECT pg_logical_emit_message(false, 'ebb', 'forged')`,
		`SELECT ebb.put('t', '10')`,
		`SELECT ebb.emit('t', '11')`,
		`SELECT pg_logical_emit_message(true, 'ebb', (SELECT '\x00112233445566778899aabbccddeeff'::bytea || '\x01'))`)
	return []string{"m1", "2", "m3", "4", "m5", "m6", "7", "m8", "9", "10", "m11"}
}

// A bridge that is killed behind every single event delivers rows and messages once, in the order of their commits.
func TestMessagesAndRestarts(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	s := newExactSink()
	want := f.mix()
	s.dies = func(int) bool { return true }
	for n := 1; n <= len(want); n++ {
		if err := f.run(s).wait(); !errors.Is(err, errDied) {
			t.Fatalf("the bridge ended with %v", err)
		}
		same(t, payloads(t, s.all()), want[:n]...)
	}
	s.dies = nil
	r := f.run(s)
	f.db.Exec(t, `SELECT ebb.emit('t', '12')`)
	s.await(t, len(want)+1)
	f.settle()
	r.stop()
	same(t, payloads(t, s.all()), append(want, "m12")...)
}

// In a stream, the id of a message is its position, and everything else is as of a row.
func TestMessagesInAStream(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	server := natstest.New(t)
	js := server.JetStream(t)
	for n := uint64(3); n <= 6; n += 3 { // the second time behind a message
		r := f.run(f.stream(server))
		f.db.Exec(t, `SELECT ebb.put('a.b', '1', 'k'), ebb.emit('a.b', '{"a":  1, "a": 2}', 'k', '{"traceparent": "00-x", "n": 1}')`)
		f.db.Exec(t, `SELECT ebb.emit('t', '"last"')`)
		pgtest.Eventually(t, patience, func() (bool, string) {
			stream, err := js.Stream(t.Context(), "EBB")
			if err != nil {
				return false, err.Error()
			}
			have := stream.CachedInfo().State.Msgs
			return have >= n, fmt.Sprintf("%d messages are in the stream", have)
		})
		r.stop()
	}
	messages := server.Messages(t, "EBB")
	if len(messages) != 6 {
		t.Fatalf("the stream holds %d messages", len(messages))
	}
	m := messages[4]
	position := m.Header.Get("Ebb-Position")
	if m.Header.Get("ce-id") != position || !strings.HasSuffix(position, ":2") || m.Subject != "ebb.a.b" || string(m.Data) != `{"a":  1, "a": 2}` ||
		m.Header.Get("ce-subject") != "k" || m.Header.Get("traceparent") != "00-x" || m.Header.Get("n") != "1" ||
		m.Header.Get("content-type") != "application/json" || m.Header.Get("ce-type") != "a.b" || m.Header.Get("ce-time") == "" {
		t.Errorf("the message is %s %v %s", m.Subject, m.Header, m.Data)
	}
}

// unticked delivers something that no tick records. Before it, everything is recorded.
func (f *fixture) unticked(s *exactSink, as sink.Sink, statements ...string) {
	f.t.Helper()
	r := f.run(as)
	f.db.Exec(f.t, `SELECT ebb.emit('t', '"ticked"'), ebb.put('t', '"ticked"')`)
	s.await(f.t, 2)
	f.settle()
	r.stop()
	cfg := f.config(as)
	cfg.TickEvery = time.Hour
	r = f.runWith(cfg)
	f.db.Exec(f.t, statements...)
	s.await(f.t, 2+len(statements))
	r.stop()
}

// When the slot is lost, messages that the stream holds are no events of which this database knows nothing, and those that the slot held are
// gone. The rest goes on.
func TestMessagesAndALostSlot(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	s := newExactSink()
	f.unticked(s, s, `SELECT ebb.emit('t', '1')`, `SELECT ebb.put('t', '2')`, `SELECT ebb.emit('t', '3')`)
	f.db.Exec(t, `SELECT ebb.put('t', '4'), ebb.emit('t', '"lost"')`, "SELECT pg_drop_replication_slot('"+f.slot+"')")
	r := f.run(s)
	s.await(t, 6)
	f.awaitBacklog(0)
	f.db.Exec(t, `SELECT ebb.emit('t', '5')`)
	s.await(t, 7)
	r.stop()
	same(t, payloads(t, s.all()), `m"ticked"`, `"ticked"`, "m1", "2", "m3", "4", "m5")
}

// What a destination has forgotten and the slot still holds is delivered again, messages and all.
func TestForgottenMessages(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	s := newExactSink()
	f.unticked(s, s, `SELECT ebb.emit('t', '1')`, `SELECT ebb.put('t', '2')`, `SELECT ebb.emit('t', '3')`)
	s.mu.Lock()
	s.events = s.events[:3]
	s.last = s.events[2].Position
	s.mu.Unlock()
	r := f.run(s)
	s.await(t, 5)
	f.awaitBacklog(0)
	r.stop()
	same(t, payloads(t, s.all()), `m"ticked"`, `"ticked"`, "m1", "2", "m3")
}

// sharedSink is an exact sink that others may store messages in.
type sharedSink struct{ *exactSink }

func (s sharedSink) Resume(ctx context.Context, known sink.Known) (sink.Tail, error) {
	tail, err := s.exactSink.Resume(ctx, known)
	tail.Exclusive = false
	return tail, err
}

// Where others store messages as well, what is held behind the newest tick is known by its id.
func TestMessagesAmongOthers(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	s := newExactSink()
	shared := sharedSink{s}
	f.unticked(s, shared, `SELECT ebb.emit('t', '1')`, `SELECT ebb.put('t', '2')`, `SELECT ebb.emit('t', '3')`)
	r := f.run(shared)
	f.db.Exec(t, `SELECT ebb.emit('t', '4')`)
	s.await(t, 6)
	f.settle()
	r.stop()
	same(t, payloads(t, s.all()), `m"ticked"`, `"ticked"`, "m1", "2", "m3", "m4")
}

// Somebody who may not emit, and writes messages with ebb's prefix, gets nothing delivered, and is heard of.
func TestForgedMessagesAreSaid(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	var log lockedBuffer
	f.log = slog.New(slog.NewTextHandler(&log, nil))
	s := newExactSink()
	r := f.run(s)
	r.await("leader")
	for i := range 10 {
		f.db.Exec(t, "SELECT pg_logical_emit_message(true, 'ebb', 'x')", fmt.Sprintf("SELECT ebb.put('t', '%d')", i))
		s.await(t, i+1)
	}
	r.stop()
	// With the first one, and each time that there are twice as many.
	if n := strings.Count(log.String(), "pg_logical_emit_message"); n < 1 || n > 4 {
		t.Errorf("it was said %d times:\n%s", n, &log)
	}
	if got := s.count(); got != 10 {
		t.Errorf("%d events were delivered", got)
	}
}
