package jetstream

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"ebb/event"
	"ebb/internal/quiet"
	"ebb/internal/sleep"
	"ebb/sink"
)

// publisher is one Run of a sink.
type publisher struct {
	*Sink
	window
	delivered sink.Delivered

	// begin starts an attempt at publishing behind a sequence number, in the way that was chosen.
	begin func(base uint64) (attempt, error)

	// end is the last message of the stream that was looked at: that of the last delivered event, or a foreign one behind it.
	end uint64

	// attempt answers for what was published since the stream was last asked for its end: the first sent of the pending events,
	// and before them those that it acknowledged, which are acked.
	attempt     attempt
	acked, sent int
	// rejected is why the event behind the sent ones cannot be published, or nil.
	rejected error

	quiet *quiet.Log
	// busy logs what mends itself, and comes again.
	busy *quiet.Log
	// strangers logs the foreign messages that were stepped over, of which there were so many.
	strangers *quiet.Log
	foreign   int
}

// Run publishes the batches.
func (s *Sink) Run(ctx context.Context, in <-chan *event.Batch, out sink.Outcome) error {
	p := &publisher{
		Sink: s, delivered: out.Delivered, begin: newPipelined(s).begin, end: s.end,
		quiet: quiet.New(s.log), busy: quiet.New(s.log), strangers: quiet.New(s.log),
	}
	defer p.release()
	wait := backoff.NewExponentialBackOff()
	wait.InitialInterval, wait.MaxInterval = 50*time.Millisecond, 5*time.Second
	moved := true
	for {
		before := p.end
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
		if p.end > before {
			moved = true
			wait.Reset()
		}
		switch {
		case isAPIError(err, codeTooManyRequests):
			p.busy.Failed("the server asks for fewer messages at a time", err, "stream", s.cfg.Stream)
		case moved && errors.Is(err, errGoneOn):
			// Why it has is seen when the stream is looked at, and said then.
		default:
			p.quiet.Failed("publishing was interrupted", err, "stream", s.cfg.Stream, "waiting", len(p.pending))
		}
		if err := sleep.For(ctx, wait.NextBackOff()); err != nil {
			return err
		}
		before = p.end
		if err := p.resume(ctx); err != nil {
			return err
		}
		moved = p.end > before
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
	// A write to a server that has stopped reading does not look at ctx.
	defer context.AfterFunc(ctx, p.nc.Close)()
	disconnected := p.nc.StatusChanged(nats.RECONNECTING, nats.DISCONNECTED, nats.CLOSED)
	defer p.nc.RemoveStatusListener(disconnected)
	attempt, err := p.begin(p.end)
	if err != nil {
		return in, err
	}
	defer attempt.end()
	p.attempt, p.acked, p.sent, p.rejected = attempt, 0, 0, nil
	progress := time.NewTimer(p.ackTimeout)
	defer progress.Stop()
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
		if p.window.full() || p.rejected != nil {
			more = nil
		}
		select {
		case b, ok := <-more:
			if !ok {
				in = nil
				continue
			}
			if p.sent == 0 {
				progress.Reset(p.ackTimeout)
			}
			p.add(b)
		case <-p.attempt.changed():
			acked, seq, failed, err := p.attempt.answers()
			if acked > p.acked {
				progress.Reset(p.ackTimeout)
				p.acknowledged(acked, seq)
				p.quiet.Succeeded("publishing goes on", "stream", p.cfg.Stream)
			}
			if err != nil {
				return in, p.explain(ctx, failed, err)
			}
		case <-progress.C:
			if p.sent > 0 {
				return in, errors.Join(fmt.Errorf("no acknowledgment for %s", p.ackTimeout), p.denied.take())
			}
			progress.Reset(p.ackTimeout)
		case <-disconnected:
			return in, errors.Join(errNotConnected, p.nc.LastError())
		case <-ctx.Done():
			return in, ctx.Err()
		}
	}
}

// send publishes the pending events that are not published yet, as far as the attempt takes them.
func (p *publisher) send() error {
	if p.rejected != nil || p.sent == len(p.pending) {
		return nil
	}
	n, err := p.attempt.send(p.pending[p.sent:])
	p.sent += n
	if rejected := (*sink.RejectedError)(nil); errors.As(err, &rejected) {
		p.rejected = rejected // once those in front of it are delivered
		return nil
	}
	return err
}

// acknowledged takes note that the attempt's first events are delivered, up to the one of that number, which has sequence number seq.
func (p *publisher) acknowledged(number int, seq uint64) {
	n := number - p.acked
	p.acked, p.sent = number, p.sent-n
	p.deliver(n, seq)
}

