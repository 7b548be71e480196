package main

import (
	"slices"
	"testing"

	"ebb/event"
)

// innocent is a round in which nothing went wrong: three transactions, of which the second one's first row was inserted first of
// all, and between them one that was rolled back.
func innocent() evidence {
	e := evidence{
		ledger: []entry{
			{producer: 1, number: 0, first: 0, size: 2, outcome: committed},
			{producer: 2, number: 0, first: 0, size: 3, outcome: committed},
			{producer: 1, number: 1, first: 2, size: 4, outcome: rolledBack},
			{producer: 1, number: 2, first: 6, size: 1, outcome: unknown},
			{producer: 1, number: 3, first: 7, size: 1, outcome: unknown}, // it was not committed
		},
		table: []row{
			{1, 101, cargo{2, 0, 0, false}}, {2, 102, cargo{1, 0, 0, false}}, {3, 103, cargo{1, 0, 1, false}},
			{4, 104, cargo{2, 0, 1, false}}, {5, 105, cargo{2, 0, 2, false}}, {10, 110, cargo{1, 2, 6, false}},
		},
		witness:      []int64{2, 3, 1, 4, 5, 10},
		transactions: []int{2, 5, 6},
	}
	for i, id := range e.witness {
		e.stream = append(e.stream, message{sequence: uint64(i) + 1, id: id, content: uint64(100 + id), position: position(i)})
	}
	return e
}

// position is where the i-th event of innocent's witness stands.
func position(i int) event.Position {
	commits := []event.Position{
		{Epoch: 1, Commit: 100, Index: 1}, {Epoch: 1, Commit: 100, Index: 2},
		{Epoch: 1, Commit: 200, Index: 1}, {Epoch: 1, Commit: 200, Index: 2}, {Epoch: 1, Commit: 200, Index: 3},
		{Epoch: 1, Commit: 300, Index: 1},
	}
	return commits[i]
}

// recover marks messages as recovered, from the i-th on up to but not including the j-th; they repeat the position before them.
func recoverRows(e *evidence, i, j int) {
	for k := i; k < j; k++ {
		e.stream[k].recovered = true
		e.stream[k].position = event.Position{Epoch: 1}
		if i > 0 {
			e.stream[k].position = e.stream[i-1].position
		}
	}
}

// order puts the stream in an order of ids, and leaves the positions where they are.
func order(e *evidence, ids ...int64) {
	var stream []message
	for i, id := range ids {
		m := e.stream[slices.IndexFunc(e.stream, func(m message) bool { return m.id == id })]
		m.sequence, m.position = uint64(i)+1, e.stream[i].position
		stream = append(stream, m)
	}
	e.stream = stream
}

