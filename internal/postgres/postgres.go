// Package postgres runs a private Postgres server as a child process.
package postgres

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"
)

// startTimeout bounds a start whose context has no deadline. It is long because crash recovery may be.
const startTimeout = 2 * time.Minute

// Superuser is the name of the role that URL logs in as.
const Superuser = "postgres"

// Config is a private server's.
type Config struct {
	// Installation holds the programs to run. The zero value means that Find looks for one.
	Installation Installation

	// DataDir is where the cluster is, or is made. It is kept. Left empty, the cluster is a temporary one, removed by Close.
	DataDir string

	// Port on 127.0.0.1; 0 takes a free one. It stays the same over restarts.
	Port int

	// Password of the superuser, set when the cluster is made. Left empty, anyone who reaches the port on the loopback
	// interface is let in, as any role: right for tests, not for a machine with other users.
	Password string

	// Fsync false gives up durability over a crash of the machine (not of the server) for speed.
	Fsync bool

	// Settings go into the configuration file, over the defaults (see defaults). ALTER SYSTEM has the last word.
	Settings map[string]string
}

// defaults serve logical replication to a few clients on a small machine.
func defaults() map[string]string {
	return map[string]string{
		"wal_level":             "logical",
		"max_wal_senders":       "64",
		"max_replication_slots": "64",
		"max_connections":       "60",
		"shared_buffers":        "32MB",
		"log_line_prefix":       "%m [%p] %q%u@%d/%a ",
	}
}

// forced are what Server itself relies on; they are set on the command line, above every file.
func (s *Server) forced() map[string]string {
	return map[string]string{
		"port":                    strconv.Itoa(s.port),
		"listen_addresses":        "127.0.0.1",
		"unix_socket_directories": "", // none: their paths are short of room, and need another directory to own
		"logging_collector":       "off",
		"log_destination":         "stderr",
	}
}

// StopMode is one of the ways a Postgres server shuts down; see "Shutting Down the Server" in its documentation.
type StopMode string

// The modes, by the names that pg_ctl has for them.
const (
	Smart     StopMode = "smart"     // waits for every session to end by itself
	Fast      StopMode = "fast"      // ends the sessions, and waits for walsenders to send what is left
	Immediate StopMode = "immediate" // ends at once, with crash recovery at the next start
)

func (m StopMode) signal() (syscall.Signal, error) {
	switch m {
	case Smart:
		return syscall.SIGTERM, nil
	case Fast:
		return syscall.SIGINT, nil
	case Immediate:
		return syscall.SIGQUIT, nil
	}
	return 0, fmt.Errorf("stop mode %q: must be %s, %s or %s", string(m), Smart, Fast, Immediate)
}

// Server is a private server. Its methods may be called from several goroutines; those that start and stop it wait for each other.
type Server struct {
	installation Installation
	account      *account
	password     string
	dataDir      string
	temp         *tempDir // nil for a data directory that is kept
	fixedPort    bool
	settings     map[string]string // of the configuration file: defaults, and Config's over them
	standbyName  string            // of a server made by Standby

	mu      sync.Mutex // held while starting and stopping
	port    int
	killed  bool     // the last end was Kill
	process *process // the last one started
	closed  bool
}

// Start makes the cluster, unless it is there already, starts the server, and returns when it accepts connections.
//
// As root, it runs the server as another user (the data directory's owner, else postgres, else nobody).
func Start(ctx context.Context, config Config) (*Server, error) {
	ctx, cancel := withStartTimeout(ctx)
	defer cancel()
	installation := config.Installation
	if installation.BinDir == "" {
		var err error
		if installation, err = Find(ctx); err != nil {
			return nil, err
		}
	}
	s := &Server{installation: installation, password: config.Password, port: config.Port, fixedPort: config.Port != 0}
	if err := s.prepare(ctx, config); err != nil {
		return nil, errors.Join(fmt.Errorf("prepare a server of %s: %w", installation, err), s.removeTemp())
	}
	if err := s.Start(ctx); err != nil {
		return nil, errors.Join(err, s.removeTemp())
	}
	return s, nil
}

