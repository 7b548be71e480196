// Package decode turns what pgoutput sends, and rows that were read from a buffer table, into events.
package decode

import (
	"errors"
	"fmt"
	"time"

	"ebb/event"
)

// ErrPositions says that positions mean another thing than they did when the destination was given them, for one because another
// table was added to the publication.
var ErrPositions = errors.New("positions have changed their meaning")

// ErrCount says that the destination does not hold as many events as the slot has: some of its messages are somebody else's, or events
// are missing between them.
var ErrCount = errors.New("the destination does not hold as many events as it should")

// Config says what a [Decoder] makes of the messages.
type Config struct {
	// Epochs give the positions of events their epoch.
	Epochs event.Epochs
	// Buffers are the tables whose rows are events; none stands for [Managed].
	Buffers []Buffer
	// Skip is what the destination holds already.
	Skip Skip
	// Replay says which events are delivered again.
	Replay Replay
	// LookUp, unless nil, is asked for types by their OIDs, with all that they are made of, for tables whose whole row is the payload. It returns
	// what the catalog says now, and an LSN, read before that, at which the log ended: the transactions of no row before it can have changed
	// that. Its error ends the Decode.
	LookUp func(oids []uint32) (Types, event.LSN, error)
	// Token is what the messages of ebb.emit, which are events, begin with. Without it, no message is an event.
	Token []byte
	// Seen, unless nil, is called with the id of every row of the managed table that comes by, left out or not. The slice is valid during the
	// call.
	Seen func(id []byte)
}

// Skip says which events are left out because the destination holds them already, and by what it is known that it does.
type Skip struct {
	// Through is the position of the last one.
	Through event.Position
	// ID is the id of the event at Through, unless it is unknown. If another one comes by there, what positions mean has changed, and
	// nothing can be left out by them.
	ID string
	// Comes says that the event at Through is yet to come by.
	Comes bool
	// More is how many events behind Through are left out as well.
	More uint64
	// Held, unless nil, tells events behind Through that are left out as well, by their ids.
	Held func(id []byte) bool
	// Aside, unless nil, tells events that the destination was not given, as they were set aside. They are not counted, neither up to Through nor behind
	// it, and those behind it come by as any others.
	Aside func(id []byte, at event.Position) bool
	// Counted says that the destination holds Count events behind Since, up to Through, all of which are yet to come by.
	Counted bool
	Since   event.Position
	Count   uint64
}

// Replay says which events of an epoch are delivered again: those up to a place, whatever epoch it is given in. Number is what they carry.
type Replay struct {
	Number  int64
	Epoch   uint32
	Through event.Position
}

// number returns what the event at a position carries.
func (r *Replay) number(at event.Position) int64 {
	if r.Number == 0 || at.Epoch != r.Epoch {
		return 0
	}
	at.Epoch = r.Through.Epoch
	if at.Compare(r.Through) > 0 {
		return 0
	}
	return r.Number
}

// Skipped counts messages that gave no event, by the reason for it. The counts only ever rise.
type Skipped struct {
	// Delivered counts events that the destination holds already.
	Delivered uint64
	// Unmapped counts rows of tables that no [Buffer] maps.
	Unmapped uint64
	// Updates, Deletes and Truncates are no events. A publication of inserts alone sends none.
	Updates, Deletes, Truncates uint64
	// Messages counts logical decoding messages (pg_logical_emit_message) that are none of ebb's business.
	Messages uint64
	// Forged counts messages with ebb's prefix that ebb.emit has not written.
	Forged uint64
}

// Decoder turns the messages of one replication connection, pgoutput protocol version 1, into events. It is used by one goroutine
// at a time.
type Decoder struct {
	epochs  event.Epochs
	buffers []Buffer
	lookUp  func(oids []uint32) (Types, event.LSN, error)
	token   []byte
	skipped Skipped

	skip   Skip
	replay Replay
	see    func(id []byte)
	// seen says that the event at skip.Through has come by, counted how many events came by between skip.Since and it, and more how
	// many were left out behind it, the last one at last.
	seen, passed  bool
	counted, more uint64
	last          event.Position

	tables map[uint32]*table
	types  map[uint32]string

	open     bool           // a transaction has begun and not ended
	position event.Position // of the row or message that came last
	time     time.Time
	xid      uint32

	insert insertMessage // scratch, so that an insert takes no memory
	id     []byte        // of an event whose position is its id
	text   []byte        // of the key of a row
}

// New returns a Decoder that stands before the first message of a connection.
func New(cfg Config) *Decoder {
	d := &Decoder{epochs: cfg.Epochs, buffers: append([]Buffer(nil), cfg.Buffers...), lookUp: cfg.LookUp, token: cfg.Token, skip: cfg.Skip,
		replay: cfg.Replay, see: cfg.Seen}
	if len(d.buffers) == 0 {
		d.buffers = []Buffer{Managed()}
	}
	d.Reset()
	return d
}

// Reset makes d ready for a new replication connection, on which the server sends every relation anew.
func (d *Decoder) Reset() {
	d.tables, d.types, d.open = make(map[uint32]*table), make(map[uint32]string), false
}

