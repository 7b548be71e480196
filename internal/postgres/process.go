package postgres

import (
	"os"
	"os/exec"
	"runtime"
)

// process is a running postmaster.
type process struct {
	*os.Process
	done chan struct{} // closed when it has ended
}

// startProcess starts cmd such that it is told to end when this process dies, where the system can do that.
//
// Linux sends that signal when the *thread* that forked ends, not the process (prctl(2), PR_SET_PDEATHSIG), and Go ends threads
// as it likes. So the goroutine that forks is locked to its thread and stays on it, waiting, as long as the child lives.
func startProcess(cmd *exec.Cmd) (*process, error) {
	diesWithParent(cmd.SysProcAttr)
	done := make(chan struct{})
	started := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		_ = cmd.Wait() // how a postmaster ended is in its log
		close(done)
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return &process{Process: cmd.Process, done: done}, nil
}
