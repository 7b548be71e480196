package sql

import (
	"context"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// MessageToken returns what the content of a message begins with that ebb.emit has written.
func MessageToken(ctx context.Context, db *pgx.Conn) ([]byte, error) {
	var token []byte
	if err := db.QueryRow(ctx, "SELECT uuid_send(token) FROM ebb.message_token").Scan(&token); err != nil {
		return nil, fmt.Errorf("read the token of ebb.emit: %w", withHint(err))
	}
	return token, nil
}
