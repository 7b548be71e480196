package sql_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"ebb/internal/pgtest"
	"ebb/sql"
)

// setAside inserts dead letters of slot s, each written as "id key reason state", where a key of - is none.
func setAside(t *testing.T, db *pgtest.Database, letters ...string) {
	t.Helper()
	for i, l := range letters {
		f := strings.Fields(l)
		db.Exec(t, fmt.Sprintf(`INSERT INTO ebb.dead_letter (slot, event_id, topic, key, payload, content_type, headers, event_time, position, place, epoch, reason, detail,
				attempts, first_at, last_at, state)
			SELECT 's', '%[1]s', 't.' || left('%[1]s', 1), nullif('%[2]s', '-'), '{"id":  "%[1]s"}', 'application/json', '{"h": "v"}', 'epoch',
				'1:' || place, place, 1, '%[3]s', 'because of %[1]s', ('%[3]s' <> 'queued')::int, at, at, '%[4]s'
			FROM (SELECT '0/' || to_hex(count(*) + 16) || ':1', timestamptz '2026-01-01 00:00Z' + make_interval(mins => %[5]d) FROM ebb.dead_letter) x (place, at)`,
			f[0], f[1], f[2], f[3], i))
	}
}

// letters are the states of all rows, in order, as "id:state".
func letters(t *testing.T, db *pgtest.Database) string {
	t.Helper()
	return pgtest.Value[string](t, db, "SELECT coalesce(string_agg(event_id || ':' || state, ' ' ORDER BY number), '') FROM ebb.dead_letter")
}

func at(minute int) time.Time { return time.Date(2026, 1, 1, 0, minute, 0, 0, time.UTC) }

// An event is retried with its queue, and one without a key alone.
func TestRetryDead(t *testing.T) {
	db := pgtest.New(t)
	apply(t, db, setup)
	conn := db.Connect(t)
	for _, c := range []struct {
		name   string
		filter sql.DeadFilter
		want   string // the ids that are retried
		asked  int64
		queues int64
	}{
		{"all", sql.DeadFilter{}, "a1 b1 a2 x y a3 shared shared", 8, 6},
		{"the head", sql.DeadFilter{IDs: []string{"a1"}}, "a1 a2 a3", 1, 1},
		{"the last of a queue", sql.DeadFilter{IDs: []string{"a3"}}, "a1 a2 a3", 1, 1},
		{"an id twice", sql.DeadFilter{IDs: []string{"b1", "b1"}}, "b1", 1, 1},
		{"without a key", sql.DeadFilter{IDs: []string{"x"}}, "x", 1, 1},
		{"ids that are shared", sql.DeadFilter{IDs: []string{"shared"}}, "shared shared", 2, 2},
		{"topic", sql.DeadFilter{Topics: []string{"t.x", "t.y"}}, "x y", 2, 2},
		{"key", sql.DeadFilter{Keys: []string{"b", "none"}}, "b1", 1, 1},
		{"reason", sql.DeadFilter{Reasons: []string{"queued"}}, "a1 a2 a3", 2, 1},
		{"since", sql.DeadFilter{Since: at(5)}, "a1 a2 a3 shared shared", 3, 3},
		{"all that is given counts", sql.DeadFilter{IDs: []string{"a1", "b1"}, Since: at(0)}, "a1 b1 a2 a3", 2, 2},
		{"nothing", sql.DeadFilter{Topics: []string{"none"}}, "", 0, 0},
		{"no empty key", sql.DeadFilter{Keys: []string{""}}, "", 0, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			db.Exec(t, "DELETE FROM ebb.dead_letter")
			setAside(t, db, "a1 a rejected parked", "b1 b rejected parked", "a2 a queued parked", "x - rejected parked", "y - rejected parked", "a3 a queued parked",
				"shared - rejected parked", "shared c rejected parked", "d1 a rejected delivered", "d2 a rejected discarded")
			db.Exec(t, `INSERT INTO ebb.dead_letter (slot, event_id, topic, key, content_type, event_time, position, place, epoch, reason, attempts, first_at, last_at, state)
				SELECT 'other', event_id, topic, key, content_type, event_time, position, place, epoch, reason, attempts, first_at, last_at, 'parked' FROM ebb.dead_letter`)
			before := letters(t, db)
			r, err := sql.RetryDead(t.Context(), conn, "s", c.filter)
			if err != nil {
				t.Fatal(err)
			}
			if r.Asked != c.asked || r.Queues != c.queues {
				t.Errorf("%d were asked for in %d queues, want %d in %d", r.Asked, r.Queues, c.asked, c.queues)
			}
			if !slices.IsSorted(r.Numbers) {
				t.Errorf("not in order: %d", r.Numbers)
			}
			got := pgtest.Value[string](t, db, `SELECT coalesce(string_agg(event_id, ' ' ORDER BY number), '') FROM ebb.dead_letter
				WHERE number = ANY ($1) AND slot = 's' AND decided_by = session_user AND decided_at > now() - interval '1 minute'`, r.Numbers)
			if got != c.want {
				t.Errorf("retried %q, want %q", got, c.want)
			}
			states := pgtest.Value[string](t, db, `SELECT coalesce(string_agg(event_id || ':' || state, ' ' ORDER BY number), '') FROM
				(SELECT number, event_id, CASE WHEN number = ANY ($1) AND state = 'retrying' THEN 'parked' ELSE state END FROM ebb.dead_letter) r (number, event_id, state)`, r.Numbers)
			if states != before {
				t.Errorf("others have changed: %s, want %s", states, before)
			}
		})
	}
}

