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
	finding, exists, err := inspectPublication(ctx, tx, name)
	if err != nil {
		return "", err
	}
	if !exists {
		if _, err := tx.Exec(ctx, createPublication(name, v)); err != nil {
			return "", fmt.Errorf("create publication %q: %w", name, err)
		}
		if _, err := tx.Exec(ctx, remakeSlots); err != nil {
			return "", fmt.Errorf("have the slots made anew: %w", err)
		}
		return "created publication " + name, nil
	}
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

// CheckPublication returns ErrPublication, with what is wrong and what to do, unless the publication publishes all inserts
// into the buffer.
func CheckPublication(ctx context.Context, db querier, name string) error {
	finding, exists, err := inspectPublication(ctx, db, name)
	switch {
	case err != nil:
		return err
	case !exists:
		return fmt.Errorf("publication %q: %w: it does not exist; run ebb setup", name, ErrPublication)
	case finding != "":
		return fmt.Errorf("publication %q: %w: %s; run ebb setup", name, ErrPublication, finding)
	}
	return nil
}

// inspectPublication says what keeps the publication from publishing every insert into the buffer, or "".
func inspectPublication(ctx context.Context, db querier, name string) (finding string, exists bool, err error) {
	v, err := serverVersion(ctx, db)
	if err != nil {
		return "", false, err
	}
	var insert, viaRoot bool
	err = db.QueryRow(ctx, "SELECT pubinsert, pubviaroot FROM pg_publication WHERE pubname = $1", name).Scan(&insert, &viaRoot)
	if errors.Is(err, pgx.ErrNoRows) {
		return "", false, nil
	}
	if err != nil {
		return "", false, fmt.Errorf("inspect publication %q: %w", name, err)
	}
	if !insert {
		return "it does not publish inserts", true, nil
	}
	if !viaRoot {
		return "it does not publish via the partition root", true, nil
	}
	details := "NULL::name[], NULL::text"
	if v >= columnListsSince {
		details = "attnames, rowfilter"
	}
	var columns []string
	var filter *string
	err = db.QueryRow(ctx, "SELECT "+details+" FROM pg_publication_tables WHERE pubname = $1 AND schemaname = 'ebb' AND tablename = 'buffer'",
		name).Scan(&columns, &filter)
	if errors.Is(err, pgx.ErrNoRows) {
		return "it does not hold table ebb.buffer", true, nil
	}
	if err != nil {
		return "", false, fmt.Errorf("inspect publication %q: %w", name, err)
	}
	if filter != nil {
		return "it has a row filter on ebb.buffer", true, nil
	}
	if v >= columnListsSince {
		for _, c := range bufferColumns {
			if !slices.Contains(columns, c) {
				return fmt.Sprintf("it lacks column %q of ebb.buffer", c), true, nil
			}
		}
	}
	return "", true, nil
}

func serverVersion(ctx context.Context, db querier) (int, error) {
	var v int
	if err := db.QueryRow(ctx, "SELECT current_setting('server_version_num')::int").Scan(&v); err != nil {
		return 0, fmt.Errorf("read the server's version: %w", err)
	}
	return v, nil
}
