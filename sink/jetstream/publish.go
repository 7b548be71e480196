package jetstream

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"ebb/event"
	"ebb/internal/quiet"
	"ebb/internal/sleep"
	"ebb/sink"
	"ebb/sink/cloudevent"
)

const (
	// maxPending and maxPendingBytes bound what is published and not yet acknowledged. The server refuses a stream's
	// messages when 10,000 of them wait for it.
	maxPending      = 4096
	maxPendingBytes = 8 << 20
)

// ErrForgot says that the stream no longer holds what it acknowledged.
var ErrForgot = errors.New("the stream has forgotten what it acknowledged")

// publisher is one Run of a sink: a window of events that are published and wait to be acknowledged.
type publisher struct {
	*Sink
	delivered sink.Delivered

	// pending are the events after the last acknowledged one, in order; the first sent of them are published. batches
	// own their memory.
	pending []*event.Event
	sent    int
	bytes   int
	batches []held

	// attempt answers for what was published since the stream was last asked for its tail.
	attempt *attempt
	// rejected is why the event behind the last pending one that can be published cannot be, or nil.
	rejected error

	subject []byte
	scratch []byte
	header  nats.Header
	quiet   *quiet.Log
}

type held struct {
	batch *event.Batch
	left  int
}

// attempt collects the answers to a run of messages, each of which expects the one before it as its predecessor.
type attempt struct {
	sub   *nats.Subscription
	inbox string
	// base is the sequence number of the message before the first one.
	base uint64
	// signal is filled when there is something new.
	signal chan struct{}

	mu    sync.Mutex
	acked int // messages acknowledged: as one implies all before it, the newest counts
	// failed is the number of the message whose answer was err. A cluster's leader may refuse one before it acknowledges those
	// in front of it.
	failed int
	err    error
}

// Run publishes the batches.
func (s *Sink) Run(ctx context.Context, in <-chan *event.Batch, delivered sink.Delivered) error {
	p := &publisher{Sink: s, delivered: delivered, header: nats.Header{}, quiet: quiet.New(s.log)}
	defer p.abandon()
	wait := backoff.NewExponentialBackOff()
	wait.InitialInterval, wait.MaxInterval = 50*time.Millisecond, 5*time.Second
	for {
		before := s.last.seq
		var err error
		in, err = p.publish(ctx, in)
		switch {
		case err == nil:
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case isPermanent(err):
			return err
		}
		if s.last.seq > before {
			wait.Reset()
		}
		p.quiet.Failed("publishing was interrupted", err, "stream", s.cfg.Stream, "waiting", len(p.pending))
		if err := sleep.For(ctx, wait.NextBackOff()); err != nil {
			return err
		}
		if err := p.resume(ctx); err != nil {
			return err
		}
	}
}

func isPermanent(err error) bool {
	var permanent *backoff.PermanentError
	var rejected *sink.RejectedError
	return errors.As(err, &permanent) || errors.As(err, &rejected)
}

// publish publishes until in is closed and everything is acknowledged, which is nil, or until something goes wrong. It
// returns in, or nil once that is closed.
func (p *publisher) publish(ctx context.Context, in <-chan *event.Batch) (<-chan *event.Batch, error) {
	if err := p.begin(); err != nil {
		return in, err
	}
	defer p.end()
	// A write to a server that has stopped reading does not look at ctx.
	defer context.AfterFunc(ctx, p.nc.Close)()
	progress := time.NewTimer(ackTimeout)
	defer progress.Stop()
	disconnected := p.nc.StatusChanged(nats.RECONNECTING, nats.DISCONNECTED, nats.CLOSED)
	defer p.nc.RemoveStatusListener(disconnected)
	for {
		if err := p.send(); err != nil {
			return in, err
		}
		if len(p.pending) == 0 && in == nil {
			return nil, nil
		}
		if p.sent == 0 && p.rejected != nil {
			return in, p.rejected
		}
		more := in
		if len(p.pending) >= maxPending || p.bytes >= maxPendingBytes || p.rejected != nil {
			more = nil
		}
		select {
		case b, ok := <-more:
			if !ok {
				in = nil
				continue
			}
			if p.sent == 0 {
				progress.Reset(ackTimeout)
			}
			p.add(b)
		case <-p.attempt.signal:
			n, failed, err := p.attempt.take()
			if n > 0 {
				progress.Reset(ackTimeout)
				p.acknowledged(n)
				p.quiet.Succeeded("publishing goes on", "stream", p.cfg.Stream)
			}
			if err != nil {
				return in, p.explain(ctx, failed, err)
			}
		case <-progress.C:
			if p.sent > 0 {
				return in, errors.Join(fmt.Errorf("no acknowledgment for %s", ackTimeout), p.denied.take())
			}
			progress.Reset(ackTimeout)
		case <-disconnected:
			return in, errors.Join(errNotConnected, p.nc.LastError())
		case <-ctx.Done():
			return in, ctx.Err()
		}
	}
}

