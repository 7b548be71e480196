package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"ebb/event"
	"ebb/internal/natstest"
	"ebb/internal/pgtest"
	"ebb/internal/postgres"
)

// seedEnv repeats a run of TestKillsAndRestarts, as far as its random choices go.
const seedEnv = "EBB_TEST_SEED"

// outcome is what a producer knows of its transaction.
type outcome int

const (
	unknown outcome = iota // the connection was lost during COMMIT
	committed
	rolledBack
)

// transaction is an entry in a producer's ledger.
type transaction struct {
	producer, number int
	first, size      int // its rows have the sequence numbers first to first+size-1
	outcome          outcome
}

// cargo is the payload of an event.
type cargo struct {
	Producer int  `json:"p"`
	Number   int  `json:"t"`
	Sequence int  `json:"s"`
	Undone   bool `json:"u,omitempty"` // in a savepoint that was rolled back
}

// work is what the producers share: as many rows as they may write for now, and how many they have committed.
type work struct {
	mu        sync.Mutex
	more      *sync.Cond
	allowed   int
	committed int
	target    int
	last      bool // no more is coming: produce until the target is committed
	aborted   bool
}

func newWork(target int) *work {
	w := &work{target: target}
	w.more = sync.NewCond(&w.mu)
	return w
}

func (w *work) change(f func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f()
	w.more.Broadcast()
}

// take waits until a transaction may be written, and returns false when the work is done.
func (w *work) take(size int) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for {
		switch {
		case w.aborted, w.last && w.committed >= w.target:
			return false
		case w.last, w.allowed > 0:
			w.allowed -= size
			return true
		}
		w.more.Wait()
	}
}

// producer writes transactions, one after the other, and survives whatever happens to Postgres.
type producer struct {
	number   int
	url      string
	rand     *rand.Rand
	work     *work
	large    int // size of the one large transaction, 0 for none, or when it is written
	db       *pgx.Conn
	ledger   []transaction
	sequence int
}

func (p *producer) produce(ctx context.Context) error {
	defer func() {
		if p.db != nil {
			p.db.Close(context.WithoutCancel(ctx))
		}
	}()
	for n := 0; ; n++ {
		size := [...]int{1, 1, 1, 1, 1, 7, 7, 7, 1000}[p.rand.IntN(9)]
		rollback := p.rand.IntN(3) == 0
		if p.large > 0 && n >= 5 {
			size, rollback = p.large, false
		}
		if !p.work.take(min(size, 1000)) { // the large one comes on top
			return ctx.Err()
		}
		if err := p.connect(ctx); err != nil {
			return err
		}
		tx := transaction{producer: p.number, number: n, first: p.sequence, size: size}
		p.sequence += size
		var err error
		if tx.outcome, err = p.write(ctx, tx, rollback); err != nil {
			p.db.Close(ctx)
			p.db = nil
		}
		p.ledger = append(p.ledger, tx)
		if tx.outcome == committed {
			p.work.change(func() { p.work.committed += size })
			if size == p.large {
				p.large = 0
			}
		}
		var refused interface{ SQLState() string }
		if errors.As(err, &refused) && refused.SQLState()[:2] != "57" {
			return fmt.Errorf("producer %d: %w", p.number, err) // anything but a shutdown is a fault of the test
		}
	}
}

