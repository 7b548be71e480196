package bridge_test

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"ebb/bridge"
	"ebb/event"
	"ebb/internal/natstest"
	"ebb/internal/pgtest"
	"ebb/replication"
	"ebb/sql"
)

var errKilledHere = errors.New("killed")

// killedAt is a configuration of a bridge that never comes past a place.
func killedAt(cfg bridge.Config, where string) bridge.Config {
	cfg.InterruptAt(func(place string) error {
		if place == where {
			return errKilledHere
		}
		return nil
	})
	return cfg
}

// Rows of own tables, marked, deleted or neither, and messages without a table come again with the ids that they had, and their rows are let be.
func TestReplayOfOwnTables(t *testing.T) {
	t.Parallel()
	f := newOwnFixture(t, pgtest.New(t), bridge.Managed(), own("kept", sql.Keep, noID), own("marked", sql.Mark), own("deleted", sql.Delete, wholeRow))
	f.create("kept", "marked", "deleted")
	f.mustSetup()
	s := newExactSink()
	r := f.runWith(f.trailing(f.config(s)))
	f.insert("kept", 2)
	f.insert("marked", 2)
	f.insert("deleted", 2)
	f.db.Exec(t, "SELECT ebb.emit('t', '1'), ebb.put('t', '2'), ebb.emit('t', '3')")
	s.await(t, 9)
	f.left(0, "deleted")
	f.left(2, "marked WHERE done_at IS NOT NULL")
	f.settle()
	const marks = "SELECT string_agg(done_at::text, ' ' ORDER BY n) FROM marked"
	before := pgtest.Value[string](t, f.db, marks)

	from := bridge.Place{LSN: s.all()[0].Position.Commit}
	survey, err := bridge.TakeSurvey(t.Context(), f.config(nil), from, bridge.Place{})
	if err != nil {
		t.Fatal(err)
	}
	if survey.Events != 9 || survey.From != from.LSN {
		t.Errorf("there are %d events from %s on, want 9 from %s on", survey.Events, survey.From, from.LSN)
	}
	other := newTestSink()
	if err := bridge.RunAside(t.Context(), f.config(other), bridge.Aside{From: from}); err != nil {
		t.Fatal(err)
	}

	id := f.requestReplay(from.LSN)
	f.awaitReplay(id, sql.ReplayDone)
	f.insert("kept", 1)
	s.await(t, 19)
	r.stop()
	idsOf := func(events []event.Event) (ids []string) {
		for _, e := range events {
			ids = append(ids, string(e.ID))
		}
		return ids
	}
	all := idsOf(s.all())
	if diff := gocmp.Diff(all[:9], all[9:18]); diff != "" {
		t.Errorf("ids (-first +again):\n%s", diff)
	}
	if diff := gocmp.Diff(all[:9], idsOf(other.all())); diff != "" {
		t.Errorf("ids (-first +aside):\n%s", diff)
	}
	if after := pgtest.Value[string](t, f.db, marks); after != before {
		t.Errorf("marked at %s, and before at %s", after, before)
	}
}

// A stream that forgets what it held before a replay that was cancelled gets it again, which is left out as long as the stream holds it.
func TestCancelledReplayIsForgotten(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	server := natstest.New(t)
	cfg := func() bridge.Config { return f.trailing(f.config(f.stream(server))) }
	r := f.runWith(cfg())
	for range 4 {
		f.put(5)
	}
	_, messages := f.streamed(server, 20)
	f.settle()
	r.stop()
	r = f.runWith(killedAt(cfg(), "stream"))
	f.awaitReplay(f.requestReplay(commitOf(t, messages[5])), sql.ReplayRunning)
	r.stop()
	if _, ok, err := sql.CancelReplay(t.Context(), f.db.Connect(t), f.slot); err != nil || !ok {
		t.Fatal(ok, err)
	}
	r = f.runWith(cfg())
	f.put(1)
	got, messages := f.streamed(server, 21)
	f.settle()
	r.stop()
	sameOrder(t, got, f.rows())

	f.forgetBehind(server, messages, 12)
	r = f.runWith(cfg())
	f.put(1)
	f.awaitBacklog(0)
	f.settle()
	r.stop()
	got, messages = f.streamed(server, int(stream(t, server).CachedInfo().State.Msgs))
	byEpoch := inEpochs(t, got, messages)
	sameOrder(t, byEpoch[1], f.rows()[:12])
	sameOrder(t, byEpoch[2], f.rows()[5:])
}

