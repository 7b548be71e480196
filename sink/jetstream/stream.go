package jetstream

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"ebb/event"
	"ebb/sink"
	"ebb/sink/cloudevent"
)

// Metadata by which a stream is bound to the one slot whose positions it holds.
const (
	metaSystem   = "ebb-system-identifier"
	metaDatabase = "ebb-database"
	metaSlot     = "ebb-slot"
	metaBuffer   = "ebb-buffer"
)

// headerID names the event in a stream of format raw, where the CloudEvents header is missing.
const headerID = "Ebb-Id"

var (
	// ErrForeign says that somebody else publishes to the stream.
	ErrForeign = errors.New("the stream is not this bridge's")
	// ErrUnsuitable says that the stream's settings do not let it keep what it is sent.
	ErrUnsuitable = errors.New("the stream's settings do not suit")
)

// Error codes of the JetStream API. Source: server/errors.json of nats-server.
const (
	codeMessageTooLarge  = 10054
	codeHeadersTooLarge  = 10097
	codeInvalidConfig    = 10052
	codeNoMessage        = 10037
	codeNoReplicas       = 10074 // on a server that is not clustered
	codeWrongSequence    = 10071
	codeWrongSequenceAny = 10164
)

// findStream finds the stream or creates it, and refuses one that would not keep what it is sent. It is nil when the stream is missing
// and was known to hold something: before it is made again, somebody has to know where from its content comes.
func (s *Sink) findStream(ctx context.Context, known sink.Known) (*jetstream.StreamInfo, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	stream, err := s.js.Stream(ctx, s.cfg.Stream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		if !s.cfg.CreateStream {
			return nil, fmt.Errorf("it does not exist and nats.create_stream is false: create it, or let ebb do so: %w", err)
		}
		if known.Sequence > 0 {
			return nil, nil
		}
		stream, err = s.createStream(ctx, known.Source)
	}
	if err != nil {
		return nil, fmt.Errorf("read its settings: %w", err)
	}
	info := stream.CachedInfo()
	return info, s.checkSettings(info.Config)
}

func (s *Sink) createStream(ctx context.Context, source sink.Source) (jetstream.Stream, error) {
	stream, err := s.js.CreateStream(ctx, jetstream.StreamConfig{
		Name:        s.cfg.Stream,
		Description: "events of " + s.cfg.Source + ", delivered by ebb",
		Subjects:    []string{s.subject.wildcard()},
		Storage:     jetstream.FileStorage,
		Replicas:    max(1, s.cfg.Replicas),
		AllowDirect: true,
		Metadata:    metadata(source),
	})
	if err != nil {
		err = fmt.Errorf("create it: %w", err)
		var api *jetstream.APIError
		if errors.As(err, &api) && (api.Code == 400 || api.ErrorCode == codeNoReplicas || api.ErrorCode == codeInvalidConfig) {
			return nil, backoff.Permanent(err)
		}
		return nil, err
	}
	s.log.Info("created the stream", "stream", s.cfg.Stream, "subjects", s.subject.wildcard(), "replicas", max(1, s.cfg.Replicas))
	return stream, nil
}

func metadata(source sink.Source) map[string]string {
	return map[string]string{
		metaSystem: source.SystemIdentifier, metaDatabase: source.Database, metaSlot: source.Slot, metaBuffer: source.Buffer,
	}
}

func sourceOf(metadata map[string]string) sink.Source {
	return sink.Source{SystemIdentifier: metadata[metaSystem], Database: metadata[metaDatabase], Slot: metadata[metaSlot],
		Buffer: metadata[metaBuffer]}
}