func (p *producer) connect(ctx context.Context) error {
	for p.db == nil || p.db.IsClosed() {
		db, err := pgx.Connect(ctx, p.url)
		if err == nil {
			p.db = db
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("producer %d: %w", p.number, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
	return nil
}

// write returns unknown with an error when that was COMMIT's, and rolledBack when it was another statement's.
func (p *producer) write(ctx context.Context, t transaction, rollback bool) (outcome, error) {
	if _, err := p.db.Exec(ctx, "BEGIN"); err != nil {
		return rolledBack, err
	}
	if err := p.rows(ctx, t); err != nil {
		return rolledBack, err
	}
	if rollback {
		_, err := p.db.Exec(ctx, "ROLLBACK")
		return rolledBack, err
	}
	tag, err := p.db.Exec(ctx, "COMMIT")
	if err != nil {
		return unknown, err
	}
	if tag.String() != "COMMIT" {
		return rolledBack, fmt.Errorf("COMMIT answered %s", tag)
	}
	return committed, nil
}

// rows writes the rows, some of them in savepoints, one of which may be rolled back with more inside.
func (p *producer) rows(ctx context.Context, t transaction) error {
	middle := t.first + p.rand.IntN(t.size+1)
	end := t.first + t.size
	savepoints := p.rand.IntN(3) == 0
	if err := p.insert(ctx, t, t.first, middle, false); err != nil {
		return err
	}
	if savepoints {
		if _, err := p.db.Exec(ctx, "SAVEPOINT undone"); err != nil {
			return err
		}
		if err := p.insert(ctx, t, middle, middle+1+p.rand.IntN(20), true); err != nil {
			return err
		}
		if _, err := p.db.Exec(ctx, "SAVEPOINT nested"); err != nil {
			return err
		}
		if err := p.insert(ctx, t, middle, middle+3, true); err != nil {
			return err
		}
		if _, err := p.db.Exec(ctx, "RELEASE SAVEPOINT nested; ROLLBACK TO SAVEPOINT undone; SAVEPOINT kept"); err != nil {
			return err
		}
	}
	return p.insert(ctx, t, middle, end, false)
}

// insert writes rows with the sequence numbers from first up to but not including end.
func (p *producer) insert(ctx context.Context, t transaction, first, end int, undone bool) error {
	const payload = `json_strip_nulls(json_build_object('p', $1::int, 't', $2::int, 's', s, 'u', CASE WHEN $5::bool THEN true END))`
	query := `INSERT INTO ebb.buffer (topic, key, payload) SELECT 'torture', 'producer ' || $1::int, ` + payload + ` FROM generate_series($3::int, $4::int - 1) s`
	if end-first < 5 {
		query = `SELECT ebb.put('torture', ` + payload + `, 'producer ' || $1::int) FROM generate_series($3::int, $4::int - 1) s`
	}
	_, err := p.db.Exec(ctx, query, t.producer, t.number, first, end, undone)
	return err
}

// TestKillsAndRestarts kills the bridge and restarts everything around it while eight producers write, and then compares
// the stream with the table, with the producers' ledgers and with what an independent reader of the log has seen.
func TestKillsAndRestarts(t *testing.T) {
	target, large, pause := 100_000, 50_000, 900*time.Millisecond
	if testing.Short() {
		target, large, pause = 20_000, 10_000, 200*time.Millisecond
	}
	const kills, natsRestarts = 20, 5
	stops := []postgres.StopMode{postgres.Fast, postgres.Immediate, postgres.Fast}

	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv(seedEnv); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("%s=%d", seedEnv, seed)
	random := func(stream uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, stream)) }

	server := pgtest.NewServer(t, postgres.Config{})
	db := server.New(t)
	broker := natstest.New(t)
	s := newSite(t, db, broker.URL())
	s.setup(t)
	witness := s.witness(t)

	// Producers.
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	w := newWork(target)
	defer context.AfterFunc(ctx, func() { w.change(func() { w.aborted = true }) })()
	var producers []*producer
	g, gctx := errgroup.WithContext(ctx)
	for i := range 8 {
		p := &producer{number: i, url: db.URL, rand: random(uint64(i)), work: w}
		if i == 0 {
			p.large = large
		}
		producers = append(producers, p)
		g.Go(func() error { return p.produce(gctx) })
	}

	// Every disturbance finds the producers at work: it lets them write some more.
	disturbances := kills + natsRestarts + len(stops)
	slice := (target - large) * 3 / 2 / disturbances
	disturb := func(r *rand.Rand, over <-chan struct{}) {
		w.change(func() { w.allowed += slice })
		select {
		case <-time.After(time.Duration(r.Int64N(int64(pause)))):
		case <-over:
		}
	}

	// The killer. It also notices a bridge that ends by itself, which none may.
	dir := t.TempDir()
	var bridge *program
	bridge, err := launch(dir, nil, s.args("run")...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		bridge.kill()
		if t.Failed() {
			t.Logf("the last bridge:\n%s", tail(bridge.stderr.String()))
		}
	})
	killer := make(chan error, 1)
	go func() {
		r := random(100)
		for i := range kills {
			disturb(r, bridge.done)
			select {
			case <-bridge.done:
				killer <- fmt.Errorf("bridge %d ended by itself: %s\n%s", i, bridge.cmd.ProcessState, bridge.stderr.String())
				return
			default:
			}
			bridge.kill()
			next, err := launch(dir, nil, s.args("run")...)
			if err != nil {
				killer <- err
				return
			}
			bridge = next
		}
		killer <- nil
	}()

	// Restarts, in a random order.
	r := random(101)
	for _, what := range r.Perm(natsRestarts + len(stops)) {
		disturb(r, gctx.Done())
		if what < natsRestarts {
			broker.Stop(t)
			disturb(r, gctx.Done())
			broker.Start(t)
			continue
		}
		mode := stops[what-natsRestarts]
		began := time.Now()
		stopping, cancel := context.WithTimeout(ctx, 30*time.Second)
		if err := server.Restart(stopping, mode); err != nil {
			t.Errorf("restart Postgres (%s): %v", mode, err)
		}
		cancel()
		t.Logf("Postgres restarted (%s) in %s", mode, time.Since(began).Round(time.Millisecond))
		if t.Failed() {
			break
		}
	}
	if err := <-killer; err != nil {
		t.Error(err)
	}
	w.change(func() { w.last, w.aborted = true, t.Failed() })
	if err := g.Wait(); err != nil && !t.Failed() {
		t.Error(err)
	}
	if t.Failed() {
		t.FailNow()
	}

	// The table is the truth about what was committed; the ledgers say whether it can be.
	ids, table := contents(t, s, producers)
	js := broker.JetStream(t)
	pgtest.Eventually(t, time.Minute, func() (bool, string) {
		select {
		case <-bridge.done:
			t.Fatalf("the bridge ended by itself: %s", bridge.cmd.ProcessState)
		default:
		}
		stream, err := js.Stream(ctx, "EBB")
		if err != nil {
			return false, err.Error()
		}
		n := int(stream.CachedInfo().State.Msgs)
		return n >= len(ids), fmt.Sprintf("the stream holds %d of %d messages", n, len(ids))
	})
	s.confirms(t, 40*time.Second)
	pgtest.Eventually(t, 30*time.Second, func() (bool, string) {
		status := s.statusJSON(t, exitOK)
		backlog := status["backlog"].(map[string]any)
		return backlog["events"] == 0.0, fmt.Sprintf("the backlog is %v", backlog)
	})
	bridge.stop(t)
	bridge.checkRaces(t)

	// The stream.
	var last event.Position
	seen := map[string]bool{}
	sequences := map[int]int{}
	var order []string
	for i, m := range broker.Messages(t, "EBB") {
		id := m.Header.Get("ce-id")
		order = append(order, id)
		want, ok := table[id]
		switch {
		case !ok:
			t.Fatalf("message %d is event %s, which is not in the table: %s", i, id, m.Data)
		case seen[id]:
			t.Fatalf("message %d is event %s again", i, id)
		case string(m.Data) != want:
			t.Fatalf("event %s is %s, in the table it is %s", id, m.Data, want)
		}
		seen[id] = true
		position, err := event.ParsePosition(m.Header.Get("Ebb-Position"))
		if err != nil {
			t.Fatal(err)
		}
		if position.Compare(last) <= 0 {
			t.Fatalf("message %d is at %s, the one before it is at %s", i, position, last)
		}
		if position.Commit == last.Commit && position.Index != last.Index+1 || position.Commit != last.Commit && position.Index != 1 {
			t.Fatalf("message %d is at %s after %s: a row of the transaction is missing", i, position, last)
		}
		last = position
		var c cargo
		if err := json.Unmarshal(m.Data, &c); err != nil {
			t.Fatal(err)
		}
		if before, ok := sequences[c.Producer]; ok && c.Sequence <= before {
			t.Fatalf("message %d of producer %d has sequence %d after %d", i, c.Producer, c.Sequence, before)
		}
		sequences[c.Producer] = c.Sequence
	}
	if len(order) != len(ids) {
		t.Fatalf("the stream holds %d events, the table %d", len(order), len(ids))
	}
	var witnessed []string
	transactions := witness.transactions(t)
	for _, tx := range transactions {
		witnessed = append(witnessed, tx.ids...)
	}
	equalIDs(t, "the stream against an independent slot", order, witnessed)
	t.Logf("%d events of %d transactions", len(order), len(transactions))
}

