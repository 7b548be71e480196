package bridge

import (
	"strings"
	"testing"

	"ebb/decode"
	"ebb/sql"
)

func TestRowID(t *testing.T) {
	table := &sql.OwnTable{Table: sql.Table{Schema: "public", Name: "member/ship"}, Key: []string{"a", "b"}}
	id := func(a, b string) string { return string(rowID(table, [][]byte{[]byte(a), []byte(b), []byte("rest")})) }
	if got, want := id("A/1", ""), "public.member%2Fship/A%2F1/"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	long := strings.Repeat("\xff", 2000)
	one, other := id(long, "1"), id(long, "2")
	if len(one) > decode.MaxID || one != id(long, "1") || one == other {
		t.Errorf("of long keys: %s and %s", one, other)
	}
}