func (s *Sink) checkSettings(cfg jetstream.StreamConfig) error {
	unsuitable := func(what string) error {
		return backoff.Permanent(fmt.Errorf("it %s: %w: use another stream or change it", what, ErrUnsuitable))
	}
	switch {
	case cfg.NoAck:
		return unsuitable("acknowledges nothing (no_ack)")
	case cfg.Sealed:
		return unsuitable("is sealed")
	case cfg.Mirror != nil:
		return unsuitable("is a mirror")
	case len(cfg.Sources) > 0:
		return unsuitable("takes in messages of other streams (sources)")
	case cfg.Retention == jetstream.WorkQueuePolicy:
		return unsuitable("deletes what is consumed (retention workqueue)")
	}
	if s.warned {
		return nil
	}
	s.warned = true
	if cfg.Retention == jetstream.InterestPolicy {
		s.log.Warn("the stream drops messages that no consumer wants (retention interest)", "stream", s.cfg.Stream)
	}
	if cfg.Discard == jetstream.DiscardOld && (cfg.MaxMsgs > 0 || cfg.MaxBytes > 0 || cfg.MaxMsgsPerSubject > 0) {
		s.log.Warn("the stream drops its oldest messages when it is full (discard old)", "stream", s.cfg.Stream,
			"max_msgs", cfg.MaxMsgs, "max_bytes", cfg.MaxBytes, "max_msgs_per_subject", cfg.MaxMsgsPerSubject)
	}
	return nil
}

// tail says what the end of the stream holds, given its last sequence number. What is asked of the stream is answered by its leader:
// a replica that answers a direct get may be behind.
func (s *Sink) tail(ctx context.Context, last uint64, known sink.Known) (sink.Tail, error) {
	t := sink.Tail{Last: last, Holds: last, Exclusive: s.cfg.Exclusive}
	if last == 0 {
		return t, nil
	}
	if known.Sequence > 0 && known.Sequence <= last {
		m, err := s.peek(ctx, known.Sequence)
		if err != nil {
			return sink.Tail{}, err
		}
		if m.kind == foreign { // the stream has forgotten, and others have gone on
			if err := s.scan(ctx, 0, known.Sequence, func(m message, _ []byte) error {
				if !m.foreign {
					t.Position, t.Sequence, t.ID, t.Origin = m.position, m.seq, m.streamedID(), m.origin
				}
				return nil
			}); err != nil {
				return sink.Tail{}, err
			}
			// In a stream of its own the bridge may have recorded the number of a foreign message that it stepped over.
			if !s.cfg.Exclusive || t.Position.Compare(known.Position) < 0 {
				t.Holds = t.Sequence
				return t, nil
			}
			t.Position, t.Sequence, t.ID, t.Origin = event.Position{}, 0, "", event.Streamed
		}
	}
	m, err := s.peek(ctx, last)
	switch {
	case err != nil:
		return sink.Tail{}, err
	case m.kind == ours && !known.Audit && s.cfg.Exclusive:
		t.Position, t.Sequence, t.ID, t.Origin = m.position, m.seq, m.streamedID(), m.origin
		return t, nil
	}
	after := known.Sequence
	if last < after {
		after = 0 // the stream has forgotten what is known, and is to be gone on with from wherever it ends
	}
	behind := uint64(0) // messages of others behind the last one of ours
	there := uint64(0)
	if err := s.scan(ctx, after, last, func(m message, _ []byte) error {
		there++
		if m.foreign {
			behind++
			return nil
		}
		t.Position, t.Sequence, t.ID, t.Origin = m.position, m.seq, m.streamedID(), m.origin
		t.Foreign, behind = t.Foreign+behind, 0
		t.Missing = m.seq - after - there
		if m.origin == event.Retried {
			t.Retried++
		}
		return nil
	}); err != nil {
		return sink.Tail{}, err
	}
	if base := max(t.Sequence, known.Sequence); s.cfg.Exclusive && last > base+behind {
		t.Removed = last - base - behind
	}
	return t, nil
}

// streamedID is the id of the event at the message's position, or "".
func (m message) streamedID() string {
	if m.origin != event.Streamed {
		return ""
	}
	return m.id
}

