package bridge

import (
	"slices"
	"strconv"
	"testing"

	"pgregory.net/rapid"

	"ebb/event"
	"ebb/sink"
)

// The tracker against a model that remembers every mark, every event and every tick.
func TestTracker(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		start := event.LSN(rapid.Uint64Range(1, 1000).Draw(t, "start"))
		ticked := rapid.Bool().Draw(t, "ticked")
		tracker := newTracker(start, sink.Progress{}, ticked)
		type modelMark struct {
			events int
			lsn    event.LSN
		}
		var marks []modelMark
		var spans []span
		handed, delivered, end := 0, 0, start
		tick := event.LSN(0) // everything before it is covered
		last := confirmation{start, start}
		check := func(got confirmation) {
			want := confirmation{start, start}
			// An event is covered when the transaction that it is in ends at or before a tick.
			covered := -1
			for _, m := range marks {
				if m.events <= delivered && m.lsn <= tick {
					covered = m.events
				}
			}
			if tick > 0 {
				covered = max(covered, 0)
			}
			for _, m := range marks {
				if m.events > delivered {
					if got.write >= m.lsn {
						t.Fatalf("write %s covers event %d, and only %d are delivered", got.write, m.events, delivered)
					}
					continue
				}
				want.write = max(want.write, m.lsn)
				if !ticked || m.events <= covered {
					want.flush = max(want.flush, m.lsn)
				}
			}
			// The highest place up to there in none of the spans, but not back from where it was.
			for inside := true; inside; {
				inside = false
				for _, s := range spans {
					if s.from < want.flush && want.flush < s.to {
						want.flush, inside = s.from, true
					}
				}
			}
			want.flush = max(want.flush, last.flush)
			if got != want {
				t.Fatalf("confirms %v with %d of %d delivered and a tick at %s, want %v", got, delivered, handed, tick, want)
			}
			if got.write < last.write || got.flush < last.flush {
				t.Fatalf("went back from %v to %v", last, got)
			}
			last = got
			if now := tracker.snapshot(); now.confirmation != got || now.delivered != uint64(delivered) || now.waiting != uint64(handed-delivered) {
				t.Fatalf("snapshot %+v, with %d of %d delivered and %v", now, delivered, handed, got)
			}
		}
		streaming := false
		hand := func(t *rapid.T) {
			b := event.NewBatch()
			defer b.Release()
			skipped := 0
			if !streaming { // what the sink has comes first
				skipped = rapid.IntRange(0, 3).Draw(t, "skipped")
				handed, delivered, end = handed+skipped, delivered+skipped, end+event.LSN(skipped)
			}
			for range rapid.IntRange(0, 6).Draw(t, "steps") {
				switch rapid.IntRange(0, 2).Draw(t, "step") {
				case 0, 1:
					b.Events = append(b.Events, event.Event{})
					streaming = true
					end++
				case 2: // the end of a transaction, or a keepalive, which may say what was said before
					end += event.LSN(rapid.IntRange(0, 3).Draw(t, "log"))
					b.MarkEnd(end)
					marks = append(marks, modelMark{handed + len(b.Events), end})
				}
			}
			handed += len(b.Events)
			check(tracker.hand(b, uint64(skipped), sink.Progress{}))
		}
		deliver := func(t *rapid.T) {
			n := rapid.IntRange(0, handed-delivered).Draw(t, "delivered")
			delivered += n
			check(tracker.deliver(sink.Progress{Events: n}))
		}
		cover := func(t *rapid.T) {
			// A tick is stored only where everything before it is delivered.
			tick = max(tick, event.LSN(rapid.Uint64Range(1, uint64(last.write)).Draw(t, "tick")))
			check(tracker.cover(tick))
		}
		setAside := func(t *rapid.T) {
			// It is not delivered yet, so that nothing from there on is confirmed, and what is set aside later is in the log behind that.
			s := span{from: last.write + event.LSN(rapid.IntRange(0, 5).Draw(t, "from")), to: end}
			if n := len(spans); n > 0 {
				s.to = max(s.to, spans[n-1].to)
			}
			s.to += event.LSN(rapid.IntRange(0, 5).Draw(t, "to"))
			if s.from >= s.to {
				return
			}
			tracker.span(s.from, s.to)
			spans = slices.DeleteFunc(spans, func(s span) bool { return s.to <= last.flush })
			if n := len(spans); n > 0 { // those that are close are one
				s.from = min(s.from, spans[n-1].from)
				spans = spans[:n-1]
			}
			spans = append(spans, s)
		}
		t.Repeat(map[string]func(*rapid.T){"hand": hand, "deliver": deliver, "cover": cover, "set aside": setAside})
		n := handed - delivered
		delivered = handed
		check(tracker.deliver(sink.Progress{Events: n}))
		tick = end
		check(tracker.cover(tick))
		if n := len(spans); n > 0 && last.flush < last.write && last.write >= spans[n-1].to {
			t.Fatalf("flush stays at %s, and everything up to %s is covered, behind all spans", last.flush, last.write)
		}
		if len(tracker.waiting)+len(tracker.done) != 0 {
			t.Fatalf("marks are left: %v, %v", tracker.waiting, tracker.done)
		}
	})
}

