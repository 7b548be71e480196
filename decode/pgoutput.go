package decode

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"ebb/event"
)

// ErrMalformed is wrapped by every error about a message that pgoutput, speaking protocol version 1, cannot have sent.
var ErrMalformed = errors.New("malformed pgoutput message")

// The messages of pgoutput, protocol version 1, as
// https://www.postgresql.org/docs/current/protocol-logicalrep-message-formats.html gives them. Their byte slices point into the
// message that was parsed. Integers are big-endian, times are microseconds since 2000-01-01 UTC, and an empty namespace is
// pg_catalog.
type (
	beginMessage struct {
		// final is the LSN of the transaction's commit record.
		final event.LSN
		time  int64
		xid   uint32
	}

	commitMessage struct {
		commit event.LSN
		// end is the LSN behind the commit record.
		end  event.LSN
		time int64
	}

	originMessage struct {
		commit event.LSN
		name   []byte
	}

	relationMessage struct {
		id              uint32
		namespace, name []byte
		replicaIdentity byte
		columns         []relationColumn
	}

	relationColumn struct {
		flags    byte
		name     []byte
		typeID   uint32
		modifier int32
	}

	typeMessage struct {
		id              uint32
		namespace, name []byte
	}

	insertMessage struct {
		relation uint32
		row      []value
	}

	updateMessage struct {
		relation uint32
		// oldKind is 'K' when old holds the key alone, 'O' when it holds the whole old row, 0 when there is none.
		oldKind byte
		old     []value
		row     []value
	}

	deleteMessage struct {
		relation uint32
		oldKind  byte
		old      []value
	}

	truncateMessage struct {
		options   byte
		relations []uint32
	}

	logicalMessage struct {
		transactional bool
		lsn           event.LSN
		prefix        []byte
		content       []byte
	}
)

// value is one column of a row.
type value struct {
	kind byte
	// data is nil unless kind is text or binary.
	data []byte
}

// The kinds of a value.
const (
	null      = 'n'
	unchanged = 'u' // a TOASTed value that an update left alone, and that is not sent
	text      = 't'
	binaryFmt = 'b'
)

func parseBegin(msg []byte) (m beginMessage, err error) {
	r := newReader(msg)
	m.final, m.time, m.xid = r.lsn(), r.int64(), r.uint32()
	return m, r.end()
}

func parseCommit(msg []byte) (m commitMessage, err error) {
	r := newReader(msg)
	if flags := r.byte(); flags != 0 {
		r.fail("flags %#x, want none", flags)
	}
	m.commit, m.end, m.time = r.lsn(), r.lsn(), r.int64()
	return m, r.end()
}

func parseOrigin(msg []byte) (m originMessage, err error) {
	r := newReader(msg)
	m.commit, m.name = r.lsn(), r.string()
	return m, r.end()
}

func parseRelation(msg []byte) (m relationMessage, err error) {
	r := newReader(msg)
	m.id, m.namespace, m.name, m.replicaIdentity = r.uint32(), r.string(), r.string(), r.byte()
	for range r.uint16() {
		m.columns = append(m.columns, relationColumn{r.byte(), r.string(), r.uint32(), int32(r.uint32())})
		if r.err != nil {
			break
		}
	}
	return m, r.end()
}

func parseType(msg []byte) (m typeMessage, err error) {
	r := newReader(msg)
	m.id, m.namespace, m.name = r.uint32(), r.string(), r.string()
	return m, r.end()
}

// parseInsert uses m's memory again, as inserts are what there are many of.
func parseInsert(msg []byte, m *insertMessage) error {
	r := newReader(msg)
	m.relation = r.uint32()
	if kind := r.byte(); kind != 'N' {
		r.fail("row kind %q, want 'N'", kind)
	}
	m.row = r.row(m.row[:0])
	return r.end()
}

func parseUpdate(msg []byte) (m updateMessage, err error) {
	r := newReader(msg)
	m.relation = r.uint32()
	kind := r.byte()
	if kind == 'K' || kind == 'O' {
		m.oldKind, m.old = kind, r.row(nil)
		kind = r.byte()
	}
	if kind != 'N' {
		r.fail("row kind %q, want 'N'", kind)
	}
	m.row = r.row(nil)
	return m, r.end()
}

func parseDelete(msg []byte) (m deleteMessage, err error) {
	r := newReader(msg)
	m.relation, m.oldKind = r.uint32(), r.byte()
	if m.oldKind != 'K' && m.oldKind != 'O' {
		r.fail("row kind %q, want 'K' or 'O'", m.oldKind)
	}
	m.old = r.row(nil)
	return m, r.end()
}

