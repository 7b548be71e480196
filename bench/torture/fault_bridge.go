package main

import (
	"errors"
	"math/rand/v2"
	"time"

	"ebb/internal/sleep"
)

// wait is how long a fault lasts; it ends early when the round does.
func (r *round) wait(d time.Duration) { _ = sleep.For(r.ctx, d) }

// victim is mostly the leader.
func (r *round) victim(random *rand.Rand) *bridge {
	other := r.fleet.bridges[random.IntN(len(r.fleet.bridges))]
	if random.IntN(4) == 0 {
		return other
	}
	if leader, ok := r.fleet.leader(); ok {
		return leader
	}
	return other
}

func (r *round) killBridge(f fault) error {
	b := r.victim(f.rand())
	b.kill()
	r.wait(f.lasts)
	b.start()
	return nil
}

func (r *round) killAllBridges(f fault) error {
	for _, b := range r.fleet.bridges {
		b.kill()
	}
	r.wait(f.lasts)
	for _, b := range r.fleet.bridges {
		b.start()
	}
	return nil
}

func (r *round) terminateBridge(f fault) error {
	b := r.victim(f.rand())
	b.terminate()
	r.wait(f.lasts)
	b.start()
	return nil
}

func (r *round) freezeBridge(f fault) error {
	b := r.victim(f.rand())
	if !b.freeze() {
		return errors.New("the bridge was down")
	}
	r.wait(f.lasts)
	b.thaw()
	return nil
}

func (r *round) freezeAndCutBridge(f fault) error {
	b, leads := r.fleet.leader()
	if !leads || !b.freeze() {
		return errors.New("no bridge led")
	}
	defer b.thaw()
	r.wait(min(f.lasts, 200*time.Millisecond))
	err := r.terminateLeader()
	r.wait(f.lasts)
	return err
}
