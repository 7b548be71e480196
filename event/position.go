package event

import (
	"cmp"
	"encoding"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// ErrSyntax is wrapped by every parse error of this package.
var ErrSyntax = errors.New("invalid syntax")

// LSN is a byte position in the write-ahead log of one Postgres timeline (type pg_lsn). Zero is "none".
type LSN uint64

var (
	_ encoding.TextMarshaler   = LSN(0)
	_ encoding.TextUnmarshaler = (*LSN)(nil)
	_ encoding.TextMarshaler   = Position{}
	_ encoding.TextUnmarshaler = (*Position)(nil)
)

// ParseLSN parses the form that Postgres prints, two hexadecimal halves of at most eight digits: "16/B374D848".
func ParseLSN(s string) (LSN, error) {
	hi, lo, ok := strings.Cut(s, "/")
	if !ok {
		return 0, fmt.Errorf("LSN %q: want X/Y: %w", s, ErrSyntax)
	}
	h, errHi := strconv.ParseUint(hi, 16, 32)
	l, errLo := strconv.ParseUint(lo, 16, 32)
	if errHi != nil || errLo != nil {
		return 0, fmt.Errorf("LSN %q: want two hexadecimal halves X/Y: %w", s, ErrSyntax)
	}
	return LSN(h<<32 | l), nil
}

// String returns the form that Postgres prints, such as "16/B374D848".
func (l LSN) String() string { return string(l.Append(nil)) }

// Append appends the form that Postgres prints to b.
func (l LSN) Append(b []byte) []byte {
	b = appendUpperHex(b, uint32(l>>32))
	b = append(b, '/')
	return appendUpperHex(b, uint32(l))
}

// MarshalText writes the form that Postgres prints.
func (l LSN) MarshalText() ([]byte, error) { return l.Append(nil), nil }

// UnmarshalText reads the form that Postgres prints.
func (l *LSN) UnmarshalText(b []byte) error {
	v, err := ParseLSN(string(b))
	if err != nil {
		return err
	}
	*l = v
	return nil
}

// Position is where an event stands in everything that one source ever publishes. Positions order events: by epoch, then by
// the LSN of the transaction's commit record, then by index.
//
// LSNs of single rows cannot do this, because rows of concurrent transactions interleave in the log.
type Position struct {
	// Epoch rises when LSNs start anew or are sent again: a restored database, a promoted standby, a replay.
	Epoch uint32
	// Commit is the LSN of the commit record.
	Commit LSN
	// Index counts every row and message of the transaction, as decoded, from 1. Zero stands before the first.
	Index uint64
}

// ParsePosition parses "<epoch>:<commit LSN as X/Y>:<index>", such as "1:16/B374D848:7".
func ParsePosition(s string) (Position, error) {
	epoch, rest, ok1 := strings.Cut(s, ":")
	lsn, index, ok2 := strings.Cut(rest, ":")
	if !ok1 || !ok2 {
		return Position{}, fmt.Errorf("position %q: want EPOCH:X/Y:INDEX: %w", s, ErrSyntax)
	}
	e, err := strconv.ParseUint(epoch, 10, 32)
	if err != nil {
		return Position{}, fmt.Errorf("position %q: the epoch is no number: %w", s, ErrSyntax)
	}
	c, err := ParseLSN(lsn)
	if err != nil {
		return Position{}, fmt.Errorf("position %q: %w", s, err)
	}
	i, err := strconv.ParseUint(index, 10, 64)
	if err != nil {
		return Position{}, fmt.Errorf("position %q: the index is no number: %w", s, ErrSyntax)
	}
	return Position{Epoch: uint32(e), Commit: c, Index: i}, nil
}

// Compare returns -1 if p stands before q, 0 if they are the same and 1 if p stands after q.
func (p Position) Compare(q Position) int {
	return cmp.Or(cmp.Compare(p.Epoch, q.Epoch), cmp.Compare(p.Commit, q.Commit), cmp.Compare(p.Index, q.Index))
}

// IsZero reports whether p is the zero Position, which stands before every event.
func (p Position) IsZero() bool { return p == Position{} }

// String returns "<epoch>:<commit LSN as X/Y>:<index>".
func (p Position) String() string { return string(p.Append(nil)) }

// Append appends the form of [Position.String] to b.
func (p Position) Append(b []byte) []byte {
	b = strconv.AppendUint(b, uint64(p.Epoch), 10)
	b = append(b, ':')
	b = p.Commit.Append(b)
	b = append(b, ':')
	return strconv.AppendUint(b, p.Index, 10)
}

// MarshalText writes the form of [Position.String].
func (p Position) MarshalText() ([]byte, error) { return p.Append(nil), nil }

// UnmarshalText reads the form of [Position.String].
func (p *Position) UnmarshalText(b []byte) error {
	v, err := ParsePosition(string(b))
	if err != nil {
		return err
	}
	*p = v
	return nil
}

func appendUpperHex(b []byte, v uint32) []byte {
	const digits = "0123456789ABCDEF"
	shift := 28
	for shift > 0 && v>>shift == 0 {
		shift -= 4
	}
	for ; shift >= 0; shift -= 4 {
		b = append(b, digits[v>>shift&0xF])
	}
	return b
}
