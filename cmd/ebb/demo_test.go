package main

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"ebb/internal/pgtest"
	"ebb/internal/postgres"
)

// place is a directory for everything that a demo leaves, to see that it leaves nothing.
func place(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "ebb-demo-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o777); err != nil { // for the account that Postgres runs as
		t.Fatal(err)
	}
	if dir, err = filepath.EvalSymlinks(dir); err != nil {
		t.Fatal(err)
	}
	return dir
}

// leftNothing checks that no file is in the directory, and no process works in it or was told of it.
func leftNothing(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		t.Errorf("left behind: %s", e.Name())
	}
	// The last processes of a Postgres server that was ended at once may need a moment.
	pgtest.Eventually(t, 30*time.Second, func() (bool, string) {
		links, err := filepath.Glob("/proc/[0-9]*/cwd")
		if err != nil {
			t.Fatal(err)
		}
		for _, link := range links {
			process := filepath.Dir(link)
			cwd, _ := os.Readlink(link) // gone meanwhile, or not ours to see
			command, _ := os.ReadFile(filepath.Join(process, "cmdline"))
			if strings.HasPrefix(cwd, dir+"/") || strings.Contains(string(command), dir+"/") {
				return false, fmt.Sprintf("left behind: process %s, %s in %s", filepath.Base(process), strings.ReplaceAll(string(command), "\x00", " "), cwd)
			}
		}
		return true, ""
	})
}

func in(dir string, adjust func(*exec.Cmd)) func(*exec.Cmd) {
	return func(cmd *exec.Cmd) {
		cmd.Dir, cmd.Env = dir, environ("TMPDIR="+dir)
		if adjust != nil {
			adjust(cmd)
		}
	}
}

func checkStory(t *testing.T, stdout string) {
	t.Helper()
	if strings.ContainsAny(stdout, "\x1b\r") {
		t.Errorf("not plain: %q", stdout)
	}
	if n := strings.Count(stdout, " ms after the commit\n"); n != 4 {
		t.Errorf("%d events arrived, want 4", n)
	}
	for _, pattern := range []string{
		`(?m)^  001  A1 moves to G1$`, `(?m)^  003  A1 moves to G9, and the transaction is rolled back$`, `bridge is stopped`, `bridge is started again`,
		`App +Group +Time\n +A1 +G1 +004\n`, // the relationship
		`App +Group +Time +Recorded\n( +A1 +G\d +00\d +\d\d:\d\d:\d\d\.\d\d\d\n){4}`,
		`(?m)^ok: 4 moves committed, 4 events in the stream`,
	} {
		if !regexp.MustCompile(pattern).MatchString(stdout) {
			t.Errorf("does not say %s", pattern)
		}
	}
}

func TestDemo(t *testing.T) {
	dir := place(t)
	r := ebbWith(t, in(dir, nil), "demo").must(t)
	checkStory(t, r.stdout)
	if r.stderr != "" {
		t.Errorf("logged: %s", r.stderr)
	}
	leftNothing(t, dir)
}

// TestDemoAsUser: as root, Postgres runs as somebody else; as an ordinary user it does not.
func TestDemoAsUser(t *testing.T) {
	installation, err := postgres.Find(t.Context()) // which may be in this user's cache
	if err != nil {
		t.Fatal(err)
	}
	programs := postgres.BinEnv + "=" + installation.BinDir
	if os.Geteuid() != 0 {
		t.Log("TestDemo has run as an ordinary user already; here the demo has no home directory")
		dir := place(t)
		ebbWith(t, in(dir, func(cmd *exec.Cmd) { cmd.Env = append(cmd.Env, "HOME=/nonexistent", programs) }), "demo").must(t)
		leftNothing(t, dir)
		return
	}
	nobody, err := user.Lookup("nobody")
	if err != nil {
		t.Fatal(err)
	}
	uid, err := strconv.ParseInt(nobody.Uid, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	gid, err := strconv.ParseInt(nobody.Gid, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	// The directory in which go test builds is root's alone.
	copies, dir := place(t), place(t)
	copied := filepath.Join(copies, "ebb")
	copyExecutable(t, copied)
	if err := os.Chown(dir, int(uid), int(gid)); err != nil {
		t.Fatal(err)
	}
	r := ebbWith(t, in(dir, func(cmd *exec.Cmd) {
		cmd.Path = copied
		cmd.Env = append(cmd.Env, "HOME="+dir, programs)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
	}), "demo").must(t)
	checkStory(t, r.stdout)
	leftNothing(t, dir)
}

func copyExecutable(t *testing.T, to string) {
	t.Helper()
	executable, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	from, err := os.Open(executable)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	file, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(file, from); err != nil {
		t.Fatal(err)
	}
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestDemoThatIsKept runs until it is interrupted, and what it says to try works.
func TestDemoThatIsKept(t *testing.T) {
	dir := place(t)
	p := start(t, in(dir, nil), "demo", "--keep")
	pgtest.Eventually(t, time.Minute, func() (bool, string) {
		select {
		case <-p.done:
			t.Fatalf("it ended: %s", p.cmd.ProcessState)
		default:
		}
		return strings.Contains(p.stdout.String(), "/status.json"), "it does not say what to try"
	})
	checkStory(t, p.stdout.String())
	said := regexp.MustCompile(`psql '(postgres://[^']+)' -c "(SELECT ebb\.put.*)"`).FindStringSubmatch(p.stdout.String())
	if said == nil {
		t.Fatal("it does not say how to put an event")
	}
	db, err := pgx.Connect(t.Context(), said[1])
	if err != nil {
		t.Fatal(err)
	}
	_, err = db.Exec(t.Context(), strings.ReplaceAll(said[2], `\"`, `"`))
	db.Close(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	pgtest.Eventually(t, 30*time.Second, func() (bool, string) {
		return strings.Contains(p.stdout.String(), "membership.changed of A2"), "the event does not arrive"
	})
	p.cmd.Process.Signal(os.Interrupt)
	if code := p.ended(t, 30*time.Second); code != exitOK {
		t.Errorf("exit code %d, want %d", code, exitOK)
	}
	leftNothing(t, dir)
}

// TestDemoInterrupted: whenever it is interrupted, nothing stays.
func TestDemoInterrupted(t *testing.T) {
	for _, at := range []string{"ebb demo:", "NATS", "001", "bridge is stopped"} {
		t.Run(at, func(t *testing.T) {
			dir := place(t)
			p := start(t, in(dir, nil), "demo")
			pgtest.Eventually(t, time.Minute, func() (bool, string) { return strings.Contains(p.stdout.String(), at), "not there" })
			p.cmd.Process.Signal(syscall.SIGTERM)
			if code := p.ended(t, 30*time.Second); code != exitFailed {
				t.Errorf("exit code %d, want %d: the demo has shown nothing", code, exitFailed)
			}
			leftNothing(t, dir)
		})
	}
}
