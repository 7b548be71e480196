package sql

import (
	"context"
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

func createPublication(name string, serverVersion int) string {
	return fmt.Sprintf("CREATE PUBLICATION %s FOR TABLE %s WITH (publish = 'insert', publish_via_partition_root = true)",
		quoteIdent(name), publishedBuffer(serverVersion))
}

func publishedBuffer(serverVersion int) string {
	if serverVersion < columnListsSince {
		return "ebb.buffer"
	}
	return "ebb.buffer (" + strings.Join(bufferColumns, ", ") + ")"
}

// applyPublication creates or mends the publication, and returns a line when it did. The slots that there are have then passed
// over rows, and will again when they are read from before the mending: so they are to be made anew.
func applyPublication(ctx context.Context, tx pgx.Tx, name string) (string, error) {
	v, err := serverVersion(ctx, tx)
	if err != nil {
		return "", err
	}
	p, err := readPublication(ctx, tx, name)
	if err != nil {
		return "", err
	}
	if !p.Exists {
		if _, err := tx.Exec(ctx, createPublication(name, v)); err != nil {
			return "", fmt.Errorf("create publication %q: %w", name, err)
		}
		if _, err := tx.Exec(ctx, remakeSlots); err != nil {
			return "", fmt.Errorf("have the slots made anew: %w", err)
		}
		return "created publication " + name, nil
	}
	finding := p.finding()
	if finding == "" {
		return "", nil
	}
	var foreign []string
	if err := tx.QueryRow(ctx, `SELECT coalesce(array_agg(format('%s.%s', schemaname, tablename)), '{}') FROM pg_publication_tables
		WHERE pubname = $1 AND (schemaname, tablename) <> ('ebb', 'buffer') AND NOT (schemaname = 'ebb' AND tablename ~ '^buffer_\d+$')`,
		name).Scan(&foreign); err != nil {
		return "", fmt.Errorf("inspect publication %q: %w", name, err)
	}
	if len(foreign) > 0 {
		return "", fmt.Errorf("publication %q: %w: it publishes %s; choose another name for the publication setting", name, ErrPublication,
			strings.Join(foreign, ", "))
	}
	if err := checkColumns(ctx, tx); err != nil {
		return "", fmt.Errorf("mend publication %q: %w", name, err)
	}
	for _, st := range []string{
		fmt.Sprintf("ALTER PUBLICATION %s SET (publish = 'insert', publish_via_partition_root = true)", quoteIdent(name)),
		fmt.Sprintf("ALTER PUBLICATION %s SET TABLE %s", quoteIdent(name), publishedBuffer(v)),
		remakeSlots,
	} {
		if _, err := tx.Exec(ctx, st); err != nil {
			return "", fmt.Errorf("mend publication %q: %w", name, err)
		}
	}
	return fmt.Sprintf("mended publication %s (%s)", name, finding), nil
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
	name string
	// Mark changes with every change of the publication: of its options, and of the entry of the buffer in it.
	Mark   string `json:"mark"`
	Exists bool   `json:"exists"`
	Insert bool   `json:"insert"`
	// ViaRoot says that rows of partitions are published as the partitioned table's.
	ViaRoot bool `json:"via_root"`
	// Buffer is the row of pg_publication_tables, or nil. Before Postgres 15 it has no columns and no filter.
	Buffer *struct {
		Columns []string `json:"attnames"`
		Filter  *string  `json:"rowfilter"`
	} `json:"buffer"`
}

// publicationJSON is the Publication whose name is parameter $1, as an expression. The mark is made of the ids of the catalog's rows and
// of the transactions that wrote them, which do not come again.
const publicationJSON = `(SELECT jsonb_build_object('exists', p.oid IS NOT NULL, 'insert', p.pubinsert, 'via_root', p.pubviaroot,
		'mark', concat_ws('/', p.oid, p.xmin, r.oid, r.xmin),
		'buffer', (SELECT to_jsonb(t) FROM pg_publication_tables t WHERE t.pubname = p.pubname AND t.schemaname = 'ebb' AND t.tablename = 'buffer'))
	FROM (SELECT) one LEFT JOIN pg_publication p ON p.pubname = $1
	LEFT JOIN pg_publication_rel r ON r.prpubid = p.oid AND r.prrelid = to_regclass('ebb.buffer'))`

// readPublication returns what the server says of a publication, which may be that it does not exist.
func readPublication(ctx context.Context, db querier, name string) (Publication, error) {
	var p Publication
	err := db.QueryRow(ctx, "SELECT "+publicationJSON, name).Scan(&p)
	if err != nil {
		return Publication{}, fmt.Errorf("inspect publication %q: %w", name, withHint(err))
	}
	p.name = name
	return p, nil
}

// CheckPublication returns what the server says of a publication, and ErrPublication as Check does.
func CheckPublication(ctx context.Context, db querier, name string) (Publication, error) {
	p, err := readPublication(ctx, db, name)
	if err != nil {
		return Publication{}, err
	}
	return p, p.Check()
}

// Check returns ErrPublication, with what is wrong and what to do, unless the publication publishes all inserts into the buffer.
func (p *Publication) Check() error {
	if finding := p.finding(); finding != "" {
		return fmt.Errorf("publication %q: %w: %s; run ebb setup", p.name, ErrPublication, finding)
	}
	return nil
}

// finding says what keeps the publication from publishing every insert into the buffer, or "".
func (p *Publication) finding() string {
	switch {
	case !p.Exists:
		return "it does not exist"
	case !p.Insert:
		return "it does not publish inserts"
	case !p.ViaRoot:
		return "it does not publish via the partition root"
	case p.Buffer == nil:
		return "it does not hold table ebb.buffer"
	case p.Buffer.Filter != nil:
		return "it has a row filter on ebb.buffer"
	case p.Buffer.Columns == nil:
		return "" // of a version that has no column lists
	}
	for _, c := range bufferColumns {
		if !slices.Contains(p.Buffer.Columns, c) {
			return fmt.Sprintf("it lacks column %q of ebb.buffer", c)
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
