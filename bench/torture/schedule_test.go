package main

import (
	"fmt"
	"slices"
	"testing"
	"time"
)

func plan(seed uint64, kinds []kind, lasts time.Duration, number int) []string {
	var lines []string
	for _, f := range makeSchedule(seed, kinds, lasts, number) {
		lines = append(lines, fmt.Sprint(f, f.pick, f.rand().Uint64()))
	}
	return lines
}

func TestScheduleComesFromTheSeed(t *testing.T) {
	for seed := range uint64(20) {
		a, b := plan(seed, kinds(), time.Minute, 0), plan(seed, kinds(), time.Minute, 0)
		if len(a) == 0 || !slices.Equal(a, b) {
			t.Fatalf("seed %d gave %d faults, and then %d others", seed, len(a), len(b))
		}
		if slices.Equal(a, plan(seed+1, kinds(), time.Minute, 0)) {
			t.Errorf("seeds %d and %d give the same faults", seed, seed+1)
		}
	}
}

func TestScheduleKeepsItsLimits(t *testing.T) {
	const lasts = 10 * time.Minute
	all := makeSchedule(1, kinds(), lasts, 0)
	if len(all) < 300 {
		t.Errorf("%d faults in ten minutes are few", len(all))
	}
	seen := map[string]int{}
	free := map[lane]time.Duration{}
	for i, f := range all {
		seen[f.name]++
		if f.number != i+1 || i > 0 && f.at < all[i-1].at {
			t.Errorf("fault %d is out of order: %s", i, f)
		}
		if f.at < free[f.lane] {
			t.Errorf("%s begins before the one before it in its lane is over, at %s", f, free[f.lane])
		}
		free[f.lane] = f.at + f.lasts + leastPause
		if f.lasts < f.least || f.lasts > f.most || f.at+f.lasts > lasts {
			t.Errorf("%s is too long", f)
		}
	}
	for _, k := range kinds() {
		if seen[k.name] == 0 {
			t.Errorf("there is no %s in ten minutes", k.name)
		}
	}
	if few := makeSchedule(1, kinds(), lasts, 7); len(few) != 7 || few[6].String() != all[6].String() {
		t.Errorf("the first 7 faults are %v, want %v", few, all[:7])
	}
}

func TestChooseKinds(t *testing.T) {
	names := func(only, skip string) []string {
		chosen, err := chooseKinds(only, skip)
		if err != nil {
			return []string{err.Error()}
		}
		var names []string
		for _, k := range chosen {
			names = append(names, k.name)
		}
		return names
	}
	if got := names("", ""); len(got) != len(kinds()) {
		t.Errorf("without flags there are %d kinds of %d", len(got), len(kinds()))
	}
	if got := names("nats-kill, slot-drop", ""); !slices.Equal(got, []string{"nats-kill", "slot-drop"}) {
		t.Errorf("--only two gives %q", got)
	}
	if got := names("amnesia-*", "amnesia-delete"); !slices.Equal(got, []string{"amnesia-tail", "amnesia-backup"}) {
		t.Errorf("--only with a star, without one, gives %q", got)
	}
	for _, wrong := range [][2]string{{"nats-kil", ""}, {"", "x*"}, {"nats-kill", "nats-*"}} {
		if _, err := chooseKinds(wrong[0], wrong[1]); err == nil {
			t.Errorf("--only %q --skip %q is no error", wrong[0], wrong[1])
		}
	}
}

func TestKindsAreComplete(t *testing.T) {
	names := map[string]bool{}
	for _, k := range kinds() {
		if k.name == "" || names[k.name] || k.weight < 1 || k.most < k.least || k.what == "" || k.do == nil {
			t.Errorf("kind %q is not complete", k.name)
		}
		names[k.name] = true
	}
}
