package event

// Epoch is a stretch of one source's history in which LSNs only rise.
type Epoch struct {
	Number uint32
	// From is the LSN from which on transactions, by the LSN of their commit record, belong to this epoch and not to one before it.
	From LSN
	// Replay says that the same transactions are delivered again in it that there were in the epochs before.
	Replay bool
}

// Epochs are the epochs of a source, in order of their numbers.
type Epochs []Epoch

// At returns the number of the epoch that a transaction belongs to: the highest one that does not begin behind its commit record.
func (e Epochs) At(commit LSN) uint32 {
	for i := len(e) - 1; i >= 0; i-- {
		if e[i].From <= commit {
			return e[i].Number
		}
	}
	return 0
}

// FirstAt returns the number of the epoch in which a transaction was first delivered: that of [Epochs.At], replays left out. An id that is made of
// a position has it, so that it is the same in every delivery.
func (e Epochs) FirstAt(commit LSN) uint32 {
	for i := len(e) - 1; i >= 0; i-- {
		if e[i].From <= commit && !e[i].Replay {
			return e[i].Number
		}
	}
	return 0
}

// Repeats reports whether the transaction of a position is delivered again in a later epoch.
func (e Epochs) Repeats(p Position) bool {
	for _, later := range e {
		switch {
		case later.Number <= p.Epoch:
		case !later.Replay && later.From == 0:
			return false // LSNs from before it and after it cannot be compared
		case later.Replay && later.From <= p.Commit:
			return true
		}
	}
	return false
}

// RuleOut reports whether no transaction of this history can have a position, as a later epoch had begun when it committed. It is of
// another history then, which parted from this one: a primary goes on that has lost it.
func (e Epochs) RuleOut(p Position) bool {
	for _, later := range e {
		switch {
		case later.Number <= p.Epoch, later.Replay:
		case later.From == 0:
			return false // LSNs from before it and after it cannot be compared
		case later.From <= p.Commit:
			return true
		}
	}
	return false
}

// Last returns the number of the current epoch, or 0 when there is none.
func (e Epochs) Last() uint32 {
	if len(e) == 0 {
		return 0
	}
	return e[len(e)-1].Number
}
