package event_test

import (
	"encoding/json"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"ebb/event"
)

func TestLSNText(t *testing.T) {
	for _, c := range []struct {
		lsn  event.LSN
		text string
	}{
		{0, "0/0"}, {1, "0/1"}, {0x16_B374D848, "16/B374D848"}, {0xFFFFFFFF_00000010, "FFFFFFFF/10"}, {1 << 32, "1/0"},
	} {
		if got := c.lsn.String(); got != c.text {
			t.Errorf("%#x is %q, want %q", uint64(c.lsn), got, c.text)
		}
		if got, err := event.ParseLSN(c.text); err != nil || got != c.lsn {
			t.Errorf("ParseLSN(%q) = %v, %v", c.text, got, err)
		}
	}
	for _, bad := range []string{"", "/", "1", "1/", "/1", "g/0", "0/g", "1/2/3", "123456789/0", "0/123456789", "-1/0", "+1/0", " 1/0"} {
		if lsn, err := event.ParseLSN(bad); err == nil {
			t.Errorf("ParseLSN(%q) = %v, want an error", bad, lsn)
		}
	}
}

func TestPositionRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		p := event.Position{
			Epoch: rapid.Uint32().Draw(t, "epoch"), Commit: event.LSN(rapid.Uint64().Draw(t, "commit")), Index: rapid.Uint64().Draw(t, "index"),
		}
		text, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		var back event.Position
		if err := json.Unmarshal(text, &back); err != nil || back != p {
			t.Fatalf("%s came back as %s, %v", p, back, err)
		}
	})
	for _, bad := range []string{"", "1", "1:0/0", "x:0/0:0", "1:00:0", "1:0/0:x", "1:0/0:-1", "4294967296:0/0:0", "1:0/0:1:2"} {
		if p, err := event.ParsePosition(bad); err == nil {
			t.Errorf("ParsePosition(%q) = %v, want an error", bad, p)
		}
	}
}

func TestPositionOrder(t *testing.T) {
	sorted := []event.Position{{}, {1, 0, 0}, {1, 0, 1}, {1, 5, 1}, {1, 5, 2}, {1, 5, 10}, {1, 0xFFFFFFFFFF, 1}, {2, 1, 1}}
	if !slices.IsSortedFunc(sorted, event.Position.Compare) {
		t.Error("positions do not compare by epoch, commit LSN and index")
	}
}

func TestBatchCopies(t *testing.T) {
	b := event.NewBatch()
	if b.Copy(nil) != nil {
		t.Error("a copy of nil is not nil")
	}
	if c := b.Copy([]byte{}); c == nil || len(c) != 0 {
		t.Error("a copy of nothing is nil")
	}
	// What was copied stays, however much follows.
	var copies [][]byte
	for i := range 1000 {
		copies = append(copies, b.Copy(slices.Repeat([]byte{byte(i)}, 1+i)))
	}
	for i, c := range copies {
		if len(c) != 1+i || slices.ContainsFunc(c, func(x byte) bool { return x != byte(i) }) {
			t.Fatalf("copy %d was overwritten", i)
		}
		if cap(c) != len(c) {
			t.Fatalf("copy %d can be appended to over its neighbour", i)
		}
	}
}

func TestBatchMarks(t *testing.T) {
	b := event.NewBatch()
	b.MarkEnd(5)
	b.MarkEnd(7)
	b.Events = append(b.Events, event.Event{})
	b.MarkEnd(9)
	b.MarkEnd(8)
	if want := []event.Mark{{Events: 0, First: 5, Last: 7}, {Events: 1, First: 9, Last: 9}}; !slices.Equal(b.Marks, want) {
		t.Errorf("marks are %v, want %v", b.Marks, want)
	}
}

func TestEpochsRuleOut(t *testing.T) {
	// A promotion at 200, another cluster, a promotion of that at 150.
	history := event.Epochs{{Number: 1}, {Number: 2, From: 200}, {Number: 4}, {Number: 5, From: 150}}
	for _, tt := range []struct {
		position event.Position
		want     bool
	}{
		{event.Position{Epoch: 1, Commit: 199, Index: 1}, false},
		{event.Position{Epoch: 1, Commit: 200, Index: 1}, true},
		{event.Position{Epoch: 2, Commit: 300, Index: 1}, false}, // which is not comparable to 150
		{event.Position{Epoch: 3, Commit: 300, Index: 1}, false}, // not known here
		{event.Position{Epoch: 4, Commit: 149, Index: 1}, false},
		{event.Position{Epoch: 4, Commit: 150, Index: 1}, true},
		{event.Position{Epoch: 5, Commit: 150, Index: 1}, false},
		{event.Position{Epoch: 6, Commit: 150, Index: 1}, false},
	} {
		if got := history.RuleOut(tt.position); got != tt.want {
			t.Errorf("RuleOut(%s) = %v, want %v", tt.position, got, tt.want)
		}
	}
}
