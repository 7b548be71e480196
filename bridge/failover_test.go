package bridge_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"ebb/bridge"
	"ebb/event"
	"ebb/internal/natstest"
	"ebb/internal/pgtest"
	"ebb/internal/postgres"
	"ebb/sink/jetstream"
	"ebb/sql"
)

// pair is a primary with a standby, and a database of a bridge on both.
type pair struct {
	*fixture
	nats             *natstest.Server
	primary, standby *pgtest.Server
	// former is the database on the primary; after a promotion, that of the fixture is on the standby.
	former *pgtest.Database
}

func newPair(t *testing.T, installation postgres.Installation, standby map[string]string) *pair {
	t.Helper()
	p := &pair{nats: natstest.New(t), primary: pgtest.NewServer(t, postgres.Config{Installation: installation})}
	p.fixture = newFixture(t, p.primary.New(t))
	p.former = p.db
	p.standby = p.primary.Standby(t, postgres.StandbyConfig{Settings: standby})
	return p
}

// dsn names both servers, and leads to the one that is the primary.
func (p *pair) dsn() string {
	return fmt.Sprintf("postgres://%s@127.0.0.1:%d,127.0.0.1:%d/%s?sslmode=disable&target_session_attrs=primary", postgres.Superuser,
		p.primary.Port(), p.standby.Port(), p.former.Name)
}

// config is that of a bridge at a server, or at both of them.
func (p *pair) config(url string) bridge.Config {
	cfg := p.fixture.config(p.stream(p.nats))
	cfg.Postgres = url
	return cfg
}

// promote makes the standby the primary. What it has not received by now, it has lost.
func (p *pair) promote() {
	p.t.Helper()
	if err := p.standby.Promote(p.t.Context()); err != nil {
		p.t.Fatal(err)
	}
	p.db = p.former.On(p.standby)
}

// failover has the primary end without warning, and makes the standby the primary.
func (p *pair) failover() {
	p.t.Helper()
	p.primary.Kill()
	p.promote()
}

// cutOff keeps from the standby what is written from now on.
func (p *pair) cutOff() {
	p.t.Helper()
	p.standby.CatchUp(p.t, p.primary)
	if err := p.standby.CutOff(p.t.Context()); err != nil {
		p.t.Fatal(err)
	}
}

// switchLSN is where the timeline that ended with the promotion did.
func (p *pair) switchLSN() event.LSN {
	p.t.Helper()
	history := strings.Fields(pgtest.Value[string](p.t, p.db, "SELECT pg_read_file('pg_wal/00000002.history')"))
	if len(history) < 2 || history[0] != "1" {
		p.t.Fatalf("history %q", history)
	}
	lsn, err := event.ParseLSN(history[1])
	if err != nil {
		p.t.Fatal(err)
	}
	return lsn
}

// positions returns those of messages, which must rise but for events that were not streamed: these repeat that of the one before, or stand
// at the beginning of an epoch.
func positions(t *testing.T, messages []natstest.Msg) []event.Position {
	t.Helper()
	var all []event.Position
	for i, m := range messages {
		p, err := event.ParsePosition(m.Header.Get("Ebb-Position"))
		if err != nil {
			t.Fatal(err)
		}
		if i > 0 {
			c := p.Compare(all[i-1])
			recovered := m.Header.Get("Ebb-Origin") != ""
			if c < 0 || c == 0 && !recovered || c > 0 && recovered && p != (event.Position{Epoch: p.Epoch}) {
				t.Fatalf("message %d, of origin %q, is at %s, the one before it at %s", m.Sequence, m.Header.Get("Ebb-Origin"), p, all[i-1])
			}
		}
		all = append(all, p)
	}
	return all
}

// producers write transactions of several rows at the same time, and go on wherever the primary is until they are stopped. Each transaction
// takes a number under a lock that it holds until it has committed, so that the numbers are in the order of the commits; its rows do not
// come in that order.
type producers struct {
	t         *testing.T
	stopped   context.CancelFunc
	all       sync.WaitGroup
	committed atomic.Int64
}

// produce starts n producers, each of which begins a transaction every so often, or at once when the one before has ended if every is 0.
func (f *fixture) produce(url string, n int, every time.Duration) *producers {
	f.t.Helper()
	f.db.Exec(f.t, "CREATE TABLE turn (n bigint); INSERT INTO turn VALUES (0); CREATE TABLE turns (n bigint, xid xid8)")
	ctx, cancel := context.WithCancel(context.Background())
	p := &producers{t: f.t, stopped: cancel}
	for range n {
		p.all.Go(func() { p.produce(ctx, url, every) })
	}
	f.t.Cleanup(p.stop)
	return p
}

