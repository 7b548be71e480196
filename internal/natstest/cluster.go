package natstest

import (
	"context"
	"encoding/json"
	"fmt"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"ebb/internal/natsserver"
	"ebb/internal/sleep"
)

// clusterTimeout bounds every wait for a cluster. An election after a leader that is gone without a word takes up to nine seconds.
const clusterTimeout = time.Minute

// Cluster is a test's cluster of servers, each with a store of its own.
type Cluster struct {
	servers []*Server
}

// NewCluster starts n servers, and returns when JetStream has a leader and every server has caught up with it. They are shut down when
// the test ends.
func NewCluster(t testing.TB, n int, options ...Option) *Cluster {
	t.Helper()
	c := &Cluster{}
	stores := t.TempDir() // before Cleanup, so that it is removed after the servers have ended
	t.Cleanup(c.stop)
	var err error
	for attempt := range 3 { // somebody else may take a port first
		c.stop()
		if err = c.start(t, n, filepath.Join(stores, strconv.Itoa(attempt)), options); err == nil {
			c.waitReady(t)
			return c
		}
	}
	t.Fatal(err)
	return nil
}

func (c *Cluster) start(t testing.TB, n int, stores string, options []Option) error {
	ports := freePorts(t, 2*n) // for clients, then for routes
	routes := make([]*url.URL, n)
	for i := range routes {
		routes[i] = &url.URL{Scheme: "nats-route", Host: "127.0.0.1:" + strconv.Itoa(ports[n+i])}
	}
	c.servers = nil
	for i := range n {
		s := &Server{config: natsserver.Config{StoreDir: filepath.Join(stores, serverName(i)), Host: "127.0.0.1", Port: ports[i]}}
		for _, option := range options {
			option(&s.config)
		}
		adjust := s.config.Adjust
		s.config.Adjust = func(o *server.Options) {
			o.ServerName = serverName(i)
			o.Cluster.Name = "test"
			o.Cluster.Host, o.Cluster.Port = "127.0.0.1", ports[n+i]
			o.Routes = routes // the one to itself, a server ignores
			if adjust != nil {
				adjust(o)
			}
		}
		c.servers = append(c.servers, s)
		var err error
		if s.server, err = natsserver.Start(s.config); err != nil {
			return err
		}
	}
	return nil
}

func serverName(i int) string { return "n" + strconv.Itoa(i) }

func freePorts(t testing.TB, n int) []int {
	t.Helper()
	var ports []int
	taken := map[int]bool{}
	for len(ports) < n {
		if port := freePort(t); !taken[port] {
			taken[port] = true
			ports = append(ports, port)
		}
	}
	return ports
}

// stop shuts all down at once: one after the other, each would look for somebody to lead in its place.
func (c *Cluster) stop() {
	var all sync.WaitGroup
	for _, s := range c.servers {
		all.Go(s.stop)
	}
	all.Wait()
}

// waitReady waits until JetStream has a leader that knows every server, and all are current.
func (c *Cluster) waitReady(t testing.TB) {
	t.Helper()
	eventually(t, func(context.Context) error {
		leader := false
		for i, s := range c.servers {
			nats := s.NATS()
			if !nats.JetStreamIsCurrent() {
				return fmt.Errorf("server %d is not current", i)
			}
			if nats.JetStreamIsLeader() {
				leader = true
				if known := len(nats.JetStreamClusterPeers()); known != len(c.servers) {
					return fmt.Errorf("the leader of JetStream knows %d servers of %d", known, len(c.servers))
				}
			}
		}
		if !leader {
			return fmt.Errorf("JetStream has no leader")
		}
		return nil
	})
}

// eventually waits until try returns nil; its last error is in the failure.
func eventually(t testing.TB, try func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), clusterTimeout)
	defer cancel()
	for {
		err := try(ctx)
		if err == nil {
			return
		}
		if sleep.For(ctx, 10*time.Millisecond) != nil {
			t.Fatalf("not within %s: %v", clusterTimeout, err)
		}
	}
}

// Server is one of the servers, counted from zero, for a test to stop, start and restart. It keeps its ports and its store. Started,
// it takes connections at once, and catches up later: see WaitHealthy.
func (c *Cluster) Server(i int) *Server { return c.servers[i] }

// URLs are those of all servers, separated by commas.
func (c *Cluster) URLs() string {
	urls := make([]string, len(c.servers))
	for i, s := range c.servers {
		urls[i] = s.URL()
	}
	return strings.Join(urls, ",")
}

