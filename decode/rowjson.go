package decode

import (
	"bytes"
	"errors"
	"fmt"
	"unicode/utf8"
)

// Column is one of a row's.
type Column struct {
	Name string
	Type uint32 // OID
}

// RowEncoder writes rows of a table as JSON objects: the same as to_jsonb makes of the row, in the order of the columns. (to_jsonb sorts, and
// drops the white space and the duplicate keys of a json column, which here stays as it is.) It is used by one goroutine at a time.
//
// Source: datum_to_jsonb and json_categorize_type in src/backend/utils/adt of Postgres. What it cannot do is to call functions: where a type
// of one's own, or of an extension other than hstore, has a cast to json, to_jsonb uses that, and here it is the text. Nor does it see generated
// columns that the server does not send.
type RowEncoder struct {
	columns []encodedColumn
	// later says that the types are from a later time than the row at hand.
	later bool
	// scratch holds what was unquoted, and is used as a stack; stack is that of validJSON; row is what payload returned.
	scratch, stack, row []byte
}

type encodedColumn struct {
	name string
	// prefix is the name with what surrounds it in the object.
	prefix []byte
	node   *node
}

// form is how a value is written.
type form uint8

const (
	asString form = iota
	asBool
	asNumber
	asTimestamp
	asTimestampTZ
	asJSON
	asArray
	asVector
	asObject
	asHStore
)

// node is a type, ready for use.
type node struct {
	form form
	oid  uint32
	// element and delimiter are those of an array.
	element   *node
	delimiter byte
	// attributes are those that a composite type has, and all include the dropped ones, whose node is nil.
	attributes, all []attribute
}

type attribute struct {
	prefix []byte // the name as a key
	node   *node
}

// NewRowEncoder returns an encoder of rows with these columns. The error is an [*UnknownTypeError] when types lacks one, and wraps [ErrMapping].
func NewRowEncoder(columns []Column, types Types) (*RowEncoder, error) {
	e := &RowEncoder{columns: make([]encodedColumn, len(columns))}
	c := compiler{types: types, done: map[uint32]*node{}}
	for i, column := range columns {
		n, err := c.node(column.Type)
		if unknown := (*UnknownTypeError)(nil); errors.As(err, &unknown) {
			unknown.Column = column.Name
			return nil, unknown
		}
		if err != nil {
			return nil, fmt.Errorf("%w: column %q: %w", ErrMapping, column.Name, err)
		}
		prefix := appendKey([]byte{'{'}, column.Name)
		if i > 0 {
			prefix[0] = ','
		}
		e.columns[i] = encodedColumn{column.Name, prefix, n}
	}
	return e, nil
}

// compiler makes nodes of types.
type compiler struct {
	types Types
	// done has nil for a type that is being made.
	done map[uint32]*node
}

func (c *compiler) node(oid uint32) (*node, error) {
	if n, ok := c.done[oid]; ok {
		if n == nil {
			return nil, fmt.Errorf("the type with OID %d is made of itself", oid) // which the catalog rules out
		}
		return n, nil
	}
	t, ok := c.types.get(oid)
	if !ok {
		return nil, &UnknownTypeError{OID: oid}
	}
	c.done[oid] = nil
	n := &node{oid: oid}
	var err error
	switch t.Kind {
	case Scalar:
		n.form = scalarForm(oid)
	case Array, Vector:
		n.form, n.delimiter = asArray, t.Delimiter
		if t.Kind == Vector {
			n.form, n.delimiter = asVector, ' '
		}
		n.element, err = c.node(t.Element)
	case Domain:
		n, err = c.node(t.Base)
	case Composite:
		n.form = asObject
		err = c.attributes(n, t.Attributes)
	case HStore:
		n.form = asHStore
	default:
		err = fmt.Errorf("the type with OID %d is of no kind", oid)
	}
	if err != nil {
		return nil, err
	}
	c.done[oid] = n
	return n, nil
}

