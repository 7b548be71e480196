package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"
)

// fleet are the bridges, and what they may do.
type fleet struct {
	program string // ebb
	dir     string
	bridges []*bridge
	failed  func(kind, detail string)

	mu sync.Mutex
	// excused is why a bridge may end by itself until a time: while the publication is damaged, and a little longer.
	excused string
	until   time.Time
	// held says that none is to be started yet.
	held bool
	// starts counts processes, and excusedExits those that ended by contract.
	starts, excusedExits int
	// led is when each bridge came to lead.
	led []time.Time
}

// bridge is one ebb run, which is started again whenever it has ended.
type bridge struct {
	fleet    *fleet
	number   int
	config   string
	log      *logFile
	postgres *proxy
	nats     *proxy

	mu    sync.Mutex
	child *child
	// wanted says that the bridge is to run; one that was killed waits until it is.
	wanted bool
	// expected says that the process is being ended by the harness.
	expected bool
	leads    bool
	frozen   bool
	ended    bool // its supervisor has ended
	changed  *sync.Cond
	done     chan struct{}
}

func newBridge(f *fleet, number int, config string, postgres, nats *proxy) (*bridge, error) {
	b := &bridge{fleet: f, number: number, config: config, postgres: postgres, nats: nats, done: make(chan struct{})}
	b.changed = sync.NewCond(&b.mu)
	var err error
	b.log, err = newLogFile(filepath.Join(f.dir, fmt.Sprintf("bridge%d.log", number)), b.read)
	return b, err
}

// read follows what the bridge logs of its role.
func (b *bridge) read(line string) {
	switch {
	case strings.Contains(line, `msg="this bridge leads"`):
		b.mu.Lock()
		b.leads = true
		b.mu.Unlock()
		b.fleet.mu.Lock()
		b.fleet.led = append(b.fleet.led, time.Now())
		b.fleet.mu.Unlock()
	case strings.Contains(line, `msg="the bridge was interrupted`), strings.Contains(line, `msg="another bridge leads`):
		b.mu.Lock()
		b.leads = false
		b.mu.Unlock()
	case strings.Contains(line, "DATA RACE"):
		b.fleet.failed("data race", fmt.Sprintf("in bridge %d; see its log", b.number))
	case strings.HasPrefix(line, "panic:"), strings.HasPrefix(line, "fatal error:"):
		b.fleet.failed("crash", fmt.Sprintf("bridge %d: %s", b.number, line))
	}
}

const (
	// restartDelay is how long whatever starts containers again waits.
	restartDelay = 300 * time.Millisecond
	holdPoll     = 50 * time.Millisecond
)

// supervise starts the bridge whenever it is wanted and does not run, until close.
func (b *bridge) supervise() {
	defer close(b.done)
	for {
		// While ebb setup is at work none is started, whatever had ended it.
		for b.fleet.isHeld() && !b.isEnded() {
			time.Sleep(holdPoll)
		}
		b.mu.Lock()
		for !b.wanted && !b.ended {
			b.changed.Wait()
		}
		if b.fleet.isHeld() && !b.ended {
			b.mu.Unlock()
			continue
		}
		if b.ended {
			b.mu.Unlock()
			return
		}
		cmd := exec.Command(b.fleet.program, "run", "--config", b.config)
		cmd.Dir, cmd.Env = b.fleet.dir, environ()
		cmd.Stdout, cmd.Stderr = b.log, b.log
		c, err := startChild(cmd)
		if err != nil {
			b.mu.Unlock()
			b.fleet.failed("harness", fmt.Sprintf("start bridge %d: %v", b.number, err))
			return
		}
		b.log.note(fmt.Sprintf("process %d starts", c.pid()))
		b.child, b.expected, b.leads, b.frozen = c, false, false, false
		b.mu.Unlock()
		b.fleet.count(func() { b.fleet.starts++ })

		<-c.done
		b.mu.Lock()
		b.log.note(fmt.Sprintf("process %d has ended: %s", c.pid(), c.cmd.ProcessState))
		expected := b.expected
		b.leads = false
		b.mu.Unlock()
		if !expected {
			b.judge(c.cmd.ProcessState)
			time.Sleep(restartDelay)
		}
	}
}

func (b *bridge) isEnded() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.ended
}

