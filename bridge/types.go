package bridge

import (
	"context"
	"errors"
	"time"

	"ebb/decode"
	"ebb/event"
	"ebb/sql"
)

// lookUpTimeout bounds a look at the catalog. The reader of the stream waits for it, and reports nothing to the server meanwhile.
const lookUpTimeout = 5 * time.Second

// lookUp returns what the catalog says now of types, and of those that they are made of, and where the log ended before that. It asks in a
// session of its own: the leader's is used for ticks at the same time.
func (l *leader) lookUp(ctx context.Context, oids []uint32) (decode.Types, event.LSN, error) {
	ctx, cancel := context.WithTimeout(ctx, lookUpTimeout)
	defer cancel()
	db, err := sql.Connect(ctx, l.Postgres, l.Slot)
	if err != nil {
		return nil, 0, err
	}
	defer closeQuietly(db)
	shares, err := sql.SharesServer(ctx, db, l.lockPID)
	if err != nil {
		return nil, 0, err
	}
	if !shares {
		return nil, 0, errors.New("the session for reading types is on another server than the leader's lock, or that is lost")
	}
	return l.lookUpIn(ctx, db, oids)
}

// lookUpIn does that in a session.
func (c *Config) lookUpIn(ctx context.Context, db *pgxConn, oids []uint32) (decode.Types, event.LSN, error) {
	asOf, err := sql.EndOfLog(ctx, db)
	if err != nil {
		return nil, 0, err
	}
	types, missing, err := readTypes(ctx, db, oids)
	if err != nil {
		return nil, 0, err
	}
	if len(missing) > 0 {
		c.Logger.Warn("types do not exist any more that rows in the slot have; their values are delivered as strings", "oids", missing)
	}
	return types, asOf, nil
}

// readTypes returns types as the decoder takes them, and those of the OIDs that the catalog has not: types that were dropped after rows with
// them were written. These stand for types whose values are strings, as it is too late to know better.
func readTypes(ctx context.Context, db *pgxConn, oids []uint32) (types decode.Types, missing []uint32, err error) {
	known, err := sql.ReadTypes(ctx, db, oids)
	if err != nil {
		return nil, nil, err
	}
	types = make(decode.Types, len(known))
	for _, t := range known {
		out := decode.Type{Kind: decode.Scalar, Element: t.Element, Delimiter: t.Delimiter, Base: t.Base}
		switch t.Kind {
		case 'a':
			out.Kind = decode.Array
		case 'v':
			out.Kind = decode.Vector
		case 'd':
			out.Kind = decode.Domain
		case 'c':
			out.Kind = decode.Composite
			for _, a := range t.Attributes {
				out.Attributes = append(out.Attributes, decode.Attribute{Name: a.Name, Type: a.Type, Dropped: a.Dropped})
			}
		case 'h':
			out.Kind = decode.HStore
		}
		types[t.OID] = out
	}
	missing = types.Unknown(oids)
	for _, oid := range missing {
		types[oid] = decode.Type{Kind: decode.Scalar}
	}
	return types, missing, nil
}
