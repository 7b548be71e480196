package main

import (
	"fmt"
	"os"
	"runtime"
	"syscall"
)

// peakMemory returns the largest resident size that an ended process has had, in bytes.
func peakMemory(p *os.ProcessState) (int64, error) {
	usage, ok := p.SysUsage().(*syscall.Rusage)
	if !ok {
		return 0, fmt.Errorf("no figures of a process's memory on %s", runtime.GOOS)
	}
	if runtime.GOOS == "darwin" {
		return usage.Maxrss, nil
	}
	return usage.Maxrss << 10, nil
}
