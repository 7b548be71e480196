// Package sink defines where events are delivered.
package sink

import (
	"context"
	"errors"
	"fmt"
	"time"

	"ebb/event"
)

// Sink delivers events to one destination, in the order in which they are handed over.
//
// The bridge calls Resume and then Run, again and again, never two of them at once; a Run that ended, in whatever way, is
// followed by a Resume. Both wait, with backoff and a log line, for a destination that is not there yet or went away, and
// return an error only for what waiting cannot mend.
type Sink interface {
	// Resume returns what the end of the destination holds. It judges nothing: whether that fits what is known is the bridge's to
	// decide. The events up to it will not be handed to Run. A destination that cannot be asked answers with the later one of
	// what is known and what this process last delivered to it. One that is missing is made, if it is ebb's to make and nothing was
	// known to be in it.
	Resume(ctx context.Context, known Known) (Tail, error)

	// Run delivers the batches from in, in order. It calls out.Delivered as soon as the destination has said so, from
	// one goroutine, and releases each batch when it no longer needs it. Back-pressure is not receiving from in.
	//
	// When in is closed, Run delivers what it has and returns nil. When ctx ends it returns the context's error at once; what
	// was in flight then may or may not have been delivered. Where nothing is parked, a *RejectedError says that one event cannot be
	// delivered: everything before it has been, and out.Delivered was called for it.
	Run(ctx context.Context, in <-chan *event.Batch, out Outcome) error

	// Close frees what Resume and Run opened.
	Close() error
}

// Source names whose events a destination holds.
type Source struct {
	// SystemIdentifier, Database and Slot name the log that positions are about.
	SystemIdentifier, Database, Slot string
	// Buffer tells the buffer table from another one of the same name, which was torn down and whose ids began at 1 as well.
	Buffer string
}

// String returns what an operator needs to tell sources apart, for messages and for comparing.
func (s Source) String() string {
	return fmt.Sprintf("cluster %s, database %s, slot %s, buffer %s", s.SystemIdentifier, s.Database, s.Slot, s.Buffer)
}

// Known is what the database knows of the destination.
type Known struct {
	// Source is recorded in a destination that is made.
	Source Source
	// Position and Sequence are those of the newest event that was recorded as delivered. They may be zero.
	Position event.Position
	Sequence uint64
	// Audit asks that every message behind Sequence be looked at: where somebody else's has taken the place of an event, or where events were
	// retried, the numbers alone do not tell.
	Audit bool
}

// Tail is the end of what a destination holds. Of a destination that does not number what it stores, Position alone is set.
type Tail struct {
	// Position, Sequence, Origin and ID are those of the last message that came from a bridge and is still there. ID is "" when that message is
	// a recovered or a retried event, whose position is another's.
	Position event.Position
	Sequence uint64
	Origin   event.Origin
	ID       string
	// Last is the sequence number of the last message that was ever stored, from whomever.
	Last uint64
	// Holds is the sequence number up to which the destination holds what it has acknowledged: Last, unless messages of others stand where
	// the newest event was that is known.
	Holds uint64
	// Exclusive says that nobody else is to store messages there, so that sequence numbers count events.
	Exclusive bool
	// Removed is how many messages behind Sequence, and behind what is known, are there no more. In an exclusive destination they were
	// the bridge's.
	Removed uint64
	// Foreign is how many messages of others were found behind what is known and before Sequence, Retried how many retried events up to it, and
	// Missing how many of the messages between are there no more. Retried and Missing are known if Known.Audit
	// asked for them.
	Foreign, Retried, Missing uint64
	// Source is what the destination was made for; zero if nobody has recorded that.
	Source Source
}

// Outcome is who is told what comes of the events of a Run.
type Outcome struct {
	Delivered Delivered
	// Dead, unless nil, keeps what is not delivered.
	Dead DeadLetters
	// Block says that nothing is parked for what its destination says or does not say, although what is parked already is asked for.
	Block bool
}

// Parks reports whether an event that cannot be delivered is parked.
func (o *Outcome) Parks() bool { return o.Dead != nil && !o.Block }

// Delivered is told what has been delivered since it was last called.
type Delivered func(Progress)

// Progress says that the next events handed to Run are delivered, as all before them are. One that the dead letters keep counts as delivered.
type Progress struct {
	// Events is how many they are.
	Events int
	// Position is that of the last one. Where the destination remembers positions, it is that of the last one which it stores.
	Position event.Position
	// Sequence is where the destination stores that, or 0 if it does not number what it stores.
	Sequence uint64
}

// Scanner is a sink that remembers, and can say which events it holds, so that a recovery from the buffer table delivers none of
// them twice. Such a sink may also forget, as a broker does whose disk lost what it had acknowledged.
type Scanner interface {
	// Scan calls fn with every event that the destination holds behind sequence number after, in order. What fn is given is valid during
	// the call. An error of fn ends the scan.
	Scan(ctx context.Context, after uint64, fn func(Stored) error) error
}

// Stored is an event that a destination holds.
type Stored struct {
	Sequence uint64
	Position event.Position
	// Origin is that of the event.
	Origin  event.Origin
	ID      []byte
	Payload []byte
	// Time is that of the event: of its commit, or of its row when it was recovered. It is zero if the destination does not keep it.
	Time time.Time
}

// ErrChanged is wrapped by the error with which a Run ends when the destination is not what it had been left as: it has forgotten what it
// acknowledged, or has removed messages before they could be compared. Resume says what it is now.
var ErrChanged = errors.New("the destination has changed")

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