// contents returns the ids and the payloads of the buffer, after comparing them with what the producers know.
func contents(t *testing.T, s *site, producers []*producer) ([]string, map[string]string) {
	t.Helper()
	type key struct{ producer, number int }
	rows := map[key][]int{}
	payloads := map[string]string{}
	var ids []string
	r, err := s.db.Connect(t).Query(t.Context(), "SELECT id::text, payload::text FROM ebb.buffer b ORDER BY b.id")
	if err != nil {
		t.Fatal(err)
	}
	var id, payload string
	_, err = pgx.ForEachRow(r, []any{&id, &payload}, func() error {
		var c cargo
		if err := json.Unmarshal([]byte(payload), &c); err != nil {
			return err
		}
		if c.Undone {
			return fmt.Errorf("row %s was rolled back with its savepoint", id)
		}
		k := key{c.Producer, c.Number}
		rows[k] = append(rows[k], c.Sequence)
		ids, payloads[id] = append(ids, id), payload
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	var counts [3]int
	for _, p := range producers {
		for _, tx := range p.ledger {
			counts[tx.outcome]++
			have := rows[key{tx.producer, tx.number}]
			complete := len(have) == tx.size
			for i := range have {
				complete = complete && have[i] == tx.first+i
			}
			if !complete && len(have) > 0 || tx.outcome == committed && len(have) == 0 || tx.outcome == rolledBack && len(have) > 0 {
				t.Fatalf("Postgres holds %d rows of a transaction of %d with outcome %d: the test is wrong", len(have), tx.size, tx.outcome)
			}
		}
	}
	t.Logf("%d transactions committed, %d rolled back, %d unknown to their producer", counts[committed], counts[rolledBack], counts[unknown])
	if counts[rolledBack]*5 < counts[committed] {
		t.Fatalf("too few transactions were rolled back")
	}
	return ids, payloads
}
