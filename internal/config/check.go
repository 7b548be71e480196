package config

import (
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/textproto"
	"net/url"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"ebb/internal/redact"
)

const (
	// maxSlot leaves room in the 63 bytes of a slot's name for the ending of the trailing slot, "_trail".
	maxSlot = 57
	// maxIdentifier is NAMEDATALEN-1.
	maxIdentifier = 63
	// maxSubject is the length at which subjects are cut off, and so more than enough for a template.
	maxSubject = 256
	// maxStream is the longest name that nats-server takes.
	maxStream = 255
	// minKeep leaves the ring of partitions wide enough to turn.
	minKeep = 10 * time.Second
	// minSecret is how many bytes Standard Webhooks asks of a symmetric secret.
	minSecret = 24
	// These are far beyond sense, and bound what a slip of the pen costs.
	maxConcurrency, maxBatch, maxWindow = 1000, 10_000, 1_000_000
)

// Validate returns an *Error about the first impossible value, or nil. Load has called it already.
func (c *Config) Validate() error {
	if p := c.check(); p != nil {
		return &Error{Key: shownKey(p.key), Msg: p.msg()}
	}
	return nil
}

// check returns the first problem, in the order of the file.
func (c *Config) check() *problem {
	checks := []func() *problem{
		func() *problem { return optional(c.Postgres, checkPostgres) },
		c.checkNames,
		func() *problem { return checkAddress("listen", c.Listen, true) },
		c.checkBuffers,
		func() *problem { return optional(c.Sink, checkSink) },
		c.checkNATS,
		c.checkEmbedded,
		c.checkHTTP,
		c.checkRest,
	}
	for _, check := range checks {
		if p := check(); p != nil {
			return p
		}
	}
	return nil
}

func optional(text string, check func(string) *problem) *problem {
	if text == "" {
		return nil
	}
	return check(text)
}

// is returns the problem of a value that is what is said of it.
func is(key string, value any, what string) *problem {
	p := &problem{key: key, text: "is " + what + "; write " + want(key)}
	switch value := value.(type) {
	case string:
		p.shown = quote(value)
	case time.Duration:
		p.shown = value.String()
	default:
		p.shown = fmt.Sprint(value)
	}
	if secretKey(key) {
		p.shown = ""
	}
	return p
}

// oneOf checks a word.
func oneOf(key, value string, words ...string) *problem {
	if slices.Contains(words, value) {
		return nil
	}
	return is(key, value, "not "+either(words))
}

func checkPostgres(text string) *problem {
	const reading = "not a Postgres URL or DSN"
	if !strings.Contains(text, "=") && !isPostgres(before(text, "://")) {
		return is("postgres", text, reading)
	}
	_, err := pgx.ParseConfig(text)
	if err == nil {
		return nil
	}
	return is("postgres", text, reading+postgresReason(text, err))
}

// postgresReason returns what a parse error says apart from the connection string, which holds the password, and apart from
// quotations of it.
func postgresReason(text string, err error) string {
	var parseErr *pgconn.ParseConfigError
	if !errors.As(err, &parseErr) {
		return ""
	}
	msg := oneLine(err.Error())
	i := strings.LastIndex(msg, "`: ")
	if i < 0 {
		return ""
	}
	reason := msg[i+len("`: "):]
	if summary, detail, ok := strings.Cut(reason, " ("); ok && strings.ContainsAny(detail, "\"'`") {
		reason = summary
	}
	if strings.ContainsAny(reason, "\"'`@") {
		return ""
	}
	if isPostgres(before(text, "://")) && (strings.Contains(reason, "URL") || strings.Contains(reason, "port")) {
		reason += "; special characters in the user name and the password are written as %XX"
	}
	return ": " + reason
}

func isPostgres(scheme string) bool { return scheme == "postgres" || scheme == "postgresql" }

func before(text, sep string) string {
	head, _, ok := strings.Cut(text, sep)
	if !ok {
		return ""
	}
	return head
}

func (c *Config) checkNames() *problem {
	legal := func(r rune) bool { return 'a' <= r && r <= 'z' || '0' <= r && r <= '9' || r == '_' }
	if c.Slot == "" || len(c.Slot) > maxSlot || strings.ContainsFunc(c.Slot, func(r rune) bool { return !legal(r) }) {
		return is("slot", c.Slot, "not the name of a slot")
	}
	if c.Publication == "" || len(c.Publication) > maxIdentifier || !printable(c.Publication) {
		return is("publication", c.Publication, "not the name of a publication")
	}
	if _, err := url.Parse(c.Source); err != nil || c.Source == "" || !printable(c.Source) || strings.Contains(c.Source, " ") {
		return is("source", c.Source, "not a URI reference")
	}
	return nil
}

func printable(text string) bool {
	return utf8.ValidString(text) && !strings.ContainsFunc(text, unicode.IsControl)
}

func checkAddress(key, text string, mayBeEmpty bool) *problem {
	if text == "" && mayBeEmpty {
		return nil
	}
	host, port, err := net.SplitHostPort(text)
	if err != nil || !printable(host) || strings.ContainsAny(host, " /@") {
		return is(key, text, "not host:port")
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return is(key, text, "not host:port")
	}
	return nil
}

