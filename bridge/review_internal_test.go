package bridge

import (
	"errors"
	"testing"

	"ebb/event"
	"ebb/replication"
	"ebb/sink"
	"ebb/sql"
)

// F12: the old primary's bridge has delivered an event from behind the switch after the epoch was raised.
func TestReviewTailBehindTheSwitch(t *testing.T) {
	source := sink.Source{SystemIdentifier: "1", Database: "d", Slot: "s", Buffer: "b"}
	f := &facts{
		source: source, system: replication.System{ID: "1", Timeline: 2, Database: "d"}, flushed: 0x5000, exists: true, remembers: true,
		record: sql.SlotRecord{Name: "s", SystemIdentifier: "1", Timeline: 2, Epochs: event.Epochs{{Number: 1}, {Number: 2, From: 0x2000}},
			Made: true, Done: true},
		slot: replication.Slot{Plugin: replication.Plugin, ConfirmedFlush: 0x1000},
		tick: sql.Tick{ID: 1, LSN: 0x1000, Position: event.Position{Epoch: 1, Commit: 0xF00, Index: 1}, StreamSeq: 10, Epoch: 1}, ticked: true, delivered: true,
		tail: sink.Tail{Position: event.Position{Epoch: 1, Commit: 0x2500, Index: 1}, Sequence: 11, Last: 11, ID: "11", Exclusive: true, Source: source},
	}
	f.newest = f.tick
	if s := decide(f); s.action != actHalt || !errors.Is(s.err, ErrLost) {
		t.Errorf("action %d, error %v: the stream ends with an event at %s, and epoch 1 ended at 0/2000", s.action, s.err, f.tail.Position)
	}
}