// begin subscribes to the answers of a new attempt. Those of earlier ones go to another inbox, so that none of them can be
// taken for an answer to this one.
func (p *publisher) begin() error {
	a := &attempt{inbox: p.nc.NewRespInbox(), base: p.last.seq, signal: make(chan struct{}, 1)}
	sub, err := p.nc.Subscribe(a.inbox+".*", a.answer)
	if err != nil {
		return fmt.Errorf("subscribe to acknowledgments: %w", err)
	}
	if err := sub.SetPendingLimits(-1, -1); err != nil {
		return fmt.Errorf("subscribe to acknowledgments: %w", err)
	}
	a.sub, p.attempt, p.sent, p.rejected = sub, a, 0, nil
	return nil
}

func (p *publisher) end() {
	// On a connection that is lost the subscription is gone as well.
	_ = p.attempt.sub.Unsubscribe()
}

// abandon releases what is still held when a Run ends.
func (p *publisher) abandon() {
	for _, h := range p.batches {
		h.batch.Release()
	}
}

// answer takes one answer of the stream. It runs on the subscription's goroutine.
func (a *attempt) answer(m *nats.Msg) {
	seq, err := parseAck(m)
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.err != nil {
		return
	}
	n, numErr := strconv.Atoi(strings.TrimPrefix(m.Subject[len(a.inbox):], "."))
	switch {
	case err != nil:
		a.err, a.failed = err, n
	case numErr != nil:
		a.err = fmt.Errorf("acknowledgment on an unknown subject %q", m.Subject)
	case seq != a.base+uint64(n):
		a.err = fmt.Errorf("acknowledgment of sequence %d where %d was to be", seq, a.base+uint64(n))
	default:
		a.acked = max(a.acked, n)
	}
	select {
	case a.signal <- struct{}{}:
	default:
	}
}

// take returns how many messages of the attempt were acknowledged, and what went wrong with which one behind them.
func (a *attempt) take() (acked, failed int, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.acked, a.failed, a.err
}

func (p *publisher) add(b *event.Batch) {
	if len(b.Events) == 0 {
		b.Release()
		return
	}
	for i := range b.Events {
		p.pending = append(p.pending, &b.Events[i])
		p.bytes += b.Events[i].Size()
	}
	p.batches = append(p.batches, held{batch: b, left: len(b.Events)})
}

// send publishes the pending events that are not published yet.
func (p *publisher) send() error {
	for p.rejected == nil && p.sent < len(p.pending) {
		e := p.pending[p.sent]
		err := p.sendEvent(e, uint64(p.sent)+p.last.seq)
		if errors.Is(err, cloudevent.ErrHeader) || errors.Is(err, nats.ErrMaxPayload) {
			p.rejected = &sink.RejectedError{ID: string(e.ID), Position: e.Position, Err: p.reason(e, err)}
			return nil
		}
		if err != nil {
			return fmt.Errorf("publish event %s: %w", e.ID, err)
		}
		p.sent++
	}
	return nil
}

func (p *publisher) reason(e *event.Event, err error) error {
	if errors.Is(err, nats.ErrMaxPayload) {
		return fmt.Errorf("its %d bytes and its headers are more than the server's max_payload of %d: raise it there and start ebb run "+
			"again: %w", len(e.Payload), p.nc.MaxPayload(), err)
	}
	return err
}

// sendEvent publishes one event, which is to follow sequence number after.
func (p *publisher) sendEvent(e *event.Event, after uint64) error {
	clear(p.header)
	emit := func(name string, value []byte) { p.header[name] = append(p.header[name], string(value)) }
	p.header[jetstream.ExpectedLastSeqHeader] = []string{strconv.FormatUint(after, 10)}
	p.header[jetstream.ExpectedStreamHeader] = []string{p.cfg.Stream}
	var err error
	if p.cfg.Raw {
		p.scratch, err = cloudevent.RawHeaders(e, p.scratch, emit)
		p.header[headerID] = []string{string(e.ID)}
	} else {
		p.scratch, err = p.envelope.Headers(e, p.scratch, emit)
	}
	if err != nil {
		return err
	}
	p.subject = p.Sink.subject.append(p.subject[:0], e.Topic, e.Key)
	number := after - p.attempt.base + 1
	return p.nc.PublishMsg(&nats.Msg{
		Subject: string(p.subject),
		Reply:   p.attempt.inbox + "." + strconv.FormatUint(number, 10),
		Header:  p.header,
		Data:    e.Payload,
	})
}