func (p *producers) produce(ctx context.Context, url string, every time.Duration) {
	var db *pgx.Conn
	pace := time.NewTicker(max(every, 1))
	defer pace.Stop()
	defer func() {
		if db != nil {
			db.Close(context.Background())
		}
	}()
	for {
		select {
		case <-pace.C:
		case <-ctx.Done():
			return
		}
		if db == nil || db.IsClosed() {
			var err error
			if db, err = pgx.Connect(ctx, url); err != nil {
				continue
			}
		}
		if err := pgx.BeginFunc(ctx, db, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, "INSERT INTO ebb.buffer (topic, payload) SELECT 't', '{}' FROM generate_series(1, 7)"); err != nil {
				return err
			}
			_, err := tx.Exec(ctx, "WITH t AS (UPDATE turn SET n = n + 1 RETURNING n) INSERT INTO turns SELECT n, pg_current_xact_id() FROM t")
			return err
		}); err == nil {
			p.committed.Add(1)
		}
	}
}

// more waits until so many transactions more are committed.
func (p *producers) more(n int64) {
	p.t.Helper()
	before := p.committed.Load()
	pgtest.Eventually(p.t, patience, func() (bool, string) {
		now := p.committed.Load() - before
		return now >= n, fmt.Sprintf("%d of %d transactions are committed", now, n)
	})
}

func (p *producers) stop() {
	p.stopped()
	p.all.Wait()
}

// committed returns the ids of the producers' rows in the order of their commits.
func (f *fixture) committed() []int64 {
	f.t.Helper()
	return pgtest.Value[[]int64](f.t, f.db, "SELECT coalesce(array_agg(id ORDER BY n, id), '{}') FROM ebb.buffer JOIN turns USING (xid)")
}

// The primary dies under load, and a standby that has the slot is promoted: the bridge goes on there by itself, and the stream has what was
// committed, once and in order. The walsender waits for the standby (synchronized_standby_slots), so that nothing is delivered that it does
// not have.
func TestPromotionWithTheSlot(t *testing.T) {
	t.Parallel()
	p := newPair(t, pgtest.Installation(t, 17), map[string]string{"sync_replication_slots": "on"})
	if err := p.primary.SetSetting(t.Context(), "synchronized_standby_slots", "standby"); err != nil {
		t.Fatal(err)
	}
	r := p.runWith(p.config(p.dsn()))
	w := p.produce(p.dsn(), 4, 0)
	p.streamed(p.nats, 100)
	p.standby.WaitSynced(t, p.primary, p.slot)
	if !pgtest.Value[bool](t, p.db, "SELECT failover FROM pg_replication_slots WHERE slot_name = $1", p.slot) {
		t.Error("the slot was not made for a failover")
	}
	w.more(50)
	p.failover()
	w.more(100)
	w.stop()
	want := p.committed()
	got, messages := p.streamed(p.nats, len(want))
	p.awaitBacklog(0)
	r.stop()
	sameOrder(t, got, want)
	epochs := map[uint32]int{}
	at := p.switchLSN()
	for i, position := range positions(t, messages) {
		epochs[position.Epoch]++
		if after := position.Commit >= at; after != (position.Epoch == 2) {
			t.Fatalf("message %d is at %s, and the timeline was left at %s", i+1, position, at)
		}
	}
	if len(epochs) != 2 || epochs[1] < 100 || epochs[2] < 100 {
		t.Errorf("events by epoch: %v", epochs)
	}
	if n := pgtest.Value[int](t, p.db, "SELECT made FROM ebb.slot"); n != 1 {
		t.Errorf("the slot was made %d times; it was there", n)
	}
}

// A standby without the slot is promoted: what was not delivered comes from the buffer.
func TestPromotionWithoutTheSlot(t *testing.T) {
	t.Parallel()
	p := newPair(t, postgres.Installation{}, nil)
	r := p.runWith(p.config(p.dsn()))
	p.put(100)
	p.streamed(p.nats, 100)
	r.stop()
	p.put(20)
	p.standby.CatchUp(t, p.primary)
	p.failover()
	p.put(5)
	r = p.runWith(p.config(p.dsn()))
	p.streamed(p.nats, 125)
	p.awaitBacklog(0)
	p.put(10)
	p.streamed(p.nats, 135)
	p.awaitBacklog(0)
	r.stop()
	got, messages := p.streamed(p.nats, 135)
	sameOrder(t, got, p.rows()) // the recovered ones come by id
	for i, position := range positions(t, messages) {
		origin, epoch := "", uint32(1)
		if i >= 100 {
			epoch = 2
		}
		if i >= 100 && i < 125 {
			origin = "recovered"
		}
		if o := messages[i].Header.Get("Ebb-Origin"); o != origin || position.Epoch != epoch {
			t.Errorf("message %d has origin %q and position %s", i+1, o, position)
		}
	}
	if n := pgtest.Value[int](t, p.db, "SELECT made FROM ebb.slot"); n != 2 {
		t.Errorf("the slot was made %d times", n)
	}
}

