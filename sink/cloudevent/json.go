package cloudevent

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"

	"ebb/event"
)

// AppendJSON appends e to dst as one CloudEvents JSON object (structured mode) that holds no line break and ends without one. An
// error wraps [ErrHeader] or [ErrPayload], and then dst comes back as it was.
//
// The members are specversion, id, source, type (the topic), subject (the key, unless it is nil), time (unless it is zero),
// datacontenttype (when known), ebbposition, ebborigin (unless the event was streamed), the producer's own headers, and the payload,
// unless it is empty:
//   - JSON is "data", byte for byte, or compacted when it holds a line break;
//   - text/* in UTF-8 is "data", as a string;
//   - everything else is "data_base64".
//
// A header of the producer becomes an extension attribute, whose name is the header's in lower case, with everything but letters and
// digits left out ("header" when nothing is left). If that name is taken, by CloudEvents, ebb or a header before it, the smallest
// number from 2 that makes it free is added: subject becomes subject2. The value is passed on as it is.
//
// Bytes that are not UTF-8 become U+FFFD, as in encoding/json.
func (c Envelope) AppendJSON(dst []byte, e *event.Event) ([]byte, error) {
	contentType, err := checkHeaders(e)
	if err != nil {
		return dst, err
	}
	b := append(dst, `{"specversion":"1.0","id":`...)
	b = appendString(b, e.ID)
	b = append(b, `,"source":`...)
	b = appendString(b, c.Source)
	b = append(b, `,"type":`...)
	b = appendString(b, e.Topic)
	if e.Key != nil {
		b = append(b, `,"subject":`...)
		b = appendString(b, e.Key)
	}
	if !e.Time.IsZero() {
		b = append(b, `,"time":"`...)
		b = appendTime(b, e)
		b = append(b, '"')
	}
	if contentType != "" {
		b = append(b, `,"datacontenttype":`...)
		b = appendString(b, contentType)
	}
	b = append(b, `,"ebbposition":"`...)
	b = e.Position.Append(b)
	b = append(b, '"')
	if e.Origin != event.Streamed {
		b = append(b, `,"ebborigin":`...)
		b = appendString(b, e.Origin)
	}
	if e.Replay != 0 {
		b = append(b, `,"ebbreplay":`...)
		b = strconv.AppendInt(b, e.Replay, 10)
	}
	b = appendExtensions(b, e.Headers)
	b, err = appendData(b, contentType, e.Payload)
	if err != nil {
		return dst, err
	}
	return append(b, '}'), nil
}

// reservedNames may not be the name of an extension even when the event has no such member, because a header named subject must
// not turn into the subject of an event that has none.
var reservedNames = [...]string{
	"specversion", "id", "source", "type", "subject", "time", "datacontenttype", "dataschema", "data", "ebbposition", "ebborigin", "ebbreplay",
}

func appendExtensions(b []byte, headers []event.Header) []byte {
	if len(headers) == 0 {
		return b
	}
	// taken maps each name in use to the number that the next header of that name tries first.
	taken := make(map[string]int, len(reservedNames)+len(headers))
	for _, name := range reservedNames {
		taken[name] = 2
	}
	var scratch [64]byte
	for i := range headers {
		h := &headers[i]
		if isContentType(h.Name) {
			continue
		}
		name := scratch[:0]
		for _, c := range h.Name {
			if c = lower(c); 'a' <= c && c <= 'z' || '0' <= c && c <= '9' {
				name = append(name, c)
			}
		}
		if len(name) == 0 {
			name = append(name, "header"...)
		}
		base := len(name)
		for n, used := taken[string(name)]; used; n++ {
			name = strconv.AppendInt(name[:base], int64(n), 10)
			taken[string(name[:base])] = n + 1
			_, used = taken[string(name)]
		}
		taken[string(name)] = 2
		b = append(b, ',', '"')
		b = append(b, name...)
		b = append(b, '"', ':')
		b = appendString(b, h.Value)
	}
	return b
}

