package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"golang.org/x/sync/errgroup"

	"ebb/internal/postgres"
	"ebb/internal/sleep"
)

const (
	database   = "torture"
	slot       = "torture"
	bridgeRole = "torture_bridge"
	streamName = "EBB"
	// quietTimeout is how long, after the last fault is healed, delivery may take to catch up.
	quietTimeout = 90 * time.Second
)

// round is one seed on fresh servers.
type round struct {
	options
	seed   uint64
	dir    string
	faults []fault
	report *roundReport

	ctx    context.Context // ends when something has failed, or the round is interrupted
	cancel context.CancelCauseFunc

	postgres  *postgres.Server
	broker    *broker
	fleet     *fleet
	proxies   []*proxy
	witness   *witness
	producers []*producer
	backup    string // a copy of the NATS store, "" for none

	mu sync.Mutex // guards report while the lanes are at work
}

// errFailed says that something was found, which the report has.
var errFailed = errors.New("the round failed")

// fail notes a violation, and ends the round.
func (r *round) fail(kind, detail string) {
	r.mu.Lock()
	r.report.Failures = append(r.report.Failures, violation{kind, detail})
	r.mu.Unlock()
	r.say("FAILED: %s: %s", kind, detail)
	r.cancel(errFailed)
}

func (r *round) say(format string, args ...any) {
	line := fmt.Sprintf("%8.1fs  %s", time.Since(r.report.started).Seconds(), fmt.Sprintf(format, args...))
	if r.verbose {
		fmt.Fprintln(r.out, line)
	}
	if r.fleet != nil {
		for _, b := range r.fleet.bridges {
			b.log.note(line)
		}
	}
}

// runRound tortures for one seed. An error is one of the harness; what the bridge did wrong is in the report.
func runRound(ctx context.Context, o options, seed uint64, dir string) (*roundReport, error) {
	r := newRound(ctx, o, seed, dir)
	defer r.cancel(nil)
	r.faults = makeSchedule(seed, o.kinds, o.duration, o.faults)
	r.report.Planned = len(r.faults)
	return r.report, r.run(ctx, r.torture)
}

func newRound(ctx context.Context, o options, seed uint64, dir string) *round {
	r := &round{options: o, seed: seed, dir: dir, report: &roundReport{Seed: seed, started: time.Now(), Kinds: map[string]*kindReport{}}}
	r.ctx, r.cancel = context.WithCancelCause(ctx)
	return r
}

// run is a round from its servers' start to their end.
func (r *round) run(ctx context.Context, torture func() error) (err error) {
	defer func() { err = errors.Join(err, r.close()) }()
	if err := r.setUp(); err != nil {
		return err
	}
	if err := torture(); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	err = r.settle()
	r.report.Seconds = time.Since(r.report.started).Seconds()
	return err
}

// setUp starts everything.
func (r *round) setUp() error {
	ctx, cancel := context.WithTimeout(r.ctx, 2*time.Minute)
	defer cancel()
	var err error
	r.postgres, err = postgres.Start(ctx, postgres.Config{Settings: map[string]string{
		"autovacuum_naptime": "10s",
		"jit":                "off",
		"max_wal_size":       "256MB",
		"wal_sender_timeout": "10s",
		"checkpoint_timeout": "60s",
	}})
	if err != nil {
		return err
	}
	if err := r.sql(ctx, "postgres", "CREATE DATABASE "+database); err != nil {
		return err
	}
	port, err := freePort()
	if err != nil {
		return err
	}
	r.report.SyncAlways = randomStream(r.seed, streamRound).IntN(2) == 0
	if r.broker, err = newBroker(r.dir, port, r.report.SyncAlways); err != nil {
		return err
	}
	if err := r.broker.start(); err != nil {
		return err
	}
	if err := r.writeConfig("setup.yaml", r.postgres.URL(database), r.broker.url()); err != nil {
		return err
	}
	if out, err := r.ebb(ctx, "setup"); err != nil {
		return fmt.Errorf("ebb setup: %w: %s", err, out)
	}
	if err := r.sql(ctx, database, "CREATE ROLE "+bridgeRole+" LOGIN REPLICATION IN ROLE ebb_bridge"); err != nil {
		return err
	}
	if r.witness, err = makeWitness(ctx, r.postgres.URL(database)); err != nil {
		return err
	}
	r.fleet = &fleet{program: r.program, dir: r.dir, failed: r.fail}
	for i := range r.bridges {
		if err := r.addBridge(i); err != nil {
			return err
		}
	}
	for i, style := range r.styles {
		r.producers = append(r.producers, &producer{
			number: i, style: style, url: r.postgres.URL(database), rand: randomStream(r.seed, streamProducers+uint64(i)),
			pace: time.Duration(float64(len(r.styles)) / r.rate * float64(time.Second)),
		})
	}
	return nil
}

