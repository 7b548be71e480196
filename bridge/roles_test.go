package bridge_test

import (
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ebb/bridge"
	"ebb/internal/natstest"
	"ebb/internal/pgtest"
	"ebb/internal/postgres"
)

// Two bridges, of which the leading one loses its lock and keeps its stream, or loses its stream and keeps its lock, again and again: one of
// them leads, and nothing is lost, doubled or out of order.
func TestLeaderLosesItsSessions(t *testing.T) {
	t.Parallel()
	f := newFixture(t, pgtest.New(t))
	nats := natstest.New(t)
	bridges := []*running{f.run(f.stream(nats)), f.run(f.stream(nats))}
	w := f.produce(f.db.URL, 2, 5*time.Millisecond)
	got, _ := f.streamed(nats, 100)
	db := f.db.Connect(t)
	rounds := 8
	if testing.Short() {
		rounds = 4
	}
	for i := range rounds {
		victim := "pid IN (SELECT pid FROM pg_locks WHERE locktype = 'advisory')"
		if i%2 == 1 {
			victim = "backend_type = 'walsender'"
		}
		pgtest.Eventually(t, patience, func() (bool, string) {
			var ended int
			if err := db.QueryRow(t.Context(), "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = $1 AND "+
				victim, f.slot).Scan(&ended); err != nil {
				t.Fatal(err)
			}
			return ended > 0, "nothing was terminated: " + victim
		})
		got, _ = f.streamed(nats, len(got)+100)
		pgtest.Eventually(t, patience, func() (bool, string) {
			a, b := bridges[0].role(), bridges[1].role()
			return a == bridge.RoleLeader && b == bridge.RoleStandby || a == bridge.RoleStandby && b == bridge.RoleLeader,
				fmt.Sprintf("the bridges are %s and %s", a, b)
		})
	}
	w.stop()
	want := f.committed()
	got, messages := f.streamed(nats, len(want))
	f.awaitBacklog(0)
	for _, r := range bridges {
		r.stop()
	}
	sameOrder(t, got, want)
	positions(t, messages)
}

// forwarder takes connections, and has each led to the server that route names for it; they are counted from 1.
func forwarder(t *testing.T, route func(n int) *pgtest.Server) (port int) {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	all.Go(func() {
		for n := 1; ; n++ {
			from, err := listener.Accept()
			if err != nil {
				return
			}
			to, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", route(n).Port()))
			if err != nil {
				from.Close()
				continue
			}
			for _, way := range [][2]net.Conn{{from, to}, {to, from}} {
				all.Go(func() {
					defer way[0].Close()
					defer way[1].Close()
					_, _ = io.Copy(way[0], way[1]) // either end may end it
				})
			}
		}
	})
	t.Cleanup(func() {
		listener.Close()
		all.Wait()
	})
	return listener.Addr().(*net.TCPAddr).Port
}

// A list of hosts, or a name that moves, leads the three sessions of a bridge to two servers that are both primaries. The bridge does nothing
// until all of them are at one.
func TestSessionsAtTwoPrimaries(t *testing.T) {
	t.Parallel()
	p := newPair(t, postgres.Installation{}, nil)
	p.standby.CatchUp(t, p.primary)
	p.promote()
	p.put(10)
	var sessions atomic.Int64
	port := forwarder(t, func(n int) *pgtest.Server {
		sessions.Store(int64(n))
		if n == 2 || n == 6 { // that of the statements at the first attempt, that of the stream at the second one
			return p.primary
		}
		return p.standby
	})
	r := p.runWith(p.config(strings.Replace(p.db.URL, fmt.Sprintf(":%d/", p.standby.Port()), fmt.Sprintf(":%d/", port), 1)))
	p.streamed(p.nats, 10)
	r.stop()
	if n := sessions.Load(); n < 9 { // a statement that is cancelled when the bridge stops takes another
		t.Errorf("%d sessions were begun, want three times three", n)
	}
	// What a bridge records first is its term.
	if term := pgtest.Value[int](t, p.former, "SELECT term FROM ebb.slot"); term != 1 {
		t.Errorf("term %d was begun on the primary from before the promotion", term)
	}
}
