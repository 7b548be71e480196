// Package natsserver runs a NATS server with JetStream inside this process.
package natsserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/nats-io/nats-server/v2/server"
)

// ErrStoreInUse says that another server, of this process or another one, has the store.
var ErrStoreInUse = errors.New("in use by another server")

// Config is a server's. StoreDir, Host, Port, SyncAlways and MaxPayload are for a server without ConfigFile.
type Config struct {
	// StoreDir is where JetStream keeps its streams; it is made when missing. One server at a time may use it.
	StoreDir string

	// Host and Port to listen on for clients. An empty Host is 127.0.0.1; port 0 takes a free one.
	Host string
	Port int

	// SyncAlways has every message on the disk before it is acknowledged. Without it the server syncs every two minutes, and
	// a power loss takes what it acknowledged since.
	SyncAlways bool

	// MaxPayload is the size in bytes of the largest message, with its headers; 0 is the server's default of 1 MB.
	MaxPayload int32

	// ConfigFile is a nats-server configuration file to use instead. It must enable JetStream, with a store_dir. Its sync_interval
	// counts; when it has none, SyncAlways does.
	ConfigFile string

	// Logger gets what the server logs: its notices, of which it has many, as debug records. Nil means nothing.
	Logger *slog.Logger

	// Adjust changes the server's options before it starts, for what has no field here.
	Adjust func(*server.Options)
}

// Server is a running server.
type Server struct {
	server *server.Server
	lock   *os.File
	once   sync.Once
}

// Start starts a server, which takes connections when Start returns; that may take a while when there is a large store to recover.
func Start(config Config) (*Server, error) {
	options, storeKey, err := config.options()
	if err != nil {
		return nil, err
	}
	lock, err := lockStore(options.StoreDir, storeKey)
	if err != nil {
		return nil, err
	}
	s, err := start(options, config.Logger)
	if err != nil {
		lock.Close()
		return nil, fmt.Errorf("start the embedded NATS server on %s: %w",
			net.JoinHostPort(options.Host, strconv.Itoa(max(options.Port, 0))), err)
	}
	return &Server{server: s, lock: lock}, nil
}

// options also returns the name of the setting that names the store.
func (c Config) options() (*server.Options, string, error) {
	options, storeKey := &server.Options{
		ServerName: "ebb",
		Host:       c.Host,
		Port:       c.Port,
		JetStream:  true,
		StoreDir:   c.StoreDir,
		SyncAlways: c.SyncAlways,
		MaxPayload: c.MaxPayload,
	}, "embedded.store"
	if options.Host == "" {
		options.Host = "127.0.0.1"
	}
	if options.Port == 0 {
		options.Port = server.RANDOM_PORT
	}
	if c.ConfigFile != "" {
		var err error
		if options, err = server.ProcessConfigFile(c.ConfigFile); err != nil {
			return nil, "", fmt.Errorf("read the nats-server configuration (embedded.config): %w", err)
		}
		if !options.JetStream {
			return nil, "", fmt.Errorf("the nats-server configuration %s (embedded.config) does not enable JetStream; add "+
				"`jetstream { store_dir: \"…\" }`", c.ConfigFile)
		}
		if options.StoreDir == "" {
			// The server would take a directory below /tmp, for what must not be lost.
			return nil, "", fmt.Errorf("the nats-server configuration %s (embedded.config) does not say where JetStream keeps its "+
				"streams; add a store_dir to its jetstream block", c.ConfigFile)
		}
		if options.SyncInterval == 0 && !options.SyncAlways {
			options.SyncAlways = c.SyncAlways
		}
		storeKey = "store_dir in " + c.ConfigFile
	}
	options.NoSigs = true // signals are the program's, not ours
	if c.Adjust != nil {
		c.Adjust(options)
	}
	if options.StoreDir == "" {
		return nil, "", errors.New("embedded.store: is empty; set it to the directory for the embedded NATS server's streams")
	}
	return options, storeKey, nil
}