// When the trailing slot is lost in the middle of a replay, that has failed and says so, and nothing else is lost.
func TestTrailLostDuringReplay(t *testing.T) {
	t.Parallel()
	for _, where := range []string{"replay", "dropped for a copy", "copied"} {
		t.Run(where, func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, pgtest.New(t))
			server := natstest.New(t)
			cfg := func() bridge.Config { return f.trailing(f.config(f.stream(server))) }
			first := cfg()
			r := f.runWith(first)
			f.put(5)
			f.put(5)
			_, messages := f.streamed(server, 10)
			f.settle()
			r.stop()
			r = f.runWith(killedAt(cfg(), where))
			id := f.requestReplay(commitOf(t, messages[5]))
			if where != "replay" {
				f.awaitReplay(id, sql.ReplayRunning)
			}
			db := f.db.Connect(t)
			trail := replication.TrailOf(f.slot)
			pgtest.Eventually(t, patience, func() (bool, string) {
				_, err := replication.InspectSlot(t.Context(), db, f.slot)
				return where != "dropped for a copy" || errors.Is(err, replication.ErrNoSlot), "the slot is there"
			})
			r.stop()
			f.db.Exec(t, "SELECT pg_drop_replication_slot('"+trail+"')")
			f.put(5)
			last := f.config(f.stream(server))
			last.Trail = first.Trail
			r = f.runWith(last)
			replay := f.awaitReplay(id, sql.ReplayFailed)
			if !strings.Contains(replay.Detail, "trailing slot") {
				t.Errorf("it failed with %q", replay.Detail)
			}
			f.put(5)
			got, _ := f.streamed(server, 20)
			f.settle()
			r.stop()
			sameOrder(t, got, f.rows())
		})
	}
}

// Setup in the middle of a reset leaves that to the bridge: the slot that it would make lacks what the trailing one has.
func TestSetupDuringReset(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	server := natstest.New(t)
	cfg := f.trailing(f.config(f.stream(server)))
	r := f.runWith(cfg)
	f.put(5)
	f.put(5)
	_, messages := f.streamed(server, 10)
	f.settle()
	r.stop()
	r = f.runWith(killedAt(f.trailing(f.config(f.stream(server))), "dropped for a copy"))
	id := f.requestReplay(commitOf(t, messages[5]))
	db := f.db.Connect(t)
	pgtest.Eventually(t, patience, func() (bool, string) {
		_, err := replication.InspectSlot(t.Context(), db, f.slot)
		return errors.Is(err, replication.ErrNoSlot), "the slot is there"
	})
	r.stop()
	setup, err := sql.Connect(t.Context(), f.db.URL, f.slot)
	if err != nil {
		t.Fatal(err)
	}
	defer setup.Close(t.Context())
	if made, err := bridge.EnsureSlot(t.Context(), setup, cfg); made || err != nil {
		t.Errorf("made the slot: %v, %v", made, err)
	}
	if did, err := bridge.EnsureTrail(t.Context(), setup, cfg); did != "" || err != nil {
		t.Errorf("%s: %v", did, err)
	}
	f.put(1)
	r = f.runWith(f.trailing(f.config(f.stream(server))))
	f.awaitReplay(id, sql.ReplayDone)
	got, _ := f.streamed(server, 16)
	r.stop()
	sameOrder(t, got, slices.Concat(f.rows()[:10], f.rows()[5:]))
}

// A second replay begins before, or behind, the place of the first one, of whose events the stream is full.
func TestReplayOfReplay(t *testing.T) {
	t.Parallel()
	for _, shared := range []bool{false, true} {
		t.Run(fmt.Sprintf("shared %v", shared), func(t *testing.T) {
			t.Parallel()
			f := newFixture(t, pgtest.New(t))
			server := natstest.New(t)
			r := f.runWith(f.trailing(f.config(f.openStream(server, !shared))))
			for range 4 {
				f.put(5)
			}
			_, messages := f.streamed(server, 20)
			f.settle()
			var want []int64
			want = append(want, f.rows()...)
			for _, from := range []int{10, 5, 15, 0} {
				f.awaitReplay(f.requestReplay(commitOf(t, messages[from])), sql.ReplayDone)
				want = append(want, f.rows()[from:]...)
				f.put(1)
				want = append(want, f.rows()[len(f.rows())-1])
				got, _ := f.streamed(server, len(want))
				sameOrder(t, got, want)
				f.settle()
			}
			r.stop()
			r = f.runWith(f.trailing(f.config(f.openStream(server, !shared))))
			f.put(1)
			want = append(want, f.rows()[len(f.rows())-1])
			got, _ := f.streamed(server, len(want))
			f.settle()
			r.stop()
			sameOrder(t, got, want)
		})
	}
}