// listComma stands before every further URL of a list.
var listComma = regexp.MustCompile(`,\s*[A-Za-z][A-Za-z0-9+.-]*://`)

// sinkFamilies holds the schemes of a sink's URLs. Those of one family may stand in one list.
var sinkFamilies = map[string]string{
	"nats": "nats", "tls": "nats",
	"ws": "ws", "wss": "ws",
	"http": "http", "https": "http",
}

// sinkFamily returns the family of a sink's URLs, or what is wrong with them.
func sinkFamily(text string) (family, wrong string) {
	servers := strings.Split(text, ",")
	if sinkFamilies[before(text, "://")] == "http" && !listComma.MatchString(text) {
		servers = []string{text} // a comma may stand in its path
	}
	for _, server := range servers {
		server = strings.TrimSpace(server)
		scheme, rest, ok := strings.Cut(server, "://")
		if !ok {
			return "", "not a URL with a scheme, nor stdout or embedded"
		}
		f := sinkFamilies[scheme]
		switch {
		case f == "":
			return "", "a URL of no known scheme"
		case family == "":
			family = f
		case f == "http" || family == "http":
			return "", "more than one URL; HTTP takes one"
		case f != family:
			return "", "a mixture of schemes; NATS servers are all nats or tls, or all ws or wss"
		}
		u, err := url.Parse(server)
		if err != nil || u.Hostname() == "" || strings.ContainsAny(rest, " ") || !printable(rest) {
			return "", "a URL that cannot be read"
		}
		if port := u.Port(); port != "" {
			if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
				return "", "a URL with an impossible port"
			}
		}
		if f != "http" && (strings.Trim(u.Path, "/") != "" || u.RawQuery != "") && f != "ws" {
			return "", "a URL with a path, which NATS does not have"
		}
		if u.Fragment != "" {
			return "", "a URL with a fragment (#), which is never sent"
		}
	}
	return family, ""
}

func checkSink(text string) *problem {
	if text == SinkStdout || text == SinkEmbedded {
		return nil
	}
	if _, wrong := sinkFamily(text); wrong != "" {
		return is("sink", redact.URL(text), wrong)
	}
	return nil
}

