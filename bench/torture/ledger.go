package main

import (
	"fmt"
	"hash/maphash"
)

// outcome is what a producer knows of its transaction.
type outcome int

const (
	// unknown: the connection was lost during COMMIT. The table says how it ended.
	unknown outcome = iota
	committed
	rolledBack
)

func (o outcome) String() string { return [...]string{"unknown", "committed", "rolled back"}[o] }

// entry is a transaction in the ledger. Its rows have the sequence numbers from first up to but not including first+size.
type entry struct {
	producer, number int
	first, size      int
	outcome          outcome
}

// cargo is what the harness reads of a payload.
type cargo struct {
	Producer int `json:"p"`
	Number   int `json:"t"`
	Sequence int `json:"s"`
	// Undone rows are in a savepoint that is rolled back.
	Undone bool `json:"u"`
}

// row is a row of the buffer, as the table has it at the end.
type row struct {
	id int64
	// content is a hash of all that a message carries on.
	content uint64
	cargo
}

var contentSeed = maphash.MakeSeed()

// contentOf hashes what must arrive unchanged.
func contentOf(topic, key string, hasKey bool, payload string) uint64 {
	var h maphash.Hash
	h.SetSeed(contentSeed)
	fmt.Fprintf(&h, "%d %d %t ", len(topic), len(key), hasKey)
	_, _ = h.WriteString(topic) // never fails
	_, _ = h.WriteString(key)
	_, _ = h.WriteString(payload)
	return h.Sum64()
}
