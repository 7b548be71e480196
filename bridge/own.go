package bridge

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"time"

	"ebb/decode"
	"ebb/event"
	"ebb/internal/sleep"
	"ebb/replication"
	"ebb/sql"
)

// Buffer is a table whose rows are events.
type Buffer struct {
	decode.Buffer
	// Delivered is what happens to delivered rows of a table of one's own, and Recorded the column that a mark sets.
	Delivered sql.Delivered
	Recorded  string
	// StartAll says that rows which are there at the first start are delivered.
	StartAll bool
}

// Managed returns the table that ebb setup creates.
func Managed() Buffer { return Buffer{Buffer: decode.Managed()} }

// Tables are the buffers as the database's side of the bridge sees them.
func Tables(buffers []Buffer) []sql.Table {
	var tables []sql.Table
	for i := range buffers {
		b := &buffers[i]
		if b.IsManaged() {
			tables = append(tables, sql.ManagedTable())
			continue
		}
		t := sql.Table{Schema: b.Schema, Name: b.Table, ID: b.ID, WholeRow: b.Payload == "", Delivered: b.Delivered, Recorded: b.Recorded, StartAll: b.StartAll}
		for _, column := range []string{b.ID, b.Topic, b.Key, b.Payload, b.Headers} {
			if column != "" && !slices.Contains(t.Columns, column) {
				t.Columns = append(t.Columns, column)
			}
		}
		tables = append(tables, t)
	}
	return tables
}

// carriesManaged reports whether the managed table is among the buffers.
func (c *Config) carriesManaged() bool { return sql.HasManaged(Tables(c.Buffers)) }

// ownTables are the tables of one's own, and how their rows are marked.
type ownTables struct {
	tables []sql.OwnTable
	// buffers are all of them, and markers those of tables whose rows are marked or deleted, both by the numbers that the decoder uses.
	buffers []decode.Buffer
	markers []*sql.Marker
	// db is the session that marks, or nil when there is nothing to mark.
	db *pgxConn
}

// inspectOwn looks up the tables of one's own, whose rows are to be marked.
func inspectOwn(ctx context.Context, db *pgxConn, cfg *Config) (*ownTables, error) {
	o, err := lookUpOwn(ctx, db, cfg)
	if err == nil {
		err = sql.CheckRights(ctx, db, o.tables)
	}
	return o, err
}

// lookUpOwn looks up the tables of one's own.
func lookUpOwn(ctx context.Context, db *pgxConn, cfg *Config) (*ownTables, error) {
	inspected, err := sql.Inspect(ctx, db, Tables(cfg.Buffers))
	if err != nil {
		return nil, err
	}
	o := &ownTables{tables: inspected}
	rest := inspected
	for i := range cfg.Buffers {
		b := cfg.Buffers[i].Buffer
		var marker *sql.Marker
		if !b.IsManaged() {
			b.NotNumber = rest[0].MixesWithNumbers
			if marker = rest[0].Marker(); marker != nil {
				b.RowKey = rest[0].Key
			}
			rest = rest[1:]
		}
		o.buffers, o.markers = append(o.buffers, b), append(o.markers, marker)
	}
	return o, nil
}

// number is that of a table among the buffers.
func (o *ownTables) number(t *sql.OwnTable) int {
	return slices.IndexFunc(o.buffers, func(b decode.Buffer) bool { return b.Schema == t.Schema && b.Table == t.Name })
}

// marks reports whether there are tables whose rows are marked or deleted.
func (o *ownTables) marks() bool {
	return slices.ContainsFunc(o.markers, func(m *sql.Marker) bool { return m != nil })
}