// deliver reports the first n pending events, the last of which has sequence number seq, and lets go of them.
func (p *publisher) deliver(n int, seq uint64) {
	last := p.pending[n-1]
	p.last = message{seq: seq, position: last.Position, id: string(last.ID), origin: last.Origin}
	p.end = max(p.end, seq)
	p.Sink.end = p.end
	p.delivered(sink.Progress{Events: n, Position: last.Position, Sequence: seq})
	p.drop(n)
}

// resume looks at the stream after something went wrong, takes from the window what it holds already, and finds out behind which
// message to go on.
func (p *publisher) resume(ctx context.Context) error {
	return p.retry(ctx, "resume", func() error {
		if err := p.connect(ctx); err != nil {
			return err
		}
		state, err := p.state(ctx)
		switch {
		case errors.Is(err, jetstream.ErrStreamNotFound):
			return backoff.Permanent(fmt.Errorf("it does not exist any more, and had reached sequence %d: %w", p.end, sink.ErrChanged))
		case err != nil:
			return err
		case state.LastSeq < p.end:
			return backoff.Permanent(fmt.Errorf("it ends at sequence %d, and had reached %d: %w", state.LastSeq, p.end, sink.ErrChanged))
		}
		if err := p.checkLast(ctx, state); err != nil {
			return err
		}
		if len(p.pending) == 0 {
			// What is behind it is looked at when there are events to compare it with. It may be what another process, killed
			// a moment ago, had published and this one will be handed next.
			return nil
		}
		if !p.cfg.Exclusive {
			return p.findPending(ctx, state)
		}
		return p.catchUp(ctx, state)
	})
}

// findPending takes from the window the first events that the stream holds already, where others publish to it as well. What it holds of the
// events behind a missing one is published again, and the stream knows it by its id.
func (p *publisher) findPending(ctx context.Context, state jetstream.StreamState) error {
	type place struct {
		position event.Position
		id       string
	}
	found := map[place]uint64{}
	if err := p.scan(ctx, p.end, state.LastSeq, func(m message, _ []byte) error {
		found[place{m.position, m.id}] = m.seq
		return nil
	}); err != nil {
		return err
	}
	n, seq := 0, p.end
	for _, e := range p.pending {
		at, ok := found[place{e.Position, string(e.ID)}]
		if !ok {
			break
		}
		n, seq = n+1, max(seq, at)
	}
	if n > 0 {
		p.deliver(n, seq)
	}
	p.end = max(p.end, state.LastSeq)
	return nil
}

// state asks the stream's leader where the stream begins and ends.
func (p *publisher) state(ctx context.Context) (jetstream.StreamState, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	stream, err := p.js.Stream(ctx, p.cfg.Stream)
	if err != nil {
		return jetstream.StreamState{}, fmt.Errorf("read its state: %w", err)
	}
	return stream.CachedInfo().State, nil
}

// checkLast finds out whether the stream still is the one that acknowledged the last event.
func (p *publisher) checkLast(ctx context.Context, state jetstream.StreamState) error {
	if p.last.seq == 0 || p.last.seq < state.FirstSeq {
		return nil
	}
	m, err := p.peek(ctx, p.last.seq)
	switch {
	case err != nil:
		return err
	case m.kind == missing, m.kind == ours && m.position == p.last.position:
		return nil
	}
	return backoff.Permanent(fmt.Errorf("it holds %s at sequence %d, where event %q at %s was acknowledged: %w: %s", m, p.last.seq,
		p.last.id, p.last.position, ErrForeign, wayOut))
}

// catchUp goes on behind what the stream holds of the pending events, and of foreign messages.
func (p *publisher) catchUp(ctx context.Context, state jetstream.StreamState) error {
	from := p.end
	w := walk{pending: p.pending, end: from}
	err := w.over(from+1, state.LastSeq, p.reader(ctx, state))
	if w.matched > 0 {
		p.deliver(w.matched, w.seq)
		p.quiet.Succeeded("publishing goes on", "stream", p.cfg.Stream)
	}
	p.end = w.end
	if w.foreign > 0 {
		p.foreign += w.foreign
		p.strangers.Failed("stepped over messages of the stream that this bridge did not publish; it goes on behind them",
			fmt.Errorf("%w alone: %s", ErrForeign, wayOut), "stream", p.cfg.Stream, "messages", p.foreign, "last", w.stranger)
	}
	return err
}
