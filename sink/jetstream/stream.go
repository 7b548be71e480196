package jetstream

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

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
	// ErrGap says that the stream no longer holds what it acknowledged.
	ErrGap = errors.New("gap in the stream: restore it, or name another one (nats.stream) to go on with what follows")
	// ErrForeign says that somebody else publishes to the stream, or that it belongs to another source.
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

// checkStream finds the stream or creates it, and refuses one that would not keep what it is sent.
func (s *Sink) checkStream(ctx context.Context, known sink.Known) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	stream, err := s.js.Stream(ctx, s.cfg.Stream)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		if !s.cfg.CreateStream {
			return fmt.Errorf("it does not exist and nats.create_stream is false: create it, or let ebb do so: %w", err)
		}
		if had := max(known.Sequence, s.last.seq); had > 0 {
			return backoff.Permanent(fmt.Errorf("it does not exist, but had acknowledged sequence %d (%w)", had, ErrGap))
		}
		return s.createStream(ctx, known)
	}
	if err != nil {
		return fmt.Errorf("read its settings: %w", err)
	}
	return s.checkSettings(stream.CachedInfo().Config, known)
}

func (s *Sink) createStream(ctx context.Context, known sink.Known) error {
	_, err := s.js.CreateStream(ctx, jetstream.StreamConfig{
		Name:        s.cfg.Stream,
		Description: "events of " + s.cfg.Source + ", delivered by ebb",
		Subjects:    []string{s.subject.wildcard()},
		Storage:     jetstream.FileStorage,
		Replicas:    max(1, s.cfg.Replicas),
		AllowDirect: true,
		Metadata:    metadata(known),
	})
	if err != nil {
		err = fmt.Errorf("create it: %w", err)
		var api *jetstream.APIError
		if errors.As(err, &api) && (api.Code == 400 || api.ErrorCode == codeNoReplicas || api.ErrorCode == codeInvalidConfig) {
			return backoff.Permanent(err)
		}
		return err
	}
	s.log.Info("created the stream", "stream", s.cfg.Stream, "subjects", s.subject.wildcard(), "replicas", max(1, s.cfg.Replicas))
	return nil
}

func metadata(known sink.Known) map[string]string {
	return map[string]string{
		metaSystem: known.SystemIdentifier, metaDatabase: known.Database, metaSlot: known.Slot, metaBuffer: known.Buffer,
	}
}

func (s *Sink) checkSettings(cfg jetstream.StreamConfig, known sink.Known) error {
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
	for key, want := range metadata(known) {
		if have, ok := cfg.Metadata[key]; ok && have != want {
			return backoff.Permanent(fmt.Errorf("it belongs to %s %s and not to %s: %w: name another stream (nats.stream)", key, have, want, ErrForeign))
		}
	}
	if s.known {
		return nil // said once
	}
	if cfg.Retention == jetstream.InterestPolicy {
		s.log.Warn("the stream drops messages that no consumer wants (retention interest)", "stream", s.cfg.Stream)
	}
	if cfg.Discard == jetstream.DiscardOld && (cfg.MaxMsgs > 0 || cfg.MaxBytes > 0 || cfg.MaxMsgsPerSubject > 0) {
		s.log.Warn("the stream drops its oldest messages when it is full (discard old)", "stream", s.cfg.Stream,
			"max_msgs", cfg.MaxMsgs, "max_bytes", cfg.MaxBytes, "max_msgs_per_subject", cfg.MaxMsgsPerSubject)
	}
	return nil
}

