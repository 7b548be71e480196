package bridge

import "ebb/decode"

// sayForged logs that somebody else writes messages with the prefix of ebb.emit: once when it begins, and again whenever their number has
// doubled. It returns the number that has been said.
func (l *leader) sayForged(skipped decode.Skipped, said uint64) uint64 {
	if skipped.Forged == 0 || skipped.Forged < 2*said {
		return said
	}
	l.Logger.Warn("messages with prefix ebb were left out that ebb.emit has not written; whoever calls pg_logical_emit_message is to choose another prefix, "+
		"or to call ebb.emit, which needs role ebb_producer", "messages", skipped.Forged)
	return skipped.Forged
}
