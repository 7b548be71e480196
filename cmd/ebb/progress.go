package main

import (
	"fmt"
	"io"
	"time"

	"github.com/schollz/progressbar/v3"
)

// progress shows how far something has come: by a bar in a terminal, by lines elsewhere. The zero value shows nothing.
type progress struct {
	bar *progressbar.ProgressBar

	lines       io.Writer
	total       int64
	began, said time.Time
}

// newProgress shows progress towards a total, which may be unknownTotal.
func newProgress(out io.Writer, total int64, terminal bool) *progress {
	if !terminal {
		return &progress{lines: out, total: total, began: time.Now(), said: time.Now()}
	}
	return &progress{bar: progressbar.NewOptions64(total, progressbar.OptionSetWriter(out), progressbar.OptionShowCount(), progressbar.OptionShowIts(),
		progressbar.OptionSetItsString("events"), progressbar.OptionThrottle(100*time.Millisecond), progressbar.OptionFullWidth(),
		progressbar.OptionClearOnFinish())}
}

// at shows that n are done.
func (p *progress) at(n int64) {
	switch {
	case p.bar != nil:
		if total := p.bar.GetMax64(); total > 0 {
			n = min(n, total) // new events come as well
		}
		_ = p.bar.Set64(n) // what cannot be shown on a terminal is no reason to end
	case p.lines != nil && time.Since(p.said) >= linesEvery:
		p.said = time.Now()
		rate := float64(n) / time.Since(p.began).Seconds()
		if p.total > 0 && rate > 0 {
			left := time.Duration(float64(max(0, p.total-n)) / rate * float64(time.Second))
			fmt.Fprintf(p.lines, "%d of %d events, %.0f a second, %s left\n", n, p.total, rate, left.Round(time.Second))
			return
		}
		fmt.Fprintf(p.lines, "%d events, %.0f a second\n", n, rate)
	}
}

// clear makes room for a line; the bar comes back with what is done next.
func (p *progress) clear() {
	if p.bar != nil {
		_ = p.bar.Clear()
	}
}

// end takes the bar away.
func (p *progress) end() {
	if p.bar != nil {
		_ = p.bar.Finish()
	}
}
