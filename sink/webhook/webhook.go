// Package webhook delivers events to an HTTP server, one request each, as CloudEvents in binary mode.
package webhook

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"ebb/event"
	"ebb/internal/sleep"
	"ebb/sink"
	"ebb/sink/cloudevent"
)

// Config says who receives the events, and how.
type Config struct {
	// URL is where to POST: http or https. User and password in it become basic authentication.
	URL string
	// Source is the CloudEvents source.
	Source string
	// Headers are sent with every request, and take the place of a producer's headers of the same name.
	Headers map[string]string
	// Timeout limits one request with its response; 0 is 30 s.
	Timeout time.Duration
	// MinBackoff and MaxBackoff limit the pause before an attempt is repeated; 0 is 100 ms and 30 s.
	MinBackoff, MaxBackoff time.Duration
	// Logger may be nil.
	Logger *slog.Logger
}

func (c Config) withDefaults() Config {
	if c.Timeout == 0 {
		c.Timeout = 30 * time.Second
	}
	if c.MinBackoff == 0 {
		c.MinBackoff = 100 * time.Millisecond
	}
	if c.MaxBackoff == 0 {
		c.MaxBackoff = max(30*time.Second, c.MinBackoff)
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

// Validate says what is impossible in c. No value that may be secret is in the error.
func (c Config) Validate() error {
	_, err := c.parseURL()
	if err != nil {
		return err
	}
	if c.Timeout < 0 {
		return fmt.Errorf("timeout %v: want a duration above zero, or 0 for the default", c.Timeout)
	}
	if c.MinBackoff < 0 || c.MaxBackoff < 0 || c.MaxBackoff > 0 && c.MinBackoff > c.MaxBackoff {
		return fmt.Errorf("backoff from %v to %v: want durations above zero in that order, or 0 for the defaults", c.MinBackoff, c.MaxBackoff)
	}
	seen := map[string]bool{}
	for _, name := range slices.Sorted(maps.Keys(c.Headers)) {
		if err := cloudevent.CheckHeader(name, c.Headers[name]); err != nil {
			return fmt.Errorf("headers: %w", err)
		}
		canonical := http.CanonicalHeaderKey(name)
		if canonical == "Content-Type" {
			return fmt.Errorf("headers: %q is that of the payload and cannot be set for all events; leave it out", name)
		}
		if seen[canonical] {
			return fmt.Errorf("headers: %q is given twice; HTTP does not tell upper from lower case", name)
		}
		seen[canonical] = true
		if strings.ContainsFunc(c.Headers[name], func(r rune) bool { return r < ' ' && r != '\t' || r == 0x7f }) {
			return fmt.Errorf("headers: the value of %q holds a control character; remove it", name)
		}
	}
	return nil
}

// parseURL never quotes what it was given, nor the error of net/url, which does: a password with a slash in it, not
// percent-encoded, ends up in the port or the path.
func (c Config) parseURL() (*url.URL, error) {
	u, err := url.Parse(c.URL)
	switch {
	case err != nil:
		return nil, errors.New("the URL of the http sink cannot be parsed; want http(s)://[user:password@]host[:port]/path, special characters in user and password percent-encoded")
	case u.Scheme != "http" && u.Scheme != "https":
		return nil, errors.New("the URL of the http sink has another scheme; want http:// or https://")
	case u.Hostname() == "":
		return nil, errors.New("the URL of the http sink names no host; want http(s)://host[:port]/path")
	}
	return u, nil
}

// Sink sends each event until the receiver says 2xx, and the next one only then. So every event is delivered at least once, in order.
type Sink struct {
	url      string // without user and password
	user     *url.Userinfo
	headers  http.Header
	envelope cloudevent.Envelope
	timeout  time.Duration
	client   *http.Client
	backoff  func() *pause
	report   *report

	position event.Position
	buf      []byte
}

var _ sink.Sink = (*Sink)(nil)

// New returns a sink that sends to cfg.URL. It does not connect yet.
func New(cfg Config) (*Sink, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	cfg = cfg.withDefaults()
	u, err := cfg.parseURL()
	if err != nil {
		return nil, err
	}
	// Nobody but authorize below needs the password, so nothing else can print it.
	user := u.User
	u.User, u.Fragment, u.RawFragment = nil, "", ""

	headers := http.Header{"User-Agent": {"ebb"}}
	for name, value := range cfg.Headers {
		headers.Set(name, value)
	}
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConns = 0
	transport.MaxIdleConnsPerHost = 1 // as many as there are requests at a time
	transport.DisableCompression = true
	return &Sink{
		url:      u.String(),
		user:     user,
		headers:  headers,
		envelope: cloudevent.Envelope{Source: cfg.Source},
		timeout:  cfg.Timeout,
		client: &http.Client{
			Transport: transport,
			// A receiver that moved is the operator's to decide on: a redirected POST may become a GET, and carry the password elsewhere.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		backoff: func() *pause { return newPause(cfg.MinBackoff, cfg.MaxBackoff) },
		report:  newReport(cfg.Logger.With("receiver", u.Scheme+"://"+u.Host), secrets(u, user, cfg.Headers)),
	}, nil
}

// Resume returns at once: a receiver cannot be asked what it has, so it is what this process last delivered, or what is known if
// that is later.
func (s *Sink) Resume(_ context.Context, known sink.Known) (sink.Tail, error) {
	if known.Position.Compare(s.position) > 0 {
		return sink.Tail{Position: known.Position}, nil
	}
	return sink.Tail{Position: s.position}, nil
}

// Run delivers the events of the batches from in, one after the other. A receiver that is away, or says anything but 2xx, is
// asked again and again.
func (s *Sink) Run(ctx context.Context, in <-chan *event.Batch, delivered sink.Delivered) error {
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case batch, ok := <-in:
			if !ok {
				return nil
			}
			err := s.deliverBatch(ctx, batch, delivered)
			batch.Release()
			if err != nil {
				return err
			}
		}
	}
}

func (s *Sink) deliverBatch(ctx context.Context, batch *event.Batch, delivered sink.Delivered) error {
	for i := range batch.Events {
		e := &batch.Events[i]
		if err := s.deliver(ctx, e); err != nil {
			return err
		}
		s.position = e.Position
		delivered(sink.Progress{Events: 1, Position: e.Position})
	}
	return nil
}

// deliver sends e until the receiver has it, the context ends, or it turns out that it cannot be sent at all.
func (s *Sink) deliver(ctx context.Context, e *event.Event) error {
	header, err := s.header(e)
	if err != nil {
		return &sink.RejectedError{ID: string(e.ID), Position: e.Position, Err: err}
	}
	pause := s.backoff()
	for attempts := 1; ; attempts++ {
		failure := s.attempt(ctx, header, e.Payload)
		if failure == nil {
			s.report.delivered(e, attempts)
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		wait := max(pause.next(), failure.retryAfter)
		s.report.failed(e, failure, attempts, wait)
		if err := sleep.For(ctx, wait); err != nil {
			return err
		}
	}
}

// header returns the header of all requests for e. Nothing in it points into the event's batch.
func (s *Sink) header(e *event.Event) (http.Header, error) {
	h := make(http.Header, len(s.headers)+len(e.Headers)+12)
	var err error
	s.buf, err = s.envelope.Headers(e, s.buf, func(name string, value []byte) {
		name = http.CanonicalHeaderKey(name)
		h[name] = append(h[name], string(value))
	})
	if err != nil {
		return nil, err
	}
	// net/http repeats a POST on a fresh connection when the receiver had closed the idle one, if it is told that this does no harm. It
	// does none, because the id stays the same. A header without a value is not sent.
	if _, ok := h["Idempotency-Key"]; !ok {
		h["Idempotency-Key"] = nil
	}
	for name, values := range s.headers {
		if _, ok := h[name]; ok && name == "User-Agent" && values[0] == "ebb" {
			continue // the default gives way to the producer's
		}
		h[name] = values
	}
	if s.user != nil {
		authorize(h, s.user)
	}
	return h, nil
}

func authorize(h http.Header, user *url.Userinfo) {
	password, _ := user.Password()
	r := http.Request{Header: h}
	r.SetBasicAuth(user.Username(), password)
}

// Close closes the idle connections.
func (s *Sink) Close() error {
	s.client.CloseIdleConnections()
	return nil
}