// tail reads the stream's last message, from its leader: a replica that answers a direct get may be behind. It is not found
// when the stream has deleted it, by its own limits or on request; the sequence number is known even so. An empty stream
// that never held a message counts as found.
func (s *Sink) tail(ctx context.Context) (_ message, found bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	stream, err := s.js.Stream(ctx, s.cfg.Stream)
	if err != nil {
		return message{}, false, fmt.Errorf("read its state: %w", err)
	}
	seq := stream.CachedInfo().State.LastSeq
	if seq == 0 {
		return message{}, true, nil
	}
	m, err := s.message(ctx, seq)
	var api *jetstream.APIError
	if errors.As(err, &api) && api.ErrorCode == codeNoMessage {
		return message{seq: seq}, false, nil
	}
	return m, err == nil, err
}

// message reads what identifies one message of the stream.
func (s *Sink) message(ctx context.Context, seq uint64) (message, error) {
	request, err := json.Marshal(map[string]uint64{"seq": seq})
	if err != nil {
		return message{}, fmt.Errorf("read message %d: %w", seq, err)
	}
	reply, err := s.nc.RequestWithContext(ctx, "$JS.API.STREAM.MSG.GET."+s.cfg.Stream, request)
	if err != nil {
		return message{}, fmt.Errorf("read message %d: %w", seq, err)
	}
	var body struct {
		Error   *jetstream.APIError `json:"error"`
		Message struct {
			Seq     uint64 `json:"seq"`
			Headers []byte `json:"hdrs"`
		} `json:"message"`
	}
	if err := json.Unmarshal(reply.Data, &body); err != nil {
		return message{}, fmt.Errorf("read message %d: %w", seq, err)
	}
	if body.Error != nil {
		return message{}, fmt.Errorf("read message %d: %w", seq, body.Error)
	}
	m := message{seq: seq}
	if len(body.Message.Headers) > 0 {
		headers, err := nats.DecodeHeadersMsg(body.Message.Headers)
		if err != nil {
			return message{}, fmt.Errorf("read message %d: %w", seq, err)
		}
		m.id, m.recovered = idOf(headers), headers.Get(cloudevent.HeaderOrigin) != ""
		if text := headers.Get(cloudevent.HeaderPosition); text != "" {
			if m.position, err = event.ParsePosition(text); err == nil {
				return m, nil
			}
		}
	}
	return message{}, backoff.Permanent(fmt.Errorf("message %d has no position: %w: somebody else publishes to it; "+
		"give ebb a stream of its own, or restrict who may publish", seq, ErrForeign))
}

func idOf(headers nats.Header) string {
	if id := headers.Get(headerID); id != "" {
		return id
	}
	return string(cloudevent.AppendDecoded(nil, headers.Get("ce-id")))
}

// ScanIDs calls fn with the id of every message behind a sequence number.
func (s *Sink) ScanIDs(ctx context.Context, after uint64, fn func(id []byte)) error {
	last := s.last.seq
	if after >= last {
		return nil
	}
	consumer, err := s.js.OrderedConsumer(ctx, s.cfg.Stream, jetstream.OrderedConsumerConfig{
		DeliverPolicy: jetstream.DeliverByStartSequencePolicy,
		OptStartSeq:   after + 1,
	})
	if err != nil {
		return fmt.Errorf("scan stream %q: %w", s.cfg.Stream, err)
	}
	if info := consumer.CachedInfo(); info != nil && info.NumPending == 0 && info.Delivered.Consumer == 0 {
		return nil // the stream has deleted them all
	}
	messages, err := consumer.Messages()
	if err != nil {
		return fmt.Errorf("scan stream %q: %w", s.cfg.Stream, err)
	}
	defer messages.Stop()
	defer context.AfterFunc(ctx, messages.Stop)()
	for {
		m, err := messages.Next(jetstream.NextMaxWait(scanTimeout))
		if err != nil {
			return fmt.Errorf("scan stream %q: %w", s.cfg.Stream, err)
		}
		meta, err := m.Metadata()
		if err != nil {
			return fmt.Errorf("scan stream %q: %w", s.cfg.Stream, err)
		}
		fn([]byte(idOf(m.Headers())))
		if meta.Sequence.Stream >= last || meta.NumPending == 0 {
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