func (r *round) addBridge(i int) error {
	toPostgres, err := newProxy(fmt.Sprintf("postgres%d", i), fmt.Sprintf("127.0.0.1:%d", r.postgres.Port()))
	if err != nil {
		return err
	}
	toNATS, err := newProxy(fmt.Sprintf("nats%d", i), r.broker.addr())
	if err != nil {
		return err
	}
	r.proxies = append(r.proxies, toPostgres, toNATS)
	config := fmt.Sprintf("bridge%d.yaml", i)
	if err := r.writeConfig(config, fmt.Sprintf("postgres://%s@%s/%s?sslmode=disable", bridgeRole, toPostgres.listen, database), "nats://"+toNATS.listen); err != nil {
		return err
	}
	b, err := newBridge(r.fleet, i, filepath.Join(r.dir, config), toPostgres, toNATS)
	if err != nil {
		return err
	}
	r.fleet.bridges = append(r.fleet.bridges, b)
	go b.supervise()
	return nil
}

func (r *round) writeConfig(name, postgres, sink string) error {
	config := map[string]any{
		"postgres": postgres, "slot": slot, "publication": slot, "sink": sink, "listen": "", "nats": map[string]any{"stream": streamName},
		"recorded": map[string]any{"every": "500ms"},
	}
	text, err := json.MarshalIndent(config, "", "  ") // which is YAML as well
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(r.dir, name), append(text, '\n'), 0o644)
}

// ebb runs one of its other commands, directly on the servers.
func (r *round) ebb(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, r.program, append(args, "--config", filepath.Join(r.dir, "setup.yaml"))...)
	cmd.Dir, cmd.Env = r.dir, environ()
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// sql runs a statement in a session of its own.
func (r *round) sql(ctx context.Context, database, statement string, args ...any) error {
	db, err := pgx.Connect(ctx, r.postgres.URL(database))
	if err != nil {
		return err
	}
	defer db.Close(context.WithoutCancel(ctx))
	if _, err := db.Exec(ctx, statement, args...); err != nil {
		return fmt.Errorf("%s: %w", statement, err)
	}
	return nil
}

// torture has the producers write while the faults come.
func (r *round) torture() error {
	return r.whileWriting(func() {
		var work sync.WaitGroup
		for l := range lanes {
			work.Go(func() { r.runLane(l) })
		}
		work.Wait()
		r.wait(r.duration - time.Since(r.report.started))
	})
}

// whileWriting has the bridges run and the producers write while something is done.
func (r *round) whileWriting(do func()) error {
	watching, stopWatching := context.WithCancel(r.ctx)
	defer stopWatching()
	writing, stopWriting := context.WithCancel(r.ctx)
	defer stopWriting()
	var watcher sync.WaitGroup
	watcher.Go(func() { r.witness.watch(watching) })
	for _, b := range r.fleet.bridges {
		b.start()
	}
	var writers errgroup.Group
	for _, p := range r.producers {
		writers.Go(func() error { return p.produce(writing) })
	}
	do()
	stopWriting()
	err := writers.Wait()
	stopWatching()
	watcher.Wait()
	for _, p := range r.producers {
		r.report.addLedger(p)
	}
	if err != nil && !errors.Is(context.Cause(r.ctx), errFailed) {
		return err
	}
	return nil
}

// runLane has the faults of a lane come one after the other.
func (r *round) runLane(l lane) {
	for _, f := range r.faults {
		if f.lane != l {
			continue
		}
		if sleep.For(r.ctx, f.at-time.Since(r.report.started)) != nil {
			return
		}
		r.say("%s", f)
		began := time.Now()
		err := f.do(r, f)
		if r.ctx.Err() != nil {
			return
		}
		r.mu.Lock()
		k := r.report.Kinds[f.name]
		if k == nil {
			k = &kindReport{}
			r.report.Kinds[f.name] = k
		}
		if err == nil {
			k.Times++
			k.Seconds += time.Since(began).Seconds()
		} else {
			k.Skipped++
			k.Why = err.Error()
		}
		r.mu.Unlock()
		if err != nil {
			r.say("%3d  %s could not be done: %v", f.number, f.name, err)
		} else {
			r.say("%3d  %s is over", f.number, f.name)
		}
	}
}

