// Package stdout delivers events to a stream of lines, one CloudEvents JSON object each.
package stdout

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"

	"ebb/event"
	"ebb/sink"
	"ebb/sink/cloudevent"
)

// Config says where the lines go.
type Config struct {
	// Out takes the lines; nil is the standard output. A batch is one call of Write.
	Out io.Writer
	// Source is the CloudEvents source.
	Source string
	// Logger may be nil.
	Logger *slog.Logger
}

// Sink writes a line for every event. Delivered means that Out has taken it.
type Sink struct {
	out      io.Writer
	envelope cloudevent.Envelope
	log      *slog.Logger

	position event.Position
	buf      []byte
	// writing is set while a Write is under way, which a Run that was told to stop leaves behind: nothing can interrupt a Write to
	// a pipe that nobody reads. buf belongs to it until then.
	writing *write
}

// write is one call of Write and what it delivers.
type write struct {
	done chan struct{}
	err  error // valid when done is closed
	// n and upTo are about what comes before the first event that the dead letters keep.
	n    int
	upTo event.Position
}

// passage is a batch on its way.
type passage struct {
	n    int
	last event.Position
	// kept has an element for each of the held events once that is kept.
	held int
	kept chan struct{}
}

var _ sink.Sink = (*Sink)(nil)

// maxKept keeps one giant batch from holding its memory for ever.
const maxKept = 4 << 20

// New returns a sink that writes to cfg.Out.
func New(cfg Config) *Sink {
	if cfg.Out == nil {
		cfg.Out = os.Stdout
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	return &Sink{out: cfg.Out, envelope: cloudevent.Envelope{Source: cfg.Source}, log: cfg.Logger}
}

// Resume returns the last event that this process wrote, or what is known if that is later. When a Write of a Run that was told
// to stop is still blocked, it waits until the reader has taken it, because a second one would tear its lines apart.
func (s *Sink) Resume(ctx context.Context, known sink.Known) (sink.Tail, error) {
	if err := s.settle(ctx); err != nil {
		return sink.Tail{}, err
	}
	if known.Position.Compare(s.position) > 0 {
		return sink.Tail{Position: known.Position}, nil
	}
	return sink.Tail{Position: s.position}, nil
}

// Run writes the batches from in, and what is retried between them. An error of Write is final: a pipe whose reader went away does not come back.
func (s *Sink) Run(ctx context.Context, in <-chan *event.Batch, out sink.Outcome) error {
	if err := s.settle(ctx); err != nil {
		return err
	}
	var retries <-chan *sink.Retry
	if out.Dead != nil {
		retries = out.Dead.Retries()
	}
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
			p, rejected := s.begin(batch, out)
			batch.Release()
			if err := s.pass(ctx, p, out); err != nil {
				return err
			}
			if rejected != nil {
				return rejected
			}
		case retry := <-retries:
			if err := s.retry(ctx, retry); err != nil {
				return err
			}
		}
	}
}

// begin starts to write the batch, and has kept what is not to be written. Unless it is parked, an event that cannot be written ends that. It
// keeps nothing of the batch.
func (s *Sink) begin(batch *event.Batch, out sink.Outcome) (*passage, error) {
	p := &passage{kept: make(chan struct{}, len(batch.Events))}
	kept := func() { p.kept <- struct{}{} }
	var rejected error
	var first int
	var upTo event.Position
	buf := s.lines()
	for i := range batch.Events {
		e := &batch.Events[i]
		if out.Dead != nil && out.Dead.Queue(e, kept) {
			p.held++
		} else if line, err := s.envelope.AppendJSON(buf, e); err == nil {
			buf = append(line, '\n')
		} else if out.Parks() {
			p.held++
			f := refusal(err)
			s.log.Warn("event parked; see ebb dead", "event", string(e.ID), "position", e.Position, "reason", f.Reason, "detail", f.Detail)
			out.Dead.Park([]sink.Letter{{Event: e, Reason: f.Reason, Detail: f.Detail}}, kept)
		} else {
			rejected = &sink.RejectedError{ID: string(e.ID), Position: e.Position, Err: err}
			break
		}
		p.n, p.last = i+1, e.Position
		if p.held == 0 {
			first, upTo = p.n, p.last
		}
	}
	s.write(buf, first, upTo)
	return p, rejected
}

// pass waits until all of a batch is written or kept.
func (s *Sink) pass(ctx context.Context, p *passage, out sink.Outcome) error {
	told := 0
	if s.writing != nil {
		w, err := s.finish(ctx)
		if err != nil {
			return err
		}
		if told = w.n; told > 0 {
			out.Delivered(sink.Progress{Events: told, Position: w.upTo})
		}
	}
	for range p.held {
		select {
		case <-p.kept:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	if p.n > told {
		s.position = p.last
		out.Delivered(sink.Progress{Events: p.n - told, Position: p.last})
	}
	return nil
}

// retry writes events that were kept.
func (s *Sink) retry(ctx context.Context, retry *sink.Retry) error {
	var failure *sink.Failure
	n := 0
	buf := s.lines()
	for i := range retry.Batch.Events {
		line, err := s.envelope.AppendJSON(buf, &retry.Batch.Events[i])
		if err != nil {
			failure = refusal(err)
			break
		}
		buf = append(line, '\n')
		n++
	}
	retry.Batch.Release()
	s.write(buf, 0, event.Position{})
	if s.writing != nil {
		if _, err := s.finish(ctx); err != nil {
			retry.Done(0, 0, nil)
			return err
		}
	}
	retry.Done(n, 0, failure)
	return nil
}

// refusal says why an event can never be written.
func refusal(err error) *sink.Failure {
	reason, detail := cloudevent.Explain(err)
	return &sink.Failure{Rejected: true, Reason: reason, Detail: detail}
}

// lines returns memory for the lines of a batch.
func (s *Sink) lines() []byte {
	if cap(s.buf) > maxKept {
		s.buf = nil
	}
	return s.buf[:0]
}

// write starts to write lines, unless there are none, with which the first n events of a batch are delivered.
func (s *Sink) write(lines []byte, n int, upTo event.Position) {
	s.buf = lines
	if len(lines) == 0 {
		return
	}
	w := &write{done: make(chan struct{}), n: n, upTo: upTo}
	s.writing = w
	go func() { // finish waits for it
		defer close(w.done)
		_, w.err = s.out.Write(lines)
	}()
}

// settle waits for the write that an earlier Run left behind, if there is one.
func (s *Sink) settle(ctx context.Context) error {
	if s.writing == nil {
		return nil
	}
	select {
	case <-s.writing.done:
	default:
		s.log.Warn("nobody reads the output; waiting for the rest of the last write to be taken")
	}
	_, err := s.finish(ctx)
	return err
}

// finish waits for the write that is under way.
func (s *Sink) finish(ctx context.Context) (*write, error) {
	w := s.writing
	select {
	case <-w.done:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	s.writing = nil
	if w.err != nil {
		return nil, fmt.Errorf("write events to the output: %w; start ebb again when there is a reader or room for it", w.err)
	}
	if w.n > 0 {
		s.position = w.upTo
	}
	return w, nil
}

// Close leaves Out open, which is its owner's.
func (s *Sink) Close() error { return nil }
