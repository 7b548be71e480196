package bridge

import (
	"cmp"
	"container/heap"
	"context"
	"errors"
	"time"

	"github.com/cenkalti/backoff/v5"
	"github.com/jackc/pgx/v5/pgtype"

	"ebb/decode"
	"ebb/event"
	"ebb/sink"
	"ebb/sql"
)

// deadHeap are queues by when they are due.
type deadHeap []*deadQueue

func (h deadHeap) Len() int           { return len(h) }
func (h deadHeap) Less(i, j int) bool { return h[i].due.Before(h[j].due) }
func (h deadHeap) Swap(i, j int) {
	h[i], h[j] = h[j], h[i]
	h[i].index, h[j].index = i, j
}
func (h *deadHeap) Push(x any) {
	q := x.(*deadQueue)
	q.index = len(*h)
	*h = append(*h, q)
}
func (h *deadHeap) Pop() any {
	last := len(*h) - 1
	q := (*h)[last]
	(*h)[last], *h = nil, (*h)[:last]
	q.index = -1
	return q
}

// schedule has a queue be retried when it is due, unless it is under way or parked.
func (d *deadLetters) schedule(q *deadQueue) {
	switch {
	case q.underWay || q.parked:
		if q.index >= 0 {
			heap.Remove(&d.due, q.index)
		}
	case q.index >= 0:
		heap.Fix(&d.due, q.index)
	default:
		heap.Push(&d.due, q)
	}
}

// afterWait is when a queue is due that has failed. The receiver may say for how long it wants to be left alone.
func (d *deadLetters) afterWait(q *deadQueue, asked time.Duration) time.Time {
	if q.wait == nil {
		q.wait = backoff.NewExponentialBackOff()
		q.wait.InitialInterval, q.wait.MaxInterval = cmp.Or(d.cfg.retryAfter, retryFirst), retryLast
	}
	next := q.wait.NextBackOff()
	if asked > 0 {
		next = asked
	}
	return time.Now().Add(next)
}

// settle records what came of retries, and says what is next.
func (d *deadLetters) settle(ctx context.Context, w *work) error {
	if err := d.cfg.at("retried"); err != nil {
		return err
	}
	var attempts []sql.Attempt
	for i := range w.dones {
		r := &w.dones[i]
		for _, l := range r.letters[:r.n] {
			attempts = append(attempts, sql.Attempt{Number: l.number, Delivered: true, Seq: r.seq})
		}
		if f := r.failure; f != nil && r.n < len(r.letters) {
			attempts = append(attempts, sql.Attempt{Number: r.letters[r.n].number, Key: r.queue.key, Rejected: f.Rejected, Reason: f.Reason, Detail: f.Detail,
				Attempts: f.Attempts})
		}
	}
	if err := sql.StoreAttempts(ctx, d.db, w.record, d.cfg.Destination, attempts); err != nil {
		return err
	}
	if err := d.cfg.at("settled"); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stored += uint64(len(w.dones))
	for i := range w.dones {
		r := &w.dones[i]
		q := r.queue
		q.underWay = false
		d.underWay--
		d.underWayBytes -= q.bytes
		switch f := r.failure; {
		case f == nil && q.key == nil && r.n == len(r.letters):
			delete(d.alone, q.number)
			if passed := r.letters[0].passed; d.passed[passed] == passedAlone {
				delete(d.passed, passed) // and so delivered again when it comes by
			}
			continue
		case f == nil:
			q.wait, q.due = nil, time.Now()
			if n := len(r.letters); n > 0 { // of events of this size, about as many as may be sent at once
				q.most = max(1, min(retryEvents, 2*retryBytes*n/max(q.bytes, 1)))
			}
		case f.Rejected && q.key == nil:
			delete(d.alone, q.number)
			continue
		case f.Rejected: // and parked, unless it was discarded meanwhile: the table tells
			q.wait, q.due, q.most = nil, time.Now(), 1
		default:
			q.due, q.most = d.afterWait(q, f.After), 1
		}
		d.schedule(q)
	}
	return nil
}

