package bridge_test

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ebb/event"
	"ebb/internal/pgtest"
	"ebb/sink"
	"ebb/sql"
)

// An event that is rejected holds up what comes behind it with its key, in the dead letters, and nothing else; it is delivered from there when somebody says
// so, in order, and then its key is as any other.
func TestParked(t *testing.T) {
	everyKind(t, func(t *testing.T, f *fixture, s *parkingSink, as sink.Sink) {
		r := f.run(as)
		f.putKeyed("t", "a", 2)
		f.putKeyed("bad", "a", 1)
		f.putKeyed("t", "a", 3)
		f.putKeyed("t", "b", 2)
		f.putKeyed("bad", "", 1)
		f.putKeyed("t", "", 2)
		f.putKeyed("t", "a", 1)
		s.await(t, 6)
		f.awaitDead("parked", 6)
		f.awaitBacklog(0) // what is kept counts as delivered
		want := []string{"parked 3 refused 1", "parked 4 queued 0", "parked 5 queued 0", "parked 6 queued 0", "parked 9 refused 1", "parked 12 queued 0"}
		if got := f.letters(); !slices.Equal(slices.Sorted(slices.Values(got)), slices.Sorted(slices.Values(want))) {
			t.Errorf("kept %q, want %q", got, want)
		}
		if n := pgtest.Value[int64](t, f.db, "SELECT dead_letters FROM ebb.status"); n != 6 {
			t.Errorf("%d dead letters in ebb.status", n)
		}
		if detail := pgtest.Value[string](t, f.db, "SELECT detail FROM ebb.dead_letter WHERE event_id = '3'"); detail != "by \uFFFD the \uFFFD test" {
			t.Errorf("detail is %q", detail)
		}

		// It is rejected once more.
		f.retryAll()
		pgtest.Eventually(t, patience, func() (bool, string) {
			got := f.letters()
			return slices.Contains(got, "parked 3 refused again 2") && slices.Contains(got, "parked 9 refused again 2"), fmt.Sprint(got)
		})
		f.awaitDead("parked", 6)
		if s.count() != 6 {
			t.Errorf("%d events were delivered", s.count())
		}

		s.refuse(nil, nil)
		f.retryAll()
		s.await(t, 12)
		f.awaitDead("delivered", 6)
		f.putKeyed("t", "a", 1)
		f.putKeyed("bad", "", 1)
		s.await(t, 14)
		f.awaitBacklog(0)
		r.stop()
		f.inOrderByKey(s.all(), true)
		for _, e := range s.all() {
			want := event.Streamed
			if n := ids(t, []event.Event{e})[0]; n >= 3 && n <= 6 || n == 9 {
				want = event.Retried
			}
			// The last ones of key a may come when its queue is all but empty.
			if n := ids(t, []event.Event{e})[0]; e.Origin != want && n != 12 && n != 13 {
				t.Errorf("event %d has origin %q", n, e.Origin)
			}
		}
		if n := pgtest.Value[int64](t, f.db, "SELECT dead_letters FROM ebb.status"); n != 0 {
			t.Errorf("%d dead letters in ebb.status", n)
		}
		s.rejects = isBad
		r = f.run(as)
		f.putKeyed("t", "a", 1)
		s.await(t, 15)
		f.awaitBacklog(0)
		r.stop()
		f.inOrderByKey(s.all(), s.exact)
	})
}