func withStartTimeout(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return ctx, func() {}
	}
	return context.WithTimeoutCause(ctx, startTimeout, fmt.Errorf("not ready within %s", startTimeout))
}

// prepare makes the cluster and its configuration.
func (s *Server) prepare(ctx context.Context, config Config) (err error) {
	if config.DataDir != "" {
		if s.dataDir, err = filepath.Abs(config.DataDir); err != nil {
			return fmt.Errorf("data directory: %w", err)
		}
	}
	if s.account, err = serverAccount(s.dataDir); err != nil {
		return err
	}
	scratch := s.dataDir
	if s.dataDir == "" {
		if s.temp, err = makeTempDir(s.account); err != nil {
			return err
		}
		s.dataDir, scratch = s.temp.data(), s.temp.path
	}

	version, err := os.ReadFile(filepath.Join(s.dataDir, "PG_VERSION"))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if err := s.makeCluster(ctx, config, scratch); err != nil {
			return err
		}
	case err != nil:
		return fmt.Errorf("look at the data directory: %w", err)
	default:
		if made := strings.TrimSpace(string(version)); made != strconv.Itoa(s.installation.Major) {
			return fmt.Errorf("the data directory %s was made by Postgres %s; point %s to that version's programs, "+
				"or choose another directory", s.dataDir, made, BinEnv)
		}
		if _, err := os.Stat(filepath.Join(s.dataDir, confName)); err != nil {
			return fmt.Errorf("the data directory %s was not made by ebb, or not to the end (%w); remove it or choose another one",
				s.dataDir, err)
		}
	}
	if err := s.account.canRun(s.installation.Program("postgres"), s.dataDir); err != nil {
		return err
	}
	s.settings = defaults()
	if !config.Fsync {
		// Without fsync there is no torn page to mend either, and a commit has no flush to wait for.
		s.settings["fsync"], s.settings["full_page_writes"] = "off", "off"
	}
	maps.Copy(s.settings, config.Settings)
	return s.configure()
}

// makeCluster runs initdb. The file of our settings comes last: it says that the cluster is complete.
func (s *Server) makeCluster(ctx context.Context, config Config, scratch string) error {
	if s.temp == nil {
		entries, err := os.ReadDir(s.dataDir)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			// Its parents are for others to pass, the server's account for one.
			err := os.MkdirAll(filepath.Dir(s.dataDir), 0o755)
			if err == nil {
				err = os.Mkdir(s.dataDir, 0o700)
			}
			if err != nil {
				return fmt.Errorf("make the data directory: %w", err)
			}
		case err != nil:
			return fmt.Errorf("look at the data directory: %w", err)
		case len(entries) > 0:
			return fmt.Errorf("the data directory %s is neither empty nor a Postgres cluster; choose another one", s.dataDir)
		}
		if err := s.account.chown(s.dataDir); err != nil {
			return err
		}
	}
	if err := s.account.canRun(s.installation.Program("initdb"), scratch); err != nil {
		return err
	}
	err := initdb(ctx, initdbConfig{
		installation: s.installation,
		account:      s.account,
		dir:          s.dataDir,
		scratch:      scratch,
		password:     config.Password,
		fsync:        config.Fsync,
	})
	if err != nil {
		return err
	}
	conf, err := os.OpenFile(filepath.Join(s.dataDir, "postgresql.conf"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("add to the server's configuration: %w", err)
	}
	_, err = fmt.Fprintf(conf, "\ninclude '%s'\n", confName)
	if err := errors.Join(err, conf.Close()); err != nil {
		return fmt.Errorf("add to the server's configuration: %w", err)
	}
	return nil
}

// confName is our configuration file in the data directory. Settings there, rather than on the command line, leave room for
// ALTER SYSTEM.
const confName = "ebb.conf"