func (c *Config) checkNATS() *problem {
	n := c.NATS
	if n.Stream == "" || len(n.Stream) > maxStream || !printable(n.Stream) || strings.ContainsAny(n.Stream, ` .*>/\`) ||
		strings.ContainsFunc(n.Stream, unicode.IsSpace) {
		return is("nats.stream", n.Stream, "not the name of a stream")
	}
	if wrong := checkSubject(n.Subject); wrong != "" {
		return is("nats.subject", n.Subject, wrong)
	}
	if p := oneOf("nats.format", n.Format, FormatCloudEvents, FormatRaw); p != nil {
		return p
	}
	if !slices.Contains([]int{1, 3, 5}, n.Replicas) {
		return is("nats.replicas", n.Replicas, "not a number of replicas")
	}
	if p := checkPair("nats.tls", n.TLS); p != nil {
		return p
	}
	return oneOf("nats.on_reject", n.OnReject, OnRejectPark, OnRejectBlock)
}

// checkPair checks that a certificate and its key are both there or both not.
func checkPair(key string, t TLS) *problem {
	if t.Cert != "" && t.Key == "" {
		return is(key+".cert", t.Cert, "set without "+key+".key")
	}
	if t.Key != "" && t.Cert == "" {
		return is(key+".key", t.Key, "set without "+key+".cert")
	}
	return nil
}

// checkSubject returns what is wrong with a template of subjects.
func checkSubject(subject string) string {
	if subject == "" || len(subject) > maxSubject {
		return "not a subject"
	}
	literal := strings.NewReplacer("{topic}", "t", "{key}", "k").Replace(subject)
	for token := range strings.SplitSeq(literal, ".") {
		switch {
		case token == "":
			return "a subject with an empty token"
		case strings.ContainsAny(token, "*>"):
			return "a subject with a wildcard"
		case strings.ContainsAny(token, "{}"):
			return "a subject with a placeholder that is neither {topic} nor {key}"
		case strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }):
			return "a subject with a space, a control character or a letter outside ASCII"
		}
	}
	if strings.HasPrefix(literal, "$") || strings.HasPrefix(literal, "_INBOX.") {
		return "a subject that belongs to the NATS server"
	}
	return ""
}

func (c *Config) checkEmbedded() *problem {
	if c.Embedded.Store == "" {
		return is("embedded.store", c.Embedded.Store, "not a directory")
	}
	return checkAddress("embedded.listen", c.Embedded.Listen, false)
}

func (c *Config) checkHTTP() *problem {
	h := c.HTTP
	if p := oneOf("http.format", h.Format, FormatCloudEvents, FormatStructured, FormatBatch); p != nil {
		return p
	}
	for i, secret := range h.Secrets {
		if !isSecret(secret) {
			return is(fmt.Sprintf("http.secrets[%d]", i), secret, "not a secret of Standard Webhooks")
		}
	}
	if p := checkHeaders(h.Headers); p != nil {
		return p
	}
	if h.Timeout <= 0 {
		return is("http.timeout", h.Timeout, "not above zero")
	}
	for _, n := range []struct {
		key       string
		got, most int
	}{
		{"http.concurrency", h.Concurrency, maxConcurrency},
		{"http.batch", h.Batch, maxBatch},
		{"http.window", h.Window, maxWindow},
	} {
		if n.got < 1 {
			return is(n.key, n.got, "too few")
		}
		if n.got > n.most {
			return is(n.key, n.got, "too many")
		}
	}
	if p := checkPair("http.tls", h.TLS); p != nil {
		return p
	}
	if p := c.checkCredentials(); p != nil {
		return p
	}
	return oneOf("http.on_reject", h.OnReject, OnRejectPark, OnRejectBlock)
}

// isSecret reports whether text is a secret of Standard Webhooks, or names a file. What is in the file is found out when it is read.
func isSecret(text string) bool {
	if path, ok := strings.CutPrefix(text, "file:"); ok {
		return path != ""
	}
	kind, encoded, _ := strings.Cut(text, "_")
	key, err := base64.StdEncoding.DecodeString(encoded)
	switch {
	case err != nil:
		return false
	case kind == "whsec":
		return len(key) >= minSecret
	}
	return kind == "whsk" && (len(key) == ed25519.SeedSize || len(key) == ed25519.PrivateKeySize)
}

// checkCredentials checks that there is one at most, and none without a connection that it fits.
func (c *Config) checkCredentials() *problem {
	h := c.HTTP
	if h.BearerFile != "" {
		for name := range h.Headers {
			if strings.EqualFold(name, "authorization") {
				return &problem{key: "http.headers." + name, text: "is set beside http.bearer_file; keep one of them"}
			}
		}
	}
	return nil
}

// ownHeaders are set by the HTTP sink or by the protocol.
var ownHeaders = []string{"connection", "content-length", "content-type", "host", "transfer-encoding", "upgrade"}

func checkHeaders(headers map[string]string) *problem {
	names := make([]string, 0, len(headers))
	for name := range headers {
		names = append(names, name)
	}
	slices.Sort(names)
	seen := map[string]string{}
	for _, name := range names {
		key := "http.headers." + name
		if name == "" || strings.ContainsFunc(name, func(r rune) bool { return !isTokenRune(r) }) {
			return &problem{key: key, shown: quote(name), text: "is not the name of a header; write letters, digits and dashes"}
		}
		lower := strings.ToLower(name)
		if slices.Contains(ownHeaders, lower) || strings.HasPrefix(lower, "ce-") || strings.HasPrefix(lower, "webhook-") ||
			strings.HasPrefix(lower, "ebb-") {
			return &problem{key: key, shown: quote(name), text: "is a header that ebb sets itself; leave it out"}
		}
		canonical := textproto.CanonicalMIMEHeaderKey(name)
		if other, ok := seen[canonical]; ok {
			return &problem{key: key, shown: quote(name), text: "is the same header as " + quote(other) + "; keep one of them"}
		}
		seen[canonical] = name
		if !printable(strings.ReplaceAll(headers[name], "\t", " ")) {
			return &problem{key: key, text: "holds a control character; write a text of one line"}
		}
	}
	return nil
}

// isTokenRune is tchar of RFC 9110.
func isTokenRune(r rune) bool {
	return 'a' <= r|0x20 && r|0x20 <= 'z' || '0' <= r && r <= '9' || strings.ContainsRune("!#$%&'*+-.^_`|~", r)
}

// checkRest checks replay, flow and recorded.
func (c *Config) checkRest() *problem {
	d := Default()
	if c.Replay.Window < 0 {
		return is("replay.window", c.Replay.Window, "below zero")
	}
	if c.Replay.Window > 0 && c.Replay.Window < time.Second {
		return is("replay.window", c.Replay.Window, "too short")
	}
	if c.Replay.MaxWAL <= 0 {
		return is("replay.max_wal", c.Replay.MaxWAL, "not above zero")
	}
	if c.Flow.Limit > 0 && c.Flow.Warn > c.Flow.Limit && c.Flow.Warn != d.Flow.Warn {
		return &problem{key: "flow.warn", shown: c.Flow.Warn.String(),
			text: "is more than flow.limit, " + c.Flow.Limit.String() + "; write a smaller one, or leave the key out"}
	}
	if p := oneOf("flow.on_full", c.Flow.OnFull, OnFullReject, OnFullAllow); p != nil {
		return p
	}
	if c.Recorded.Every <= 0 {
		return is("recorded.every", c.Recorded.Every, "not above zero")
	}
	if c.Recorded.Keep < minKeep {
		return is("recorded.keep", c.Recorded.Keep, "too short")
	}
	if c.Recorded.Every > c.Recorded.Keep {
		return &problem{key: "recorded.every", shown: c.Recorded.Every.String(),
			text: "is longer than recorded.keep, " + c.Recorded.Keep.String() + "; write a shorter one, such as 1s"}
	}
	return nil
}
