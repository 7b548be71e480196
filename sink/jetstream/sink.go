// Package jetstream delivers events to a stream of NATS JetStream, exactly once.
//
// Every message says which sequence number it expects its predecessor to have, and which position it has itself. So the
// stream refuses whatever is out of place, and its last message says where to go on; nothing depends on a window in which
// duplicates are remembered.
package jetstream

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"ebb/event"
	"ebb/internal/quiet"
	"ebb/internal/redact"
	"ebb/sink"
	"ebb/sink/cloudevent"
)

const (
	// ackTimeout is how long the stream may take to acknowledge the next message. A disk that syncs each takes tens
	// of milliseconds; a stream that elects a leader takes seconds.
	ackTimeout = 10 * time.Second
	// retryFor is about how long what comes behind a retry waits for it.
	retryFor = 100 * time.Millisecond
	// requestTimeout bounds a request to the JetStream API.
	requestTimeout = 5 * time.Second
	// writeTimeout bounds a write to a server that has stopped reading.
	writeTimeout = 5 * time.Second
	// scanTimeout is how long the next message of a scan may take.
	scanTimeout = 30 * time.Second
	// pingInterval is how often a quiet connection is asked whether it lives; it counts as dead after two silences.
	pingInterval = 5 * time.Second
)

// Config says where the stream is and how events become its messages.
type Config struct {
	// Servers are URLs separated by commas, of scheme nats, tls, ws or wss.
	Servers string
	// Stream is the name of the stream.
	Stream string
	// Subject is a template with {topic} and {key}.
	Subject string
	// Source is the CloudEvents source.
	Source string
	// Raw leaves out the CloudEvents headers.
	Raw bool
	// CreateStream creates a stream that is missing, with Replicas copies. An existing one is never altered.
	CreateStream bool
	Replicas     int
	// Exclusive says that nobody else publishes to the stream, so that each message can name the one before it. Otherwise messages
	// are told apart by their ids alone, within the stream's window for duplicates.
	Exclusive bool
	// Creds is a credentials file, or "".
	Creds string
	// CA, Cert and Key are PEM files, or "".
	CA, Cert, Key string
	// Name is how the connection calls itself.
	Name   string
	Logger *slog.Logger
}

// Sink delivers to one stream.
type Sink struct {
	cfg      Config
	subject  subject
	envelope cloudevent.Envelope
	log      *slog.Logger
	options  []nats.Option

	nc *nats.Conn
	js jetstream.JetStream
	// ackTimeout and retryFor are the constants, but in tests.
	ackTimeout, retryFor time.Duration
	// closed is closed when nc gives up for good, as it does over refused credentials.
	closed chan struct{}

	// dialing are connections that are being opened.
	dialing sync.WaitGroup
	// denied is what the server last said it does not permit.
	denied denial

	// last is the last event that the stream is known to hold, and end the last message, from whomever, when it was asked.
	last message
	end  uint64
	// position is that of the last message that a bridge has published, and at the last place of which it is known that every event before it was
	// delivered, and that it was said of every retry.
	position event.Position
	at       sink.Progress
	// maxMsgSize is that of the stream, or not positive.
	maxMsgSize int
	// warned says that the log has what is doubtful about the stream's settings.
	warned bool
}

// message is what identifies a message of the stream.
type message struct {
	seq      uint64
	position event.Position
	id       string
	// origin is that of the event. The position of one that was not streamed is that of the event before it.
	origin event.Origin
	// time is that of the event, or zero.
	time time.Time
	// foreign says that no bridge has published it, so that it has neither position nor id.
	foreign bool
}

var (
	_ sink.Sink    = (*Sink)(nil)
	_ sink.Scanner = (*Sink)(nil)
)

