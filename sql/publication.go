package sql

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
)

// ErrPublication says that the publication does not publish what the bridge needs. While it does not, the slot passes over
// rows without a word, so that nothing may be confirmed.
var ErrPublication = errors.New("the publication does not fit")

// bufferColumns are what the bridge reads of the managed buffer.
var bufferColumns = []string{"id", "topic", "key", "payload", "headers"}

// columnListsSince is the first server version (server_version_num) whose publications can name columns.
const columnListsSince = 150000

// createPublication names the columns of the managed table alone: Postgres refuses to change the type of a column that a publication names, and
// tables of one's own must be free to change.
func createPublication(name string, serverVersion int, managed bool, own []OwnTable) string {
	var tables []string
	if managed {
		tables = append(tables, publishedBuffer(serverVersion))
	}
	for i := range own {
		tables = append(tables, own[i].ident())
	}
	return fmt.Sprintf("CREATE PUBLICATION %s FOR TABLE %s WITH (publish = 'insert', publish_via_partition_root = true)",
		quoteIdent(name), strings.Join(tables, ", "))
}

func publishedBuffer(serverVersion int) string {
	if serverVersion < columnListsSince {
		return "ebb.buffer"
	}
	return "ebb.buffer (" + strings.Join(bufferColumns, ", ") + ")"
}

// applyPublication creates or mends the publication, and returns a line when it did. The slots that there are have then passed
// over rows, and will again when they are read from before the mending: so they are to be made anew.
func applyPublication(ctx context.Context, tx pgx.Tx, s Setup, own []OwnTable) (string, error) {
	v, err := serverVersion(ctx, tx)
	if err != nil {
		return "", err
	}
	name, managed := s.Publication, HasManaged(s.Tables)
	p, err := readPublication(ctx, tx, name, s.Tables)
	if err != nil {
		return "", err
	}
	if !p.Exists {
		if _, err := tx.Exec(ctx, createPublication(name, v, managed, own)); err != nil {
			return "", fmt.Errorf("create publication %q: %w", name, err)
		}
		if _, err := tx.Exec(ctx, remakeSlots); err != nil {
			return "", fmt.Errorf("have the slots made anew: %w", err)
		}
		return "created publication " + name, nil
	}
	given, err := giveUp(ctx, tx, s)
	if err != nil {
		return "", err
	}
	finding := p.finding()
	if finding == "" {
		return given, nil
	}
	schemas, tables := names(orManaged(s.Tables), func(t *Table) *Table { return t })
	var foreign []string
	if err := tx.QueryRow(ctx, `SELECT coalesce(array_agg(format('%s.%s', schemaname, tablename)), '{}') FROM pg_publication_tables
		WHERE pubname = $1 AND NOT (schemaname = 'ebb' AND tablename ~ '^buffer(_\d+)?$')
			AND NOT EXISTS (SELECT FROM unnest($2::text[], $3::text[]) t(schema, name)
				LEFT JOIN pg_inherits i ON i.inhparent = to_regclass(format('%I.%I', t.schema, t.name))
				WHERE to_regclass(format('%I.%I', schemaname, tablename)) IN (i.inhrelid, to_regclass(format('%I.%I', t.schema, t.name))))`,
		name, schemas, tables).Scan(&foreign); err != nil {
		return "", fmt.Errorf("inspect publication %q: %w", name, err)
	}
	if len(foreign) > 0 {
		return "", fmt.Errorf("publication %q: %w: it publishes %s; choose another name for the publication setting", name, ErrPublication,
			strings.Join(foreign, ", "))
	}
	if managed {
		if err := checkColumns(ctx, tx); err != nil {
			return "", fmt.Errorf("mend publication %q: %w", name, err)
		}
	}
	statements := []string{fmt.Sprintf("ALTER PUBLICATION %s SET (publish = 'insert', publish_via_partition_root = true)", quoteIdent(name))}
	create := createPublication(name, v, managed, own)
	create = create[strings.Index(create, " FOR TABLE ")+len(" FOR TABLE ") : strings.LastIndex(create, " WITH (")]
	statements = append(statements, fmt.Sprintf("ALTER PUBLICATION %s SET TABLE %s", quoteIdent(name), create), remakeSlots)
	for _, st := range statements {
		if _, err := tx.Exec(ctx, st); err != nil {
			return "", fmt.Errorf("mend publication %q: %w", name, err)
		}
	}
	mended := fmt.Sprintf("mended publication %s (%s)", name, finding)
	if given != "" {
		mended = given + "\n" + mended
	}
	return mended, nil
}

