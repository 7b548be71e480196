package main

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
	"time"
)

// kindReport is what became of the faults of a kind.
type kindReport struct {
	Times   int     `json:"times"`
	Seconds float64 `json:"seconds"`
	// Skipped faults could not be done, Why is the last reason.
	Skipped int    `json:"skipped,omitempty"`
	Why     string `json:"why,omitempty"`
}

// roundReport is what became of a round.
type roundReport struct {
	Seed       uint64                 `json:"seed"`
	SyncAlways bool                   `json:"sync_always"`
	Planned    int                    `json:"planned_faults"`
	Seconds    float64                `json:"seconds"`
	Kinds      map[string]*kindReport `json:"kinds"`

	Committed  int `json:"committed"`
	RolledBack int `json:"rolled_back"`
	Unknown    int `json:"unknown"`
	// Waits are those of producers for delivery, that ended with it.
	Waits        int     `json:"waits"`
	LongestWait  float64 `json:"longest_wait_seconds"`
	QuietSeconds float64 `json:"quiet_seconds"`
	SlowestStop  float64 `json:"slowest_postgres_stop_seconds"`

	Starts       int `json:"bridge_starts"`
	Leads        int `json:"leads"`
	ExcusedExits int `json:"exits_by_contract"`
	// ReplacedProxies hung and were given up.
	ReplacedProxies int `json:"replaced_proxies"`

	Verdict  *verdict    `json:"verdict"`
	Failures []violation `json:"failures,omitempty"`

	started time.Time
}

func (r *roundReport) ok() bool { return len(r.Failures) == 0 && r.Verdict != nil && r.Verdict.ok() }

func (r *roundReport) injected() int {
	n := 0
	for _, k := range r.Kinds {
		n += k.Times
	}
	return n
}

func (r *roundReport) addLedger(p *producer) {
	for _, t := range p.ledger {
		switch t.outcome {
		case committed:
			r.Committed++
		case rolledBack:
			r.RolledBack++
		default:
			r.Unknown++
		}
	}
	r.Waits += len(p.delays)
	for _, d := range p.delays {
		r.LongestWait = max(r.LongestWait, d.Seconds())
	}
}

func (r *roundReport) addFleet(f *fleet) {
	f.mu.Lock()
	defer f.mu.Unlock()
	r.Starts, r.Leads, r.ExcusedExits = f.starts, len(f.led), f.excusedExits
}

// line is a round in one line.
func (r *roundReport) line() string {
	if r.Verdict == nil {
		return fmt.Sprintf("seed %-20d %3d faults  not judged", r.Seed, r.injected())
	}
	v := r.Verdict
	word := "ok"
	if !r.ok() {
		word = "FAILED"
	}
	return fmt.Sprintf("seed %-20d %3d faults  %6d events in %5d transactions, %6d recovered; missing %d, duplicate %d, rolled back %d, out of order %d, altered %d; quiet after %.1fs  %s",
		r.Seed, r.injected(), v.Events, v.Transactions, v.Recovered, v.Missing, v.Duplicates, v.RolledBack, v.Misordered, v.Altered, r.QuietSeconds, word)
}

// runReport is all rounds.
type runReport struct {
	Command string         `json:"command"`
	Seconds float64        `json:"seconds"`
	Faults  int            `json:"faults"`
	Kinds   int            `json:"kinds"`
	OK      bool           `json:"ok"`
	Rounds  []*roundReport `json:"rounds"`
}

func (r *runReport) sum() {
	r.OK = true
	names := map[string]bool{}
	r.Faults = 0
	for _, round := range r.Rounds {
		r.Faults += round.injected()
		r.OK = r.OK && round.ok()
		for name, k := range round.Kinds {
			if k.Times > 0 {
				names[name] = true
			}
		}
	}
	r.Kinds = len(names)
}

func (r *runReport) json(w io.Writer) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	return e.Encode(r)
}

// ofKind adds up what became of a kind in all rounds.
func (r *runReport) ofKind(name string) kindReport {
	var total kindReport
	for _, round := range r.Rounds {
		if one := round.Kinds[name]; one != nil {
			total.Times += one.Times
			total.Seconds += one.Seconds
			total.Skipped += one.Skipped
			if one.Why != "" {
				total.Why = one.Why
			}
		}
	}
	return total
}

// markdown prints the table of what was survived, as a document has it.
func (r *runReport) markdown(w io.Writer) {
	fmt.Fprintf(w, "\n| fault | times | seconds | what it is |\n| --- | ---: | ---: | --- |\n")
	for _, k := range kinds() {
		if total := r.ofKind(k.name); total.Times > 0 {
			fmt.Fprintf(w, "| `%s` | %d | %.0f | %s |\n", k.name, total.Times, total.Seconds, k.what)
		}
	}
}

// table prints what was survived.
func (r *runReport) table(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintf(t, "\nfault\ttimes\tfor\twhat it is\n")
	for _, k := range kinds() {
		total := r.ofKind(k.name)
		if total.Times+total.Skipped == 0 {
			continue
		}
		fmt.Fprintf(t, "%s\t%d\t%.0fs\t%s\n", k.name, total.Times, total.Seconds, k.what)
		if total.Skipped > 0 {
			fmt.Fprintf(t, "\t\t\t%d more could not be done: %.100s\n", total.Skipped, total.Why)
		}
	}
	if err := t.Flush(); err != nil {
		return err
	}
	var v verdict
	var committed, rolledBack, unknown, waits, starts, leads, exits int
	for _, round := range r.Rounds {
		if one := round.Verdict; one != nil {
			v.Events += one.Events
			v.Transactions += one.Transactions
			v.Recovered += one.Recovered
			v.Missing += one.Missing
			v.Duplicates += one.Duplicates
			v.RolledBack += one.RolledBack
			v.Misordered += one.Misordered
			v.Altered += one.Altered
			v.Ledger += one.Ledger
		}
		committed += round.Committed
		rolledBack += round.RolledBack
		unknown += round.Unknown
		waits += round.Waits
		starts += round.Starts
		leads += round.Leads
		exits += round.ExcusedExits
	}
	fmt.Fprintf(w, "\n%d faults of %d kinds in %d rounds, %s\n", r.Faults, r.Kinds, len(r.Rounds), (time.Duration(r.Seconds) * time.Second).String())
	fmt.Fprintf(w, "%d transactions committed, %d rolled back, %d lost their connection during COMMIT; %d waits for delivery\n", committed, rolledBack, unknown, waits)
	fmt.Fprintf(w, "%d processes of bridges started, %d times one came to lead, %d exits by contract\n", starts, leads, exits)
	fmt.Fprintf(w, "%d events of %d transactions, %d of them recovered from the table\n", v.Events, v.Transactions, v.Recovered)
	fmt.Fprintf(w, "missing %d, duplicate %d, rolled back %d, out of order %d, altered %d; ledger against table %d\n",
		v.Missing, v.Duplicates, v.RolledBack, v.Misordered, v.Altered, v.Ledger)
	return nil
}

// failures prints what was found in a round.
func (r *roundReport) failures(w io.Writer) {
	all := r.Failures
	if r.Verdict != nil {
		all = slices.Concat(all, r.Verdict.Violations)
	}
	for _, v := range all {
		fmt.Fprintf(w, "  %s: %s\n", v.Kind, v.Detail)
	}
}
