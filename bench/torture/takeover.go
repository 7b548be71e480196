package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
)

const (
	takeoverBridges = 2
	takeoverRate    = 200 // events in a second
	// takeoverMost is how long a takeover is waited for.
	takeoverMost = 30 * time.Second
)

// arrivals are when messages come to a plain subscriber.
type arrivals struct {
	mu    sync.Mutex
	times []time.Time
}

func (a *arrivals) add(*nats.Msg) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.times = append(a.times, time.Now())
}

// gap is the longest time without an arrival that ends after a moment, and whether there was any arrival since.
func (a *arrivals) gap(since time.Time) (time.Duration, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	var longest time.Duration
	i, _ := slices.BinarySearchFunc(a.times, since, time.Time.Compare)
	some := i < len(a.times)
	for i = max(i, 1); i < len(a.times); i++ {
		longest = max(longest, a.times[i].Sub(a.times[i-1]))
	}
	return longest, some
}

// takeover is what one kill of a leader cost.
type takeover struct {
	// silence is the longest time between two arrivals, leading is from the kill until another bridge says that it leads.
	silence, leading time.Duration
}

// measureTakeovers kills the leader again and again, under an even load, and says how long nothing was delivered.
func measureTakeovers(ctx context.Context, o options, seed uint64, times int, work string) (int, error) {
	o.bridges, o.rate = takeoverBridges, takeoverRate
	o.styles = []style{steady, steady, steady, steady}
	dir := filepath.Join(work, "takeover")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return exitViolated, fmt.Errorf("make a directory: %w", err)
	}
	r := newRound(ctx, o, seed, dir)
	defer r.cancel(nil)
	var measured []takeover
	err := r.run(ctx, func() error {
		var failed error
		err := r.whileWriting(func() { measured, failed = r.takeOver(times) })
		return errors.Join(failed, err)
	})
	if err != nil {
		return exitViolated, err
	}
	var silences, leads []time.Duration
	for _, t := range measured {
		silences, leads = append(silences, t.silence), append(leads, t.leading)
	}
	fmt.Fprintf(o.out, "%d kills of the leader of %d bridges, at %d events/s\n", len(measured), takeoverBridges, takeoverRate)
	fmt.Fprintf(o.out, "from the kill to a new leader:  p50 %s, max %s\n", middle(rounded(leads)), slices.Max(rounded(leads)))
	fmt.Fprintf(o.out, "longest time without delivery:  p50 %s, max %s\n", middle(rounded(silences)), slices.Max(rounded(silences)))
	fmt.Fprintln(o.out, r.report.line())
	if !r.report.ok() {
		r.report.failures(o.out)
		return exitViolated, nil
	}
	return exitOK, nil
}

// rounded rounds to milliseconds; there is at least one value.
func rounded(d []time.Duration) []time.Duration {
	if len(d) == 0 {
		return []time.Duration{0}
	}
	for i := range d {
		d[i] = d[i].Round(time.Millisecond)
	}
	return d
}

func middle(d []time.Duration) time.Duration {
	d = slices.Sorted(slices.Values(d))
	return d[len(d)/2]
}

// takeOver kills the leader so many times.
func (r *round) takeOver(times int) ([]takeover, error) {
	nc, err := nats.Connect(r.broker.url())
	if err != nil {
		return nil, fmt.Errorf("subscribe: %w", err)
	}
	defer nc.Close()
	var a arrivals
	if _, err := nc.Subscribe("ebb.>", a.add); err != nil {
		return nil, fmt.Errorf("subscribe: %w", err)
	}
	random := randomStream(r.seed, streamRound)
	var all []takeover
	for len(all) < times {
		// The other one has to be up before the leader dies, and delivery to be even. A standby looks for its chance at an even pace
		// from its start on: without a random part the kill would always meet it at the same moment.
		r.wait(between(random, 2*time.Second, 3*time.Second))
		if r.ctx.Err() != nil {
			return all, nil
		}
		leader, ok := r.fleet.leader()
		if !ok || r.fleet.running() < takeoverBridges {
			continue
		}
		killed := time.Now()
		leader.kill()
		led, ok := r.newLeader(killed)
		if !ok {
			return all, fmt.Errorf("no bridge led %s after the leader was killed", takeoverMost)
		}
		for since := time.Now(); ; {
			if _, some := a.gap(led); some {
				break
			}
			if time.Since(since) > takeoverMost || r.ctx.Err() != nil {
				return all, fmt.Errorf("nothing was delivered %s after a new leader was there", takeoverMost)
			}
			r.wait(10 * time.Millisecond)
		}
		r.wait(500 * time.Millisecond) // what waited has come
		silence, _ := a.gap(killed)
		all = append(all, takeover{silence: silence, leading: led.Sub(killed)})
		if r.verbose {
			fmt.Fprintf(r.out, "takeover %d: a new leader after %s, longest silence %s\n", len(all), led.Sub(killed).Round(time.Millisecond),
				silence.Round(time.Millisecond))
		}
		leader.start()
	}
	return all, nil
}

// newLeader waits until a bridge has come to lead since a moment, and says when.
func (r *round) newLeader(since time.Time) (time.Time, bool) {
	for time.Since(since) < takeoverMost && r.ctx.Err() == nil {
		r.fleet.mu.Lock()
		i := slices.IndexFunc(r.fleet.led, func(t time.Time) bool { return t.After(since) })
		var led time.Time
		if i >= 0 {
			led = r.fleet.led[i]
		}
		r.fleet.mu.Unlock()
		if i >= 0 {
			return led, true
		}
		r.wait(5 * time.Millisecond)
	}
	return time.Time{}, false
}
