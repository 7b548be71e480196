package main

import (
	"cmp"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"
)

// fault is one fault of a schedule.
type fault struct {
	number int
	// at is when it comes, from the start of the round, or as soon as the one before it in its lane is over.
	at time.Duration
	kind
	lasts time.Duration
	// pick is where its own choices come from, such as which bridge it hits.
	pick uint64
}

func (f fault) String() string {
	return fmt.Sprintf("%3d  %7.1fs  %-22s for %5.1fs", f.number, f.at.Seconds(), f.name, f.lasts.Seconds())
}

func (f fault) rand() *rand.Rand { return rand.New(rand.NewPCG(f.pick, 0)) }

// Streams of random numbers that a seed gives. Producers have those from streamProducers on.
const (
	streamLanes     = 0
	streamRound     = 50
	streamProducers = 100
)

func randomStream(seed, stream uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, stream)) }

// Between the faults of a lane there is a pause, so that the bridge gets on as well.
const leastPause, mostPause = 700 * time.Millisecond, 7 * time.Second

// makeSchedule draws the faults of a round: the same for the same arguments. It ends when the round has lasted as long as given, or
// with the number of faults given if that is not 0.
func makeSchedule(seed uint64, kinds []kind, lasts time.Duration, number int) []fault {
	var all []fault
	for l := range lanes {
		var deck []kind
		for _, k := range kinds {
			for range k.weight {
				if k.lane == l {
					deck = append(deck, k)
				}
			}
		}
		if len(deck) == 0 {
			continue
		}
		r := randomStream(seed, streamLanes+uint64(l))
		at := between(r, 500*time.Millisecond, mostPause/2)
		for len(all) < 1<<20 { // a bound for when both limits are absurd
			// A deck is dealt to its end before it is shuffled again: so that every kind has its turn.
			r.Shuffle(len(deck), func(i, j int) { deck[i], deck[j] = deck[j], deck[i] })
			for _, k := range deck {
				f := fault{at: at, kind: k, lasts: between(r, k.least, k.most), pick: r.Uint64()}
				all = append(all, f)
				at += f.lasts + between(r, leastPause, mostPause)
			}
			if at > lasts {
				break
			}
		}
	}
	slices.SortStableFunc(all, func(a, b fault) int { return cmp.Compare(a.at, b.at) })
	// One that lasts too long does not end the schedule: others may follow.
	kept := all[:0]
	for _, f := range all {
		if f.at+f.lasts <= lasts && (number == 0 || len(kept) < number) {
			kept = append(kept, f)
		}
	}
	for i := range kept {
		kept[i].number = i + 1
	}
	return kept
}

func between(r *rand.Rand, least, most time.Duration) time.Duration {
	if most <= least {
		return least
	}
	return least + time.Duration(r.Int64N(int64(most-least)))
}
