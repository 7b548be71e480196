package jetstream

import (
	"context"
	"errors"
	"fmt"

	"github.com/cenkalti/backoff/v5"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sync/errgroup"

	"ebb/event"
	"ebb/sink"
)

// wayOut is what to do about a stream that others publish to.
const wayOut = "restrict who may publish to its subjects, give ebb a stream of its own, or set nats.exclusive: false"

// kind says what stands at a sequence number of the stream.
type kind int

const (
	// ours has a position, so that a bridge published it.
	ours kind = iota
	// foreign has none.
	foreign
	// missing was deleted, by the stream's limits or on request, and was one or the other.
	missing
)

// peeked is a message of the stream that was looked at.
type peeked struct {
	message
	kind kind
}

func (m peeked) String() string {
	if m.kind == foreign {
		return "a message without a position"
	}
	return fmt.Sprintf("event %q at %s", m.id, m.position)
}

// is reports whether m is an event. The position of a retried one is that of the event which it came behind.
func (m peeked) is(e *event.Event) bool {
	if m.kind != ours || m.id != string(e.ID) {
		return false
	}
	if e.Origin == event.Retried {
		return m.origin == event.Retried
	}
	return m.position == e.Position
}

// walk compares a stretch of the stream with the pending events.
//
// It looks at every message. That the n-th message is the n-th event does not tell that those before it are in the stream: a
// foreign message that took the place of event k had that refused, and is the predecessor which event k+1 named.
type walk struct {
	pending []*event.Event

	// matched is how many of the events the stream holds, the last of them at sequence number seq, and all of them at seqs.
	matched int
	seq     uint64
	seqs    []uint64
	// end is the last message that was understood.
	end uint64
	// foreign is how many messages up to end are foreign, the last of them at stranger.
	foreign  int
	stranger uint64
	// deleted is how many messages behind end do not exist any more.
	deleted int
}

// over walks from one sequence number to another, or to the first message that belongs behind the pending events: another process
// published that, and this one is handed it next. An error is permanent when the stream does not hold the events in order, and
// else what read returned; what comes before is in the result.
func (w *walk) over(from, to uint64, read func(seq uint64) (peeked, error)) error {
	for seq := from; seq <= to; seq++ {
		m, err := read(seq)
		if err != nil {
			return err
		}
		switch m.kind {
		case missing:
			if w.deleted++; w.deleted > len(w.pending) {
				return w.unknown(seq + 1) // however many there are
			}
		case foreign:
			if w.deleted > 0 {
				return w.unknown(seq)
			}
			w.foreign, w.stranger, w.end = w.foreign+1, seq, seq
		case ours:
			if w.matched == len(w.pending) && w.deleted == 0 {
				return nil
			}
			if err := w.match(m); err != nil {
				return err
			}
		}
	}
	if w.deleted > 0 {
		return w.unknown(to + 1)
	}
	return nil
}

// match finds the event that m is. Where messages before it were deleted, they are taken for the events before it: they all were
// if there are as many, unless somebody else publishes to the stream and just one of these was among them.
func (w *walk) match(m peeked) error {
	rest := w.pending[w.matched:]
	if w.deleted >= len(rest) {
		return w.unknown(m.seq)
	}
	if m.is(rest[w.deleted]) {
		for i := range w.deleted + 1 {
			w.seqs = append(w.seqs, m.seq-uint64(w.deleted-i))
		}
		w.matched += w.deleted + 1
		w.seq, w.end, w.deleted = m.seq, m.seq, 0
		return nil
	}
	if w.deleted > 0 {
		return w.unknown(m.seq)
	}
	if m.origin == event.Retried {
		return backoff.Permanent(fmt.Errorf("it holds %s at sequence %d, which another bridge has delivered from the dead letters: %w", m, m.seq,
			sink.ErrChanged))
	}
	lost := rest[0]
	if w.foreign > 0 {
		return backoff.Permanent(fmt.Errorf("event %q at %s is missing in it in front of %s at sequence %d, as a foreign message (the last one "+
			"at sequence %d) took its place: %w alone: %s", lost.ID, lost.Position, m, m.seq, w.stranger, ErrForeign, wayOut))
	}
	return backoff.Permanent(fmt.Errorf("it holds %s at sequence %d, where event %q at %s was to follow: another bridge published that: %w: "+
		"%s", m, m.seq, lost.ID, lost.Position, ErrForeign, wayOut))
}

// unknown says that messages in front of seq were deleted which may have been any.
func (w *walk) unknown(seq uint64) error {
	e := w.pending[min(w.matched, len(w.pending)-1)]
	return backoff.Permanent(fmt.Errorf("its messages %d to %d were deleted: whether they were the events from %q at %s on cannot be told (%w)",
		w.end+1, seq-1, e.ID, e.Position, sink.ErrChanged))
}

// peek looks at one message.
func (s *Sink) peek(ctx context.Context, seq uint64) (peeked, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	m, err := s.message(ctx, seq)
	switch {
	case isAPIError(err, codeNoMessage):
		return peeked{message: message{seq: seq}, kind: missing}, nil
	case errors.Is(err, ErrForeign):
		return peeked{message: message{seq: seq}, kind: foreign}, nil
	}
	return peeked{message: m}, err
}

const (
	// readAhead is how many messages are read at once for a walk, and readers by how many requests at a time: each waits for an
	// answer from the stream's leader.
	readAhead = 256
	readers   = 32
)

// reader reads the messages of the stream in order, some of them ahead.
func (s *Sink) reader(ctx context.Context, state jetstream.StreamState) func(seq uint64) (peeked, error) {
	var ahead []peeked
	return func(seq uint64) (peeked, error) {
		if seq < state.FirstSeq {
			return peeked{message: message{seq: seq}, kind: missing}, nil
		}
		if len(ahead) == 0 {
			next := make([]peeked, min(readAhead, state.LastSeq-seq+1))
			group, ctx := errgroup.WithContext(ctx)
			group.SetLimit(readers)
			for i := range next {
				group.Go(func() (err error) {
					next[i], err = s.peek(ctx, seq+uint64(i))
					return err
				})
			}
			if err := group.Wait(); err != nil {
				return peeked{}, err
			}
			ahead = next
		}
		m := ahead[0]
		ahead = ahead[1:]
		return m, nil
	}
}