// giveUp takes tables out of the publication that the slot carried and that are no buffers any more. A slot that passes them over is no
// worse for that.
func giveUp(ctx context.Context, tx pgx.Tx, s Setup) (string, error) {
	schemas, tables := names(orManaged(s.Tables), func(t *Table) *Table { return t })
	rows, err := tx.Query(ctx, `DELETE FROM ebb.own_table o WHERE slot = $1
			AND NOT EXISTS (SELECT FROM unnest($2::text[], $3::text[]) t(schema, name) WHERE (t.schema, t.name) = (o.schema, o.name))
		RETURNING format('%I.%I', schema, name), EXISTS (SELECT FROM pg_publication_tables p
			WHERE (p.pubname, p.schemaname, p.tablename) = ($4, o.schema, o.name)), to_regclass(format('%I.%I', schema, name)) IS NOT NULL`, s.Slot, schemas, tables, s.Publication)
	if err != nil {
		return "", fmt.Errorf("give up tables: %w", err)
	}
	var lines, published []string
	var name string
	var is bool
	var exists bool
	var revoke []string
	if _, err := pgx.ForEachRow(rows, []any{&name, &is, &exists}, func() error {
		if exists {
			revoke = append(revoke, name)
		}
		lines = append(lines, "gave up table "+name+", which is no buffer any more")
		if is {
			published = append(published, name)
		}
		return nil
	}); err != nil {
		return "", fmt.Errorf("give up tables: %w", err)
	}
	for _, table := range revoke {
		if _, err := tx.Exec(ctx, "REVOKE ALL ON "+table+" FROM ebb_bridge"); err != nil {
			return "", fmt.Errorf("give up table %s: %w", table, err)
		}
		// Or what is inserted would go on being refused, by the lag of a slot that does not carry it.
		if _, err := tx.Exec(ctx, "SELECT ebb.limit_inserts(false, $1::text::regclass)", table); err != nil {
			return "", fmt.Errorf("give up table %s: %w", table, err)
		}
	}
	if !HasManaged(s.Tables) {
		var is bool
		if err := tx.QueryRow(ctx, `SELECT EXISTS (SELECT FROM pg_publication_tables WHERE (pubname, schemaname, tablename) = ($1, 'ebb', 'buffer'))`,
			s.Publication).Scan(&is); err != nil {
			return "", fmt.Errorf("give up tables: %w", err)
		}
		if is {
			lines = append(lines, "gave up table ebb.buffer, which is no buffer any more")
			published = append(published, "ebb.buffer")
		}
	}
	if len(published) > 0 {
		// All at once: a publication of no table at all would be one for a moment.
		if _, err := tx.Exec(ctx, fmt.Sprintf("ALTER PUBLICATION %s DROP TABLE %s", quoteIdent(s.Publication), strings.Join(published, ", "))); err != nil {
			return "", fmt.Errorf("take tables out of publication %q: %w", s.Publication, err)
		}
	}
	return strings.Join(lines, "\n"), nil
}

// checkColumns says which columns of the buffer somebody has dropped.
func checkColumns(ctx context.Context, tx pgx.Tx) error {
	var missing []string
	if err := tx.QueryRow(ctx, `SELECT ARRAY(SELECT c FROM unnest($1::text[]) c
		WHERE NOT EXISTS (SELECT FROM pg_attribute WHERE attrelid = 'ebb.buffer'::regclass AND attname = c AND NOT attisdropped))`,
		bufferColumns).Scan(&missing); err != nil {
		return fmt.Errorf("look at the columns of ebb.buffer: %w", err)
	}
	if len(missing) > 0 {
		return fmt.Errorf("%w: table ebb.buffer has no column %s: ALTER TABLE ebb.buffer ADD COLUMN …, of the type that ebb setup --print shows",
			ErrPublication, strings.Join(missing, ", "))
	}
	return nil
}

// Publication is what the server says of a publication.
type Publication struct {
	name   string
	tables []Table
	// Mark changes with every change of the publication: of its options, and of the entries of the tables in it.
	Mark   string
	Exists bool
	Insert bool
	// ViaRoot says that rows of partitions are published as the partitioned table's.
	ViaRoot bool
	// entries are what is published of each of the tables.
	entries []entry
}

// entry is what is published of a table.
type entry struct {
	Mark string `json:"mark"`
	// Listed says that the columns are named in the publication.
	Listed bool `json:"listed"`
	// Table is the row of pg_publication_tables, or nil. Before Postgres 15 it has no columns and no filter.
	Table *struct {
		Columns []string `json:"attnames"`
		Filter  *string  `json:"rowfilter"`
	} `json:"table"`
}

