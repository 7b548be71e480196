package decode

import (
	"cmp"
	"errors"
	"fmt"
	"strconv"
	"time"

	"ebb/event"
)

var (
	// ErrMapping is wrapped by errors about a table whose rows cannot be read as events, whatever they hold.
	ErrMapping = errors.New("impossible mapping")
	// ErrRow is wrapped by errors about one row that makes no event, not even one with a fault.
	ErrRow = errors.New("impossible event")
)

// Buffer says which columns of a table make an event. ID, Topic, Key, Payload and Headers are column names. The columns ID and
// Topic may have any type, in whose text form they are taken; Payload is json, jsonb, text, varchar or bytea, Headers json or jsonb,
// or a domain over one of these.
type Buffer struct {
	Schema, Table string
	// ID is the column of the event's id. Without it, the event's position is its id.
	ID string
	// Topic is the column of the topic; TopicValue, if Topic is empty, the topic itself.
	Topic, TopicValue string
	// Key and Headers may be left out.
	Key, Headers string
	// Payload is passed on unchanged, of bytea the bytes. Without it, the whole row is the payload, as JSON; see [RowEncoder].
	Payload string
	// ContentType is the media type of a payload in text, varchar or bytea; "" stands for text/plain or application/octet-stream.
	ContentType string
	// RowKey, of a table in which delivery is recorded row by row, are the columns of its primary key: the batch gets their text with every
	// event, also with one that is left out.
	RowKey []string
	// NotNumber says that the id must not be a number, as those of another buffer are.
	NotNumber bool
}

// Managed returns the mapping of the table that ebb setup creates.
func Managed() Buffer {
	return Buffer{Schema: "ebb", Table: "buffer", ID: "id", Topic: "topic", Key: "key", Payload: "payload", Headers: "headers"}
}

// MissingColumnError says that rows come without a column that the mapping needs. It wraps [ErrMapping]. The table may have the column by now:
// then the rows are from before it was added or renamed.
type MissingColumnError struct{ Schema, Table, Column string }

func (e *MissingColumnError) Error() string {
	return fmt.Sprintf("%v: %s.%s: column %q is not in the publication; run ebb setup", ErrMapping, e.Schema, e.Table, e.Column)
}

func (e *MissingColumnError) Unwrap() error { return ErrMapping }

// IsManaged reports whether the mapping is of the table that ebb setup creates.
func (b *Buffer) IsManaged() bool { return b.Schema == "ebb" && b.Table == "buffer" }

// Row is a row of a buffer table that did not come by the slot. Its byte slices hold the text form of the columns; nil is NULL.
type Row struct {
	ID, Topic, Key, Payload, Headers []byte
	// PayloadType is the OID of the payload column's type, of a domain that of its base type.
	PayloadType uint32
	// Values, where the whole row is the payload, are what Encoder makes the payload of.
	Values  [][]byte
	Encoder *RowEncoder
	// hex says that Payload is that of a bytea.
	hex bool
	// idFault is why the row's own id cannot be that of an event, and ID its position; or "".
	idFault string
	// Time is when the row was created.
	Time time.Time
	// Position is that of the event before it.
	Position event.Position
}

// AppendRow appends the event of a row that was read from the table: the same event as the slot would have given, but for its
// position, its time, and its origin, which is [event.Recovered]. It keeps none of row's memory. The error wraps [ErrRow] or
// [ErrMapping]; the batch's events are unchanged then.
func (b *Buffer) AppendRow(batch *event.Batch, row Row) error {
	if b.ID == "" && row.ID == nil {
		return fmt.Errorf("%w: %s has no id column, and a row that is recovered has no position of its own", ErrMapping, b.name())
	}
	if b.Payload == "" {
		var err error
		if row.Payload, err = row.Encoder.payload(row.Values); err != nil {
			return b.encodeError(&row, err)
		}
		return b.append(batch, &row, jsonType, event.Recovered)
	}
	contentType, err := b.contentType(typeName(row.PayloadType, nil))
	if err != nil {
		return err
	}
	row.hex = row.PayloadType == oidBytea
	return b.append(batch, &row, contentType, event.Recovered)
}

