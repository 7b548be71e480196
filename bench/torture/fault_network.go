package main

import (
	"context"
	"errors"
	"math/rand/v2"
)

// paths picks the proxies of a fault: that of the leader, of any bridge, or of all.
func (r *round) paths(random *rand.Rand, path func(*bridge) *proxy) []*proxy {
	switch random.IntN(4) {
	case 0:
		var all []*proxy
		for _, b := range r.fleet.bridges {
			all = append(all, path(b))
		}
		return all
	case 1:
		return []*proxy{path(r.fleet.bridges[random.IntN(len(r.fleet.bridges))])}
	default:
		leader, _ := r.fleet.leader()
		return []*proxy{path(leader)}
	}
}

func toPostgres(b *bridge) *proxy { return b.postgres }
func toNATS(b *bridge) *proxy     { return b.nats }

func (r *round) cutPostgres(f fault) error      { return r.cutPath(f, toPostgres) }
func (r *round) cutNATS(f fault) error          { return r.cutPath(f, toNATS) }
func (r *round) holdPostgres(f fault) error     { return r.holdPath(f, toPostgres) }
func (r *round) holdNATS(f fault) error         { return r.holdPath(f, toNATS) }
func (r *round) delayPostgres(f fault) error    { return r.delayPath(f, toPostgres) }
func (r *round) delayNATS(f fault) error        { return r.delayPath(f, toNATS) }
func (r *round) throttlePostgres(f fault) error { return r.throttlePath(f, toPostgres) }
func (r *round) throttleNATS(f fault) error     { return r.throttlePath(f, toNATS) }
func (r *round) halfOpenPostgres(f fault) error { return r.halfOpenPath(f, toPostgres) }
func (r *round) halfOpenNATS(f fault) error     { return r.halfOpenPath(f, toNATS) }

func (r *round) cutPath(f fault, path func(*bridge) *proxy) error {
	paths := r.paths(f.rand(), path)
	var errs []error
	for _, p := range paths {
		errs = append(errs, p.cut())
	}
	r.wait(f.lasts)
	for _, p := range paths {
		errs = append(errs, p.restore())
	}
	return errors.Join(errs...)
}

var bothWays = []direction{toServer, toClient}

func (r *round) holdPath(f fault, path func(*bridge) *proxy) error {
	return r.withToxic(f, r.paths(f.rand(), path), "hold", map[string]any{})
}

func (r *round) delayPath(f fault, path func(*bridge) *proxy) error {
	random := f.rand()
	paths := r.paths(random, path)
	latency := 20 + random.IntN(480)
	return r.withToxic(f, paths, "latency", map[string]any{"latency": latency, "jitter": latency / 2})
}

func (r *round) throttlePath(f fault, path func(*bridge) *proxy) error {
	random := f.rand()
	paths := r.paths(random, path)
	return r.withToxic(f, paths, "throttle", map[string]any{"rate": 5 + random.IntN(95)})
}

func (r *round) withToxic(f fault, paths []*proxy, toxic string, attributes map[string]any) error {
	var errs []error
	for _, p := range paths {
		for _, d := range bothWays {
			errs = append(errs, p.set(toxic, d, attributes))
		}
	}
	r.wait(f.lasts)
	for _, p := range paths {
		for _, d := range bothWays {
			errs = append(errs, p.unset(toxic, d))
		}
	}
	return errors.Join(errs...)
}

func (r *round) halfOpenPath(f fault, path func(*bridge) *proxy) error {
	random := f.rand()
	paths := r.paths(random, path)
	ways := [][]direction{bothWays, {toServer}, {toClient}}[random.IntN(3)]
	var errs []error
	for _, p := range paths {
		errs = append(errs, p.vanish(ways))
	}
	r.wait(f.lasts)
	for _, p := range paths {
		errs = append(errs, p.appear(context.WithoutCancel(r.ctx), ways))
	}
	return errors.Join(errs...)
}
