package postgres

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgproto3"
	"go.uber.org/goleak"
)

const holdServer = "EBB_TEST_HOLD_SERVER" // makes the test binary a process that holds a server

func TestMain(m *testing.M) {
	if os.Getenv(holdServer) != "" {
		server, err := Start(context.Background(), Config{})
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println(server.process.Pid, server.dataDir)
		bufio.NewReader(os.Stdin).ReadByte() // until the parent ends, or kills it
		os.Exit(0)
	}
	goleak.VerifyTestMain(m)
}

func start(t *testing.T, config Config) *Server {
	t.Helper()
	s, err := Start(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func connect(t *testing.T, s *Server) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), s.URL("postgres"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	return conn
}

func value(t *testing.T, s *Server, query string) string {
	t.Helper()
	conn := connect(t, s)
	defer conn.Close(t.Context())
	var value string
	if err := conn.QueryRow(t.Context(), query).Scan(&value); err != nil {
		t.Fatalf("%s: %v", query, err)
	}
	return value
}

func exec1(t *testing.T, s *Server, statement string) {
	t.Helper()
	conn := connect(t, s)
	defer conn.Close(t.Context())
	if _, err := conn.Exec(t.Context(), statement); err != nil {
		t.Fatalf("%s: %v", statement, err)
	}
}

func TestLife(t *testing.T) {
	s := start(t, Config{Settings: map[string]string{"shared_buffers": "16MB", "cluster_name": `it's \n`}})
	for setting, want := range map[string]string{
		"wal_level": "logical", "fsync": "off", "shared_buffers": "16MB", "cluster_name": `it's \n`, "server_encoding": "UTF8",
		"listen_addresses": "127.0.0.1", "lc_messages": "C",
	} {
		if got := value(t, s, "SHOW "+setting); got != want {
			t.Errorf("%s is %q, want %q", setting, got, want)
		}
	}
	if got := value(t, s, "SHOW server_version"); !strings.HasPrefix(got, s.Installation().Version) {
		t.Errorf("server %s, found %s", got, s.Installation())
	}
	if group, err := syscall.Getpgid(s.process.Pid); err != nil || group != s.process.Pid {
		t.Errorf("the server is in process group %d (%v), where a Ctrl-C may reach it", group, err)
	}
	exec1(t, s, "CREATE TABLE kept (x int)")
	port := s.Port()

	if err := s.Start(t.Context()); err != nil { // no effect while it runs
		t.Fatal(err)
	}
	for _, mode := range []StopMode{Smart, Fast, Immediate} {
		if err := s.Restart(t.Context(), mode); err != nil {
			t.Fatal(err)
		}
		if got := value(t, s, "SELECT count(*)::text FROM kept"); got != "0" || s.Port() != port {
			t.Errorf("%s: %s rows, port %d, was %d", mode, got, s.Port(), port)
		}
	}

	// A session that is busy when the postmaster dies holds its successor up until it ends.
	busy := connect(t, s)
	busy.PgConn().Frontend().SendQuery(&pgproto3.Query{String: "SELECT pg_sleep(0.3), count(*) FROM generate_series(1, 3000000)"})
	if err := busy.PgConn().Frontend().Flush(); err != nil {
		t.Fatal(err)
	}
	done := s.Done()
	s.Kill()
	<-done
	if err := s.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	value(t, s, "SELECT count(*)::text FROM kept")

	if err := s.Stop(t.Context(), "slow"); err == nil {
		t.Error("an unknown stop mode was taken")
	}
	for range 2 {
		if err := s.Stop(t.Context(), Fast); err != nil {
			t.Fatal(err)
		}
	}
	s.Kill()
	for range 2 {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(filepath.Dir(s.DataDir())); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the temporary directory is still there: %v", err)
	}
	if err := s.Start(t.Context()); err == nil {
		t.Error("a closed server was started")
	}
}

func TestStopGivesUpWithItsContext(t *testing.T) {
	s := start(t, Config{})
	connect(t, s) // smart waits for it
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if err := s.Stop(ctx, Smart); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "smart") {
		t.Errorf("error %v", err)
	}
	if err := s.Stop(t.Context(), Fast); err != nil {
		t.Error(err)
	}
}

func TestSettings(t *testing.T) {
	s := start(t, Config{Settings: map[string]string{"work_mem": "5MB"}})
	if err := s.SetSetting(t.Context(), "work_mem", "6MB"); err != nil {
		t.Fatal(err)
	}
	if got := value(t, s, "SHOW work_mem"); got != "6MB" {
		t.Errorf("work_mem is %s after SetSetting", got)
	}
	if err := s.SetSetting(t.Context(), "synchronous_standby_names", "one, two"); err != nil {
		t.Fatal(err)
	}
	if got := value(t, s, "SHOW synchronous_standby_names"); got != "one, two" {
		t.Errorf("synchronous_standby_names is %q", got)
	}
	if err := s.ResetSetting(t.Context(), "work_mem"); err != nil {
		t.Fatal(err)
	}
	if got := value(t, s, "SHOW work_mem"); got != "5MB" {
		t.Errorf("work_mem is %s after ResetSetting", got)
	}
	if err := s.SetSetting(t.Context(), "no_such", "1"); err == nil || !strings.Contains(err.Error(), "no_such") {
		t.Errorf("error %v", err)
	}
}