// append appends the event of row, whose PayloadType it ignores. What is wrong with this row alone, which nobody can mend once it is in the log, becomes
// the event's fault.
func (b *Buffer) append(batch *event.Batch, row *Row, contentType string, origin event.Origin) error {
	e := event.Event{
		Position: row.Position, Time: row.Time.UTC(), Origin: origin, ContentType: contentType,
	}
	if origin != event.Streamed && b.ID != "" {
		if fault := b.idFault(row.ID); fault != "" {
			return b.rowError(row, "%s", fault)
		}
	}
	e.ID, e.Fault = batch.Copy(row.ID), row.idFault
	switch {
	case b.Topic == "":
		e.Topic = append(batch.Alloc(len(b.TopicValue))[:0], b.TopicValue...)
	case row.Topic == nil:
		e.Fault = alsoFault(e.Fault, b.isNull(b.Topic))
	default:
		e.Topic = batch.Copy(row.Topic)
	}
	var err error
	if e.Key = batch.Copy(row.Key); row.Payload == nil {
		e.Fault = alsoFault(e.Fault, b.isNull(b.Payload))
	} else if !row.hex {
		e.Payload = batch.Copy(row.Payload)
	} else if e.Payload, err = unhex(batch, row.Payload); err != nil {
		return b.rowError(row, "column %q: %v", b.Payload, err)
	}
	if row.Headers != nil {
		if e.Headers, err = appendHeaders(batch, row.Headers); err != nil {
			e.Fault = alsoFault(e.Fault, fmt.Sprintf("column %q of %s: %v: %s", b.Headers, b.name(), err, excerpt(row.Headers)))
		}
	}
	batch.Events = append(batch.Events, e)
	return nil
}

// alsoFault adds a fault to those that an event has.
func alsoFault(faults, more string) string {
	if faults == "" {
		return more
	}
	return faults + ", and " + more
}

// excerpt is what a fault repeats of a column. There may be many such events at once.
func excerpt(text []byte) string {
	const most = 1000
	if len(text) <= most {
		return string(text)
	}
	return fmt.Sprintf("%s... (%d bytes)", text[:most], len(text))
}

// MaxID is how many bytes an id may have: the dead letters are found by it, in an index.
const MaxID = 1000

// idFault says why an id, nil if it is NULL, cannot be that of an event, or returns "".
func (b *Buffer) idFault(id []byte) string {
	switch {
	case id == nil:
		return b.isNull(b.ID)
	case len(id) > MaxID:
		return fmt.Sprintf("column %q of %s has %d bytes, and an id has %d at most: %s", b.ID, b.name(), len(id), MaxID, excerpt(id))
	case b.NotNumber && isRowNumber(id):
		return fmt.Sprintf("column %q of %s is a number, %s, and so are the ids of another buffer, so that one event could be taken for the other: "+
			"use a uuid, or put something before it", b.ID, b.name(), id)
	}
	return ""
}

// isRowNumber reports whether an id reads like that of a row whose ids are numbers.
func isRowNumber(id []byte) bool {
	_, err := strconv.ParseInt(string(id), 10, 64)
	return err == nil
}

func (b *Buffer) name() string { return b.Schema + "." + b.Table }

// contentType returns the media type of the payload column, given the name of its type.
func (b *Buffer) contentType(typeName string) (string, error) {
	switch typeName {
	case "json", "jsonb":
		return jsonType, nil
	case "text", "varchar":
		return cmp.Or(b.ContentType, "text/plain; charset=utf-8"), nil
	case "bytea":
		return cmp.Or(b.ContentType, "application/octet-stream"), nil
	}
	return "", b.badType(b.Payload, typeName, "json, jsonb, text, varchar or bytea")
}

func (b *Buffer) badType(column, is, want string) error {
	return fmt.Errorf("%w: %s: column %q has type %s; make it %s", ErrMapping, b.name(), column, is, want)
}

func (b *Buffer) isNull(column string) string {
	return fmt.Sprintf("column %q of %s is NULL; declare it NOT NULL", column, b.name())
}

// rowError names the row, by its id as well if it has one.
func (b *Buffer) rowError(row *Row, format string, args ...any) error {
	at := "at " + row.Position.String()
	if row.ID != nil && "at "+string(row.ID) != at {
		at = fmt.Sprintf("with id %q %s", row.ID, at)
	}
	return fmt.Errorf("%w: %s: row %s: %s", ErrRow, b.name(), at, fmt.Sprintf(format, args...))
}