// InTransaction reports whether a transaction has begun and not ended.
func (d *Decoder) InTransaction() bool { return d.open }

// CommitTime returns when the transaction that began last was committed, by the server's clock; zero before the first.
func (d *Decoder) CommitTime() time.Time { return d.time }

// Skipped returns what was left out so far.
func (d *Decoder) Skipped() Skipped { return d.skipped }

// SkippedMore returns how many events behind Skip.Through were left out so far, and the position of the last one.
func (d *Decoder) SkippedMore() (uint64, event.Position) { return d.more, d.last }

// Decode decodes one message, and appends the event that it gives, if any, to the batch. The end of a transaction marks the batch
// with the transaction's end LSN. Decode keeps nothing of msg. The batch may be another one in every call.
//
// An error wraps [ErrMalformed], [ErrMapping] or [ErrRow], or is that of Config.LookUp. The batch holds the events before it, complete; d must be Reset.
func (d *Decoder) Decode(msg []byte, batch *event.Batch) error {
	if len(msg) == 0 {
		return fmt.Errorf("%w: it is empty", ErrMalformed)
	}
	switch msg[0] {
	case 'I':
		return d.decodeInsert(msg, batch)
	case 'B':
		return d.decodeBegin(msg)
	case 'C':
		return d.decodeCommit(msg, batch)
	case 'R':
		return d.decodeRelation(msg)
	case 'Y':
		return d.decodeType(msg)
	case 'M':
		return d.decodeMessage(msg, batch)
	case 'O':
		_, err := parseOrigin(msg)
		return err
	case 'U':
		d.skipped.Updates++
		_, err := parseUpdate(msg)
		return err
	case 'D':
		d.skipped.Deletes++
		_, err := parseDelete(msg)
		return err
	case 'T':
		d.skipped.Truncates++
		_, err := parseTruncate(msg)
		return err
	case 'S', 'E', 'c', 'A', 'b', 'P', 'K', 'r', 'p':
		return malformed(msg[0], 0, "protocol version 1 has no such message; turn streaming and two_phase off")
	}
	return malformed(msg[0], 0, "protocol version 1 has no such message")
}

func (d *Decoder) decodeBegin(msg []byte) error {
	m, err := parseBegin(msg)
	if err != nil {
		return err
	}
	if d.open {
		return malformed('B', 0, "transaction %s has not ended", d.position.Commit)
	}
	d.open, d.time, d.xid = true, pgTime(m.time), m.xid
	d.position = event.Position{Epoch: d.epochs.At(m.final), Commit: m.final}
	return nil
}

func (d *Decoder) decodeCommit(msg []byte, batch *event.Batch) error {
	m, err := parseCommit(msg)
	if err != nil {
		return err
	}
	if err := d.needTransaction('C'); err != nil {
		return err
	}
	if m.commit != d.position.Commit {
		return malformed('C', 2, "commits %s in transaction %s", m.commit, d.position.Commit)
	}
	d.open = false
	batch.MarkEnd(m.end)
	return nil
}

func (d *Decoder) decodeRelation(msg []byte) error {
	m, err := parseRelation(msg)
	if err != nil {
		return err
	}
	var buffer *Buffer
	number := 0
	for i := range d.buffers {
		if b := &d.buffers[i]; string(m.namespace) == b.Schema && string(m.name) == b.Table {
			buffer, number = b, i
			break
		}
	}
	t, err := newTable(&m, buffer, d.types)
	if err != nil {
		t = unreadable(&m, buffer, err)
	}
	if buffer != nil {
		t.number = number
		t.resolveRowKey(&m)
	}
	if t.err != nil && !d.mayLeaveOut() {
		return t.err
	}
	if t.row != nil {
		if err := d.readTypes(t); err != nil {
			return err
		}
	}
	d.tables[m.id] = t
	return nil
}

// mayLeaveOut reports whether an event may come by that the destination holds already.
func (d *Decoder) mayLeaveOut() bool {
	return !d.passed && !d.skip.Through.IsZero() || d.more < d.skip.More || d.skip.Held != nil
}

func (d *Decoder) decodeType(msg []byte) error {
	m, err := parseType(msg)
	if err != nil {
		return err
	}
	name := string(m.name)
	if len(m.namespace) > 0 {
		name = string(m.namespace) + "." + name
	}
	d.types[m.id] = name
	return nil
}

