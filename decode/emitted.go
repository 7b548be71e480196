package decode

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"ebb/event"
)

// emitPrefix is the prefix of the logical decoding messages that ebb.emit writes.
const emitPrefix = "ebb"

// emitVersion is the one version of their content that there is.
const emitVersion = 1

// emitted is what ebb.emit was called with. Its byte slices point into the message.
type emitted struct {
	topic, key, headers, payload []byte // key and headers may be nil
}

// parseEmitted reads the content of a message of ebb.emit, behind the token: a byte with the version; topic, key and headers, each behind its length as
// a big-endian int32, which is -1 for NULL; and the payload, up to the end. All of it is in UTF-8, whatever the encoding of the database is.
func parseEmitted(content []byte) (m emitted, err error) {
	if len(content) == 0 {
		return emitted{}, badContent("it is empty")
	}
	if content[0] != emitVersion {
		return emitted{}, badContent("it has version %d, and this ebb knows %d alone: use a newer one", content[0], emitVersion)
	}
	rest := content[1:]
	if m.topic, rest, err = emittedField(rest, "topic"); err != nil {
		return emitted{}, err
	}
	if m.key, rest, err = emittedField(rest, "key"); err != nil {
		return emitted{}, err
	}
	if m.headers, rest, err = emittedField(rest, "headers"); err != nil {
		return emitted{}, err
	}
	switch {
	case m.topic == nil:
		return emitted{}, badContent("the topic is NULL")
	case len(rest) == 0:
		return emitted{}, badContent("there is no payload")
	}
	m.payload = rest
	return m, nil
}

// emittedField takes a value from the front of content; nil is NULL.
func emittedField(content []byte, name string) (value, rest []byte, err error) {
	if len(content) < 4 {
		return nil, nil, badContent("%s: needs 4 bytes, has %d", name, len(content))
	}
	n := int32(binary.BigEndian.Uint32(content))
	if content = content[4:]; n == -1 {
		return nil, content, nil
	}
	if n < 0 || int64(n) > int64(len(content)) {
		return nil, nil, badContent("%s: has %d bytes, of %d that there are", name, n, len(content))
	}
	return content[:n:n], content[n:], nil
}

func badContent(format string, args ...any) error {
	return malformed('M', 0, "content of ebb.emit: "+format, args...)
}

// decodeMessage decodes a logical decoding message, which is an event if ebb.emit has written it. It counts in its transaction in any case. One that
// is not transactional belongs to no transaction: it comes when it is decoded, between two of them.
//
// Anybody may write messages. Those of ebb.emit begin with a token that nobody else knows.
func (d *Decoder) decodeMessage(msg []byte, batch *event.Batch) error {
	m, err := parseMessage(msg)
	if err != nil {
		return err
	}
	ours := string(m.prefix) == emitPrefix && len(d.token) > 0
	genuine := ours && m.transactional && bytes.HasPrefix(m.content, d.token)
	switch {
	case !ours:
		d.skipped.Messages++
	case !genuine:
		d.skipped.Forged++
	}
	if !m.transactional {
		return nil
	}
	if err := d.needTransaction('M'); err != nil {
		return err
	}
	d.position.Index++
	if !genuine {
		if d.position == d.skip.Through && d.skip.ID != "" {
			return d.positionsChanged(fmt.Sprintf("a message with prefix %q that is no event", m.prefix))
		}
		return nil
	}
	content, err := parseEmitted(m.content[len(d.token):])
	if err != nil {
		return err
	}
	if !d.passed || d.more < d.skip.More || d.skip.Held != nil {
		if left, err := d.leaveOut(d.positionID(), nil); left || err != nil {
			return err
		}
	}
	row := Row{ID: d.positionID(), Topic: content.topic, Key: content.key, Headers: content.headers, Payload: content.payload, Time: d.time, Position: d.position}
	if err := emittedBuffer.append(batch, &row, jsonType, event.Streamed); err != nil {
		return err
	}
	batch.Events[len(batch.Events)-1].Replay = d.replay.number(d.position)
	return nil
}

// emittedBuffer maps messages as if they were rows of a table without an id. Its name is what errors say.
var emittedBuffer = Buffer{Schema: "ebb", Table: "emit", Topic: "topic", Key: "key", Payload: "payload", Headers: "headers"}
