package replication

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"ebb/event"
)

// fakeServer is the other end of a stream: the test speaks the protocol by hand. It reads and forgets what the stream
// sends, and counts the statuses among it.
type fakeServer struct {
	t        *testing.T
	conn     net.Conn
	statuses chan []byte
}

func newFake(t *testing.T, interval, silence time.Duration) (*Stream, *fakeServer) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	client, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	server, err := listener.Accept()
	if err != nil {
		t.Fatal(err)
	}
	f := &fakeServer{t: t, conn: server, statuses: make(chan []byte, 10_000)}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			var head [5]byte
			if _, err := io.ReadFull(server, head[:]); err != nil {
				return
			}
			body := make([]byte, binary.BigEndian.Uint32(head[1:])-4)
			if _, err := io.ReadFull(server, body); err != nil {
				return
			}
			switch {
			case head[0] == 'd' && body[0] == 'r':
				f.statuses <- body
			case head[0] == 'c':
				f.send(frameOf('c', nil), frameOf('C', []byte("COPY 0\x00")))
			}
		}
	}()
	t.Cleanup(func() {
		client.Close()
		server.Close()
		<-done
	})
	s := &Stream{conn: client, interval: interval, silence: silence, buf: make([]byte, gulpSize), wake: make(chan struct{}, 1)}
	s.lastRead, s.lastStatus = time.Now(), time.Now()
	s.write.Store(1)
	s.flush.Store(1)
	return s, f
}

func (f *fakeServer) send(b ...[]byte) {
	for _, part := range b {
		// The stream may have hung up on what came before.
		_, _ = f.conn.Write(part)
	}
}

func frameOf(kind byte, body []byte) []byte {
	out := binary.BigEndian.AppendUint32([]byte{kind}, uint32(4+len(body)))
	return append(out, body...)
}

func xlogData(data string) []byte {
	head := binary.BigEndian.AppendUint64([]byte{'w'}, 7)
	head = binary.BigEndian.AppendUint64(head, 9)
	head = binary.BigEndian.AppendUint64(head, 1_000_000)
	return frameOf('d', append(head, data...))
}

func keepalive(end uint64, reply byte) []byte {
	b := binary.BigEndian.AppendUint64([]byte{'k'}, end)
	b = binary.BigEndian.AppendUint64(b, 1_000_000)
	return frameOf('d', append(b, reply))
}

// next fills until there is a message or an error.
func next(t *testing.T, s *Stream) (Message, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for {
		if msg, ok, err := s.Next(); ok || err != nil {
			return msg, err
		}
		if err := s.Fill(ctx, false); err != nil {
			return Message{}, err
		}
		if ctx.Err() != nil {
			t.Fatal("no message, no error")
		}
	}
}

func TestMessages(t *testing.T) {
	s, f := newFake(t, time.Minute, time.Minute)
	large := strings.Repeat("x", 5<<20)
	go f.send(xlogData("one"), frameOf('N', []byte("notice")), keepalive(77, 0), xlogData(large), xlogData(""))
	for _, want := range []string{"one", "keepalive", large, ""} {
		msg, err := next(t, s)
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case want == "keepalive":
			if msg.Data != nil || msg.WALEnd != 77 || !msg.SendTime.Equal(postgresEpoch.Add(time.Second)) {
				t.Errorf("keepalive came as %+v", msg)
			}
		case msg.Data == nil || string(msg.Data) != want || msg.WALEnd != 9 || !msg.SendTime.Equal(postgresEpoch.Add(time.Second)):
			t.Errorf("want %d bytes, got %d up to %s at %s", len(want), len(msg.Data), msg.WALEnd, msg.SendTime)
		}
	}
	// A byte at a time is no message until the last one; and the memory that the large one took is given back.
	for _, b := range keepalive(78, 1) {
		if _, ok, err := s.Next(); ok || err != nil {
			t.Fatal(ok, err)
		}
		f.send([]byte{b})
	}
	if msg, err := next(t, s); err != nil || msg.WALEnd != 78 {
		t.Fatal(msg, err)
	}
	if len(s.buf) != gulpSize {
		t.Errorf("the buffer has %d bytes after a large message", len(s.buf))
	}
	if !s.dirty.Load() {
		t.Error("a keepalive that asks for a reply gets none before the interval is over")
	}
}

