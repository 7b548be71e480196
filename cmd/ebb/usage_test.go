package main

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"ebb/internal/natstest"
	"ebb/internal/pgtest"
	"ebb/internal/postgres"
)

func TestWrongUsage(t *testing.T) {
	const url = "postgres://nobody@127.0.0.1:1/none"
	for _, c := range []struct {
		name  string
		args  []string
		words []string
	}{
		{"command", []string{"rum"}, []string{`"rum"`, "ebb --help"}},
		{"flag", []string{"run", "--sinc", "stdout"}, []string{"--sinc"}},
		{"root flag", []string{"--nonsense"}, []string{"--nonsense"}},
		{"flag without its value", []string{"run", "--postgres"}, []string{"--postgres"}},
		{"argument", []string{"setup", "now"}, []string{"setup", `"now"`}},
		{"argument of version", []string{"version", "2"}, []string{`"2"`}},
		{"log level", []string{"run", "--log-level", "loud"}, []string{"--log-level", `"loud"`, "debug, info, warn or error"}},
		{"log format", []string{"status", "--log-format", "xml"}, []string{"--log-format", `"xml"`, "text or json"}},
		{"timeout", []string{"setup", "--timeout", "soon"}, []string{"--timeout"}},
		{"no postgres for setup", []string{"setup"}, []string{"postgres", "--postgres URL", "EBB_POSTGRES", "DATABASE_URL"}},
		{"no postgres for run", []string{"run", "--sink", "stdout"}, []string{"postgres", "EBB_POSTGRES"}},
		{"no postgres for status", []string{"status"}, []string{"postgres", "EBB_POSTGRES"}},
		{"no postgres for teardown", []string{"teardown", "--yes"}, []string{"postgres", "EBB_POSTGRES"}},
		{"no sink", []string{"run", "--postgres", url}, []string{"sink", "--sink URL", "EBB_SINK"}},
		{"sink of no kind", []string{"run", "--postgres", url, "--sink", "amqp://x"}, []string{"--sink"}},
		{"no such file", []string{"run", "--config", "missing.yaml"}, []string{"missing.yaml", "no such file", "--config FILE"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			r := ebb(t, c.args...)
			r.fails(t, exitUsage, c.words...)
			if strings.Count(r.stderr, "\n") != 1 {
				t.Errorf("more than one line: %s", r.stderr)
			}
		})
	}
}

func TestWrongConfigurationFile(t *testing.T) {
	for _, c := range []struct {
		name, yaml string
		words      []string
	}{
		{"unknown key", "slot: ebb\nsnik: stdout\n", []string{"ebb.yaml:2: snik", "sink"}},
		{"key written twice", "slot: a\nslot: b\n", []string{"ebb.yaml:2: slot"}},
		{"wrong type", "slot: ebb\nnats:\n  replicas: many\n", []string{"ebb.yaml:3: nats.replicas", "1, 3 or 5"}},
		{"impossible value", "nats: {replicas: 4}\n", []string{"ebb.yaml:1: nats.replicas", "4", "1, 3 or 5"}},
		{"impossible slot", "slot: Ebb-1\n", []string{"ebb.yaml:1: slot", "a-z"}},
		{"unset variable", "postgres: ${NO_SUCH_VARIABLE_OF_MINE}\n", []string{"ebb.yaml:1: postgres", "NO_SUCH_VARIABLE_OF_MINE"}},
		{"not a duration", "\n\nrecorded: {every: fast}\n", []string{"ebb.yaml:3: recorded.every", "1s"}},
		{"no such way to reject", "http: {on_reject: drop}\n", []string{"ebb.yaml:1: http.on_reject", "park or block"}},
		{"no YAML", "slot: [\n", []string{"ebb.yaml:"}},
		{"sink", "sink: ftp://x\n", []string{"ebb.yaml:1: sink", "nats"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "ebb.yaml"), []byte(c.yaml), 0o600); err != nil {
				t.Fatal(err)
			}
			// It is found without --config.
			r := ebbWith(t, func(cmd *exec.Cmd) { cmd.Dir = dir }, "run", "--postgres", "postgres://nobody@127.0.0.1:1/none", "--sink", "stdout")
			r.fails(t, exitUsage, c.words...)
			if strings.Count(r.stderr, "\n") != 1 {
				t.Errorf("more than one line: %s", r.stderr)
			}
		})
	}
}

