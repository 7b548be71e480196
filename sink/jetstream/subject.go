package jetstream

import (
	"bytes"
	"fmt"
	"strings"
)

// maxSubject is where subjects are cut. The server stores much longer ones, and ends the connection over one that fills its
// line buffer.
const maxSubject = 256

const (
	topicPlaceholder = "{topic}"
	keyPlaceholder   = "{key}"
)

// subject is a parsed template such as "ebb.{topic}".
type subject struct {
	parts []string // literals and placeholders in turn
}

func parseSubject(template string) (subject, error) {
	var s subject
	for rest := template; rest != ""; {
		open := strings.IndexByte(rest, '{')
		if open < 0 {
			s.parts = append(s.parts, rest)
			break
		}
		if open > 0 {
			s.parts = append(s.parts, rest[:open])
		}
		end := strings.IndexByte(rest, '}')
		if end < open || (rest[open:end+1] != topicPlaceholder && rest[open:end+1] != keyPlaceholder) {
			return subject{}, fmt.Errorf("nats.subject %q: want %s or %s at %q", template, topicPlaceholder, keyPlaceholder, rest[open:])
		}
		s.parts = append(s.parts, rest[open:end+1])
		rest = rest[end+1:]
	}
	if len(s.parts) == 0 {
		return subject{}, fmt.Errorf("nats.subject is empty; ebb.%s is usual", topicPlaceholder)
	}
	return s, nil
}

// append appends the subject of an event to b. The bytes of topic and key that could mean something else in a subject are
// percent-encoded; dots in a topic separate tokens.
//
// A subject that would be longer than maxSubject is cut: the message carries the topic and the key in full in its headers.
func (s subject) append(b []byte, topic, key []byte) []byte {
	start := len(b)
	for _, part := range s.parts {
		switch part {
		case topicPlaceholder:
			for i := 0; ; i++ {
				token, rest, more := bytes.Cut(topic, []byte{'.'})
				if i > 0 {
					b = append(b, '.')
				}
				b = appendToken(b, token)
				if !more {
					break
				}
				topic = rest
			}
		case keyPlaceholder:
			b = appendToken(b, key)
		default:
			b = append(b, part...)
		}
	}
	if len(b)-start > maxSubject {
		b = cut(b[:start+maxSubject], start)
	}
	return b
}

// cut ends a subject that was cut anywhere behind a whole character of a token.
func cut(b []byte, start int) []byte {
	for i := range min(2, len(b)-start) {
		if at := len(b) - 1 - i; b[at] == '%' {
			// An escape is three bytes; a lone percent sign as the last byte may also stand for an empty token.
			b = b[:at]
			break
		}
	}
	if n := len(b); n > start && b[n-1] == '.' {
		b = b[:n-1]
	}
	return b
}

func appendToken(b, token []byte) []byte {
	const digits = "0123456789ABCDEF"
	if len(token) == 0 {
		return append(b, '%')
	}
	for _, c := range token {
		if 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '_' || c == '-' {
			b = append(b, c)
		} else {
			b = append(b, '%', digits[c>>4], digits[c&15])
		}
	}
	return b
}

// wildcard returns the subject that matches all subjects of the template: its literal tokens up to the first
// placeholder, and everything below.
func (s subject) wildcard() string {
	var literal string
	if p := s.parts[0]; p != topicPlaceholder && p != keyPlaceholder {
		literal = p
		if len(s.parts) == 1 {
			return literal
		}
	}
	return literal[:strings.LastIndexByte(literal, '.')+1] + ">"
}