// New returns a sink, which connects when it is first asked to resume. An error is one of configuration.
func New(cfg Config) (*Sink, error) {
	subject, err := parseSubject(cfg.Subject)
	if err != nil {
		return nil, err
	}
	s := &Sink{cfg: cfg, subject: subject, envelope: cloudevent.Envelope{Source: cfg.Source}, log: cfg.Logger, ackTimeout: ackTimeout, retryFor: retryFor}
	s.options = []nats.Option{
		nats.Name(cfg.Name),
		nats.MaxReconnects(-1),
		// A message that waits in a buffer for a reconnect would be published behind the back of the resume.
		nats.ReconnectBufSize(-1),
		nats.ReconnectWait(100 * time.Millisecond),
		nats.ReconnectJitter(100*time.Millisecond, 100*time.Millisecond),
		nats.FlusherTimeout(writeTimeout),
		nats.PingInterval(pingInterval),
		nats.MaxPingsOutstanding(2),
		nats.Timeout(requestTimeout),
		nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { s.denied.report(s.log, err) }),
	}
	if cfg.Creds != "" {
		s.options = append(s.options, nats.UserCredentials(cfg.Creds))
	}
	if cfg.CA != "" {
		s.options = append(s.options, nats.RootCAs(cfg.CA))
	}
	if cfg.Cert != "" {
		s.options = append(s.options, nats.ClientCert(cfg.Cert, cfg.Key))
	}
	return s, nil
}

// Resume connects, checks or creates the stream, and returns what its end holds.
func (s *Sink) Resume(ctx context.Context, known sink.Known) (sink.Tail, error) {
	var tail sink.Tail
	err := s.retry(ctx, "resume", func() error {
		if err := s.connect(ctx); err != nil {
			return err
		}
		info, err := s.findStream(ctx, known)
		if err != nil || info == nil {
			tail = sink.Tail{}
			return err
		}
		if tail, err = s.tail(ctx, info.State.LastSeq, known); err != nil {
			return err
		}
		tail.Source, s.maxMsgSize = sourceOf(info.Config.Metadata), int(info.Config.MaxMsgSize)
		return nil
	})
	if err != nil {
		return sink.Tail{}, err
	}
	s.last, s.end = message{seq: tail.Sequence, position: tail.Position, id: tail.ID}, tail.Last
	s.at = sink.Progress{Position: tail.Position, Sequence: tail.Sequence}
	if tail.Sequence < known.Sequence || tail.Position.Compare(known.Position) < 0 { // the stream has removed what is known
		s.at = sink.Progress{Position: known.Position, Sequence: known.Sequence}
		if s.cfg.Exclusive && tail.Sequence < known.Sequence {
			s.at.Sequence = max(known.Sequence, tail.Last) // and all that came behind it
		}
	}
	s.position = s.at.Position
	return tail, nil
}

// connect opens the connection, unless it is open.
func (s *Sink) connect(ctx context.Context) error {
	if s.nc != nil {
		select {
		case <-s.closed:
			err := s.nc.LastError()
			s.nc = nil
			if isRefusal(err) {
				return backoff.Permanent(fmt.Errorf("connect to %s: %w", s.servers(), err))
			}
		default:
			return s.awaitConnection(ctx)
		}
	}
	closed := make(chan struct{})
	nc, err := s.dial(ctx, nats.ClosedHandler(func(*nats.Conn) { close(closed) }))
	if err != nil {
		err = fmt.Errorf("connect to %s: %w", s.servers(), err)
		if isRefusal(err) {
			return backoff.Permanent(err)
		}
		return err
	}
	js, err := jetstream.New(nc, jetstream.WithDefaultTimeout(requestTimeout))
	if err != nil {
		nc.Close()
		return fmt.Errorf("connect to %s: %w", s.servers(), err)
	}
	s.nc, s.js, s.closed = nc, js, closed
	s.log.Info("connected to NATS", "server", nc.ConnectedUrlRedacted(), "version", nc.ConnectedServerVersion())
	return nil
}