func (c *compiler) attributes(n *node, attributes []Attribute) error {
	for _, a := range attributes {
		if a.Dropped {
			n.all = append(n.all, attribute{})
			continue
		}
		an, err := c.node(a.Type)
		if err != nil {
			return err
		}
		n.all = append(n.all, attribute{appendKey(nil, a.Name), an})
	}
	for _, a := range n.all {
		if a.node != nil {
			n.attributes = append(n.attributes, a)
		}
	}
	return nil
}

func scalarForm(oid uint32) form {
	switch oid {
	case oidBool:
		return asBool
	case oidInt2, oidInt4, oidInt8, oidFloat4, oidFloat8, oidNumeric:
		return asNumber
	case oidTimestamp:
		return asTimestamp
	case oidTimestampTZ:
		return asTimestampTZ
	case oidJSON, oidJSONB:
		return asJSON
	}
	return asString // a date too: its text is in ISO 8601
}

// maxScratch keeps an encoder that has seen one giant value from holding its memory for ever.
const maxScratch = 4 << 20

// Append appends the row to dst. The values are in the text form in which the server's output functions write them with the settings of
// ebb's sessions, and in the order of the columns; nil is NULL. (A cast to text is another form: of bool, char(n) and "char".)
//
// An error wraps [ErrRow], and dst comes back as it was. It is an [*UnknownTypeError] where a composite type has been altered.
func (e *RowEncoder) Append(dst []byte, values [][]byte) ([]byte, error) {
	if len(values) != len(e.columns) {
		return dst, fmt.Errorf("%w: %d values for %d columns", ErrRow, len(values), len(e.columns))
	}
	if len(e.columns) == 0 {
		return append(dst, "{}"...), nil
	}
	start := len(dst)
	for i := range e.columns {
		c := &e.columns[i]
		dst = append(dst, c.prefix...)
		var err error
		if dst, err = e.value(dst, c.node, values[i]); err != nil {
			e.scratch = e.scratch[:0]
			if changed := (*UnknownTypeError)(nil); errors.As(err, &changed) {
				changed.Column = c.name
				return dst[:start], changed
			}
			return dst[:start], fmt.Errorf("%w: column %q: %w", ErrRow, c.name, err)
		}
	}
	if cap(e.scratch) > maxScratch {
		e.scratch = nil
	}
	return append(dst, '}'), nil
}

// value appends one value, whose text nil is NULL.
func (e *RowEncoder) value(dst []byte, n *node, text []byte) ([]byte, error) {
	if text == nil {
		return append(dst, "null"...), nil
	}
	switch n.form {
	case asBool:
		switch string(text) {
		case "t", "true":
			return append(dst, "true"...), nil
		case "f", "false":
			return append(dst, "false"...), nil
		}
		return dst, syntaxError{n.oid, "a boolean", 0}
	case asNumber:
		if isNumber(text) {
			return append(dst, text...), nil
		}
		return appendQuoted(dst, text), nil // NaN, Infinity, -Infinity
	case asTimestamp, asTimestampTZ:
		return appendTimestamp(dst, text, n.form == asTimestampTZ), nil
	case asJSON:
		var valid bool
		if valid, e.stack = validJSON(text, e.stack); !valid {
			return dst, syntaxError{n.oid, "JSON", 0}
		}
		if !utf8.Valid(text) {
			text = bytes.ToValidUTF8(text, []byte("\ufffd"))
		}
		return append(dst, text...), nil
	case asArray:
		return e.array(dst, n, text)
	case asVector:
		return e.vector(dst, n, text)
	case asObject:
		return e.composite(dst, n, text)
	case asHStore:
		return e.hstore(dst, n, text)
	}
	return appendQuoted(dst, text), nil
}

// syntaxError is about a text that an output function cannot have written. It does not hold the text, which is the user's.
type syntaxError struct {
	oid  uint32
	want string
	at   int
}

func (e syntaxError) Error() string {
	return fmt.Sprintf("a value of the type with OID %d is not the text of %s at byte %d", e.oid, e.want, e.at)
}

// maxDimensions is MAXDIM of Postgres.
const maxDimensions = 6