// The primary dies in the middle of a replay. The slot of the standby has not gone back, as servers do not synchronize that: the replay has failed
// and says so, and events go on without a gap.
func TestPromotionDuringReplay(t *testing.T) {
	t.Parallel()
	p := newPair(t, pgtest.Installation(t, 17), map[string]string{"sync_replication_slots": "on"})
	if err := p.primary.SetSetting(t.Context(), "synchronized_standby_slots", "standby"); err != nil {
		t.Fatal(err)
	}
	trail := bridge.Trail{Window: time.Hour, MaxWAL: 1 << 30}
	config := func() bridge.Config {
		cfg := p.config(p.dsn())
		cfg.Trail = trail
		return cfg
	}
	r := p.runWith(p.trailing(config()))
	p.put(5)
	p.put(5)
	p.put(5)
	_, messages := p.streamed(p.nats, 15)
	p.settle()
	done := p.requestReplay(commitOf(t, messages[10]))
	p.awaitReplay(done, sql.ReplayDone)
	p.streamed(p.nats, 20)
	p.settle()
	p.standby.WaitSynced(t, p.primary, p.slot) // while it is confirmed
	r.stop()
	r = p.runWith(killedAt(config(), "stream"))
	id := p.requestReplay(commitOf(t, messages[5]))
	p.awaitReplay(id, sql.ReplayRunning)
	db := p.db.Connect(t)
	pgtest.Eventually(t, patience, func() (bool, string) {
		record, err := sql.ReadSlot(t.Context(), db, p.slot)
		if err != nil {
			t.Fatal(err)
		}
		return !record.Reset, "it is not reset"
	})
	r.stop()
	p.standby.CatchUp(t, p.primary)
	p.failover()
	p.put(5)
	r = p.runWith(config())
	p.awaitReplay(id, sql.ReplayFailed)
	p.awaitBacklog(0)
	r.stop()
	got, messages := p.streamed(p.nats, int(stream(t, p.nats).CachedInfo().State.Msgs))
	sameOrder(t, got, slices.Concat(p.rows()[:15], p.rows()[10:15], p.rows()[15:]))
	positions(t, messages)
}

// Over HTTP, whose sink knows nothing after a restart: a replay that is killed in the middle goes on, and one that is cancelled is left out.
func TestReplayWithoutMemoryKilled(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	s := newTestSink()
	r := f.runWith(f.trailing(f.config(s)))
	f.put(5)
	f.put(5)
	s.await(t, 10)
	f.settle()
	r.stop()
	from := s.all()[5].Position.Commit
	for _, where := range []string{"replay", "dropped for a copy", "copied", "failover set", "stream"} {
		f.requestReplay(from)
		r = f.runWith(killedAt(f.trailingAgain(f.config(s)), where))
		pgtest.Eventually(t, patience, func() (bool, string) { return r.role() == bridge.RoleLeader, "it does not lead" })
		r.stop()
		if _, ok, err := sql.CancelReplay(t.Context(), f.db.Connect(t), f.slot); err != nil || !ok {
			t.Fatal(ok, err)
		}
		f.put(1)
		after := newTestSink()
		r = f.runWith(f.trailingAgain(f.config(after)))
		after.await(t, 1)
		f.awaitBacklog(0)
		f.settle()
		r.stop()
		sameOrder(t, ids(t, after.all()), f.rows()[len(f.rows())-1:])
	}

	id := f.requestReplay(from)
	first := newTestSink()
	r = f.runWith(killedAt(f.trailingAgain(f.config(first)), "stream"))
	f.awaitReplay(id, sql.ReplayRunning)
	r.stop()
	f.put(1)
	second := newTestSink()
	r = f.runWith(f.trailingAgain(f.config(second)))
	f.awaitReplay(id, sql.ReplayDone)
	r.stop()
	sameOrder(t, ids(t, second.all()), f.rows()[5:])
}

// trailingAgain is a configuration with a trailing slot that is there, or is made by the bridge.
func (f *fixture) trailingAgain(cfg bridge.Config) bridge.Config {
	cfg.Trail = bridge.Trail{Window: time.Hour, MaxWAL: 1 << 30}
	return cfg
}