// dial connects. It returns when ctx ends, which nats.Connect does not look at.
func (s *Sink) dial(ctx context.Context, options ...nats.Option) (*nats.Conn, error) {
	type result struct {
		nc  *nats.Conn
		err error
	}
	done := make(chan result, 1)
	s.dialing.Go(func() {
		nc, err := nats.Connect(s.cfg.Servers, append(slices.Clone(s.options), options...)...)
		done <- result{nc, err}
	})
	select {
	case r := <-done:
		return r.nc, r.err
	case <-ctx.Done():
		s.dialing.Go(func() {
			if r := <-done; r.nc != nil {
				r.nc.Close()
			}
		})
		return nil, ctx.Err()
	}
}

func (s *Sink) awaitConnection(ctx context.Context) error {
	if s.nc.IsConnected() {
		return nil
	}
	status := s.nc.StatusChanged(nats.CONNECTED, nats.CLOSED)
	defer s.nc.RemoveStatusListener(status)
	timer := time.NewTimer(requestTimeout)
	defer timer.Stop()
	if s.nc.IsConnected() {
		return nil
	}
	select {
	case <-status:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return fmt.Errorf("wait for the connection to %s: %w", s.servers(), errNotConnected)
	}
}

// denial keeps the permission violations that the server reports, beside the connection and one for each message, and lets the
// log have one now and then.
type denial struct {
	mu     sync.Mutex
	err    error
	logged time.Time
}

func (d *denial) report(log *slog.Logger, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if errors.Is(err, nats.ErrPermissionViolation) {
		d.err = fmt.Errorf("%w: grant the user to publish to the stream's subjects and to $JS.API.>, and to subscribe to _INBOX.>", err)
	}
	if time.Since(d.logged) > 30*time.Second {
		d.logged = time.Now()
		log.Warn("the NATS server reports an error", "error", err)
	}
}

// take returns what was not permitted since it was last called, or nil.
func (d *denial) take() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	err := d.err
	d.err = nil
	return err
}

var errNotConnected = errors.New("not connected")

// isRefusal reports whether a connection error will be the same however often it is tried.
func isRefusal(err error) bool {
	var verification *tls.CertificateVerificationError
	var authority x509.UnknownAuthorityError
	var hostname x509.HostnameError
	return errors.Is(err, nats.ErrAuthorization) || errors.Is(err, nats.ErrAuthExpired) || errors.Is(err, nats.ErrAuthRevoked) ||
		errors.Is(err, nats.ErrAccountAuthExpired) || errors.Is(err, fs.ErrNotExist) ||
		errors.Is(err, nats.ErrSecureConnRequired) || errors.Is(err, nats.ErrSecureConnWanted) ||
		errors.As(err, &verification) || errors.As(err, &authority) || errors.As(err, &hostname)
}

// servers returns the configured URLs without their passwords.
func (s *Sink) servers() string { return redact.URL(s.cfg.Servers) }

// Close closes the connection. It waits for one that is being opened, which takes no longer than its timeout.
func (s *Sink) Close() error {
	s.dialing.Wait()
	if s.nc != nil {
		s.nc.Close()
		<-s.closed
		s.nc = nil
	}
	return nil
}

// retry calls op until it succeeds, ctx ends or it returns a permanent error.
func (s *Sink) retry(ctx context.Context, step string, op func() error) error {
	attempts := quiet.New(s.log)
	wait := backoff.NewExponentialBackOff()
	wait.InitialInterval, wait.MaxInterval = 100*time.Millisecond, 5*time.Second
	_, err := backoff.Retry(ctx, func() (struct{}, error) {
		err := op()
		if err != nil && !isPermanent(err) {
			err = errors.Join(advise(err), s.denied.take())
		}
		return struct{}{}, err
	},
		backoff.WithBackOff(wait), backoff.WithMaxElapsedTime(0),
		backoff.WithNotify(func(err error, next time.Duration) {
			attempts.Failed("waiting for the stream", err, "stream", s.cfg.Stream, "next", next.Round(time.Millisecond))
		}))
	if err != nil {
		if ctxErr := ctx.Err(); ctxErr != nil {
			return ctxErr
		}
		return fmt.Errorf("%s on stream %q: %w", step, s.cfg.Stream, err)
	}
	attempts.Succeeded("the stream is there again", "stream", s.cfg.Stream)
	return nil
}
