package sql

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// ErrMark says that delivered rows cannot be marked or deleted, and that waiting does not mend it.
var ErrMark = errors.New("delivered rows cannot be recorded")

// markLockTimeout bounds how long a lock on a whole table is waited for. Rows that others have locked are not waited for at all.
const markLockTimeout = "1s"

// ConnectMarker opens a connection for marking.
func ConnectMarker(ctx context.Context, url, name string) (*pgx.Conn, error) {
	db, err := Connect(ctx, url, name)
	if err != nil {
		return nil, err
	}
	// A row that a policy hides would count as one that is gone.
	if _, err := db.Exec(ctx, "SET lock_timeout = '"+markLockTimeout+"'; SET row_security = off"); err != nil {
		return nil, errors.Join(fmt.Errorf("set up the session that marks rows: %w", err), db.Close(ctx))
	}
	return db, nil
}

// Marker marks or deletes the rows of delivered events.
type Marker struct {
	table     Table
	statement string
	columns   int
}

// Marker returns what marks or deletes rows of the table, or nil if they are kept.
func (o *OwnTable) Marker() *Marker {
	if o.Delivered == Keep {
		return nil
	}
	arrays, columns, values := []string{"$1::bigint[]"}, []string{"x"}, []string{"u.x"}
	var match []string
	for i, key := range o.Key {
		arrays = append(arrays, fmt.Sprintf("$%d::text[]", i+2))
		columns = append(columns, fmt.Sprintf("c%d", i))
		values = append(values, fmt.Sprintf("u.c%[1]d::%[2]s AS c%[1]d", i, o.keyTypes[i]))
		match = append(match, fmt.Sprintf("t.%s = k.c%d", quoteIdent(key), i))
	}
	on, condition := strings.Join(match, " AND "), "true"
	record := fmt.Sprintf("DELETE FROM %s t USING due JOIN k USING (n) WHERE %s", o.ident(), on)
	if o.Delivered == Mark {
		condition = o.unmarked
		record = fmt.Sprintf("UPDATE %s t SET %s = %s FROM due JOIN k USING (n) WHERE %s", o.ident(), quoteIdent(o.Recorded), o.mark, on)
	}
	// The last query sees the rows as they were before the statement: what is there and was not taken, somebody else has locked. What is not there
	// may be of a transaction that is decoded already and that no query sees yet.
	return &Marker{table: o.Table, columns: len(o.Key), statement: fmt.Sprintf(`WITH k AS MATERIALIZED (
			SELECT %[7]s, u.n FROM unnest(%[1]s) WITH ORDINALITY u(%[2]s, n)
		), due AS MATERIALIZED (
			SELECT k.n FROM k JOIN %[3]s t ON %[4]s WHERE %[5]s FOR UPDATE OF t SKIP LOCKED
		), record AS (%[6]s)
		SELECT k.n FROM k JOIN %[3]s t ON %[4]s WHERE %[5]s AND NOT EXISTS (SELECT FROM due WHERE due.n = k.n)
		UNION
		SELECT k.n FROM k, LATERAL (SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint) s(xmax), LATERAL (SELECT (s.xmax - k.x) & 4294967295) d(age)
		WHERE k.x <> 0 AND NOT pg_visible_in_snapshot((s.xmax - d.age + CASE WHEN d.age < 2147483648 THEN 0 ELSE 4294967296 END)::text::xid8,
			pg_current_snapshot())
		ORDER BY n`,
		strings.Join(arrays, ", "), strings.Join(columns, ", "), o.ident(), on, condition, record, strings.Join(values, ", "))}
}

// Mark marks or deletes the rows with the given keys: for each column of the primary key, the text of its values. A row that is gone, or is
// marked already, is done. The xids are those of the rows' transactions, without the epoch, or 0. It returns the numbers of those that somebody
// else has locked, or that cannot be seen yet. The error wraps [ErrMark] if it would be the same again.
func (m *Marker) Mark(ctx context.Context, db *pgx.Conn, keys [][]string, xids []int64) ([]int, error) {
	if len(keys) != m.columns || m.columns == 0 {
		return nil, fmt.Errorf("mark rows of %s: %d columns for a primary key of %d", &m.table, len(keys), m.columns)
	}
	args := []any{xids}
	for i := range keys {
		args = append(args, keys[i])
	}
	rows, err := db.Query(ctx, m.statement, args...)
	var locked []int64
	if err == nil {
		locked, err = pgx.CollectRows(rows, pgx.RowTo[int64])
	}
	numbers := make([]int, 0, len(locked))
	for _, n := range locked {
		numbers = append(numbers, int(n-1))
	}
	if err == nil {
		return numbers, nil
	}
	var pg *pgconn.PgError
	if errors.As(err, &pg) {
		switch {
		case pg.Code == "55P03", pg.Code == "40P01": // lock_not_available, deadlock_detected
			for i := range keys[0] {
				numbers = append(numbers, i)
			}
			return numbers, nil
		case pg.Code == "42501": // insufficient_privilege
			err = fmt.Errorf("%w: %w; run ebb setup, which grants what is needed", ErrMark, err)
		case tableChanged(pg.Code):
			// The table is looked at again by the next attempt. What a server says of a statement for good must not be in the chain.
			return nil, fmt.Errorf("%s delivered rows of %s, which has changed: %s (SQLSTATE %s)", m.verb(), &m.table, pg.Message, pg.Code)
		case permanentMark(pg.Code):
			err = fmt.Errorf("%w: %w", ErrMark, err)
		}
	}
	return nil, fmt.Errorf("%s delivered rows of %s: %w", m.verb(), &m.table, err)
}

func (m *Marker) verb() string {
	if m.table.Delivered == Delete {
		return "delete"
	}
	return "mark"
}

// tableChanged reports whether a statement may have failed because the table is not what it was when the statement was made.
func tableChanged(code string) bool {
	switch code {
	case "42703", "42P01", "42883", "42804", "42846", "22P02", "22007": // undefined column, table and function; other types; unreadable values
		return true
	}
	return false
}

// permanentMark reports whether a statement would fail again: because of the table, of what is in it, or of a trigger.
func permanentMark(code string) bool {
	for _, class := range []string{"0A", "21", "22", "23", "38", "39", "42", "44", "P0"} {
		if strings.HasPrefix(code, class) {
			return true
		}
	}
	return false
}