func (s *Server) configure() error {
	quote := strings.NewReplacer(`'`, `''`, `\`, `\\`)
	var content strings.Builder
	content.WriteString("# written at every start; use ALTER SYSTEM instead\n")
	for _, name := range slices.Sorted(maps.Keys(s.settings)) {
		fmt.Fprintf(&content, "%s = '%s'\n", name, quote.Replace(s.settings[name]))
	}
	path := filepath.Join(s.dataDir, confName)
	if err := os.WriteFile(path, []byte(content.String()), 0o600); err != nil {
		return fmt.Errorf("write the server's configuration: %w", err)
	}
	return s.account.chown(path)
}

type initdbConfig struct {
	installation Installation
	account      *account
	dir          string
	scratch      string // a directory that the account reaches; may be dir
	password     string
	fsync        bool
}

func initdb(ctx context.Context, config initdbConfig) (err error) {
	args := []string{"-D", config.dir, "-U", Superuser, "-E", "UTF8", "--locale=C", "--no-instructions"}
	if !config.fsync {
		args = append(args, "--no-sync")
	}
	if config.password == "" {
		args = append(args, "--auth=trust")
	} else {
		// A directory of its own, because the data directory has to be empty.
		temp, err := makeTempDir(config.account)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, temp.remove()) }()
		file := filepath.Join(temp.path, "password")
		if err := os.WriteFile(file, []byte(config.password+"\n"), 0o600); err != nil {
			return fmt.Errorf("hand the password to initdb: %w", err)
		}
		if err := config.account.chown(file); err != nil {
			return err
		}
		args = append(args, "--auth=scram-sha-256", "--pwfile="+file)
	}
	cmd := exec.CommandContext(ctx, config.installation.Program("initdb"), args...)
	cmd.Dir, cmd.Env, cmd.SysProcAttr = config.scratch, serverEnv(), config.account.sysProcAttr()
	// initdb removes what it has made when it is told to end.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	if out, err := cmd.CombinedOutput(); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return fmt.Errorf("initdb: %w\n%s", err, strings.TrimSpace(string(out)))
	}
	return nil
}

// serverEnv is this process's environment without what would change the server: libpq's variables, and the locale (on macOS a
// server without LC_ALL may refuse to start).
func serverEnv() []string {
	env := slices.DeleteFunc(os.Environ(), func(variable string) bool {
		return strings.HasPrefix(variable, "PG") || strings.HasPrefix(variable, "LC_") || strings.HasPrefix(variable, "LANG")
	})
	return append(env, "LC_ALL=C")
}

// Start starts a server that was stopped, killed or has died, on the same port and data. One that runs is left alone.
func (s *Server) Start(ctx context.Context) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.start(ctx)
}

func (s *Server) start(ctx context.Context) error {
	if s.closed {
		return errors.New("start postgres: it was closed")
	}
	if s.running() {
		return nil
	}
	ctx, cancel := withStartTimeout(ctx)
	defer cancel()
	orphans := time.Now().Add(30 * time.Second)
	for attempt := 1; ; attempt++ {
		choosePort := !s.fixedPort
		if choosePort {
			port, err := freePort()
			if err != nil {
				return fmt.Errorf("start postgres: %w", err)
			}
			s.port = port
		}
		err := s.startOnce(ctx)
		if err == nil {
			s.fixedPort, s.killed = true, false
			return nil
		}
		switch {
		case ctx.Err() != nil:
		case choosePort && attempt < 5 && !portFree(s.port):
			continue // somebody else was faster
		case s.killed && time.Now().Before(orphans):
			// The sessions of a killed postmaster end on their own, soon, and until then its successor refuses to start.
			if wait(ctx, 20*time.Millisecond) == nil {
				continue
			}
		}
		return fmt.Errorf("start postgres on 127.0.0.1:%d: %w", s.port, err)
	}
}

func (s *Server) startOnce(ctx context.Context) error {
	logFile, err := os.OpenFile(s.LogFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("open the server's log: %w", err)
	}
	defer logFile.Close()
	if err := s.account.chown(s.LogFile()); err != nil {
		return err
	}
	logStart, err := logFile.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("open the server's log: %w", err)
	}

	args := []string{"-D", s.dataDir}
	forced := s.forced()
	for _, name := range slices.Sorted(maps.Keys(forced)) {
		args = append(args, "-c", name+"="+forced[name])
	}
	cmd := exec.Command(s.installation.Program("postgres"), args...)
	cmd.Dir, cmd.Env, cmd.SysProcAttr = s.dataDir, serverEnv(), s.account.sysProcAttr()
	cmd.Stdout, cmd.Stderr = logFile, logFile
	process, err := startProcess(cmd)
	if err != nil {
		return err
	}
	s.process = process

	// The server says in its pid file when it accepts connections; pg_ctl waits for the same.
	for {
		if p := readPidFile(s.dataDir); p.pid == process.Pid && (p.status == "ready" || p.status == "standby") {
			return nil
		}
		select {
		case <-process.done:
			return fmt.Errorf("the server ended; its log says\n%s", s.logSince(logStart))
		default:
		}
		if err := wait(ctx, 10*time.Millisecond); err != nil {
			s.end(Immediate)
			return fmt.Errorf("wait for the server: %w; its log says\n%s", err, s.logSince(logStart))
		}
	}
}

// freePort finds a port below those that systems hand to outgoing connections: one of these could take the port away while the
// server restarts.
func freePort() (int, error) {
	const low, high = 20000, 32000
	for range 200 {
		if port := low + rand.IntN(high-low); portFree(port) {
			return port, nil
		}
	}
	return 0, fmt.Errorf("found no free port on 127.0.0.1 between %d and %d", low, high)
}

func portFree(port int) bool {
	listener, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
	if err != nil {
		return false
	}
	listener.Close()
	return true
}

func (s *Server) running() bool {
	if s.process == nil {
		return false
	}
	select {
	case <-s.process.done:
		return false
	default:
		return true
	}
}

// Done is closed when the server process that runs now has ended, for whatever reason.
func (s *Server) Done() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.process.done
}

// Stop shuts the server down and waits until it has ended. When ctx ends first the server is left as it is, still shutting down.
// One that does not run is no error.
func (s *Server) Stop(ctx context.Context, mode StopMode) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stop(ctx, mode)
}

func (s *Server) stop(ctx context.Context, mode StopMode) error {
	signal, err := mode.signal()
	if err != nil {
		return err
	}
	if !s.running() {
		return nil
	}
	s.process.Signal(signal)
	select {
	case <-s.process.done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("stop postgres (%s): %w", mode, context.Cause(ctx))
	}
}

// Restart stops the server and starts it again, on the same port and data.
func (s *Server) Restart(ctx context.Context, mode StopMode) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.stop(ctx, mode); err != nil {
		return err
	}
	return s.start(ctx)
}

// Kill ends the server without warning (SIGKILL). Its sessions notice soon after.
func (s *Server) Kill() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kill()
}

func (s *Server) kill() {
	if s.running() {
		s.killed = true
		s.process.Kill()
		<-s.process.done
	}
}

// end stops the server in the given mode, or harder when it takes long.
func (s *Server) end(mode StopMode) {
	modes := []StopMode{Immediate}
	if mode != Immediate {
		modes = []StopMode{mode, Immediate}
	}
	for _, mode := range modes {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		err := s.stop(ctx, mode)
		cancel()
		if err == nil {
			return
		}
	}
	s.kill()
}

// Close ends the server for good: at once, and with its directory, when that is a temporary one; by a fast shutdown, which is
// not waited for more than ten seconds, when the data is kept.
func (s *Server) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	if s.temp == nil {
		s.end(Fast)
		return nil
	}
	s.end(Immediate)
	return s.removeTemp()
}

func (s *Server) removeTemp() error {
	if s.temp == nil {
		return nil
	}
	return s.temp.remove()
}

// SetSetting changes a setting by ALTER SYSTEM and reloads the configuration. New sessions have it when SetSetting returns,
// others at the next moment they are idle; some settings need a Restart.
func (s *Server) SetSetting(ctx context.Context, name, value string) error {
	literal := "'" + strings.ReplaceAll(value, "'", "''") + "'"
	return s.alterSystem(ctx, name, "SET "+pgx.Identifier{name}.Sanitize()+" = "+literal)
}

// ResetSetting undoes SetSetting.
func (s *Server) ResetSetting(ctx context.Context, name string) error {
	return s.alterSystem(ctx, name, "RESET "+pgx.Identifier{name}.Sanitize())
}

func (s *Server) alterSystem(ctx context.Context, name, command string) error {
	conn, err := pgx.Connect(ctx, s.URL("postgres"))
	if err != nil {
		return fmt.Errorf("change the setting %s: %w", name, err)
	}
	defer conn.Close(context.WithoutCancel(ctx))
	if _, err := conn.Exec(ctx, "ALTER SYSTEM "+command); err != nil {
		return fmt.Errorf("change the setting %s: %w", name, err)
	}
	// The postmaster reads the files before it tells its children, so once a session has, new ones do as well.
	var before, after time.Time
	err = conn.QueryRow(ctx, "SELECT pg_conf_load_time() FROM pg_reload_conf()").Scan(&before)
	for err == nil && !after.After(before) {
		if err = wait(ctx, 5*time.Millisecond); err == nil {
			err = conn.QueryRow(ctx, "SELECT pg_conf_load_time()").Scan(&after)
		}
	}
	if err != nil {
		return fmt.Errorf("reload the configuration: %w", err)
	}
	if name == "synchronous_standby_names" {
		// Whether commits wait at all, the checkpointer tells everybody, once it has reloaded the files as well: before its next checkpoint.
		if _, err := conn.Exec(ctx, "CHECKPOINT"); err != nil {
			return fmt.Errorf("have the checkpointer reload the configuration: %w", err)
		}
	}
	return nil
}

// URL is the connection URL of a database, for the superuser.
func (s *Server) URL(database string) string {
	u := url.URL{
		Scheme:   "postgres",
		User:     url.User(Superuser),
		Host:     net.JoinHostPort("127.0.0.1", strconv.Itoa(s.Port())),
		Path:     "/" + database,
		RawQuery: "sslmode=disable",
	}
	if s.password != "" {
		u.User = url.UserPassword(Superuser, s.password)
	}
	return u.String()
}

// Port is the port on 127.0.0.1.
func (s *Server) Port() int { return s.port } // set before Start hands the server out

// DataDir is the directory of the cluster.
func (s *Server) DataDir() string { return s.dataDir }

// Installation is what runs.
func (s *Server) Installation() Installation { return s.installation }

// LogFile is where the server logs to. It is in the data directory.
func (s *Server) LogFile() string { return filepath.Join(s.dataDir, "server.log") }

// LogTail returns the last lines of the server's log, for an error or a failed test.
func (s *Server) LogTail() string { return s.logSince(0) }

// logSince is what the log has from an offset on, but no more than the last 4 KB of it.
func (s *Server) logSince(offset int64) string {
	const most = 4 << 10
	file, err := os.Open(s.LogFile())
	if err != nil {
		return err.Error()
	}
	defer file.Close()
	if info, err := file.Stat(); err == nil {
		offset = max(offset, info.Size()-most)
	}
	content, err := io.ReadAll(io.NewSectionReader(file, offset, most))
	if err != nil {
		return err.Error()
	}
	if len(content) == most { // the first line is cut
		if newline := strings.IndexByte(string(content), '\n'); newline >= 0 {
			content = content[newline+1:]
		}
	}
	return strings.TrimSpace(string(content))
}
