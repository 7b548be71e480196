// Package replication owns the connection that speaks Postgres's streaming replication protocol.
//
// Source of the rules here: https://www.postgresql.org/docs/current/protocol-replication.html
package replication

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"ebb/event"
	"ebb/internal/session"
)

// Plugin is the output plugin of every slot that ebb makes.
const Plugin = "pgoutput"

// failoverSince is the first major version that can synchronize logical slots to standbys.
const failoverSince = 17

// closeTimeout bounds a polite goodbye; a server that does not answer by then is left to notice by itself.
const closeTimeout = 2 * time.Second

// Conn is a replication connection that is not streaming yet. It is used by one goroutine.
type Conn struct {
	pg *pgconn.PgConn
	// snapshot says that the connection is in the transaction of a slot that it has made.
	snapshot bool
}

// System identifies the database cluster behind a connection.
type System struct {
	// ID stays the same for the life of a cluster and its physical copies; initdb draws a new one.
	ID       string
	Timeline int32
	Database string
}

// Connect opens a replication connection to the database of a libpq URL or DSN. The name is how the connection calls itself
// (application_name), by which the server knows it as a standby.
func Connect(ctx context.Context, url, name string) (*Conn, error) {
	cfg, err := pgconn.ParseConfig(url)
	if err != nil {
		return nil, fmt.Errorf("postgres: %w", err)
	}
	cfg.RuntimeParams["replication"] = "database"
	session.Configure(cfg, name)
	pg, err := pgconn.ConnectConfig(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("open the replication connection: %w", withHint(err))
	}
	return &Conn{pg: pg}, nil
}

// Close ends the connection.
func (c *Conn) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	err := c.pg.Close(ctx)
	// After a cancelled command it is closed in the background.
	select {
	case <-c.pg.CleanupDone():
	case <-ctx.Done():
	}
	return err
}

// Identify asks the server which cluster and timeline it is.
func (c *Conn) Identify(ctx context.Context) (System, error) {
	sys, err := pglogrepl.IdentifySystem(ctx, c.pg)
	if err != nil {
		return System{}, fmt.Errorf("identify system: %w", err)
	}
	return System{ID: sys.SystemID, Timeline: sys.Timeline, Database: sys.DBName}, nil
}

// SharesServer reports whether the connection is to the server on which a session with that process id holds an advisory lock. A list of
// hosts may lead two connections to two servers that both take themselves for the primary.
func (c *Conn) SharesServer(ctx context.Context, pid uint32) (bool, error) {
	held, err := c.exec(ctx, fmt.Sprintf("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND granted AND pid = %d", pid))
	if err != nil {
		return false, fmt.Errorf("compare the servers of two connections: %w", err)
	}
	return held != "0", nil
}

// Switch is the end of a timeline in a server's history: everything before LSN is in the timelines after it as well.
type Switch struct {
	Timeline int32
	LSN      event.LSN
}

// History returns where the timelines before one ended, in order. The first one has no history.
// Source: https://www.postgresql.org/docs/current/protocol-replication.html#PROTOCOL-REPLICATION-TIMELINE-HISTORY
func (c *Conn) History(ctx context.Context, timeline int32) ([]Switch, error) {
	if timeline == 1 {
		return nil, nil
	}
	h, err := pglogrepl.TimelineHistory(ctx, c.pg, timeline)
	if err != nil {
		return nil, fmt.Errorf("read the history of timeline %d: %w", timeline, err)
	}
	switches, err := parseHistory(string(h.Content))
	if err != nil {
		return nil, fmt.Errorf("read the history of timeline %d: %w", timeline, err)
	}
	return switches, nil
}

// parseHistory reads a timeline history file: a line for each earlier timeline, with its number and the LSN at which it was left.
func parseHistory(content string) ([]Switch, error) {
	var switches []Switch
	for line := range strings.Lines(content) {
		line, _, _ = strings.Cut(line, "#")
		fields := strings.Fields(line)
		if len(fields) == 0 {
			continue
		}
		if len(fields) < 2 {
			return nil, fmt.Errorf("line %q: want a timeline and an LSN", line)
		}
		timeline, err := strconv.ParseInt(fields[0], 10, 32)
		if err != nil {
			return nil, fmt.Errorf("line %q: %w", line, err)
		}
		lsn, err := event.ParseLSN(fields[1])
		if err != nil {
			return nil, fmt.Errorf("line %q: %w", line, err)
		}
		switches = append(switches, Switch{Timeline: int32(timeline), LSN: lsn})
	}
	return switches, nil
}

// NewSlot is what is known at the moment in which a slot is created.
type NewSlot struct {
	// Snapshot, in the text form of type pg_snapshot, sees exactly the transactions that the slot will not stream.
	Snapshot string
	// ConsistentPoint is where the slot starts.
	ConsistentPoint event.LSN
}

