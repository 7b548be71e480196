package natsserver

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/goleak"
)

const holdStore = "EBB_TEST_HOLD_STORE" // makes the test binary a process that holds that store

func TestMain(m *testing.M) {
	if dir := os.Getenv(holdStore); dir != "" {
		if _, err := Start(Config{StoreDir: dir}); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("held")
		bufio.NewReader(os.Stdin).ReadByte() // until the parent ends, or kills it
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func run(t *testing.T, config Config) *Server {
	t.Helper()
	s, err := Start(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Shutdown)
	return s
}

func connect(t *testing.T, s *Server, options ...nats.Option) jetstream.JetStream {
	t.Helper()
	conn, err := nats.Connect(s.ClientURL(), options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	js, err := jetstream.New(conn)
	if err != nil {
		t.Fatal(err)
	}
	return js
}

func TestRestartKeepsPortAndStore(t *testing.T) {
	config := Config{StoreDir: filepath.Join(t.TempDir(), "made", "by", "start"), SyncAlways: true}
	first := run(t, config)
	if !first.NATS().JetStreamConfig().SyncAlways {
		t.Error("JetStream does not sync always")
	}
	js := connect(t, first)
	if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "S", Subjects: []string{"s"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := js.Publish(t.Context(), "s", []byte("kept")); err != nil {
		t.Fatal(err)
	}
	config.Port = first.Port()
	url := first.ClientURL()
	first.Shutdown()
	first.Shutdown()

	second := run(t, config)
	if second.ClientURL() != url {
		t.Errorf("URL is %s after the restart, was %s", second.ClientURL(), url)
	}
	js = connect(t, second, nats.InProcessServer(second))
	stream, err := js.Stream(t.Context(), "S")
	if err != nil {
		t.Fatal(err)
	}
	msg, err := stream.GetMsg(t.Context(), 1)
	if err != nil || string(msg.Data) != "kept" {
		t.Errorf("message %v, %v", msg, err)
	}
}

func TestStoreIsLockedAgainstThisProcess(t *testing.T) {
	dir := t.TempDir()
	run(t, Config{StoreDir: dir})
	_, err := Start(Config{StoreDir: dir})
	if !errors.Is(err, ErrStoreInUse) || !strings.Contains(err.Error(), dir) || !strings.Contains(err.Error(), "embedded.store") {
		t.Errorf("error %v", err)
	}
}

func TestStoreIsLockedAgainstAnotherProcessUntilThatDies(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), holdStore+"="+dir)
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	defer stdin.Close()
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if line != "held\n" {
		t.Fatalf("the other process says %q, %v", line, err)
	}
	if _, err := Start(Config{StoreDir: dir}); !errors.Is(err, ErrStoreInUse) {
		t.Errorf("error %v", err)
	}
	cmd.Process.Kill()
	cmd.Wait()
	run(t, Config{StoreDir: dir})
}

func TestPortInUse(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	dir := t.TempDir()
	_, err = Start(Config{StoreDir: dir, Port: listener.Addr().(*net.TCPAddr).Port})
	if err == nil || !strings.Contains(err.Error(), listener.Addr().String()) || !strings.Contains(err.Error(), "in use") {
		t.Errorf("error %v", err)
	}
	run(t, Config{StoreDir: dir}) // the lock was given up
}

func TestConfigFile(t *testing.T) {
	dir := t.TempDir()
	write := func(content string) string {
		path := filepath.Join(t.TempDir(), "nats.conf")
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}

	s := run(t, Config{SyncAlways: true, ConfigFile: write(fmt.Sprintf(
		"server_name: named\nlisten: \"0.0.0.0:-1\"\njetstream { store_dir: %q }\n", dir))})
	js := connect(t, s)
	if _, err := js.AccountInfo(t.Context()); err != nil {
		t.Error(err)
	}
	if s.NATS().Name() != "named" {
		t.Errorf("server is named %s", s.NATS().Name())
	}
	if !s.NATS().JetStreamConfig().SyncAlways {
		t.Error("JetStream does not sync always, and the file does not say otherwise")
	}
	s.Shutdown()
	s = run(t, Config{SyncAlways: true, ConfigFile: write(fmt.Sprintf(
		"listen: \"127.0.0.1:-1\"\njetstream { store_dir: %q, sync_interval: 10s }\n", dir))})
	if s.NATS().JetStreamConfig().SyncAlways {
		t.Error("JetStream syncs always, and the file says otherwise")
	}

	for content, want := range map[string]string{
		"listen: \"127.0.0.1:-1\"":                      "does not enable JetStream",
		"listen: \"127.0.0.1:-1\"\njetstream {}":        "store_dir",
		"nonsense: 1":                                   "nonsense",
		fmt.Sprintf("jetstream { store_dir: %q }", dir): "store_dir in ",
	} {
		_, err := Start(Config{ConfigFile: write(content)})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v does not say %q", content, err, want)
		}
	}
}

func TestEmptyStoreIsRefused(t *testing.T) {
	if _, err := Start(Config{}); err == nil || !strings.Contains(err.Error(), "embedded.store") {
		t.Errorf("error %v", err)
	}
}

func TestLogger(t *testing.T) {
	var out strings.Builder
	logger := slog.New(slog.NewTextHandler(&lockedWriter{b: &out}, &slog.HandlerOptions{Level: slog.LevelDebug}))
	s := run(t, Config{StoreDir: t.TempDir(), Logger: logger, Adjust: func(o *server.Options) { o.ServerName = "adjusted" }})
	s.Shutdown()
	if !strings.Contains(out.String(), "Server is ready") || !strings.Contains(out.String(), "adjusted") {
		t.Errorf("logged:\n%s", out.String())
	}
}

func TestMaxPayload(t *testing.T) {
	s := run(t, Config{StoreDir: t.TempDir(), MaxPayload: 1000})
	js := connect(t, s)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if _, err := js.Publish(ctx, "s", make([]byte, 1001)); !errors.Is(err, nats.ErrMaxPayload) {
		t.Errorf("error %v", err)
	}
}

type lockedWriter struct {
	mu sync.Mutex
	b  *strings.Builder
}

func (w *lockedWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.Write(p)
}