func TestWhatEndsAStream(t *testing.T) {
	pgError := frameOf('E', []byte("SFATAL\x00C57P01\x00Mterminating\x00\x00"))
	for name, c := range map[string]struct {
		sent []byte
		end  bool // the server hangs up
		is   error
		code string
		text string
	}{
		"length of zero":    {sent: []byte{'d', 0, 0, 0, 0, 1}, text: "impossible length 0"},
		"length of three":   {sent: []byte{'d', 0, 0, 0, 3}, text: "impossible length 3"},
		"negative length":   {sent: []byte{'d', 0xFF, 0xFF, 0xFF, 0xFF}, text: "impossible length"},
		"unknown message":   {sent: frameOf('?', nil), text: "unexpected message '?'"},
		"empty copy data":   {sent: frameOf('d', nil), text: "malformed copy data of 0 bytes"},
		"unknown copy data": {sent: frameOf('d', []byte("p01234567")), text: "malformed"},
		"short XLogData":    {sent: frameOf('d', []byte("w01234567012345670123456")), text: "malformed copy data of 24 bytes"},
		"short keepalive":   {sent: frameOf('d', []byte("k0123456701234567")), text: "malformed copy data of 17 bytes"},
		"long keepalive":    {sent: frameOf('d', []byte("k012345670123456701")), text: "malformed copy data of 19 bytes"},
		"error":             {sent: pgError, code: "57P01"},
		"malformed error":   {sent: frameOf('E', []byte("Sno end")), text: "decode the server's error"},
		"copy done":         {sent: frameOf('c', nil), is: ErrEnded},
		"command complete":  {sent: frameOf('C', []byte("COPY 0\x00")), is: ErrEnded},
		"hang-up":           {end: true, is: io.ErrUnexpectedEOF},
		"truncated message": {sent: xlogData("half of it")[:20], end: true, is: io.ErrUnexpectedEOF},
		"truncated length":  {sent: []byte{'d', 0, 0}, end: true, is: io.ErrUnexpectedEOF},
	} {
		t.Run(name, func(t *testing.T) {
			s, f := newFake(t, time.Minute, time.Minute)
			f.send(keepalive(5, 0), c.sent)
			if c.end {
				f.conn.Close()
			}
			if msg, err := next(t, s); err != nil || msg.WALEnd != 5 {
				t.Fatalf("what came before: %+v, %v", msg, err)
			}
			_, err := next(t, s)
			var pg *pgconn.PgError
			switch {
			case err == nil:
				t.Fatal("no error")
			case c.is != nil && !errors.Is(err, c.is):
				t.Errorf("got %v, want %v", err, c.is)
			case c.code != "" && (!errors.As(err, &pg) || pg.Code != c.code):
				t.Errorf("got %v, want SQLSTATE %s", err, c.code)
			case !strings.Contains(err.Error(), c.text):
				t.Errorf("got %v, want %q", err, c.text)
			}
			if IsPermanent(err) {
				t.Errorf("%v counts as permanent", err)
			}
		})
	}
}

// A server that says nothing is asked, and given up after a while; one that answers is not.
func TestSilence(t *testing.T) {
	s, f := newFake(t, 20*time.Millisecond, 200*time.Millisecond)
	began := time.Now()
	if _, err := next(t, s); !errors.Is(err, ErrSilent) {
		t.Fatalf("got %v, want ErrSilent", err)
	}
	if d := time.Since(began); d < 200*time.Millisecond || d > 5*time.Second {
		t.Errorf("gave up after %s", d)
	}
	asked := 0
	for len(f.statuses) > 0 {
		if status := <-f.statuses; status[33] == 1 {
			asked++
		}
	}
	if asked < 3 {
		t.Errorf("the server was asked %d times", asked)
	}

	s, f = newFake(t, 20*time.Millisecond, 200*time.Millisecond)
	for i := range 30 {
		status := <-f.statusWhile(s)
		if status[33] != 1 {
			t.Fatal("a status does not ask for a reply")
		}
		f.send(keepalive(uint64(i+1), 0))
		if msg, err := next(t, s); err != nil || msg.WALEnd != event.LSN(i+1) {
			t.Fatal(msg, err)
		}
	}
}

