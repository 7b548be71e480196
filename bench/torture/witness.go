package main

import (
	"context"
	"fmt"
	"strconv"
	"sync"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5"

	"ebb/event"
	"ebb/internal/sleep"
)

const (
	witnessSlot        = "torture_witness"
	witnessPublication = "torture_witness"
	// witnessGulp bounds how many changes are read at once; a transaction is not divided.
	witnessGulp = 20_000
)

// witness reads a second slot, by other code than the bridge's, and so knows the order of commits.
type witness struct {
	url string

	mu           sync.Mutex
	ids          []int64
	transactions []int
	// end is where the last transaction ends that was seen.
	end event.LSN
}

// makeWitness makes its slot and its publication, which is not the bridge's, as that one is damaged.
func makeWitness(ctx context.Context, url string) (*witness, error) {
	db, err := pgx.Connect(ctx, url)
	if err != nil {
		return nil, fmt.Errorf("make the witness: %w", err)
	}
	defer db.Close(ctx)
	for _, statement := range []string{
		"CREATE PUBLICATION " + witnessPublication + " FOR TABLE ebb.buffer WITH (publish = 'insert', publish_via_partition_root = true)",
		"SELECT pg_create_logical_replication_slot('" + witnessSlot + "', 'pgoutput')",
	} {
		if _, err := db.Exec(ctx, statement); err != nil {
			return nil, fmt.Errorf("make the witness: %w", err)
		}
	}
	return &witness{url: url}, nil
}

// watch reads until ctx ends.
func (w *witness) watch(ctx context.Context) {
	for ctx.Err() == nil {
		_ = w.catchUp(ctx) // Postgres is down, or soon will be; whoever needs all calls catchUp
		if sleep.For(ctx, 500*time.Millisecond) != nil {
			return
		}
	}
}

// catchUp reads what there is now.
func (w *witness) catchUp(ctx context.Context) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	db, err := pgx.Connect(ctx, w.url)
	if err != nil {
		return err
	}
	defer db.Close(context.WithoutCancel(ctx))
	for {
		n, err := w.gulp(ctx, db)
		if err != nil || n == 0 {
			return err
		}
	}
}

// gulp peeks at changes, notes them, and only then has the slot advance: whatever happens in between, they come again, and those that
// were noted are told by where they end.
func (w *witness) gulp(ctx context.Context, db *pgx.Conn) (int, error) {
	rows, err := db.Query(ctx, `SELECT data FROM pg_logical_slot_peek_binary_changes($1, NULL, $2, 'proto_version', '1', 'publication_names', $3)`,
		witnessSlot, witnessGulp, witnessPublication)
	if err != nil {
		return 0, fmt.Errorf("read the witness's slot: %w", err)
	}
	var read, open []int64
	var ends []int
	last := w.end
	n := 0
	var data []byte
	_, err = pgx.ForEachRow(rows, []any{&data}, func() error {
		n++
		msg, err := pglogrepl.Parse(data)
		if err != nil {
			return err
		}
		switch m := msg.(type) {
		case *pglogrepl.BeginMessage:
			open = open[:0]
		case *pglogrepl.InsertMessage:
			id, err := strconv.ParseInt(string(m.Tuple.Columns[0].Data), 10, 64)
			if err != nil {
				return err
			}
			open = append(open, id)
		case *pglogrepl.CommitMessage:
			if end := event.LSN(m.TransactionEndLSN); end > last {
				last = end
				if len(open) > 0 {
					read = append(read, open...)
					ends = append(ends, len(w.ids)+len(read))
				}
			}
		}
		return nil
	})
	if err != nil {
		return 0, fmt.Errorf("read the witness's slot: %w", err)
	}
	if n == 0 {
		return 0, nil
	}
	w.ids, w.transactions, w.end = append(w.ids, read...), append(w.transactions, ends...), last
	if _, err := db.Exec(ctx, "SELECT pg_replication_slot_advance($1, $2::text::pg_lsn)", witnessSlot, last.String()); err != nil {
		return 0, fmt.Errorf("advance the witness's slot: %w", err)
	}
	return n, nil
}

// seen returns what was committed, in order, and where in there transactions end.
func (w *witness) seen() ([]int64, []int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.ids, w.transactions
}

// advance moves the slot to the end of the log, when all before is noted, so that it needs no more of it.
func (w *witness) advance(ctx context.Context, db *pgx.Conn) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	now, err := readLSN(ctx, db, "SELECT pg_current_wal_flush_lsn()::text")
	if err != nil {
		return err
	}
	if _, err := w.gulp(ctx, db); err != nil { // of what was committed meanwhile
		return err
	}
	if now <= w.end {
		return nil
	}
	_, err = db.Exec(ctx, "SELECT pg_replication_slot_advance($1, $2::text::pg_lsn)", witnessSlot, now.String())
	return err
}
