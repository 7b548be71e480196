package jetstream

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"ebb/event"
	"ebb/sink"
	"ebb/sink/cloudevent"
)

// Error codes with which a stream refuses a message. Source: server/errors.json of nats-server, processJetStreamMsgWithBatch and
// wouldExceedLimits there.
const (
	codeAccountLimits   = 10002 // of the account, or of its tier
	codeServerLimits    = 10023 // of the server
	codeMemory          = 10028
	codeStorage         = 10047
	codeWrongStream     = 10060 // Nats-Expected-Stream
	codeStoreFailed     = 10077 // the stream is full, with discard new
	codeSealed          = 10109
	codeNoLimits        = 10120 // the account has no JetStream for this number of replicas
	codeTooManyRequests = 10167
)

// Why events are rejected, for the dead letters.
const (
	reasonMaxPayload = "larger than max_payload"
	reasonMaxMsgSize = "larger than max_msg_size"
	reasonHeaders    = "headers too large"
)

// maxHeaders is how many bytes of headers a stream takes. Source: processJetStreamMsg in server/stream.go of nats-server.
const maxHeaders = 1<<16 - 1

// rejection is about an event that the stream can never hold.
type rejection struct {
	*sink.RejectedError
	reason string
	// sent says that it was the server which refused it.
	sent bool
}

func (r *rejection) Unwrap() error { return r.RejectedError }

// detail is what the reason leaves to say.
func (r *rejection) detail() string {
	_, detail := cloudevent.Explain(r.Err)
	return detail
}

func reject(e *event.Event, reason string, err error) *rejection {
	return &rejection{RejectedError: &sink.RejectedError{ID: string(e.ID), Position: e.Position, Err: err}, reason: reason}
}

func headersTooLarge(e *event.Event, err error) *rejection {
	return reject(e, reasonHeaders, fmt.Errorf("its headers, with topic and key, are more than the 65,535 bytes that JetStream takes: %w", err))
}

func messageTooLarge(e *event.Event, err error) *rejection {
	return reject(e, reasonMaxMsgSize, fmt.Errorf("it is larger than the stream's max_msg_size: raise that and try again: %w", err))
}

// checkSize rejects a message that the stream would refuse. A refusal comes when the messages behind it are on their way already, which name another
// predecessor than they do once it is set aside. The headers are about so many bytes.
func (s *Sink) checkSize(e *event.Event, m *nats.Msg, headers int) error {
	const others = 1 << 10 // the rest of the headers
	headers += others
	if headers <= maxHeaders && (s.maxMsgSize <= 0 || headers+len(m.Data) <= s.maxMsgSize) {
		return nil
	}
	headers = m.Size() - len(m.Subject) - len(m.Reply) - len(m.Data)
	switch {
	case headers > maxHeaders:
		return headersTooLarge(e, fmt.Errorf("they are %d bytes", headers))
	case s.maxMsgSize > 0 && headers+len(m.Data) > s.maxMsgSize:
		return messageTooLarge(e, fmt.Errorf("it is %d bytes with its headers, and that is %d", headers+len(m.Data), s.maxMsgSize))
	}
	return nil
}

// errGoneOn says that the stream holds messages that were not there when the attempt began.
var errGoneOn = errors.New("the stream has gone on without this bridge")

// explainTimeout is how long it may take to find out more about a refusal. What is not found out in time is not said.
const explainTimeout = time.Second

func isAPIError(err error, codes ...jetstream.ErrorCode) bool {
	var api *jetstream.APIError
	if !errors.As(err, &api) {
		return false
	}
	for _, code := range codes {
		if api.ErrorCode == code {
			return true
		}
	}
	return false
}

