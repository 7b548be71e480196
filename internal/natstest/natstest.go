// Package natstest gives tests a NATS server of their own, with JetStream, inside the test's process.
package natstest

import (
	"context"
	"math/rand/v2"
	"net"
	"strconv"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/goleak"

	"ebb/internal/natsserver"
)

// Leaks are the goroutines that a server may leave behind: a stream's store that is made while the server shuts down is never closed.
func Leaks() []goleak.Option {
	const server = "github.com/nats-io/nats-server/v2/server"
	return []goleak.Option{goleak.IgnoreAnyFunction(server + ".(*fileStore).flushStreamStateLoop"), goleak.IgnoreAnyFunction(server + "/ats.Register.func1")}
}

// Option changes the server that New starts.
type Option func(*natsserver.Config)

// MaxPayload sets the size of the largest message, in bytes.
func MaxPayload(bytes int32) Option {
	return func(c *natsserver.Config) { c.MaxPayload = bytes }
}

// Adjust changes the server's options, for what has no option here.
func Adjust(adjust func(*server.Options)) Option {
	return func(c *natsserver.Config) { c.Adjust = adjust }
}

// Server is a test's server. Its port and its store stay the same when it is stopped and started.
type Server struct {
	config natsserver.Config
	server *natsserver.Server // nil while stopped
}

// New starts a server on a free port, with its store in a temporary directory. It is shut down when the test ends.
func New(t testing.TB, options ...Option) *Server {
	t.Helper()
	s := &Server{config: natsserver.Config{StoreDir: t.TempDir(), Host: "127.0.0.1"}}
	for _, option := range options {
		option(&s.config)
	}
	t.Cleanup(s.stop)
	var err error
	for range 10 {
		s.config.Port = freePort(t)
		if s.server, err = natsserver.Start(s.config); err == nil {
			return s
		}
	}
	t.Fatal(err)
	return nil
}

// freePort finds a port below those that systems hand to outgoing connections: one of these, such as a client's attempt to
// reconnect, could take the port away while the server is stopped.
func freePort(t testing.TB) int {
	t.Helper()
	const low, high = 12000, 20000
	for range 200 {
		port := low + rand.IntN(high-low)
		listener, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err != nil {
			continue
		}
		listener.Close()
		return port
	}
	t.Fatal("found no free port")
	return 0
}

// Stop shuts the server down. One that is stopped is left alone.
func (s *Server) Stop(t testing.TB) {
	t.Helper()
	s.stop()
}

func (s *Server) stop() {
	if s.server != nil {
		s.server.Shutdown()
		s.server = nil
	}
}

// Start starts the server again after Stop.
func (s *Server) Start(t testing.TB) {
	t.Helper()
	if s.server != nil {
		return
	}
	var err error
	if s.server, err = natsserver.Start(s.config); err != nil {
		t.Fatal(err)
	}
}

// Restart stops the server and starts it again.
func (s *Server) Restart(t testing.TB) {
	t.Helper()
	s.stop()
	s.Start(t)
}

// URL is for clients. It stays the same over restarts.
func (s *Server) URL() string { return "nats://" + s.Addr() }

// Addr is the host and port of URL, for a proxy in between.
func (s *Server) Addr() string { return net.JoinHostPort(s.config.Host, strconv.Itoa(s.config.Port)) }

// StoreDir is where the server keeps its streams. A test may copy, restore or remove it while the server is stopped.
func (s *Server) StoreDir() string { return s.config.StoreDir }

// NATS is the server itself; nil while it is stopped.
func (s *Server) NATS() *server.Server {
	if s.server == nil {
		return nil
	}
	return s.server.NATS()
}

// Connect opens a connection that outlives restarts of the server, and is closed when the test ends.
func (s *Server) Connect(t testing.TB, options ...nats.Option) *nats.Conn {
	t.Helper()
	return connect(t, s.URL(), options...)
}

func connect(t testing.TB, urls string, options ...nats.Option) *nats.Conn {
	t.Helper()
	options = append([]nats.Option{nats.MaxReconnects(-1), nats.ReconnectWait(10 * time.Millisecond),
		nats.ReconnectJitter(0, 0)}, options...)
	conn, err := nats.Connect(urls, options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	return conn
}

// JetStream opens a connection as Connect does.
func (s *Server) JetStream(t testing.TB) jetstream.JetStream {
	t.Helper()
	js, err := jetstream.New(s.Connect(t))
	if err != nil {
		t.Fatal(err)
	}
	return js
}

// RecreateStream deletes the stream and creates it anew, empty. The server removes the directory of an account's last stream a little
// after the deletion (stream.go, stop), also under a stream that has been created since, which then fails: it is tried again.
func (s *Server) RecreateStream(t testing.TB, cfg jetstream.StreamConfig) {
	t.Helper()
	js := s.JetStream(t)
	if err := js.DeleteStream(t.Context(), cfg.Name); err != nil {
		t.Fatal(err)
	}
	eventually(t, func(ctx context.Context) error {
		_, err := js.CreateStream(ctx, cfg)
		return err
	})
}