func TestOracle(t *testing.T) {
	for _, c := range []struct {
		name   string
		change func(*evidence)
		want   verdict // the counts
	}{
		{"nothing wrong", func(*evidence) {}, verdict{}},
		{"a message is missing", func(e *evidence) { e.stream = slices.Delete(e.stream, 3, 4) }, verdict{Missing: 1}},
		{"the last message is missing", func(e *evidence) { e.stream = e.stream[:5] }, verdict{Missing: 1}},
		{"the stream is empty", func(e *evidence) { e.stream = nil }, verdict{Missing: 6}},
		{"a message is there twice, with its position", func(e *evidence) { e.stream = slices.Insert(e.stream, 3, e.stream[2]) },
			verdict{Duplicates: 1, Misordered: 2}},
		{"a message is there twice, at the end", func(e *evidence) {
			m := e.stream[2]
			m.position = event.Position{Epoch: 1, Commit: 400, Index: 1}
			e.stream = append(e.stream, m)
		}, verdict{Duplicates: 1, Misordered: 1}},
		{"a recovered message was streamed already", func(e *evidence) {
			m := e.stream[2]
			m.recovered, m.position = true, e.stream[5].position
			e.stream = append(e.stream, m)
		}, verdict{Duplicates: 1}},
		{"a rolled back row is there", func(e *evidence) {
			e.stream = append(e.stream, message{sequence: 7, id: 7, content: 107, position: event.Position{Epoch: 1, Commit: 400, Index: 1}})
		}, verdict{RolledBack: 1}},
		{"a payload was altered", func(e *evidence) { e.stream[4].content++ }, verdict{Altered: 1}},
		{"two transactions are in the wrong order", func(e *evidence) { order(e, 1, 4, 5, 2, 3, 10) }, verdict{Misordered: 2}},
		{"two rows of a transaction are in the wrong order", func(e *evidence) { order(e, 2, 3, 4, 1, 5, 10) }, verdict{Misordered: 1}},
		{"streamed in id order", func(e *evidence) { order(e, 1, 2, 3, 4, 5, 10) }, verdict{Misordered: 2}},
		{"a position goes back", func(e *evidence) { e.stream[5].position = e.stream[0].position }, verdict{Misordered: 1}},
		{"a position is repeated", func(e *evidence) { e.stream[5].position = e.stream[4].position }, verdict{Misordered: 1}},

		{"all recovered, in id order", func(e *evidence) { order(e, 1, 2, 3, 4, 5, 10); recoverRows(e, 0, 6) }, verdict{Recovered: 6}},
		{"all recovered, in commit order", func(e *evidence) { recoverRows(e, 0, 6) }, verdict{Recovered: 6}}, // 1 committed later than 2 and 3
		{"recovered in an order of its own", func(e *evidence) { order(e, 1, 4, 5, 2, 3, 10); recoverRows(e, 0, 6) },
			verdict{Recovered: 6, Misordered: 2}},
		{"recovered, and the rest streamed", func(e *evidence) { order(e, 1, 2, 3, 4, 5, 10); recoverRows(e, 0, 5) }, verdict{Recovered: 5}},
		{"streamed after a recovery, and committed before it", func(e *evidence) { order(e, 10, 2, 3, 1, 4, 5); recoverRows(e, 0, 1) },
			verdict{Recovered: 1, Misordered: 5}},
		{"a second recovery goes on with what came later", func(e *evidence) { order(e, 2, 3, 1, 4, 5, 10); recoverRows(e, 0, 5) },
			verdict{Recovered: 5}},
		{"a second recovery brings what the first one left out", func(e *evidence) { order(e, 1, 3, 4, 5, 2, 10); recoverRows(e, 0, 5) },
			verdict{Recovered: 5, Misordered: 1}},
		{"a recovered position goes back", func(e *evidence) {
			order(e, 2, 3, 1, 4, 5, 10)
			recoverRows(e, 3, 6)
			e.stream[4].position = e.stream[0].position
		}, verdict{Recovered: 3, Misordered: 1}},

		{"a committed transaction is not in the table", func(e *evidence) {
			e.table, e.witness, e.transactions, e.stream = e.table[:5], e.witness[:5], e.transactions[:2], e.stream[:5]
			e.ledger[3].outcome = committed
		}, verdict{Ledger: 1}},
		{"a rolled back transaction is in the table", func(e *evidence) { e.ledger[3].outcome = rolledBack }, verdict{Ledger: 1}},
		{"half of a transaction is in the table", func(e *evidence) { e.ledger[3].size = 2 }, verdict{Ledger: 1}},
		{"a row that nobody wrote", func(e *evidence) { e.ledger = e.ledger[:3] }, verdict{Ledger: 1}},
		{"a row of a savepoint that was rolled back", func(e *evidence) { e.table[2].Undone = true }, verdict{Ledger: 1}},
		{"the witness missed a row", func(e *evidence) { e.witness, e.transactions = e.witness[:5], e.transactions[:2] }, verdict{Ledger: 1}},
		{"the witness saw a row that is not there", func(e *evidence) {
			e.witness, e.transactions = append(e.witness, 11), append(e.transactions, 7)
		}, verdict{Ledger: 1}},
	} {
		t.Run(c.name, func(t *testing.T) {
			e := innocent()
			c.change(&e)
			got := judge(e)
			c.want.Events, c.want.Transactions = len(e.table), len(e.transactions)
			sum := got.Missing + got.Duplicates + got.RolledBack + got.Misordered + got.Altered + got.Ledger
			if len(got.Violations) != sum {
				t.Errorf("%d violations are counted, %d are told", sum, len(got.Violations))
			}
			if got.ok() != (sum == 0) {
				t.Errorf("ok is %t with %d violations", got.ok(), sum)
			}
			told := got.Violations
			got.Violations = nil
			if !equal(*got, c.want) {
				t.Errorf("got %+v, want %+v: %v", *got, c.want, told)
			}
		})
	}
}

func equal(a, b verdict) bool {
	a.Violations, b.Violations = nil, nil
	return a.Events == b.Events && a.Transactions == b.Transactions && a.Recovered == b.Recovered && a.Missing == b.Missing &&
		a.Duplicates == b.Duplicates && a.RolledBack == b.RolledBack && a.Misordered == b.Misordered && a.Altered == b.Altered && a.Ledger == b.Ledger
}

// Many violations are all counted, and only some told.
func TestOracleIsBrief(t *testing.T) {
	e := innocent()
	e.stream = nil
	for i := range 1000 {
		e.table = append(e.table, row{id: int64(100 + i), cargo: cargo{9, 0, i, false}})
		e.witness = append(e.witness, int64(100+i))
	}
	e.transactions = append(e.transactions, len(e.witness))
	e.ledger = append(e.ledger, entry{producer: 9, size: 1000, outcome: committed})
	v := judge(e)
	if v.Missing != 1006 || len(v.Violations) != mostViolations {
		t.Errorf("%d are missing and %d told, want 1006 and %d", v.Missing, len(v.Violations), mostViolations)
	}
}