// Rows are marked once they are delivered, each once; what is not marked is known, and without ticks it is not confirmed.
func TestTrackerOfRows(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		tracker := newTracker(1, sink.Progress{}, false)
		type modelRow struct {
			events uint64
			marked bool
		}
		var rows []modelRow // by their keys
		var marks []mark
		handed, delivered := uint64(0), uint64(0)
		unmarked := func() uint64 {
			first := uint64(noRow)
			for _, row := range rows {
				if !row.marked {
					first = min(first, row.events)
				}
			}
			return first
		}
		check := func(got confirmation) {
			want := confirmation{1, 1}
			for _, m := range marks {
				if m.events <= delivered {
					want.write = max(want.write, m.last)
					if m.events < unmarked() {
						want.flush = max(want.flush, m.last)
					}
				}
			}
			if got != want {
				t.Fatalf("confirms %v, want %v, with %d of %d delivered and %v", got, want, delivered, handed, rows)
			}
			for _, n := range []uint64{0, delivered, handed} {
				if tracker.allMarked(n) != (n < unmarked()) {
					t.Fatalf("all of %d are marked: %t, with %v", n, tracker.allMarked(n), rows)
				}
			}
		}
		row := func(b *event.Batch, base uint64) {
			rows = append(rows, modelRow{events: base + uint64(len(b.Events))})
			b.Rows = append(b.Rows, event.Row{Events: len(b.Events), Key: []byte(strconv.Itoa(len(rows) - 1))})
		}
		take := func(t *rapid.T) {
			again := rapid.Bool().Draw(t, "again")
			taken := tracker.take(rapid.IntRange(1, 5).Draw(t, "most"), again)
			var locked []trackedRow
			for _, r := range taken {
				n, err := strconv.Atoi(string(r.key))
				if err != nil || rows[n].events != r.events || rows[n].marked || r.events > delivered {
					t.Fatalf("row %s is taken with %d events, with %d delivered and %v", r.key, r.events, delivered, rows)
				}
				if rapid.Bool().Draw(t, "locked") {
					locked = append(locked, r)
				} else {
					rows[n].marked = true
				}
			}
			check(tracker.marked(locked))
		}
		t.Repeat(map[string]func(*rapid.T){
			"hand": func(t *rapid.T) {
				b := event.NewBatch()
				defer b.Release()
				skipped := uint64(0)
				if handed == delivered {
					skipped = rapid.Uint64Range(0, 2).Draw(t, "skipped")
				}
				handed, delivered = handed+skipped, delivered+skipped
				for range skipped {
					row(b, handed)
				}
				for range rapid.IntRange(0, 4).Draw(t, "events") {
					b.Events = append(b.Events, event.Event{})
					if rapid.Bool().Draw(t, "with a row") {
						row(b, handed)
					}
				}
				end := event.LSN(2 + len(marks))
				b.MarkEnd(end)
				handed += uint64(len(b.Events))
				marks = append(marks, mark{events: handed, first: end, last: end})
				check(tracker.hand(b, skipped, sink.Progress{}))
			},
			"deliver": func(t *rapid.T) {
				n := rapid.Uint64Range(0, handed-delivered).Draw(t, "delivered")
				delivered += n
				check(tracker.deliver(sink.Progress{Events: int(n)}))
			},
			"take": take,
		})
		n := handed - delivered
		delivered = handed
		check(tracker.deliver(sink.Progress{Events: int(n)}))
		for taken := tracker.take(100, true); len(taken) > 0; taken = tracker.take(100, true) {
			for _, r := range taken {
				n, _ := strconv.Atoi(string(r.key))
				rows[n].marked = true
			}
			check(tracker.marked(nil))
		}
		if unmarked() != noRow || tracker.rowBytes != 0 {
			t.Fatalf("rows are left: %v, %d bytes", rows, tracker.rowBytes)
		}
	})
}