// lastStored returns the sequence number of the last message that the stream has not deleted, or 0.
func (s *Sink) lastStored(ctx context.Context) (uint64, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	stream, err := s.js.Stream(ctx, s.cfg.Stream)
	if err != nil {
		return 0, err
	}
	state := stream.CachedInfo().State
	if state.Msgs == 0 {
		return 0, nil
	}
	if _, err := s.get(ctx, state.LastSeq); !isAPIError(err, codeNoMessage) {
		return state.LastSeq, err
	}
	info, err := stream.Info(ctx, jetstream.WithDeletedDetails(true))
	if err != nil {
		return 0, err
	}
	last := info.State.LastSeq
	for _, deleted := range slices.Backward(info.State.Deleted) {
		if deleted != last {
			break
		}
		last--
	}
	return last, nil
}

type storedMessage struct {
	Headers []byte `json:"hdrs"`
}

// get asks the stream's leader for a message: a replica that answers a direct get may be behind.
func (s *Sink) get(ctx context.Context, seq uint64) (storedMessage, error) {
	reply, err := s.nc.RequestWithContext(ctx, "$JS.API.STREAM.MSG.GET."+s.cfg.Stream, fmt.Appendf(nil, `{"seq":%d}`, seq))
	if err != nil {
		return storedMessage{}, err
	}
	var body struct {
		Error   *jetstream.APIError `json:"error"`
		Message storedMessage       `json:"message"`
	}
	if err := json.Unmarshal(reply.Data, &body); err != nil {
		return storedMessage{}, err
	}
	if body.Error != nil {
		return storedMessage{}, body.Error
	}
	return body.Message, nil
}

// message reads what identifies one message of the stream.
func (s *Sink) message(ctx context.Context, seq uint64) (message, error) {
	stored, err := s.get(ctx, seq)
	if err != nil {
		return message{}, fmt.Errorf("read message %d: %w", seq, err)
	}
	var headers nats.Header
	if len(stored.Headers) > 0 {
		if headers, err = nats.DecodeHeadersMsg(stored.Headers); err != nil {
			return message{}, fmt.Errorf("read message %d: %w", seq, err)
		}
	}
	m := identify(seq, headers)
	if m.foreign {
		return m, backoff.Permanent(fmt.Errorf("message %d has no position: %w: somebody else publishes to it; "+
			"restrict who may publish, or set nats.exclusive: false", seq, ErrForeign))
	}
	return m, nil
}

// identify reads what identifies a message. One without a position that can be read did not come from a bridge.
func identify(seq uint64, headers nats.Header) message {
	m := message{seq: seq, id: idOf(headers), origin: event.Origin(headers.Get(cloudevent.HeaderOrigin))}
	var err error
	m.position, err = event.ParsePosition(headers.Get(cloudevent.HeaderPosition))
	m.foreign = err != nil
	if at := headers.Get("ce-time"); at != "" {
		// One that cannot be read is not ebb's, and as good as none.
		m.time, _ = time.Parse(time.RFC3339Nano, at)
	}
	return m
}

func idOf(headers nats.Header) string {
	if id := headers.Get(headerID); id != "" {
		return id
	}
	return string(cloudevent.AppendDecoded(nil, headers.Get("ce-id")))
}

// Scan calls fn with every event that the stream holds behind a sequence number.
func (s *Sink) Scan(ctx context.Context, after uint64, fn func(sink.Stored) error) error {
	return s.scan(ctx, after, s.end, func(m message, data []byte) error {
		if m.foreign {
			return nil
		}
		return fn(sink.Stored{Sequence: m.seq, Position: m.position, Origin: m.origin, ID: []byte(m.id), Payload: data, Time: m.time})
	})
}

