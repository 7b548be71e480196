package main

import (
	"bytes"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// child is a process that dies with this one.
type child struct {
	cmd     *exec.Cmd
	started time.Time
	done    chan struct{} // closed when it has ended
}

// startChild starts cmd. Linux sends the signal of a parent's death when the *thread* that forked ends (prctl(2), PR_SET_PDEATHSIG):
// so the goroutine that forks stays on its thread as long as the child lives.
func startChild(cmd *exec.Cmd) (*child, error) {
	// In a group of its own, an interrupt from the keyboard does not reach it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	diesWithParent(cmd.SysProcAttr)
	c := &child{cmd: cmd, started: time.Now(), done: make(chan struct{})}
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		_ = cmd.Wait() // how it ended is in ProcessState
		close(c.done)
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return c, nil
}

func (c *child) pid() int { return c.cmd.Process.Pid }

func (c *child) signal(sig os.Signal) { c.cmd.Process.Signal(sig) }

func (c *child) kill() {
	c.cmd.Process.Kill()
	<-c.done
}

func (c *child) ended() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

const (
	// logBytes is how much of a process's log is kept in its file; logTail how many of its last lines are in memory.
	logBytes = 16 << 20
	logTail  = 60
)

// logFile is where a process logs to, line by line.
type logFile struct {
	path string
	line func(string) // called with each line; may be nil

	mu      sync.Mutex
	file    *os.File
	written int
	partial []byte
	last    []string
}

func newLogFile(path string, line func(string)) (*logFile, error) {
	file, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	return &logFile{path: path, line: line, file: file}, nil
}

func (l *logFile) Write(p []byte) (int, error) {
	l.mu.Lock()
	var lines []string
	l.partial = append(l.partial, p...)
	for {
		line, rest, ok := bytes.Cut(l.partial, []byte("\n"))
		if !ok {
			break
		}
		lines = append(lines, string(line))
		l.partial = rest
	}
	l.last = append(l.last, lines...)
	l.last = slices.Delete(l.last, 0, max(0, len(l.last)-logTail))
	if l.written < logBytes && l.file != nil {
		n, err := l.file.Write(p)
		l.written += n
		if err != nil {
			l.written = logBytes // a log that cannot be kept does not end its process
		}
	}
	l.mu.Unlock()
	if l.line != nil {
		for _, line := range lines {
			l.line(line)
		}
	}
	return len(p), nil
}

// note writes a line of the harness's own.
func (l *logFile) note(text string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file != nil {
		_, _ = l.file.WriteString("-- " + text + "\n")
	}
}

func (l *logFile) tail() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Join(l.last, "\n")
}

func (l *logFile) lastLine() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.last) == 0 {
		return ""
	}
	return l.last[len(l.last)-1]
}

func (l *logFile) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file != nil {
		l.file.Close()
		l.file = nil
	}
}
