package sql

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"

	"ebb/event"
)

// Type is what the catalog says of a type.
type Type struct {
	OID uint32
	// Kind is typtype of pg_type, but 'a' for an array, 'v' for int2vector and oidvector, and 'h' for hstore.
	Kind byte
	// Element is the type of an array's elements, and Delimiter what stands between them.
	Element   uint32
	Delimiter byte
	// Base is the type that a domain is over.
	Base uint32
	// Attributes are those of a composite type, in the order of their numbers, with those that were dropped.
	Attributes []TypeAttribute
}

// TypeAttribute is one of a composite type.
type TypeAttribute struct {
	Name    string
	Type    uint32
	Dropped bool
}

// EndOfLog returns the LSN at which the log ends.
func EndOfLog(ctx context.Context, db *pgx.Conn) (event.LSN, error) {
	var text string
	if err := db.QueryRow(ctx, "SELECT pg_current_wal_insert_lsn()::text").Scan(&text); err != nil {
		return 0, fmt.Errorf("read where the log ends: %w", err)
	}
	return event.ParseLSN(text)
}

// ReadTypes returns the types with these OIDs and all that they are made of, in no order. Those that do not exist are left out.
//
// An array is what get_element_type takes for one. hstore is known by its extension, as its schema and OID may be any.
func ReadTypes(ctx context.Context, db *pgx.Conn, oids []uint32) ([]Type, error) {
	rows, err := db.Query(ctx, `WITH RECURSIVE needed (oid) AS (
			SELECT unnest($1::oid[])
			UNION
			SELECT part.oid FROM needed n JOIN pg_type t ON t.oid = n.oid CROSS JOIN LATERAL (
				SELECT t.typelem WHERE t.typsubscript = 'pg_catalog.array_subscript_handler'::regproc
				UNION ALL SELECT t.typbasetype WHERE t.typtype = 'd'
				UNION ALL SELECT a.atttypid FROM pg_attribute a WHERE t.typtype = 'c' AND a.attrelid = t.typrelid AND a.attnum > 0 AND NOT a.attisdropped
			) part (oid)
			WHERE part.oid <> 0
		)
		SELECT t.oid,
			CASE WHEN t.oid IN ('int2vector'::regtype, 'oidvector'::regtype) THEN 'v'
				WHEN e.oid IS NOT NULL THEN 'a'
				WHEN EXISTS (SELECT FROM pg_depend d JOIN pg_extension x ON x.oid = d.refobjid
					WHERE d.classid = 'pg_type'::regclass AND d.objid = t.oid AND d.refclassid = 'pg_extension'::regclass AND d.deptype = 'e'
					AND x.extname = 'hstore' AND t.typname = 'hstore') THEN 'h'
				ELSE t.typtype::text END,
			coalesce(e.oid, 0), coalesce(e.typdelim::text, ''), t.typbasetype, a.names, a.types, a.dropped
		FROM pg_type t
		LEFT JOIN pg_type e ON e.oid = t.typelem AND t.typsubscript = 'pg_catalog.array_subscript_handler'::regproc
		CROSS JOIN LATERAL (
			SELECT coalesce(array_agg(attname::text ORDER BY attnum), '{}'), coalesce(array_agg(atttypid ORDER BY attnum), '{}'),
				coalesce(array_agg(attisdropped ORDER BY attnum), '{}')
			FROM pg_attribute WHERE t.typtype = 'c' AND attrelid = t.typrelid AND attnum > 0
		) a (names, types, dropped)
		WHERE t.oid IN (SELECT oid FROM needed)`, oids)
	if err != nil {
		return nil, fmt.Errorf("read types from the catalog: %w", err)
	}
	types, err := pgx.CollectRows(rows, func(row pgx.CollectableRow) (Type, error) {
		var t Type
		var kind, delimiter string
		var names []string
		var attributes []uint32
		var dropped []bool
		if err := row.Scan(&t.OID, &kind, &t.Element, &delimiter, &t.Base, &names, &attributes, &dropped); err != nil {
			return Type{}, err
		}
		if len(kind) != 1 || len(delimiter) > 1 {
			return Type{}, fmt.Errorf("type with OID %d is of kind %q and has delimiter %q", t.OID, kind, delimiter)
		}
		t.Kind = kind[0]
		if delimiter != "" {
			t.Delimiter = delimiter[0]
		}
		for i, name := range names {
			t.Attributes = append(t.Attributes, TypeAttribute{Name: name, Type: attributes[i], Dropped: dropped[i]})
		}
		return t, nil
	})
	if err != nil {
		return nil, fmt.Errorf("read types from the catalog: %w", err)
	}
	return types, nil
}
