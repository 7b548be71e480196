package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"

	"ebb/event"
	"ebb/internal/natstest"
	"ebb/internal/pgtest"
	"ebb/internal/postgres"
)

// asEbb in the environment makes the test binary the program itself.
const asEbb = "EBB_TEST_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(asEbb) != "" {
		go dieWithParent(os.Getppid())
		main()
	}
	pgtest.Main(m, natstest.Leaks()...)
}

// dieWithParent ends a program whose test was killed, and could not end it.
func dieWithParent(parent int) {
	for os.Getppid() == parent {
		time.Sleep(time.Second)
	}
	os.Exit(100)
}

// buffer is what a process has printed so far.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// program is an ebb that runs.
type program struct {
	cmd            *exec.Cmd
	stdout, stderr buffer
	done           chan struct{} // closed when it has ended
}

// environ is this process's environment without what would configure an ebb, but for the variables given.
func environ(variables ...string) []string {
	env := slices.DeleteFunc(os.Environ(), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return name == "DATABASE_URL" || strings.HasPrefix(name, "EBB_") && name != "EBB_PG_BIN" || strings.HasPrefix(name, "PG")
	})
	// A program with the race detector would sleep for a second before it ends.
	return append(append(env, asEbb+"=1", "GORACE=atexit_sleep_ms=0"), variables...)
}

// launch starts ebb in a directory, with what adjust changes. It may be called from any goroutine.
func launch(dir string, adjust func(*exec.Cmd), args ...string) (*program, error) {
	executable, err := os.Executable()
	if err != nil {
		return nil, err
	}
	p := &program{cmd: exec.Command(executable, args...), done: make(chan struct{})}
	p.cmd.Dir, p.cmd.Env, p.cmd.Stdout, p.cmd.Stderr = dir, environ(), &p.stdout, &p.stderr
	p.cmd.WaitDelay = 5 * time.Second // a child of its own that outlives it would hold the pipes
	if adjust != nil {
		adjust(p.cmd)
	}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		_ = p.cmd.Wait() // what it says is in ProcessState
		close(p.done)
	}()
	return p, nil
}

// start starts an ebb in an empty directory, which is killed when the test ends, if it still runs then.
func start(t *testing.T, adjust func(*exec.Cmd), args ...string) *program {
	t.Helper()
	p, err := launch(t.TempDir(), adjust, args...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			t.Logf("ebb %s: %s\nstdout:\n%s\nstderr:\n%s", strings.Join(args, " "), p.cmd.ProcessState, tail(p.stdout.String()), tail(p.stderr.String()))
		}
		p.checkRaces(t)
	})
	return p
}

func tail(s string) string {
	const most = 3000
	if len(s) > most {
		return "…" + s[len(s)-most:]
	}
	return s
}

func (p *program) checkRaces(t *testing.T) {
	if strings.Contains(p.stderr.String(), "DATA RACE") {
		t.Errorf("ebb has a data race:\n%s", p.stderr.String())
	}
}

func (p *program) kill() {
	p.cmd.Process.Kill()
	<-p.done
}

// ended waits until the program has ended, and returns its exit code; -1 means that a signal ended it.
func (p *program) ended(t *testing.T, timeout time.Duration) int {
	t.Helper()
	select {
	case <-p.done:
		return p.cmd.ProcessState.ExitCode()
	case <-time.After(timeout):
		t.Fatalf("ebb %s still runs after %s", strings.Join(p.cmd.Args[1:], " "), timeout)
		return 0
	}
}

// stop asks the program to end, which must then say that all is well.
func (p *program) stop(t *testing.T) {
	t.Helper()
	if err := p.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if code := p.ended(t, 30*time.Second); code != 0 {
		t.Fatalf("exit code %d after SIGTERM, want 0", code)
	}
}

// logs waits until the program has logged text.
func (p *program) logs(t *testing.T, timeout time.Duration, text string) {
	t.Helper()
	pgtest.Eventually(t, timeout, func() (bool, string) {
		if strings.Contains(p.stderr.String(), text) {
			return true, ""
		}
		select {
		case <-p.done:
			t.Fatalf("ebb ended (%s) without having logged %q", p.cmd.ProcessState, text)
		default:
		}
		return false, fmt.Sprintf("not logged: %q", text)
	})
}

// result is what an ebb that has ended leaves.
type result struct {
	code           int
	stdout, stderr string
}