// TestPrecedence: flags beat the environment, which beats the file.
func TestPrecedence(t *testing.T) {
	s := newSite(t, pgtest.New(t), "stdout")
	env := func(url string) func(*exec.Cmd) {
		return func(cmd *exec.Cmd) { cmd.Env = environ("EBB_POSTGRES=" + url) }
	}
	const nowhere = "postgres://nobody@127.0.0.1:1/none"
	ebbWith(t, env(nowhere), s.args("setup")...).fails(t, exitFailed, "127.0.0.1:1")
	ebbWith(t, env(nowhere), s.args("setup", "--postgres", s.db.URL)...).must(t)
	ebbWith(t, env(s.db.URL), s.args("setup")...).must(t)
	s.ebb(t, "setup", "--postgres", nowhere).fails(t, exitFailed, "127.0.0.1:1")
}

func TestSetupRefusesWhatCannotWork(t *testing.T) {
	t.Parallel() // it waits more than it works
	t.Run("wal_level", func(t *testing.T) {
		server := pgtest.NewServer(t, postgres.Config{Settings: map[string]string{"wal_level": "replica"}})
		s := newSite(t, server.New(t), "stdout")
		s.ebb(t, "setup").fails(t, exitFailed, "wal_level", "replica", "wal_level = logical", "restart")
	})
	t.Run("role without REPLICATION", func(t *testing.T) {
		s := newSite(t, pgtest.New(t), "stdout")
		s.setupRole(t, s.db.Name+"_r", "CREATEROLE")
		r := s.ebb(t, "setup", "--postgres", s.urlOf(s.db.Name+"_r"))
		if r.code != exitFailed || !strings.Contains(r.stderr, "ALTER ROLE") || !strings.Contains(r.stderr, "REPLICATION") {
			t.Errorf("exit code %d, %s", r.code, r.stderr)
		}
		if n := pgtest.Value[int](t, s.db, "SELECT count(*)::int FROM pg_replication_slots WHERE slot_name = $1", s.db.Name); n != 0 {
			t.Errorf("a slot is left")
		}
	})
	t.Run("unreachable host", func(t *testing.T) {
		// A port that nobody listens on, since this test held it a moment ago.
		listener, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		address := listener.Addr().String()
		listener.Close()
		r := ebb(t, "setup", "--postgres", "postgres://me@"+address+"/app")
		r.fails(t, exitFailed, "connect", address, "refused")
		if strings.Count(r.stderr, "\n") != 1 || strings.Count(r.stderr, "refused") != 1 {
			t.Errorf("says it more than once: %s", r.stderr)
		}
	})
	t.Run("unknown host", func(t *testing.T) {
		ebb(t, "setup", "--postgres", "postgres://me@no-such-host.invalid/app").fails(t, exitFailed, "no-such-host.invalid")
	})
	t.Run("unknown database", func(t *testing.T) {
		s := newSite(t, pgtest.New(t), "stdout")
		s.ebb(t, "setup", "--postgres", strings.Replace(s.db.URL, s.db.Name, s.db.Name+"_x", 1)).fails(t, exitFailed, s.db.Name+"_x", "does not exist")
	})
	t.Run("slot of another plugin", func(t *testing.T) {
		s := newSite(t, pgtest.New(t), "stdout")
		s.db.Exec(t, fmt.Sprintf("SELECT pg_create_logical_replication_slot('%s', 'test_decoding')", s.db.Name))
		s.fails(t, "setup", s.db.Name, "test_decoding", "choose another name")
		if got := s.plugin(t); got != "test_decoding" {
			t.Errorf("the slot has plugin %q now", got)
		}
	})
	t.Run("physical slot", func(t *testing.T) {
		s := newSite(t, pgtest.New(t), "stdout")
		s.db.Exec(t, fmt.Sprintf("SELECT pg_create_physical_replication_slot('%s')", s.db.Name))
		defer s.db.Exec(t, fmt.Sprintf("SELECT pg_drop_replication_slot('%s')", s.db.Name)) // it belongs to no database
		s.fails(t, "setup", s.db.Name, "physical", "choose another name")
	})
	t.Run("slot of another database", func(t *testing.T) {
		s, other := newSite(t, pgtest.New(t), "stdout"), pgtest.New(t)
		other.Exec(t, fmt.Sprintf("SELECT pg_create_logical_replication_slot('%s', 'pgoutput')", s.db.Name))
		s.fails(t, "setup", s.db.Name, other.Name, "choose another name")
		if got := pgtest.Value[string](t, s.db, "SELECT database::text FROM pg_replication_slots WHERE slot_name = $1", s.db.Name); got != other.Name {
			t.Errorf("the slot is in database %q now", got)
		}
	})
	t.Run("transaction in the way", func(t *testing.T) {
		s := newSite(t, pgtest.New(t), "stdout")
		tx, err := s.db.Connect(t).Begin(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := tx.Exec(t.Context(), "SELECT pg_current_xact_id(), 'who is in the way'"); err != nil {
			t.Fatal(err)
		}
		r := s.ebb(t, "setup", "--timeout", "4s")
		if r.code != exitFailed || !strings.Contains(r.stderr, "who is in the way") || !strings.Contains(r.stderr, "--timeout") {
			t.Errorf("exit code %d, %s", r.code, r.stderr)
		}
		pgtest.Eventually(t, 30*time.Second, func() (bool, string) {
			n := pgtest.Value[int](t, s.db, "SELECT count(*)::int FROM pg_replication_slots WHERE slot_name = $1", s.db.Name)
			return n == 0, "a slot is left over"
		})
		if err := tx.Rollback(t.Context()); err != nil {
			t.Fatal(err)
		}
		s.setup(t)
	})
}

// fails runs a command that fails, with these words in its error.
func (s *site) fails(t *testing.T, command string, words ...string) {
	t.Helper()
	r := s.ebb(t, command)
	if command == "setup" {
		r.stdout = "" // what was done until then
	}
	r.fails(t, exitFailed, words...)
}

func (s *site) plugin(t *testing.T) string {
	t.Helper()
	return pgtest.Value[string](t, s.db, "SELECT plugin::text FROM pg_replication_slots WHERE slot_name = $1", s.db.Name)
}

// setupRole makes a login role that may make everything but what needs the attributes it is not given.
func (s *site) setupRole(t *testing.T, name, attributes string) {
	t.Helper()
	s.db.Exec(t, fmt.Sprintf("CREATE ROLE %s LOGIN %s", name, attributes), fmt.Sprintf("GRANT CREATE ON DATABASE %s TO %s", s.db.Name, name))
	t.Cleanup(func() { s.db.Exec(t, "DROP OWNED BY "+name+" CASCADE", "DROP ROLE "+name) })
}

func (s *site) urlOf(role string) string {
	return strings.Replace(s.db.URL, "postgres://postgres@", "postgres://"+role+"@", 1)
}

func TestRunRefusesWhatWaitingCannotMend(t *testing.T) {
	db := pgtest.New(t)
	broker := natstest.New(t)
	s := newSite(t, db, broker.URL())
	s.fails(t, "run", "ebb setup")
	s.fails(t, "status", "ebb setup")

	s.setup(t)
	name := "t_bridge_of_" + db.Name
	s.setupRole(t, name, "")
	db.Exec(t, "GRANT ebb_bridge TO "+name)
	s.ebb(t, "run", "--postgres", s.urlOf(name)).fails(t, exitFailed, "ALTER ROLE", "REPLICATION")
	db.Exec(t, "ALTER ROLE "+name+" REPLICATION")
	bridge := start(t, nil, s.args("run", "--postgres", s.urlOf(name))...)
	bridge.logs(t, 20*time.Second, "msg=streaming")
	s.put(t, 1)
	delivered(t, broker, 40*time.Second, 1)
	// The tick needs rights of its own.
	pgtest.Eventually(t, 30*time.Second, func() (bool, string) {
		n := pgtest.Value[int](t, db, "SELECT count(*)::int FROM ebb.backlog")
		return n == 0, fmt.Sprintf("%d events in the backlog", n)
	})
	bridge.stop(t)

	t.Run("publication", func(t *testing.T) {
		db.Exec(t, "DROP PUBLICATION "+db.Name)
		s.fails(t, "run", db.Name, "publication", "ebb setup")
		s.setup(t)
	})
	t.Run("slot in use", func(t *testing.T) {
		receiver := exec.Command(pgProgram(t, "pg_recvlogical"), "--start", "-S", db.Name, "-d", db.URL, "-f", os.DevNull,
			"-o", "proto_version=1", "-o", "publication_names="+db.Name)
		receiver.Env = environ()
		var output buffer
		receiver.Stdout, receiver.Stderr = &output, &output
		if err := receiver.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() {
			receiver.Process.Kill()
			receiver.Wait()
		}()
		pgtest.Eventually(t, 30*time.Second, func() (bool, string) {
			return pgtest.Value[bool](t, db, "SELECT active FROM pg_replication_slots WHERE slot_name = $1", db.Name), output.String()
		})
		s.fails(t, "run", db.Name, "in use", "pg_recvlogical", "no bridge")
		receiver.Process.Kill()
		receiver.Wait()
	})
	// A bridge whose publication disappears while it runs passes over rows without a word from the server: it must stop.
	t.Run("publication dropped under way", func(t *testing.T) {
		bridge := s.streaming(t)
		db.Exec(t, "DROP PUBLICATION "+db.Name)
		if code := bridge.ended(t, 30*time.Second); code != exitFailed {
			t.Errorf("exit code %d, want %d", code, exitFailed)
		}
		result{exitFailed, "", bridge.stderr.String()}.fails(t, exitFailed, "publication", "ebb setup")
	})
}

// TestRunWaits: containers start in any order.
func TestRunWaits(t *testing.T) {
	server := pgtest.NewServer(t, postgres.Config{})
	db := server.New(t)
	broker := natstest.New(t)
	s := newSite(t, db, broker.URL())
	s.setup(t)
	id := s.put(t, 1)
	if err := server.Stop(t.Context(), postgres.Fast); err != nil {
		t.Fatal(err)
	}
	broker.Stop(t)
	bridge := s.run(t)
	bridge.logs(t, 20*time.Second, "tries again")
	if err := server.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	bridge.logs(t, 20*time.Second, "waiting for the stream")
	broker.Start(t)
	delivered(t, broker, 40*time.Second, 1)
	equalIDs(t, "the stream", streamIDs(t, broker), []string{id})
	if bridge.stdout.String() != "" {
		t.Errorf("printed as data: %s", bridge.stdout.String())
	}
	bridge.stop(t)
}

func TestTeardown(t *testing.T) {
	db := pgtest.New(t)
	s := newSite(t, db, natstest.New(t).URL())
	s.setup(t)
	s.put(t, 1)
	s.ebb(t, "teardown").fails(t, exitUsage, "--yes")
	bridge := s.streaming(t)
	s.ebb(t, "teardown", "--yes").fails(t, exitFailed, "bridge is running", db.Name, "stop it")
	bridge.stop(t)
	if n := len(s.ids(t)); n != 1 {
		t.Fatalf("%d rows in the buffer after a teardown that was refused", n)
	}
	r := s.ebb(t, "teardown", "--yes").must(t)
	for _, word := range []string{"slot", "publication", "schema"} {
		if !strings.Contains(r.stdout, word) {
			t.Errorf("does not say what became of the %s: %s", word, r.stdout)
		}
	}
	left := pgtest.Value[string](t, db, `SELECT concat_ws(', ',
		(SELECT string_agg(slot_name, ' ') FROM pg_replication_slots WHERE database = current_database()),
		(SELECT string_agg(pubname, ' ') FROM pg_publication),
		(SELECT string_agg(nspname, ' ') FROM pg_namespace WHERE nspname = 'ebb'))`)
	if left != "" {
		t.Errorf("left: %s", left)
	}
	s.ebb(t, "teardown", "--yes").must(t)
	s.setup(t)
}

func TestSignals(t *testing.T) {
	broker := natstest.New(t)
	db := pgtest.New(t)
	s := newSite(t, db, broker.URL())
	s.setup(t)

	t.Run("drain", func(t *testing.T) {
		witness := s.witness(t)
		for round := range 4 {
			bridge := s.streaming(t)
			for i := range 3 {
				db.Exec(t, "INSERT INTO ebb.buffer (topic, payload) SELECT 'many', '{}' FROM generate_series(1, 3000)")
				if i == 0 {
					// It is stopped in the middle of its work.
					js := broker.JetStream(t)
					pgtest.Eventually(t, 30*time.Second, func() (bool, string) {
						stream, err := js.Stream(t.Context(), "EBB")
						return err == nil && stream.CachedInfo().State.Msgs > uint64(round*9000), "nothing is delivered"
					})
				}
			}
			bridge.stop(t)
			// What is confirmed is delivered. The last of what is delivered may not be recorded, and so is not confirmed.
			n, got := len(broker.Messages(t, "EBB")), s.confirmed(t)
			for _, tx := range witness.transactions(t) {
				if n -= len(tx.ids); n < 0 && tx.end <= got {
					t.Errorf("confirmed %s, but the transaction that ends at %s is not delivered", got, tx.end)
				}
			}
		}
		ids := s.ids(t)
		bridge := s.streaming(t)
		delivered(t, broker, 30*time.Second, len(ids))
		equalIDs(t, "the stream", streamIDs(t, broker), ids)
		s.confirms(t, 40*time.Second)
		bridge.stop(t)
	})
	t.Run("interrupt", func(t *testing.T) {
		bridge := s.streaming(t)
		bridge.cmd.Process.Signal(os.Interrupt)
		if code := bridge.ended(t, 30*time.Second); code != exitOK {
			t.Errorf("exit code %d, want %d", code, exitOK)
		}
	})
	t.Run("while waiting for Postgres", func(t *testing.T) {
		bridge := start(t, nil, s.args("run", "--postgres", "postgres://me@127.0.0.1:1/none")...)
		bridge.logs(t, 20*time.Second, "tries again")
		bridge.stop(t)
	})
	t.Run("while waiting for NATS", func(t *testing.T) {
		broker.Stop(t)
		bridge := s.run(t)
		bridge.logs(t, 20*time.Second, "waiting for the stream")
		bridge.stop(t)
		broker.Start(t)
	})
	t.Run("as a standby", func(t *testing.T) {
		leader := s.streaming(t)
		standby := s.run(t)
		standby.logs(t, 20*time.Second, "standing by")
		standby.stop(t)
		leader.stop(t)
	})
	t.Run("second signal", func(t *testing.T) {
		bridge := s.streaming(t)
		broker.Stop(t)
		s.put(t, 1)
		bridge.logs(t, 20*time.Second, "publishing was interrupted")
		bridge.endsBySecondSignal(t)
		broker.Start(t)
		bridge = s.streaming(t)
		delivered(t, broker, 40*time.Second, len(s.ids(t)))
		bridge.stop(t)
	})
}

// endsBySecondSignal sends signals to a program whose sink hangs. The first one starts a drain, which lasts
// seconds; as it takes a moment to be taken, a later one may have to be sent again.
func (p *program) endsBySecondSignal(t *testing.T) {
	t.Helper()
	began := time.Now()
	pgtest.Eventually(t, drainAtLeast, func() (bool, string) {
		p.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-p.done:
			return true, ""
		default:
			return false, "the second signal does not end it"
		}
	})
	status := p.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if !status.Signaled() || status.Signal() != syscall.SIGTERM {
		t.Errorf("ended with %s after %s, want an end by the second signal", p.cmd.ProcessState, time.Since(began))
	}
}

// drainAtLeast is less than the time for which a bridge waits for a sink that hangs.
const drainAtLeast = 4 * time.Second

// TestTakeOver: a second bridge stands by, and goes on where the first one was killed.
func TestTakeOver(t *testing.T) {
	broker, db := natstest.New(t), pgtest.New(t)
	s := newSite(t, db, broker.URL())
	s.setup(t)
	leader := s.streaming(t)
	standby := s.run(t)
	standby.logs(t, 20*time.Second, "standing by")
	s.put(t, 1)
	delivered(t, broker, 40*time.Second, 1)
	leader.kill()
	s.put(t, 2)
	delivered(t, broker, 40*time.Second, 2)
	equalIDs(t, "the stream", streamIDs(t, broker), s.ids(t))
	standby.stop(t)
}
