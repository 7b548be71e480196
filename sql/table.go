package sql

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
)

// ErrTable says that a table of one's own cannot be what the configuration wants it to be.
var ErrTable = errors.New("the table does not fit its mapping")

// Delivered says what is done with the row of an event that is delivered.
type Delivered int

// What is done with rows of delivered events.
const (
	Keep   Delivered = iota // nothing
	Mark                    // a column is set
	Delete                  // the row is deleted
)

// Table is a table whose rows are events.
type Table struct {
	Schema, Name string
	// Columns are those that the mapping reads, without a whole row's. WholeRow says that it reads all others as well.
	Columns  []string
	WholeRow bool
	// ID is the column of the event's id, or "".
	ID string
	// Delivered is what happens to delivered rows, of which Recorded is the column that a mark sets.
	Delivered Delivered
	Recorded  string
	// StartAll says that rows which are there at the first start are delivered.
	StartAll bool
}

// ManagedTable is the table that ebb setup creates.
func ManagedTable() Table {
	return Table{Schema: "ebb", Name: "buffer", Columns: bufferColumns, ID: "id"}
}

// Managed reports whether t is the table that ebb setup creates.
func (t *Table) Managed() bool { return t.Schema == "ebb" && t.Name == "buffer" }

func (t *Table) String() string { return t.Schema + "." + t.Name }

func (t *Table) ident() string { return pgx.Identifier{t.Schema, t.Name}.Sanitize() }

// orManaged are the tables, or the managed one if there are none.
func orManaged(tables []Table) []Table {
	if len(tables) == 0 {
		return []Table{ManagedTable()}
	}
	return tables
}

// HasManaged reports whether the managed table is among the tables; none stand for it.
func HasManaged(tables []Table) bool {
	return slices.ContainsFunc(orManaged(tables), func(t Table) bool { return t.Managed() })
}

// OwnTable is a table of one's own as the database has it.
type OwnTable struct {
	Table
	// Key are the columns of the primary key, and keyTypes their types; there may be none.
	Key      []string
	keyTypes []string
	// All are the columns that a slot sends when it sends all of them, in order.
	All []string
	// mark is what a mark sets the column to, and unmarked the condition of a row t without one.
	mark, unmarked string

	owned, integerID bool
	// MixesWithNumbers says that the ids of another table are numbers.
	MixesWithNumbers bool
}

// Inspect looks up the tables that are not managed, and returns ErrTable, with what to do, for one that cannot be what is wanted of it.
// The result has the order of tables, without the managed one.
func Inspect(ctx context.Context, db querier, tables []Table) ([]OwnTable, error) {
	var own []OwnTable
	integers := []string{}
	for _, t := range orManaged(tables) {
		if t.Managed() {
			integers = append(integers, t.String())
			continue
		}
		o, err := inspect(ctx, db, t)
		if err != nil {
			return nil, err
		}
		if o.integerID {
			integers = append(integers, t.String())
		}
		own = append(own, o)
	}
	if len(integers) > 1 {
		return nil, fmt.Errorf("%w: the ids of %s are numbers, so that an event of one could be taken for another one's: let all but one of them "+
			"have an id column of type uuid, or none (leave out id; the event's position is its id then)", ErrTable, strings.Join(integers, " and of "))
	}
	for i := range own {
		own[i].MixesWithNumbers = len(integers) > 0 && !own[i].integerID
	}
	return own, nil
}

