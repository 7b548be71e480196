// Package session says how every session of the bridge with Postgres is set.
package session

import (
	"maps"
	"net"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// connectTimeout bounds a connection attempt to one host, unless the URL says otherwise (connect_timeout).
const connectTimeout = 10 * time.Second

// settings apply to every session. Those of TCP let the server find out within 11 seconds that its client's host has vanished.
// Source: https://www.postgresql.org/docs/current/runtime-config-connection.html#RUNTIME-CONFIG-TCP-SETTINGS
var settings = map[string]string{
	// Without it, text comes in the database's own encoding.
	"client_encoding": "UTF8",
	// ebb must never wait for the synchronous standby that it may itself be.
	"synchronous_commit":      "local",
	"tcp_keepalives_idle":     "5",
	"tcp_keepalives_interval": "2",
	"tcp_keepalives_count":    "3",
	"tcp_user_timeout":        "10000",

	// The text of values depends on these, and what is read from the table must be what comes by the slot. lc_monetary stays as it is: which
	// currency money is in, the database knows.
	"datestyle":             "ISO, YMD",
	"intervalstyle":         "postgres",
	"timezone":              "UTC",
	"extra_float_digits":    "1",
	"bytea_output":          "hex",
	"quote_all_identifiers": "off",
}

// Configure sets what a session is to have. The name is how it calls itself (application_name).
func Configure(cfg *pgconn.Config, name string) {
	// The server takes names in any case, and which one of two counts is left to chance.
	maps.DeleteFunc(cfg.RuntimeParams, func(name, _ string) bool {
		_, ours := settings[strings.ToLower(name)]
		return ours
	})
	maps.Copy(cfg.RuntimeParams, settings)
	cfg.RuntimeParams["application_name"] = name
	if cfg.ConnectTimeout == 0 {
		cfg.ConnectTimeout = connectTimeout
	}
	// The other way round: a server whose host has vanished.
	cfg.DialFunc = (&net.Dialer{KeepAliveConfig: net.KeepAliveConfig{
		Enable: true, Idle: 5 * time.Second, Interval: 2 * time.Second, Count: 3,
	}}).DialContext
}
