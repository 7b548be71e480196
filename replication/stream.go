package replication

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"ebb/event"
)

const (
	// gulpSize is what one read may take from the socket. Draining a backlog is bound by wake-ups, not by decoding.
	gulpSize = 256 << 10
	// coalesceDelay is how long a reader that is behind lets the socket fill before it reads again.
	coalesceDelay = time.Millisecond
	// maxStatusInterval is how often a status is sent to a server that would wait longer (wal_receiver_status_interval).
	maxStatusInterval = 10 * time.Second
	// maxTimeout is how long the server waits, at most, for a sign of life (wal_sender_timeout), and minSilence how long the server is
	// waited for, at least.
	maxTimeout, minSilence = 20 * time.Second, 20 * time.Second
	// minStatusInterval keeps a stream from writing a status for every delivered event. A COMMIT may wait for it.
	minStatusInterval = 100 * time.Microsecond
	// busyStatusInterval is the same for a stream that is behind.
	busyStatusInterval = time.Millisecond
	// writeTimeout is how long a server that has stopped reading is waited for.
	writeTimeout = 10 * time.Second
	// maxMessage is what the protocol's signed length field can say.
	maxMessage = 1<<31 - 1
)

// ErrEnded says that the server ended the stream in good order, as it does when it shuts down.
var ErrEnded = errors.New("the server ended the replication stream")

// ErrSilent says that the server has not answered for so long that the connection counts as dead.
var ErrSilent = errors.New("the server went silent")

// Message is one message of the stream: a piece of pgoutput, or a keepalive.
type Message struct {
	// Data is one pgoutput message, valid until the next Fill; nil for a keepalive.
	Data []byte
	// WALEnd is, in a keepalive, how far the server has read the log: everything before it that concerns the slot was
	// sent before the keepalive.
	WALEnd event.LSN
	// SendTime is when the server sent the message, by its own clock.
	SendTime time.Time
}

// Stream is a replication connection that is streaming. One goroutine owns it and calls Fill, Next, Hand and Close;
// Confirm alone may be called from anywhere.
type Stream struct {
	conn     net.Conn
	interval time.Duration
	silence  time.Duration

	buf        []byte // buf[r:w] is what was read and not yet returned
	r, w       int
	lastRead   time.Time
	lastStatus time.Time
	lastAsked  time.Time // when the server was last asked to answer
	behind     bool      // what the last Fill was told

	write, flush atomic.Uint64
	dirty        atomic.Bool   // there is something to report before the interval is over
	wake         chan struct{} // a slot for one, filled when dirty is set
}

// Start starts streaming from the slot's confirmed flush, which ebb alone moves. The connection belongs to the stream
// from then on, also when Start fails.
func (c *Conn) Start(ctx context.Context, slot, publication string, confirmed event.LSN) (*Stream, error) {
	return c.start(ctx, slot, publication, 0, confirmed)
}

// StartAt starts streaming from a place behind the slot's confirmed flush. The server sends the transactions that commit there or behind it.
func (c *Conn) StartAt(ctx context.Context, slot, publication string, at event.LSN) (*Stream, error) {
	return c.start(ctx, slot, publication, at, at)
}

func (c *Conn) start(ctx context.Context, slot, publication string, at, confirmed event.LSN) (*Stream, error) {
	timeout, err := c.limitTimeout(ctx)
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	if err := c.bePatient(ctx); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	// Hijack only takes what the connection has not buffered, so that it must come before START_REPLICATION.
	hijacked, err := c.pg.Hijack()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("take over the replication connection: %w", err), c.Close())
	}
	s := &Stream{
		conn:     hijacked.Conn,
		interval: min(timeout/4, maxStatusInterval),
		silence:  max(2*timeout, minSilence),
		buf:      make([]byte, gulpSize),
		wake:     make(chan struct{}, 1),
	}
	s.write.Store(uint64(confirmed))
	s.flush.Store(uint64(confirmed))
	if err := s.start(ctx, slot, publication, at); err != nil {
		return nil, errors.Join(fmt.Errorf("start replication on slot %q: %w", slot, withHint(err)), s.conn.Close())
	}
	return s, nil
}