// statusWhile fills until a status was sent.
func (f *fakeServer) statusWhile(s *Stream) <-chan []byte {
	f.t.Helper()
	ctx, cancel := context.WithCancel(f.t.Context())
	defer cancel()
	out := make(chan []byte, 1)
	go func() {
		out <- <-f.statuses
		cancel()
	}()
	if err := s.Fill(ctx, false); err != nil {
		f.t.Fatal(err)
	}
	return out
}

// Of several that confirm at once, the furthest is what the server is told, and it is told soon, whatever the owner waits for.
func TestConfirmWakesTheOwner(t *testing.T) {
	position := func(b []byte) [3]uint64 {
		return [3]uint64{binary.BigEndian.Uint64(b[1:]), binary.BigEndian.Uint64(b[9:]), binary.BigEndian.Uint64(b[17:])}
	}
	for name, owner := range map[string]func(*Stream, context.Context) error{
		"Fill": func(s *Stream, ctx context.Context) error { return s.Fill(ctx, false) },
		"Hand": func(s *Stream, ctx context.Context) error { return s.Hand(ctx, nil, event.NewBatch()) },
		"Wait": func(s *Stream, ctx context.Context) error { return s.Wait(ctx, nil) },
	} {
		t.Run(name, func(t *testing.T) {
			s, f := newFake(t, time.Hour, time.Hour)
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() { done <- owner(s, ctx) }()
			var most time.Duration
			for lsn := event.LSN(10); lsn < 3000; lsn += 10 {
				began := time.Now()
				both := make(chan struct{})
				go func() {
					s.Confirm(lsn-5, lsn-7)
					close(both)
				}()
				s.Confirm(lsn, lsn-2)
				<-both
				for {
					got := position(<-f.statuses)
					if got[0] > uint64(lsn) || got[1] > uint64(lsn-2) || got[1] != got[2] || got[0] < got[1] {
						t.Fatalf("told %v at %d", got, lsn)
					}
					if got[0] == uint64(lsn) && got[1] == uint64(lsn-2) {
						break
					}
				}
				most = max(most, time.Since(began))
			}
			if most > time.Second {
				t.Errorf("the server was told after %s", most)
			}
			cancel()
			if err := <-done; err != nil && !errors.Is(err, context.Canceled) {
				t.Error(err)
			}
			s.Confirm(5, 5)
			if s.write.Load() < 2990 || s.dirty.Load() {
				t.Error("a confirmation went back")
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// However the bytes are cut, the stream yields the same messages, and whatever they are, it does not panic.
func FuzzFrames(f *testing.F) {
	f.Add(append(append(xlogData("one"), keepalive(7, 1)...), frameOf('c', nil)...), uint16(3))
	f.Add(frameOf('E', []byte("SFATAL\x00C57P01\x00Mx\x00\x00")), uint16(1))
	f.Add([]byte{'d', 0xFF, 0xFF, 0xFF, 0xFF}, uint16(5))
	f.Add([]byte{'d', 0, 0, 0, 2, 0}, uint16(2))
	parse := func(b []byte, cut int) (out []string) {
		s := &Stream{buf: make([]byte, 16), conn: &bytesConn{rest: b, cut: cut}}
		for {
			msg, ok, err := s.Next()
			switch {
			case err != nil:
				return append(out, err.Error())
			case ok:
				out = append(out, string(msg.Data)+msg.WALEnd.String()+msg.SendTime.String())
				continue
			}
			if whole := s.complete(); whole {
				panic("complete, and there is no message")
			}
			if err := s.read(); err != nil {
				return append(out, err.Error())
			}
		}
	}
	f.Fuzz(func(t *testing.T, b []byte, cut uint16) {
		whole, parts := parse(b, len(b)+1), parse(b, int(cut)+1)
		if strings.Join(whole, "\n") != strings.Join(parts, "\n") {
			t.Errorf("in one piece %q, in pieces of %d %q", whole, cut+1, parts)
		}
	})
}

// bytesConn yields cut bytes a read.
type bytesConn struct {
	net.Conn
	rest []byte
	cut  int
}

func (c *bytesConn) Read(p []byte) (int, error) {
	if len(c.rest) == 0 {
		return 0, io.EOF
	}
	n := copy(p, c.rest[:min(c.cut, len(c.rest))])
	c.rest = c.rest[n:]
	return n, nil
}
