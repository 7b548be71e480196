package pgtest

import (
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"ebb/internal/postgres"
)

// Installation finds server programs of a major version of Postgres or a later one, for Config.Installation of a test that needs them,
// and fetches that version from npm when there are none. When that cannot be done either the test is skipped.
func Installation(t testing.TB, major int) postgres.Installation {
	t.Helper()
	found, err := installation(t.Context(), major)
	if err != nil {
		t.Skipf("needs Postgres %d or later: %v", major, err)
	}
	return found
}

// fetched is what installation has found out for each major version: without a network, each attempt takes a while.
var fetched struct {
	mu       sync.Mutex
	attempts map[int]attempt
}

type attempt struct {
	found postgres.Installation
	err   error
}

func installation(ctx context.Context, major int) (postgres.Installation, error) {
	fetched.mu.Lock()
	defer fetched.mu.Unlock()
	if known, ok := fetched.attempts[major]; ok {
		return known.found, known.err
	}
	found, err := postgres.FindAtLeast(ctx, major)
	if err != nil {
		var fetchErr error
		if found, fetchErr = fetch(ctx, major, postgres.CacheDir()); fetchErr != nil {
			err = fmt.Errorf("%w, and fetch them: %w", err, fetchErr)
		} else {
			err = nil
		}
	}
	if fetched.attempts == nil {
		fetched.attempts = map[int]attempt{}
	}
	fetched.attempts[major] = attempt{found, err}
	return found, err
}

//go:embed fetch.sh
var fetchScript string

func fetch(ctx context.Context, major int, cache string) (postgres.Installation, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 5*time.Minute, errors.New("not within five minutes"))
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-s", "--", strconv.Itoa(major), cache)
	cmd.Stdin = strings.NewReader(fetchScript)
	// What the script has started ends with it, and the script removes what it has made.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	var complaint strings.Builder
	cmd.Stderr = &complaint
	out, err := cmd.Output()
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return postgres.Installation{}, fmt.Errorf("%w: %s", err, strings.TrimSpace(complaint.String()))
	}
	return postgres.At(ctx, strings.TrimSpace(string(out)))
}
