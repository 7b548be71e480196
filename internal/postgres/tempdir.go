package postgres

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"ebb/internal/sleep"
)

const (
	tempPrefix = "ebb-postgres-"
	ownerLock  = "owner.lock"
)

// tempDir is a directory for a server that is thrown away. It is locked as long as its owner lives, so that a later process can
// tell what a killed one left behind, and remove it.
type tempDir struct {
	path string
	lock *os.File
}

func (t *tempDir) data() string { return filepath.Join(t.path, "data") }

// makeTempDir makes a temporary directory that the account can reach, and sweeps those of dead processes.
func makeTempDir(account *account) (*tempDir, error) {
	roots := []string{os.TempDir()}
	if account != nil {
		roots = append(roots, "/tmp", "/var/tmp") // TMPDIR may be below /root
	}
	var errs []error
	for _, root := range roots {
		temp, err := makeTempDirIn(root, account)
		if err == nil {
			return temp, nil
		}
		errs = append(errs, err)
	}
	return nil, fmt.Errorf("make a temporary directory for Postgres: %w; set TMPDIR to a directory it can reach", errors.Join(errs...))
}

func makeTempDirIn(root string, account *account) (_ *tempDir, err error) {
	sweep(root)
	if account != nil {
		if blocked := account.blockedAt(filepath.Join(root, tempPrefix)); blocked != "" {
			return nil, fmt.Errorf("the user %s cannot reach %s%s", account.name, root, blocked)
		}
	}
	// It gets the name that sweep looks for only when it is locked.
	made, err := os.MkdirTemp(root, ".new-"+tempPrefix)
	if err != nil {
		return nil, err
	}
	t := &tempDir{path: made}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.remove())
		}
	}()
	if t.lock, err = os.OpenFile(filepath.Join(made, ownerLock), os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(t.lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return nil, err
	}
	if err := account.chown(made); err != nil {
		return nil, err
	}
	final := filepath.Join(root, strings.TrimPrefix(filepath.Base(made), ".new-"))
	if err := os.Rename(made, final); err != nil {
		return nil, err
	}
	t.path = final
	return t, nil
}

// remove deletes the directory. The last processes of a killed server may still be writing files there, so it tries for a while.
func (t *tempDir) remove() error {
	deadline := time.Now().Add(5 * time.Second)
	err := os.RemoveAll(t.path)
	for err != nil && time.Now().Before(deadline) {
		time.Sleep(20 * time.Millisecond)
		err = os.RemoveAll(t.path)
	}
	if t.lock != nil {
		t.lock.Close()
	}
	if err != nil {
		return fmt.Errorf("remove the temporary directory: %w", err)
	}
	return nil
}

// sweep removes the temporary directories whose owner is dead, and whose server is as well. What it cannot remove, another
// user's for one, it leaves.
func sweep(root string) {
	dirs, _ := filepath.Glob(filepath.Join(root, tempPrefix+"*"))
	for _, dir := range dirs {
		sweepOne(dir)
	}
}

func sweepOne(dir string) {
	// O_NOFOLLOW: the place is one where others may write.
	lock, err := os.OpenFile(filepath.Join(dir, ownerLock), os.O_RDWR|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return
	}
	defer lock.Close()
	if syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) != nil {
		return
	}
	if pid := readPidFile(filepath.Join(dir, "data")).pid; pid > 0 && syscall.Kill(pid, 0) != syscall.ESRCH {
		return
	}
	os.RemoveAll(dir)
}

// pidFile is what the server keeps in postmaster.pid; see "postmaster.pid" in src/include/utils/pidfile.h of Postgres.
type pidFile struct {
	pid    int
	status string // starting, ready, standby, stopping
}

func readPidFile(dataDir string) pidFile {
	content, err := os.ReadFile(filepath.Join(dataDir, "postmaster.pid"))
	if err != nil {
		return pidFile{}
	}
	lines := strings.Split(string(content), "\n")
	var p pidFile
	p.pid, _ = strconv.Atoi(strings.TrimSpace(lines[0]))
	if len(lines) > 7 {
		p.status = strings.TrimSpace(lines[7])
	}
	return p
}

// lockFile waits for the exclusive lock on the file, which it makes. Closing the file gives the lock up.
func lockFile(ctx context.Context, path string) (*os.File, error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open the lock file: %w", err)
	}
	for {
		err := syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return file, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) {
			file.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		if err := wait(ctx, 100*time.Millisecond); err != nil {
			file.Close()
			return nil, fmt.Errorf("wait for the lock on %s: %w", path, err)
		}
	}
}

// wait sleeps for d, or until ctx ends, and then returns why it did.
func wait(ctx context.Context, d time.Duration) error {
	if sleep.For(ctx, d) != nil {
		return context.Cause(ctx)
	}
	return nil
}