// What is settled is said of ids, and nothing is changed when one of them cannot be had.
func TestRetryDeadThatIsSettled(t *testing.T) {
	db := pgtest.New(t)
	apply(t, db, setup)
	conn := db.Connect(t)
	setAside(t, db, "a1 a rejected parked", "d a rejected delivered", "gone a rejected discarded", "again - rejected delivered", "again - rejected parked", "r - rejected retrying")
	before := letters(t, db)
	for id, want := range map[string]error{"none": sql.ErrNoDeadEvent, "gone": sql.ErrDiscarded} {
		_, err := sql.RetryDead(t.Context(), conn, "s", sql.DeadFilter{IDs: []string{"a1", id}})
		if !errors.Is(err, want) || !strings.Contains(err.Error(), `"`+id+`"`) {
			t.Errorf("%s: %v, want %v", id, err, want)
		}
	}
	if _, err := sql.RetryDead(t.Context(), conn, "s", sql.DeadFilter{IDs: []string{"a1"}, Topics: []string{"t.d"}}); !errors.Is(err, sql.ErrNoDeadEvent) {
		t.Errorf("an id that another filter leaves out: %v", err)
	}
	if after := letters(t, db); after != before {
		t.Errorf("changed to %s", after)
	}
	r, err := sql.RetryDead(t.Context(), conn, "s", sql.DeadFilter{IDs: []string{"d", "again", "r"}})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(sql.DeadRetry{Numbers: []int64{5, 6}, Asked: 2, Queues: 2, Delivered: []string{"d"}}, r); diff != "" {
		t.Error(diff)
	}
	if after := letters(t, db); after != "a1:parked d:delivered gone:discarded again:delivered again:retrying r:retrying" {
		t.Errorf("now %s", after)
	}
	parked, retrying, err := sql.CountDead(t.Context(), conn, "s")
	if parked != 1 || retrying != 2 || err != nil {
		t.Errorf("%d parked and %d retrying, %v", parked, retrying, err)
	}

	db.Exec(t, "UPDATE ebb.dead_letter SET state = 'delivered' WHERE number = 5", "UPDATE ebb.dead_letter SET state = 'parked', reason = 'odd', detail = 'it is' WHERE number = 1")
	done, err := sql.RetriedDead(t.Context(), conn, []int64{1, 5, 6, 99})
	if err != nil {
		t.Fatal(err)
	}
	key := "a"
	want := []sql.DeadDone{{Number: 1, State: sql.DeadParked, EventID: "a1", Key: &key, Reason: "odd", Detail: "it is"},
		{Number: 5, State: sql.DeadDelivered, EventID: "again", Reason: "rejected", Detail: "because of again"}, {Number: 99}}
	if diff := cmp.Diff(want, done); diff != "" {
		t.Error(diff)
	}
}