// A standby is promoted that misses transactions which were delivered. The bridge lists them; told to, it goes on, and delivers what is new,
// also when that has the ids of what was lost, and even the same content.
func TestPromotionLosesTransactions(t *testing.T) {
	t.Parallel()
	p := newPair(t, postgres.Installation{}, nil)
	r := p.runWith(p.config(p.dsn()))
	put := func(n int) {
		p.db.Exec(t, fmt.Sprintf("INSERT INTO ebb.buffer (topic, payload) SELECT 't', '{}' FROM generate_series(1, %d)", n))
	}
	put(10)
	p.streamed(p.nats, 10)
	p.settle()
	put(5) // recorded on the primary alone
	p.streamed(p.nats, 15)
	p.cutOff()
	lost := p.rows()
	put(100)
	p.streamed(p.nats, 115)
	lost = p.rows()[len(lost):]
	p.failover()
	checkLost := func(r *running) {
		t.Helper()
		err := r.wait()
		if !errors.Is(err, bridge.ErrLost) {
			t.Fatalf("ended with %v, want ErrLost", err)
		}
		for _, want := range []string{"100 events", fmt.Sprintf(": %d at 1:", lost[0]), fmt.Sprintf(", %d at 1:", lost[9]), "and 90 more", "--adopt"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("the error does not say %q: %v", want, err)
			}
		}
		if strings.Contains(err.Error(), fmt.Sprintf(" %d at 1:", lost[0]-1)) {
			t.Errorf("an event that is not lost is listed: %v", err)
		}
	}
	checkLost(r)

	put(90)
	rows := p.rows()
	if again := rows[len(rows)-90:]; again[0] > lost[99] || again[89] < lost[99] {
		t.Fatalf("the new ids %d to %d do not overlap with those that were lost, %d to %d", again[0], again[89], lost[0], lost[99])
	}
	checkLost(p.runWith(p.config(p.dsn()))) // as before: nothing was published meanwhile

	cfg := p.config(p.dsn())
	cfg.Adopt = true
	r = p.runWith(cfg)
	p.streamed(p.nats, 115+90)
	p.awaitBacklog(0)
	put(10)
	p.streamed(p.nats, 115+100)
	p.awaitBacklog(0)
	r.stop()

	r = p.runWith(p.config(p.dsn())) // no longer told to
	put(10)
	p.streamed(p.nats, 115+110)
	p.awaitBacklog(0)
	r.stop()
	got, messages := p.streamed(p.nats, 115+110)
	sameOrder(t, got[115:], p.rows()[15:])
	for i, position := range positions(t, messages) {
		if (position.Epoch == 2) != (i >= 115) {
			t.Errorf("message %d is at %s", i+1, position)
		}
	}
}

