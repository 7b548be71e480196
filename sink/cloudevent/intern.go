package cloudevent

import (
	"maps"
	"sync"
	"sync/atomic"
)

const (
	maxInterned       = 256
	maxInternedLength = 128
)

// interned are the header names and content types that producers use, of which there are few: so that a string costs no
// allocation for every event, and may be kept. The map is replaced and never written to.
var (
	interned   atomic.Pointer[map[string]string]
	internedMu sync.Mutex
)

func init() { interned.Store(&map[string]string{}) }

// intern returns b as a string. It allocates for what it has not seen before, or when it has seen too much.
func intern(b []byte) string {
	if s, ok := (*interned.Load())[string(b)]; ok {
		return s
	}
	s := string(b)
	if len(s) > maxInternedLength {
		return s
	}
	internedMu.Lock()
	defer internedMu.Unlock()
	if old := *interned.Load(); len(old) < maxInterned {
		grown := maps.Clone(old)
		grown[s] = s
		interned.Store(&grown)
	}
	return s
}
