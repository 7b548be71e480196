package main

import (
	"fmt"
	"testing"
	"time"

	natsd "github.com/nats-io/nats-server/v2/server"

	"ebb/internal/natstest"
	"ebb/internal/pgtest"
)

// TestMessageThatIsTooLarge: what cannot be delivered stops a bridge that is not to park it, and nothing is confirmed past it.
func TestMessageThatIsTooLarge(t *testing.T) {
	maxPayload := int32(64 << 10)
	broker := natstest.New(t, natstest.Adjust(func(o *natsd.Options) { o.MaxPayload = maxPayload }))
	db := pgtest.New(t)
	s := newSite(t, db, broker.URL(), "nats: {on_reject: block}")
	s.setup(t)
	witness := s.witness(t)

	bridge := s.streaming(t)
	s.put(t, 1)
	s.put(t, 2)
	db.Exec(t, `BEGIN; SELECT ebb.put('before', '{}'); SELECT ebb.put('large', json_build_object('x', repeat('x', 100000))); SELECT ebb.put('after', '{}'); COMMIT`)
	s.put(t, 3)
	ids := s.ids(t)
	transactions := witness.transactions(t)
	if len(ids) != 6 || len(transactions) != 4 {
		t.Fatalf("%d rows in %d transactions", len(ids), len(transactions))
	}

	if code := bridge.ended(t, 30*time.Second); code != exitFailed {
		t.Fatalf("exit code %d, want %d", code, exitFailed)
	}
	result{exitFailed, bridge.stdout.String(), bridge.stderr.String()}.fails(t, exitFailed, "event "+ids[3]+" at ", "max_payload", fmt.Sprint(maxPayload))
	equalIDs(t, "before the large one", streamIDs(t, broker), ids[:3])
	if got := s.confirmed(t); got >= transactions[2].end {
		t.Errorf("confirmed %s, past the undelivered transaction's end %s", got, transactions[2].end)
	}

	// Waiting does not mend it.
	again := s.ebb(t, "run")
	again.fails(t, exitFailed, "event "+ids[3]+" at ", "max_payload")
	equalIDs(t, "after another try", streamIDs(t, broker), ids[:3])
	if got := s.confirmed(t); got >= transactions[2].end {
		t.Errorf("confirmed %s, past the undelivered transaction's end %s", got, transactions[2].end)
	}

	// A larger limit does.
	broker.Stop(t)
	maxPayload = 1 << 20
	broker.Start(t)
	bridge = s.run(t)
	delivered(t, broker, 30*time.Second, len(ids))
	equalIDs(t, "with a larger limit", streamIDs(t, broker), ids)
	s.confirms(t, 40*time.Second)
	bridge.stop(t)
}
