package bridge_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"ebb/internal/natstest"
	"ebb/internal/pgtest"
)

// letter makes a dead letter of the row of an id, which was set aside at a position.
func (f *fixture) letter(id int64, position, state string) {
	f.t.Helper()
	epoch, place, _ := strings.Cut(position, ":")
	f.db.Exec(f.t, fmt.Sprintf(`INSERT INTO ebb.dead_letter (slot, event_id, topic, payload, content_type, event_time, position, place, epoch, reason, attempts,
		first_at, last_at, state) SELECT '%s', id::text, topic, payload, 'application/json', created_at, '%s', '%s', %s, 'x', 1, now(), now(), '%s'
		FROM ebb.buffer WHERE id = %d`, f.slot, position, place, epoch, state, id))
}

// What is among the dead letters is not delivered from the buffer when the slot is lost.
func TestRecoveryWithoutDeadLetters(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	server := natstest.New(t)
	f.put(2)
	f.delivered(server, 2)
	f.put(4)
	f.db.Exec(t, "SELECT pg_drop_replication_slot('"+f.slot+"')")
	rows := f.rows()
	f.letter(rows[3], "1:0/1:1", "parked")
	f.letter(rows[4], "1:0/1:2", "discarded")
	f.delivered(server, 4)
	got, _ := f.streamed(server, 4)
	sameOrder(t, got, slices.Concat(rows[:3], rows[5:]))
}

// Behind the newest tick, the stream lacks an event that was set aside, and has one out of its place that was retried: it is gone on with, and nothing is
// taken for missing.
func TestStreamWithSetAsideAndRetriedEvents(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	server := natstest.New(t)
	f.put(3)
	f.delivered(server, 3)
	cfg := f.config(f.stream(server))
	cfg.TickEvery = time.Hour
	r := f.runWith(cfg)
	f.put(1)
	f.put(2)
	_, messages := f.streamed(server, 6)
	r.stop()

	// As if the fifth event had been set aside, and retried after the sixth.
	rows := f.rows()
	position := messages[4].Header.Get("Ebb-Position")
	f.letter(rows[4], position, "retrying")
	server.RecreateStream(t, stream(t, server).CachedInfo().Config)
	restoreTail(t, server.JetStream(t), []natstest.Msg{messages[0], messages[1], messages[2], messages[3], messages[5], messages[4]},
		func(i int, m *nats.Msg) bool {
			if i == 5 {
				m.Header.Set("Ebb-Origin", "retry")
				m.Header.Set("Ebb-Position", messages[5].Header.Get("Ebb-Position"))
				m.Header.Del("Nats-Msg-Id")
			}
			return true
		})
	f.db.Exec(t, "UPDATE ebb.dead_letter SET state = 'delivered', stream_seq = 6, destination = (SELECT destination FROM ebb.tick LIMIT 1)")

	r = f.run(f.stream(server))
	f.put(1)
	want := slices.Concat(rows[:4], []int64{rows[5], rows[4], f.rows()[6]})
	f.awaitBacklog(0)
	got, messages := f.streamed(server, 7)
	sameOrder(t, got, want)
	if origin := messages[6].Header.Get("Ebb-Origin"); origin != "" {
		t.Errorf("the last event was %s: the slot was taken for another one", origin)
	}
	r.stop()
}

// A retried event that the stream has forgotten is to be retried again, although no tick is untrue because of that.
func TestForgottenRetry(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	server := natstest.New(t)
	f.put(3)
	f.delivered(server, 3)
	f.letter(f.rows()[1], "1:0/1:1", "delivered")
	f.db.Exec(t, "UPDATE ebb.dead_letter SET stream_seq = 4, destination = (SELECT destination FROM ebb.tick LIMIT 1)")
	r := f.run(f.stream(server))
	pgtest.Eventually(t, patience, func() (bool, string) {
		forgotten := pgtest.Value[int64](t, f.db, "SELECT count(*) FROM ebb.dead_letter WHERE stream_seq IS NULL OR stream_seq <> 4 OR state <> 'delivered'")
		return forgotten == 1, "the stream ends at 3, and the letter was delivered at 4"
	})
	r.stop()
}
