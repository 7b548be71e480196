package jetstream

import (
	"errors"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"sync"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"ebb/event"
	"ebb/sink/cloudevent"
)

// attempt publishes a run of events behind the message at its base, by one of the ways that there are, until something goes
// wrong. Events are numbered from 1.
type attempt interface {
	// send publishes the events, which follow those that it sent before, as far as its own limits allow now, and returns how
	// many it did. Retried ones get the position at. A *rejection is about the event behind them.
	send(events []*event.Event, at event.Position) (int, error)
	// changed receives when answers has something new.
	changed() <-chan struct{}
	// answers returns how many events are acknowledged, the last of them with sequence number seq, and what went wrong: err, with
	// the event of that number, or with none that is known if that is 0. Those between acked and failed may or may not be in the stream.
	answers() (acked int, seq uint64, failed int, err error)
	// rest reports, once something went wrong, whether everything that was sent is answered, so that nothing of it can get into the stream any more;
	// and which events are in the stream although one before them is not.
	rest() (answered bool, stored map[int]bool)
	// end stops listening. Answers that come later are lost.
	end()
}

// pipelined is the way that every version of the server knows: each message by itself, without waiting for the one before it, and
// each naming its predecessor's sequence number; or, in a stream that others publish to as well, an id by which the stream knows it again.
type pipelined struct {
	*Sink
	composer composer
	// limit is how many messages may wait for their acknowledgment: fewer than the window holds when the server said that they
	// are too many.
	limit int
}

func newPipelined(s *Sink) *pipelined {
	return &pipelined{Sink: s, composer: composer{Sink: s, header: nats.Header{}}, limit: maxPending}
}

// begin subscribes to the answers of a new attempt. Those of earlier ones go to another inbox, so that none of them can be
// taken for an answer to this one.
func (w *pipelined) begin(base uint64) (attempt, error) {
	a := &pipeline{way: w, inbox: w.nc.NewRespInbox(), base: base, signal: make(chan struct{}, 1)}
	sub, err := w.nc.Subscribe(a.inbox+".*", a.answer)
	if err != nil {
		return nil, fmt.Errorf("subscribe to acknowledgments: %w", err)
	}
	if err := sub.SetPendingLimits(-1, -1); err != nil {
		return nil, fmt.Errorf("subscribe to acknowledgments: %w", err)
	}
	a.sub = sub
	return a, nil
}

// pipeline is an attempt at publishing in the pipelined way.
type pipeline struct {
	way   *pipelined
	sub   *nats.Subscription
	inbox string
	base  uint64
	sent  int
	// signal is filled when there is something new.
	signal chan struct{}

	mu    sync.Mutex
	acked int
	seq   uint64 // of the last one acknowledged
	// failed is the number of the message whose answer was err. A cluster's leader may refuse one before it acknowledges those
	// in front of it.
	failed int
	err    error
	// answered is how many messages are, and behind holds the numbers of those that were acknowledged after one had failed.
	answered int
	behind   map[int]bool
}

func (a *pipeline) send(events []*event.Event, at event.Position) (int, error) {
	acked, _, _, _ := a.answers()
	room := min(len(events), a.limit(acked)-(a.sent-acked))
	for i := range max(0, room) {
		if err := a.publish(events[i], at); err != nil {
			return i, err
		}
		a.sent++
	}
	return max(0, room), nil
}

// limit grows by one for 256 messages that are acknowledged, so that a server that was overrun is not overrun again at once, and is
// trusted again after some seconds of full speed.
func (a *pipeline) limit(acked int) int { return min(maxPending, a.way.limit+acked/256) }

func (a *pipeline) publish(e *event.Event, at event.Position) error {
	m, err := a.way.composer.compose(e, at)
	if err == nil {
		m.Reply = a.inbox + "." + strconv.Itoa(a.sent+1)
		if a.way.cfg.Exclusive {
			m.Header[jetstream.ExpectedLastSeqHeader] = []string{strconv.FormatUint(a.base+uint64(a.sent), 10)}
		} else {
			m.Header[jetstream.MsgIDHeader] = []string{messageID(e)}
		}
		if err := a.way.checkSize(e, m, a.way.composer.headers); err != nil {
			return err
		}
		err = a.way.nc.PublishMsg(m)
	}
	switch {
	case errors.Is(err, nats.ErrMaxPayload):
		return reject(e, reasonMaxPayload, fmt.Errorf("its %d bytes and its headers are more than the "+
			"server's max_payload of %d: raise it there and try again: %w", len(e.Payload), a.way.nc.MaxPayload(), err))
	case errors.Is(err, cloudevent.ErrFault), errors.Is(err, cloudevent.ErrHeader):
		reason, _ := cloudevent.Explain(err)
		return reject(e, reason, err)
	case err != nil:
		return fmt.Errorf("publish event %s: %w", e.ID, err)
	}
	return nil
}

