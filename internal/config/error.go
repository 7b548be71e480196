package config

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"

	"ebb/internal/redact"
)

// Error is a wrong configuration. Its text is one line.
type Error struct {
	// File and Line (from 1) say where the wrong value or key stands. File is empty when the value came from elsewhere; Line is
	// 0 when the file as a whole is meant.
	File string
	Line int
	// Key is the full key with dots, as in nats.replicas, or the flag or environment variable that the value came from. It is
	// empty when the file is no YAML.
	Key string
	// Msg says what is wrong and what would be right. It never holds a secret.
	Msg string
}

func (e *Error) Error() string {
	var b strings.Builder
	if e.File != "" {
		b.WriteString(e.File)
		if e.Line > 0 {
			b.WriteString(":" + strconv.Itoa(e.Line))
		}
		b.WriteString(": ")
	}
	if e.Key != "" {
		b.WriteString(e.Key + ": ")
	}
	b.WriteString(e.Msg)
	return b.String()
}

// problem is something wrong with one value, before it is known where the value came from.
type problem struct {
	key string
	// shown is the value as the error shows it; empty for one that is or may be secret.
	shown string
	// text goes on where the value ends: "is not …; write …".
	text string
}

func (p *problem) msg() string {
	shown := p.shown
	if shown == "" {
		shown = "the value"
	}
	return shown + " " + p.text
}

// wants says, for each key, what may be written.
var wants = map[string]string{
	"postgres":               "a URL such as postgres://ebb@localhost:5432/app, or a DSN such as host=localhost user=ebb dbname=app",
	"slot":                   `1 to 57 of the characters a-z, 0-9 and _, such as ebb`,
	"publication":            "a name of 1 to 63 bytes, such as ebb",
	"source":                 "a URI reference such as ebb or https://shop.example/orders",
	"listen":                 `host:port such as 127.0.0.1:7070, or "" for none`,
	"buffers":                "a list of tables, or leave the key out for the managed table",
	"buffers[]":              "table: NAME and its columns below the dash",
	"buffers[].table":        "a table such as " + ManagedTable + " or public.outbox",
	"buffers[].id":           "the name of a column, or leave the key out",
	"buffers[].topic":        "the name of a column, or {value: TOPIC} for the same topic in every event",
	"buffers[].key":          "the name of a column, or leave the key out",
	"buffers[].payload":      "the name of a column, or leave the key out for the whole row as JSON",
	"buffers[].content_type": "a media type such as application/json, or leave the key out",
	"buffers[].headers":      "the name of a column, or leave the key out",
	"buffers[].delivered":    "keep, mark or delete",
	"buffers[].recorded":     "the name of a column",
	"buffers[].start":        "now or all",
	"sink": "a URL such as nats://127.0.0.1:4222 (nats, tls, ws, wss, http or https), " +
		"or one of the words stdout and embedded",
	"nats":               "its options on lines of their own, indented",
	"nats.stream":        "a name without spaces and without any of . * > / \\, such as EBB",
	"nats.subject":       `tokens with dots between them, such as "ebb.{topic}" or "ebb.{topic}.{key}"`,
	"nats.format":        "cloudevents or raw",
	"nats.create_stream": "true or false",
	"nats.replicas":      "1, 3 or 5",
	"nats.exclusive":     "true or false",
	"nats.creds":         "the path of a credentials file",
	"nats.on_reject":     "park or block",
	"nats.tls":           "{ca: FILE, cert: FILE, key: FILE}",
	"nats.tls.ca":        "the path of a PEM file",
	"nats.tls.cert":      "the paths of two PEM files, or neither",
	"nats.tls.key":       "the paths of two PEM files, or neither",
	"embedded":           "its options on lines of their own, indented",
	"embedded.store":     "the path of a directory, such as ./ebb-data",
	"embedded.listen":    "host:port such as 127.0.0.1:4222",
	"embedded.config":    "the path of a nats-server configuration file",
	"http":               "its options on lines of their own, indented",
	"http.format":        "cloudevents, structured or batch",
	"http.secrets":       `a list such as ["${WEBHOOK_SECRET}"]`,
	"http.headers":       "{NAME: VALUE}",
	"http.timeout":       "a duration such as 30s, 90m or 1h",
	"http.concurrency":   "a number from 1 to 1000",
	"http.batch":         "a number from 1 to 10000",
	"http.window":        "a number from 1 to 1000000",
	"http.on_reject":     "park or block",
	"http.bearer_file":   "the path of a file that holds a token",
	"http.gzip":          "true or false",
	"http.tls":           "{ca: FILE, cert: FILE, key: FILE}",
	"http.tls.ca":        "the path of a PEM file",
	"http.tls.cert":      "the paths of two PEM files, or neither",
	"http.tls.key":       "the paths of two PEM files, or neither",
	"replay":             "its options on lines of their own, indented",
	"replay.window":      "a duration such as 90m or 1h, or 0 for none",
	"replay.max_wal":     "a size such as 512MB or 4GB",
	"flow":               "its options on lines of their own, indented",
	"flow.warn":          "a size such as 512MB or 1GB, or 0 for none",
	"flow.limit":         "a size such as 512MB or 4GB, or 0 for none",
	"flow.on_full":       "reject or allow",
	"recorded":           "its options on lines of their own, indented",
	"recorded.every":     "a duration such as 500ms or 1s",
	"recorded.keep":      "a duration such as 90m or 1h, at least 10s",
	"http.headers[]":     "a text",
	"http.secrets[]": "whsec_ and at least 24 bytes in base64, whsk_ and an ed25519 private key of 32 or 64 bytes in base64, " +
		"or file:PATH for a file that holds one of them",
	"buffers[].topic.value": "a text",
}

// want returns the mend of a key; list indexes in it do not matter.
func want(key string) string {
	if i := strings.IndexByte(key, '['); i >= 0 {
		if j := strings.IndexByte(key[i:], ']'); j >= 0 {
			key = key[:i] + "[]" + key[i+j+1:]
		}
	}
	if strings.HasPrefix(key, "http.headers.") {
		key = "http.headers[]"
	}
	return wants[key]
}

// secretKey reports whether the value of a key is never shown.
func secretKey(key string) bool {
	return key == "postgres" || key == "nats.creds" || strings.HasPrefix(key, "http.secrets") ||
		strings.HasPrefix(key, "http.headers.")
}

// quote returns text on one line, in quotes and not longer than a line wants to be.
func quote(text string) string {
	const most = 80
	if utf8.RuneCountInString(text) > most {
		text = string([]rune(text)[:most]) + "…"
	}
	return strconv.Quote(text)
}

// shownKey returns a key as errors show it. A key is whatever stands before a colon, also a URL that lost its place.
func shownKey(key string) string {
	return oneLine(redact.URL(key))
}

// oneLine returns the text of another package's error fit for ours.
func oneLine(text string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, text)
}

// either joins words as in "a, b or c".
func either(words []string) string {
	if len(words) == 1 {
		return words[0]
	}
	last := len(words) - 1
	return fmt.Sprintf("%s or %s", strings.Join(words[:last], ", "), words[last])
}