func parseTruncate(msg []byte) (m truncateMessage, err error) {
	r := newReader(msg)
	n := r.uint32()
	m.options = r.byte()
	for range n {
		m.relations = append(m.relations, r.uint32())
		if r.err != nil {
			break
		}
	}
	return m, r.end()
}

func parseMessage(msg []byte) (m logicalMessage, err error) {
	r := newReader(msg)
	flags := r.byte()
	if flags > 1 {
		r.fail("flags %#x, want 0 or 1", flags)
	}
	m.transactional = flags == 1
	m.lsn, m.prefix, m.content = r.lsn(), r.string(), r.bytes()
	return m, r.end()
}

// pgTime turns microseconds since 2000-01-01 UTC into a time.
func pgTime(micros int64) time.Time {
	const year2000 = 946_684_800_000_000 // in microseconds of Unix time
	return time.UnixMicro(year2000 + micros).UTC()
}

// messageName names a message by its first byte.
func messageName(kind byte) string {
	switch kind {
	case 'B':
		return "Begin"
	case 'C':
		return "Commit"
	case 'O':
		return "Origin"
	case 'R':
		return "Relation"
	case 'Y':
		return "Type"
	case 'I':
		return "Insert"
	case 'U':
		return "Update"
	case 'D':
		return "Delete"
	case 'T':
		return "Truncate"
	case 'M':
		return "Message"
	}
	return fmt.Sprintf("%q", kind)
}

// malformed returns an error about the message of that kind, at an offset that counts the kind's byte.
func malformed(kind byte, offset int, format string, args ...any) error {
	return fmt.Errorf("%w: %s at byte %d: %s", ErrMalformed, messageName(kind), offset, fmt.Sprintf(format, args...))
}

// reader reads a message from its front. After the first error it stays where it is and returns zeros, so that a parser may
// ask for the error once, at its end.
type reader struct {
	msg []byte
	off int
	err error
}

// newReader returns a reader that stands behind the byte with the message's kind. The message must not be empty.
func newReader(msg []byte) reader { return reader{msg: msg, off: 1} }

func (r *reader) fail(format string, args ...any) {
	if r.err == nil {
		r.err = malformed(r.msg[0], r.off, format, args...)
	}
}

// take returns the next n bytes, or nil if there are fewer.
func (r *reader) take(n int) []byte {
	if left := len(r.msg) - r.off; n > left || r.err != nil {
		r.short(n, left)
		return nil
	}
	p := r.msg[r.off : r.off+n : r.off+n]
	r.off += n
	return p
}

func (r *reader) short(n, left int) { r.fail("needs %d bytes, has %d", n, left) }

func (r *reader) byte() byte {
	if p := r.take(1); p != nil {
		return p[0]
	}
	return 0
}

func (r *reader) uint16() uint16 {
	if p := r.take(2); p != nil {
		return binary.BigEndian.Uint16(p)
	}
	return 0
}

func (r *reader) uint32() uint32 {
	if p := r.take(4); p != nil {
		return binary.BigEndian.Uint32(p)
	}
	return 0
}

func (r *reader) int64() int64 {
	if p := r.take(8); p != nil {
		return int64(binary.BigEndian.Uint64(p))
	}
	return 0
}

func (r *reader) lsn() event.LSN { return event.LSN(r.int64()) }

// string reads up to a zero byte, which it does not return.
func (r *reader) string() []byte {
	n := bytes.IndexByte(r.msg[r.off:], 0)
	if n < 0 {
		r.fail("the string has no end")
		return nil
	}
	p := r.take(n + 1)
	return p[:max(len(p)-1, 0)]
}

// bytes reads a length of four bytes, then as many bytes. It returns an empty slice, not nil, for a length of zero.
func (r *reader) bytes() []byte {
	n := r.uint32()
	if left := len(r.msg) - r.off; uint64(n) > uint64(left) { // n may not fit into an int
		r.fail("needs %d bytes, has %d", n, left)
		return nil
	}
	return r.take(int(n))
}

// row reads the columns of a row and appends them to row.
func (r *reader) row(row []value) []value {
	for range r.uint16() {
		v := value{kind: r.byte()}
		switch v.kind {
		case text, binaryFmt:
			v.data = r.bytes()
		case null, unchanged:
		default:
			r.fail("column %d has kind %q", len(row)+1, v.kind)
		}
		if r.err != nil {
			break
		}
		row = append(row, v)
	}
	return row
}

// end returns the first error of r. Bytes that are left over are one too: they mean that the message was not understood.
func (r *reader) end() error {
	if r.err == nil && r.off < len(r.msg) {
		r.fail("%d bytes are left over", len(r.msg)-r.off)
	}
	return r.err
}
