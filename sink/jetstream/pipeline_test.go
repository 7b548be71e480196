package jetstream

import (
	"fmt"
	"testing"

	"github.com/nats-io/nats.go"
)

// An acknowledgment vouches for its own message alone. Where the one before it does not come, as when a leader that stepped down had
// taken that message, the stream is to be looked at.
func TestAcknowledgmentsOutOfOrder(t *testing.T) {
	for _, c := range []struct {
		name    string
		answers []string // number and sequence
		acked   int
		failed  bool
	}{
		{"in order", []string{"1 11", "2 12", "3 13"}, 3, false},
		{"again", []string{"1 11", "1 11", "2 12", "1 11"}, 2, false},
		{"one missing", []string{"1 11", "3 13"}, 1, true},
		{"one late", []string{"1 11", "3 13", "2 12"}, 1, true},
		{"the first missing", []string{"2 12"}, 0, true},
		{"another sequence", []string{"1 11", "2 13"}, 1, true},
	} {
		a := &pipeline{way: &pipelined{Sink: &Sink{cfg: Config{Exclusive: true}}}, inbox: "inbox", base: 10, signal: make(chan struct{}, 1)}
		for _, answer := range c.answers {
			var number, seq int
			if _, err := fmt.Sscan(answer, &number, &seq); err != nil {
				t.Fatal(err)
			}
			a.answer(&nats.Msg{Subject: fmt.Sprintf("inbox.%d", number), Data: fmt.Appendf(nil, `{"stream":"EBB","seq":%d}`, seq)})
		}
		if acked, _, _, err := a.answers(); acked != c.acked || err != nil != c.failed {
			t.Errorf("%s: %d are acknowledged, error is %v", c.name, acked, err)
		}
	}
}