func inspect(ctx context.Context, db querier, t Table) (OwnTable, error) {
	o := OwnTable{Table: t}
	var found struct {
		Kind, Persistence string
		Owned             bool
		Owner             string
		Columns           []struct {
			Name, Type, Category string
			Generated            bool
		}
		Key []struct{ Name, Type string }
	}
	err := db.QueryRow(ctx, `SELECT jsonb_build_object('kind', c.relkind, 'persistence', c.relpersistence,
			'owned', pg_has_role(c.relowner, 'USAGE'), 'owner', pg_get_userbyid(c.relowner),
			'columns', (SELECT jsonb_agg(jsonb_build_object('name', a.attname, 'type', format_type(a.atttypid, a.atttypmod),
					'category', (SELECT typcategory FROM pg_type WHERE oid = a.atttypid), 'generated', a.attgenerated <> '') ORDER BY a.attnum)
				FROM pg_attribute a WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped),
			'key', (SELECT jsonb_agg(jsonb_build_object('name', a.attname, 'type', format_type(a.atttypid, a.atttypmod)) ORDER BY k.n)
				FROM pg_index i, unnest(i.indkey::int2[]) WITH ORDINALITY k(attnum, n) JOIN pg_attribute a ON true
				WHERE i.indrelid = c.oid AND i.indisprimary AND a.attrelid = c.oid AND a.attnum = k.attnum AND k.n <= i.indnkeyatts))
		FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE (n.nspname, c.relname) = ($1, $2)`, t.Schema, t.Name).Scan(&found)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return o, fmt.Errorf("%w: there is no table %s: create it, or mend buffers in the configuration", ErrTable, &t)
	case err != nil:
		return o, fmt.Errorf("look at table %s: %w", &t, withHint(err))
	case found.Kind != "r" && found.Kind != "p":
		return o, fmt.Errorf("%w: %s is no table whose changes are in the log, as a table or a partitioned one is", ErrTable, &t)
	case found.Persistence != "p":
		return o, fmt.Errorf("%w: %s is unlogged or temporary, so that its rows are not in the log: ALTER TABLE %s SET LOGGED", ErrTable, &t, t.ident())
	}
	o.owned = found.Owned
	category, generated := map[string]string{}, map[string]bool{}
	for _, c := range found.Columns {
		category[c.Name] = c.Category
		if generated[c.Name] = c.Generated; c.Generated {
			if slices.Contains(t.Columns, c.Name) {
				return o, fmt.Errorf("%w: column %q of %s is generated, and such ones are not sent: name another one", ErrTable, c.Name, &t)
			}
			continue
		}
		o.All = append(o.All, c.Name)
		if c.Name == t.ID {
			o.integerID = slices.Contains([]string{"smallint", "integer", "bigint"}, c.Type) || strings.HasPrefix(c.Type, "numeric")
		}
	}
	for _, k := range found.Key {
		o.Key, o.keyTypes = append(o.Key, k.Name), append(o.keyTypes, k.Type)
	}
	needed := t.Columns
	if t.Delivered == Mark {
		needed = append(slices.Clone(needed), t.Recorded)
	}
	for _, name := range needed {
		if category[name] == "" {
			return o, fmt.Errorf("%w: table %s has no column %q: mend its mapping in buffers", ErrTable, &t, name)
		}
	}
	if t.Delivered != Keep && len(o.Key) == 0 {
		return o, fmt.Errorf("%w: %s has no primary key, by which delivered rows are marked or deleted: add one, or write delivered: keep", ErrTable, &t)
	}
	for _, name := range o.Key {
		if t.Delivered != Keep && generated[name] {
			return o, fmt.Errorf("%w: column %q in the primary key of %s is generated, and such ones are not sent, so that delivered rows could not be found "+
				"again: have another primary key, or write delivered: keep", ErrTable, name, &t)
		}
	}
	if t.Delivered == Keep && t.StartAll && t.ID == "" && len(o.Key) == 0 {
		return o, fmt.Errorf("%w: %s has neither an id column nor a primary key, so that rows which are there already cannot be told apart "+
			"(start: all): add one, or write start: now", ErrTable, &t)
	}
	if t.Delivered == Mark {
		column := "t." + quoteIdent(t.Recorded)
		switch category[t.Recorded] {
		case "D":
			o.mark, o.unmarked = "clock_timestamp()", column+" IS NULL"
		case "B":
			o.mark, o.unmarked = "true", column+" IS NOT TRUE"
		default:
			return o, fmt.Errorf("%w: column %q of %s, which a mark sets, is to have a type of time or boolean", ErrTable, t.Recorded, &t)
		}
		if generated[t.Recorded] {
			return o, fmt.Errorf("%w: column %q of %s, which a mark sets, is generated: name another one", ErrTable, t.Recorded, &t)
		}
		if slices.Contains(o.Key, t.Recorded) {
			return o, fmt.Errorf("%w: column %q, which a mark sets, is in the primary key of %s", ErrTable, t.Recorded, &t)
		}
	}
	return o, nil
}

