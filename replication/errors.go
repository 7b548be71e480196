package replication

import (
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
)

// SQLSTATEs that matter here. Source: https://www.postgresql.org/docs/current/errcodes-appendix.html
const (
	invalidAuthorization    = "28000"
	invalidPassword         = "28P01"
	invalidCatalogName      = "3D000"
	insufficientPrivilege   = "42501"
	undefinedObject         = "42704"
	duplicateObject         = "42710"
	featureNotSupported     = "0A000"
	configurationLimit      = "53400"
	syntaxErrorOrAccessRule = "42"
)

// IsPermanent reports whether err came from a server whose answer will be the same until somebody changes something there.
func IsPermanent(err error) bool {
	var pg *pgconn.PgError
	if !errors.As(err, &pg) {
		return false
	}
	switch pg.Code {
	case invalidAuthorization, invalidPassword, invalidCatalogName, featureNotSupported, configurationLimit:
		return true
	case duplicateObject:
		return false // a slot that somebody else makes at the same time is seen when it is looked for again
	}
	return strings.HasPrefix(pg.Code, syntaxErrorOrAccessRule)
}

// withHint adds the mend to an error whose cause a server words for its developers.
func withHint(err error) error {
	var pg *pgconn.PgError
	if !errors.As(err, &pg) {
		return err
	}
	hint := pg.Hint
	switch {
	case pg.Code == insufficientPrivilege:
		hint = "REPLICATION is an attribute of the login role itself and is not inherited: ALTER ROLE … REPLICATION " +
			"(managed services: grant rds_replication, cloudsqlsuperuser or azure_pg_admin as their manual says)"
	case pg.Code == configurationLimit:
		hint = "raise max_replication_slots, or drop a slot that nobody needs (select * from pg_replication_slots)"
	case pg.Code == undefinedObject:
		hint = "if it is the publication: ebb setup makes it anew, and has the rows delivered that the slot passed over"
	case pg.Code == invalidCatalogName:
		hint = "create the database, or mend the database name of the postgres setting"
	}
	if hint == "" {
		return err
	}
	return fmt.Errorf("%w; %s", err, hint)
}
