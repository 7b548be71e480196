package jetstream

import (
	"slices"
	"sync/atomic"
	"time"

	"ebb/event"
	"ebb/sink"
)

const (
	// maxPending and maxPendingBytes bound what was handed over and is not yet delivered. A server refuses a stream's messages
	// when too many of them wait for it: 10,000, or 100,000 since 2.15, or max_buffered_msgs of its configuration.
	maxPending      = 4096
	maxPendingBytes = 8 << 20
)

// window holds the events that are to be published, in order, the batches that own their memory, and where between them there are others: events
// that the dead letters keep instead, and retries.
type window struct {
	pending []*event.Event
	bytes   int
	batches []held
	// gone is how many events stood in front of the pending ones. A place is a number of events in front, gone ones included, so that it stays the
	// same while the window moves.
	gone uint64

	// asides are in the order in which their events were handed over.
	asides []aside
	// left is how many events they are.
	left int
	// retries are in order, and have a pending event each.
	retries []*retrying
}

type held struct {
	batch *event.Batch
	left  int
}

// aside are events that are not published, as the dead letters keep them. They stand behind the pending event before place, and nothing behind them is
// published before they are kept.
type aside struct {
	place   uint64
	events  int
	keeping *keeping
}

// keeping are events that were given to the dead letters together.
type keeping struct {
	given int
	kept  atomic.Int64
	// done is what the dead letters call for each.
	done func()
}

func newKeeping(signal chan<- struct{}) *keeping {
	k := new(keeping)
	k.done = func() {
		k.kept.Add(1)
		select {
		case signal <- struct{}{}:
		default:
		}
	}
	return k
}

func (k *keeping) isKept() bool { return k.kept.Load() >= int64(k.given) }

// retrying is a retry with events that are pending: left of them, from place on. Those that are stored are the last ones at seq.
type retrying struct {
	*sink.Retry
	place  uint64
	left   int
	stored int
	seq    uint64
	// since is when everything in front of it, and perhaps its first event, was delivered.
	since time.Time
}

// add adds the events of a batch, but for those of which out, unless nil, says that they are set aside.
func (w *window) add(b *event.Batch, out func(*event.Event) *keeping) {
	n := len(w.pending)
	for i := range b.Events {
		e := &b.Events[i]
		if out != nil {
			if k := out(e); k != nil {
				w.asides = appendAside(w.asides, aside{place: w.gone + uint64(len(w.pending)), events: 1, keeping: k})
				w.left++
				continue
			}
		}
		w.pending = append(w.pending, e)
		w.bytes += e.Size()
	}
	if n = len(w.pending) - n; n == 0 {
		b.Release()
		return
	}
	w.batches = append(w.batches, held{batch: b, left: n})
}

// addRetry adds the events of a retry, which has some.
func (w *window) addRetry(r *sink.Retry) {
	w.retries = append(w.retries, &retrying{Retry: r, place: w.gone + uint64(len(w.pending)), left: len(r.Batch.Events)})
	w.add(r.Batch, nil)
}

func appendAside(asides []aside, a aside) []aside {
	if n := len(asides); n > 0 && asides[n-1].place == a.place && asides[n-1].keeping == a.keeping {
		asides[n-1].events += a.events
		return asides
	}
	return append(asides, a)
}

// full reports whether no other batch is to be added.
func (w *window) full() bool {
	return len(w.pending)+w.left >= maxPending || w.bytes >= maxPendingBytes
}

// before returns how many of the pending events are in front of those that are set aside and not yet kept.
func (w *window) before() int {
	for i := range w.asides {
		if !w.asides[i].keeping.isKept() {
			return int(w.asides[i].place - w.gone)
		}
	}
	return len(w.pending)
}

// settle takes out the events that are kept and that nothing pending stands in front of, and returns how many they are.
func (w *window) settle() int {
	n, events := 0, 0
	for ; n < len(w.asides) && w.asides[n].place <= w.gone && w.asides[n].keeping.isKept(); n++ {
		events += w.asides[n].events
	}
	if n > 0 {
		w.asides = slices.Delete(w.asides, 0, n)
		w.left -= events
	}
	return events
}

// drop lets go of the first n pending events, and of the batches that held no others.
func (w *window) drop(n int) {
	for _, e := range w.pending[:n] {
		w.bytes -= e.Size()
	}
	clear(w.pending[:n])
	w.pending = w.pending[n:]
	w.gone += uint64(n)
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

// take takes pending events out, by their indexes, which rise. They are set aside, unless keeping is nil.
func (w *window) take(out []int, k *keeping) {
	asides := make([]aside, 0, len(w.asides)+len(out))
	rest := w.asides
	taken := 0
	// move moves the asides that stand in front of the pending event of an index.
	move := func(index int) {
		for len(rest) > 0 && rest[0].place <= w.gone+uint64(index) {
			a := rest[0]
			a.place -= uint64(taken)
			asides, rest = appendAside(asides, a), rest[1:]
		}
	}
	pending, batches := w.pending[:0], w.batches[:0]
	index := 0
	for _, h := range w.batches {
		n := 0
		for range h.left {
			e := w.pending[index]
			if taken < len(out) && out[taken] == index {
				w.bytes -= e.Size()
				move(index)
				if k != nil {
					asides = appendAside(asides, aside{place: w.gone + uint64(index-taken), events: 1, keeping: k})
					w.left++
				}
				taken++
			} else {
				pending = append(pending, e)
				n++
			}
			index++
		}
		if h.left = n; n == 0 {
			h.batch.Release()
			continue
		}
		batches = append(batches, h)
	}
	move(index)
	for _, r := range w.retries {
		before, _ := slices.BinarySearch(out, int(r.place-w.gone))
		r.place -= uint64(before)
	}
	clear(w.pending[len(pending):])
	clear(w.batches[len(batches):])
	w.pending, w.batches, w.asides = pending, batches, asides
}

// release lets go of everything.
func (w *window) release() {
	for _, h := range w.batches {
		h.batch.Release()
	}
	*w = window{}
}