// What was queued behind a head that is discarded goes on, and what was refused itself does not.
func TestDiscardDead(t *testing.T) {
	db := pgtest.New(t)
	apply(t, db, setup)
	conn := db.Connect(t)
	listener := db.Connect(t)
	if _, err := listener.Exec(t.Context(), "LISTEN ebb_dead"); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name    string
		letters []string
		ids     []string
		want    string
		freed   int64
	}{
		{"the head", []string{"a1 a rejected parked", "a2 a queued parked", "a3 a queued parked"}, []string{"a1"}, "a1:discarded a2:retrying a3:retrying", 2},
		{"the head and the next one", []string{"a1 a rejected parked", "a2 a queued parked", "a3 a queued parked"}, []string{"a1", "a2"},
			"a1:discarded a2:discarded a3:retrying", 1},
		{"the whole queue", []string{"a1 a rejected parked", "a2 a queued parked"}, []string{"a1", "a2"}, "a1:discarded a2:discarded", 0},
		{"one behind", []string{"a1 a rejected parked", "a2 a queued parked", "a3 a queued parked"}, []string{"a2"}, "a1:parked a2:discarded a3:parked", 0},
		{"the next one was refused as well", []string{"a1 a rejected parked", "a2 a rejected parked", "a3 a queued parked"}, []string{"a1"},
			"a1:discarded a2:parked a3:parked", 0},
		{"one that is being retried", []string{"a1 a rejected retrying", "a2 a queued retrying"}, []string{"a1"}, "a1:discarded a2:retrying", 0},
		{"others are left alone", []string{"a1 a rejected parked", "b1 b queued parked", "x - queued parked", "y - queued parked", "b2 b queued parked"}, []string{"a1", "x"},
			"a1:discarded b1:parked x:discarded y:parked b2:parked", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			db.Exec(t, "DELETE FROM ebb.dead_letter")
			setAside(t, db, c.letters...)
			chosen, err := sql.ChooseDead(t.Context(), conn, "s", sql.DeadFilter{IDs: c.ids})
			if err != nil || len(chosen.Events) != len(c.ids) || chosen.Events[0].EventID != c.ids[0] || chosen.Events[0].Topic != "t."+c.ids[0][:1] {
				t.Fatalf("chose %+v, %v", chosen, err)
			}
			r, err := sql.DiscardDead(t.Context(), conn, "s", chosen.Numbers())
			if diff := cmp.Diff(sql.DeadDiscard{Discarded: int64(len(c.ids)), Freed: c.freed, Delivered: []string{}}, r); diff != "" || err != nil {
				t.Error(diff, err)
			}
			if got := letters(t, db); got != c.want {
				t.Errorf("now %s, want %s", got, c.want)
			}
			decided := pgtest.Value[int64](t, db, "SELECT count(*) FROM ebb.dead_letter WHERE decided_by = session_user AND decided_at IS NOT NULL")
			if decided != r.Discarded+r.Freed {
				t.Errorf("%d rows say who decided", decided)
			}
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			if n, err := listener.WaitForNotification(ctx); err != nil || n.Payload != "s" {
				t.Errorf("notified of %+v, %v", n, err)
			}
		})
	}

	// What has happened since it was chosen is said.
	db.Exec(t, "DELETE FROM ebb.dead_letter")
	setAside(t, db, "a rejected rejected parked", "b - rejected parked", "c - rejected parked", "d - rejected parked")
	chosen, err := sql.ChooseDead(t.Context(), conn, "s", sql.DeadFilter{})
	if err != nil {
		t.Fatal(err)
	}
	db.Exec(t, "UPDATE ebb.dead_letter SET state = 'delivered' WHERE event_id = 'b'", "UPDATE ebb.dead_letter SET state = 'discarded' WHERE event_id = 'c'",
		"UPDATE ebb.dead_letter SET number = DEFAULT WHERE event_id = 'd'")
	r, err := sql.DiscardDead(t.Context(), conn, "s", chosen.Numbers())
	if diff := cmp.Diff(sql.DeadDiscard{Discarded: 1, Delivered: []string{"b"}, Gone: 2}, r); diff != "" || err != nil {
		t.Error(diff, err)
	}
	if got := letters(t, db); got != "a:discarded b:delivered c:discarded d:parked" {
		t.Errorf("now %s", got)
	}
	chosen, err = sql.ChooseDead(t.Context(), conn, "s", sql.DeadFilter{IDs: []string{"a", "b"}})
	if err != nil || len(chosen.Events) != 0 || !slices.Equal(chosen.Delivered, []string{"b"}) {
		t.Errorf("chose %+v, %v", chosen, err)
	}
	if _, err := sql.ChooseDead(t.Context(), conn, "s", sql.DeadFilter{IDs: []string{"a", "none"}}); !errors.Is(err, sql.ErrNoDeadEvent) {
		t.Errorf("an unknown id: %v", err)
	}
}

