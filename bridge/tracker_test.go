package bridge

import (
	"testing"

	"pgregory.net/rapid"

	"ebb/event"
	"ebb/sink"
)

// The tracker against a model that remembers every mark and every event.
func TestTracker(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		start := event.LSN(rapid.Uint64Range(1, 1000).Draw(t, "start"))
		tracker := newTracker(start, sink.Progress{})
		type mark struct {
			events int
			lsn    event.LSN
		}
		var marks []mark
		handed, delivered, end := 0, 0, start
		last := start
		check := func(lsn event.LSN) {
			want := start
			for _, m := range marks {
				if m.events <= delivered {
					want = max(want, m.lsn)
				} else if lsn >= m.lsn {
					t.Fatalf("%s covers event %d, and only %d are delivered", lsn, m.events, delivered)
				}
			}
			if lsn != want {
				t.Fatalf("is at %s with %d of %d delivered, want %s", lsn, delivered, handed, want)
			}
			if lsn < last {
				t.Fatalf("went back from %s to %s", last, lsn)
			}
			last = lsn
			if now := tracker.snapshot(); now.lsn != lsn || now.delivered != uint64(delivered) || now.waiting != uint64(handed-delivered) {
				t.Fatalf("snapshot %+v, with %d of %d delivered up to %s", now, delivered, handed, lsn)
			}
		}
		hand := func(t *rapid.T) {
			b := event.NewBatch()
			defer b.Release()
			for range rapid.IntRange(0, 6).Draw(t, "steps") {
				switch rapid.IntRange(0, 2).Draw(t, "step") {
				case 0, 1:
					b.Events = append(b.Events, event.Event{})
					end++
				case 2: // the end of a transaction, or a keepalive, which may say what was said before
					end += event.LSN(rapid.IntRange(0, 3).Draw(t, "log"))
					b.MarkEnd(end)
					marks = append(marks, mark{handed + len(b.Events), end})
				}
			}
			handed += len(b.Events)
			check(tracker.hand(b))
		}
		deliver := func(t *rapid.T) {
			n := rapid.IntRange(0, handed-delivered).Draw(t, "delivered")
			delivered += n
			check(tracker.deliver(sink.Progress{Events: n}))
		}
		t.Repeat(map[string]func(*rapid.T){"hand": hand, "deliver": deliver})
		n := handed - delivered
		delivered = handed
		check(tracker.deliver(sink.Progress{Events: n}))
		if len(tracker.marks) != 0 {
			t.Fatalf("%d marks are left", len(tracker.marks))
		}
	})
}
