package sink

import (
	"time"

	"ebb/event"
)

// DeadLetters keeps events that a Run does not deliver, so that others can go on. The methods do not wait, and are called from one goroutine
// of a Run. What cannot be kept ends the Run's context; nothing that waits is called then.
type DeadLetters interface {
	// Queue reports whether an event must not be delivered now, as earlier ones of its key are kept, or as it was delivered from there
	// already, or discarded. It is kept then as well, behind them, and kept is called, from another goroutine, once that is committed.
	Queue(e *event.Event, kept func()) bool
	// Park keeps letters, which are of one key and in order, and from then on all later ones of that key, for which Queue is asked. An event without
	// a key is kept alone. kept is called, from another goroutine, once they are committed.
	Park(letters []Letter, kept func())
	// Retries gives what is to be delivered out of turn. A Run that is to end, because its batches have, need not take any more.
	Retries() <-chan *Retry
}

// Letter is an event that is not delivered, and why.
type Letter struct {
	// Event is copied.
	Event *event.Event
	// Reason is the same for what is the same to an operator; Detail is what the destination said, or what can be done.
	Reason, Detail string
	// Attempts is how often it was sent, for the first time at FirstAt and for the last time at LastAt. Of one that never was, the times are
	// zero.
	Attempts        int
	FirstAt, LastAt time.Time
	// Retry asks for it to be delivered as soon as that is possible, as it was not rejected. Otherwise an operator has to.
	Retry bool
}

// Queued is the reason of a letter that is kept because of those before it.
const Queued = "queued"

// Retry are kept events of one key, in order, or one without a key, which are to be delivered. No others of the key are under way.
type Retry struct {
	// Batch has events of origin [event.Retried]. It has no marks. Run releases it. Where positions are stored, those of the events give way to that
	// of the event before them.
	Batch *event.Batch
	// Done is called once: the first n events are delivered, the last of them at sequence number seq, if the destination numbers what it
	// stores. Unless failure is nil, it is why the next one is not. Those behind that are not sent. Where there is no failure, what is left is handed
	// over again. Done does not wait.
	Done func(n int, seq uint64, failure *Failure)
}

// Failure is why a kept event was not delivered once more.
type Failure struct {
	// Rejected says that it is pointless to try again.
	Rejected       bool
	Reason, Detail string
	// Attempts is how often it was sent.
	Attempts int
	// After is how long the receiver wants to be left alone, or 0.
	After time.Duration
}