// settle waits until everything is delivered, stops the bridges, and asks the oracle.
func (r *round) settle() error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.ctx), 5*time.Minute)
	defer cancel()
	if err := r.heal(ctx); err != nil {
		return err
	}
	failed := len(r.report.Failures) > 0
	if !failed {
		r.say("all healed; waiting until everything is delivered")
		began := time.Now()
		if err := r.awaitQuiet(ctx); err != nil {
			r.fail("stuck", err.Error())
			leader, _ := r.fleet.leader()
			leader.dump()
		}
		r.report.QuietSeconds = time.Since(began).Seconds()
	}
	for _, b := range r.fleet.bridges {
		b.terminate()
	}
	r.report.addFleet(r.fleet)
	for _, p := range r.proxies {
		r.report.ReplacedProxies += p.replaced
	}
	if err := r.witness.catchUp(ctx); err != nil {
		return fmt.Errorf("read what the witness has seen: %w", err)
	}
	e := evidence{}
	for _, p := range r.producers {
		e.ledger = append(e.ledger, p.ledger...)
	}
	var err error
	if e.table, err = readTable(ctx, r.postgres.URL(database)); err != nil {
		return err
	}
	if e.stream, err = readStream(ctx, r.broker.url()); err != nil {
		return err
	}
	e.witness, e.transactions = r.witness.seen()
	v := judge(e)
	r.report.Verdict = v
	if failed {
		// What was not delivered yet is not missing.
		v.Missing, v.Violations = 0, slicesWithout(v.Violations, "missing")
	}
	return nil
}

func slicesWithout(violations []violation, kind string) []violation {
	var kept []violation
	for _, v := range violations {
		if v.Kind != kind {
			kept = append(kept, v)
		}
	}
	return kept
}

// heal brings everything back that a fault which was interrupted has left.
func (r *round) heal(ctx context.Context) error {
	errs := []error{r.postgres.Start(ctx), r.broker.start()}
	for _, p := range r.proxies {
		errs = append(errs, p.restore())
	}
	r.fleet.release(20 * time.Second)
	for _, b := range r.fleet.bridges {
		b.thaw()
		b.start()
	}
	return errors.Join(errs...)
}

// awaitQuiet waits until the stream holds as many messages as the table has rows, and all are recorded as delivered. More messages
// than rows will not become fewer: then it is for the oracle to say what they are.
func (r *round) awaitQuiet(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, quietTimeout)
	defer cancel()
	for {
		state, quiet := r.progress(ctx)
		if quiet {
			return nil
		}
		if sleep.For(ctx, 250*time.Millisecond) != nil {
			return fmt.Errorf("%s after all was healed: %s", quietTimeout, state)
		}
	}
}

// progress says how far delivery is.
func (r *round) progress(ctx context.Context) (string, bool) {
	db, err := pgx.Connect(ctx, r.postgres.URL(database))
	if err != nil {
		return err.Error(), false
	}
	defer db.Close(context.WithoutCancel(ctx))
	var rows, backlog int
	if err := db.QueryRow(ctx, "SELECT (SELECT count(*) FROM ebb.buffer), (SELECT count(*) FROM ebb.backlog)").Scan(&rows, &backlog); err != nil {
		return err.Error(), false
	}
	messages, err := countStream(ctx, r.broker.url())
	if err != nil {
		return err.Error(), false
	}
	return fmt.Sprintf("the table has %d rows, the stream %d messages, the backlog is %d", rows, messages, backlog), messages >= rows && backlog == 0
}

// close ends everything. The logs of a round that failed stay.
func (r *round) close() error {
	var errs []error
	if r.fleet != nil {
		for _, b := range r.fleet.bridges {
			b.close()
		}
	}
	for _, p := range r.proxies {
		p.close()
	}
	if r.broker != nil {
		errs = append(errs, r.broker.close())
	}
	if r.postgres != nil {
		if log, err := os.Open(r.postgres.LogFile()); err == nil {
			errs = append(errs, copyTo(filepath.Join(r.dir, "postgres.log"), log), log.Close())
		}
		errs = append(errs, r.postgres.Close())
	}
	errs = append(errs, os.RemoveAll(filepath.Join(r.dir, "disk")), os.RemoveAll(filepath.Join(r.dir, "backup")), os.RemoveAll(filepath.Join(r.dir, "copy")))
	return errors.Join(errs...)
}

func copyTo(path string, from io.Reader) error {
	file, err := os.Create(path)
	if err != nil {
		return err
	}
	_, err = io.Copy(file, io.LimitReader(from, logBytes))
	return errors.Join(err, file.Close())
}