// limitTimeout has the server end the stream of a bridge that does not answer, and returns after how long.
func (c *Conn) limitTimeout(ctx context.Context) (time.Duration, error) {
	text, err := c.exec(ctx, "SELECT setting FROM pg_settings WHERE name = 'wal_sender_timeout'")
	if err != nil {
		return 0, fmt.Errorf("read wal_sender_timeout: %w", err)
	}
	ms, err := strconv.Atoi(text)
	if err != nil {
		return 0, fmt.Errorf("read wal_sender_timeout: %w", err)
	}
	timeout := time.Duration(ms) * time.Millisecond
	if timeout > 0 && timeout <= maxTimeout {
		return timeout, nil
	}
	if _, err := c.exec(ctx, fmt.Sprintf("SET wal_sender_timeout = %d", maxTimeout.Milliseconds())); err != nil {
		return 0, fmt.Errorf("set wal_sender_timeout: %w", err)
	}
	return maxTimeout, nil
}

// bePatient has the server keep a connection from which nothing is read for however long delivery takes. The kernel counts what a full socket
// holds back as unanswered, whatever the client's host says meanwhile; wal_sender_timeout goes by what ebb says.
// Source: tcp_probe_timer in Linux, net/ipv4/tcp_timer.c.
func (c *Conn) bePatient(ctx context.Context) error {
	if _, err := c.exec(ctx, "SET tcp_user_timeout = 0"); err != nil {
		return fmt.Errorf("set tcp_user_timeout: %w", err)
	}
	return nil
}

func (s *Stream) start(ctx context.Context, slot, publication string, at event.LSN) error {
	query := pgproto3.Query{String: fmt.Sprintf("START_REPLICATION SLOT %s LOGICAL %s (proto_version '1', publication_names %s, messages 'true')",
		quoteIdent(slot), at, quoteLiteral(quoteIdent(publication)))}
	out, err := query.Encode(nil)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { s.interrupt() })
	defer stop()
	if err := s.send(out); err != nil {
		return err
	}
	for {
		kind, body, ok, err := s.frame()
		if err != nil {
			return err
		}
		if !ok {
			if err := s.conn.SetReadDeadline(time.Now().Add(s.silence)); err != nil {
				return err
			}
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := s.read(); err != nil {
				return errors.Join(ctx.Err(), err)
			}
			continue
		}
		switch kind {
		case 'W': // CopyBothResponse
			s.lastRead, s.lastStatus = time.Now(), time.Now()
			// A COMMIT may wait for what is confirmed already, for which the bridge before this one was not there to say so.
			s.dirty.Store(true)
			return nil
		case 'E':
			return serverError(body)
		case 'N', 'S': // NoticeResponse, ParameterStatus
		default:
			return fmt.Errorf("unexpected message %q", kind)
		}
	}
}

// Fill waits until at least one message is complete, and reads with it what else the server has sent. While it waits it
// reports to the server. A reader that is behind gives the socket a moment to fill; one that keeps up is woken at once.
//
// It returns nil without a message when ctx ends: the caller is asked to look.
func (s *Stream) Fill(ctx context.Context, behind bool) error {
	if s.behind = behind; behind {
		select {
		case <-time.After(coalesceDelay):
		case <-ctx.Done():
			return nil
		}
	}
	stop := context.AfterFunc(ctx, s.interrupt)
	defer stop()
	s.lastRead = time.Now() // no reproach for the time in which nobody was reading
	for {
		if s.complete() {
			return nil
		}
		due := s.statusDue()
		if err := s.conn.SetReadDeadline(due); err != nil {
			return fmt.Errorf("read from the replication stream: %w", err)
		}
		// Looked at only now: an interrupt from before was overwritten by the deadline, a later one moves it.
		if ctx.Err() != nil {
			return nil
		}
		if s.statusDue() != due {
			continue
		}
		if !time.Now().Before(due) {
			// Only now and then: an answer brings a position to confirm, of which a status tells, and so on without end.
			if err := s.sendStatus(time.Since(s.lastAsked) >= s.interval); err != nil {
				return err
			}
			continue
		}
		err := s.read()
		if err == nil {
			s.lastRead = time.Now()
			continue
		}
		if !errors.Is(err, os.ErrDeadlineExceeded) {
			return fmt.Errorf("read from the replication stream: %w", err)
		}
		if quiet := time.Since(s.lastRead); quiet > s.silence {
			return fmt.Errorf("read from the replication stream: nothing for %s: %w", quiet.Round(time.Second), ErrSilent)
		}
	}
}

// Next returns the next message that is already here, and false when there is none.
func (s *Stream) Next() (Message, bool, error) {
	for {
		kind, body, ok, err := s.frame()
		if err != nil || !ok {
			return Message{}, false, err
		}
		switch kind {
		case 'd':
			msg, err := s.copyData(body)
			return msg, err == nil, err
		case 'E':
			return Message{}, false, withHint(serverError(body))
		case 'c', 'C', 'Z': // CopyDone, CommandComplete, ReadyForQuery
			return Message{}, false, ErrEnded
		case 'N', 'S':
		default:
			return Message{}, false, fmt.Errorf("replication stream: unexpected message %q", kind)
		}
	}
}

