package webhook

import (
	"context"
	"fmt"
	"sync"
	"time"

	"ebb/event"
	"ebb/sink"
	"ebb/sink/cloudevent"
)

// running is a Run under way. One goroutine uses it; each request has one of its own, which ends with an outcome.
type running struct {
	sink  *Sink
	lanes *lanes
	out   sink.Outcome

	outcomes chan outcome
	requests sync.WaitGroup
	kept     keeping

	open      bool         // there may be more batches
	batch     *event.Batch // of which some events are not taken in yet
	taken     int          // how many are
	more      bool         // one is to be taken in from the reserve
	buf       []byte
	rejection *sink.RejectedError

	retries map[*lane]*retry
	endAt   time.Time // of the retries that nothing else waits for
}

// outcome is what came of an attempt; failure is nil when the receiver has taken the job.
type outcome struct {
	job     *job
	failure *failure
}

// retry is a [sink.Retry] under way.
type retry struct {
	done      func(n int, seq uint64, failure *sink.Failure)
	delivered int
	// refusal is why the event behind those of the lane cannot be sent.
	refusal *sink.Failure
}

// keeping brings what the dead letters have committed to the goroutine of a Run.
type keeping struct {
	ready chan struct{}

	mu      sync.Mutex
	parcels []*parcel
}

// add does not wait. Once the Run has ended, it does no harm.
func (k *keeping) add(parcels ...*parcel) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.parcels = append(k.parcels, parcels...)
	select {
	case k.ready <- struct{}{}:
	default:
	}
}

func (k *keeping) take() []*parcel {
	k.mu.Lock()
	defer k.mu.Unlock()
	parcels := k.parcels
	k.parcels = nil
	return parcels
}

func newRunning(s *Sink, out sink.Outcome) *running {
	limits := s.limits
	if out.Parks() {
		limits.reserve = min(limits.window/10, 2*breakAfter)
	}
	return &running{
		sink: s, lanes: newLanes(limits), out: out, outcomes: make(chan outcome, s.limits.requests), kept: keeping{ready: make(chan struct{}, 1)},
		open: true, retries: map[*lane]*retry{},
	}
}

// endGrace is how long what is retried may hold up the end of a Run.
const endGrace = time.Second

// run is [Sink.Run].
func (r *running) run(ctx context.Context, in <-chan *event.Batch) error {
	ctx, cancel := context.WithCancel(ctx)
	defer func() {
		cancel()
		r.requests.Wait()
		r.leave()
	}()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		r.take()
		r.parkRefused()
		r.send(ctx)
		acted, at := r.setAside()
		if acted {
			continue // others may go now
		}
		ending := !r.open || r.rejection != nil
		if ending {
			at = earlier(at, r.endRetries())
		}
		if r.batch == nil && r.lanes.empty() && len(r.retries) == 0 {
			switch {
			case r.rejection != nil:
				return r.rejection
			case !r.open:
				return nil
			}
		}
		var batches <-chan *event.Batch
		var retries <-chan *sink.Retry
		if !ending {
			if r.batch == nil {
				batches = in
			}
			if r.out.Dead != nil {
				retries = r.out.Dead.Retries()
			}
		}
		timer.Stop()
		if at = earlier(at, r.lanes.wake()); !at.IsZero() {
			timer.Reset(time.Until(at))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case batch, ok := <-batches:
			if r.open = ok; !ok {
				break
			}
			r.batch, r.taken = batch, 0
		case again := <-retries:
			r.retry(again)
		case o := <-r.outcomes:
			if o.failure != nil && ctx.Err() != nil {
				return ctx.Err() // which is why it failed
			}
			r.settle(o)
		case <-r.kept.ready:
			r.deliver(r.lanes.kept(r.kept.take()))
		case <-timer.C:
		}
	}
}

// earlier returns the earlier one of two times, of which zero is never.
func earlier(a, b time.Time) time.Time {
	if a.IsZero() || !b.IsZero() && b.Before(a) {
		return b
	}
	return a
}