// array appends the array whose text array_out has written.
func (e *RowEncoder) array(dst []byte, n *node, text []byte) ([]byte, error) {
	rest := text
	if len(rest) > 0 && rest[0] == '[' { // bounds, written where one does not begin at 1: "[0:1][-2:3]="
		end := bytes.IndexByte(rest, '=')
		if end < 0 || len(bytes.Trim(rest[:end], "[]:-0123456789")) > 0 {
			return dst, syntaxError{n.oid, "an array", 0}
		}
		rest = rest[end+1:]
	}
	dst, rest, ok, err := e.dimension(dst, n, rest, maxDimensions)
	if err == nil && (!ok || len(rest) > 0) {
		err = syntaxError{n.oid, "an array", len(text) - len(rest)}
	}
	return dst, err
}

// dimension appends what is in the braces at the front of text. It returns the rest of text, and false with the rest at which it is no array.
func (e *RowEncoder) dimension(dst []byte, n *node, text []byte, depth int) (_, rest []byte, ok bool, err error) {
	if len(text) == 0 || text[0] != '{' || depth == 0 {
		return dst, text, false, nil
	}
	dst = append(dst, '[')
	if text = text[1:]; len(text) > 0 && text[0] == '}' {
		return append(dst, ']'), text[1:], true, nil
	}
	for len(text) > 0 {
		switch text[0] {
		case '{':
			if dst, text, ok, err = e.dimension(dst, n, text, depth-1); !ok || err != nil {
				return dst, text, ok, err
			}
		case '"':
			mark := len(e.scratch)
			element, after, ok := e.unquote(text, false)
			if !ok {
				return dst, text, false, nil
			}
			if dst, err = e.value(dst, n.element, element); err != nil {
				return dst, text, false, err
			}
			e.scratch = e.scratch[:mark]
			text = after
		default:
			end := 0
			for end < len(text) && text[end] != n.delimiter && text[end] != '}' {
				if c := text[end]; c == '"' || c == '\\' || c == '{' {
					return dst, text, false, nil
				}
				end++
			}
			if end == 0 {
				return dst, text, false, nil
			}
			element := text[:end:end]
			if string(element) == "NULL" {
				element = nil
			}
			if dst, err = e.value(dst, n.element, element); err != nil {
				return dst, text, false, err
			}
			text = text[end:]
		}
		switch {
		case len(text) == 0:
		case text[0] == '}':
			return append(dst, ']'), text[1:], true, nil
		case text[0] == n.delimiter:
			dst = append(dst, ',')
			text = text[1:]
		default:
			return dst, text, false, nil
		}
	}
	return dst, text, false, nil
}

// vector appends an int2vector or oidvector, whose elements stand between blanks.
func (e *RowEncoder) vector(dst []byte, n *node, text []byte) ([]byte, error) {
	dst = append(dst, '[')
	for i := 0; len(text) > 0; i++ {
		if i > 0 {
			dst = append(dst, ',')
		}
		element, rest, more := bytes.Cut(text, []byte{' '})
		if len(element) == 0 || more && len(rest) == 0 {
			return dst, syntaxError{n.oid, "a vector", 0}
		}
		var err error
		if dst, err = e.value(dst, n.element, element); err != nil {
			return dst, err
		}
		text = rest
	}
	return append(dst, ']'), nil
}

// composite appends the row whose text record_out has written.
//
// Where the type was altered after that, attributes were added behind the others, so that those which a value lacks are null, as they are for
// to_jsonb then. Where some were dropped, a value that has all of them is from before that.
func (e *RowEncoder) composite(dst []byte, n *node, text []byte) ([]byte, error) {
	start := len(dst)
	dst, fits, err := e.record(dst, n, n.attributes, text)
	if fits || err != nil {
		return dst, err
	}
	if e.later && len(n.all) > len(n.attributes) {
		if dst, fits, err = e.record(dst[:start], n, n.all, text); fits || err != nil {
			return dst, err
		}
	}
	return dst[:start], &UnknownTypeError{OID: n.oid, Changed: true}
}

