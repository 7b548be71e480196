// Package cloudevent writes CloudEvents 1.0 envelopes of an event.
package cloudevent

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"

	"ebb/event"
)

// Names of what ebb adds to every message, whatever the format.
const (
	HeaderPosition = "Ebb-Position"
	HeaderOrigin   = "Ebb-Origin"
	HeaderReplay   = "Ebb-Replay"
)

// MediaType is the content type of [Envelope.AppendJSON].
const MediaType = "application/cloudevents+json; charset=utf-8"

// MediaTypeBatch is the content type of a JSON array of what [Envelope.AppendJSON] writes.
const MediaTypeBatch = "application/cloudevents-batch+json; charset=utf-8"

var (
	// ErrHeader is wrapped by the error for an event with a header that cannot be passed on. The error names the header.
	ErrHeader = errors.New("header cannot be passed on")
	// ErrPayload is wrapped by the error for an event whose payload is not what its content type says, where the format depends
	// on it.
	ErrPayload = errors.New("payload does not fit its content type")
	// ErrFault is wrapped by the error for an event that has a fault.
	ErrFault = errors.New("impossible event")
)

// Explain takes an error of this package apart, for the dead letters: a reason that is the same for what is the same to an operator, and the rest.
func Explain(err error) (reason, detail string) {
	for _, known := range []error{ErrFault, ErrHeader, ErrPayload} {
		if errors.Is(err, known) {
			return known.Error(), strings.Replace(err.Error(), known.Error()+": ", "", 1)
		}
	}
	return "cannot be written as a CloudEvent", err.Error()
}

// Envelope says what all events of one bridge have in common. It may be used by several goroutines.
type Envelope struct {
	// Source is the CloudEvents source.
	Source string
}

var specVersion = []byte("1.0")

// Headers calls emit for every header of e in binary mode, in order: ce-specversion, ce-id, ce-source, ce-type (the topic),
// ce-subject (the key, unless it is nil), ce-time (unless it is zero), content-type (when known), the producer's own headers,
// Ebb-Position, Ebb-Origin unless the event was streamed, and Ebb-Replay if it is delivered again. The body is e.Payload.
//
// The values of ce-* are percent-encoded as §3.1.3.2 of the CloudEvents HTTP protocol binding 1.0 says; [AppendDecoded]
// undoes it. Those of the producer are passed on as they are, except that control bytes, bytes outside ASCII, and a space at
// either end, which HTTP and NATS would cut off, become %XX; a producer that must have its bytes back encodes them itself. A header
// content-type of the producer replaces that of the payload, and when it is empty, there is none. Two headers whose names differ
// in case are both emitted, except for content-type, where that is an error.
//
// An error wraps [ErrFault] or [ErrHeader], and then emit has not been called. The value is valid during the call of emit only. buf is
// scratch space; it is returned, possibly grown, to be passed to the next call.
func (c Envelope) Headers(e *event.Event, buf []byte, emit func(name string, value []byte)) ([]byte, error) {
	contentType, err := checkHeaders(e)
	if err != nil {
		return buf, err
	}
	if hasPrefixFold(contentType, "application/cloudevents") {
		// §3 of the binding: a receiver would take the message for one in structured mode and look for the attributes in the payload.
		return buf, headerError("content-type", "an event cannot be the payload of an event; send another type, or use the raw format")
	}
	emit("ce-specversion", specVersion)
	buf = emitAttribute("ce-id", e.ID, buf, emit)
	buf = AppendEncoded(buf[:0], c.Source)
	emit("ce-source", buf)
	buf = emitAttribute("ce-type", e.Topic, buf, emit)
	if e.Key != nil {
		buf = emitAttribute("ce-subject", e.Key, buf, emit)
	}
	if !e.Time.IsZero() {
		buf = appendTime(buf[:0], e)
		emit("ce-time", buf)
	}
	return emitRest(e, contentType, buf, emit), nil
}

// RawHeaders is [Envelope.Headers] without any ce-*: content-type (when known), the producer's own headers, Ebb-Position, and
// Ebb-Origin unless the event was streamed, and Ebb-Replay if it is delivered again.
func RawHeaders(e *event.Event, buf []byte, emit func(name string, value []byte)) ([]byte, error) {
	contentType, err := checkHeaders(e)
	if err != nil {
		return buf, err
	}
	return emitRest(e, contentType, buf, emit), nil
}