// take takes in what there is room for. Unless it is parked, an event that can never be sent ends that: what is before it is delivered,
// and nothing behind it begun.
func (r *running) take() {
	for r.batch != nil {
		if r.taken == len(r.batch.Events) {
			r.batch.Release()
			r.batch = nil
			return
		}
		e := &r.batch.Events[r.taken]
		if !r.lanes.room(e.Size(), r.more) {
			return
		}
		r.more = false
		r.taken++
		p := &parcel{position: e.Position, size: e.Size()}
		if r.out.Dead != nil && r.out.Dead.Queue(e, func() { r.kept.add(p) }) {
			r.lanes.hold(p)
			continue
		}
		r.sink.pack(p, e, &r.buf)
		if p.refusal != nil && !r.out.Parks() {
			r.rejection = &sink.RejectedError{ID: string(e.ID), Position: e.Position, Err: p.refusal}
			r.batch.Release()
			r.batch = nil
			return
		}
		r.lanes.add(p, e.Key)
	}
}

// send sends what may go now.
func (r *running) send(ctx context.Context) {
	now := time.Now()
	for j := r.lanes.next(now); j != nil; j = r.lanes.next(now) {
		ctx, cancel := context.WithCancelCause(ctx)
		j.cancel = func() { cancel(errAside) }
		r.requests.Go(func() { r.outcomes <- outcome{j, r.sink.attempt(ctx, j.parcels)} })
	}
}

// settle decides what an outcome leads to.
func (r *running) settle(o outcome) {
	j, f, now := o.job, o.failure, time.Now()
	j.cancel()
	if f != nil && !f.cancelled {
		j.failure = f
	}
	wasDown := r.lanes.down
	switch {
	case j.parcels[0].lane.retry:
		r.settleRetry(j, f, now)
	case f == nil:
		r.sink.report.delivered(j)
		for _, p := range j.parcels {
			p.empty()
		}
		r.deliver(r.lanes.delivered(j, now))
	case len(j.parcels) == 1 && r.parks(j, f):
		reason, detail := r.sink.report.why(f)
		r.park(r.lanes.rejected(j, now), reason, detail, false)
	case f.cancelled && (r.lanes.down || !r.lanes.tried(j)): // its connection may be dead since the receiver was away
		j.aside = false
		r.lanes.resend(j, now)
	case j.aside && !r.lanes.down:
		r.giveWay(j, now)
	case len(j.parcels) > 1 && f.needsSplit(j.attempts, r.lanes.takesOthers(j)):
		r.sink.report.split(j, f)
		r.lanes.split(j, now)
	default:
		// Where nothing is parked, an event that was rejected holds up its key.
		j.aside = false
		wait := r.lanes.failed(j, now, f.retryAfter)
		r.sink.report.failed(j, f, wait)
	}
	if r.lanes.down != wasDown {
		r.sink.report.down(r.lanes.down)
	}
}

// parks reports whether the only event of j is parked for a failure. A rejection that may be of all events alike must be repeated while the
// receiver takes others: a wrong URL, or a token that has expired, must not empty the buffer into the dead letters.
func (r *running) parks(j *job, f *failure) bool {
	return r.out.Parks() && (f.rejectsContent() || f.rejects() && j.attempts >= patience && r.lanes.takesOthers(j))
}

// deliver tells that n events more are delivered or kept, as all before them are.
func (r *running) deliver(n int, last *parcel) {
	if n > 0 {
		r.sink.position = last.position
		r.out.Delivered(sink.Progress{Events: n, Position: last.position})
	}
}

// parkRefused parks what cannot be sent, once it is the first one of its key.
func (r *running) parkRefused() {
	for parcels := r.lanes.takeRefused(); parcels != nil; parcels = r.lanes.takeRefused() {
		f := refusal(parcels[0].refusal)
		r.park(parcels, f.Reason, f.Detail, false)
	}
}

// refusal says why an event can never be sent.
func refusal(err error) *sink.Failure {
	reason, detail := cloudevent.Explain(err)
	return &sink.Failure{Rejected: true, Reason: reason, Detail: detail}
}

// park hands events of one key to the dead letters: the first one for a reason, the others because they are behind it.
func (r *running) park(parcels []*parcel, reason, detail string, again bool) {
	letters := make([]sink.Letter, len(parcels))
	for i, p := range parcels {
		letters[i] = sink.Letter{Event: &p.event, Reason: sink.Queued, Attempts: p.attempts, FirstAt: p.first, LastAt: p.last, Retry: again}
	}
	letters[0].Reason, letters[0].Detail = reason, detail
	r.sink.report.parked(letters)
	r.out.Dead.Park(letters, func() { r.kept.add(parcels...) })
	for _, p := range parcels {
		p.empty()
	}
}