// mark marks or deletes rows, and returns those that somebody else has locked.
func (o *ownTables) mark(ctx context.Context, rows []trackedRow) ([]trackedRow, error) {
	byTable := make(map[int][]trackedRow, 1)
	for _, row := range rows {
		byTable[row.table] = append(byTable[row.table], row)
	}
	var locked []trackedRow
	for table, rows := range byTable {
		var keys [][]string
		xids := make([]int64, len(rows))
		for i, row := range rows {
			xids[i] = int64(row.xid)
			for i, rest := 0, row.key; len(rest) > 0; i++ {
				var column []byte
				column, rest = event.SplitKey(rest)
				if i == len(keys) {
					keys = append(keys, nil)
				}
				keys[i] = append(keys[i], string(column))
			}
		}
		numbers, err := o.markers[table].Mark(ctx, o.db, keys, xids)
		if err != nil {
			return nil, err
		}
		for _, n := range numbers {
			locked = append(locked, rows[n])
		}
	}
	return locked, nil
}

const (
	// markBatch is how many rows are marked at once, and how many have to be delivered for it to be done before the next tick.
	markBatch = 1000
	// retryLocked is how often rows are tried again that somebody else has locked.
	retryLocked = 250 * time.Millisecond
)

// markRows marks or deletes the rows of delivered events: when a tick asks for it, and when there are many. It is never in the way of
// delivery. When a row is locked, others are not held up.
func (l *leader) markRows(ctx context.Context) error {
	retry := time.NewTicker(retryLocked)
	defer retry.Stop()
	said := false
	for {
		select {
		case <-l.tracker.due:
		case <-retry.C:
			if !l.tracker.hasLocked() {
				continue
			}
		case <-ctx.Done():
			return nil
		}
		for first := true; ; first = false {
			rows := l.tracker.take(markBatch, first)
			if len(rows) == 0 {
				break
			}
			locked, err := l.own.mark(ctx, rows)
			if err != nil {
				return ignoreEnd(ctx, err)
			}
			confirmed := l.tracker.marked(locked)
			l.out.Confirm(confirmed.write, confirmed.flush)
			if len(locked) > 0 && !said {
				said = true
				l.Logger.Info("delivered rows are locked by others, or cannot be seen yet; they are recorded later, and the log is kept until then", "rows", len(locked))
			}
		}
	}
}

// awaitMarkedOrLocked waits until the rows of all that is delivered are marked or deleted, but for those that somebody else has locked.
func (l *leader) awaitMarkedOrLocked(ctx context.Context) {
	poll := time.NewTicker(caughtUpPoll)
	defer poll.Stop()
	l.tracker.ask()
	for l.tracker.hasDue() {
		select {
		case <-poll.C:
		case <-ctx.Done():
			return
		}
	}
}

// undeliveredOwn reports whether there are rows of own tables that a new slot, in whose snapshot conn is, does not hold. Of tables that are
// not marked, and that the slot has carried before, nobody knows: that is said.
func undeliveredOwn(ctx context.Context, db *pgxConn, conn *replication.Conn, cfg *Config, own []sql.OwnTable, remade bool) (bool, error) {
	started, err := sql.Started(ctx, db, cfg.Slot)
	if err != nil {
		return false, err
	}
	pending := false
	for i := range own {
		o := &own[i]
		condition := o.Undelivered(started[[2]string{o.Schema, o.Name}])
		if condition == "" {
			if remade && started[[2]string{o.Schema, o.Name}] {
				cfg.Logger.Error("events of a table were lost, unless all were delivered: its rows are kept without a mark (delivered: keep), and the slot "+
					"that held them is made anew", "table", o.String(), "slot", cfg.Slot)
			}
			continue
		}
		found, err := conn.Holds(ctx, o.AnyQuery(condition))
		if err != nil {
			return false, fmt.Errorf("look for rows of %s that are not delivered: %w", &o.Table, err)
		}
		pending = pending || found
	}
	return pending, nil
}