// Connect opens a connection that moves on to another server when its own is gone, and is closed when the test ends.
func (c *Cluster) Connect(t testing.TB, options ...nats.Option) *nats.Conn {
	t.Helper()
	return connect(t, c.URLs(), options...)
}

// JetStream opens a connection as Connect does.
func (c *Cluster) JetStream(t testing.TB) jetstream.JetStream {
	t.Helper()
	js, err := jetstream.New(c.Connect(t))
	if err != nil {
		t.Fatal(err)
	}
	return js
}

// Messages returns all that the stream holds when it is called, in order.
func (c *Cluster) Messages(t testing.TB, stream string) []Msg {
	t.Helper()
	return messages(t, c.URLs(), stream)
}

// StreamLeader is the index of the server that leads the stream, and waits until there is one.
func (c *Cluster) StreamLeader(t testing.TB, stream string) int {
	t.Helper()
	leader := -1
	c.untilStream(t, stream, func(info *jetstream.StreamInfo) (err error) {
		leader, err = c.leader(info)
		return err
	})
	return leader
}

// StepDown has the stream's leader hand over, and returns when another server leads.
func (c *Cluster) StepDown(t testing.TB, stream string) {
	t.Helper()
	conn := connect(t, c.URLs())
	defer conn.Close()
	former := c.StreamLeader(t, stream)
	// The request is repeated, because nothing keeps the former leader from being chosen again.
	eventually(t, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		defer cancel()
		reply, err := conn.RequestWithContext(ctx, fmt.Sprintf(server.JSApiStreamLeaderStepDownT, stream), nil)
		if err != nil {
			return fmt.Errorf("have the leader of %s step down: %w", stream, err)
		}
		var response server.JSApiStreamLeaderStepDownResponse
		if err := json.Unmarshal(reply.Data, &response); err != nil {
			return fmt.Errorf("have the leader of %s step down: %w", stream, err)
		}
		if response.Error != nil {
			return fmt.Errorf("have the leader of %s step down: %w", stream, response.Error)
		}
		if c.StreamLeader(t, stream) == former {
			return fmt.Errorf("server %d leads %s again", former, stream)
		}
		return nil
	})
}

// WaitHealthy waits until the stream has a leader and all its replicas, each with all that the leader has.
func (c *Cluster) WaitHealthy(t testing.TB, stream string) {
	t.Helper()
	c.untilStream(t, stream, func(info *jetstream.StreamInfo) error {
		if _, err := c.leader(info); err != nil {
			return err
		}
		if have := 1 + len(info.Cluster.Replicas); have != info.Config.Replicas {
			return fmt.Errorf("%d replicas of %d", have, info.Config.Replicas)
		}
		for _, replica := range info.Cluster.Replicas {
			if replica.Offline || !replica.Current || replica.Lag > 0 {
				return fmt.Errorf("replica %+v", *replica)
			}
		}
		// The leader believes for seconds in a replica that has gone, so the replicas are asked as well.
		current := 0
		for _, s := range c.servers {
			if nats := s.NATS(); nats != nil && nats.JetStreamIsStreamCurrent(server.DEFAULT_GLOBAL_ACCOUNT, stream) {
				current++
			}
		}
		if current < info.Config.Replicas {
			return fmt.Errorf("%d of %d replicas say that they are current", current, info.Config.Replicas)
		}
		return nil
	})
}

// leader is the index of the server that leads.
func (c *Cluster) leader(info *jetstream.StreamInfo) (int, error) {
	if info.Cluster == nil {
		return -1, fmt.Errorf("the stream is in no cluster")
	}
	for i := range c.servers {
		if serverName(i) == info.Cluster.Leader {
			return i, nil
		}
	}
	return -1, fmt.Errorf("leader %q", info.Cluster.Leader)
}

// untilStream waits until cond returns nil for what the cluster says of the stream.
func (c *Cluster) untilStream(t testing.TB, stream string, cond func(*jetstream.StreamInfo) error) {
	t.Helper()
	conn := connect(t, c.URLs())
	defer conn.Close()
	js, err := jetstream.New(conn)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, func(ctx context.Context) error {
		// No answer at all comes while nobody leads.
		ctx, cancel := context.WithTimeout(ctx, 250*time.Millisecond)
		defer cancel()
		s, err := js.Stream(ctx, stream)
		if err != nil {
			return fmt.Errorf("look at the stream %s: %w", stream, err)
		}
		if err := cond(s.CachedInfo()); err != nil {
			return fmt.Errorf("the stream %s: %w", stream, err)
		}
		return nil
	})
}
