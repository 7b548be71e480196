package config

import (
	"fmt"
	"mime"
	"strings"
	"unicode/utf8"
)

// managedSchema is that of the managed table and of ebb's own records.
const managedSchema = "ebb"

// Managed reports whether the buffer is the managed table.
func (b *Buffer) Managed() bool { return b.Table == ManagedTable }

// Name returns the schema and the name of the table, as the catalog has them. The table was checked by Load.
func (b *Buffer) Name() (schema, table string) {
	schema, table, _ = parseTable(b.Table)
	return schema, table
}

// parseTable reads the name of a table as Postgres writes it: a schema and a dot may stand before it, which is public otherwise, and what is
// not in double quotes is in lower case.
func parseTable(text string) (schema, table string, ok bool) {
	first, rest, ok := identifier(text)
	if !ok {
		return "", "", false
	}
	if rest == "" {
		return "public", first, true
	}
	if rest[0] != '.' {
		return "", "", false
	}
	second, rest, ok := identifier(rest[1:])
	return first, second, ok && rest == ""
}

// identifier reads one name, and returns what stands behind it.
// Source: https://www.postgresql.org/docs/current/sql-syntax-lexical.html#SQL-SYNTAX-IDENTIFIERS
func identifier(text string) (name, rest string, ok bool) {
	if strings.HasPrefix(text, `"`) {
		var b strings.Builder
		for i := 1; i < len(text); i++ {
			if text[i] != '"' {
				b.WriteByte(text[i])
				continue
			}
			if i+1 < len(text) && text[i+1] == '"' {
				b.WriteByte('"')
				i++
				continue
			}
			return b.String(), text[i+1:], isIdentifier(b.String())
		}
		return "", "", false
	}
	end := 0
	for end < len(text) {
		c := text[end]
		if c != '_' && c < utf8.RuneSelf && (c|0x20 < 'a' || c|0x20 > 'z') && (end == 0 || c != '$' && (c < '0' || c > '9')) {
			break
		}
		end++
	}
	name = strings.Map(func(r rune) rune {
		if 'A' <= r && r <= 'Z' {
			return r + 'a' - 'A'
		}
		return r
	}, text[:end])
	return name, text[end:], isIdentifier(name)
}

func isIdentifier(name string) bool {
	return name != "" && len(name) <= maxIdentifier && printable(name)
}

func (c *Config) checkBuffers() *problem {
	if len(c.Buffers) == 0 {
		return &problem{key: "buffers", shown: "[]", text: "names no table; write " + want("buffers")}
	}
	seen := map[[2]string]int{}
	for i := range c.Buffers {
		b := &c.Buffers[i]
		key := fmt.Sprintf("buffers[%d].", i)
		schema, table, ok := parseTable(b.Table)
		if !ok {
			return is(key+"table", b.Table, "not the name of a table")
		}
		if first, twice := seen[[2]string{schema, table}]; twice {
			return &problem{key: key + "table", shown: quote(b.Table), text: fmt.Sprintf("is the table of buffers[%d] as well; keep one of them", first)}
		}
		seen[[2]string{schema, table}] = i
		if b.Topic.Column == "" && b.Topic.Value == "" {
			return is(key+"topic", "", "not a topic")
		}
		if p := oneOf(key+"delivered", b.Delivered, DeliveredKeep, DeliveredMark, DeliveredDelete); p != nil {
			return p
		}
		if p := oneOf(key+"start", b.Start, StartNow, StartAll); p != nil {
			return p
		}
		p := b.checkOwn(key)
		switch {
		case b.Managed():
			p = b.checkManaged(key)
		case schema == managedSchema:
			p = &problem{key: key + "table", shown: quote(b.Table), text: "is in the schema that holds what ebb keeps itself; write " + ManagedTable +
				", or the name of a table of your own"}
		}
		if p != nil {
			return p
		}
	}
	return nil
}

// checkManaged refuses another mapping of the managed table than the one that it is made for.
func (b *Buffer) checkManaged(key string) *problem {
	only := managedBuffer()
	for _, f := range []struct{ name, got, only string }{
		{"id", b.ID, only.ID},
		{"topic.value", b.Topic.Value, only.Topic.Value},
		{"topic", b.Topic.Column, only.Topic.Column},
		{"key", b.Key, only.Key},
		{"payload", b.Payload, only.Payload},
		{"content_type", b.ContentType, only.ContentType},
		{"headers", b.Headers, only.Headers},
		{"delivered", b.Delivered, only.Delivered},
		{"recorded", b.Recorded, only.Recorded},
		{"start", b.Start, only.Start},
	} {
		if f.got == f.only {
			continue
		}
		mend := "write " + f.only + ", or leave the key out"
		switch {
		case f.name == "topic.value":
			mend = "write topic: " + only.Topic.Column + ", or leave the key out"
		case f.only == "":
			mend = "leave the key out"
		}
		return &problem{key: key + f.name, shown: quote(f.got), text: "is not possible for " + ManagedTable + ", whose mapping is fixed; " + mend}
	}
	return nil
}

// checkOwn checks what concerns a table of one's own.
func (b *Buffer) checkOwn(key string) *problem {
	for _, f := range []struct{ name, value string }{
		{"id", b.ID}, {"topic", b.Topic.Column}, {"key", b.Key}, {"payload", b.Payload}, {"headers", b.Headers},
	} {
		if f.value != "" && !isIdentifier(f.value) {
			return is(key+f.name, f.value, "not the name of a column")
		}
	}
	if !printable(b.Topic.Value) {
		return is(key+"topic.value", b.Topic.Value, "a text with a control character")
	}
	if b.Delivered == DeliveredMark {
		if !isIdentifier(b.Recorded) {
			return is(key+"recorded", b.Recorded, "not the name of a column, which delivered: mark needs")
		}
		for _, f := range []struct{ name, value string }{
			{"id", b.ID}, {"topic", b.Topic.Column}, {"key", b.Key}, {"payload", b.Payload}, {"headers", b.Headers},
		} {
			if f.value == b.Recorded {
				return is(key+"recorded", b.Recorded, "the column of "+f.name+" as well, which a mark would change")
			}
		}
	}
	if b.ContentType != "" {
		if _, _, err := mime.ParseMediaType(b.ContentType); err != nil || !strings.Contains(b.ContentType, "/") || !printable(b.ContentType) {
			return is(key+"content_type", b.ContentType, "not a media type")
		}
		if b.Payload == "" {
			return is(key+"content_type", b.ContentType, "set without a payload column; the whole row is application/json")
		}
	}
	return nil
}