// ebb runs the program to its end.
func ebb(t *testing.T, args ...string) result {
	t.Helper()
	return ebbWith(t, nil, args...)
}

func ebbWith(t *testing.T, adjust func(*exec.Cmd), args ...string) result {
	t.Helper()
	p := start(t, adjust, args...)
	code := p.ended(t, time.Minute)
	return result{code, p.stdout.String(), p.stderr.String()}
}

// must has the command succeed.
func (r result) must(t *testing.T) result {
	t.Helper()
	if r.code != 0 {
		t.Fatalf("exit code %d, want 0\nstdout: %s\nstderr: %s", r.code, r.stdout, r.stderr)
	}
	return r
}

// fails checks the exit code, that nothing was printed as data, and that the last line on stderr, the error, holds all words.
func (r result) fails(t *testing.T, code int, words ...string) {
	t.Helper()
	if r.code != code {
		t.Errorf("exit code %d, want %d; stderr: %s", r.code, code, r.stderr)
	}
	if r.stdout != "" {
		t.Errorf("printed as data: %s", r.stdout)
	}
	lines := strings.Split(strings.TrimSuffix(r.stderr, "\n"), "\n")
	last := lines[len(lines)-1]
	if !strings.HasPrefix(last, "ebb: ") {
		t.Errorf("the last line of stderr is no error of ebb: %q", last)
	}
	if strings.ContainsAny(last, "\x1b\x00") || len(last) > 1000 {
		t.Errorf("not an error that somebody can read: %q", last)
	}
	for _, word := range words {
		if !strings.Contains(last, word) {
			t.Errorf("the error does not say %q: %s", word, last)
		}
	}
}

// site is a database, a sink and the configuration that connects them.
type site struct {
	db *pgtest.Database
	// config is the configuration file.
	config string
}

