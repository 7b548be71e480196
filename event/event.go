// Package event defines what travels through the bridge: events, their positions, and the batches that carry them.
package event

import "time"

// Origin says by which way an event came, where that is not the stream of the slot.
type Origin string

const (
	// Streamed events were decoded from the write-ahead log, in commit order.
	Streamed Origin = ""
	// Recovered events were read from the buffer table, in id order, because the slot did not hold them.
	Recovered Origin = "recovered"
	// Retried events were set aside in the dead letters when they came by.
	Retried Origin = "retry"
)

// Header is one of the headers that the producer gave to an event.
type Header struct {
	Name, Value []byte
}

// Event is one row of a buffer table, or one message, on its way to the sink. Its byte slices point into the [Batch] that
// carries it and are valid until that batch is released.
type Event struct {
	// Position orders the event. A recovered or retried event repeats the position of the event before it, or stands at the beginning of an epoch.
	Position Position
	// ID is the same in every delivery of this event.
	ID []byte
	// Topic is the CloudEvents type.
	Topic []byte
	// Key is the CloudEvents subject; nil means that there is none, which an empty key is not.
	Key []byte
	// Payload is passed on unchanged.
	Payload []byte
	// ContentType is the media type of Payload, or "" if it is not known.
	ContentType string
	// Headers are in the order in which the row had them.
	Headers []Header
	// Time is when the transaction committed, in UTC; of a recovered event, when its row was created.
	Time time.Time
	// Origin says whether the event came by another way than the slot.
	Origin Origin
	// Fault, unless it is "", says why the row makes no event: the rest is what there is of one, for the dead letters. A sink rejects it.
	Fault string
	// Replay is the number of the replay in which the event is delivered again, or 0.
	Replay int64
}

// Size returns the number of bytes that the event's content takes, for limits on what is in flight.
func (e *Event) Size() int {
	n := len(e.ID) + len(e.Topic) + len(e.Key) + len(e.Payload) + len(e.Fault)
	for _, h := range e.Headers {
		n += len(h.Name) + len(h.Value)
	}
	return n
}