// A standby is promoted while its primary goes on, each with a bridge of its own: the one that publishes first has the stream, and the other
// one halts. Nothing interleaves.
func TestTwoPrimaries(t *testing.T) {
	t.Parallel()
	const put = "INSERT INTO ebb.buffer (topic, payload) SELECT 't', '{}' FROM generate_series(1, 3)"
	begin := func(t *testing.T) (p *pair, old, promoted *running) {
		p = newPair(t, postgres.Installation{}, nil)
		old = p.runWith(p.config(p.former.URL))
		p.put(10)
		p.streamed(p.nats, 10)
		p.settle()
		p.standby.CatchUp(t, p.primary)
		p.promote()
		promoted = p.runWith(p.config(p.db.URL))
		pgtest.Eventually(t, patience, func() (bool, string) {
			return pgtest.Value[bool](t, p.db, "SELECT EXISTS (SELECT FROM pg_stat_replication WHERE application_name = $1 AND state = 'streaming')",
				p.slot), "the promoted primary's bridge does not stream"
		})
		return p, old, promoted
	}
	halts := func(t *testing.T, r *running, want error) {
		t.Helper()
		if err := r.wait(); !errors.Is(err, want) {
			t.Fatalf("ended with %v, want %v", err, want)
		}
	}

	t.Run("the promoted one publishes first", func(t *testing.T) {
		p, old, promoted := begin(t)
		p.db.Exec(t, put)
		p.streamed(p.nats, 13)
		p.former.Exec(t, put)
		halts(t, old, jetstream.ErrForeign)
		halts(t, p.runWith(p.config(p.former.URL)), bridge.ErrLost)
		p.db.Exec(t, put)
		p.streamed(p.nats, 16)
		p.awaitBacklog(0)
		// Both are primaries now, and whoever is asked to follow asks the old one first.
		promoted.stop()
		halts(t, p.runWith(p.config(p.dsn())), bridge.ErrLost)
		got, messages := p.streamed(p.nats, 16)
		sameOrder(t, got, p.rows())
		positions(t, messages)
	})

	t.Run("the old one publishes first", func(t *testing.T) {
		p, old, promoted := begin(t)
		p.former.Exec(t, put)
		p.streamed(p.nats, 13)
		p.db.Exec(t, put)
		halts(t, promoted, jetstream.ErrForeign)
		again := p.runWith(p.config(p.db.URL))
		halts(t, again, bridge.ErrLost)
		if !strings.Contains(again.err.Error(), "3 events") || !strings.Contains(again.err.Error(), " 11 at 1:") {
			t.Errorf("the error does not list what the old primary's bridge has published: %v", again.err)
		}
		cfg := p.config(p.db.URL)
		cfg.Adopt = true
		adopting := p.runWith(cfg)
		p.streamed(p.nats, 16)
		p.former.Exec(t, put)
		halts(t, old, jetstream.ErrForeign)
		halts(t, p.runWith(p.config(p.former.URL)), bridge.ErrLost)
		p.db.Exec(t, put)
		p.streamed(p.nats, 19)
		p.awaitBacklog(0)
		adopting.stop()
		got, messages := p.streamed(p.nats, 19)
		sameOrder(t, got[13:], p.rows()[10:])
		positions(t, messages)
	})
}

// A copy of the database's files runs as a server of its own, on the same timeline, and must not publish into the stream: neither while its
// log is shorter than that which the stream is of, nor when it has grown past that.
func TestCopyOfTheFiles(t *testing.T) {
	t.Parallel()
	p := newPair(t, postgres.Installation{}, nil)
	r := p.runWith(p.config(p.former.URL))
	p.put(10)
	p.streamed(p.nats, 10)
	p.settle()
	p.cutOff()
	p.put(20)
	p.streamed(p.nats, 30)
	lost := p.rows()[10:]
	p.settle()

	if err := p.standby.Stop(t.Context(), postgres.Fast); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(p.standby.DataDir(), "standby.signal")); err != nil {
		t.Fatal(err)
	}
	if err := p.standby.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	former := p.db
	p.db = p.former.On(p.standby)
	halts := func() {
		t.Helper()
		err := p.runWith(p.config(p.db.URL)).wait()
		if !errors.Is(err, bridge.ErrLost) {
			t.Fatalf("ended with %v, want ErrLost", err)
		}
		for _, want := range []string{"20 events", fmt.Sprintf(": %d at 1:", lost[0]), "and 10 more", "--adopt"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("the error does not say %q: %v", want, err)
			}
		}
	}
	if lsn := pgtest.Value[string](t, p.db, "SELECT pg_walfile_name(pg_current_wal_lsn())"); !strings.HasPrefix(lsn, "00000001") {
		t.Fatalf("the copy is at %s, on another timeline", lsn)
	}
	halts()
	p.db.Exec(t, "SELECT pg_logical_emit_message(false, 'ebb', repeat('x', 1000000))", "SELECT pg_switch_wal()")
	p.put(5)
	halts()

	former.Exec(t, "INSERT INTO ebb.buffer (topic, payload) VALUES ('t', '{}')")
	p.streamed(p.nats, 31)
	r.stop()
	cfg := p.config(p.db.URL)
	cfg.Adopt = true
	r = p.runWith(cfg)
	p.streamed(p.nats, 36)
	p.awaitBacklog(0)
	r.stop()
	r = p.runWith(p.config(p.db.URL))
	p.put(5)
	p.streamed(p.nats, 41)
	r.stop()
	got, messages := p.streamed(p.nats, 41)
	sameOrder(t, got[31:], p.rows()[10:])
	positions(t, messages)
}