// outdated finds out whether rows that lack a column come from before it was added or renamed, so that the mapping fits the table by now. What is
// not delivered of a table with marks is delivered from the table then, with a slot that is made anew. It returns what the bridge ends with.
func (l *leader) outdated(ctx context.Context, missing *decode.MissingColumnError, err error) error {
	// A query that was cancelled has taken the leader's session with it.
	db, connectErr := sql.Connect(ctx, l.Postgres, l.Slot)
	if connectErr != nil {
		return connectErr
	}
	defer closeQuietly(db)
	if now, inspectErr := inspectOwn(ctx, db, &l.Config); inspectErr != nil || len(now.tables) == 0 {
		return err
	}
	if _, publicationErr := sql.CheckPublication(ctx, db, l.Publication, Tables(l.Buffers)...); publicationErr != nil {
		return err
	}
	for _, o := range l.own.tables {
		if o.Delivered == sql.Keep {
			return fmt.Errorf("%w. The table has it by now, and the slot holds rows from before. They cannot be delivered from the tables, as rows of %s are kept "+
				"without a mark: give the column its old name back until they are delivered", err, &o.Table)
		}
	}
	because := fmt.Sprintf("it holds rows of %s.%s from before column %q was there", missing.Schema, missing.Table, missing.Column)
	if remakeErr := sql.RemakeSlot(ctx, db, l.record, because, false); remakeErr != nil {
		return errors.Join(err, remakeErr)
	}
	return fmt.Errorf("slot %q: %w: %s", l.Slot, sql.ErrNotMade, because)
}

// recoverOwn delivers the rows of own tables from before the slot, by primary key, and marks or deletes them page by page.
func (l *leader) recoverOwn(ctx context.Context, r *recovery) error {
	started, err := sql.Started(ctx, l.db, l.Slot)
	if err != nil {
		return err
	}
	if err := sql.PositionedPayloads(ctx, l.db, l.Slot, func(payload []byte) { r.held.payloads[digestOf(payload)]++ }); err != nil {
		return err
	}
	now := time.Now().UTC().Truncate(time.Microsecond)
	for i := range l.own.tables {
		o := &l.own.tables[i]
		condition := o.Undelivered(started[[2]string{o.Schema, o.Name}])
		if condition == "" {
			continue
		}
		reader := &ownReader{l: l, table: o, number: l.own.number(o), time: now}
		if err := l.conn.Rows(ctx, o.RowsQuery(condition), recoverBytes, func(columns []replication.Column, rows [][][]byte) error {
			return reader.page(ctx, r, columns, rows)
		}); err != nil {
			return fmt.Errorf("deliver the rows of %s from before the slot: %w", &o.Table, err)
		}
	}
	return nil
}

// ownReader makes events of rows of one table.
type ownReader struct {
	l      *leader
	table  *sql.OwnTable
	number int
	time   time.Time

	columns map[string]int
	types   []uint32
	encoder *decode.RowEncoder
}

// page delivers those of the rows that the sink does not hold, and marks or deletes all of them.
func (o *ownReader) page(ctx context.Context, r *recovery, columns []replication.Column, rows [][][]byte) error {
	if err := o.l.at("page"); err != nil {
		return err
	}
	if o.columns == nil {
		if err := o.resolve(ctx, columns); err != nil {
			return err
		}
	}
	if err := r.resume(ctx); err != nil {
		return err
	}
	batch := event.NewBatch()
	at := r.at()
	keys := make([]trackedRow, 0, len(rows))
	kept, err := o.keptOf(ctx, rows)
	if err != nil {
		return err
	}
	for _, row := range rows {
		if err := o.append(batch, row, at); err != nil {
			return err
		}
		if e := &batch.Events[len(batch.Events)-1]; kept[string(e.ID)] || r.held.holdsEvent(e, o.table) {
			batch.Events = batch.Events[:len(batch.Events)-1]
		}
		var key []byte
		for _, column := range row[:len(o.table.Key)] {
			key = event.AppendKey(key, column)
		}
		keys = append(keys, trackedRow{table: o.number, key: key})
	}
	n, err := r.deliver(ctx, batch)
	if err != nil {
		return err
	}
	if err := o.l.at("delivered page"); err != nil {
		return err
	}
	if o.l.own.markers[o.number] != nil {
		if err := o.l.markAll(ctx, keys); err != nil {
			return err
		}
	}
	o.l.record.Recovered += int64(n)
	return sql.OwnRecovered(ctx, o.l.db, o.l.record, n, r.seq)
}

