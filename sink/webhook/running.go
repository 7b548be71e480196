package webhook

import (
	"context"
	"sync"
	"time"

	"ebb/event"
	"ebb/sink"
)

// running is a Run under way. One goroutine uses it; each request has one of its own, which ends with an outcome.
type running struct {
	sink      *Sink
	lanes     *lanes
	delivered sink.Delivered

	outcomes chan outcome
	requests sync.WaitGroup

	batch     *held // of which some events are not taken in yet
	taken     int   // how many are
	buf       []byte
	rejection *sink.RejectedError
}

// held is a batch that is needed until its events are delivered, or written to memory of their own.
type held struct {
	batch *event.Batch
	left  int
}

// done says that one event less is needed.
func (h *held) done() {
	if h.left--; h.left == 0 {
		h.batch.Release()
	}
}

// outcome is what came of an attempt; failure is nil when the receiver has taken the job.
type outcome struct {
	job     *job
	failure *failure
}

// run is [Sink.Run].
func (r *running) run(ctx context.Context, in <-chan *event.Batch) error {
	ctx, cancel := context.WithCancel(ctx)
	defer func() {
		cancel()
		r.requests.Wait()
		r.release()
	}()
	timer := time.NewTimer(0)
	defer timer.Stop()
	open := true
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		r.take()
		r.send(ctx)
		if r.batch == nil && r.lanes.empty() {
			switch {
			case r.rejection != nil:
				return r.rejection
			case !open:
				return nil
			}
		}
		source := in
		if r.batch != nil || !open || r.rejection != nil {
			source = nil
		}
		timer.Stop()
		if at := r.lanes.wake(); !at.IsZero() {
			timer.Reset(time.Until(at))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case batch, ok := <-source:
			if open = ok; !ok {
				break
			}
			if len(batch.Events) == 0 {
				batch.Release()
				break
			}
			r.batch, r.taken = &held{batch: batch, left: len(batch.Events)}, 0
		case o := <-r.outcomes:
			r.settle(o)
		case <-timer.C:
		}
	}
}

// take takes in what there is room for. An event that can never be sent ends that: what is before it is delivered, and nothing behind
// it begun.
func (r *running) take() {
	for r.batch != nil && r.rejection == nil {
		e := &r.batch.batch.Events[r.taken]
		if !r.lanes.room(e.Size()) {
			return
		}
		p, err := r.sink.pack(e, r.batch, &r.buf)
		if err != nil {
			r.rejection = &sink.RejectedError{ID: string(e.ID), Position: e.Position, Err: err}
			for range len(r.batch.batch.Events) - r.taken {
				r.batch.done()
			}
			r.batch = nil
			return
		}
		r.lanes.add(p, e.Key)
		b := r.batch
		if r.taken++; r.taken == len(b.batch.Events) {
			r.batch = nil
		}
		if p.held == nil {
			b.done()
		}
	}
}

// send sends what may go now.
func (r *running) send(ctx context.Context) {
	now := time.Now()
	for j := r.lanes.next(now); j != nil; j = r.lanes.next(now) {
		r.requests.Go(func() { r.outcomes <- outcome{j, r.sink.attempt(ctx, j.parcels)} })
	}
}

// settle decides what an outcome leads to.
func (r *running) settle(o outcome) {
	j, f, now := o.job, o.failure, time.Now()
	wasDown := r.lanes.down
	switch {
	case f == nil:
		r.sink.report.delivered(j)
		for _, p := range j.parcels {
			if p.held != nil {
				p.held.done()
				p.held, p.event = nil, nil
			}
			p.body = nil
		}
		n, last := r.lanes.delivered(j)
		if n > 0 {
			r.sink.position = last.position
			r.delivered(sink.Progress{Events: n, Position: last.position})
		}
	case len(j.parcels) > 1 && f.concernsContent(j.attempts):
		r.sink.report.split(j, f)
		r.lanes.split(j, now)
	default:
		// Nothing is ever given up: as long as an event cannot be set aside, one that was rejected holds up its key. When it can be, here is
		// where f.rejects() decides on it.
		wait := r.lanes.failed(j, now, f.retryAfter)
		r.sink.report.failed(j, f, wait)
	}
	if r.lanes.down != wasDown {
		r.sink.report.down(r.lanes.down)
	}
}

// release gives back what was not delivered. No request reads it any more.
func (r *running) release() {
	for _, p := range r.lanes.queue {
		if p.held != nil && !p.delivered {
			p.held.done()
		}
	}
	if r.batch != nil {
		for range len(r.batch.batch.Events) - r.taken {
			r.batch.done()
		}
	}
}
