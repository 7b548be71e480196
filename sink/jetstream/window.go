package jetstream

import "ebb/event"

const (
	// maxPending and maxPendingBytes bound what was handed over and is not yet delivered. A server refuses a stream's messages
	// when too many of them wait for it: 10,000, or 100,000 since 2.15, or max_buffered_msgs of its configuration.
	maxPending      = 4096
	maxPendingBytes = 8 << 20
)

// window holds the events that were handed over and are not yet delivered, in order, and the batches that own their memory.
type window struct {
	pending []*event.Event
	bytes   int
	batches []held
}

type held struct {
	batch *event.Batch
	left  int
}

func (w *window) add(b *event.Batch) {
	if len(b.Events) == 0 {
		b.Release()
		return
	}
	for i := range b.Events {
		w.pending = append(w.pending, &b.Events[i])
		w.bytes += b.Events[i].Size()
	}
	w.batches = append(w.batches, held{batch: b, left: len(b.Events)})
}

// full reports whether no other batch is to be added.
func (w *window) full() bool { return len(w.pending) >= maxPending || w.bytes >= maxPendingBytes }

// drop lets go of the first n events, and of the batches that held no others.
func (w *window) drop(n int) {
	for _, e := range w.pending[:n] {
		w.bytes -= e.Size()
	}
	clear(w.pending[:n])
	w.pending = w.pending[n:]
	if len(w.pending) == 0 {
		w.pending = nil
	}
	for n > 0 {
		h := &w.batches[0]
		k := min(n, h.left)
		h.left, n = h.left-k, n-k
		if h.left == 0 {
			h.batch.Release()
			w.batches = w.batches[1:]
		}
	}
}

// release lets go of everything.
func (w *window) release() {
	for _, h := range w.batches {
		h.batch.Release()
	}
	*w = window{}
}