// putUnderLoad puts events of five keys, each by a session of its own, until stop is called, about one in so many of which is bad.
func (f *fixture) putUnderLoad(oneIn int) (stop func()) {
	f.t.Helper()
	done := make(chan struct{})
	var all sync.WaitGroup
	for i := range 5 {
		db := f.db.Connect(f.t)
		all.Go(func() {
			random := rand.New(rand.NewPCG(uint64(i), 7))
			for {
				select {
				case <-done:
					return
				default:
				}
				topic := "t"
				if random.IntN(oneIn) == 0 {
					topic = "bad"
				}
				if _, err := db.Exec(f.t.Context(), "INSERT INTO ebb.buffer (topic, key, payload) SELECT $1, $2, '{}' FROM generate_series(1, $3)",
					topic, fmt.Sprint("k", i), 1+random.IntN(3)); err != nil {
					f.t.Error(err)
					return
				}
				time.Sleep(time.Duration(4+random.IntN(8)) * time.Millisecond) // the pace of the producer
			}
		})
	}
	return func() {
		close(done)
		all.Wait()
	}
}

// While events of its key keep coming, a queue is parked, retried, parked again and retried until it is empty: none overtakes another, and each is
// delivered once.
func TestUnparkedUnderLoad(t *testing.T) {
	everyKind(t, func(t *testing.T, f *fixture, s *parkingSink, as sink.Sink) {
		r := f.run(as)
		stop := f.putUnderLoad(30)
		var rejected atomic.Int64
		half := func(e *event.Event) bool { return isBad(e) && rejected.Add(1)%2 == 0 }
		for i := range 15 {
			switch i % 3 {
			case 0:
				s.refuse(isBad, nil)
				pgtest.Eventually(t, patience, func() (bool, string) {
					return pgtest.Value[bool](t, f.db, "SELECT EXISTS (SELECT FROM ebb.dead_letter WHERE state = 'parked')"), "nothing is parked"
				})
			case 1:
				s.refuse(half, nil)
			case 2:
				s.refuse(nil, nil)
			}
			f.retryAll()
			if i%3 != 2 {
				continue // all keys may be held
			}
			want := s.count() + 10
			pgtest.Eventually(t, patience, func() (bool, string) {
				f.retryAll()
				return s.count() >= want, "it does not go on"
			})
		}
		stop()
		s.refuse(nil, nil)
		f.awaitBacklog(0)
		f.retryUntilNone()
		r.stop()
		f.inOrderByKey(s.all(), true)
		kept := pgtest.Value[int64](t, f.db, "SELECT count(*) FROM ebb.dead_letter WHERE state = 'delivered'")
		if all := int64(s.count()); kept == 0 || kept == all {
			t.Errorf("%d of %d events were delivered from the dead letters", kept, all)
		}
	})
}

// A bridge that is killed anywhere, again and again, keeps the order of each key and loses nothing; a sink that knows what it holds gets nothing twice.
func TestDeadLettersAreInterrupted(t *testing.T) {
	everyKind(t, func(t *testing.T, f *fixture, s *parkingSink, as sink.Sink) {
		stop := f.putUnderLoad(20)
		places := []string{"park", "parked", "read", "retried", "settled"}
		died := map[string]int{}
		rounds := 2
		if testing.Short() {
			rounds = 1
		}
		for i := range rounds * len(places) {
			place := places[i%len(places)]
			cfg := f.config(as)
			var n atomic.Int64
			killed := make(chan struct{})
			cfg.InterruptAt(func(at string) error {
				if at != place {
					return nil
				}
				switch n.Add(1) {
				case int64(1 + i/len(places)):
					close(killed)
					return errKilled
				default:
					return nil
				}
			})
			s.refuse(isBad, nil)
			if i%2 == 1 {
				s.refuse(func(e *event.Event) bool { return isBad(e) && rand.IntN(2) == 0 }, nil)
			}
			r := f.runWith(cfg)
			pgtest.Eventually(t, patience, func() (bool, string) {
				f.retryAll()
				select {
				case <-killed:
					return true, ""
				default:
					return false, "never at " + place
				}
			})
			died[place]++
			r.cancel()
			<-r.done
		}
		stop()
		t.Logf("killed at %v", died)
		s.refuse(nil, nil)
		r := f.run(as)
		f.awaitBacklog(0)
		f.retryUntilNone()
		r.stop()
		f.inOrderByKey(s.all(), s.exact)
	})
}