// record appends a composite value, and reports whether it may have these attributes, of which those without a node are left out.
func (e *RowEncoder) record(dst []byte, n *node, attributes []attribute, text []byte) (_ []byte, fits bool, err error) {
	bad := func(rest []byte) ([]byte, bool, error) {
		return dst, false, syntaxError{n.oid, "a composite value", len(text) - len(rest)}
	}
	if len(text) < 2 || text[0] != '(' {
		return bad(text)
	}
	dst = append(dst, '{')
	rest, empty := text[1:], true
	i := 0
	for ; ; i++ {
		var value []byte
		mark := len(e.scratch)
		switch {
		case len(rest) == 0:
			return bad(rest)
		case rest[0] == '"':
			content, after, ok := e.unquote(rest, true)
			if !ok {
				return bad(rest)
			}
			value, rest = content, after
		default:
			end := 0
			for end < len(rest) && rest[end] != ',' && rest[end] != ')' {
				if c := rest[end]; c == '"' || c == '\\' || c == '(' {
					return bad(rest[end:])
				}
				end++
			}
			if end > 0 {
				value = rest[:end:end]
			}
			rest = rest[end:]
		}
		if len(rest) == 0 || rest[0] != ',' && rest[0] != ')' {
			return bad(rest)
		}
		last := rest[0] == ')'
		rest = rest[1:]
		switch {
		case i < len(attributes):
			if a := &attributes[i]; a.node != nil {
				if !empty {
					dst = append(dst, ',')
				}
				empty = false
				dst = append(dst, a.prefix...)
				if dst, err = e.value(dst, a.node, value); err != nil {
					return dst, false, err
				}
			}
		case i > 0 || !last || value != nil: // "()" has no attribute, or one that is NULL
			return dst, false, nil
		}
		e.scratch = e.scratch[:mark]
		if last {
			break
		}
	}
	if len(rest) > 0 {
		return bad(rest)
	}
	for i++; i < len(attributes); i++ {
		if !e.later || len(n.all) > len(n.attributes) {
			return dst, false, nil
		}
		if !empty {
			dst = append(dst, ',')
		}
		empty = false
		dst = append(dst, attributes[i].prefix...)
		dst = append(dst, "null"...)
	}
	return append(dst, '}'), true, nil
}

// hstore appends the object whose text hstore_out has written: `"key"=>"value", "other"=>NULL`.
func (e *RowEncoder) hstore(dst []byte, n *node, text []byte) ([]byte, error) {
	dst = append(dst, '{')
	rest := text
	for len(rest) > 0 {
		bad := syntaxError{n.oid, "an hstore", len(text) - len(rest)}
		mark := len(e.scratch)
		key, after, ok := e.unquote(rest, false)
		if !ok || !bytes.HasPrefix(after, []byte("=>")) {
			return dst, bad
		}
		dst = append(appendQuoted(dst, key), ':')
		if rest = after[2:]; bytes.HasPrefix(rest, []byte("NULL")) {
			dst = append(dst, "null"...)
			rest = rest[4:]
		} else {
			value, after, ok := e.unquote(rest, false)
			if !ok {
				return dst, bad
			}
			dst = appendQuoted(dst, value)
			rest = after
		}
		e.scratch = e.scratch[:mark]
		if len(rest) > 0 {
			if !bytes.HasPrefix(rest, []byte(`, "`)) {
				return dst, bad
			}
			dst = append(dst, ',')
			rest = rest[2:]
		}
	}
	return append(dst, '}'), nil
}

// unquote takes the quoted string at the front of text, and returns its content, which is valid until e.scratch is cut back, and what follows
// it. A backslash makes the byte behind it part of the content; where quotes are doubled, two of them are one.
func (e *RowEncoder) unquote(text []byte, doubled bool) (content, rest []byte, ok bool) {
	if len(text) == 0 || text[0] != '"' {
		return nil, nil, false
	}
	text = text[1:]
	mark, start := len(e.scratch), 0
	for i := 0; i < len(text); i++ {
		switch text[i] {
		case '\\':
			if i+1 == len(text) {
				return nil, nil, false
			}
		case '"':
			if !doubled || i+1 == len(text) || text[i+1] != '"' {
				if len(e.scratch) == mark { // of one piece
					return text[start:i:i], text[i+1:], true
				}
				e.scratch = append(e.scratch, text[start:i]...)
				return e.scratch[mark:len(e.scratch):len(e.scratch)], text[i+1:], true
			}
		default:
			continue
		}
		e.scratch = append(e.scratch, text[start:i]...)
		i++
		start = i // the byte that is meant
	}
	return nil, nil, false
}

