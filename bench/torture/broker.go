package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"ebb/internal/natsserver"
)

// brokerCommand makes this program a NATS server, which can then be killed and stopped.
const brokerCommand = "nats-server"

// runBroker is that server's main.
func runBroker(args []string) int {
	flags := flag.NewFlagSet(brokerCommand, flag.ContinueOnError)
	store := flags.String("store", "", "directory of the streams")
	port := flags.Int("port", 0, "port for clients")
	syncAlways := flags.Bool("sync", false, "sync before every acknowledgment")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	started, err := natsserver.Start(natsserver.Config{
		StoreDir:   *store,
		Port:       *port,
		SyncAlways: *syncAlways,
		Logger:     slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})),
		// Not three quarters of the disk: it is the disk that is to be full, and not an account.
		Adjust: func(o *server.Options) { o.JetStreamMaxStore = 1 << 40 },
	})
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println(brokerReady)
	<-ctx.Done()
	started.Shutdown()
	return 0
}

const brokerReady = "ready"

// broker is a NATS server in a process of its own.
type broker struct {
	program string
	dir     string // of the store; it is below disk
	disk    string // a file system of its own, or an ordinary directory
	mounted bool
	port    int
	sync    bool
	log     *logFile
	child   *child // nil, or ended, while it is down
}

// diskSize is the size of the store's own file system. Only what is used of it takes memory.
const diskSize = 1 << 30

// spare is what a full disk has left: less could be passed between the moment it is measured and that it is set.
const spare = 64 << 10

func newBroker(dir string, port int, syncAlways bool) (*broker, error) {
	program, err := os.Executable()
	if err != nil {
		return nil, fmt.Errorf("find this program: %w", err)
	}
	b := &broker{program: program, disk: filepath.Join(dir, "disk"), port: port, sync: syncAlways}
	if err := os.Mkdir(b.disk, 0o755); err != nil {
		return nil, fmt.Errorf("make the store: %w", err)
	}
	b.mounted = mountMemory(b.disk, diskSize) == nil
	b.dir = filepath.Join(b.disk, "store")
	b.log, err = newLogFile(filepath.Join(dir, "nats.log"), nil)
	return b, err
}

func (b *broker) url() string { return "nats://" + b.addr() }

func (b *broker) addr() string { return "127.0.0.1:" + strconv.Itoa(b.port) }

// start starts the server and waits until it takes connections.
func (b *broker) start() error {
	if b.running() {
		return nil
	}
	ready := make(chan struct{}, 1)
	cmd := exec.Command(b.program, brokerCommand, "--store", b.dir, "--port", strconv.Itoa(b.port), "--sync="+strconv.FormatBool(b.sync))
	cmd.Stdout = writerFunc(func(p []byte) (int, error) {
		if strings.Contains(string(p), brokerReady) {
			ready <- struct{}{}
		}
		return len(p), nil
	})
	cmd.Stderr = b.log
	c, err := startChild(cmd)
	if err != nil {
		return fmt.Errorf("start NATS: %w", err)
	}
	b.child = c
	select {
	case <-ready:
		return nil
	case <-c.done:
		return fmt.Errorf("NATS ended at its start (%s): %s", c.cmd.ProcessState, b.log.tail())
	case <-time.After(time.Minute):
		c.kill()
		return errors.New("NATS was not ready after a minute")
	}
}

func (b *broker) running() bool { return b.child != nil && !b.child.ended() }

func (b *broker) kill() {
	if b.running() {
		b.child.kill()
	}
}

// stop shuts the server down in good order.
func (b *broker) stop() error {
	if !b.running() {
		return nil
	}
	b.child.signal(syscall.SIGTERM)
	select {
	case <-b.child.done:
		return nil
	case <-time.After(30 * time.Second):
		b.child.kill()
		return errors.New("NATS had not shut down after 30s")
	}
}

func (b *broker) close() error {
	b.kill()
	b.log.close()
	if b.mounted {
		return unmount(b.disk)
	}
	return nil
}

// fill makes the disk so small that it is full; what it returns frees it.
func (b *broker) fill() (free func() error, err error) {
	if !b.mounted {
		return nil, errors.New("the store has no file system of its own: mounting one takes root")
	}
	used, err := usedMemory(b.disk)
	if err != nil {
		return nil, err
	}
	if err := resizeMemory(b.disk, used+spare); err != nil {
		return nil, err
	}
	return func() error { return resizeMemory(b.disk, diskSize) }, nil
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

var _ io.Writer = writerFunc(nil)
