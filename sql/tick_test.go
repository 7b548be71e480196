package sql

import (
	"testing"

	"ebb/event"
)

func TestEndOfRecord(t *testing.T) {
	const block, segment = 8192, 16 << 20
	for _, c := range []struct{ insert, want event.LSN }{
		{0x1000028, 0x1000000},                 // behind the long header of a segment
		{0x1002018, 0x1002000},                 // behind the short header of a page
		{0x1002028, 0x1002028},                 // a record of 16 bytes behind that
		{0x1000018, 0x1000000},                 // no record begins within a long header; harmless
		{0x1000030, 0x1000030},                 //
		{0x1001FF8, 0x1001FF8},                 // the end of a page
		{0x7F_FF000028, 0x7F_FF000000},         //
		{0x7F_FF002018, 0x7F_FF002000},         //
		{0x7F_FF002018 + 8, 0x7F_FF002018 + 8}, //
	} {
		if got := endOfRecord(c.insert, block, segment); got != c.want {
			t.Errorf("endOfRecord(%s) = %s, want %s", c.insert, got, c.want)
		}
	}
}