// appendTimestamp appends a timestamp in the form of ISO 8601, as JsonEncodeDateTime does, given that of DateStyle ISO:
// "2026-01-02 03:04:05.678+00 BC".
func appendTimestamp(dst, text []byte, zoned bool) []byte {
	for _, c := range text {
		if (c < '0' || c > '9') && bytes.IndexByte([]byte("-+:. BC"), c) < 0 {
			return appendQuoted(dst, text) // infinity
		}
	}
	date, rest, ok := bytes.Cut(text, []byte{' '})
	if !ok {
		return appendQuoted(dst, text)
	}
	dst = append(append(append(dst, '"'), date...), 'T')
	if zoned {
		clock, era, bc := bytes.Cut(rest, []byte{' '})
		dst = append(dst, clock...)
		if sign := bytes.LastIndexAny(clock, "+-"); sign >= 0 && len(clock)-sign == len("+00") {
			dst = append(dst, ":00"...)
		}
		if bc {
			dst = append(append(dst, ' '), era...)
		}
	} else {
		dst = append(dst, rest...)
	}
	return append(dst, '"')
}

// isNumber reports whether text is a number as RFC 8259 has it.
func isNumber(text []byte) bool {
	digits := func() bool {
		n := 0
		for n < len(text) && '0' <= text[n] && text[n] <= '9' {
			n++
		}
		text = text[n:]
		return n > 0
	}
	if len(text) > 0 && text[0] == '-' {
		text = text[1:]
	}
	if len(text) > 1 && text[0] == '0' && '0' <= text[1] && text[1] <= '9' || !digits() {
		return false
	}
	if len(text) > 0 && text[0] == '.' {
		if text = text[1:]; !digits() {
			return false
		}
	}
	if len(text) > 0 && (text[0] == 'e' || text[0] == 'E') {
		if text = text[1:]; len(text) > 0 && (text[0] == '+' || text[0] == '-') {
			text = text[1:]
		}
		if !digits() {
			return false
		}
	}
	return len(text) == 0
}

// appendKey appends a name and the colon behind it.
func appendKey(dst []byte, name string) []byte { return append(appendQuoted(dst, []byte(name)), ':') }

// appendQuoted appends a JSON string with the escapes of escape_json in Postgres. Each byte that is not UTF-8, as from a database in SQL_ASCII, becomes
// U+FFFD.
func appendQuoted(dst, s []byte) []byte {
	dst = append(dst, '"')
	start := 0
	for i := 0; i < len(s); {
		c := s[i]
		switch {
		case c >= utf8.RuneSelf:
			r, size := utf8.DecodeRune(s[i:])
			if r != utf8.RuneError || size > 1 {
				i += size
				continue
			}
		case c >= ' ' && c != '"' && c != '\\':
			i++
			continue
		}
		dst = append(dst, s[start:i]...)
		switch c {
		case '"', '\\':
			dst = append(dst, '\\', c)
		case '\b':
			dst = append(dst, '\\', 'b')
		case '\f':
			dst = append(dst, '\\', 'f')
		case '\n':
			dst = append(dst, '\\', 'n')
		case '\r':
			dst = append(dst, '\\', 'r')
		case '\t':
			dst = append(dst, '\\', 't')
		default:
			if c >= utf8.RuneSelf {
				dst = utf8.AppendRune(dst, utf8.RuneError)
				break
			}
			const hex = "0123456789abcdef"
			dst = append(dst, '\\', 'u', '0', '0', hex[c>>4], hex[c&0xf])
		}
		i++
		start = i
	}
	return append(append(dst, s[start:]...), '"')
}