// keptOf returns the ids of those rows that are among the dead letters.
func (o *ownReader) keptOf(ctx context.Context, rows [][][]byte) (map[string]bool, error) {
	ids := make([]string, len(rows))
	for i, row := range rows {
		ids[i] = string(o.id(row))
	}
	return sql.KeptOf(ctx, o.l.db, o.l.Slot, ids)
}

// id is that of the event of a row.
func (o *ownReader) id(values [][]byte) []byte {
	if column := o.l.own.buffers[o.number].ID; column != "" {
		return values[o.columns[column]]
	}
	return rowID(o.table, values)
}

// resolve finds the columns of the mapping. The primary key comes first.
func (o *ownReader) resolve(ctx context.Context, columns []replication.Column) error {
	o.columns, o.types = map[string]int{}, make([]uint32, len(columns))
	whole := make([]decode.Column, 0, len(columns))
	for i, c := range columns {
		o.columns[c.Name], o.types[i] = i, c.Type
		if i >= len(o.table.Key) {
			whole = append(whole, decode.Column{Name: c.Name, Type: c.Type})
		}
	}
	if !o.table.WholeRow {
		return nil
	}
	var oids []uint32
	for _, c := range whole {
		oids = append(oids, c.Type)
	}
	var types decode.Types
	if unknown := types.Unknown(oids); len(unknown) > 0 {
		var err error
		if types, _, err = o.l.lookUp(ctx, unknown); err != nil {
			return err
		}
	}
	var err error
	o.encoder, err = decode.NewRowEncoder(whole, types)
	return err
}

func (o *ownReader) append(batch *event.Batch, values [][]byte, at event.Position) error {
	b := &o.l.own.buffers[o.number]
	get := func(name string) []byte {
		if name == "" {
			return nil
		}
		return values[o.columns[name]]
	}
	row := decode.Row{ID: o.id(values), Topic: get(b.Topic), Key: get(b.Key), Headers: get(b.Headers), Time: o.time, Position: at}
	if b.Payload == "" {
		row.Values, row.Encoder = values[len(o.table.Key):], o.encoder
	} else {
		row.Payload, row.PayloadType = get(b.Payload), o.types[o.columns[b.Payload]]
	}
	return b.AppendRow(batch, row)
}

// rowID is the id of an event of a table without an id column that has no position of its own: made of the primary key, so that it is the
// same whenever the row is recovered.
func rowID(t *sql.OwnTable, values [][]byte) []byte {
	table := url.PathEscape(t.Schema) + "." + url.PathEscape(t.Name)
	key := ""
	for _, v := range values[:len(t.Key)] {
		key += "/" + url.PathEscape(string(v))
	}
	if len(table)+len(key) > decode.MaxID {
		key = fmt.Sprintf("/%x", sha256.Sum256([]byte(key)))
	}
	return []byte(table + key)
}

// markAll marks or deletes rows, and waits for those that others have locked.
func (l *leader) markAll(ctx context.Context, rows []trackedRow) error {
	for began, said := time.Now(), false; len(rows) > 0; {
		var err error
		if rows, err = l.own.mark(ctx, rows); err != nil {
			return err
		}
		if len(rows) == 0 {
			break
		}
		if !said && time.Since(began) > waitersAfter {
			said = true
			l.Logger.Warn("the recovery waits for rows that others have locked", "slot", l.Slot, "rows", len(rows))
		}
		if err := sleep.For(ctx, caughtUpPoll); err != nil {
			return err
		}
	}
	return nil
}
