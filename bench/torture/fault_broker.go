package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

func (r *round) killNATS(f fault) error {
	r.broker.kill()
	r.wait(f.lasts)
	return r.broker.start()
}

func (r *round) stopNATS(f fault) error {
	if err := r.broker.stop(); err != nil {
		return err
	}
	err := r.makeBackup()
	r.wait(f.lasts)
	return errors.Join(err, r.broker.start())
}

func (r *round) freezeNATS(f fault) error {
	r.broker.child.signal(syscall.SIGSTOP)
	r.wait(f.lasts)
	r.broker.child.signal(syscall.SIGCONT)
	return nil
}

// slowNATS stops the server again and again.
func (r *round) slowNATS(f fault) error {
	random := f.rand()
	for until := time.Now().Add(f.lasts); time.Now().Before(until) && r.ctx.Err() == nil; {
		pulse := between(random, 20*time.Millisecond, 300*time.Millisecond)
		r.broker.child.signal(syscall.SIGSTOP)
		r.wait(pulse * 9 / 10)
		r.broker.child.signal(syscall.SIGCONT)
		r.wait(pulse / 10)
	}
	return nil
}

// fillDisk is healed by a restart: a NATS server turns JetStream off when its disk is full, and does not turn it on again.
func (r *round) fillDisk(f fault) error {
	free, err := r.broker.fill()
	if err != nil {
		return err
	}
	r.wait(f.lasts)
	r.broker.kill()
	return errors.Join(free(), r.broker.start())
}

func (r *round) limitFiles(f fault) error {
	if err := limitFileSize(r.broker.child.pid(), 1); err != nil {
		return err
	}
	r.wait(f.lasts)
	r.broker.kill() // the limit goes with the process
	return r.broker.start()
}

// makeBackup copies the store, while the server is down.
func (r *round) makeBackup() error {
	r.backup = filepath.Join(r.dir, "backup")
	return copyStore(r.broker.dir, r.backup)
}

// forgetTail brings back a copy from a moment ago.
func (r *round) forgetTail(f fault) error {
	before := filepath.Join(r.dir, "copy")
	if err := r.broker.stop(); err != nil {
		return err
	}
	if err := errors.Join(copyStore(r.broker.dir, before), r.broker.start()); err != nil {
		return err
	}
	r.wait(f.lasts)
	return r.putBack(before)
}

// restoreBackup brings back the newest copy that was made while the server was down.
func (r *round) restoreBackup(f fault) error {
	if r.backup == "" {
		if err := r.broker.stop(); err != nil {
			return err
		}
		if err := errors.Join(r.makeBackup(), r.broker.start()); err != nil {
			return err
		}
	}
	r.wait(f.lasts)
	return r.putBack(r.backup)
}

func (r *round) putBack(from string) error {
	r.broker.kill()
	return errors.Join(copyStore(from, r.broker.dir), r.broker.start())
}

func (r *round) deleteStream(f fault) error {
	nc, js, err := openStream(r.broker.url())
	if err != nil {
		return err
	}
	defer nc.Close()
	ctx, cancel := context.WithTimeout(r.ctx, 10*time.Second)
	defer cancel()
	// What was copied is no beginning of what the stream will be.
	r.backup = ""
	if err := js.DeleteStream(ctx, streamName); err != nil && !errors.Is(err, jetstream.ErrStreamNotFound) {
		return fmt.Errorf("delete the stream: %w", err)
	}
	r.wait(f.lasts)
	return nil
}

// copyStore makes to a copy of from, with nothing else in it.
func copyStore(from, to string) error {
	if err := os.RemoveAll(to); err != nil {
		return fmt.Errorf("copy the store: %w", err)
	}
	if err := os.CopyFS(to, os.DirFS(from)); err != nil {
		return fmt.Errorf("copy the store: %w", err)
	}
	return nil
}