// CreateSlot creates a logical slot. When anything goes wrong after the slot exists, it is dropped again.
//
// The server waits for every transaction that is writing now to end; ctx bounds that.
func (c *Conn) CreateSlot(ctx context.Context, name string) (NewSlot, error) {
	slot, err := c.CreateSlotInSnapshot(ctx, name)
	if err != nil {
		return NewSlot{}, err
	}
	if err := c.EndSnapshot(ctx); err != nil {
		return NewSlot{}, errors.Join(fmt.Errorf("create slot %q: %w", name, err), c.abandonSlot(name))
	}
	return slot, nil
}

// CreateSlotInSnapshot does what [Conn.CreateSlot] does, and leaves the connection in a transaction whose queries see what the slot's snapshot
// sees, until [Conn.EndSnapshot]. Meanwhile the server removes no row that they see.
func (c *Conn) CreateSlotInSnapshot(ctx context.Context, name string) (_ NewSlot, err error) {
	create := pglogrepl.CreateReplicationSlotOptions{SnapshotAction: "USE_SNAPSHOT", Mode: pglogrepl.LogicalReplication}
	major, err := c.major(ctx)
	if err != nil {
		return NewSlot{}, fmt.Errorf("create slot %q: %w", name, err)
	}
	// Newer minor releases want the transaction to be read-only, so that nothing can be recorded in it.
	if _, err := c.exec(ctx, "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"); err != nil {
		return NewSlot{}, fmt.Errorf("create slot %q: %w", name, err)
	}
	var res pglogrepl.CreateReplicationSlotResult
	if major >= failoverSince {
		// A standby that synchronizes slots (sync_replication_slots) then has it when it is promoted.
		res, err = pglogrepl.ParseCreateReplicationSlot(c.pg.Exec(ctx, fmt.Sprintf("CREATE_REPLICATION_SLOT %s LOGICAL %s (SNAPSHOT 'use', FAILOVER true)",
			quoteIdent(name), Plugin)))
	} else {
		res, err = pglogrepl.CreateReplicationSlot(ctx, c.pg, quoteIdent(name), Plugin, create)
	}
	if err != nil {
		return NewSlot{}, fmt.Errorf("create slot %q: %w", name, withHint(err))
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.abandonSlot(name))
		}
	}()
	slot := NewSlot{}
	if slot.ConsistentPoint, err = event.ParseLSN(res.ConsistentPoint); err != nil {
		return NewSlot{}, fmt.Errorf("create slot %q: consistent point: %w", name, err)
	}
	if slot.Snapshot, err = c.exec(ctx, "SELECT pg_current_snapshot()"); err != nil {
		return NewSlot{}, fmt.Errorf("create slot %q: read its snapshot: %w", name, err)
	}
	if slot.Snapshot, err = inOrder(slot.Snapshot); err != nil {
		return NewSlot{}, fmt.Errorf("create slot %q: %w", name, err)
	}
	// Neither limits on the time of an ordinary transaction, nor a policy that hides rows, may apply to what is read in it.
	if _, err := c.exec(ctx, `SELECT set_config(name, CASE name WHEN 'row_security' THEN 'off' ELSE '0' END, true) FROM pg_settings
		WHERE name IN ('row_security', 'statement_timeout', 'idle_in_transaction_session_timeout', 'transaction_timeout')`); err != nil {
		return NewSlot{}, fmt.Errorf("create slot %q: set up its transaction: %w", name, err)
	}
	c.snapshot = true
	return slot, nil
}

// major returns the server's major version.
func (c *Conn) major(ctx context.Context) (int, error) {
	version, err := c.exec(ctx, "SELECT current_setting('server_version_num')::int / 10000")
	if err != nil {
		return 0, fmt.Errorf("read the server's version: %w", err)
	}
	major, err := strconv.Atoi(version)
	if err != nil {
		return 0, fmt.Errorf("read the server's version: %w", err)
	}
	return major, nil
}

// AbandonSlot drops a slot that the connection has just made, in whatever state its transaction is.
func (c *Conn) AbandonSlot(name string) error { return c.abandonSlot(name) }

// HasSnapshot reports whether the connection is in the transaction of a slot that it has made.
func (c *Conn) HasSnapshot() bool { return c.snapshot }

// EndSnapshot ends the transaction of a slot that the connection has made, if it is in one.
func (c *Conn) EndSnapshot(ctx context.Context) error {
	if !c.snapshot {
		return nil
	}
	c.snapshot = false
	if _, err := c.exec(ctx, "COMMIT"); err != nil {
		return fmt.Errorf("end the slot's snapshot: %w", err)
	}
	return nil
}