// newSite writes a configuration, in which the slot and the publication have the database's name, because slots belong to
// the whole cluster. Further lines of YAML may follow.
func newSite(t *testing.T, db *pgtest.Database, sink string, yaml ...string) *site {
	t.Helper()
	s := &site{db: db, config: filepath.Join(t.TempDir(), "ebb.yaml")}
	lines := append([]string{
		"postgres: " + quote(db.URL), "slot: " + db.Name, "publication: " + db.Name, "sink: " + quote(sink), `listen: ""`,
		"recorded: {every: 100ms}",
	}, yaml...)
	if err := os.WriteFile(s.config, []byte(strings.Join(lines, "\n")+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	return s
}

func quote(s string) string {
	b, err := json.Marshal(s)
	if err != nil {
		panic(err)
	}
	return string(b)
}

func (s *site) args(args ...string) []string { return append(args, "--config", s.config) }

func (s *site) ebb(t *testing.T, args ...string) result {
	t.Helper()
	return ebb(t, s.args(args...)...)
}

func (s *site) setup(t *testing.T) { t.Helper(); s.ebb(t, "setup").must(t) }

// run starts a bridge.
func (s *site) run(t *testing.T) *program {
	t.Helper()
	return start(t, nil, s.args("run")...)
}

// streaming starts a bridge and waits until it streams.
func (s *site) streaming(t *testing.T) *program {
	t.Helper()
	p := s.run(t)
	p.logs(t, 20*time.Second, "msg=streaming")
	return p
}

// put puts one event with an integer in its payload and returns its id.
func (s *site) put(t *testing.T, n int) string {
	t.Helper()
	return pgtest.Value[string](t, s.db, `SELECT ebb.put('numbers', json_build_object('n', $1::int))::text`, n)
}

// ids are the ids of the buffer's rows, in the order in which they were inserted.
func (s *site) ids(t *testing.T) []string {
	t.Helper()
	return pgtest.Value[[]string](t, s.db, "SELECT coalesce(array_agg(id::text ORDER BY id), '{}') FROM ebb.buffer")
}

// delivered waits until the stream EBB holds n messages.
func delivered(t *testing.T, server *natstest.Server, timeout time.Duration, n int) {
	t.Helper()
	js := server.JetStream(t)
	pgtest.Eventually(t, timeout, func() (bool, string) {
		stream, err := js.Stream(t.Context(), "EBB")
		if err != nil {
			return false, err.Error()
		}
		have := int(stream.CachedInfo().State.Msgs)
		if have > n {
			t.Fatalf("the stream holds %d messages, want %d", have, n)
		}
		return have == n, fmt.Sprintf("the stream holds %d of %d messages", have, n)
	})
}

// streamIDs are the ids of the messages of the stream EBB, in order.
func streamIDs(t *testing.T, server *natstest.Server) []string {
	t.Helper()
	ids := []string{}
	for _, m := range server.Messages(t, "EBB") {
		ids = append(ids, m.Header.Get("ce-id"))
	}
	return ids
}

func equalIDs(t *testing.T, what string, got, want []string) {
	t.Helper()
	for i := range max(len(got), len(want)) {
		if i >= len(got) || i >= len(want) || got[i] != want[i] {
			t.Fatalf("%s: %d events, want %d; they differ at %d: %.200q, want %.200q", what, len(got), len(want), i, got[min(i, len(got)):],
				want[min(i, len(want)):])
		}
	}
}

// confirmed is the slot's confirmed flush.
func (s *site) confirmed(t *testing.T) event.LSN {
	t.Helper()
	return lsn(t, s.db, "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = $1", s.db.Name)
}

func lsn(t *testing.T, db *pgtest.Database, query string, args ...any) event.LSN {
	t.Helper()
	l, err := event.ParseLSN(pgtest.Value[string](t, db, query, args...))
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// confirms waits until the slot's confirmed flush has reached what the server had written when it was called.
func (s *site) confirms(t *testing.T, timeout time.Duration) {
	t.Helper()
	now := lsn(t, s.db, "SELECT pg_current_wal_lsn()::text")
	pgtest.Eventually(t, timeout, func() (bool, string) {
		confirmed := s.confirmed(t)
		return confirmed >= now, fmt.Sprintf("confirmed %s of %s", confirmed, now)
	})
}

// witness is a second slot on the same publication, which is read by other code than the bridge's.
type witness struct {
	db   *pgtest.Database
	slot string
}

func (s *site) witness(t *testing.T) witness {
	t.Helper()
	w := witness{db: s.db, slot: s.db.Name + "_w"}
	s.db.Exec(t, fmt.Sprintf("SELECT pg_create_logical_replication_slot('%s', 'pgoutput')", w.slot))
	return w
}

type witnessed struct {
	ids []string
	end event.LSN // where the transaction ends
}

// transactions are what was committed since the witness was called, in commit order.
func (w witness) transactions(t *testing.T) []witnessed {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	db, err := pgx.Connect(ctx, w.db.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close(context.WithoutCancel(ctx))
	rows, err := db.Query(ctx, `SELECT data FROM pg_logical_slot_peek_binary_changes($1, NULL, NULL, 'proto_version', '1', 'publication_names', $2)`,
		w.slot, w.db.Name)
	if err != nil {
		t.Fatal(err)
	}
	var all []witnessed
	var open witnessed
	var data []byte
	_, err = pgx.ForEachRow(rows, []any{&data}, func() error {
		msg, err := pglogrepl.Parse(data)
		switch m := msg.(type) {
		case *pglogrepl.BeginMessage:
			open = witnessed{}
		case *pglogrepl.InsertMessage:
			open.ids = append(open.ids, string(m.Tuple.Columns[0].Data))
		case *pglogrepl.CommitMessage:
			open.end = event.LSN(m.TransactionEndLSN)
			if len(open.ids) > 0 {
				all = append(all, open)
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// statusJSON runs ebb status --json, whose exit code must be as given.
func (s *site) statusJSON(t *testing.T, code int) map[string]any {
	t.Helper()
	r := s.ebb(t, "status", "--json")
	if r.code != code {
		t.Fatalf("ebb status: exit code %d, want %d; %s%s", r.code, code, r.stdout, r.stderr)
	}
	var v map[string]any
	if err := json.Unmarshal([]byte(r.stdout), &v); err != nil {
		t.Fatalf("ebb status --json printed %q: %v", r.stdout, err)
	}
	return v
}

// keys are the keys of a JSON object, sorted.
func keys(v any) []string {
	m, _ := v.(map[string]any)
	return slices.Sorted(maps.Keys(m))
}

// pgProgram is the path of one of the programs of Postgres.
func pgProgram(t *testing.T, name string) string {
	t.Helper()
	installation, err := postgres.Find(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	path := installation.Program(name)
	if _, err := os.Stat(path); errors.Is(err, os.ErrNotExist) {
		if path, err = exec.LookPath(name); err != nil {
			t.Fatalf("the tests need %s, which the Postgres server package brings: %v", name, err)
		}
	}
	return path
}
