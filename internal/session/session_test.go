package session

import (
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
)

// Settings that the text of values depends on are ebb's, also where the URL says something else, in whatever case.
func TestConfigureBeatsTheURL(t *testing.T) {
	cfg, err := pgconn.ParseConfig("postgres://u@127.0.0.1/d?TimeZone=Asia/Kolkata&DATESTYLE=German&bytea_output=escape&search_path=app")
	if err != nil {
		t.Fatal(err)
	}
	Configure(cfg, "ebb")
	want := map[string]string{"timezone": "UTC", "datestyle": "ISO, YMD", "bytea_output": "hex", "search_path": "app", "application_name": "ebb"}
	for name, value := range want {
		if got := cfg.RuntimeParams[name]; got != value {
			t.Errorf("%s is %q, want %q", name, got, value)
		}
	}
	for _, name := range []string{"TimeZone", "DATESTYLE"} {
		if got, ok := cfg.RuntimeParams[name]; ok {
			t.Errorf("%s is %q as well", name, got)
		}
	}
}