// lookAtTable finds out what others have decided.
func (d *deadLetters) lookAtTable(ctx context.Context, w *work) error {
	began := time.Now()
	slot := w.record.Name
	held, err := sql.HeldKeys(ctx, d.db, slot)
	if err != nil {
		return err
	}
	// What was parked when the stream began may be discarded by now.
	discarded := map[string]passedEvent{}
	if err := sql.PassedLetters(ctx, d.db, slot, w.stream.from, true, func(p sql.PassedLetter) {
		discarded[string(appendPassed(nil, p.ID, p.Position))] = passedFinally
	}); err != nil {
		return err
	}
	now := time.Now()
	d.mu.Lock()
	for passed := range discarded {
		if d.passed == nil {
			d.passed = map[string]passedEvent{}
		}
		d.passed[passed] = passedFinally
	}
	there := make(map[string]bool, len(held))
	for _, h := range held {
		there[h.Key] = true
		q := d.hold(h.Key)
		if changed := !q.known || q.parked == h.Retrying; changed {
			q.known, q.parked, q.wait, q.due, q.most = true, !h.Retrying, nil, now, 1
			d.schedule(q)
		}
	}
	for key, q := range d.held {
		if !there[key] && !q.underWay {
			d.unhold(q)
		}
	}
	d.mu.Unlock()
	d.aloneThrough, d.aloneMore, d.aloneDue = 0, true, true
	d.looking = time.Since(began)
	d.nextLook = time.Now().Add(max(lookEvery, lookShare*d.looking))
	return nil
}

// unhold lets a key go of which there are no rows, unless letters wait for their commit. Then there will be, and nothing keeps them from being
// delivered.
func (d *deadLetters) unhold(q *deadQueue) {
	q.parked = false
	if q.index >= 0 {
		heap.Remove(&d.due, q.index)
	}
	if q.waiting == 0 {
		delete(d.held, *q.key)
	}
}

// retry hands over what is due, as far as there may be more under way, and returns when it is to be called again at the latest.
func (d *deadLetters) retry(ctx context.Context, w *work) (time.Time, error) {
	if err := d.findAlone(ctx, w.record.Name); err != nil {
		return time.Time{}, err
	}
	for d.underWay < retryQueues && d.underWayBytes < retryAllBytes {
		var queues []*deadQueue
		var names []sql.Queue
		var most []int
		for now := time.Now(); len(d.due) > 0 && !d.due[0].due.After(now) && d.underWay+len(queues) < retryQueues; {
			q := heap.Pop(&d.due).(*deadQueue)
			queues, names, most = append(queues, q), append(names, q.name()), append(most, q.most)
		}
		if len(queues) == 0 {
			break
		}
		next, err := sql.NextLetters(ctx, d.db, w.record.Name, names, most, retryBytes, retryAllBytes-d.underWayBytes)
		if err != nil {
			return time.Time{}, err
		}
		d.mu.Lock()
		for i, q := range queues {
			switch n := &next[i]; {
			case !n.Read:
				d.schedule(q)
			case len(n.Letters) > 0:
				if err := d.send(q, n.Letters); err != nil {
					d.mu.Unlock()
					return time.Time{}, err
				}
			case q.key == nil:
				delete(d.alone, q.number) // discarded
			case n.Parked:
				q.parked = true
			default:
				d.unhold(q)
			}
		}
		d.mu.Unlock()
		if err := d.cfg.at("read"); err != nil {
			return time.Time{}, err
		}
	}
	// Whoever is done with a retry wakes it, if there are too many under way.
	if len(d.due) > 0 && d.underWay < retryQueues && d.underWayBytes < retryAllBytes {
		return d.due[0].due, nil
	}
	return time.Now().Add(lookEvery), nil
}

