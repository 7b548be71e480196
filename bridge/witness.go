package bridge

import (
	"strconv"
	"sync"
	"sync/atomic"
)

// witness remembers which rows have come by. Nothing tells a slot from another one of the same name that somebody has made in its place, and
// that begins behind events which the first one had still held. But every row that no tick had recorded when the stream started must come by,
// before a tick can record it.
type witness struct {
	// since is the snapshot of the newest tick when the stream started.
	since string

	dismissed atomic.Bool
	mu        sync.Mutex
	ids       idSet
}

func newWitness(since string) *witness { return &witness{since: since, ids: idSet{}} }

// see is called with the id of every row that comes by.
func (w *witness) see(id []byte) {
	if w.dismissed.Load() {
		return
	}
	n, err := strconv.ParseInt(string(id), 10, 64)
	if err != nil {
		return // no row of the buffer has such an id
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ids.add(n)
}

func (w *witness) saw(id int64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.ids.has(id)
}

// dismiss ends the witness's duty.
func (w *witness) dismiss() {
	w.dismissed.Store(true)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.ids = nil
}