// A sink that dies, right after what it has stored, in the middle of what is retried as well.
func TestSinkDiesWhileItRetries(t *testing.T) {
	everyKind(t, func(t *testing.T, f *fixture, s *parkingSink, as sink.Sink) {
		f.putKeyed("bad", "a", 1)
		f.putKeyed("t", "a", 300)
		f.putKeyed("t", "b", 50)
		r := f.run(as)
		f.awaitDead("parked", 301)
		f.awaitBacklog(0)
		r.stop()
		s.refuse(nil, nil)
		deaths := 0
		s.dies = func(stored int) bool {
			if stored%150 != 0 {
				return false
			}
			deaths++
			return true
		}
		f.retryAll()
		for pgtest.Value[int64](t, f.db, "SELECT count(*) FROM ebb.dead_letter WHERE state = 'retrying'") > 0 && deaths < 30 {
			r = f.run(as)
			pgtest.Eventually(t, patience, func() (bool, string) {
				select {
				case <-r.done:
					return true, ""
				default:
				}
				return pgtest.Value[int64](t, f.db, "SELECT count(*) FROM ebb.dead_letter WHERE state = 'retrying'") == 0, "letters are left"
			})
			r.cancel()
			<-r.done
		}
		if deaths < 2 || deaths == 30 {
			t.Errorf("the sink died %d times", deaths)
		}
		f.awaitDead("delivered", 301)
		f.inOrderByKey(s.all(), s.exact)
	})
}

// What is not rejected is delivered as soon as that is possible, without anybody's doing.
func TestRetriedByItself(t *testing.T) {
	everyKind(t, func(t *testing.T, f *fixture, s *parkingSink, as sink.Sink) {
		s.refuse(nil, isBad)
		cfg := f.config(as)
		cfg.RetryAfter(100 * time.Millisecond)
		r := f.runWith(cfg)
		f.putKeyed("bad", "a", 1)
		f.putKeyed("t", "a", 3)
		f.putKeyed("bad", "", 1)
		f.putKeyed("t", "b", 3)
		s.await(t, 3)
		f.awaitDead("retrying", 5)
		pgtest.Eventually(t, patience, func() (bool, string) {
			got := f.letters()
			again := 0
			for _, letter := range got {
				if strings.Contains(letter, "retrying 1 refused again ") || strings.Contains(letter, "retrying 5 refused again ") {
					again++
				}
			}
			return again == 2, fmt.Sprint(got)
		})
		f.putKeyed("t", "a", 1)
		f.awaitDead("retrying", 6)
		s.refuse(nil, nil)
		s.await(t, 9)
		f.awaitDead("delivered", 6)
		f.putKeyed("t", "a", 1)
		s.await(t, 10)
		f.awaitBacklog(0)
		r.stop()
		f.inOrderByKey(s.all(), true)
	})
}

// What is discarded is not delivered, and what is behind it is, where somebody says so.
func TestDiscarded(t *testing.T) {
	everyKind(t, func(t *testing.T, f *fixture, s *parkingSink, as sink.Sink) {
		r := f.run(as)
		f.putKeyed("bad", "a", 1)
		f.putKeyed("bad", "b", 1)
		f.putKeyed("t", "a", 2)
		f.awaitDead("parked", 4)
		f.decide("UPDATE ebb.dead_letter SET state = 'discarded' WHERE topic = 'bad'; UPDATE ebb.dead_letter SET state = 'retrying' WHERE state = 'parked'")
		s.await(t, 2)
		f.awaitDead("delivered", 2)
		for _, key := range []string{"a", "b"} { // which are let go of in a moment
			f.putKeyed("t", key, 1)
			f.awaitDead("parked", 0)
		}
		s.await(t, 4)
		pgtest.Eventually(t, patience, func() (bool, string) {
			before := s.count()
			f.putKeyed("t", "b", 1)
			s.await(t, before+1)
			last := s.all()[before]
			return last.Origin == event.Streamed, "key b is held for ever"
		})
		f.awaitBacklog(0)
		r.stop()
	})
}

