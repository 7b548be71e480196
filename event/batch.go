package event

import (
	"encoding/binary"
	"sync"
)

// Mark says: once the first Events events of the batch and all of the batches before it are delivered, everything in the log
// before First is, and so is everything before Last, as no event stands between. It stands for the end of a transaction or for a
// keepalive, and for those that follow without an event.
type Mark struct {
	Events      int
	First, Last LSN
}

// Row names a row of a table in which delivery is recorded by a mark or by its absence: once the first Events events of the batch and all of
// the batches before it are delivered, that of the row is.
type Row struct {
	Events int
	// Table is the number of its table among those of the decoder.
	Table int
	// XID is the id of its transaction, without the epoch. The row may be decoded before a query sees it.
	XID uint32
	// Key is the text of the columns that tell the row from the others of its table, as [AppendKey] joins them.
	Key []byte
}

// AppendKey appends the text of one column of a key.
func AppendKey(key, column []byte) []byte {
	key = binary.AppendUvarint(key, uint64(len(column)))
	return append(key, column...)
}

// SplitKey takes the text of the first column off a key.
func SplitKey(key []byte) (column, rest []byte) {
	n, size := binary.Uvarint(key)
	return key[size : size+int(n)], key[size+int(n):]
}

// Batch is a run of events in order, together with the memory that they point into. A batch may begin and end anywhere in a
// transaction. It is used by one goroutine at a time, and handed on.
type Batch struct {
	Events []Event
	// Marks are in order of Events and LSN.
	Marks []Mark
	// Rows are in order of Events. Those of events that were left out, as the destination holds them already, are among them.
	Rows []Row

	headers []Header
	arena   []byte
	size    int
}

// maxPooledArena keeps a batch that carried one giant payload from holding its memory for ever.
const maxPooledArena = 4 << 20

var batches = sync.Pool{New: func() any { return new(Batch) }}

// NewBatch returns an empty batch, which may bring memory from one that was released.
func NewBatch() *Batch { return batches.Get().(*Batch) }

// Release gives the batch's memory to a later [NewBatch]. Neither b nor any event that it carried may be used afterwards.
func (b *Batch) Release() {
	if cap(b.arena) > maxPooledArena {
		return
	}
	b.Reset()
	batches.Put(b)
}

// Reset empties b and keeps its memory.
func (b *Batch) Reset() {
	clear(b.Events)
	clear(b.headers)
	clear(b.Rows)
	b.Events, b.Marks, b.Rows, b.headers, b.arena, b.size = b.Events[:0], b.Marks[:0], b.Rows[:0], b.headers[:0], b.arena[:0], 0
}

// Size returns the number of content bytes that the batch holds.
func (b *Batch) Size() int { return b.size }

// Copy copies p into the batch's memory. The copy of an empty p is empty and not nil; that of nil is nil.
func (b *Batch) Copy(p []byte) []byte {
	switch {
	case p == nil:
		return nil
	case len(p) == 0:
		return []byte{}
	}
	return append(b.Alloc(len(p))[:0], p...)
}

// Alloc returns n bytes of the batch's memory, whose content is undefined.
func (b *Batch) Alloc(n int) []byte {
	b.size += n
	if cap(b.arena)-len(b.arena) < n {
		// What was handed out stays valid in the old block, which the garbage collector keeps for as long as it is used.
		b.arena = make([]byte, 0, max(2*cap(b.arena), n, 64<<10))
	}
	start := len(b.arena)
	b.arena = b.arena[:start+n]
	return b.arena[start : start+n : start+n]
}

// AddHeader adds a header for the event that is being built, which gets them by [Batch.TakeHeaders].
func (b *Batch) AddHeader(h Header) { b.headers = append(b.headers, h) }

// TakeHeaders returns the last n headers added, in order, or nil when n is 0.
func (b *Batch) TakeHeaders(n int) []Header {
	if n == 0 {
		return nil
	}
	return b.headers[len(b.headers)-n : len(b.headers) : len(b.headers)]
}

// MarkEnd marks the end of the events that the batch holds now. A run of empty transactions is one mark.
func (b *Batch) MarkEnd(lsn LSN) {
	if n := len(b.Marks); n > 0 && b.Marks[n-1].Events == len(b.Events) {
		b.Marks[n-1].Last = max(b.Marks[n-1].Last, lsn)
		return
	}
	b.Marks = append(b.Marks, Mark{Events: len(b.Events), First: lsn, Last: lsn})
}