// acknowledged takes the events from the window up to the n-th message of the attempt.
func (p *publisher) acknowledged(n int) {
	n -= int(p.last.seq - p.attempt.base)
	if n <= 0 {
		return
	}
	p.sent -= n
	p.deliver(n)
}

// deliver reports the first n pending events and lets go of them.
func (p *publisher) deliver(n int) {
	last := p.pending[n-1]
	p.last = message{seq: p.last.seq + uint64(n), position: last.Position, id: string(last.ID), origin: last.Origin}
	for _, e := range p.pending[:n] {
		p.bytes -= e.Size()
	}
	p.delivered(sink.Progress{Events: n, Position: p.last.position, Sequence: p.last.seq})
	clear(p.pending[:n])
	p.pending = p.pending[n:]
	if len(p.pending) == 0 {
		p.pending = nil
	}
	for n > 0 {
		h := &p.batches[0]
		k := min(n, h.left)
		h.left, n = h.left-k, n-k
		if h.left == 0 {
			h.batch.Release()
			p.batches = p.batches[1:]
		}
	}
}

// resume asks the stream for its tail after something went wrong, and takes from the window what the stream holds already.
func (p *publisher) resume(ctx context.Context) error {
	return p.retry(ctx, "resume", func() error {
		if err := p.connect(ctx); err != nil {
			return err
		}
		tail, found, err := p.tail(ctx)
		switch {
		case errors.Is(err, jetstream.ErrStreamNotFound) && p.last.seq > 0:
			return backoff.Permanent(fmt.Errorf("it does not exist any more, and had acknowledged sequence %d (%w)", p.last.seq, ErrForgot))
		case err != nil:
			return err
		case tail.seq < p.last.seq:
			return backoff.Permanent(fmt.Errorf("it ends at sequence %d but had acknowledged %d: it lost messages that were delivered (%w)",
				tail.seq, p.last.seq, ErrForgot))
		case !found && tail.seq > p.last.seq:
			return backoff.Permanent(fmt.Errorf("its last message, %d, was deleted, and %d was the last to be acknowledged: "+
				"what was delivered between them cannot be told (%w)", tail.seq, p.last.seq, ErrForgot))
		case tail.seq == p.last.seq && found && tail.position != p.last.position:
			return backoff.Permanent(p.foreign(tail))
		case tail.seq == p.last.seq:
			return nil
		case len(p.pending) == 0:
			// Another process, killed a moment ago, had published what this one will be handed next. It is compared then.
			return nil
		}
		n := int(min(tail.seq-p.last.seq, uint64(len(p.pending))))
		if seq := p.last.seq + uint64(n); seq < tail.seq {
			if tail, err = p.message(ctx, seq); err != nil {
				return err
			}
		}
		// Every message named its predecessor: if the n-th one is the n-th event, the ones before it are those before. What
		// does not fit was put there by somebody else.
		if e := p.pending[n-1]; tail.position != e.Position || tail.id != string(e.ID) {
			return backoff.Permanent(p.foreign(tail))
		}
		p.deliver(n)
		return nil
	})
}

func (p *publisher) foreign(tail message) error {
	return fmt.Errorf("it ends at sequence %d with event %q at %s, which this bridge did not publish (it had acknowledged "+
		"sequence %d at %s): %w: give ebb a stream of its own, or restrict who may publish", tail.seq, tail.id, tail.position, p.last.seq, p.last.position, ErrForeign)
}

// explain adds to the refusal of a message of the attempt what an operator needs to know.
func (p *publisher) explain(ctx context.Context, failed int, err error) error {
	if errors.Is(err, errNoResponders) {
		e := p.pending[0]
		return p.listens(ctx, string(p.Sink.subject.append(nil, e.Topic, e.Key)))
	}
	var api *jetstream.APIError
	if errors.As(err, &api) {
		switch api.ErrorCode {
		case codeWrongSequence, codeWrongSequenceAny:
			return fmt.Errorf("the stream has gone on without this bridge: %w", err)
		case codeMessageTooLarge:
			err = fmt.Errorf("it is larger than the stream's max_msg_size: raise that and start ebb run again: %w", err)
		case codeHeadersTooLarge:
			err = fmt.Errorf("its headers, with topic and key, are more than the 65,535 bytes that JetStream takes: %w", err)
		default:
			return fmt.Errorf("the stream refused a message: %w", err)
		}
		if uint64(failed) == p.last.seq-p.attempt.base+1 {
			e := p.pending[0]
			return &sink.RejectedError{ID: string(e.ID), Position: e.Position, Err: err}
		}
		// Those in front of it come first.
	}
	return fmt.Errorf("the stream refused a message: %w", err)
}