// Rows of tables of one's own are recorded when their events are kept.
func TestParkedRowsAreRecorded(t *testing.T) {
	t.Parallel()
	f := newOwnFixture(t, pgtest.New(t), own("marked", sql.Mark), own("gone", sql.Delete))
	f.create("marked", "gone")
	f.mustSetup()
	s, as := newParkingSink(true)
	s.refuse(func(e *event.Event) bool { return strings.IndexByte("02468ace", e.ID[len(e.ID)-1]) >= 0 }, nil)
	r := f.run(as)
	f.insert("marked", 10)
	f.insert("gone", 10)
	f.left(0, "marked WHERE done_at IS NULL")
	f.left(0, "gone")
	kept := pgtest.Value[int64](t, f.db, "SELECT count(*) FROM ebb.dead_letter")
	if kept == 0 || kept+int64(s.count()) != 20 {
		t.Errorf("%d are kept and %d delivered, of 20", kept, s.count())
	}
	s.refuse(nil, nil)
	f.retryAll()
	s.await(t, 20)
	r.stop()
	eachOnce(t, s.all(), "marked", 10)
	eachOnce(t, s.all(), "gone", 10)
}

// A replay delivers again what was delivered, from the dead letters or not. What is parked stays so, behind what it is behind; what is discarded stays
// away.
func TestReplayWithDeadLetters(t *testing.T) {
	everyKind(t, func(t *testing.T, f *fixture, s *parkingSink, as sink.Sink) {
		r := f.runWith(f.trailing(f.config(as)))
		f.putKeyed("t", "b", 1)
		f.putKeyed("bad", "delivered", 1) // 2
		f.putKeyed("t", "delivered", 1)
		f.putKeyed("bad", "discarded", 1) // 4
		f.putKeyed("t", "discarded", 1)
		f.putKeyed("bad", "parked", 1) // 6
		f.putKeyed("t", "parked", 2)
		f.putKeyed("bad", "", 3) // 9 is delivered, 10 discarded, 11 parked
		f.putKeyed("t", "b", 1)
		f.awaitDead("parked", 10)
		s.refuse(func(e *event.Event) bool { return isBad(e) && (string(e.Key) == "parked" || string(e.ID) == "11") }, nil)
		f.decide("UPDATE ebb.dead_letter SET state = 'discarded' WHERE event_id IN ('4', '10')")
		f.decide("UPDATE ebb.dead_letter SET state = 'retrying' WHERE event_id IN ('2', '3', '5', '9')")
		s.await(t, 6)
		f.awaitDead("delivered", 4)
		f.settle()
		before := s.count()

		from, err := event.ParseLSN(pgtest.Value[string](t, f.db, "SELECT split_part(place, ':', 1) FROM ebb.dead_letter WHERE event_id = '2'"))
		if err != nil {
			t.Fatal(err)
		}
		f.awaitReplay(f.requestReplay(from), sql.ReplayDone)
		f.putKeyed("t", "parked", 1)
		f.putKeyed("t", "discarded", 1)
		s.await(t, before+6)
		f.awaitBacklog(0)
		want := []string{"delivered 2 refused 2", "delivered 3 queued 1", "discarded 4 refused 1", "delivered 5 queued 1", "delivered 9 refused 2",
			"discarded 10 refused 1", "parked 6 refused 1", "parked 7 queued 0", "parked 8 queued 0", "parked 11 refused 1", "parked 13 queued 0"}
		if got := f.letters(); !slices.Equal(got, want) {
			t.Errorf("kept\n%q, want\n%q", got, want)
		}
		again := map[int64]event.Origin{}
		for _, e := range s.all()[before:] {
			again[ids(t, []event.Event{e})[0]] = e.Origin
		}
		if want := map[int64]event.Origin{2: "", 3: "", 5: "", 9: "", 12: "", 14: ""}; len(s.all()) != before+6 || !maps.Equal(again, want) {
			t.Errorf("delivered again %v, want %v", again, want)
		}

		s.refuse(nil, nil)
		f.retryUntilNone()
		s.await(t, before+11)
		f.putKeyed("t", "parked", 1)
		s.await(t, before+12)
		f.awaitBacklog(0)
		r.stop()
		var parked []int64
		for _, e := range s.all() {
			if string(e.Key) == "parked" {
				parked = append(parked, ids(t, []event.Event{e})[0])
				if replayed := e.Replay != 0; replayed != (len(parked) <= 3) || e.Position.Epoch != 2 {
					t.Errorf("event %s carries replay %d and position %s", e.ID, e.Replay, e.Position)
				}
			}
		}
		if !slices.Equal(parked, []int64{6, 7, 8, 13, 15}) {
			t.Errorf("of the parked key, %v were delivered", parked)
		}
	})
}