// Whoever reads waits while too many rows wait to be marked.
func TestTrackerBoundsRows(t *testing.T) {
	tracker := newTracker(1, sink.Progress{}, true)
	b := event.NewBatch()
	defer b.Release()
	for range maxRows {
		b.Rows = append(b.Rows, event.Row{Key: []byte("k")})
	}
	if tracker.room() != nil {
		t.Fatal("an empty tracker has no room")
	}
	tracker.hand(b, 0, sink.Progress{})
	room := tracker.room()
	if room == nil {
		t.Fatal("there is room for more")
	}
	select {
	case <-tracker.due:
	default:
		t.Error("nobody was woken to mark them")
	}
	tracker.marked(tracker.take(markBatch, true)) // all of them are locked
	select {
	case <-room:
		t.Fatal("there is room while as many rows wait as before")
	default:
	}
	tracker.take(markBatch, true)
	tracker.marked(nil)
	<-room
	if tracker.room() != nil {
		t.Error("there is no room, and it was said that there is")
	}
}

// A tick that is long in coming makes flush late, and nothing large.
func TestTrackerThinsOutWhatWaitsForATick(t *testing.T) {
	tracker := newTracker(1, sink.Progress{}, true)
	const n = 5 * maxDone
	for i := range n {
		b := event.NewBatch()
		b.Events = append(b.Events, event.Event{})
		b.MarkEnd(event.LSN(2 + i))
		tracker.hand(b, 0, sink.Progress{})
		b.Release()
		tracker.deliver(sink.Progress{Events: 1})
	}
	if len(tracker.done) > maxDone {
		t.Errorf("%d marks wait", len(tracker.done))
	}
	if got := tracker.cover(n / 2); got.flush > n/2 || got.flush < n/2-100 {
		t.Errorf("flush is %d behind a tick at %d", got.flush, n/2)
	}
	if got := tracker.cover(n + 1); got.flush != n+1 {
		t.Errorf("flush is %d in the end, want %d", got.flush, n+1)
	}
}

// A standby that has what is confirmed has the dead letter of every event before that as well, unless it is far behind.
func TestTrackerOfSpans(t *testing.T) {
	tracker := newTracker(100, sink.Progress{}, false)
	hand := func(events int, lsn event.LSN) confirmation {
		b := event.NewBatch()
		defer b.Release()
		b.Events = append(b.Events, make([]event.Event, events)...)
		b.MarkEnd(lsn)
		tracker.hand(b, 0, sink.Progress{})
		return tracker.deliver(sink.Progress{Events: events})
	}
	want := func(what string, got confirmation, write, flush event.LSN) {
		t.Helper()
		if got != (confirmation{write, flush}) {
			t.Errorf("%s: %v, want %v", what, got, confirmation{write, flush})
		}
	}
	want("before", hand(1, 200), 200, 200)
	tracker.span(210, 300)
	want("behind an event whose letter is at 300", hand(1, 250), 250, 210)
	want("at its letter", hand(0, 300), 300, 300)

	// One after the other, without a gap in which nothing is under way.
	at := event.LSN(1000)
	hand(0, at)
	var got confirmation
	for range 1000 {
		tracker.span(at+10, at+spanMerge/2)
		at += spanMerge / 4
		got = hand(1, at)
	}
	if behind := got.write - got.flush; behind < spanSlack-spanMerge || behind > spanSlack+3*spanMerge {
		t.Errorf("flush is %d bytes behind, want about %d", behind, spanSlack)
	}
	if n := len(tracker.spans); n > 2*spanSlack/spanMerge {
		t.Errorf("%d spans are remembered", n)
	}
	want("in the end", hand(0, at+spanMerge), at+spanMerge, at+spanMerge)
	if n := len(tracker.spans); n != 1 {
		hand(0, at+2*spanMerge)
		if n := len(tracker.spans); n != 0 {
			t.Errorf("%d spans are remembered", n)
		}
	}
}