// copyData reads an XLogData or a primary keepalive message.
func (s *Stream) copyData(body []byte) (Message, error) {
	const walHeader, keepaliveSize = 1 + 8 + 8 + 8, 1 + 8 + 8 + 1
	switch {
	case len(body) >= walHeader && body[0] == pglogrepl.XLogDataByteID:
		return Message{
			Data:     body[walHeader:],
			WALEnd:   event.LSN(binary.BigEndian.Uint64(body[9:])),
			SendTime: serverTime(binary.BigEndian.Uint64(body[17:])),
		}, nil
	case len(body) == keepaliveSize && body[0] == pglogrepl.PrimaryKeepaliveMessageByteID:
		if body[17] != 0 {
			s.dirty.Store(true)
		}
		return Message{
			WALEnd:   event.LSN(binary.BigEndian.Uint64(body[1:])),
			SendTime: serverTime(binary.BigEndian.Uint64(body[9:])),
		}, nil
	default:
		return Message{}, fmt.Errorf("replication stream: malformed copy data of %d bytes", len(body))
	}
}

// Hand passes b to out. While nobody takes it, it keeps reporting to the server, which would otherwise end the connection
// after wal_sender_timeout.
func (s *Stream) Hand(ctx context.Context, out chan<- *event.Batch, b *event.Batch) error {
	return s.hold(ctx, out, b, nil)
}

// Wait keeps reporting to the server until done is closed.
func (s *Stream) Wait(ctx context.Context, done <-chan struct{}) error {
	return s.hold(ctx, nil, nil, done)
}

func (s *Stream) hold(ctx context.Context, out chan<- *event.Batch, b *event.Batch, done <-chan struct{}) error {
	for {
		timer := time.NewTimer(time.Until(s.statusDue()))
		select {
		case out <- b:
			timer.Stop()
			return nil
		case <-done:
			timer.Stop()
			return nil
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		case <-s.wake:
			timer.Stop()
		case <-timer.C:
			if err := s.sendStatus(false); err != nil {
				return err
			}
		}
	}
}

// Confirm says how far delivery has come: everything before write is delivered, and nothing before flush is needed again.
// The owner of the stream is woken to report it. Neither goes back: of several callers at once, the furthest counts.
func (s *Stream) Confirm(write, flush event.LSN) {
	newWrite, newFlush := raise(&s.write, uint64(write)), raise(&s.flush, uint64(flush))
	if !newWrite && !newFlush {
		return
	}
	s.dirty.Store(true)
	select {
	case s.wake <- struct{}{}:
	default:
	}
	s.interrupt()
}

// raise sets v to at least to, and reports whether it was less.
func raise(v *atomic.Uint64, to uint64) bool {
	for {
		old := v.Load()
		if to <= old {
			return false
		}
		if v.CompareAndSwap(old, to) {
			return true
		}
	}
}

// Close reports what was confirmed, says goodbye and closes the connection.
func (s *Stream) Close() error {
	err := s.sendStatus(false)
	if err == nil {
		err = s.goodbye()
	}
	if closeErr := s.conn.Close(); err == nil && closeErr != nil {
		err = fmt.Errorf("close the replication connection: %w", closeErr)
	}
	return err
}

// goodbye ends the copy and waits until the server has ended the command too: by then it has read the status sent before, and the
// slot is free for the next bridge.
func (s *Stream) goodbye() error {
	out, err := (&pgproto3.CopyDone{}).Encode(nil)
	if err == nil {
		err = s.send(out)
	}
	if err != nil {
		return fmt.Errorf("end the replication stream: %w", err)
	}
	for deadline := time.Now().Add(closeTimeout); ; {
		kind, body, ok, err := s.frame()
		switch {
		case err != nil:
			return fmt.Errorf("end the replication stream: %w", err)
		case ok && (kind == 'C' || kind == 'Z'): // CommandComplete, ReadyForQuery
			return nil
		case ok && kind == 'E':
			return fmt.Errorf("end the replication stream: %w", serverError(body))
		case ok:
			continue // what was on its way
		}
		if err := s.conn.SetReadDeadline(deadline); err != nil {
			return fmt.Errorf("end the replication stream: %w", err)
		}
		// A late Confirm interrupts the read, to no effect.
		if err := s.read(); err != nil && (!errors.Is(err, os.ErrDeadlineExceeded) || time.Now().After(deadline)) {
			return fmt.Errorf("end the replication stream: %w", err)
		}
	}
}

