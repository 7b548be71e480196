package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"
	"time"

	"golang.org/x/sync/errgroup"

	"ebb/bench/rig"
)

const (
	// receiverDelay is how long the receiver takes over an event.
	receiverDelay = time.Millisecond
	connections   = 16
)

// measureRate compares one connection with several, of ebb run and of loops around an http.Client, which do nothing else.
func (b *bench) measureRate(ctx context.Context) error {
	loops, bridges := make([]float64, b.rounds), make([]float64, b.rounds)
	var single, several, alone, together float64
	for i := range b.rounds {
		var err error
		if alone, err = b.loops(ctx, 1, b.events/connections); err != nil {
			return err
		}
		if together, err = b.loops(ctx, connections, b.events); err != nil {
			return err
		}
		if single, err = b.bridge(ctx, 1, b.events/connections); err != nil {
			return err
		}
		if several, err = b.bridge(ctx, connections, b.events); err != nil {
			return err
		}
		loops[i], bridges[i] = together/alone, several/single
		fmt.Fprintf(b.out, "  round %d: loops %.0f and %.0f events/s, ebb run %.0f and %.0f events/s\n", i+1, alone, together, single, several)
	}
	fmt.Fprintf(b.out, "%d connections to a receiver that takes %s, against one: loops %.1f times the rate, ebb run %.1f times (medians of %d)\n",
		connections, receiverDelay, rig.Median(loops), rig.Median(bridges), b.rounds)
	return nil
}

// loops returns the rate of so many loops that post a payload each and wait for the answer.
func (b *bench) loops(ctx context.Context, n, events int) (float64, error) {
	r := newReceiver(receiverDelay)
	defer r.Close()
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: n}}
	defer client.CloseIdleConnections()
	var g errgroup.Group
	began := time.Now()
	for i := range n {
		g.Go(func() error {
			for k := range events / n {
				req, err := http.NewRequestWithContext(ctx, http.MethodPost, r.URL, bytes.NewReader(fmt.Appendf(nil, `"%d %d"`, k, began.UnixMicro())))
				if err != nil {
					return err
				}
				req.Header.Set("Ce-Subject", strconv.Itoa(i))
				resp, err := client.Do(req)
				if err != nil {
					return err
				}
				if _, err := io.Copy(io.Discard, resp.Body); err != nil {
					return err
				}
				if err := resp.Body.Close(); err != nil {
					return err
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return 0, err
	}
	took := time.Since(began)
	_, _, err := r.count()
	return float64(events/n*n) / took.Seconds(), err
}

// bridge returns the rate at which ebb run delivers what waits in the buffer, from the first event on.
func (b *bench) bridge(ctx context.Context, n, events int) (float64, error) {
	r := newReceiver(receiverDelay)
	defer r.Close()
	if err := b.Setup(ctx, r.URL, fmt.Sprintf("http: {concurrency: %d}\n", n)); err != nil {
		return 0, err
	}
	db, err := b.Connect(ctx)
	if err != nil {
		return 0, err
	}
	defer db.Close(ctx)
	if _, err := db.Exec(ctx, `INSERT INTO ebb.buffer (topic, key, payload)
		SELECT 't', 'key-' || i % 100, to_json(i / 100 || ' 0') FROM generate_series(0, $1 - 1) i`, events); err != nil {
		return 0, err
	}
	p, err := b.Start(ctx, os.Stderr)
	if err != nil {
		return 0, err
	}
	var began time.Time
	for {
		taken, _, err := r.count()
		if err != nil {
			return 0, err
		}
		if taken > 0 && began.IsZero() {
			began = time.Now()
		}
		if taken == events {
			break
		}
		select {
		case <-r.changed:
		case <-ctx.Done():
			return 0, ctx.Err()
		}
	}
	rate := float64(events) / time.Since(began).Seconds()
	_, err = p.Stop()
	return rate, err
}