// A leader that was frozen while it kept an event, and wakes when another one leads, keeps nothing; the other one does.
func TestFrozenLeaderParksNothing(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	s, as := newParkingSink(true)
	cfg := f.config(as)
	frozen, woken := make(chan struct{}), make(chan struct{})
	var times atomic.Int64
	kept := make(chan int64, 10)
	cfg.InterruptAt(func(place string) error {
		if place == "park" {
			switch times.Add(1) {
			case 1:
				close(frozen)
				<-woken
			case 2:
				kept <- pgtest.Value[int64](t, f.db, "SELECT count(*) FROM ebb.dead_letter")
			}
		}
		return nil
	})
	r := f.runWith(cfg)
	f.putKeyed("bad", "a", 1)
	<-frozen
	f.db.Exec(t, "UPDATE ebb.slot SET term = term + 1") // as another one does that leads
	close(woken)
	if n := <-kept; n != 0 {
		t.Errorf("%d letters were kept by the one that had lost the lead", n)
	}
	f.awaitDead("parked", 1)
	s.refuse(nil, nil)
	f.retryAll()
	s.await(t, 1)
	f.awaitBacklog(0)
	r.stop()
	f.inOrderByKey(s.all(), true)
}

// The session of the dead letters is ended, whatever it does, and the bridge begins again.
func TestSessionOfDeadLettersIsEnded(t *testing.T) {
	everyKind(t, func(t *testing.T, f *fixture, s *parkingSink, as sink.Sink) {
		r := f.run(as)
		stop := f.putUnderLoad(20)
		db := f.db.Connect(t)
		for i := range 4 {
			want := s.count() + 20
			pgtest.Eventually(t, patience, func() (bool, string) {
				f.retryAll()
				var ended int
				if err := db.QueryRow(t.Context(), `SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
					WHERE application_name = $1 AND backend_type = 'client backend' AND query LIKE '%dead\_letter%'`, f.slot).Scan(&ended); err != nil {
					t.Fatal(err)
				}
				return ended > 0, "there is no such session"
			})
			if i%2 == 0 {
				s.refuse(nil, nil)
			}
			pgtest.Eventually(t, patience, func() (bool, string) {
				f.retryAll()
				return s.count() >= want, "it does not go on"
			})
			s.refuse(isBad, nil)
		}
		stop()
		s.refuse(nil, nil)
		f.awaitBacklog(0)
		f.retryUntilNone()
		r.stop()
		f.inOrderByKey(s.all(), s.exact)
	})
}

