package decode

import "fmt"

// Kind says how the text of a type is to be read.
type Kind uint8

const (
	// Scalar values are one JSON value each: a number, a boolean, what json holds, and else the text as a string.
	Scalar Kind = iota + 1
	// Array values are in braces.
	Array
	// Vector values are an array without braces: int2vector and oidvector.
	Vector
	// Domain values are those of the type below.
	Domain
	// Composite values are in parentheses.
	Composite
	// HStore values are those of the extension hstore.
	HStore
)

// Type is what the catalog says of a type, as far as its JSON depends on that.
type Type struct {
	Kind Kind
	// Element is the OID of an array's elements, and Delimiter what stands between them.
	Element   uint32
	Delimiter byte
	// Base is the OID of the type that a domain is over, which may be a domain as well.
	Base uint32
	// Attributes are those of a composite type, in the order of their numbers, with those that were dropped.
	Attributes []Attribute
}

// Attribute is one of a composite type. One that was dropped has no type any more.
type Attribute struct {
	Name    string
	Type    uint32
	Dropped bool
}

// Types are types by their OIDs. Those that come with every Postgres need not be among them, but for the row types of the catalog.
type Types map[uint32]Type

// Unknown returns those of the OIDs whose types have to be looked up.
func (t Types) Unknown(oids []uint32) []uint32 {
	var unknown []uint32
	for _, oid := range oids {
		if _, ok := t.get(oid); !ok {
			unknown = append(unknown, oid)
		}
	}
	return unknown
}

func (t Types) get(oid uint32) (Type, bool) {
	if known, ok := builtin[oid]; ok {
		return known, true
	}
	known, ok := t[oid]
	return known, ok
}

// UnknownTypeError says that nothing is known of a type, or, if Changed, that a value does not fit what is known, because the type was
// altered. It wraps [ErrMapping], or [ErrRow] if Changed. What the catalog says now may help.
type UnknownTypeError struct {
	// Column is the table's column where the type, or one that is made of it, was found.
	Column  string
	OID     uint32
	Changed bool
}

func (e *UnknownTypeError) Error() string {
	if e.Changed {
		return fmt.Sprintf("column %q: a value has another number of attributes than its composite type with OID %d, as that was altered "+
			"(ALTER TYPE) after the row was written", e.Column, e.OID)
	}
	return fmt.Sprintf("column %q: nothing is known of the type with OID %d", e.Column, e.OID)
}

func (e *UnknownTypeError) Unwrap() error {
	if e.Changed {
		return ErrRow
	}
	return ErrMapping
}

// The OIDs of the types that JSON has a form for, and of those that this package must tell from others. A built-in type has the same
// OID in every database (src/include/catalog/pg_type.dat).
const (
	oidBool        = 16
	oidBytea       = 17
	oidInt8        = 20
	oidInt2        = 21
	oidInt2Vector  = 22
	oidInt4        = 23
	oidText        = 25
	oidOID         = 26
	oidOIDVector   = 30
	oidJSON        = 114
	oidBox         = 603
	oidFloat4      = 700
	oidFloat8      = 701
	oidBoxArray    = 1020
	oidVarchar     = 1043
	oidTimestamp   = 1114
	oidTimestampTZ = 1184
	oidNumeric     = 1700
	oidJSONB       = 3802
)

// builtin are the types that need no look at the catalog.
var builtin = func() Types {
	types := Types{
		oidInt2Vector: {Kind: Vector, Element: oidInt2},
		oidOIDVector:  {Kind: Vector, Element: oidOID},
		oidBoxArray:   {Kind: Array, Element: oidBox, Delimiter: ';'},
	}
	for _, oid := range builtinScalars {
		types[oid] = Type{Kind: Scalar}
	}
	for array, element := range builtinArrays {
		types[array] = Type{Kind: Array, Element: element, Delimiter: ','}
	}
	return types
}()

var builtinScalars = [...]uint32{
	16, 17, 18, 19, 20, 21, 23, 24, 25, 26, 27, 28, 29, 114, 142, 194, 600, 601, 602, 603, 604, 628, 650, 700, 701, 718, 774,
	790, 829, 869, 1033, 1042, 1043, 1082, 1083, 1114, 1184, 1186, 1266, 1560, 1562, 1700, 1790, 2202, 2203, 2204, 2205, 2206,
	2950, 2970, 3220, 3361, 3402, 3614, 3615, 3642, 3734, 3769, 3802, 3904, 3906, 3908, 3910, 3912, 3926, 4072, 4089, 4096, 4191, 4451,
	4532, 4533, 4534, 4535, 4536, 4600, 4601, 5017, 5038, 5069,
}

// builtinArrays are the types of elements by those of their arrays.
var builtinArrays = map[uint32]uint32{
	143: 142, 199: 114, 271: 5069, 629: 628, 651: 650, 719: 718, 775: 774, 791: 790, 1000: 16, 1001: 17,
	1002: 18, 1003: 19, 1005: 21, 1006: 22, 1007: 23, 1008: 24, 1009: 25, 1010: 27, 1011: 28, 1012: 29,
	1013: 30, 1014: 1042, 1015: 1043, 1016: 20, 1017: 600, 1018: 601, 1019: 602, 1021: 700, 1022: 701, 1027: 604,
	1028: 26, 1034: 1033, 1040: 829, 1041: 869, 1115: 1114, 1182: 1082, 1183: 1083, 1185: 1184, 1187: 1186, 1231: 1700,
	1270: 1266, 1561: 1560, 1563: 1562, 2201: 1790, 2207: 2202, 2208: 2203, 2209: 2204, 2210: 2205, 2211: 2206, 2949: 2970,
	2951: 2950, 3221: 3220, 3643: 3614, 3644: 3642, 3645: 3615, 3735: 3734, 3770: 3769, 3807: 3802, 3905: 3904, 3907: 3906, 3909: 3908,
	3911: 3910, 3913: 3912, 3927: 3926, 4073: 4072, 4090: 4089, 4097: 4096, 4192: 4191, 5039: 5038, 6150: 4451, 6151: 4532,
	6152: 4533, 6153: 4534, 6155: 4535, 6157: 4536,
}
