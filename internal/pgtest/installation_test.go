package pgtest

import (
	"context"
	"strings"
	"testing"

	"ebb/internal/postgres"
)

// TestSlotSurvivesAFailover is what the newer servers are for: a slot that the standby keeps in step.
func TestSlotSurvivesAFailover(t *testing.T) {
	found := Installation(t, 17)
	if found.Major < 17 {
		t.Fatalf("found %s", found)
	}
	primary := NewServer(t, postgres.Config{Installation: found})
	db := primary.New(t)
	standby := primary.Standby(t, postgres.StandbyConfig{Settings: map[string]string{"sync_replication_slots": "on"}})
	db.Exec(t, "CREATE TABLE a (x int)", "CREATE PUBLICATION p FOR TABLE a",
		"SELECT pg_create_logical_replication_slot('"+db.Name+"', 'pgoutput', failover => true)")
	consume := func(db *Database, want int) {
		t.Helper()
		inserts := Value[int](t, db, "SELECT count(*) FROM pg_logical_slot_get_binary_changes($1, NULL, NULL, "+
			"'proto_version', '1', 'publication_names', 'p') WHERE get_byte(data, 0) = ascii('I')", db.Name)
		if inserts != want {
			t.Errorf("the slot has %d inserts, want %d", inserts, want)
		}
	}
	db.Exec(t, "INSERT INTO a VALUES (1)")
	consume(db, 1)
	consuming, stop := context.WithCancel(t.Context())
	conn := db.Connect(t)
	stopped := make(chan error, 1)
	go func() {
		var err error
		for err == nil && consuming.Err() == nil {
			_, err = conn.Exec(t.Context(), "SELECT pg_replication_slot_advance($1, pg_current_wal_flush_lsn())", db.Name)
		}
		stopped <- err
	}()
	standby.WaitSynced(t, primary, db.Name)
	stop()
	if err := <-stopped; err != nil {
		t.Fatal(err)
	}
	db.Exec(t, "INSERT INTO a VALUES (2)")
	standby.CatchUp(t, primary)
	if err := primary.Stop(t.Context(), postgres.Immediate); err != nil {
		t.Fatal(err)
	}
	if err := standby.Promote(t.Context()); err != nil {
		t.Fatal(err)
	}
	promoted := db.On(standby)
	promoted.Exec(t, "INSERT INTO a VALUES (3)")
	consume(promoted, 2) // one from before the failover and one from after it
}

func TestFetchSaysWhatTheScriptSays(t *testing.T) {
	_, err := fetch(t.Context(), -15, t.TempDir())
	if err == nil || !strings.Contains(err.Error(), "-15 is no major version") {
		t.Errorf("error %v", err)
	}
}