// While an event waits to be kept, as the table is locked, other keys go on, and nothing behind it is confirmed.
func TestOthersGoOnWhileAnEventIsKept(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	s, as := newParkingSink(false)
	r := f.run(as)
	f.putKeyed("t", "b", 1)
	s.await(t, 1)
	f.awaitBacklog(0)
	tx, err := f.db.Connect(t).Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := tx.Exec(t.Context(), "LOCK TABLE ebb.dead_letter IN SHARE ROW EXCLUSIVE MODE"); err != nil {
		t.Fatal(err)
	}
	f.putKeyed("bad", "a", 1)
	f.putKeyed("t", "b", 10)
	f.putKeyed("t", "a", 10)
	s.await(t, 11)
	time.Sleep(300 * time.Millisecond) // three ticks
	if n := pgtest.Value[int64](t, f.db, "SELECT count(*) FROM ebb.backlog"); n != 21 {
		t.Errorf("%d events are in the backlog while one is neither delivered nor kept, want 21", n)
	}
	if err := tx.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.awaitDead("parked", 11)
	f.awaitBacklog(0)
	db := f.db.Connect(t)
	pgtest.Eventually(t, patience, func() (bool, string) {
		f.db.Exec(t, "SELECT pg_logical_emit_message(false, 'x', 'y')")
		slot := f.inspect(db)
		letters, err := event.ParseLSN(pgtest.Value[string](t, f.db, "SELECT max(split_part(place, ':', 1)::pg_lsn)::text FROM ebb.dead_letter"))
		if err != nil {
			t.Fatal(err)
		}
		return slot.ConfirmedFlush > letters, fmt.Sprintf("%s is confirmed, and the last letter is of %s", slot.ConfirmedFlush, letters)
	})
	r.stop()
}

// Nothing is confirmed between the place of an event that is parked and that of its letter: of a standby that came no further, neither would be left.
func TestNothingIsConfirmedBetweenAnEventAndItsLetter(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	_, as := newParkingSink(false)
	r := f.run(as)
	db := f.db.Connect(t)
	// A standby that copies the slot has one.
	f.db.Exec(t, "SELECT pg_create_physical_replication_slot('"+f.slot+"_standby')")
	defer f.db.Exec(t, "SELECT pg_drop_replication_slot('"+f.slot+"_standby')")
	var write, flush string
	for began, seen := time.Now(), false; !seen; {
		if time.Since(began) > patience {
			t.Fatal("what is confirmed is always as much as what is delivered")
		}
		f.db.Exec(t, "INSERT INTO ebb.buffer (topic, key, payload) VALUES ('bad', 'k', '{}')", "INSERT INTO ebb.buffer (topic, payload) VALUES ('t', '{}')")
		pgtest.Eventually(t, patience, func() (bool, string) {
			if err := db.QueryRow(t.Context(), `SELECT coalesce(max(write_lsn), '0/0')::text, coalesce(max(flush_lsn), '0/0')::text,
					coalesce(bool_or(flush_lsn < write_lsn), false) FROM pg_stat_replication WHERE application_name = $1`, f.slot).Scan(&write, &flush, &seen); err != nil {
				t.Fatal(err)
			}
			waiting := pgtest.Value[int64](t, f.db, "SELECT count(*) FROM ebb.backlog")
			return seen || waiting == 0, fmt.Sprintf("%d events are in the backlog", waiting)
		})
	}
	if n := pgtest.Value[int64](t, f.db, "SELECT count(*) FROM ebb.dead_letter WHERE split_part(place, ':', 1) = $1", flush); n == 0 {
		t.Errorf("%s is delivered and %s confirmed, where no event is that was parked", write, flush)
	}
	f.awaitBacklog(0)
	r.stop()
}

// What a destination has forgotten of what was retried is retried again, and what it has of that and nobody has recorded is not.
func TestRetriedIsForgotten(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	s, as := newParkingSink(true)
	f.putKeyed("t", "b", 5)
	f.putKeyed("bad", "a", 1)
	f.putKeyed("t", "a", 4)
	r := f.run(as)
	s.await(t, 5)
	f.awaitDead("parked", 5)
	s.refuse(nil, nil)
	f.retryAll()
	f.awaitDead("delivered", 5)
	f.settle()
	r.stop()
	s.testSink.mu.Lock()
	s.events = s.events[:7] // of those that were retried, two are left
	s.testSink.mu.Unlock()
	r = f.run(as)
	s.await(t, 10)
	f.awaitDead("delivered", 5)
	f.settle()
	r.stop()
	f.inOrderByKey(s.all(), true)
}

