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
	n    int
	upTo event.Position
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

// Run writes the batches from in. An error of Write is final: a pipe whose reader went away does not come back.
func (s *Sink) Run(ctx context.Context, in <-chan *event.Batch, out sink.Outcome) error {
	if err := s.settle(ctx); err != nil {
		return err
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
			rejected := s.begin(batch)
			batch.Release()
			if s.writing != nil {
				w, err := s.finish(ctx)
				if err != nil {
					return err
				}
				out.Delivered(sink.Progress{Events: w.n, Position: w.upTo})
			}
			if rejected != nil {
				return rejected
			}
		}
	}
}

// begin starts to write the batch, up to an event that cannot be written. It keeps nothing of the batch.
func (s *Sink) begin(batch *event.Batch) error {
	if cap(s.buf) > maxKept {
		s.buf = nil
	}
	var rejected error
	w := &write{done: make(chan struct{})}
	buf := s.buf[:0]
	for i := range batch.Events {
		e := &batch.Events[i]
		line, err := s.envelope.AppendJSON(buf, e)
		if err != nil {
			rejected = &sink.RejectedError{ID: string(e.ID), Position: e.Position, Err: err}
			break
		}
		buf = append(line, '\n')
		w.n, w.upTo = i+1, e.Position
	}
	s.buf = buf
	if w.n == 0 {
		return rejected
	}
	s.writing = w
	go func() { // finish waits for it
		defer close(w.done)
		_, w.err = s.out.Write(buf)
	}()
	return rejected
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
	s.position = w.upTo
	return w, nil
}

// Close leaves Out open, which is its owner's.
func (s *Sink) Close() error { return nil }