func (d *Decoder) decodeInsert(msg []byte, batch *event.Batch) error {
	m := &d.insert
	if err := parseInsert(msg, m); err != nil {
		return err
	}
	if err := d.needTransaction('I'); err != nil {
		return err
	}
	t := d.tables[m.relation]
	switch {
	case t == nil:
		return malformed('I', 1, "relation %d was not announced", m.relation)
	case len(m.row) != t.columns:
		return malformed('I', 6, "a row of %d columns for %s, which has %d", len(m.row), t.name, t.columns)
	}

	d.position.Index++
	if t.buffer == nil {
		d.skipped.Unmapped++
		if d.position == d.skip.Through && d.skip.ID != "" {
			return d.positionsChanged("a row of " + t.name)
		}
		return nil
	}
	if d.see != nil && t.buffer.IsManaged() {
		d.see(m.column(t.id))
	}
	id, idFault := d.rowID(t)
	if !d.passed || d.more < d.skip.More || d.skip.Held != nil {
		var own []byte
		if idFault != "" {
			own = m.column(t.id)
		}
		left, err := d.leaveOut(id, own)
		if left {
			d.addRow(t, batch)
		}
		if left || err != nil {
			return err
		}
	}
	if t.err != nil {
		return t.err
	}
	for _, i := range [...]int{t.id, t.topic, t.key, t.payload, t.headers} {
		if i == absent || m.row[i].kind == text || m.row[i].kind == null {
			continue
		}
		return malformed('I', 6, "row %s of %s: column %d has kind %q, want text or null", d.position, t.name, i+1, m.row[i].kind)
	}
	row := Row{
		ID: id, Topic: m.column(t.topic), Key: m.column(t.key),
		Payload: m.column(t.payload), Headers: m.column(t.headers),
		Time: d.time, Position: d.position, hex: t.hex, idFault: idFault,
	}
	if t.row != nil {
		var err error
		if row.Payload, err = d.encodeRow(t); err != nil {
			return err
		}
	}
	if err := t.buffer.append(batch, &row, t.contentType, event.Streamed); err != nil {
		return err
	}
	d.addRow(t, batch)
	batch.Events[len(batch.Events)-1].Replay = d.replay.number(d.position)
	return nil
}

// addRow gives the batch the key of the row at hand, which is delivered when all events are that the batch holds now.
func (d *Decoder) addRow(t *table, batch *event.Batch) {
	if len(t.rowKey) == 0 {
		return
	}
	d.text = d.text[:0]
	for _, i := range t.rowKey {
		d.text = event.AppendKey(d.text, d.insert.row[i].data)
	}
	batch.Rows = append(batch.Rows, event.Row{Events: len(batch.Events), Table: t.number, XID: d.xid, Key: batch.Copy(d.text)})
}

// rowID returns the id of the event of the row at hand, or nil if that cannot be told, and why it is not the row's own, if that has one.
func (d *Decoder) rowID(t *table) (id []byte, fault string) {
	if fault = t.idFault(d.insert.row); t.buffer.ID == "" || fault != "" {
		return d.positionID(), fault
	}
	return d.insert.column(t.id), ""
}

// positionID returns the id of an event whose position is its id, valid until it is called again. It is the position in which the event was
// delivered first, so that it is the same in a replay.
func (d *Decoder) positionID() []byte {
	at := d.position
	at.Epoch = d.epochs.FirstAt(at.Commit)
	d.id = at.Append(d.id[:0])
	return d.id
}

// leaveOut reports whether the destination holds the event at hand already. It compares what comes by with what the destination is known to
// hold. Own, unless nil, is the id that the row has and that is not the event's: it was, if the event was delivered when nothing was wrong with it,
// as before another table with numbers for ids was carried.
func (d *Decoder) leaveOut(id, own []byte) (bool, error) {
	through := d.position.Compare(d.skip.Through)
	aside := d.skip.Aside != nil && (d.skip.Aside(id, d.position) || own != nil && d.skip.Aside(own, d.position))
	if d.position.Compare(d.skip.Since) > 0 && through <= 0 && !aside {
		d.counted++
	}
	if through == 0 {
		d.seen = true
		if d.skip.ID != "" && id != nil && string(id) != d.skip.ID && string(own) != d.skip.ID {
			return false, d.positionsChanged(fmt.Sprintf("event %q", id))
		}
	}
	if through >= 0 && !d.passed {
		d.passed = true
		switch {
		case d.skip.Comes && !d.seen:
			return false, fmt.Errorf("%w: the slot has no event at %s, where the destination holds event %q", ErrPositions, d.skip.Through, d.skip.ID)
		case d.skip.Counted && d.counted != d.skip.Count:
			return false, fmt.Errorf("%w: between %s and %s the slot has %d events, and the destination holds %d", ErrCount, d.skip.Since,
				d.skip.Through, d.counted, d.skip.Count)
		}
	}
	switch {
	case through <= 0:
	case aside:
		return false, nil
	case d.more < d.skip.More:
		d.more++
		d.last = d.position
	case d.skip.Held != nil && d.skip.Held(id): // and not own, which may be the id of another table's row: nothing but the id is compared here
	default:
		return false, nil
	}
	d.skipped.Delivered++
	return true, nil
}

// positionsChanged is the error about what comes by at the position of the destination's last event.
func (d *Decoder) positionsChanged(what string) error {
	return fmt.Errorf("%w: at %s there is %s, and the destination holds event %q", ErrPositions, d.position, what, d.skip.ID)
}

// column returns the text of a column, nil when it is NULL or absent.
func (m *insertMessage) column(i int) []byte {
	if i == absent {
		return nil
	}
	return m.row[i].data
}

func (d *Decoder) needTransaction(kind byte) error {
	if !d.open {
		return malformed(kind, 0, "no transaction has begun")
	}
	return nil
}