// The database is restored into another cluster, as from a dump: with foreign transaction ids in the rows, ticks that mean nothing there, and
// no slot.
func TestRestoredDump(t *testing.T) {
	t.Parallel()
	origin := pgtest.NewServer(t, postgres.Config{})
	f := newFixture(t, origin.New(t))
	nats := natstest.New(t)
	// The transaction ids of the dump are far ahead of those of the cluster that it is restored into.
	f.db.Exec(t, "DO $$ BEGIN FOR i IN 1..5000 LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$")
	r := f.run(f.stream(nats))
	f.put(20)
	f.streamed(nats, 20)
	f.settle()
	r.stop()
	f.put(10) // in the dump, and not delivered

	former := *f
	f.db = pgtest.NewServer(t, postgres.Config{}).New(t)
	f.restore(former.db)
	// The other one goes on and gives out ids, as this one does.
	const put = "INSERT INTO ebb.buffer (topic, payload) SELECT 't', '{}' FROM generate_series(1, 10)"
	r = former.run(former.stream(nats))
	former.db.Exec(t, put)
	f.streamed(nats, 40)
	r.stop()
	f.db.Exec(t, put)

	err := f.run(f.stream(nats)).wait()
	if !errors.Is(err, bridge.ErrOtherSource) || !strings.Contains(err.Error(), "--adopt") {
		t.Fatalf("ended with %v, want ErrOtherSource and the way out", err)
	}
	cfg := f.config(f.stream(nats))
	cfg.Adopt = true
	r = f.runWith(cfg)
	f.streamed(nats, 50)
	f.awaitBacklog(0)
	r.stop()
	r = f.run(f.stream(nats))
	f.put(5)
	f.streamed(nats, 55)
	f.awaitBacklog(0)
	r.stop()
	got, messages := f.streamed(nats, 55)
	sameOrder(t, got[40:], f.rows()[30:])
	positions(t, messages)
}

// restore does what restoring a dump of a database does.
func (f *fixture) restore(from *pgtest.Database) {
	f.t.Helper()
	src, dst := from.Connect(f.t), f.db.Connect(f.t)
	if _, err := sql.Apply(f.t.Context(), dst, sql.Setup{Publication: "ebb", Keep: time.Hour}); err != nil {
		f.t.Fatal(err)
	}
	f.db.Exec(f.t, "DELETE FROM ebb.identity")
	for _, table := range []string{"buffer", "slot", "epoch", "tick", "identity"} {
		var data bytes.Buffer
		if _, err := src.PgConn().CopyTo(f.t.Context(), &data, "COPY (SELECT * FROM ebb."+table+") TO STDOUT"); err != nil {
			f.t.Fatal(err)
		}
		if _, err := dst.PgConn().CopyFrom(f.t.Context(), &data, "COPY ebb."+table+" FROM STDIN"); err != nil {
			f.t.Fatal(err)
		}
	}
	for _, table := range []string{"buffer", "tick"} {
		f.db.Exec(f.t, fmt.Sprintf("SELECT setval(pg_get_serial_sequence('ebb.%[1]s', 'id'), max(id)) FROM ebb.%[1]s", table))
	}
}

// After a promotion the bridge has gone on and published, and then a standby is promoted in its turn that has the rows, but not what the bridge
// has recorded of its epoch. That others have published in an epoch which is not known here is all that can be seen.
func TestPromotionForgetsTheEpoch(t *testing.T) {
	t.Parallel()
	p := newPair(t, postgres.Installation{}, nil)
	p.standby.CatchUp(t, p.primary)
	p.failover()
	cfg := p.config(p.db.URL)
	cfg.TickEvery = time.Hour // so that the slot holds all of it still
	r := p.runWith(cfg)
	p.put(1)
	p.streamed(p.nats, 1)
	p.put(10)
	p.streamed(p.nats, 11)
	r.stop()
	p.db.Exec(t, "UPDATE ebb.slot SET epoch = 1, timeline = 1", "DELETE FROM ebb.epoch WHERE epoch = 2")

	err := p.runWith(p.config(p.db.URL)).wait()
	if !errors.Is(err, bridge.ErrLost) || !strings.Contains(err.Error(), "epoch 2") {
		t.Fatalf("ended with %v, want ErrLost and the epoch", err)
	}
	cfg = p.config(p.db.URL)
	cfg.Adopt = true
	r = p.runWith(cfg)
	p.put(5)
	p.streamed(p.nats, 16)
	p.awaitBacklog(0)
	r.stop()
	got, messages := p.streamed(p.nats, 16)
	sameOrder(t, got, p.rows())
	positions(t, messages)
}