func emitRest(e *event.Event, contentType string, buf []byte, emit func(name string, value []byte)) []byte {
	if contentType != "" {
		buf = appendValue(buf[:0], contentType)
		emit("content-type", buf)
	}
	for i := range e.Headers {
		h := &e.Headers[i]
		if isContentType(h.Name) {
			continue
		}
		buf = appendValue(buf[:0], h.Value)
		emit(intern(h.Name), buf)
	}
	buf = e.Position.Append(buf[:0])
	emit(HeaderPosition, buf)
	if e.Origin != event.Streamed {
		buf = append(buf[:0], e.Origin...)
		emit(HeaderOrigin, buf)
	}
	if e.Replay != 0 {
		buf = strconv.AppendInt(buf[:0], e.Replay, 10)
		emit(HeaderReplay, buf)
	}
	return buf
}

func emitAttribute(name string, value, buf []byte, emit func(name string, value []byte)) []byte {
	buf = AppendEncoded(buf[:0], value)
	emit(name, buf)
	return buf
}

// appendTime appends RFC 3339 in UTC, always with microseconds, which is what Postgres has: so the strings sort as the times do.
func appendTime(b []byte, e *event.Event) []byte {
	return e.Time.UTC().AppendFormat(b, "2006-01-02T15:04:05.000000Z")
}

// checkHeaders returns the content type of e's payload, or an error wrapping [ErrFault] or [ErrHeader].
func checkHeaders(e *event.Event) (contentType string, err error) {
	if e.Fault != "" {
		return "", fmt.Errorf("%w: %s", ErrFault, e.Fault)
	}
	contentType = e.ContentType
	overridden := false
	for i := range e.Headers {
		h := &e.Headers[i]
		if err := CheckHeader(h.Name, h.Value); err != nil {
			return "", err
		}
		if !isContentType(h.Name) {
			continue
		}
		if overridden {
			return "", headerError(h.Name, "the event has two of it that differ in case; keep one")
		}
		overridden, contentType = true, intern(h.Value)
	}
	return contentType, nil
}

// CheckHeader returns an error wrapping [ErrHeader] when a header must not be passed on to HTTP or NATS: its name is not a token of
// RFC 9110, belongs to ebb, to NATS or to CloudEvents, or governs the connection or the framing of an HTTP message; or its value
// holds CR or LF.
func CheckHeader[T ~string | ~[]byte](name, value T) error {
	if len(name) == 0 {
		return headerError(name, "a name must not be empty")
	}
	for i := range len(name) {
		if !isToken[name[i]] {
			return headerError(name, "a name must be a token of RFC 9110: letters, digits and !#$%&'*+-.^_`|~")
		}
	}
	if hasPrefixFold(name, "nats-") || hasPrefixFold(name, "ebb-") || hasPrefixFold(name, "ce-") {
		return headerError(name, "names that begin with Nats-, Ebb- or ce- are reserved; choose another")
	}
	for _, r := range connectionHeaders {
		if len(name) == len(r) && hasPrefixFold(name, r) {
			return headerError(name, "it governs the HTTP connection; choose another name")
		}
	}
	for i := range len(value) {
		if value[i] == '\r' || value[i] == '\n' {
			return headerError(name, "its value holds a line break; encode it, for example with %0A")
		}
	}
	return nil
}

// connectionHeaders, in lower case, are the hop-by-hop headers of RFC 9110 §7.6.1 and those from which an HTTP client or proxy
// takes the framing and the route of a message.
var connectionHeaders = [...]string{
	"connection", "content-length", "expect", "host", "http2-settings", "keep-alive", "proxy-authenticate", "proxy-authorization",
	"proxy-connection", "te", "trailer", "transfer-encoding", "upgrade",
}

func isContentType(name []byte) bool {
	return len(name) == len("content-type") && hasPrefixFold(name, "content-type")
}

// hasPrefixFold expects prefix in lower case.
func hasPrefixFold[T ~string | ~[]byte](s T, prefix string) bool {
	if len(s) < len(prefix) {
		return false
	}
	for i := range len(prefix) {
		if lower(s[i]) != prefix[i] {
			return false
		}
	}
	return true
}

func lower(c byte) byte {
	if 'A' <= c && c <= 'Z' {
		return c + 'a' - 'A'
	}
	return c
}

func headerError[T ~string | ~[]byte](name T, why string) error {
	s := string(name)
	if len(s) > 64 {
		n := 64
		for n > 0 && !utf8.RuneStart(s[n]) {
			n--
		}
		s = s[:n] + "…"
	}
	return fmt.Errorf("header %q: %w: %s", s, ErrHeader, why)
}

var isToken = func() (t [256]bool) {
	for c := '0'; c <= '9'; c++ {
		t[c] = true
	}
	for c := 'a'; c <= 'z'; c++ {
		t[c], t[c-'a'+'A'] = true, true
	}
	for _, c := range "!#$%&'*+-.^_`|~" {
		t[c] = true
	}
	return t
}()
