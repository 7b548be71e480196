package cloudevent

import (
	"fmt"
	"strings"
	"sync"
	"testing"
)

func TestIntern(t *testing.T) {
	before := *interned.Load()
	defer interned.Store(&before)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for i := range 2 * maxInterned {
				b := fmt.Appendf(nil, "x-%d", i)
				s := intern(b)
				b[0] = 'y'
				if want := fmt.Sprintf("x-%d", i); s != want {
					t.Errorf("got %q, want %q", s, want)
				}
			}
		})
	}
	wg.Wait()
	if n := len(*interned.Load()); n != maxInterned {
		t.Errorf("%d strings kept, want %d", n, maxInterned)
	}
	if s := strings.Repeat("x", 1000); intern([]byte(s)) != s {
		t.Error("long one is changed")
	}
}
