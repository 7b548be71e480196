package main

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// lane is what a fault is done to. The faults of a lane come one after the other, those of different lanes at any time.
type lane int

const (
	laneBridges lane = iota
	laneBroker
	laneDatabase
	laneNetwork
	lanes // how many there are
)

// kind is a kind of fault.
type kind struct {
	name string
	lane lane
	// weight is how often the kind stands in the deck from which its lane draws.
	weight int
	// A fault lasts from least to most, and is healed then.
	least, most time.Duration
	// what says what is really done.
	what string
	do   func(*round, fault) error
}

const (
	ms = time.Millisecond
	s  = time.Second
)

// kinds are all there are. Their names are what --only and --skip take.
func kinds() []kind {
	return []kind{
		{"bridge-kill", laneBridges, 4, 0, 2 * s, "SIGKILL of a bridge, mostly the leader; started again later", (*round).killBridge},
		{"bridge-kill-all", laneBridges, 1, 0, 2 * s, "SIGKILL of every bridge at once", (*round).killAllBridges},
		{"bridge-term", laneBridges, 1, 0, 1 * s, "SIGTERM of a bridge, which must end with exit code 0", (*round).terminateBridge},
		{"bridge-freeze", laneBridges, 2, 300 * ms, 8 * s, "SIGSTOP of a bridge, mostly the leader, and SIGCONT later", (*round).freezeBridge},
		{"bridge-freeze-cut", laneBridges, 2, 1 * s, 6 * s, "the same, and its sessions are ended while it sleeps: another one leads when it wakes", (*round).freezeAndCutBridge},

		{"nats-kill", laneBroker, 3, 0, 3 * s, "SIGKILL of the NATS server; started again later", (*round).killNATS},
		{"nats-stop", laneBroker, 1, 0, 3 * s, "shutdown of the NATS server in good order", (*round).stopNATS},
		{"nats-freeze", laneBroker, 2, 300 * ms, 8 * s, "SIGSTOP of the NATS server, and SIGCONT later", (*round).freezeNATS},
		{"nats-slow", laneBroker, 2, 1 * s, 4 * s, "the NATS server is stopped nine tenths of the time: acknowledgments come late, as from a slow disk", (*round).slowNATS},
		{"nats-disk-full", laneBroker, 2, 1 * s, 4 * s, "the file system of the NATS store (a tmpfs) is filled up: ENOSPC; freed later, and the server killed and started", (*round).fillDisk},
		{"nats-write-error", laneBroker, 1, 1 * s, 4 * s, "no file of the NATS server can grow (RLIMIT_FSIZE): EFBIG; lifted later, and the server killed and started", (*round).limitFiles},
		{"amnesia-tail", laneBroker, 1, 500 * ms, 3 * s, "the NATS store goes back to what it was a moment ago: acknowledged messages are forgotten", (*round).forgetTail},
		{"amnesia-backup", laneBroker, 1, 500 * ms, 3 * s, "the NATS store goes back to a copy from much earlier", (*round).restoreBackup},
		{"amnesia-delete", laneBroker, 1, 0, 1 * s, "the stream is deleted", (*round).deleteStream},

		{"postgres-immediate", laneDatabase, 2, 0, 2 * s, "immediate shutdown of Postgres, with crash recovery at its start", (*round).stopPostgresImmediately},
		{"postgres-fast", laneDatabase, 2, 0, 2 * s, "fast shutdown of Postgres", (*round).stopPostgresFast},
		{"sessions-end", laneDatabase, 2, 0, 0, "pg_terminate_backend of the sessions of every bridge", (*round).endSessions},
		{"walsender-end", laneDatabase, 1, 0, 0, "pg_terminate_backend of the slot's walsender alone", (*round).endWalsender},
		{"slot-drop", laneDatabase, 2, 0, 0, "the slot is dropped, its walsender ended before", (*round).dropSlot},
		{"slots-drop", laneDatabase, 2, 0, 0, "the slot and the trailing slot are dropped", (*round).dropSlots},
		{"slot-invalidate", laneDatabase, 1, 0, 0, "max_slot_wal_keep_size is passed while the bridges are held off: the slot is lost", (*round).invalidateSlot},
		{"publication-table", laneDatabase, 1, 0, 1 * s, "ALTER PUBLICATION … DROP TABLE; the bridges stop by contract, ebb setup mends", (*round).dropFromPublication},
		{"publication-insert", laneDatabase, 1, 0, 1 * s, "ALTER PUBLICATION … SET (publish = 'update'); the bridges stop by contract, ebb setup mends", (*round).stopPublishingInserts},

		{"net-postgres-cut", laneNetwork, 2, 0, 3 * s, "connections to Postgres are closed, and new ones refused", (*round).cutPostgres},
		{"net-postgres-delay", laneNetwork, 1, 1 * s, 4 * s, "latency of 20 to 500 ms", (*round).delayPostgres},
		{"net-postgres-throttle", laneNetwork, 1, 1 * s, 4 * s, "bandwidth of 5 to 100 KB/s", (*round).throttlePostgres},
		{"net-postgres-hold", laneNetwork, 2, 500 * ms, 8 * s, "nothing passes, and nothing is lost: it all arrives later", (*round).holdPostgres},
		{"net-postgres-half-open", laneNetwork, 2, 500 * ms, 8 * s, "what is sent vanishes, in one direction or both, with no RST; the connections are closed later", (*round).halfOpenPostgres},
		{"net-nats-cut", laneNetwork, 2, 0, 3 * s, "connections to NATS are closed, and new ones refused", (*round).cutNATS},
		{"net-nats-delay", laneNetwork, 1, 1 * s, 4 * s, "latency of 20 to 500 ms", (*round).delayNATS},
		{"net-nats-throttle", laneNetwork, 1, 1 * s, 4 * s, "bandwidth of 5 to 100 KB/s", (*round).throttleNATS},
		{"net-nats-hold", laneNetwork, 2, 500 * ms, 8 * s, "nothing passes, and nothing is lost: it all arrives later", (*round).holdNATS},
		{"net-nats-half-open", laneNetwork, 2, 500 * ms, 8 * s, "what is sent vanishes, in one direction or both, with no RST; the connections are closed later", (*round).halfOpenNATS},
		{"net-nats-zombie", laneNetwork, 2, 500 * ms, 2 * s, "what the leader sends to NATS is held back, it is frozen, its sessions are ended and the slot is dropped: what it sent arrives while the next leader recovers", (*round).zombie},
	}
}

