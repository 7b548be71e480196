package main

import (
	"fmt"
	"slices"

	"ebb/event"
)

// message is a message of the stream.
type message struct {
	sequence  uint64
	id        int64
	position  event.Position
	recovered bool
	content   uint64
}

// evidence is what is known when a round is over.
type evidence struct {
	// ledger is what the producers know.
	ledger []entry
	// table is what Postgres holds, by id.
	table []row
	// witness are the ids in the order in which their transactions committed, by an independent slot. transactions are where in
	// there a transaction ends.
	witness      []int64
	transactions []int
	// stream is what stands in the stream, in order.
	stream []message
}

// violation is something that must not be.
type violation struct {
	Kind   string `json:"kind"`
	Detail string `json:"detail"`
}

// verdict is what the oracle says.
type verdict struct {
	Events       int `json:"events"`
	Transactions int `json:"transactions"`
	Recovered    int `json:"recovered"`

	Missing    int `json:"missing"`
	Duplicates int `json:"duplicates"`
	RolledBack int `json:"rolled_back"`
	Misordered int `json:"misordered"`
	Altered    int `json:"altered"`
	// Ledger counts transactions of which Postgres holds something else than their producer knows, or the witness something else
	// than the table: then the harness is wrong, or Postgres is.
	Ledger int `json:"ledger"`

	Violations []violation `json:"violations,omitempty"`
}

// ok says whether nothing was found.
func (v *verdict) ok() bool {
	return v.Missing+v.Duplicates+v.RolledBack+v.Misordered+v.Altered+v.Ledger == 0
}

// mostViolations is how many of a sort are written out.
const mostViolations = 10

func (v *verdict) add(count *int, kind, format string, args ...any) {
	*count++
	if *count <= mostViolations {
		v.Violations = append(v.Violations, violation{kind, fmt.Sprintf(format, args...)})
	}
}

// judge compares the stream with what was committed.
func judge(e evidence) *verdict {
	v := &verdict{Events: len(e.table), Transactions: len(e.transactions)}
	v.checkLedger(e)
	rows := make(map[int64]row, len(e.table))
	for _, r := range e.table {
		rows[r.id] = r
	}
	place := v.checkWitness(e, rows)
	v.checkContents(e, rows)
	v.checkOrder(e, place)
	return v
}

// checkLedger compares the table with what the producers know.
func (v *verdict) checkLedger(e evidence) {
	type key struct{ producer, number int }
	have := map[key][]int{}
	for _, r := range e.table {
		if r.Undone {
			v.add(&v.Ledger, "ledger", "row %d is in the table, and was rolled back with its savepoint", r.id)
		}
		k := key{r.Producer, r.Number}
		have[k] = append(have[k], r.Sequence)
	}
	for _, t := range e.ledger {
		k := key{t.producer, t.number}
		found := have[k]
		delete(have, k)
		slices.Sort(found)
		complete := len(found) == t.size
		for i, sequence := range found {
			complete = complete && sequence == t.first+i
		}
		if complete && t.outcome != rolledBack || len(found) == 0 && t.outcome != committed {
			continue
		}
		v.add(&v.Ledger, "ledger", "transaction %d of producer %d, of %d rows, is %s; the table has %d of them",
			t.number, t.producer, t.size, t.outcome, len(found))
	}
	for k, found := range have {
		v.add(&v.Ledger, "ledger", "the table has %d rows of transaction %d of producer %d, of which the ledger knows nothing",
			len(found), k.number, k.producer)
	}
}

// place is where the witness saw a row.
type place struct {
	order       int // among all rows
	transaction int // number of its transaction, in commit order
}

// checkWitness compares the witness with the table, and says where each row stands in commit order.
func (v *verdict) checkWitness(e evidence, rows map[int64]row) map[int64]place {
	places := make(map[int64]place, len(e.witness))
	transaction := 0
	for i, id := range e.witness {
		for transaction < len(e.transactions) && i >= e.transactions[transaction] {
			transaction++
		}
		if _, ok := rows[id]; !ok {
			v.add(&v.Ledger, "ledger", "the witness saw row %d, which is not in the table", id)
		}
		if _, ok := places[id]; ok {
			v.add(&v.Ledger, "ledger", "the witness saw row %d twice", id)
		}
		places[id] = place{order: i, transaction: transaction}
	}
	for _, r := range e.table {
		if _, ok := places[r.id]; !ok {
			v.add(&v.Ledger, "ledger", "the witness has not seen row %d", r.id)
		}
	}
	return places
}