// jsonType is the media type of JSON.
const jsonType = "application/json"

// absent stands for the number of a column that the mapping leaves out.
const absent = -1

// table is a relation of the publication: where in its rows the columns of the buffer are.
type table struct {
	name    string
	columns int
	// buffer is nil when the relation is not mapped; what follows has no meaning then.
	buffer                           *Buffer
	id, topic, key, payload, headers int
	contentType                      string
	// hex says that the payload is bytea.
	hex bool
	// row, unless nil, makes the payload of the whole row.
	row *wholeRow
	// number is that of the buffer, and rowKey are the columns of its RowKey.
	number int
	rowKey []int
	// err, unless nil, says why no event can be made of a row. One that is left out need not be one: the columns may have had other names
	// when it was delivered.
	err error
}

// idFault is [Buffer.idFault] of a row. There is none where it cannot be told.
func (t *table) idFault(row []value) string {
	if t.id == absent || row[t.id].kind != null && row[t.id].kind != text {
		return ""
	}
	return t.buffer.idFault(row[t.id].data)
}

// unreadable returns a table of whose rows no event can be made, with what can be told of it nevertheless.
func unreadable(m *relationMessage, buffer *Buffer, err error) *table {
	t := &table{name: string(m.namespace) + "." + string(m.name), columns: len(m.columns), buffer: buffer, err: err}
	t.id = m.find(buffer.ID)
	return t
}

// resolveRowKey finds the columns of the buffer's RowKey.
func (t *table) resolveRowKey(m *relationMessage) {
	for _, name := range t.buffer.RowKey {
		i := m.find(name)
		if i == absent {
			t.rowKey = nil
			if t.err == nil {
				t.err = &MissingColumnError{Schema: t.buffer.Schema, Table: t.buffer.Table, Column: name}
			}
			return
		}
		t.rowKey = append(t.rowKey, i)
	}
}

// find returns the number of a column, or absent.
func (m *relationMessage) find(name string) int {
	for i := range m.columns {
		if name != "" && string(m.columns[i].name) == name {
			return i
		}
	}
	return absent
}

// newTable resolves the columns of buffer, which may be nil, in the relation. See typeName for types.
func newTable(m *relationMessage, buffer *Buffer, types map[uint32]string) (*table, error) {
	t := &table{name: string(m.namespace) + "." + string(m.name), columns: len(m.columns), buffer: buffer}
	if buffer == nil {
		return t, nil
	}
	if buffer.Topic == "" && buffer.TopicValue == "" {
		return nil, fmt.Errorf("%w: %s: there is no topic; name a topic column or give a value", ErrMapping, t.name)
	}
	var err error
	column := func(name string) int {
		if name == "" {
			return absent
		}
		for i := range m.columns {
			if string(m.columns[i].name) == name {
				return i
			}
		}
		if err == nil {
			err = &MissingColumnError{Schema: buffer.Schema, Table: buffer.Table, Column: name}
		}
		return absent
	}
	t.id, t.topic, t.key = column(buffer.ID), column(buffer.Topic), column(buffer.Key)
	t.payload, t.headers = column(buffer.Payload), column(buffer.Headers)
	if err != nil {
		return nil, err
	}
	if t.payload == absent {
		t.contentType, t.row = jsonType, newWholeRow(m)
	} else {
		name := typeName(m.columns[t.payload].typeID, types)
		if t.contentType, err = buffer.contentType(name); err != nil {
			return nil, err
		}
		t.hex = name == "bytea"
	}
	if t.headers != absent {
		if name := typeName(m.columns[t.headers].typeID, types); name != "json" && name != "jsonb" {
			return nil, buffer.badType(buffer.Headers, name, "json or jsonb")
		}
	}
	return t, nil
}

// typeName returns the name of a type, "json" for the built-in one and "app.json" for another. The names in announced are those
// of Type messages, which give a domain the name of its base type.
func typeName(id uint32, announced map[uint32]string) string {
	switch id {
	case oidBytea:
		return "bytea"
	case oidText:
		return "text"
	case oidJSON:
		return "json"
	case oidVarchar:
		return "varchar"
	case oidJSONB:
		return "jsonb"
	}
	if name, ok := announced[id]; ok {
		return name
	}
	return fmt.Sprintf("with OID %d", id)
}