// read are the columns that are read from the table itself, by a recovery or for marking, or nil for all of them.
func (o *OwnTable) read() []string {
	if o.WholeRow {
		return nil
	}
	columns := append(slices.Clone(o.Columns), o.Key...)
	if o.Delivered == Mark {
		columns = append(columns, o.Recorded)
	}
	slices.Sort(columns)
	return slices.Compact(columns)
}

// touched reports whether a bridge reads or writes the table itself, and does not live by the slot alone.
func (o *OwnTable) touched() bool { return o.Delivered != Keep || o.StartAll }

// right is a privilege that a bridge needs on a table.
type right struct {
	privilege string
	columns   []string // nil means the whole table
}

func (r right) String() string {
	if r.columns == nil {
		return r.privilege
	}
	return r.privilege + " (" + quoteIdents(r.columns) + ")"
}

func (o *OwnTable) rights() []right {
	if !o.touched() {
		return nil
	}
	rights := []right{{"SELECT", o.read()}}
	switch o.Delivered {
	case Mark:
		rights = append(rights, right{"UPDATE", []string{o.Recorded}})
	case Delete:
		// Rows are locked before they are deleted, so as not to wait for those that others have locked. That takes the right to update some column.
		rights = append(rights, right{"DELETE", nil}, right{"UPDATE", o.Key[:1]})
	}
	return rights
}

// CheckRights returns ErrTable, with the GRANT that is missing, unless the role of the session may do with the tables what a bridge does.
func CheckRights(ctx context.Context, db querier, own []OwnTable) error {
	for i := range own {
		o := &own[i]
		if !o.touched() {
			continue
		}
		var ok bool
		if err := db.QueryRow(ctx, "SELECT has_schema_privilege($1, 'USAGE')", o.Schema).Scan(&ok); err != nil {
			return fmt.Errorf("look at the rights on schema %s: %w", o.Schema, withHint(err))
		}
		if !ok {
			return fmt.Errorf("%w: the bridge may not use schema %s: run ebb setup as its owner, or GRANT USAGE ON SCHEMA %s TO ebb_bridge", ErrTable,
				o.Schema, quoteIdent(o.Schema))
		}
		var hidden bool
		if err := db.QueryRow(ctx, "SELECT row_security_active(to_regclass($1))", o.ident()).Scan(&hidden); err != nil {
			return fmt.Errorf("look at the row security of table %s: %w", &o.Table, withHint(err))
		}
		if hidden {
			return fmt.Errorf("%w: the row security of %s may hide rows from the bridge: ALTER ROLE … BYPASSRLS for the role that ebb run logs in as", ErrTable, &o.Table)
		}
		for _, r := range o.rights() {
			columns := r.columns
			if columns == nil && r.privilege == "SELECT" {
				columns = o.All
			}
			err := db.QueryRow(ctx, `SELECT has_table_privilege(c.oid, $3) OR $4::text[] IS NOT NULL AND
					(SELECT bool_and(has_column_privilege(c.oid, a, $3)) FROM unnest($4::text[]) a)
				FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE (n.nspname, c.relname) = ($1, $2)`,
				o.Schema, o.Name, r.privilege, columns).Scan(&ok)
			if err != nil {
				return fmt.Errorf("look at the rights on table %s: %w", &o.Table, withHint(err))
			}
			if !ok {
				return fmt.Errorf("%w: the bridge has not the rights on %s that it needs: run ebb setup, or GRANT %s ON %s TO ebb_bridge", ErrTable,
					&o.Table, r, o.ident())
			}
		}
	}
	return nil
}

// Undelivered is a condition on a row t of the table, in SQL: those whose events a new slot would pass over. It is "" when there are none. Of
// a table that the slot has carried before, rows that are kept are told by nothing, so that none of them count.
func (o *OwnTable) Undelivered(started bool) string {
	switch {
	case o.Delivered == Mark:
		return o.unmarked
	case o.Delivered == Delete, o.StartAll && !started:
		return "true"
	}
	return ""
}