// checkContents looks for what is missing, there twice, there though it was rolled back, or not what was written.
func (v *verdict) checkContents(e evidence, rows map[int64]row) {
	first := make(map[int64]message, len(e.stream))
	for _, m := range e.stream {
		r, ok := rows[m.id]
		if !ok {
			v.add(&v.RolledBack, "rolled back", "message %d is event %d, which was never committed", m.sequence, m.id)
			continue
		}
		if before, ok := first[m.id]; ok {
			v.add(&v.Duplicates, "duplicate", "message %d%s is event %d, which message %d%s was already", m.sequence, origin(m), m.id,
				before.sequence, origin(before))
			continue
		}
		first[m.id] = m
		if m.content != r.content {
			v.add(&v.Altered, "altered", "message %d, event %d, is not what the table holds", m.sequence, m.id)
		}
		if m.recovered {
			v.Recovered++
		}
	}
	for _, r := range e.table {
		if _, ok := first[r.id]; !ok {
			v.add(&v.Missing, "missing", "event %d (producer %d, transaction %d, sequence %d) is not in the stream", r.id, r.Producer, r.Number, r.Sequence)
		}
	}
}

// checkOrder checks the order of the stream:
//
//   - positions never go back;
//   - what was streamed is in commit order, and in a transaction in the order of its rows;
//   - what was recovered is in id order. Another recovery may have begun in the middle, when the slot was lost again, with rows that
//     had not been committed when the first one began: so where ids go back, all that follow were committed later than all before;
//   - what was streamed after a recovery was committed later than all that was recovered.
func (v *verdict) checkOrder(e evidence, places map[int64]place) {
	misordered := func(m message, format string, args ...any) {
		v.add(&v.Misordered, "misordered", "message %d, event %d at %s%s, %s", m.sequence, m.id, m.position, origin(m), fmt.Sprintf(format, args...))
	}
	var before message
	streamed, streamedID := -1, int64(0)        // the last that was streamed, in the order of the witness
	recovered, recoveredID := -1, int64(0)      // the last transaction of which something was recovered
	run, runID, floor := -1, int64(0), int64(0) // the same of the recovery that is going on; floor is its last id
	barrier := -1                               // recovered rows of this run must be of later transactions
	for i, m := range e.stream {
		if i > 0 && m.position.Compare(before.position) < 0 {
			misordered(m, "comes after message %d at %s", before.sequence, before.position)
		}
		if i > 0 && !m.recovered && m.position.Compare(before.position) == 0 {
			misordered(m, "has the position of message %d", before.sequence)
		}
		p, ok := places[m.id]
		switch {
		case !ok:
		case m.recovered:
			if i == 0 || !before.recovered {
				run, runID, floor, barrier = -1, 0, 0, -1
			}
			if m.id <= floor {
				barrier, run = max(barrier, run), -1
				if p.transaction <= barrier {
					misordered(m, "was recovered after event %d, and its transaction had committed when that was", floor)
				}
			} else if p.transaction <= barrier {
				misordered(m, "was recovered with rows that were committed later than event %d, and was not", runID)
			}
			floor = m.id
			if p.transaction > run {
				run, runID = p.transaction, m.id
			}
			if p.transaction > recovered {
				recovered, recoveredID = p.transaction, m.id
			}
		default:
			if p.order <= streamed {
				misordered(m, "was committed before event %d, which stands before it", streamedID)
			}
			if p.transaction <= recovered {
				misordered(m, "was committed before or with event %d, which was recovered before it", recoveredID)
			}
			if p.order > streamed {
				streamed, streamedID = p.order, m.id
			}
		}
		before = m
	}
}

func origin(m message) string {
	if m.recovered {
		return " (recovered)"
	}
	return ""
}
