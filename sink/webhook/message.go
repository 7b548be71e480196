package webhook

import (
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/http"
	"slices"
	"strings"

	"ebb/event"
	"ebb/sink/cloudevent"
)

// Format is a content mode of the CloudEvents HTTP protocol binding.
type Format int

// The formats.
const (
	Binary     Format = iota // attributes in headers, the payload is the body
	Structured               // an event is a JSON object
	Batch                    // several are a JSON array
)

// message is the content of a request.
type message struct {
	header http.Header
	body   []byte
	id     string // webhook-id
}

// pack puts e into p, which keeps nothing of its batch, or finds out why it can never be sent. buf is scratch space.
func (s *Sink) pack(p *parcel, e *event.Event, buf *[]byte) {
	if s.format == Binary {
		// The header is written for each attempt: it takes several times the memory of the event.
		*buf, p.refusal = s.envelope.Headers(e, *buf, func(string, []byte) {})
		p.fill(e, nil)
		return
	}
	*buf, p.refusal = s.envelope.AppendJSON((*buf)[:0], e)
	p.fill(e, *buf) // of which nothing is left when there is a refusal
	if cap(*buf) > maxScratch {
		*buf = nil
	}
}

// fill copies an event, and what it is in JSON unless that is empty, into one piece of memory. The payload is mostly part of the JSON already.
func (p *parcel) fill(e *event.Event, body []byte) {
	size := e.Size() + len(body)
	shared := len(body) > 0 && len(e.Payload) > 0 && bytes.HasSuffix(body[:len(body)-len("}")], e.Payload)
	if shared {
		size -= len(e.Payload)
	}
	memory := make([]byte, 0, size)
	piece := func(b []byte) []byte {
		if b == nil {
			return nil
		}
		start := len(memory)
		memory = append(memory, b...)
		return memory[start:len(memory):len(memory)]
	}
	p.event = *e
	p.event.ID, p.event.Topic, p.event.Key = piece(e.ID), piece(e.Topic), piece(e.Key)
	p.event.Headers = slices.Clone(e.Headers)
	for i := range p.event.Headers {
		h := &p.event.Headers[i]
		h.Name, h.Value = piece(h.Name), piece(h.Value)
	}
	if len(body) > 0 {
		p.body = piece(body)
		p.wire = len(p.body) + len(",")
	}
	if shared {
		end := len(p.body) - len("}")
		p.event.Payload = p.body[end-len(e.Payload) : end : end]
	} else {
		p.event.Payload = piece(e.Payload)
	}
	p.position, p.size = e.Position, size
}

// empty gives the memory of a parcel back that is sent no more.
func (p *parcel) empty() { p.event, p.body = event.Event{}, nil }

// maxScratch keeps a giant event from holding its memory for ever.
const maxScratch = 1 << 20

// message returns what a request for the parcels says, signatures and credentials aside. Nothing in its header points into a batch.
func (s *Sink) message(parcels []*parcel) (message, error) {
	m := message{id: messageID(parcels)}
	switch s.format {
	case Binary:
		header, err := s.binaryHeader(&parcels[0].event)
		if err != nil {
			return message{}, err
		}
		m.header, m.body = header, parcels[0].event.Payload
	case Structured:
		m.header, m.body = http.Header{"Content-Type": {cloudevent.MediaType}}, parcels[0].body
	case Batch:
		m.header = http.Header{"Content-Type": {cloudevent.MediaTypeBatch}}
		size := len("[]")
		for _, p := range parcels {
			size += p.wire
		}
		m.body = append(make([]byte, 0, size), '[')
		for i, p := range parcels {
			if i > 0 {
				m.body = append(m.body, ',')
			}
			m.body = append(m.body, p.body...)
		}
		m.body = append(m.body, ']')
	}
	// net/http repeats a POST on a fresh connection when the receiver had closed the idle one, if it is told that this does no harm. It
	// does none, because the id stays the same. A header without a value is not sent.
	if _, ok := m.header["Idempotency-Key"]; !ok {
		m.header["Idempotency-Key"] = nil
	}
	for name, values := range s.headers {
		if _, ok := m.header[name]; ok && name == "User-Agent" && values[0] == "ebb" {
			continue // the default gives way to the producer's
		}
		m.header[name] = values
	}
	return m, nil
}

// binaryHeader returns the header of all requests for e.
func (s *Sink) binaryHeader(e *event.Event) (http.Header, error) {
	h := make(http.Header, len(s.headers)+len(e.Headers)+16)
	_, err := s.envelope.Headers(e, make([]byte, 0, 128), func(name string, value []byte) {
		name = http.CanonicalHeaderKey(name)
		if strings.HasPrefix(name, "Webhook-") {
			return // what a producer writes there must not pass for a signature
		}
		h[name] = append(h[name], string(value))
	})
	return h, err
}

// messageID returns the webhook-id. That of one event is the event's id, encoded as in ce-id; a full stop is encoded as well, since it is what
// separates the parts of what is signed. That of several is made of the ids of all of them, in order: two requests with the same
// webhook-id carry the same events. The first and the last id alone would not do, as those between them may be others after a restart.
func messageID(parcels []*parcel) string {
	if len(parcels) == 1 {
		return strings.ReplaceAll(string(cloudevent.AppendEncoded(nil, parcels[0].event.ID)), ".", "%2E")
	}
	h := sha256.New()
	var length [8]byte
	for _, p := range parcels {
		binary.BigEndian.PutUint64(length[:], uint64(len(p.event.ID)))
		h.Write(length[:])
		h.Write(p.event.ID)
	}
	return "batch_" + hex.EncodeToString(h.Sum(nil)[:16])
}

// compress makes the body a gzip one. Where the producer has encoded the payload already, it stays as it is.
func (m *message) compress() error {
	if len(m.body) == 0 || m.header["Content-Encoding"] != nil {
		return nil
	}
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(m.body); err != nil {
		return fmt.Errorf("compress the payload: %w", err)
	}
	if err := w.Close(); err != nil {
		return fmt.Errorf("compress the payload: %w", err)
	}
	m.body = b.Bytes()
	m.header["Content-Encoding"] = []string{"gzip"}
	return nil
}