// AnyQuery is a statement that returns one row and column, t or f: whether the condition holds for any row.
func (o *OwnTable) AnyQuery(condition string) string {
	return fmt.Sprintf("SELECT EXISTS (SELECT FROM %s t WHERE %s)", o.ident(), condition)
}

// RowsQuery is a statement that returns the rows for which the condition holds, by primary key or else by id: first the columns of the
// primary key, then those of the mapping.
func (o *OwnTable) RowsQuery(condition string) string {
	columns, order := o.Columns, o.Key
	if o.WholeRow {
		columns = o.All
	}
	if len(order) == 0 {
		order = []string{o.ID}
	}
	return fmt.Sprintf("SELECT t.%s FROM %s t WHERE %s ORDER BY t.%s", strings.Join(quoted(slices.Concat(o.Key, columns)), ", t."), o.ident(), condition,
		strings.Join(quoted(order), ", t."))
}

// Started returns which of the tables the slot carries already.
func Started(ctx context.Context, db *pgx.Conn, slot string) (map[[2]string]bool, error) {
	rows, err := db.Query(ctx, "SELECT schema, name FROM ebb.own_table WHERE slot = $1 AND started_at IS NOT NULL", slot)
	if err != nil {
		return nil, fmt.Errorf("read which tables slot %q carries: %w", slot, withHint(err))
	}
	started := map[[2]string]bool{}
	var schema, name string
	if _, err := pgx.ForEachRow(rows, []any{&schema, &name}, func() error {
		started[[2]string{schema, name}] = true
		return nil
	}); err != nil {
		return nil, fmt.Errorf("read which tables slot %q carries: %w", slot, withHint(err))
	}
	return started, nil
}

// startTables is part of a statement that has a row slot, about own tables whose schemas and names are two parameters: their start has been.
const startTables = `started AS (
		INSERT INTO ebb.own_table AS o (slot, schema, name, started_at)
		SELECT slot.name, t.schema, t.name, clock_timestamp() FROM slot, unnest(%s::text[], %s::text[]) t(schema, name) WHERE %s
		ON CONFLICT (slot, schema, name) DO UPDATE SET started_at = coalesce(o.started_at, excluded.started_at))`

// names are the schemas and the names of tables, as two parameters.
func names[T any](tables []T, table func(*T) *Table) (schemas, names []string) {
	schemas, names = []string{}, []string{}
	for i := range tables {
		t := table(&tables[i])
		schemas, names = append(schemas, t.Schema), append(names, t.Name)
	}
	return schemas, names
}

func ownNames(own []OwnTable) (schemas, tables []string) {
	return names(own, func(o *OwnTable) *Table { return &o.Table })
}

func quoteIdents(names []string) string { return strings.Join(quoted(names), ", ") }

func quoted(names []string) []string {
	quoted := make([]string, len(names))
	for i, name := range names {
		quoted[i] = quoteIdent(name)
	}
	return quoted
}

// applyTables has the bridge carry the tables: rights, publication, and nothing put into a managed table that it does not carry.
func applyTables(ctx context.Context, tx pgx.Tx, s Setup) ([]string, error) {
	own, err := Inspect(ctx, tx, s.Tables)
	if err != nil {
		return nil, err
	}
	var done []string
	for i := range own {
		o := &own[i]
		if !o.owned {
			return nil, fmt.Errorf("%w: table %s belongs to another role, and only its owner can publish it: run ebb setup as the owner or as a superuser",
				ErrTable, &o.Table)
		}
		lines, err := o.apply(ctx, tx, s.Slot)
		if err != nil {
			return nil, err
		}
		done = append(done, lines...)
	}
	line, err := applyRefusal(ctx, tx, !HasManaged(s.Tables))
	if err != nil {
		return nil, err
	}
	if line != "" {
		done = append(done, line)
	}
	line, err = applyPublication(ctx, tx, s, own)
	if line != "" {
		done = append(done, strings.Split(line, "\n")...)
	}
	return done, err
}

