package webhook

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/cenkalti/backoff/v5"
)

const (
	// maxDrain is how much of a response is read so that its connection can be used again.
	maxDrain = 64 << 10
	// drainTime is how long that may take: a receiver that has answered must not delay the next event with a body that never ends.
	drainTime = time.Second
	// maxRetryAfter bounds a Retry-After: a receiver's slip of the pen must not stop the bridge for a year.
	maxRetryAfter = time.Hour
)

// errTimeout and errAside are why a request is cancelled that has had no answer.
var (
	errTimeout = errors.New("timeout")
	errAside   = errors.New("set aside")
)

// failure is why an attempt has not delivered.
type failure struct {
	status     int    // 0 when there was no response
	reason     string // the same for what is the same to an operator
	body       []byte // the beginning of the response
	retryAfter time.Duration
	cancelled  bool // by errAside
}

// rejects reports whether the receiver has said that it does not want what it was sent, whenever that is.
func (f *failure) rejects() bool {
	switch f.status {
	case 0, http.StatusRequestTimeout, http.StatusTooEarly, http.StatusTooManyRequests:
		return false
	}
	return f.status < 500
}

// rejectsContent reports whether the receiver has read what it was sent and does not want that. Other rejections may be about the URL or the
// credentials, which are the same for all events.
func (f *failure) rejectsContent() bool {
	switch f.status {
	case http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound, http.StatusMethodNotAllowed, http.StatusProxyAuthRequired:
		return false
	}
	return f.status >= 400 && f.rejects()
}

// patience is how often something is sent as it is for which the answer may be another the next time.
const patience = 3

// needsSplit reports whether a request with fewer events may fare better: the receiver has read it and does not like it, or fails on it
// time and again. Where it does not answer, asks to be left alone, or does not let ebb in, there is no sense in it, unless it takes others.
func (f *failure) needsSplit(attempts int, takesOthers bool) bool {
	switch {
	case f.rejectsContent():
		return true
	case attempts < patience:
		return false
	}
	return takesOthers || f.status >= 500 && f.status != http.StatusServiceUnavailable
}

// attempt sends one request with the events of the parcels. It returns nil when the receiver has taken them.
func (s *Sink) attempt(ctx context.Context, parcels []*parcel) *failure {
	m, err := s.message(parcels)
	if err != nil {
		return &failure{reason: err.Error()}
	}
	if err := s.secrets.sign(&m, time.Now()); err != nil {
		return &failure{reason: err.Error()}
	}
	if s.gzip {
		if err := m.compress(); err != nil {
			return &failure{reason: err.Error()}
		}
	}
	token := ""
	switch {
	case s.bearer != nil:
		if token, err = s.bearer.get(); err != nil {
			return &failure{reason: "bearer_file: " + err.Error()}
		}
		m.header["Authorization"] = []string{"Bearer " + token}
	case s.user != nil:
		authorize(m.header, s.user)
	}
	f := s.post(ctx, m.header, m.body)
	if f != nil && token != "" {
		// It may be another by the time that this is logged.
		f.body = bytes.ReplaceAll(f.body, []byte(token), []byte(hidden))
	}
	return f
}

// post sends one request. It returns nil when the receiver has said yes.
func (s *Sink) post(ctx context.Context, header http.Header, payload []byte) *failure {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	timer := time.AfterFunc(s.timeout, func() { cancel(errTimeout) })
	defer timer.Stop()

	// net/http may read the payload after it has returned the response, which does no harm: its memory is never another event's.
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url, bytes.NewReader(payload))
	if err != nil {
		return &failure{reason: describe(err)}
	}
	req.Header = header
	resp, err := s.client.Do(req)
	if err != nil {
		switch cause := context.Cause(ctx); {
		case errors.Is(cause, errTimeout):
			return &failure{reason: fmt.Sprintf("no answer within %v", s.timeout)}
		case errors.Is(cause, errAside):
			return &failure{reason: "no answer", cancelled: true}
		}
		return &failure{reason: describe(err)}
	}
	defer resp.Body.Close()
	// From here on, what was read of the response counts, whatever the error.
	timer.Reset(drainTime)
	var start []byte
	ok := resp.StatusCode >= 200 && resp.StatusCode <= 299
	if !ok {
		start, _ = io.ReadAll(io.LimitReader(resp.Body, maxExcerptSource))
	}
	_, _ = io.CopyN(io.Discard, resp.Body, maxDrain-int64(len(start)))
	if ok {
		return nil
	}
	return &failure{
		status:     resp.StatusCode,
		reason:     statusText(resp.StatusCode),
		body:       start,
		retryAfter: retryAfter(resp.Header, time.Now()),
	}
}

func statusText(code int) string {
	text := http.StatusText(code)
	switch {
	case code >= 300 && code <= 399:
		return fmt.Sprintf("%d %s: %s", code, text, hintRedirect)
	case text == "":
		return strconv.Itoa(code)
	}
	return fmt.Sprintf("%d %s", code, text)
}

const hintRedirect = "redirects are not followed; set the sink's URL to where the receiver is"

// describe says what went wrong without the URL, whose query may hold a secret, and without addresses, whose ports differ each time.
func describe(err error) string {
	var inURL *url.Error
	if errors.As(err, &inURL) {
		err = inURL.Err
	}
	var inNet *net.OpError
	if errors.As(err, &inNet) {
		return fmt.Sprintf("%s: %v", inNet.Op, inNet.Err)
	}
	return err.Error()
}

// retryAfter returns how long the receiver wants to be left alone (RFC 9110 §10.2.3), at most maxRetryAfter, or 0. A date is compared with
// the receiver's own clock when it tells the time.
func retryAfter(h http.Header, now time.Time) time.Duration {
	v := h.Get("Retry-After")
	if v == "" {
		return 0
	}
	seconds, err := strconv.ParseUint(v, 10, 64)
	switch {
	case errors.Is(err, strconv.ErrRange), err == nil && seconds > uint64(maxRetryAfter/time.Second):
		return maxRetryAfter
	case err == nil:
		return time.Duration(seconds) * time.Second
	}
	at, err := http.ParseTime(v)
	if err != nil {
		return 0
	}
	if date, err := http.ParseTime(h.Get("Date")); err == nil {
		now = date
	}
	return min(max(at.Sub(now), 0), maxRetryAfter)
}

// pause gives the capped exponential pauses, with jitter, between the attempts for one request.
type pause struct {
	backoff backoff.ExponentialBackOff
	most    time.Duration
}

func newPause(least, most time.Duration) *pause {
	const jitter = 0.5
	return &pause{most: most, backoff: backoff.ExponentialBackOff{
		InitialInterval:     least,
		Multiplier:          2,
		RandomizationFactor: jitter,
		// The jitter comes on top of the interval.
		MaxInterval: max(time.Duration(float64(most)/(1+jitter)), 1),
	}}
}

func (p *pause) next() time.Duration { return min(p.backoff.NextBackOff(), p.most) }