// Column is one that a query has returned.
type Column struct {
	Name string
	// Type is its OID, of a domain that of its base type.
	Type uint32
}

// Holds runs a query that returns one boolean, as the connection's snapshot sees it.
func (c *Conn) Holds(ctx context.Context, query string) (bool, error) {
	text, err := c.exec(ctx, query)
	if err != nil {
		return false, err
	}
	return text == "t", nil
}

// Rows calls page with the rows of a query, in text format and as the connection's snapshot sees them, some at a time: about size bytes of
// them. What page is given is its own. An error of page ends the query.
func (c *Conn) Rows(ctx context.Context, query string, size int, page func(columns []Column, rows [][][]byte) error) error {
	const most = 1000
	// A cursor, because a server whose client takes nothing for a while gives it up (tcp_user_timeout).
	if _, err := c.exec(ctx, "DECLARE ebb_rows NO SCROLL CURSOR FOR "+query); err != nil {
		return err
	}
	for count := 1; ; {
		results, err := c.pg.Exec(ctx, fmt.Sprintf("FETCH %d FROM ebb_rows", count)).ReadAll()
		if err != nil {
			return err
		}
		if len(results) != 1 {
			return fmt.Errorf("%d results for one query", len(results))
		}
		r := results[0]
		if len(r.Rows) == 0 {
			_, err := c.exec(ctx, "CLOSE ebb_rows")
			return err
		}
		columns := make([]Column, len(r.FieldDescriptions))
		for i, f := range r.FieldDescriptions {
			columns[i] = Column{f.Name, f.DataTypeOID}
		}
		got := 1
		for _, row := range r.Rows {
			for _, v := range row {
				got += len(v)
			}
		}
		if err := page(columns, r.Rows); err != nil {
			_, closeErr := c.exec(ctx, "CLOSE ebb_rows")
			return errors.Join(err, closeErr)
		}
		// As many as would have made a page of the size wanted, but rows may be larger further on.
		count = min(max(1, len(r.Rows)*size/got), 2*len(r.Rows), most)
	}
}

// abandonSlot drops a slot that was just created, on this connection if it still works.
func (c *Conn) abandonSlot(name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	if c.pg.IsClosed() {
		return nil
	}
	c.snapshot = false
	if _, err := c.exec(ctx, "ROLLBACK"); err != nil {
		return fmt.Errorf("roll back: %w", err)
	}
	return c.DropSlot(ctx, name)
}

// inOrder returns a snapshot, in the text form of type pg_snapshot, as that type takes it. The one with which a slot is made may end before it begins:
// where the last transaction changed nothing that is decoded, SnapBuild moves xmin past it and leaves xmax. To such a snapshot, what is below xmin is
// visible and the rest is not, as if both were xmin.
func inOrder(snapshot string) (string, error) {
	xmin, rest, _ := strings.Cut(snapshot, ":")
	xmax, running, ok := strings.Cut(rest, ":")
	from, fromErr := strconv.ParseUint(xmin, 10, 64)
	to, toErr := strconv.ParseUint(xmax, 10, 64)
	switch {
	case !ok || fromErr != nil || toErr != nil:
		return "", fmt.Errorf("%q is no snapshot", snapshot)
	case from <= to:
		return snapshot, nil
	case running != "":
		return "", fmt.Errorf("snapshot %q has transactions behind its end", snapshot)
	}
	return xmin + ":" + xmin + ":", nil
}

// DropSlot drops a slot of this connection's database. One that is gone already is no error.
func (c *Conn) DropSlot(ctx context.Context, name string) error {
	err := pglogrepl.DropReplicationSlot(ctx, c.pg, quoteIdent(name), pglogrepl.DropReplicationSlotOptions{})
	if pg := (*pgconn.PgError)(nil); errors.As(err, &pg) && pg.Code == undefinedObject {
		return nil
	}
	if err != nil {
		return fmt.Errorf("drop slot %q: %w", name, err)
	}
	return nil
}

// exec runs one statement by the simple protocol, the only one that a replication connection speaks, and returns the first
// column of its first row.
func (c *Conn) exec(ctx context.Context, sql string) (string, error) {
	results, err := c.pg.Exec(ctx, sql).ReadAll()
	if err != nil {
		return "", err
	}
	if len(results) == 0 || len(results[0].Rows) == 0 || len(results[0].Rows[0]) == 0 {
		return "", nil
	}
	return string(results[0].Rows[0][0]), nil
}

func quoteIdent(s string) string { return pgx.Identifier{s}.Sanitize() }

func quoteLiteral(s string) string { return "'" + strings.ReplaceAll(s, "'", "''") + "'" }
