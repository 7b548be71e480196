// Package webhook delivers events to an HTTP server, as CloudEvents, several keys at once and each in order.
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
	"ebb/sink"
	"ebb/sink/cloudevent"
)

// Config says who receives the events, and how.
type Config struct {
	// URL is where to POST: http or https. User and password in it become basic authentication.
	URL string
	// Source is the CloudEvents source.
	Source string
	// Format is how events are written.
	Format Format
	// Secrets sign every request as Standard Webhooks says, each with a signature of its own: whsec_… (symmetric), whsk_… (ed25519), or
	// file:PATH, a file that holds one and is read again when it has changed.
	Secrets []string
	// BearerFile is the path of a file that holds a bearer token, and is read again when it has changed; empty is none.
	BearerFile string
	// Headers are sent with every request, and take the place of a producer's headers of the same name.
	Headers map[string]string
	// Timeout limits one request with its response; 0 is 30 s.
	Timeout time.Duration
	// MinBackoff and MaxBackoff limit the pause before an attempt is repeated; 0 is 100 ms and 30 s.
	MinBackoff, MaxBackoff time.Duration
	// Concurrency is how many requests are in flight at once; 0 is 16.
	Concurrency int
	// Batch is how many events a request carries at most, in format Batch; 0 is 100.
	Batch int
	// Window is how many events, from the oldest undelivered one on, are taken in; 0 is 10,000.
	Window int
	// Gzip compresses the bodies of requests.
	Gzip bool
	// CA is the path of a PEM file with the authorities to trust instead of the system's. Cert and Key are those of a client certificate; they
	// are read again for each connection.
	CA, Cert, Key string
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
	if c.Concurrency == 0 {
		c.Concurrency = 16
	}
	if c.Batch == 0 {
		c.Batch = 100
	}
	if c.Window == 0 {
		c.Window = 10_000
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	return c
}

// Validate says what is impossible in c. No value that may be secret is in the error.
func (c Config) Validate() error {
	u, err := c.parseURL()
	if err != nil {
		return err
	}
	if c.Format < Binary || c.Format > Batch {
		return fmt.Errorf("format %d: want Binary, Structured or Batch", c.Format)
	}
	if c.Concurrency < 0 || c.Batch < 0 || c.Window < 0 {
		return fmt.Errorf("concurrency %d, batch %d, window %d: want numbers above zero, or 0 for the defaults", c.Concurrency, c.Batch, c.Window)
	}
	if (c.Cert == "") != (c.Key == "") {
		return errors.New("tls: cert and key belong together; set both or neither")
	}
	if u.Scheme == "http" && (c.CA != "" || c.Cert != "") {
		return errors.New("tls: the URL of the http sink is not https; write https://, or leave ca, cert and key out")
	}
	if c.BearerFile != "" && u.User != nil {
		return errors.New("bearer_file: the URL of the http sink holds a user already; keep one of them")
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
		if canonical == "Authorization" && c.BearerFile != "" {
			return fmt.Errorf("headers: %q is what bearer_file sets; keep one of them", name)
		}
		if strings.HasPrefix(canonical, "Webhook-") {
			return fmt.Errorf("headers: %q is a header that ebb sets itself; leave it out", name)
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

// Sink sends each event until the receiver says 2xx, and the next one of its key only then. So every event is delivered at least once, and
// those of a key in order.
type Sink struct {
	url      string // without user and password
	user     *url.Userinfo
	bearer   *watched[string]
	secrets  secrets
	headers  http.Header
	format   Format
	envelope cloudevent.Envelope
	gzip     bool
	timeout  time.Duration
	client   *http.Client
	limits   limits
	report   *report

	position event.Position // of the last event that is delivered with all before it
}

var _ sink.Sink = (*Sink)(nil)

const (
	// maxBytes is how much is taken in, whatever the window is: large events must not make the memory of many.
	maxBytes = 32 << 20
	// maxBatchBytes is how large a request with several events becomes.
	maxBatchBytes = 1 << 20
	// maxProbe is the longest pause between two probes of a receiver that is down, unless it asks for more: the first event behind an outage
	// waits that long.
	maxProbe = 5 * time.Second
)

// New returns a sink that sends to cfg.URL. It reads the files that cfg names, and does not connect yet.
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
	signers, err := newSecrets(cfg.Secrets)
	if err != nil {
		return nil, err
	}
	var bearer *watched[string]
	if cfg.BearerFile != "" {
		bearer = &watched[string]{path: cfg.BearerFile, parse: parseToken}
		if _, err := bearer.get(); err != nil {
			return nil, fmt.Errorf("bearer_file: %w", err)
		}
	}
	transport, err := newTransport(cfg)
	if err != nil {
		return nil, err
	}
	batch := 1
	if cfg.Format == Batch {
		batch = cfg.Batch
	}
	return &Sink{
		url:      u.String(),
		user:     user,
		bearer:   bearer,
		secrets:  signers,
		headers:  headers,
		format:   cfg.Format,
		envelope: cloudevent.Envelope{Source: cfg.Source},
		gzip:     cfg.Gzip,
		timeout:  cfg.Timeout,
		client: &http.Client{
			Transport: transport,
			// A receiver that moved is the operator's to decide on: a redirected POST may become a GET, and carry the password elsewhere.
			CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
		},
		limits: limits{
			requests: cfg.Concurrency, window: cfg.Window, bytes: maxBytes, batch: batch, batchBytes: maxBatchBytes - len("[]"),
			pause: func() *pause { return newPause(cfg.MinBackoff, cfg.MaxBackoff) },
			probe: func() *pause {
				most := min(cfg.MaxBackoff, maxProbe)
				return newPause(min(cfg.MinBackoff, most), most)
			},
		},
		report: newReport(cfg.Logger.With("receiver", u.Scheme+"://"+u.Host), knownSecrets(u, user, cfg.Headers)),
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

// Run delivers the events of the batches from in, those of different keys at the same time. A receiver that is away, or fails, is asked again and
// again. What it rejects is parked; where nothing is, it is asked again as well. So is a key that alone holds up the others for long.
func (s *Sink) Run(ctx context.Context, in <-chan *event.Batch, out sink.Outcome) error {
	return newRunning(s, out).run(ctx, in)
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
