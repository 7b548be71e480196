package bridge_test

import (
	"fmt"
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
		if got := f.letters(); !slices.Equal(got, want) {
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
			if n := ids(t, []event.Event{e})[0]; e.Origin != want && n != 12 {
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
				time.Sleep(time.Duration(random.IntN(3)) * time.Millisecond) // the pace of the producer
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
		for i := range 30 {
			switch i % 3 {
			case 0:
				s.refuse(half, nil)
			case 1:
				s.refuse(nil, nil)
			case 2:
				s.refuse(isBad, nil)
			}
			f.retryAll()
			s.await(t, 20*i)
			time.Sleep(10 * time.Millisecond) // for the events to be others than those that were waited for
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
		for i := range 3 * len(places) {
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
		r := f.run(as)
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
	s.refuse(func(e *event.Event) bool { return string(e.ID)[len(e.ID)-1] == '3' }, nil)
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