// chooseKinds returns those that only names, or all, without those that skip names. Both are lists with commas. A name that ends
// with a star stands for all that begin so.
func chooseKinds(only, skip string) ([]kind, error) {
	var chosen []kind
	wanted, err := matcher(only)
	if err != nil {
		return nil, fmt.Errorf("--only: %w", err)
	}
	unwanted, err := matcher(skip)
	if err != nil {
		return nil, fmt.Errorf("--skip: %w", err)
	}
	for _, k := range kinds() {
		if (only == "" || wanted(k.name)) && !unwanted(k.name) {
			chosen = append(chosen, k)
		}
	}
	if len(chosen) == 0 {
		return nil, fmt.Errorf("no kind of fault is left by --only %q --skip %q", only, skip)
	}
	return chosen, nil
}

func matcher(list string) (func(string) bool, error) {
	patterns := strings.FieldsFunc(list, func(r rune) bool { return r == ',' || r == ' ' })
	match := func(pattern, name string) bool {
		if prefix, ok := strings.CutSuffix(pattern, "*"); ok {
			return strings.HasPrefix(name, prefix)
		}
		return pattern == name
	}
	for _, p := range patterns {
		if !slices.ContainsFunc(kinds(), func(k kind) bool { return match(p, k.name) }) {
			return nil, fmt.Errorf("no kind of fault is called %q; --list shows them", p)
		}
	}
	return func(name string) bool {
		return slices.ContainsFunc(patterns, func(p string) bool { return match(p, name) })
	}, nil
}