// setAside has the oldest event give way, if that is all that the window, or the end of the Run, waits for. It returns whether it did, or else when
// to look again.
func (r *running) setAside() (acted bool, at time.Time) {
	if r.batch == nil && r.open || !r.out.Parks() {
		return false, time.Time{}
	}
	now := time.Now()
	j, more, at := r.lanes.stuck(now, !r.open && r.batch == nil)
	switch {
	case more && r.lanes.room(r.batch.Events[r.taken].Size(), true):
		r.more = true
		return true, time.Time{}
	case j == nil:
		return false, at
	case j.inFlight: // and is settled when that has ended
		j.aside = true
		j.cancel()
		return false, time.Time{}
	}
	r.giveWay(j, now)
	return true, time.Time{}
}

// giveWay sets the lane of a job aside that is stuck. Where it holds several events, they go on one by one: it may be one of them.
func (r *running) giveWay(j *job, now time.Time) {
	f := j.failure
	if f == nil {
		f = &failure{reason: "no answer"}
	}
	if len(j.parcels) > 1 {
		r.sink.report.split(j, f)
		r.lanes.scatter(j, now)
		return
	}
	reason, detail := r.sink.report.why(f)
	if j.failure == nil {
		detail = fmt.Sprintf("none within %v, while others were delivered", now.Sub(j.first).Round(100*time.Millisecond))
	}
	r.park(r.lanes.setAside(j, now), reason, detail, true)
}

// retry takes in what is to be delivered out of turn.
func (r *running) retry(again *sink.Retry) {
	re := &retry{done: again.Done}
	var parcels []*parcel
	for i := range again.Batch.Events {
		p := &parcel{}
		r.sink.pack(p, &again.Batch.Events[i], &r.buf)
		if p.refusal != nil {
			re.refusal = refusal(p.refusal)
			break
		}
		parcels = append(parcels, p)
	}
	again.Batch.Release()
	if len(parcels) == 0 {
		re.done(0, 0, re.refusal)
		return
	}
	r.retries[r.lanes.retry(parcels)] = re
}

// settleRetry is settle for a job of a retry, which its first failure ends.
func (r *running) settleRetry(j *job, f *failure, now time.Time) {
	ln := j.parcels[0].lane
	re := r.retries[ln]
	end := func(failure *sink.Failure) {
		delete(r.retries, ln)
		re.done(re.delivered, 0, failure)
	}
	switch {
	case f == nil:
		r.sink.report.delivered(j)
		re.delivered += len(j.parcels)
		r.lanes.delivered(j, now)
		if len(ln.parcels) == 0 {
			end(re.refusal)
		}
	case f.cancelled:
		r.lanes.ended(j, now, 0)
		end(nil)
	case len(j.parcels) > 1 && f.rejectsContent():
		r.lanes.split(j, now)
	default:
		reason, detail := r.sink.report.why(f)
		failure := &sink.Failure{
			Rejected: f.rejectsContent() || f.rejects() && len(j.parcels) == 1 && r.lanes.works(),
			Reason:   reason, Detail: detail, Attempts: j.parcels[0].attempts, After: f.retryAfter,
		}
		r.lanes.ended(j, now, f.retryAfter)
		end(failure)
	}
}

// endRetries ends those that are not in flight, when the Run is to end. Of those that are, it returns when they are cancelled, if nothing else is
// waited for.
func (r *running) endRetries() time.Time {
	for ln, re := range r.retries {
		if ln.busy == 0 {
			delete(r.retries, ln)
			r.lanes.drop(ln)
			re.done(re.delivered, 0, nil)
		}
	}
	if len(r.retries) == 0 || r.batch != nil || !r.lanes.empty() {
		return time.Time{}
	}
	now := time.Now()
	if r.endAt.IsZero() {
		r.endAt = now.Add(endGrace)
	}
	if now.Before(r.endAt) {
		return r.endAt
	}
	for ln := range r.retries {
		ln.parcels[0].job.cancel()
	}
	return time.Time{}
}

// leave gives back what was not delivered, and says how far the retries came. There are no requests any more.
func (r *running) leave() {
	if r.batch != nil {
		r.batch.Release()
	}
	for len(r.outcomes) > 0 {
		o := <-r.outcomes
		if re := r.retries[o.job.parcels[0].lane]; re != nil && o.failure == nil {
			re.delivered += len(o.job.parcels)
		}
	}
	for _, re := range r.retries {
		re.done(re.delivered, 0, nil)
	}
}