func TestFailedStartShowsTheLog(t *testing.T) {
	_, err := Start(t.Context(), Config{Settings: map[string]string{"max_wal_senders": "many"}})
	if err == nil || !strings.Contains(err.Error(), `"max_wal_senders"`) {
		t.Errorf("error %v", err)
	}
}

func TestPortInUse(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	port := listener.Addr().(*net.TCPAddr).Port
	if _, err := Start(t.Context(), Config{Port: port}); err == nil || !strings.Contains(err.Error(), strconv.Itoa(port)) {
		t.Errorf("error %v", err)
	}
}

// reachable is a directory that the server's account can pass, which t.TempDir is not for root.
func reachable(t *testing.T) string {
	t.Helper()
	account, err := serverAccount("")
	if err != nil {
		t.Fatal(err)
	}
	temp, err := makeTempDir(account)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := temp.remove(); err != nil {
			t.Error(err)
		}
	})
	return temp.path
}

func TestDataDirIsKept(t *testing.T) {
	dir := filepath.Join(reachable(t), "a", "cluster")
	config := Config{DataDir: dir, Password: "it's s€cret", Fsync: true}
	s := start(t, config)
	exec1(t, s, "CREATE TABLE kept (x int)")
	if got := value(t, s, "SHOW fsync"); got != "on" {
		t.Errorf("fsync is %s", got)
	}
	noPassword := fmt.Sprintf("postgres://postgres@127.0.0.1:%d/postgres?sslmode=disable", s.Port())
	if conn, err := pgx.Connect(t.Context(), noPassword); err == nil {
		conn.Close(t.Context())
		t.Error("let in without the password")
	}
	if _, err := Start(t.Context(), config); err == nil || !strings.Contains(err.Error(), "postmaster.pid") {
		t.Errorf("a second server on the data directory: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	s = start(t, config)
	value(t, s, "SELECT count(*)::text FROM kept")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}

	if err := os.WriteFile(filepath.Join(dir, "PG_VERSION"), []byte("12\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Start(t.Context(), config); err == nil || !strings.Contains(err.Error(), "made by Postgres 12") {
		t.Errorf("data of another version: %v", err)
	}
}

func TestForeignDataDirIsRefused(t *testing.T) {
	dir := reachable(t)
	if err := os.WriteFile(filepath.Join(dir, "thesis.tex"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Start(t.Context(), Config{DataDir: dir}); err == nil || !strings.Contains(err.Error(), "neither empty nor") {
		t.Errorf("error %v", err)
	}
	installation, err := Find(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	dir = reachable(t)
	if err := os.WriteFile(filepath.Join(dir, "PG_VERSION"), fmt.Appendln(nil, installation.Major), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Start(t.Context(), Config{DataDir: dir}); err == nil || !strings.Contains(err.Error(), "not made by ebb") {
		t.Errorf("error %v", err)
	}
}

func TestRootIsToldWhereTheServerCannotGo(t *testing.T) {
	if os.Geteuid() != 0 {
		return // others run the server as themselves
	}
	closed := t.TempDir()
	if err := os.Chmod(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	_, err := Start(t.Context(), Config{DataDir: filepath.Join(closed, "cluster")})
	if err == nil || !strings.Contains(err.Error(), "cannot pass /") || !strings.Contains(err.Error(), "choose another directory") {
		t.Errorf("error %v", err)
	}

	// A TMPDIR it cannot pass is no obstacle.
	t.Setenv("TMPDIR", closed)
	start(t, Config{})
}

func TestServerDiesWithItsParentAndIsSweptUp(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("only Linux can do that")
	}
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), holdServer+"=1")
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
	pidText, dataDir, ok := strings.Cut(strings.TrimSpace(line), " ")
	pid, _ := strconv.Atoi(pidText)
	if err != nil || !ok || pid == 0 {
		t.Fatalf("the other process says %q, %v", line, err)
	}
	// While its owner lives the directory stays.
	sweep(filepath.Dir(filepath.Dir(dataDir)))
	if readPidFile(dataDir).pid != pid {
		t.Fatal("swept up under a living server")
	}

	cmd.Process.Kill()
	cmd.Wait()
	deadline := time.Now().Add(20 * time.Second)
	for {
		sweep(filepath.Dir(filepath.Dir(dataDir)))
		_, err := os.Stat(filepath.Dir(dataDir))
		if errors.Is(err, fs.ErrNotExist) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("server %d and its directory are left over: %v", pid, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