// A destination that has forgotten events of a key, some of which were retried and some not, gets them again in their order.
func TestForgottenInOrder(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	s, as := newParkingSink(true)
	r := f.runWith(f.trailing(f.config(as)))
	f.putKeyed("bad", "a", 1)
	f.putKeyed("t", "b", 5)
	s.await(t, 5)
	f.awaitDead("parked", 1)
	f.settle()
	kept := s.count()
	last := s.all()[kept-1].Position
	for i := range 2 { // of key a, some are retried, then some streamed, and once more
		s.refuse(isBad, nil)
		f.putKeyed("bad", "a", 1)
		f.putKeyed("t", "a", 2)
		f.awaitDead("parked", int64(4-i)) // with the first one
		s.refuse(nil, nil)
		f.retryAll()
		f.awaitDead("delivered", int64(4+3*i))
		pgtest.Eventually(t, patience, func() (bool, string) {
			f.putKeyed("t", "a", 1)
			f.awaitBacklog(0)
			f.awaitDead("retrying", 0)
			all := s.all()
			return all[len(all)-1].Origin == event.Streamed, "the key is still held"
		})
	}
	s.refuse(isBad, nil)
	f.putKeyed("t", "c", 1) // and one of another key before what is parked
	f.putKeyed("bad", "c", 1)
	f.awaitDead("parked", 1)
	f.settle()
	r.stop()
	s.testSink.mu.Lock()
	s.events, s.last = s.events[:kept], last
	s.testSink.mu.Unlock()
	s.refuse(nil, nil)
	r = f.runWith(f.trailing(f.config(as)))
	s.await(t, len(f.rows())-2)
	f.awaitBacklog(0)
	f.retryUntilNone()
	s.await(t, len(f.rows()))
	r.stop()
	f.inOrderByKey(s.all(), true)
}

// The same where no tick had recorded yet what is forgotten.
func TestForgottenBeforeATick(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	s, as := newParkingSink(true)
	f.putKeyed("t", "b", 2)
	r := f.run(as)
	s.await(t, 2)
	f.settle()
	r.stop()
	last := s.all()[1].Position
	cfg := f.config(as)
	cfg.TickEvery = time.Hour
	r = f.runWith(cfg)
	f.putKeyed("t", "a", 2)
	f.putKeyed("bad", "a", 1)
	f.putKeyed("t", "a", 1)
	f.awaitDead("parked", 2)
	s.await(t, 4)
	r.stop()
	s.testSink.mu.Lock()
	s.events, s.last = s.events[:2], last
	s.testSink.mu.Unlock()
	s.refuse(nil, nil)
	r = f.run(as)
	f.awaitBacklog(0)
	f.retryUntilNone()
	s.await(t, 6)
	r.stop()
	f.inOrderByKey(s.all(), true)
}

// A recovery parks as the stream does, and holds the keys.
func TestRecoveryParks(t *testing.T) {
	everyKind(t, func(t *testing.T, f *fixture, s *parkingSink, as sink.Sink) {
		f.putKeyed("t", "b", 3)
		f.putKeyed("bad", "a", 1)
		f.putKeyed("t", "a", 3)
		f.putKeyed("bad", "", 1)
		f.db.Exec(t, "SELECT pg_drop_replication_slot('"+f.slot+"')")
		r := f.run(as)
		f.awaitDead("parked", 5)
		f.putKeyed("t", "a", 1)
		f.putKeyed("t", "b", 1)
		s.await(t, 4)
		f.awaitDead("parked", 6)
		f.awaitBacklog(0)
		s.refuse(nil, nil)
		f.retryAll()
		s.await(t, 10)
		f.awaitDead("delivered", 6)
		f.putKeyed("t", "a", 1)
		s.await(t, 11)
		f.awaitBacklog(0)
		r.stop()
		r = f.run(as)
		f.putKeyed("t", "a", 1)
		s.await(t, 12)
		f.awaitBacklog(0)
		r.stop()
		f.inOrderByKey(s.all(), true)
	})
}

