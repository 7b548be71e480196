package decode

import (
	"bytes"
	"encoding/json"
	"errors"
	"unicode/utf8"

	"ebb/event"
)

var errNotObject = errors.New("want a JSON object")

// appendHeaders turns a JSON object into headers in the batch's memory, in the order of the object. The value of a string is its
// content, that of anything else its JSON text. The JSON value null, which many libraries write for an empty map, is no headers. What is no valid UTF-8 becomes U+FFFD in a string, as in encoding/json.
func appendHeaders(batch *event.Batch, object []byte) ([]event.Header, error) {
	if !json.Valid(object) {
		return nil, errNotObject
	}
	s := objectScanner{bytes.TrimLeft(object, jsonSpace)}
	if s.rest[0] == 'n' {
		return nil, nil
	}
	if s.rest[0] != '{' {
		return nil, errNotObject
	}
	n := 0
	for s.next() {
		name := unquote(batch, s.token())
		s.next()
		value := s.token()
		if value[0] == '"' {
			value = unquote(batch, value)
		} else {
			value = batch.Copy(value)
		}
		batch.AddHeader(event.Header{Name: name, Value: value})
		n++
	}
	return batch.TakeHeaders(n), nil
}

const jsonSpace = " \t\r\n"

// objectScanner splits an object that is known to be valid JSON into names and values.
type objectScanner struct{ rest []byte }

// next moves to the next name or value, and reports whether there is one.
func (s *objectScanner) next() bool {
	s.rest = bytes.TrimLeft(s.rest[1:], jsonSpace) // past '{', ':' or ','
	return len(s.rest) > 0 && s.rest[0] != '}'
}

// token returns the name or value that next has found, and moves to what separates it from the one that follows.
func (s *objectScanner) token() []byte {
	end, depth := 0, 0
scan:
	for ; ; end++ {
		switch s.rest[end] {
		case '"':
			for end++; s.rest[end] != '"'; end++ {
				if s.rest[end] == '\\' {
					end++
				}
			}
		case '{', '[':
			depth++
		case ']':
			depth--
		case '}':
			if depth == 0 {
				break scan
			}
			depth--
		case ',', ':':
			if depth == 0 {
				break scan
			}
		}
	}
	token := bytes.TrimRight(s.rest[:end], jsonSpace)
	s.rest = s.rest[end:]
	return token
}

// unquote returns the content of a JSON string, in the batch's memory.
func unquote(batch *event.Batch, quoted []byte) []byte {
	inner := quoted[1 : len(quoted)-1]
	if bytes.IndexByte(inner, '\\') < 0 && utf8.Valid(inner) {
		return batch.Copy(inner)
	}
	var s string
	if err := json.Unmarshal(quoted, &s); err != nil {
		panic(err) // it is part of valid JSON
	}
	return batch.Copy([]byte(s))
}