// publicationJSON is the publication whose name is parameter $1, with the tables whose schemas and names are $2 and $3, as an expression. The
// marks are made of the ids of the catalog's rows and of the transactions that wrote them, which do not come again.
const publicationJSON = `(SELECT jsonb_build_object('exists', p.oid IS NOT NULL, 'insert', p.pubinsert, 'via_root', p.pubviaroot,
		'mark', concat_ws('/', p.oid, p.xmin),
		'entries', (SELECT jsonb_agg(jsonb_build_object('mark', concat_ws('/', r.oid, r.xmin),
				'listed', coalesce(to_jsonb(r)->>'prattrs', '') <> '',
				'table', (SELECT to_jsonb(t) FROM pg_publication_tables t
					WHERE t.pubname = p.pubname AND t.schemaname = w.schema AND t.tablename = w.name)) ORDER BY w.n)
			FROM unnest($2::text[], $3::text[]) WITH ORDINALITY w(schema, name, n)
			LEFT JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = to_regclass(format('%I.%I', w.schema, w.name))))
	FROM (SELECT) one LEFT JOIN pg_publication p ON p.pubname = $1)`

// publicationArgs are the parameters of publicationJSON.
func publicationArgs(name string, tables []Table) []any {
	schemas, names := names(orManaged(tables), func(t *Table) *Table { return t })
	return []any{name, schemas, names}
}

// parsePublication reads what publicationJSON has returned.
func parsePublication(name string, tables []Table, data []byte) (Publication, error) {
	p := Publication{name: name, tables: orManaged(tables)}
	var raw struct {
		Mark    string  `json:"mark"`
		Exists  bool    `json:"exists"`
		Insert  bool    `json:"insert"`
		ViaRoot bool    `json:"via_root"`
		Entries []entry `json:"entries"`
	}
	if err := json.Unmarshal(data, &raw); err != nil {
		return Publication{}, fmt.Errorf("inspect publication %q: %w", name, err)
	}
	if len(raw.Entries) != len(p.tables) {
		return Publication{}, fmt.Errorf("inspect publication %q: %d tables were looked for, and %d came back", name, len(p.tables), len(raw.Entries))
	}
	p.Exists, p.Insert, p.ViaRoot, p.entries = raw.Exists, raw.Insert, raw.ViaRoot, raw.Entries
	var marks []string
	for _, e := range p.entries {
		marks = append(marks, strings.Trim(raw.Mark+"/"+e.Mark, "/"))
	}
	slices.Sort(marks)
	p.Mark = strings.Join(marks, " ")
	return p, nil
}

// SamePublication reports whether a publication is still, for all tables that it is needed for now, what it was when a mark was taken. Tables
// that were given up meanwhile do not matter.
func SamePublication(was, now string) bool {
	before := strings.Fields(was)
	for _, mark := range strings.Fields(now) {
		if !slices.Contains(before, mark) {
			return false
		}
	}
	return now != ""
}

// readPublication returns what the server says of a publication, which may be that it does not exist.
func readPublication(ctx context.Context, db querier, name string, tables []Table) (Publication, error) {
	var data []byte
	if err := db.QueryRow(ctx, "SELECT "+publicationJSON, publicationArgs(name, tables)...).Scan(&data); err != nil {
		return Publication{}, fmt.Errorf("inspect publication %q: %w", name, withHint(err))
	}
	return parsePublication(name, tables, data)
}

// CheckPublication returns what the server says of a publication of the tables, none of which stand for the managed one, and ErrPublication as
// Check does.
func CheckPublication(ctx context.Context, db querier, name string, tables ...Table) (Publication, error) {
	p, err := readPublication(ctx, db, name, tables)
	if err != nil {
		return Publication{}, err
	}
	return p, p.Check()
}

// Check returns ErrPublication, with what is wrong and what to do, unless the publication publishes all inserts into its tables.
func (p *Publication) Check() error {
	if finding := p.finding(); finding != "" {
		return fmt.Errorf("publication %q: %w: %s; run ebb setup", p.name, ErrPublication, finding)
	}
	return nil
}

// finding says what keeps the publication from publishing every insert into its tables, or "".
func (p *Publication) finding() string {
	switch {
	case !p.Exists:
		return "it does not exist"
	case !p.Insert:
		return "it does not publish inserts"
	case !p.ViaRoot:
		return "it does not publish via the partition root"
	}
	for i, e := range p.entries {
		t := &p.tables[i]
		switch {
		case e.Table == nil:
			return "it does not hold table " + t.String()
		case e.Table.Filter != nil:
			return "it has a row filter on " + t.String()
		case e.Table.Columns == nil:
			continue // of a version that has no column lists
		case t.WholeRow && e.Listed:
			return "it names columns of " + t.String() + ", whose rows are wanted whole"
		}
		for _, c := range t.Columns {
			if !slices.Contains(e.Table.Columns, c) {
				return fmt.Sprintf("it lacks column %q of %s", c, t)
			}
		}
	}
	return ""
}

func serverVersion(ctx context.Context, db querier) (int, error) {
	var v int
	if err := db.QueryRow(ctx, "SELECT current_setting('server_version_num')::int").Scan(&v); err != nil {
		return 0, fmt.Errorf("read the server's version: %w", err)
	}
	return v, nil
}
