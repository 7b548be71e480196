package replication

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"ebb/event"
)

// TrailOf returns the name of the trailing slot of a slot: one that stays behind it, so that it can be copied when the position is to go back,
// which a slot itself cannot.
func TrailOf(slot string) string { return slot + "_trail" }

// CopySlot makes a slot that begins where another one stands, which may be in use meanwhile. The copy lacks the other one's failover flag;
// see [Conn.SetFailover]. The error wraps ErrNoSlot if there is none to copy.
// Source: https://www.postgresql.org/docs/current/functions-admin.html#FUNCTIONS-REPLICATION
func CopySlot(ctx context.Context, db *pgx.Conn, from, to string) error {
	_, err := db.Exec(ctx, "SELECT pg_copy_logical_replication_slot($1, $2)", from, to)
	if pg := (*pgconn.PgError)(nil); errors.As(err, &pg) && pg.Code == undefinedObject {
		return fmt.Errorf("copy slot %q to %q: %w", from, to, ErrNoSlot)
	}
	if err != nil {
		return fmt.Errorf("copy slot %q to %q: %w", from, to, withHint(err))
	}
	return nil
}

// CopyTemporary makes a slot that begins where another one stands, and that ends with this connection.
func (c *Conn) CopyTemporary(ctx context.Context, from, to string) error {
	if _, err := c.exec(ctx, fmt.Sprintf("SELECT pg_copy_logical_replication_slot(%s, %s, true)", quoteLiteral(from), quoteLiteral(to))); err != nil {
		return fmt.Errorf("copy slot %q to %q: %w", from, to, withHint(err))
	}
	return nil
}

// AdvanceSlot moves a slot that nobody uses forward, and returns where it stands then. The server reads the log from the slot's restart LSN on
// for that.
func AdvanceSlot(ctx context.Context, db *pgx.Conn, name string, to event.LSN) (event.LSN, error) {
	var text string
	if err := db.QueryRow(ctx, "SELECT end_lsn::text FROM pg_replication_slot_advance($1, $2::text::pg_lsn)", name, to.String()).Scan(&text); err != nil {
		return 0, fmt.Errorf("advance slot %q to %s: %w", name, to, withHint(err))
	}
	lsn, err := event.ParseLSN(text)
	if err != nil {
		return 0, fmt.Errorf("advance slot %q to %s: %w", name, to, err)
	}
	return lsn, nil
}

// SetFailover has standbys that synchronize slots have a slot too, which nobody uses at the moment. Servers before Postgres 17 cannot, which is no
// error. Source: https://www.postgresql.org/docs/current/protocol-replication.html#PROTOCOL-REPLICATION-ALTER-REPLICATION-SLOT
func (c *Conn) SetFailover(ctx context.Context, name string) error {
	major, err := c.major(ctx)
	if err != nil {
		return fmt.Errorf("set failover on slot %q: %w", name, err)
	}
	if major < failoverSince {
		return nil
	}
	if _, err := c.exec(ctx, fmt.Sprintf("ALTER_REPLICATION_SLOT %s (FAILOVER true)", quoteIdent(name))); err != nil {
		return fmt.Errorf("set failover on slot %q: %w", name, withHint(err))
	}
	return nil
}