// apply grants what a bridge needs, and refuses rows of a new table that a later recovery would deliver although the table is to start now.
func (o *OwnTable) apply(ctx context.Context, tx pgx.Tx, slot string) ([]string, error) {
	var done []string
	for _, r := range o.rights() {
		var has bool
		err := tx.QueryRow(ctx, `SELECT has_schema_privilege('ebb_bridge', $1, 'USAGE') AND (has_table_privilege('ebb_bridge', c.oid, $3)
				OR $4::text[] IS NOT NULL AND (SELECT bool_and(has_column_privilege('ebb_bridge', c.oid, a, $3)) FROM unnest($4::text[]) a))
			FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE (n.nspname, c.relname) = ($1, $2)`,
			o.Schema, o.Name, r.privilege, r.columns).Scan(&has)
		if err != nil {
			return nil, fmt.Errorf("look at the rights on table %s: %w", &o.Table, err)
		}
		if has {
			continue
		}
		for _, grant := range []string{fmt.Sprintf("GRANT USAGE ON SCHEMA %s TO ebb_bridge", quoteIdent(o.Schema)),
			fmt.Sprintf("GRANT %s ON %s TO ebb_bridge", r, o.ident())} {
			if _, err := tx.Exec(ctx, grant); err != nil {
				return nil, fmt.Errorf("%s: %w", grant, err)
			}
		}
		done = append(done, fmt.Sprintf("granted %s on %s to ebb_bridge", r, &o.Table))
	}
	noted, err := tx.Exec(ctx, "INSERT INTO ebb.own_table (slot, schema, name) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING", slot, o.Schema, o.Name)
	if err != nil {
		return nil, fmt.Errorf("note that %s is carried: %w", &o.Table, err)
	}
	if noted.RowsAffected() == 0 || o.StartAll || o.Delivered == Keep {
		return done, nil
	}
	var found bool
	if err := tx.QueryRow(ctx, o.AnyQuery(o.Undelivered(false))).Scan(&found); err != nil {
		return nil, fmt.Errorf("look for rows in %s: %w", &o.Table, err)
	}
	if found {
		mend := "mark them yourself before"
		if o.Delivered == Delete {
			mend = "delete them yourself before"
		}
		return nil, fmt.Errorf("%w: %s holds rows that are not delivered, and has start: now: write start: all to have them delivered, or %s",
			ErrTable, &o.Table, mend)
	}
	return done, nil
}

// applyRefusal lets nothing be put into the managed table while the bridge does not carry it, and returns a line when that has changed.
func applyRefusal(ctx context.Context, tx pgx.Tx, refuse bool) (string, error) {
	var is bool
	if err := tx.QueryRow(ctx, "SELECT EXISTS (SELECT FROM pg_trigger WHERE tgrelid = 'ebb.buffer'::regclass AND tgname = 'refuse_put')").
		Scan(&is); err != nil {
		return "", fmt.Errorf("look whether ebb.buffer is carried: %w", err)
	}
	switch {
	case is == refuse:
		return "", nil
	case !refuse:
		if _, err := tx.Exec(ctx, "DROP TRIGGER refuse_put ON ebb.buffer"); err != nil {
			return "", fmt.Errorf("carry ebb.buffer: %w", err)
		}
		return "ebb.buffer takes events", nil
	}
	if _, err := tx.Exec(ctx, "CREATE TRIGGER refuse_put BEFORE INSERT ON ebb.buffer EXECUTE FUNCTION ebb.refuse_put()"); err != nil {
		return "", fmt.Errorf("carry ebb.buffer no more: %w", err)
	}
	// The trigger has waited for those that were inserting.
	var backlog int64
	if err := tx.QueryRow(ctx, "SELECT count(*) FROM ebb.backlog").Scan(&backlog); err != nil {
		return "", fmt.Errorf("count the backlog of ebb.buffer: %w", err)
	}
	if backlog > 0 {
		return "", fmt.Errorf("%w: ebb.buffer is not among the buffers, and holds %d events that are not delivered: run the bridge with it until ebb.backlog "+
			"is empty, and take it out then", ErrTable, backlog)
	}
	return "ebb.buffer takes no more events, as it is not among the buffers", nil
}