// findAlone finds events without a key that are to be delivered.
func (d *deadLetters) findAlone(ctx context.Context, slot string) error {
	if !d.aloneMore || len(d.alone) > aloneAtOnce/2 {
		return nil
	}
	numbers, err := sql.AloneToRetry(ctx, d.db, slot, d.aloneThrough, aloneAtOnce/2)
	if err != nil {
		return err
	}
	d.aloneMore = len(numbers) == aloneAtOnce/2
	for _, n := range numbers {
		d.aloneThrough = n
		if d.alone[n] != nil {
			continue
		}
		q := &deadQueue{number: n, index: -1, most: 1, due: time.Now()}
		if !d.aloneDue {
			q.due = d.afterWait(q, 0)
		}
		d.alone[n] = q
		d.schedule(q)
	}
	d.aloneDue = d.aloneDue && d.aloneMore
	return nil
}

// send hands over the next events of a queue.
func (d *deadLetters) send(q *deadQueue, letters []sql.KeptLetter) error {
	batch := event.NewBatch()
	managed := decode.Managed()
	managed.ID = "" // what a row's id may be has nothing to do with that of a letter, which is stored
	sent := make([]retriedLetter, len(letters))
	for i := range letters {
		l := &letters[i]
		row := decode.Row{ID: []byte(l.ID), Topic: []byte(l.Topic), Payload: l.Payload, Headers: l.Headers, PayloadType: pgtype.JSONOID, Time: l.Time, Position: l.Position}
		if l.Key != nil {
			row.Key = append([]byte{}, *l.Key...)
		}
		if err := managed.AppendRow(batch, row); err != nil {
			return err
		}
		e := &batch.Events[i]
		e.ContentType, e.Origin, e.Replay = l.ContentType, event.Retried, l.Replay
		switch {
		case l.Fault != "":
			e.Fault = l.Fault
		case l.Payload == nil:
			e.Fault = "payload and payload_bytes of ebb.dead_letter are NULL; set one of them"
		}
		sent[i] = retriedLetter{number: l.Number, passed: string(appendPassed(nil, l.ID, l.Position))}
	}
	q.underWay, q.bytes = true, batch.Size()
	d.underWay++
	d.underWayBytes += q.bytes
	d.retries <- &sink.Retry{Batch: batch, Done: func(n int, seq uint64, failure *sink.Failure) {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.dones = append(d.dones, doneRetry{queue: q, letters: sent, n: min(n, len(sent)), seq: seq, failure: failure})
		d.told++
		d.wakeUp()
	}}
	return nil
}

// collect removes what was delivered long ago.
func (d *deadLetters) collect(ctx context.Context, w *work) error {
	if time.Now().Before(d.nextCollect) {
		return nil
	}
	removed, err := sql.CollectLetters(ctx, d.db, w.record, w.stream.tracker.snapshot().flush, d.cfg.TickKeep, collectAtOnce)
	if err != nil {
		return err
	}
	if removed < collectAtOnce { // otherwise again at once
		d.nextCollect = time.Now().Add(max(min(lookEvery, d.cfg.TickKeep/4), caughtUpPoll))
	}
	return nil
}

// findRetried finds out what a destination that can tell has of the kept events, in messages behind a sequence number, without that it is recorded. A
// tick was stored only when the outcome of every retry before it was, so that these are behind the newest one.
func (l *leader) findRetried(ctx context.Context, after uint64) error {
	scanner, ok := l.Sink.(sink.Scanner)
	if !ok {
		return nil
	}
	waits, err := sql.HasLetters(ctx, l.db, l.Slot)
	if !waits || err != nil {
		return err
	}
	var found []sql.Retried
	store := func() error {
		if len(found) == 0 {
			return nil
		}
		err := sql.MarkRetried(ctx, l.db, l.record, l.Destination, found)
		found = found[:0]
		return err
	}
	err = scanner.Scan(ctx, after, func(m sink.Stored) error {
		if m.Origin != event.Retried {
			return nil
		}
		found = append(found, sql.Retried{ID: string(m.ID), Seq: m.Sequence, Epoch: m.Position.Epoch})
		if len(found) < foundAtOnce {
			return nil
		}
		return store()
	})
	return errors.Join(err, store())
}
