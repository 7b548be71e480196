package decode

import (
	"encoding/hex"
	"errors"
	"fmt"

	"ebb/event"
)

// wholeRow makes the payload of a table's rows from all of their columns.
type wholeRow struct {
	columns []Column
	encoder *RowEncoder
	// asOf is the end of the log when the types were read from the catalog.
	asOf event.LSN
	// values are scratch.
	values [][]byte
}

func newWholeRow(m *relationMessage) *wholeRow {
	w := &wholeRow{columns: make([]Column, len(m.columns)), values: make([][]byte, len(m.columns))}
	for i := range m.columns {
		w.columns[i] = Column{string(m.columns[i].name), m.columns[i].typeID}
	}
	return w
}

// readTypes makes the encoder, and looks up the types that are not built in.
func (d *Decoder) readTypes(t *table) error {
	oids := make([]uint32, 0, len(t.row.columns))
	for _, c := range t.row.columns {
		oids = append(oids, c.Type)
	}
	var types Types
	var asOf event.LSN
	if unknown := types.Unknown(oids); len(unknown) > 0 && d.lookUp != nil {
		var err error
		if types, asOf, err = d.lookUp(unknown); err != nil {
			return fmt.Errorf("look up the types of table %s: %w", t.name, err)
		}
	}
	encoder, err := NewRowEncoder(t.row.columns, types)
	if err != nil {
		return fmt.Errorf("table %s: %w", t.name, err)
	}
	t.row.encoder, t.row.asOf = encoder, asOf
	return nil
}

// encodeRow returns the row at hand as JSON, valid until the next one is encoded. A composite type may have been altered since the types were
// read, of which the server does not tell: where a value does not fit, they are read again. Then they are from a later time than the row. So they
// may not have been although the log went further: what alters a type can have committed, and wait for a synchronous standby unseen.
func (d *Decoder) encodeRow(t *table) ([]byte, error) {
	w := t.row
	for i := range d.insert.row {
		v := &d.insert.row[i]
		if v.kind != text && v.kind != null {
			return nil, malformed('I', 6, "row %s of %s: column %d has kind %q, want text or null", d.position, t.name, i+1, v.kind)
		}
		w.values[i] = v.data
	}
	w.encoder.later = w.asOf > d.position.Commit
	payload, err := w.encoder.payload(w.values)
	if changed := (*UnknownTypeError)(nil); errors.As(err, &changed) {
		if err := d.readTypes(t); err != nil {
			return nil, err
		}
		w.encoder.later = w.asOf > d.position.Commit
		payload, err = w.encoder.payload(w.values)
	}
	if err != nil {
		row := Row{ID: d.insert.column(t.id), Position: d.position}
		return nil, t.buffer.encodeError(&row, err)
	}
	return payload, nil
}

// payload is the row in memory of e, valid until the next one is encoded.
func (e *RowEncoder) payload(values [][]byte) ([]byte, error) {
	if e == nil {
		return nil, fmt.Errorf("%w: there is no encoder for the whole row", ErrMapping)
	}
	if cap(e.row) > maxScratch {
		e.row = nil
	}
	var err error
	e.row, err = e.Append(e.row[:0], values)
	return e.row, err
}

// encodeError names the row that could not be encoded.
func (b *Buffer) encodeError(row *Row, err error) error {
	at := "at " + row.Position.String()
	if row.ID != nil {
		at = fmt.Sprintf("with id %q %s", row.ID, at)
	}
	return fmt.Errorf("%s: row %s: %w", b.name(), at, err)
}

var errNotHex = errors.New("want bytea in hex format; set bytea_output = hex")

// unhex returns the bytes of a bytea value in hex format, in the batch's memory.
func unhex(batch *event.Batch, text []byte) ([]byte, error) {
	if len(text) < 2 || text[0] != '\\' || text[1] != 'x' {
		return nil, errNotHex
	}
	if len(text) == 2 {
		return []byte{}, nil
	}
	out := batch.Alloc(hex.DecodedLen(len(text) - 2))
	if _, err := hex.Decode(out, text[2:]); err != nil {
		return nil, errNotHex
	}
	return out, nil
}
