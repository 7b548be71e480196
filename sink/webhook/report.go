package webhook

import (
	"encoding/base64"
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"time"

	"ebb/event"
)

const (
	// reportEvery is how often a failure that stays the same is logged.
	reportEvery = 30 * time.Second
	// maxExcerpt is how many bytes of a response are logged; maxExcerptSource how many are looked through for secrets before.
	maxExcerpt       = 200
	maxExcerptSource = 4 << 10
)

// report logs failures without flooding the log: the first, those for another reason, and one every reportEvery.
type report struct {
	log  *slog.Logger
	hide *strings.Replacer
	now  func() time.Time

	since  time.Time // of the first failure since the last delivery, or zero
	logged bool      // whether any failure since then was
	last   time.Time // when one was logged last, and why
	reason string
}

func newReport(log *slog.Logger, secrets []string) *report {
	// The longest first, so that one that is part of another does not leave the rest of it.
	slices.SortFunc(secrets, func(a, b string) int { return len(b) - len(a) })
	var pairs []string
	for _, s := range secrets {
		if s != "" {
			pairs = append(pairs, s, "xxxxx")
		}
	}
	return &report{log: log, hide: strings.NewReplacer(pairs...), now: time.Now}
}

// minSecret keeps "1" or "prod" in a header from being blotted out wherever it occurs.
const minSecret = 8

// secrets returns what a receiver knows from the requests and could send back to where it is logged.
func secrets(u *url.URL, user *url.Userinfo, headers map[string]string) []string {
	var all []string
	for _, values := range u.Query() {
		all = append(all, values...)
	}
	for _, value := range headers {
		all = append(all, value)
		if _, token, ok := strings.Cut(value, " "); ok { // "Bearer …"
			all = append(all, token)
		}
	}
	all = slices.DeleteFunc(all, func(s string) bool { return len(s) < minSecret })
	if password, ok := user.Password(); ok {
		all = append(all, password, base64.StdEncoding.EncodeToString([]byte(user.Username()+":"+password)))
	}
	return all
}

func (r *report) failed(e *event.Event, f *failure, attempts int, wait time.Duration) {
	now := r.now()
	if r.since.IsZero() {
		r.since = now
	}
	if f.reason == r.reason && now.Sub(r.last) < reportEvery {
		return
	}
	r.logged, r.last, r.reason = true, now, f.reason
	attrs := []any{"event", string(e.ID), "position", e.Position, "reason", r.hide.Replace(f.reason), "attempts", attempts, "retry_in", wait.Round(time.Millisecond)}
	if f.status != 0 {
		attrs = append(attrs, "status", f.status)
	}
	if len(f.body) > 0 {
		attrs = append(attrs, "body", r.excerpt(f.body))
	}
	r.log.Warn("event not delivered, trying again", attrs...)
}

func (r *report) delivered(e *event.Event, attempts int) {
	if r.logged {
		r.log.Info("events are delivered again", "event", string(e.ID), "attempts", attempts, "after", r.now().Sub(r.since).Round(time.Millisecond))
	}
	r.since, r.logged = time.Time{}, false
}

// excerpt returns the beginning of a response, at most maxExcerpt bytes.
func (r *report) excerpt(body []byte) string {
	s := strings.ToValidUTF8(r.hide.Replace(string(body)), "\uFFFD")
	if len(s) > maxExcerpt {
		s = strings.ToValidUTF8(s[:maxExcerpt], "")
	}
	return s
}