// An event that was recovered from a row without an id has one that is made of its primary key, which may be longer than that of any row's own.
func TestRetriedWithALongID(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	s, as := newParkingSink(true)
	r := f.run(as)
	f.putKeyed("bad", "a", 1)
	f.awaitDead("parked", 1)
	f.decide("UPDATE ebb.dead_letter SET event_id = 'public.t/' || repeat('k', 1200)")
	s.refuse(nil, nil)
	f.retryAll()
	s.await(t, 1)
	f.awaitDead("delivered", 1)
	r.stop()
	if id := string(s.all()[0].ID); len(id) != 1209 {
		t.Errorf("delivered %q", id)
	}
}

// A bridge that is to block asks the dead letters for what is there, and delivers it, and its sink is told not to park.
func TestBlockedEventsAreNotParked(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	s, as := newParkingSink(true)
	r := f.run(as)
	f.putKeyed("bad", "a", 1)
	f.awaitDead("parked", 1)
	f.awaitBacklog(0)
	r.stop()
	s.refuse(nil, nil)
	blocking := &blockingSink{s, make(chan bool, 100)}
	cfg := f.config(blocking)
	cfg.Block = true
	r = f.runWith(cfg)
	f.putKeyed("t", "a", 2)
	f.awaitDead("parked", 3)
	f.retryAll()
	s.await(t, 3)
	f.awaitBacklog(0)
	r.stop()
	f.inOrderByKey(s.all(), true)
	for len(blocking.parks) > 0 {
		if <-blocking.parks {
			t.Error("the sink is told to park")
		}
	}
}

// blockingSink says whether its Outcome parks.
type blockingSink struct {
	*parkingSink
	parks chan bool
}

func (s *blockingSink) Run(ctx context.Context, in <-chan *event.Batch, out sink.Outcome) error {
	s.parks <- out.Parks()
	return s.parkingSink.Run(ctx, in, out)
}

// Many events of a key that is held, and many keys: what is behind them is delivered, by few commits, and all of it can be retried.
func TestManyAreParked(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	s, as := newParkingSink(true)
	n := 10_000
	if testing.Short() {
		n = 5_000
	}
	f.putKeyed("bad", "hot", 1)
	f.db.Exec(t, fmt.Sprintf("INSERT INTO ebb.buffer (topic, key, payload) SELECT 't', 'hot', to_json(repeat('x', 200)) FROM generate_series(1, %d)", n),
		"INSERT INTO ebb.buffer (topic, key, payload) SELECT 'bad', 'k' || i, '{}' FROM generate_series(1, 500) i")
	f.putKeyed("t", "other", 1)
	began := time.Now()
	r := f.run(as)
	s.await(t, 1)
	f.awaitBacklog(0)
	t.Logf("%d events were parked in %s", n+501, time.Since(began).Round(time.Millisecond))
	r.stop()
	commits := pgtest.Value[int64](t, f.db, "SELECT count(DISTINCT xmin::text) FROM ebb.dead_letter")
	if commits > int64(n/100) {
		t.Errorf("%d commits", commits)
	}
	s.refuse(nil, nil)
	began = time.Now()
	r = f.run(as)
	f.retryAll()
	s.await(t, n+502)
	f.awaitDead("delivered", int64(n+501))
	t.Logf("and retried in %s", time.Since(began).Round(time.Millisecond))
	r.stop()
	f.inOrderByKey(s.all(), true)
}
