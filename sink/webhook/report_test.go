package webhook

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"ebb/event"
)

func TestReport(t *testing.T) {
	log := &logs{}
	r := newReport(log.logger(), nil)
	now := time.Unix(0, 0)
	r.now = func() time.Time { return now }
	newJob := func() *job {
		return &job{parcels: []*parcel{{event: event.Event{ID: []byte("7")}, position: event.Position{Epoch: 1, Commit: 2, Index: 3}}}}
	}
	j := newJob()
	fail := func(status int, attempts int) {
		j.attempts = attempts
		r.failed(j, &failure{status: status, reason: fmt.Sprint(status), body: []byte("why")}, time.Second)
	}
	delivered := func(attempts int) {
		j.attempts = attempts
		r.delivered(j)
		j = newJob()
	}
	fail(500, 1) // logged
	now = now.Add(29 * time.Second)
	fail(500, 2)
	fail(503, 3) // logged: another reason
	now = now.Add(29 * time.Second)
	fail(503, 4)
	now = now.Add(time.Second)
	fail(503, 5) // logged: half a minute has passed
	delivered(6)
	delivered(1)
	fail(503, 1) // not logged: a receiver that fails each second event does not flood the log
	delivered(2)
	now = now.Add(30 * time.Second)
	fail(503, 1) // logged

	var got []string
	for _, l := range log.lines() {
		got = append(got, fmt.Sprintf("%v %v %v %v %v %v", l["level"], l["event"], l["position"], l["status"], l["attempts"], l["body"]))
	}
	if diff := cmp.Diff([]string{
		"WARN 7 1:0/2:3 500 1 why", "WARN 7 1:0/2:3 503 3 why", "WARN 7 1:0/2:3 503 5 why", "INFO 7 <nil> <nil> 6 <nil>", "WARN 7 1:0/2:3 503 1 why",
	}, got); diff != "" {
		t.Errorf("log (-want +got):\n%s", diff)
	}
}

func TestExcerpt(t *testing.T) {
	u, err := url.Parse("http://user:pass@h/?token=0123456789&v=1")
	if err != nil {
		t.Fatal(err)
	}
	r := newReport(nil, knownSecrets(u, u.User, map[string]string{"Authorization": "Bearer abcdefgh", "X": "a"}))
	for in, want := range map[string]string{
		"plain \xff": "plain \uFFFD",
		"pass, dXNlcjpwYXNz, 0123456789, Bearer abcdefgh, abcdefgh, a1": "xxxxx, xxxxx, xxxxx, xxxxx, xxxxx, a1",
		strings.Repeat("x", 199) + "é":                                  strings.Repeat("x", 199),
		strings.Repeat("é", 5000):                                       strings.Repeat("é", 100),
		strings.Repeat("x", 195) + "pass " + strings.Repeat("x", 195):   strings.Repeat("x", 200),
	} {
		if got := r.excerpt([]byte(in)); got != want || !utf8.ValidString(got) {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
	r = newReport(nil, knownSecrets(&url.URL{}, nil, nil))
	if got := r.excerpt([]byte("a")); got != "a" {
		t.Errorf("without secrets: %q", got)
	}
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	in := func(d time.Duration) string { return now.Add(d).Format(http.TimeFormat) }
	for _, tt := range []struct {
		value, date string
		want        time.Duration
	}{
		{"", "", 0},
		{"0", "", 0},
		{"120", "", 2 * time.Minute},
		{"3600", "", time.Hour},
		{"3601", "", time.Hour},
		{"99999999999999999999999", "", time.Hour},
		{"-1", "", 0},
		{"1.5", "", 0},
		{"soon", "", 0},
		{in(90 * time.Second), "", 90 * time.Second},
		{in(-90 * time.Second), "", 0},
		{in(48 * time.Hour), "", time.Hour},
		{in(10 * time.Minute), in(9 * time.Minute), time.Minute}, // the receiver's clock is nine minutes fast
		{in(10 * time.Minute), "nonsense", 10 * time.Minute},
	} {
		h := http.Header{"Retry-After": {tt.value}, "Date": {tt.date}}
		if got := retryAfter(h, now); got != tt.want {
			t.Errorf("Retry-After %q, Date %q: got %v, want %v", tt.value, tt.date, got, tt.want)
		}
	}
}

func TestPause(t *testing.T) {
	p := newPause(100*time.Millisecond, 30*time.Second)
	interval := 100 * time.Millisecond
	for range 30 {
		got := p.next()
		if got < interval/2 || got > interval*3/2+1 || got > 30*time.Second {
			t.Errorf("pause %v, want %v give or take half", got, interval)
		}
		interval = min(2*interval, 20*time.Second)
	}
}