// judge says what to think of a bridge that ended by itself.
func (b *bridge) judge(state *os.ProcessState) {
	f := b.fleet
	f.mu.Lock()
	ok := time.Now().Before(f.until) && state.ExitCode() == 1 && strings.Contains(b.log.lastLine(), f.excused)
	if ok {
		f.excusedExits++
	}
	f.mu.Unlock()
	if ok {
		return
	}
	f.failed("bridge ended", fmt.Sprintf("bridge %d ended by itself (%s): %s", b.number, state, b.log.lastLine()))
}

func (f *fleet) count(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
}

// excuse lets bridges end with exit code 1 and an error that says why, for a time, and has all that are down stay so until release.
func (f *fleet) excuse(why string, lasts time.Duration) {
	f.count(func() { f.excused, f.until, f.held = why, time.Now().Add(lasts), true })
}

// release has the bridges started again. For a while yet, one that slept or was cut off may still end.
func (f *fleet) release(grace time.Duration) {
	f.count(func() { f.until, f.held = time.Now().Add(grace), false })
}

func (f *fleet) isHeld() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.held
}

// running counts the bridges that run, awake or not.
func (f *fleet) running() int {
	n := 0
	for _, b := range f.bridges {
		b.mu.Lock()
		if b.child != nil && !b.child.ended() {
			n++
		}
		b.mu.Unlock()
	}
	return n
}

// start has the bridge run.
func (b *bridge) start() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.wanted = true
	b.changed.Broadcast()
}

// kill ends the bridge, and has it stay down until start.
func (b *bridge) kill() {
	if c := b.end(); c != nil {
		c.kill()
	}
}

// end says that the process will be ended, and returns it; nil when there is none.
func (b *bridge) end() *child {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.wanted = false
	if b.child == nil || b.child.ended() {
		return nil
	}
	b.expected = true
	return b.child
}

// stopTimeout is how long a bridge may take to stop: longer than it waits for its sink.
const stopTimeout = 25 * time.Second

// beginning is how long a process takes until a signal has no longer its default action.
const beginning = time.Second

// terminate asks the bridge to end. It must, with exit code 0.
func (b *bridge) terminate() {
	c := b.end()
	if c == nil {
		return
	}
	young := time.Since(c.started) < beginning
	c.signal(syscall.SIGTERM)
	select {
	case <-c.done:
		// One that had failed for good just before says so. One that has only begun does not listen for signals yet.
		state := c.cmd.ProcessState
		status, _ := state.Sys().(syscall.WaitStatus)
		if state.ExitCode() != 0 && !(young && status.Signaled() && status.Signal() == syscall.SIGTERM) {
			b.judge(state)
		}
	case <-time.After(stopTimeout):
		b.fleet.failed("bridge hangs", fmt.Sprintf("bridge %d still ran %s after SIGTERM", b.number, stopTimeout))
		c.signal(syscall.SIGABRT) // for its goroutines
		select {
		case <-c.done:
		case <-time.After(5 * time.Second):
			c.kill()
		}
	}
}

func (b *bridge) freeze() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.child == nil || b.child.ended() {
		return false
	}
	b.child.signal(syscall.SIGSTOP)
	b.frozen = true
	return true
}

func (b *bridge) thaw() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.child != nil {
		b.child.signal(syscall.SIGCONT)
	}
	b.frozen = false
}

// close ends the supervisor; the bridge itself must have been ended.
func (b *bridge) close() {
	b.kill()
	b.mu.Lock()
	b.ended = true
	b.changed.Broadcast()
	b.mu.Unlock()
	<-b.done
	b.log.close()
}

// leader returns the bridge that leads, or else the first.
func (f *fleet) leader() (*bridge, bool) {
	for _, b := range f.bridges {
		b.mu.Lock()
		leads := b.leads && b.child != nil && !b.child.ended()
		b.mu.Unlock()
		if leads {
			return b, true
		}
	}
	return f.bridges[0], false
}

// environ is this process's environment without what would configure an ebb or libpq.
func environ() []string {
	env := slices.DeleteFunc(os.Environ(), func(v string) bool {
		name, _, _ := strings.Cut(v, "=")
		return name == "DATABASE_URL" || strings.HasPrefix(name, "EBB_") && name != "EBB_PG_BIN" || strings.HasPrefix(name, "PG")
	})
	return append(env, "GORACE=atexit_sleep_ms=0")
}

// dump has the bridge write its goroutines into its log, and end.
func (b *bridge) dump() {
	if c := b.end(); c != nil {
		c.signal(syscall.SIGQUIT)
		select {
		case <-c.done:
		case <-time.After(5 * time.Second):
			c.kill()
		}
	}
}
