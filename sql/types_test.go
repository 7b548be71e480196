package sql_test

import (
	"cmp"
	"slices"
	"testing"

	gocmp "github.com/google/go-cmp/cmp"

	"ebb/internal/pgtest"
	"ebb/sql"
)

func TestReadTypes(t *testing.T) {
	db := pgtest.New(t)
	db.Exec(t, "CREATE TYPE mood AS ENUM ('fine')", "CREATE DOMAIN moods AS mood[]", `CREATE TYPE thing AS (m moods, gone int, "b 1" box[], v int2vector)`,
		"ALTER TYPE thing DROP ATTRIBUTE gone", "CREATE TYPE nothing AS ()", "CREATE TABLE hstore (a int)")
	conn := db.Connect(t)
	oid := func(name string) uint32 {
		return pgtest.Value[uint32](t, db, "SELECT $1::text::regtype::oid", name)
	}
	got, err := sql.ReadTypes(t.Context(), conn, []uint32{oid("thing[]"), oid("nothing"), 4294967295, oid("hstore")})
	if err != nil {
		t.Fatal(err)
	}
	byOID := func(a, b sql.Type) int { return cmp.Compare(a.OID, b.OID) }
	want := []sql.Type{
		{OID: oid("thing[]"), Kind: 'a', Element: oid("thing"), Delimiter: ','},
		{OID: oid("thing"), Kind: 'c', Attributes: []sql.TypeAttribute{
			{Name: "m", Type: oid("moods")}, {Name: "........pg.dropped.2........", Dropped: true}, {Name: "b 1", Type: oid("box[]")}, {Name: "v", Type: oid("int2vector")},
		}},
		{OID: oid("moods"), Kind: 'd', Base: oid("mood[]")},
		{OID: oid("mood[]"), Kind: 'a', Element: oid("mood"), Delimiter: ','},
		{OID: oid("mood"), Kind: 'e'},
		{OID: oid("box[]"), Kind: 'a', Element: oid("box"), Delimiter: ';'},
		{OID: oid("box"), Kind: 'b'},
		{OID: oid("int2vector"), Kind: 'v', Element: oid("int2"), Delimiter: ','},
		{OID: oid("int2"), Kind: 'b'},
		{OID: oid("nothing"), Kind: 'c'},
		// A table of that name is no hstore.
		{OID: oid("hstore"), Kind: 'c', Attributes: []sql.TypeAttribute{{Name: "a", Type: oid("int4")}}},
		{OID: oid("int4"), Kind: 'b'},
	}
	slices.SortFunc(got, byOID)
	slices.SortFunc(want, byOID)
	if diff := gocmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if got, err := sql.ReadTypes(t.Context(), conn, nil); err != nil || len(got) != 0 {
		t.Errorf("of no types: %v, %v", got, err)
	}
}
