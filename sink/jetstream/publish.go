package jetstream

import (
	"bytes"
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
	out sink.Outcome
	// kept receives when the dead letters have kept something, and keeping is for the events of the next batch that they are to keep.
	kept    chan struct{}
	keeping *keeping
	// turn says that a retry was taken last, so that it is the turn of a batch.
	turn bool

	// begin starts an attempt at publishing behind a sequence number, in the way that was chosen.
	begin func(base uint64) (attempt, error)

	// end is the last message of the stream that was looked at: that of the last delivered event, or a foreign one behind it.
	end uint64

	// known are the ids by which a stream that others publish to as well knows messages of pending events, although one before them is missing, from
	// when it was last looked at.
	known map[string]bool

	// attempt answers for what was published since the stream was last asked for its end: the first sent of the pending events,
	// and before them those that it acknowledged, which are acked.
	attempt     attempt
	acked, sent int
	// rejected is why the event behind the sent ones cannot be published, or nil.
	rejected *rejection
	// refused says that the stream has refused the first pending event for good, and that what was sent behind it is not answered yet.
	refused bool

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
		Sink: s, out: out, kept: make(chan struct{}, 1), begin: newPipelined(s).begin, end: s.end,
		quiet: quiet.New(s.log), busy: quiet.New(s.log), strangers: quiet.New(s.log),
	}
	defer p.giveUp()
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
		case errors.Is(err, errSetAside):
			continue
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
	p.attempt, p.acked, p.sent, p.rejected, p.refused = attempt, 0, 0, nil, false
	if len(p.retries) > 0 {
		p.retries[0].since = time.Time{} // it is not what has held up the others
	}
	progress := time.NewTimer(p.ackTimeout)
	defer progress.Stop()
	for {
		p.report(0)
		idle := p.sent == 0
		if err := p.send(); err != nil {
			return in, err
		}
		if idle && p.sent > 0 {
			progress.Reset(p.ackTimeout)
		}
		if len(p.pending) == 0 && len(p.asides) == 0 && in == nil {
			return nil, nil
		}
		if p.sent == 0 && p.rejected != nil {
			if err := p.dismiss(ctx); err != nil {
				return in, err
			}
			continue
		}
		more, retries := in, p.retryable(in)
		if p.window.full() || p.rejected != nil || p.refused {
			more, retries = nil, nil
		}
		select {
		case b, ok := <-more:
			if !ok {
				in = nil
				continue
			}
			p.turn = false
			p.take(b)
		case r := <-retries:
			p.turn = true
			p.takeRetry(r)
		case <-p.kept:
		case <-p.attempt.changed():
			acked, seq, failed, err := p.attempt.answers()
			if acked > p.acked {
				progress.Reset(p.ackTimeout)
				p.acknowledged(acked, seq)
				p.quiet.Succeeded("publishing goes on", "stream", p.cfg.Stream)
			}
			if err != nil {
				if err = p.refuse(p.explain(ctx, failed, err)); err != nil {
					return in, err
				}
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

// take takes in the events of a batch, but for those that the dead letters keep. What they keep of it is waited for together.
func (p *publisher) take(b *event.Batch) {
	if p.out.Dead == nil {
		p.add(b, nil)
		return
	}
	if p.keeping == nil {
		p.keeping = newKeeping(p.kept)
	}
	p.add(b, func(e *event.Event) *keeping {
		if !p.out.Dead.Queue(e, p.keeping.done) {
			return nil
		}
		p.keeping.given++
		return p.keeping
	})
	if p.keeping.given > 0 {
		p.keeping = nil
	}
}

// retryable returns where retries come from. None are taken when there are no more batches.
//
// What is retried goes message by message, and what comes behind it in the window waits for that: one retry is taken at a time, and in turn with
// batches, as far as any wait.
func (p *publisher) retryable(in <-chan *event.Batch) <-chan *sink.Retry {
	if in == nil || p.out.Dead == nil || len(p.retries) > 0 || p.turn && len(in) > 0 {
		return nil
	}
	return p.out.Dead.Retries()
}

func (p *publisher) takeRetry(r *sink.Retry) {
	if len(r.Batch.Events) == 0 {
		r.Done(0, 0, nil)
		r.Batch.Release()
		return
	}
	p.addRetry(r)
}

// send publishes the pending events that are not published yet, as far as they may be and the attempt takes them.
func (p *publisher) send() error {
	ready := p.ready()
	if p.rejected != nil || p.refused || p.sent >= ready {
		return nil
	}
	n, err := p.attempt.send(p.pending[p.sent:ready], p.behind(p.pending[p.sent]))
	p.sent += n
	if rejected := (*rejection)(nil); errors.As(err, &rejected) {
		p.rejected = rejected // once those in front of it are delivered
		return nil
	}
	return err
}

// ready returns how many of the pending events may be in the stream by now: none behind those that are not kept yet.
//
// A retried event is sent when nothing else is on its way, and alone. What was sent may arrive late, when this process is gone and another one
// goes on: then it must not fit. That holds of events of the slot, as the other process sends the same ones with the same predecessors; but it
// retries at another time.
func (p *publisher) ready() int {
	n := p.before()
	if len(p.retries) == 0 {
		return n
	}
	if at := int(p.retries[0].place - p.gone); at > 0 {
		return min(n, at)
	}
	return min(n, 1)
}

// behind returns the position of an event if it is retried: that of the message before it, but never in an epoch before its own.
func (p *publisher) behind(e *event.Event) event.Position {
	if p.position.Epoch < e.Position.Epoch {
		return event.Position{Epoch: e.Position.Epoch}
	}
	return p.position
}

// errSetAside says that an attempt has ended because an event that it had sent was set aside.
var errSetAside = errors.New("an event was set aside")

// refuse returns why an attempt has ended with an error, or nil if it has not yet: of an event that the stream cannot hold, it has once everything
// sent behind that is answered, and the event set aside.
func (p *publisher) refuse(err error) error {
	refused := (*rejection)(nil)
	if !errors.As(err, &refused) || !p.parks() {
		return err
	}
	answered, stored := p.attempt.rest()
	if p.refused = !answered; p.refused {
		return nil
	}
	p.setAside(refused, func(i int) bool { return stored[p.acked+i+1] })
	return errSetAside
}

// dismiss sets the first pending event aside, which cannot be published.
func (p *publisher) dismiss(ctx context.Context) error {
	if p.rejected.reason == reasonMaxMsgSize {
		// What is known of the stream's settings may be old.
		before := p.maxMsgSize
		if _, err := p.state(ctx); err != nil {
			return err
		}
		if p.maxMsgSize != before {
			p.rejected = nil
			return nil
		}
	}
	if !p.parks() {
		return p.rejected.RejectedError
	}
	p.setAside(p.rejected, func(int) bool { return false })
	p.rejected = nil
	return nil
}

// parks reports whether the first pending event is set aside if it cannot be delivered.
func (p *publisher) parks() bool {
	return p.pending[0].Origin == event.Retried || p.out.Parks()
}

// setAside has the dead letters keep the first pending event, and those of its key behind it, but for events that the stream holds already. The rest
// of a retry is given back.
func (p *publisher) setAside(why *rejection, stored func(i int) bool) {
	first := p.pending[0]
	attempts := 0
	if why.sent {
		attempts = 1
	}
	if first.Origin == event.Retried {
		p.giveBack(&sink.Failure{Rejected: true, Reason: why.reason, Detail: why.detail(), Attempts: attempts})
		return
	}
	parked := sink.Letter{Event: first, Reason: why.reason, Detail: why.detail(), Attempts: attempts}
	if why.sent {
		parked.LastAt = time.Now()
		parked.FirstAt = parked.LastAt
	}
	letters, out := []sink.Letter{parked}, []int{0}
	for i, e := range p.pending {
		if i > 0 && first.Key != nil && e.Key != nil && bytes.Equal(e.Key, first.Key) && e.Origin != event.Retried && !stored(i) &&
			(len(p.known) == 0 || !p.known[messageID(e)]) {
			letters, out = append(letters, sink.Letter{Event: e, Reason: sink.Queued}), append(out, i)
		}
	}
	k := newKeeping(p.kept)
	k.given = 1
	p.out.Dead.Park(letters, k.done)
	p.window.take(out, k)
}

// doneRetry says what has come of the first retry.
func (p *publisher) doneRetry(failure *sink.Failure) {
	r := p.retries[0]
	p.retries = p.retries[1:]
	if r.stored > 0 {
		p.at = sink.Progress{Position: p.position, Sequence: r.seq}
	}
	r.Done(r.stored, r.seq, failure)
}

// giveUp lets go of everything. What has become of the retried events that are not acknowledged is not known.
func (p *publisher) giveUp() {
	for len(p.retries) > 0 {
		p.doneRetry(nil)
	}
	p.release()
}

// acknowledged takes note that the attempt's first events are delivered, up to the one of that number, which has sequence number seq.
func (p *publisher) acknowledged(number int, seq uint64) {
	n := number - p.acked
	p.acked, p.sent = number, p.sent-n
	// Where a retried event is among them, it is the only one.
	p.deliver(n, func(int) uint64 { return seq })
	p.cutRetry()
}

// cutRetry gives back what is left of a retry that has held up the others for long enough.
func (p *publisher) cutRetry() {
	if len(p.retries) == 0 || p.retries[0].place != p.gone {
		return
	}
	switch r := p.retries[0]; {
	case r.since.IsZero():
		r.since = time.Now()
	case r.stored > 0 && time.Since(r.since) > p.retryFor:
		p.giveBack(nil)
	}
}

// giveBack lets go of the first retry, whose next event stands first and is not on its way.
func (p *publisher) giveBack(failure *sink.Failure) {
	out := make([]int, p.retries[0].left)
	for i := range out {
		out[i] = i
	}
	p.doneRetry(failure)
	p.window.take(out, nil)
}

// deliver reports the first n pending events, the last of them at sequence number seq(n-1), and lets go of them. It asks for the numbers of other ones
// where a retry begins or ends.
func (p *publisher) deliver(n int, seq func(i int) uint64) {
	for done := 0; done < n; {
		k := n - done
		retried := false
		if len(p.retries) > 0 {
			r := p.retries[0]
			if retried = r.place == p.gone; retried {
				k = min(k, r.left)
			} else {
				k = min(k, int(r.place-p.gone))
			}
		}
		done += k
		p.stored(k, seq(done-1), retried)
	}
}

// stored reports the first n pending events, which are all of one retry or none of any.
func (p *publisher) stored(n int, seq uint64, retried bool) {
	last := p.pending[n-1]
	p.last = message{seq: seq, position: last.Position, id: string(last.ID), origin: last.Origin}
	p.end = max(p.end, seq)
	p.Sink.end = p.end
	if !retried {
		p.position = last.Position
		p.at = sink.Progress{Position: last.Position, Sequence: seq}
		p.drop(n)
		p.report(n)
		return
	}
	p.position = p.behind(last)
	r := p.retries[0]
	r.place, r.left, r.stored, r.seq = r.place+uint64(n), r.left-n, r.stored+n, seq
	if r.left == 0 {
		p.doneRetry(nil)
	}
	p.drop(n)
	p.report(0)
}

// report says that n events are delivered, and those behind them that are kept.
func (p *publisher) report(n int) {
	if len(p.asides) > 0 {
		n += p.settle()
	}
	if n > 0 {
		p.out.Delivered(sink.Progress{Events: n, Position: p.at.Position, Sequence: p.at.Sequence})
	}
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
		if p.before() == 0 {
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
		retried  bool
	}
	found := map[place]uint64{}
	if err := p.scan(ctx, p.end, state.LastSeq, func(m message, _ []byte) error {
		if m.origin == event.Retried {
			m.position = event.Position{}
		}
		found[place{m.position, m.id, m.origin == event.Retried}] = m.seq
		return nil
	}); err != nil {
		return err
	}
	seq, seqs := p.end, []uint64(nil)
	wanted := p.pending[:p.before()]
	p.known = nil
	for i, e := range wanted {
		key := place{e.Position, string(e.ID), e.Origin == event.Retried}
		if key.retried {
			key.position = event.Position{}
		}
		at, ok := found[key]
		if !ok {
			p.known = knownOf(wanted[i+1:], func(e *event.Event) bool {
				_, ok := found[place{e.Position, string(e.ID), false}]
				return ok
			})
			break
		}
		seq = max(seq, at)
		seqs = append(seqs, seq)
	}
	all := len(wanted) == len(p.pending)
	if len(seqs) > 0 {
		p.deliver(len(seqs), func(i int) uint64 { return seqs[i] })
	}
	if all {
		p.end = max(p.end, state.LastSeq)
	}
	return nil
}

// knownOf returns the ids of the messages of those of the events that are found.
func knownOf(events []*event.Event, found func(*event.Event) bool) map[string]bool {
	known := map[string]bool{}
	for _, e := range events {
		if e.Origin != event.Retried && found(e) {
			known[messageID(e)] = true
		}
	}
	return known
}

// state asks the stream's leader where the stream begins and ends.
func (p *publisher) state(ctx context.Context) (jetstream.StreamState, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	stream, err := p.js.Stream(ctx, p.cfg.Stream)
	if err != nil {
		return jetstream.StreamState{}, fmt.Errorf("read its state: %w", err)
	}
	p.maxMsgSize = int(stream.CachedInfo().Config.MaxMsgSize)
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
	case m.kind == missing, m.kind == ours && m.position == p.last.position,
		m.kind == ours && m.origin == event.Retried && p.last.origin == event.Retried && m.id == p.last.id:
		return nil
	}
	return backoff.Permanent(fmt.Errorf("it holds %s at sequence %d, where event %q at %s was acknowledged: %w: %s", m, p.last.seq,
		p.last.id, p.last.position, ErrForeign, wayOut))
}

// catchUp goes on behind what the stream holds of the pending events, and of foreign messages.
func (p *publisher) catchUp(ctx context.Context, state jetstream.StreamState) error {
	from := p.end
	w := walk{pending: p.pending[:p.before()], end: from}
	err := w.over(from+1, state.LastSeq, p.reader(ctx, state))
	if w.matched > 0 {
		p.deliver(w.matched, func(i int) uint64 { return w.seqs[i] })
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