func appendData(b []byte, contentType string, payload []byte) ([]byte, error) {
	if len(payload) == 0 {
		return b, nil
	}
	switch {
	case isJSON(contentType):
		if !json.Valid(payload) || !utf8.Valid(payload) {
			return b, fmt.Errorf("content type %q: %w: the payload is no valid JSON; correct the one or the other", contentType, ErrPayload)
		}
		b = append(b, `,"data":`...)
		if bytes.IndexByte(payload, '\n') >= 0 || bytes.IndexByte(payload, '\r') >= 0 {
			return appendCompact(b, payload), nil
		}
		return append(b, payload...), nil
	case hasPrefixFold(contentType, "text/") && utf8.Valid(payload):
		b = append(b, `,"data":`...)
		return appendString(b, payload), nil
	default:
		b = append(b, `,"data_base64":"`...)
		b = base64.StdEncoding.AppendEncode(b, payload)
		return append(b, '"'), nil
	}
}

// isJSON reports whether a media type is application/json, text/json or ends in +json (RFC 6839), with any parameters.
func isJSON(contentType string) bool {
	media, _, _ := strings.Cut(contentType, ";")
	media = strings.Trim(media, " \t")
	if hasPrefixFold(media, "application/json") && len(media) == len("application/json") ||
		hasPrefixFold(media, "text/json") && len(media) == len("text/json") {
		return true
	}
	return len(media) >= len("+json") && hasPrefixFold(media[len(media)-len("+json"):], "+json")
}

// appendCompact appends valid JSON without the white space between its tokens.
func appendCompact(b, src []byte) []byte {
	inString := false
	for i := 0; i < len(src); i++ {
		c := src[i]
		switch {
		case inString && c == '\\':
			b = append(b, c, src[i+1])
			i++
			continue
		case c == '"':
			inString = !inString
		case !inString && (c == ' ' || c == '\t' || c == '\r' || c == '\n'):
			continue
		}
		b = append(b, c)
	}
	return b
}

// appendString appends s as a JSON string, byte for byte what encoding/json writes without HTML escaping.
func appendString[T ~string | ~[]byte](b []byte, s T) []byte {
	b = append(b, '"')
	start := 0
	for i := 0; i < len(s); {
		c := s[i]
		if c >= ' ' && c != '"' && c != '\\' && c < utf8.RuneSelf {
			i++
			continue
		}
		if c >= utf8.RuneSelf {
			r, size := decodeRune(s[i:min(i+utf8.UTFMax, len(s))])
			switch {
			case r == utf8.RuneError && size == 1:
				b = append(b, s[start:i]...)
				b = append(b, `\ufffd`...)
			case r == '\u2028' || r == '\u2029':
				// Line breaks to JavaScript, and to whoever splits lines by Unicode's rules.
				b = append(b, s[start:i]...)
				b = append(b, `\u202`...)
				b = append(b, upperHex[r&0xf])
			default:
				i += size
				continue
			}
			i += size
			start = i
			continue
		}
		b = append(b, s[start:i]...)
		switch c {
		case '"', '\\':
			b = append(b, '\\', c)
		case '\b':
			b = append(b, `\b`...)
		case '\f':
			b = append(b, `\f`...)
		case '\n':
			b = append(b, `\n`...)
		case '\r':
			b = append(b, `\r`...)
		case '\t':
			b = append(b, `\t`...)
		default:
			b = append(b, `\u00`...)
			b = append(b, lowerHex[c>>4], lowerHex[c&0xf])
		}
		i++
		start = i
	}
	b = append(b, s[start:]...)
	return append(b, '"')
}

const lowerHex = "0123456789abcdef"

// decodeRune takes at most utf8.UTFMax bytes of a string or a slice; the conversion of so few stays on the stack.
func decodeRune[T ~string | ~[]byte](s T) (rune, int) { return utf8.DecodeRuneInString(string(s)) }