// scan calls fn with every message that the stream holds behind sequence number after, up to last. It does not ask for the headers
// alone: a message without content that has a producer's header "Status" is taken for the end of the scan.
func (s *Sink) scan(ctx context.Context, after, last uint64, fn func(message, []byte) error) error {
	if after >= last {
		return nil
	}
	scanning := func(err error) error { return fmt.Errorf("scan stream %q: %w", s.cfg.Stream, err) }
	// How far to read is not taken from the consumer, which may be on a replica that is behind.
	newest, err := s.lastStored(ctx)
	if err != nil {
		return scanning(err)
	}
	if newest <= after {
		return nil // the stream has deleted them all
	}
	consumer, err := s.js.OrderedConsumer(ctx, s.cfg.Stream, jetstream.OrderedConsumerConfig{
		DeliverPolicy: jetstream.DeliverByStartSequencePolicy,
		OptStartSeq:   after + 1,
	})
	if err != nil {
		return scanning(err)
	}
	messages, err := consumer.Messages()
	if err != nil {
		return scanning(err)
	}
	defer messages.Stop()
	defer context.AfterFunc(ctx, messages.Stop)()
	for {
		m, err := messages.Next(jetstream.NextMaxWait(scanTimeout))
		if err != nil {
			return errors.Join(ctx.Err(), scanning(err))
		}
		meta, err := m.Metadata()
		if err != nil {
			return scanning(err)
		}
		if meta.Sequence.Stream > last {
			return nil
		}
		if err := fn(identify(meta.Sequence.Stream, m.Headers()), m.Data()); err != nil {
			return err
		}
		if meta.Sequence.Stream == last || meta.Sequence.Stream >= newest {
			return nil
		}
	}
}

// listens says which subjects the stream has, for an error about one that nobody listens on.
func (s *Sink) listens(ctx context.Context, subject string) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	stream, err := s.js.Stream(ctx, s.cfg.Stream)
	if err != nil {
		return fmt.Errorf("nobody listens on subject %q: %w", subject, err)
	}
	subjects := stream.CachedInfo().Config.Subjects
	if slices.ContainsFunc(subjects, func(filter string) bool { return matches(filter, subject) }) {
		return fmt.Errorf("nobody listens on subject %q", subject)
	}
	return backoff.Permanent(fmt.Errorf("subject %q is not among the subjects of the stream (%s): %w: mend nats.subject or the stream",
		subject, strings.Join(subjects, ", "), ErrUnsuitable))
}

// matches reports whether a subject filter matches a subject.
func matches(filter, subject string) bool {
	f, s := strings.Split(filter, "."), strings.Split(subject, ".")
	for i, token := range f {
		if token == ">" {
			return len(s) > i
		}
		if i >= len(s) || token != "*" && token != s[i] {
			return false
		}
	}
	return len(f) == len(s)
}

// acknowledgment is the answer of a stream to one message.
type acknowledgment struct {
	Seq   uint64              `json:"seq"`
	Error *jetstream.APIError `json:"error"`
}

var errNoResponders = errors.New("nobody listens")

// parseAck reads the answer to a published message. It is on the hot path: the usual form is read without a JSON parser.
func parseAck(m *nats.Msg) (uint64, error) {
	if len(m.Data) == 0 && m.Header.Get("Status") == "503" {
		return 0, errNoResponders
	}
	if _, rest, ok := bytes.Cut(m.Data, []byte(`,"seq":`)); ok && !bytes.Contains(m.Data, []byte(`"error"`)) {
		var seq uint64
		digits := 0
		for _, c := range rest {
			if c < '0' || c > '9' || digits > 18 {
				break
			}
			seq, digits = seq*10+uint64(c-'0'), digits+1
		}
		if digits > 0 && digits <= 18 {
			return seq, nil
		}
	}
	var ack acknowledgment
	if err := json.Unmarshal(m.Data, &ack); err != nil {
		return 0, fmt.Errorf("read an acknowledgment: %w", err)
	}
	if ack.Error != nil {
		return 0, ack.Error
	}
	return ack.Seq, nil
}