func TestListDead(t *testing.T) {
	db := pgtest.New(t)
	apply(t, db, setup)
	conn := db.Connect(t)
	list := func(f sql.DeadFilter, limit int, states ...sql.DeadEventState) (string, int64, int64) {
		t.Helper()
		var got []string
		n, queued, err := sql.ListDead(t.Context(), conn, "s", f, states, limit, func(e *sql.DeadEvent) error {
			line := e.EventID
			if e.QueueLength != nil {
				line += fmt.Sprintf(" %d/%d", *e.QueuePlace, *e.QueueLength)
			}
			got = append(got, line)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		return strings.Join(got, ", "), n, queued
	}
	if got, n, queued := list(sql.DeadFilter{}, 0); got != "" || n != 0 || queued != 0 {
		t.Errorf("of none: %s, %d, %d", got, n, queued)
	}
	setAside(t, db, "a1 a rejected parked", "b1 b timeout retrying", "a2 a queued parked", "x - rejected parked", "a0 a rejected delivered", "g a rejected discarded",
		"b2 b queued retrying", "y - rejected parked")
	for _, c := range []struct {
		name      string
		filter    sql.DeadFilter
		limit     int
		states    []sql.DeadEventState
		want      string
		n, queued int64
	}{
		{"heads, the last ones first", sql.DeadFilter{}, 0, nil, "y 1/1, x 1/1, b1 1/2, a1 1/2", 4, 6},
		{"limit", sql.DeadFilter{}, 2, nil, "y 1/1, x 1/1", 4, 6},
		{"heads of queues with an event that is meant", sql.DeadFilter{Reasons: []string{"queued"}}, 0, nil, "b1 1/2, a1 1/2", 2, 4},
		{"heads since", sql.DeadFilter{Since: at(6)}, 0, nil, "y 1/1, b1 1/2", 2, 3},
		{"each", sql.DeadFilter{}, 0, []sql.DeadEventState{sql.DeadParked, sql.DeadRetrying}, "y 1/1, b2 2/2, x 1/1, a2 2/2, b1 1/2, a1 1/2", 6, 10},
		{"each of a reason", sql.DeadFilter{Reasons: []string{"queued"}}, 1, []sql.DeadEventState{sql.DeadParked, sql.DeadRetrying}, "b2 2/2", 2, 4},
		{"settled", sql.DeadFilter{}, 0, []sql.DeadEventState{sql.DeadDelivered, sql.DeadDiscarded}, "g, a0", 2, 2},
		{"all of a key", sql.DeadFilter{Keys: []string{"a"}}, 0, sql.DeadEventStates, "g, a0, a2 2/2, a1 1/2", 4, 6},
		{"one", sql.DeadFilter{IDs: []string{"x"}}, 0, sql.DeadEventStates, "x 1/1", 1, 1},
	} {
		got, n, queued := list(c.filter, c.limit, c.states...)
		if got != c.want || n != c.n || queued != c.queued {
			t.Errorf("%s: %s; %d and %d in queues, want %s; %d and %d", c.name, got, n, queued, c.want, c.n, c.queued)
		}
	}

	var a *sql.DeadEvent
	if _, _, err := sql.ListDead(t.Context(), conn, "s", sql.DeadFilter{IDs: []string{"a1"}}, nil, 0, func(e *sql.DeadEvent) error { a = e; return nil }); err != nil {
		t.Fatal(err)
	}
	key, one, two := "a", int64(1), int64(2)
	want := &sql.DeadEvent{Number: 1, EventID: "a1", Topic: "t.a", Key: &key, Payload: []byte(`{"id":  "a1"}`), ContentType: "application/json", Headers: []byte(`{"h": "v"}`),
		EventTime: time.Unix(0, 0).UTC(), Position: "1:0/10:1", Reason: "rejected", Detail: "because of a1", Attempts: 1, FirstAt: at(0), LastAt: at(0),
		State: sql.DeadParked, QueuePlace: &one, QueueLength: &two}
	if diff := cmp.Diff(want, a); diff != "" {
		t.Error(diff)
	}
	ids, err := sql.QueueOf(t.Context(), conn, "s", "a", 10)
	if err != nil || !slices.Equal(ids, []string{"a1", "a2"}) {
		t.Errorf("the queue of a is %q, %v", ids, err)
	}
	broken := errors.New("broken pipe")
	if _, _, err := sql.ListDead(t.Context(), conn, "s", sql.DeadFilter{}, nil, 0, func(*sql.DeadEvent) error { return broken }); !errors.Is(err, broken) {
		t.Errorf("what is printed in vain: %v", err)
	}
	if err := sql.Check(t.Context(), conn); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}

// Whatever operators decide while the bridge goes on, a queue has one state, nothing overtakes, and what is discarded is not delivered.
func TestDeadOperatorsAgainstTheBridge(t *testing.T) {
	db := pgtest.New(t)
	apply(t, db, setup)
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var delivered, retried, discarded atomic.Int64
	began := time.Now()
	enough := func() bool { return delivered.Load() >= 100 && retried.Load() >= 50 && discarded.Load() >= 50 }
	var all sync.WaitGroup
	defer all.Wait()
	// each runs do again and again until the time is over.
	each := func(seed uint64, do func(*pgx.Conn, *rand.Rand) error) {
		conn := db.Connect(t)
		random := rand.New(rand.NewPCG(seed, 1))
		all.Go(func() {
			for ctx.Err() == nil {
				if err := do(conn, random); err != nil {
					t.Error(err)
					cancel()
				}
				if enough() && time.Since(began) > 3*time.Second {
					cancel()
				}
			}
		})
	}
	keys := []string{"a", "b", "c"}
	exec := func(conn *pgx.Conn, statement string, args ...any) error {
		_, err := conn.Exec(context.Background(), statement, args...)
		return err
	}
	each(1, func(conn *pgx.Conn, random *rand.Rand) error { // the bridge, which has one session
		key := keys[random.IntN(3)]
		switch random.IntN(5) {
		case 0, 1: // puts a letter behind the queue
			return exec(conn, `INSERT INTO ebb.dead_letter (slot, event_id, topic, key, content_type, event_time, position, place, epoch, reason, attempts, first_at, last_at, state)
				SELECT 's', gen_random_uuid(), 't', $1, '', now(), '1:0/10:1', '0/10:1', 1, CASE WHEN state IS NULL THEN 'rejected' ELSE 'queued' END, 0, now(), now(), coalesce(state, 'parked')
				FROM (SELECT (SELECT state FROM ebb.dead_letter WHERE slot = 's' AND key = $1 AND state IN ('parked', 'retrying') LIMIT 1)) queue`, key)
		case 2: // parks the queue again
			return exec(conn, `UPDATE ebb.dead_letter SET state = 'parked', reason = CASE WHEN number = queue.head THEN 'rejected' ELSE reason END
				FROM (SELECT min(number) AS head FROM ebb.dead_letter WHERE slot = 's' AND key = $1 AND state = 'retrying') queue
				WHERE slot = 's' AND key = $1 AND state = 'retrying'`, key)
		}
		tag, err := conn.Exec(context.Background(), `UPDATE ebb.dead_letter SET state = 'delivered' WHERE state = 'retrying' AND number =
			(SELECT min(number) FROM ebb.dead_letter WHERE slot = 's' AND key = $1 AND state IN ('parked', 'retrying'))`, key)
		delivered.Add(tag.RowsAffected())
		return err
	})
	for i := range 2 {
		each(uint64(3+i), func(conn *pgx.Conn, random *rand.Rand) error {
			f := sql.DeadFilter{Keys: keys[:1+random.IntN(3)]}
			if random.IntN(2) == 0 {
				r, err := sql.RetryDead(context.Background(), conn, "s", f)
				retried.Add(r.Queues)
				return err
			}
			chosen, err := sql.ChooseDead(context.Background(), conn, "s", f)
			if err != nil {
				return err
			}
			numbers := chosen.Numbers()
			random.Shuffle(len(numbers), func(i, j int) { numbers[i], numbers[j] = numbers[j], numbers[i] })
			numbers = numbers[:min(len(numbers), 1+random.IntN(3))]
			r, err := sql.DiscardDead(context.Background(), conn, "s", numbers)
			discarded.Add(r.Discarded)
			return err
		})
	}
	each(5, func(conn *pgx.Conn, _ *rand.Rand) error {
		var mixed string
		err := conn.QueryRow(context.Background(), `SELECT coalesce(string_agg(key, ' '), '') FROM (
			SELECT key FROM ebb.dead_letter WHERE state IN ('parked', 'retrying') GROUP BY key HAVING count(DISTINCT state) > 1) q`).Scan(&mixed)
		if err == nil && mixed != "" {
			err = fmt.Errorf("the queues of %s have two states", mixed)
		}
		return err
	})
	all.Wait()
	if !enough() && !t.Failed() {
		t.Errorf("too little happened: %d delivered, %d retried, %d discarded", delivered.Load(), retried.Load(), discarded.Load())
	}
	if n := pgtest.Value[int64](t, db, "SELECT count(*) FROM ebb.dead_letter WHERE state = 'delivered'"); n != delivered.Load() {
		t.Errorf("%d events are delivered, and %d were", n, delivered.Load())
	}
}

// A member of ebb_bridge decides, under its own name; others are told what they lack.
func TestDeadRoles(t *testing.T) {
	db := pgtest.New(t)
	apply(t, db, setup)
	setAside(t, db, "a1 a rejected parked", "a2 a queued parked")
	member := asRole(t, db, "ebb_bridge")
	if err := sql.CheckDead(t.Context(), member); err != nil {
		t.Error(err)
	}
	if _, err := sql.RetryDead(t.Context(), member, "s", sql.DeadFilter{}); err != nil {
		t.Error(err)
	}
	if _, err := sql.DiscardDead(t.Context(), member, "s", []int64{1}); err != nil {
		t.Error(err)
	}
	if got := pgtest.Value[int](t, db, "SELECT count(*) FROM ebb.dead_letter WHERE decided_by = $1", "bridge_"+db.Name); got != 2 {
		t.Errorf("%d rows say that %s decided", got, "bridge_"+db.Name)
	}

	producer := asRole(t, db, "ebb_producer")
	db.Exec(t, "CREATE ROLE some_"+db.Name)
	t.Cleanup(func() { db.Exec(t, "DROP ROLE some_"+db.Name) })
	nobody := asRole(t, db, "some_"+db.Name)
	for _, conn := range []*pgx.Conn{producer, nobody} {
		user := conn.Config().User
		_, retryErr := sql.RetryDead(t.Context(), conn, "s", sql.DeadFilter{})
		_, discardErr := sql.DiscardDead(t.Context(), conn, "s", []int64{2})
		_, chooseErr := sql.ChooseDead(t.Context(), conn, "s", sql.DeadFilter{})
		_, _, listErr := sql.ListDead(t.Context(), conn, "s", sql.DeadFilter{}, nil, 0, nil)
		for _, err := range []error{sql.CheckDead(t.Context(), conn), retryErr, discardErr, chooseErr, listErr} {
			if err == nil || !strings.Contains(err.Error(), "GRANT ebb_bridge TO \""+user+`"`) || strings.Contains(err.Error(), "setup") {
				t.Errorf("%s: %v", user, err)
			}
		}
	}
	if got := letters(t, db); got != "a1:discarded a2:retrying" {
		t.Errorf("now %s", got)
	}
}

// A decision does not wait for ever for a session that holds locks, and says so.
func TestDeadLocked(t *testing.T) {
	if testing.Short() {
		t.Skip("it waits for ten seconds")
	}
	t.Parallel()
	db := pgtest.New(t)
	apply(t, db, setup)
	setAside(t, db, "a1 a rejected parked")
	conn := db.Connect(t)
	other, err := db.Connect(t).Begin(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = other.Rollback(context.Background()) }) // has ended by now, unless the test has failed
	if _, err := other.Exec(t.Context(), "UPDATE ebb.dead_letter SET attempts = 7"); err != nil {
		t.Fatal(err)
	}
	_, err = sql.RetryDead(t.Context(), conn, "s", sql.DeadFilter{})
	if err == nil || !strings.Contains(err.Error(), "another session has held locks on ebb.dead_letter") {
		t.Errorf("retry: %v", err)
	}
	if err := other.Rollback(t.Context()); err != nil {
		t.Fatal(err)
	}
	if r, err := sql.RetryDead(t.Context(), conn, "s", sql.DeadFilter{}); err != nil || len(r.Numbers) != 1 {
		t.Errorf("retried %+v, %v", r, err)
	}
}
