package webhook

import (
	"encoding/base64"
	"log/slog"
	"net/url"
	"slices"
	"strings"
	"time"

	"ebb/sink"
)

const (
	// reportEvery is how often a failure that stays the same is logged.
	reportEvery = 30 * time.Second
	// maxExcerpt is how many bytes of a response are logged; maxExcerptSource how many are looked through for secrets before.
	maxExcerpt       = 200
	maxExcerptSource = 4 << 10
)

// hidden stands where a secret was.
const hidden = "xxxxx"

// report logs failures without flooding the log: for each reason the first, and one every reportEvery.
type report struct {
	log  *slog.Logger
	hide *strings.Replacer
	now  func() time.Time

	last map[string]time.Time // when one was logged last, by reason
}

// maxReasons bounds what is kept of reasons, of which a receiver can make up any number.
const maxReasons = 100

func newReport(log *slog.Logger, secrets []string) *report {
	// The longest first, so that one that is part of another does not leave the rest of it.
	slices.SortFunc(secrets, func(a, b string) int { return len(b) - len(a) })
	var pairs []string
	for _, s := range secrets {
		if s != "" {
			pairs = append(pairs, s, hidden)
		}
	}
	return &report{log: log, hide: strings.NewReplacer(pairs...), now: time.Now, last: map[string]time.Time{}}
}

// minSecret keeps "1" or "prod" in a header from being blotted out wherever it occurs.
const minSecret = 8

// knownSecrets returns what a receiver knows from the requests and could send back to where it is logged.
func knownSecrets(u *url.URL, user *url.Userinfo, headers map[string]string) []string {
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

// due reports whether something is to be logged, and notes that it was.
func (r *report) due(reason string) bool {
	now := r.now()
	last, ok := r.last[reason]
	if ok && now.Sub(last) < reportEvery {
		return false
	}
	if !ok && len(r.last) >= maxReasons {
		clear(r.last)
	}
	r.last[reason] = now
	return true
}

func (r *report) failed(j *job, f *failure, wait time.Duration) {
	if j.since.IsZero() {
		j.since = r.now()
	}
	if !r.due(f.reason) {
		return
	}
	j.logged = true
	r.log.Warn("event not delivered, trying again", append(r.attrs(j, f), "retry_in", wait.Round(time.Millisecond))...)
}

func (r *report) split(j *job, f *failure) {
	if r.due("split: " + f.reason) {
		r.log.Warn("events not delivered, trying again in smaller batches", r.attrs(j, f)...)
	}
}

func (r *report) attrs(j *job, f *failure) []any {
	attrs := append(named(j), "position", j.parcels[0].position, "reason", r.hide.Replace(f.reason), "attempts", j.attempts)
	if f.status != 0 {
		attrs = append(attrs, "status", f.status)
	}
	if len(f.body) > 0 {
		attrs = append(attrs, "body", r.excerpt(f.body))
	}
	return attrs
}

// parked reports that events are kept for an operator, or, if they are to be retried, for later.
func (r *report) parked(letters []sink.Letter) {
	first := &letters[0]
	attrs := []any{"event", string(first.Event.ID), "events", len(letters), "position", first.Event.Position, "reason", first.Reason, "detail", first.Detail,
		"attempts", first.Attempts}
	switch {
	case first.Retry:
		if r.due("set aside") {
			r.log.Warn("a key is set aside, as it holds up all the others; its events are tried again from the dead letters", attrs...)
		}
	case r.due("parked: " + first.Reason):
		r.log.Warn("event parked; see ebb dead", attrs...)
	}
}

// named names the first of the events of a job, and how many they are where there may be several.
func named(j *job) []any {
	attrs := []any{"event", string(j.parcels[0].event.ID)}
	if len(j.parcels) > 1 {
		attrs = append(attrs, "events", len(j.parcels))
	}
	return attrs
}

func (r *report) delivered(j *job) {
	if j.logged {
		r.log.Info("events are delivered again", append(named(j), "attempts", j.attempts, "after", r.now().Sub(j.since).Round(time.Millisecond))...)
	}
}

// down reports that the receiver as a whole does not take anything, or does again.
func (r *report) down(down bool) {
	switch {
	case !down:
		r.log.Debug("the receiver takes events again")
	case r.due("down"):
		r.log.Warn("the receiver takes nothing; one request at a time tries it until it does")
	}
}

// excerpt returns the beginning of a response, at most maxExcerpt bytes.
func (r *report) excerpt(body []byte) string {
	s := r.text(string(body))
	if len(s) > maxExcerpt {
		s = strings.ToValidUTF8(s[:maxExcerpt], "")
	}
	return s
}

// text returns s without secrets, as something that a database takes for text.
func (r *report) text(s string) string {
	return strings.ReplaceAll(strings.ToValidUTF8(r.hide.Replace(s), "\uFFFD"), "\x00", "\uFFFD")
}

// why returns what a dead letter says of a failure.
func (r *report) why(f *failure) (reason, detail string) {
	if f.status == 0 {
		return r.text(f.reason), ""
	}
	reason, detail, _ = strings.Cut(f.reason, ": ")
	if len(f.body) > 0 {
		detail = r.excerpt(f.body)
	}
	return reason, detail
}