// messageID is what a stream that others publish to as well knows a message by. The epoch keeps what is replayed from being taken for a duplicate. A
// retry is told from the event's first delivery, and by the epoch in which it was set aside from a retry of one that is replayed.
func messageID(e *event.Event) string {
	id := strconv.FormatUint(uint64(e.Position.Epoch), 10) + ":" + string(e.ID)
	if e.Origin == event.Retried {
		id = string(event.Retried) + ":" + id
	}
	return id
}

func (a *pipeline) changed() <-chan struct{} { return a.signal }

// answer takes one answer of the stream. It runs on the subscription's goroutine.
func (a *pipeline) answer(m *nats.Msg) {
	seq, err := parseAck(m)
	a.mu.Lock()
	defer a.mu.Unlock()
	a.answered++
	n, numErr := strconv.Atoi(strings.TrimPrefix(m.Subject[len(a.inbox):], "."))
	switch {
	case a.err != nil:
		if err == nil && numErr == nil && n > a.failed {
			if a.behind == nil {
				a.behind = map[int]bool{}
			}
			a.behind[n] = true
		}
	case err != nil:
		a.err, a.failed = err, n
	case numErr != nil:
		a.err = fmt.Errorf("acknowledgment on an unknown subject %q", m.Subject)
	case a.way.cfg.Exclusive && seq != a.base+uint64(n):
		a.err = fmt.Errorf("acknowledgment of sequence %d where %d was to be", seq, a.base+uint64(n))
	case n <= a.acked:
		return
	case n > a.acked+1:
		// A message vouches for none but itself: where the one before it is missing, a foreign one may stand in its place.
		a.err = fmt.Errorf("acknowledgment of message %d, sequence %d, without the one before it", n, seq)
	default:
		a.acked, a.seq = n, max(a.seq, seq) // that of a duplicate is an earlier one
	}
	select {
	case a.signal <- struct{}{}:
	default:
	}
}

func (a *pipeline) answers() (acked int, seq uint64, failed int, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.acked, a.seq, a.failed, a.err
}

func (a *pipeline) rest() (answered bool, stored map[int]bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.answered < a.sent {
		return false, nil
	}
	return true, maps.Clone(a.behind)
}

// minLimit is how many messages are worth sending to the busiest server.
const minLimit = 16

func (a *pipeline) end() {
	// On a connection that is lost the subscription is gone as well.
	_ = a.sub.Unsubscribe()
	acked, _, _, err := a.answers()
	a.way.limit = a.limit(acked)
	if isAPIError(err, codeTooManyRequests) {
		a.way.limit = max(minLimit, a.way.limit/2)
	}
}

// composer makes messages of events.
type composer struct {
	*Sink
	subject, scratch []byte
	header           nats.Header
	// headers is about how many bytes those of the last message take that have something of the event.
	headers int
}

// compose returns the message of an event, which is valid until the next one is composed. That of a retried event has the position at. A way of
// publishing adds headers of its own.
func (c *composer) compose(e *event.Event, at event.Position) (*nats.Msg, error) {
	if e.Origin == event.Retried {
		retried := *e
		retried.Position = at
		e = &retried
	}
	clear(c.header)
	c.headers = 2 * len(e.ID) // which may be in two more of them
	emit := func(name string, value []byte) {
		c.header[name] = append(c.header[name], string(value))
		c.headers += len(name) + len(value) + len(": \r\n")
	}
	c.header[jetstream.ExpectedStreamHeader] = []string{c.cfg.Stream}
	var err error
	if c.cfg.Raw {
		c.scratch, err = cloudevent.RawHeaders(e, c.scratch, emit)
		c.header[headerID] = []string{string(e.ID)}
	} else {
		c.scratch, err = c.envelope.Headers(e, c.scratch, emit)
	}
	if err != nil {
		return nil, err
	}
	c.subject = c.Sink.subject.append(c.subject[:0], e.Topic, e.Key)
	return &nats.Msg{Subject: string(c.subject), Header: c.header, Data: e.Payload}, nil
}
