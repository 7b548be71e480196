// Package redact keeps secrets out of what people read.
package redact

import (
	"net/url"
	"regexp"
	"strings"
)

const redacted = "xxxxx"

var (
	// listComma stands before every further URL of a list.
	listComma = regexp.MustCompile(`,\s*[A-Za-z][A-Za-z0-9+.-]*://`)
	// secretParam is a parameter of a Postgres URL that holds a password.
	secretParam = regexp.MustCompile(`(?i)([?&](?:ssl)?p(?:a|%61)ss[^=&]*=)[^&#]*`)
	// queryParam is any parameter of an HTTP URL; which ones are secret is the receiver's affair.
	queryParam = regexp.MustCompile(`([?&][^=&]*=)[^&#]*`)
	// dsnPassword is a password of a keyword/value DSN, to its end or, where its quotes do not end, to the text's.
	dsnPassword = regexp.MustCompile(`(?is)(password\s*=\s*)('(?:[^'\\]|\\.)*(?:'|$)|".*|\S+)`)
)

// URL returns text, a URL, a comma-separated list of URLs or a Postgres DSN, without the secrets in it, for logs and
// errors. It works on text that cannot be parsed, and rather takes away too much than too little.
func URL(text string) string {
	var b strings.Builder
	for {
		loc := listComma.FindStringIndex(text)
		if loc == nil {
			b.WriteString(redactOne(text))
			return b.String()
		}
		b.WriteString(redactOne(text[:loc[0]]))
		b.WriteString(", ")
		text = strings.TrimLeft(text[loc[0]+1:], " \t\r\n")
	}
}

func redactOne(text string) string {
	scheme, rest, ok := strings.Cut(text, "://")
	if !ok {
		text = dsnPassword.ReplaceAllString(text, "${1}"+redacted)
		if at := strings.LastIndexByte(text, '@'); at >= 0 { // a URL without its scheme
			text = redacted + text[at:]
		}
		return text
	}
	// A password that holds '@', '/', '?' or '#' unescaped moves the borders of the parts, so the user info ends at the last
	// '@' of all, unless the text parses and no '@' is left behind the host.
	end := strings.LastIndexByte(rest, '@')
	if u, err := url.Parse(strings.TrimSpace(text)); err == nil && !strings.Contains(u.Host+u.RequestURI()+u.Fragment, "@") {
		end = strings.LastIndexByte(rest[:authorityEnd(rest)], '@')
	}
	user, after := "", rest
	if end >= 0 {
		user, after = rest[:end], rest[end:]
		name, _, hasPassword := strings.Cut(user, ":")
		switch {
		case isPostgres(scheme) && hasPassword:
			user = name + ":" + redacted
		case isPostgres(scheme) && !strings.ContainsAny(user, "@/?#"):
			// a user name alone is no secret to Postgres
		default:
			user = redacted // a token, or a name and a password
		}
	}
	if isPostgres(scheme) {
		after = secretParam.ReplaceAllString(after, "${1}"+redacted)
	} else {
		after = queryParam.ReplaceAllString(after, "${1}"+redacted)
	}
	return scheme + "://" + user + after
}

func isPostgres(scheme string) bool {
	scheme = strings.ToLower(strings.TrimSpace(scheme))
	return scheme == "postgres" || scheme == "postgresql"
}

// authorityEnd returns the index in rest, a URL behind its "://", at which the path, query or fragment begins.
func authorityEnd(rest string) int {
	if i := strings.IndexAny(rest, "/?#"); i >= 0 {
		return i
	}
	return len(rest)
}
