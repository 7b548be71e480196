// Package sink defines where events are delivered.
package sink

import (
	"context"
	"fmt"

	"ebb/event"
)

// Sink delivers events to one destination, in the order in which they are handed over.
//
// The bridge calls Resume and then Run, again and again, never two of them at once; a Run that ended, in whatever way, is
// followed by a Resume. Both wait, with backoff and a log line, for a destination that is not there yet or went away, and
// return an error only for what waiting cannot mend.
type Sink interface {
	// Resume returns the last event that the destination holds, or the zero Tail when it holds none. The events up to it
	// will not be handed to Run. A destination that cannot be asked answers with the later one of what is known and what
	// this process last delivered to it.
	Resume(ctx context.Context, known Known) (Tail, error)

	// Run delivers the batches from in, in order. It calls delivered as soon as the destination has said so, from
	// one goroutine, and releases each batch when it no longer needs it. Back-pressure is not receiving from in.
	//
	// When in is closed, Run delivers what it has and returns nil. When ctx ends it returns the context's error at once; what
	// was in flight then may or may not have been delivered. A *RejectedError says that one event cannot be delivered:
	// everything before it has been, and delivered was called for it.
	Run(ctx context.Context, in <-chan *event.Batch, delivered Delivered) error

	// Close frees what Resume and Run opened.
	Close() error
}

// Known is what the database knows of the destination, and who it is that delivers.
type Known struct {
	// SystemIdentifier, Database and Slot name the source whose positions the destination is given.
	SystemIdentifier, Database, Slot string
	// Buffer tells the buffer table from another one of the same name, which was torn down and whose ids began at 1 as well.
	Buffer string
	// Position and Sequence are those of the newest event that was recorded as delivered. They may be zero.
	Position event.Position
	Sequence uint64
}

// Tail is the last event that a destination holds.
type Tail struct {
	Position event.Position
	// Sequence is where the destination stores it, or 0 if it does not number what it stores.
	Sequence uint64
	// ID is that of the event at Position, or "" if the destination does not tell, or ends with a recovered event, whose position is
	// another's.
	ID string
}

// Delivered is told what has been delivered since it was last called.
type Delivered func(Progress)

// Progress says that the next events handed to Run are delivered, as all before them are.
type Progress struct {
	// Events is how many they are.
	Events int
	// Position is that of the last one.
	Position event.Position
	// Sequence is where the destination stores the last one, or 0 if it does not number what it stores.
	Sequence uint64
}

// IDScanner is a sink that remembers, and can say which events it holds, so that a recovery from the buffer table delivers none of
// them twice. Such a sink may also forget, as a broker does whose disk lost what it had acknowledged.
type IDScanner interface {
	// ScanIDs calls fn with the id of every event that the destination holds behind sequence number after. The
	// slice is valid during the call.
	ScanIDs(ctx context.Context, after uint64, fn func(id []byte)) error
}

// RejectedError says that a sink can never deliver an event.
type RejectedError struct {
	// ID and Position name the event.
	ID       string
	Position event.Position
	// Err is the reason, and says what can be done.
	Err error
}

func (e *RejectedError) Error() string {
	return fmt.Sprintf("event %s at %s cannot be delivered: %v", e.ID, e.Position, e.Err)
}

func (e *RejectedError) Unwrap() error { return e.Err }
