package replication

import "testing"

func TestSnapshotInOrder(t *testing.T) {
	for snapshot, want := range map[string]string{
		"10:20:11,12":  "10:20:11,12",
		"10:10:":       "10:10:",
		"16318:16317:": "16318:16318:", // seen
		"20:10:11":     "",
		"10:x:":        "",
		"10":           "",
		"":             "",
	} {
		got, err := inOrder(snapshot)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q becomes %q, %v, want %q", snapshot, got, err, want)
		}
	}
}