// start starts the server. It reports what goes wrong by logging a fatal line and going on, as if the process had ended there, so the
// first such line is the error.
func start(options *server.Options, logger *slog.Logger) (*server.Server, error) {
	s, err := server.NewServer(options)
	if err != nil {
		return nil, err
	}
	log := &adapter{logger: logger, fatal: make(chan string, 1)}
	debug := logger != nil && logger.Enabled(context.Background(), slog.LevelDebug)
	s.SetLoggerV2(log, debug && options.Debug, debug && options.Trace, debug && options.TraceVerbose)
	s.Start()
	select {
	case line := <-log.fatal:
		err = errors.New(line)
	default:
		switch {
		case !s.ReadyForConnections(30 * time.Second):
			err = errors.New("it takes no connections after 30s")
		case !s.JetStreamEnabled():
			err = errors.New("JetStream did not start")
		}
	}
	if err != nil {
		s.Shutdown()
		s.WaitForShutdown()
		return nil, err
	}
	log.fatal <- "" // from now on they are logged
	return s, nil
}

// lockName is the file whose lock says that the store is in use. A lock, unlike a file with a pid in it, ends with the process,
// however that ends.
const lockName = "ebb.lock"

func lockStore(dir, key string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return nil, fmt.Errorf("make the store of the embedded NATS server (%s): %w", key, err)
	}
	file, err := os.OpenFile(filepath.Join(dir, lockName), os.O_CREATE|os.O_RDWR, 0o640)
	if err != nil {
		return nil, fmt.Errorf("lock the store of the embedded NATS server (%s): %w", key, err)
	}
	if err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		file.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			err = fmt.Errorf("%w; stop that one, or set another directory", ErrStoreInUse)
		}
		return nil, fmt.Errorf("lock the store %s of the embedded NATS server (%s): %w", dir, key, err)
	}
	return file, nil
}

// ClientURL is the URL for clients on this machine.
func (s *Server) ClientURL() string {
	u, err := url.Parse(s.server.ClientURL())
	if err != nil {
		return s.server.ClientURL()
	}
	if ip := net.ParseIP(u.Hostname()); ip != nil && ip.IsUnspecified() {
		host := "127.0.0.1"
		if ip.To4() == nil {
			host = "::1"
		}
		u.Host = net.JoinHostPort(host, u.Port())
	}
	return u.String()
}

// Port is the port for clients.
func (s *Server) Port() int {
	if addr, ok := s.server.Addr().(*net.TCPAddr); ok {
		return addr.Port
	}
	return 0
}

// InProcessConn makes the server an option for nats.go (nats.InProcessServer), whose connections then need no network.
func (s *Server) InProcessConn() (net.Conn, error) { return s.server.InProcessConn() }

// NATS is the server itself.
func (s *Server) NATS() *server.Server { return s.server }

// Shutdown ends the server, waits until it has ended, and gives its store up. It may be called again.
func (s *Server) Shutdown() {
	s.once.Do(func() {
		s.server.Shutdown()
		s.server.WaitForShutdown()
		s.lock.Close()
	})
}

// adapter is the server's logger.
type adapter struct {
	logger *slog.Logger // may be nil
	fatal  chan string  // the first fatal line of the start; has room for it
}

var _ server.Logger = (*adapter)(nil)

func (a *adapter) log(level slog.Level, format string, v []any) {
	ctx := context.Background()
	if a.logger == nil || !a.logger.Enabled(ctx, level) {
		return
	}
	a.logger.Log(ctx, level, "nats-server: "+fmt.Sprintf(format, v...))
}

func (a *adapter) Noticef(format string, v ...any) { a.log(slog.LevelDebug, format, v) }
func (a *adapter) Debugf(format string, v ...any)  { a.log(slog.LevelDebug, format, v) }
func (a *adapter) Tracef(format string, v ...any)  { a.log(slog.LevelDebug, format, v) }
func (a *adapter) Warnf(format string, v ...any)   { a.log(slog.LevelWarn, format, v) }
func (a *adapter) Errorf(format string, v ...any)  { a.log(slog.LevelError, format, v) }

// Fatalf does not end the process, unlike the server's own loggers. It does not log the line that becomes start's error.
func (a *adapter) Fatalf(format string, v ...any) {
	select {
	case a.fatal <- fmt.Sprintf(format, v...):
	default:
		a.log(slog.LevelError, format, v)
	}
}