// interrupt makes a read that waits return at once.
func (s *Stream) interrupt() {
	// An error means that the connection is closed, which the reader sees for itself.
	_ = s.conn.SetReadDeadline(time.Unix(1, 0))
}

// statusDue returns when the next status is to be sent.
func (s *Stream) statusDue() time.Time {
	if s.dirty.Load() {
		if s.behind {
			return s.lastStatus.Add(busyStatusInterval)
		}
		return s.lastStatus.Add(minStatusInterval)
	}
	return s.lastStatus.Add(s.interval)
}

// sendStatus sends a standby status update. All three positions are set: a server ignores a standby's write position for as
// long as its flush position is zero.
func (s *Stream) sendStatus(askReply bool) error {
	s.dirty.Store(false)
	flush := s.flush.Load()
	write := max(s.write.Load(), flush)
	msg := make([]byte, 0, 64)
	msg = append(msg, 'd')
	msg = binary.BigEndian.AppendUint32(msg, 4+1+8+8+8+8+1)
	msg = append(msg, pglogrepl.StandbyStatusUpdateByteID)
	msg = binary.BigEndian.AppendUint64(msg, write)
	msg = binary.BigEndian.AppendUint64(msg, flush)
	msg = binary.BigEndian.AppendUint64(msg, flush) // apply
	msg = binary.BigEndian.AppendUint64(msg, uint64(time.Since(postgresEpoch).Microseconds()))
	if askReply {
		s.lastAsked = time.Now()
		msg = append(msg, 1)
	} else {
		msg = append(msg, 0)
	}
	if err := s.send(msg); err != nil {
		return fmt.Errorf("send standby status update: %w", err)
	}
	s.lastStatus = time.Now()
	return nil
}

func (s *Stream) send(b []byte) error {
	if err := s.conn.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return err
	}
	_, err := s.conn.Write(b)
	return err
}

// complete reports whether a whole protocol message is buffered.
func (s *Stream) complete() bool {
	have := s.buf[s.r:s.w]
	if len(have) < 5 {
		return false
	}
	size := binary.BigEndian.Uint32(have[1:])
	return size > maxMessage || len(have) >= 1+int(size) // an impossible length is for frame to refuse
}

// frame takes the next whole protocol message from the buffer.
func (s *Stream) frame() (kind byte, body []byte, ok bool, err error) {
	have := s.buf[s.r:s.w]
	if len(have) < 5 {
		return 0, nil, false, nil
	}
	size := binary.BigEndian.Uint32(have[1:])
	if size < 4 || size > maxMessage {
		return 0, nil, false, fmt.Errorf("replication stream: message %q of impossible length %d", have[0], size)
	}
	end := 1 + int(size)
	if len(have) < end {
		return 0, nil, false, nil
	}
	s.r += end
	return have[0], have[5:end], true, nil
}

// read reads once from the socket, behind what the buffer holds.
func (s *Stream) read() error {
	have := s.buf[s.r:s.w]
	size := len(s.buf)
	switch {
	case len(have) == size:
		size *= 2 // one row may be a gigabyte; the buffer grows as it comes, never on the word of a length
	case len(have) < gulpSize && size > gulpSize && !s.inLargeMessage():
		size = gulpSize // nor is a gigabyte held for ever
	}
	if s.r > 0 || size != len(s.buf) {
		next := s.buf
		if size != len(s.buf) {
			next = make([]byte, size)
		}
		copy(next, have)
		s.buf, s.r, s.w = next, 0, len(have)
	}
	n, err := s.conn.Read(s.buf[s.w:])
	s.w += n
	if n > 0 {
		return nil
	}
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

func (s *Stream) inLargeMessage() bool {
	return s.w-s.r >= 5 && binary.BigEndian.Uint32(s.buf[s.r+1:]) >= gulpSize
}

// postgresEpoch is where Postgres's timestamps begin, in microseconds.
var postgresEpoch = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

func serverTime(micros uint64) time.Time {
	return postgresEpoch.Add(time.Duration(micros) * time.Microsecond)
}

func serverError(body []byte) error {
	var msg pgproto3.ErrorResponse
	if err := msg.Decode(body); err != nil {
		return fmt.Errorf("decode the server's error: %w", err)
	}
	return pgconn.ErrorResponseToPgError(&msg)
}