// explain adds to the refusal of a message of the attempt what an operator needs to know. It is permanent when waiting cannot mend
// it and every event before it is delivered.
func (p *publisher) explain(ctx context.Context, failed int, err error) error {
	index := failed - p.acked - 1
	if failed == 0 || index < 0 || index >= len(p.pending) {
		return fmt.Errorf("the stream gave an answer that was not expected: %w", err)
	}
	// The server may be going down, whose first sign can be that nobody listens any more.
	ctx, cancel := context.WithTimeout(ctx, explainTimeout)
	defer cancel()
	if index > 0 && (errors.Is(err, errNoResponders) || isAPIError(err, codeWrongStream, codeMessageTooLarge, codeHeadersTooLarge, codeSealed)) {
		return fmt.Errorf("the stream refused a message, and has yet to answer %d in front of it: %w", index, err)
	}
	e := p.pending[index]
	switch {
	case isAPIError(err, codeWrongSequence, codeWrongSequenceAny):
		return fmt.Errorf("%w: %w", errGoneOn, err)
	case errors.Is(err, errNoResponders), isAPIError(err, codeWrongStream):
		return p.listens(ctx, string(p.Sink.subject.append(nil, e.Topic, e.Key)))
	case isAPIError(err, codeMessageTooLarge):
		r := messageTooLarge(e, err)
		r.sent = true
		return r
	case isAPIError(err, codeHeadersTooLarge):
		r := headersTooLarge(e, err)
		r.sent = true
		return r
	case isAPIError(err, codeSealed):
		return backoff.Permanent(fmt.Errorf("the stream was sealed, which cannot be undone: %w: name another one (nats.stream): %w",
			ErrUnsuitable, err))
	case isAPIError(err, codeStoreFailed):
		return p.reached(ctx, err)
	}
	return fmt.Errorf("the stream refused a message: %w", advise(err))
}

// reached says which of its limits a stream has reached that refuses new messages (discard new). The server says so only in words.
func (s *Sink) reached(ctx context.Context, err error) error {
	stream, infoErr := s.js.Stream(ctx, s.cfg.Stream)
	if infoErr != nil {
		return fmt.Errorf("the stream refused a message: %w", err)
	}
	cfg, state := stream.CachedInfo().Config, stream.CachedInfo().State
	var limits []string
	switch {
	case cfg.MaxMsgs > 0 && state.Msgs >= uint64(cfg.MaxMsgs):
		limits = append(limits, fmt.Sprintf("max_msgs of %d", cfg.MaxMsgs))
	default:
		if cfg.MaxBytes > 0 {
			limits = append(limits, fmt.Sprintf("max_bytes of %d", cfg.MaxBytes))
		}
		if cfg.DiscardNewPerSubject {
			limits = append(limits, fmt.Sprintf("max_msgs_per_subject of %d", cfg.MaxMsgsPerSubject))
		}
	}
	if len(limits) == 0 {
		return fmt.Errorf("the stream could not store a message: %w", err)
	}
	return fmt.Errorf("the stream is full and refuses what is new (discard new): raise its %s, or delete messages that are not needed: %w",
		strings.Join(limits, " or its "), err)
}

// advise adds to an error of the JetStream API what can be done about it, where waiting alone may not help.
func advise(err error) error {
	var what string
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		what = "the stream's server did not answer within " + requestTimeout.String() + ": it may be busy, electing a leader or without JetStream"
	case errors.Is(err, nats.ErrNoResponders), errors.Is(err, jetstream.ErrJetStreamNotEnabled):
		what = "no server answers for JetStream: enable it in the server's configuration (jetstream {…}), or let the user publish to $JS.API.>"
	case errors.Is(err, jetstream.ErrJetStreamNotEnabledForAccount):
		what = "the account may not use JetStream: enable it for the account in the server's configuration"
	case isAPIError(err, codeServerLimits):
		what = "the server has no room: raise max_file_store (or max_memory_store) in its configuration, or delete what is not needed"
	case isAPIError(err, codeAccountLimits, codeMemory, codeStorage):
		what = "the account has no room: raise its JetStream limits, or the server's max_file_store, or delete what is not needed"
	case isAPIError(err, codeNoLimits):
		what = "the account has no JetStream limits for a stream of so many replicas: add them"
	case isAPIError(err, codeTooManyRequests):
		what = "more messages wait for the stream than the server lets it have (max_buffered_msgs, max_buffered_size in its configuration)"
	default:
		return err
	}
	return fmt.Errorf("%s: %w", what, err)
}
