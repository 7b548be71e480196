package bridge

import (
	"bytes"
	"context"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"

	"ebb/event"
	"ebb/sink"
	"ebb/sql"
)

const (
	// So many letters, or so much content, are committed at once, at most.
	lettersAtOnce = 1000
	letterBytes   = 1 << 20
	// Of a queue, so many events or so much content are retried at once, at most; of all of them so many queues and so much content.
	retryEvents   = 100
	retryBytes    = 1 << 20
	retryQueues   = 32
	retryAllBytes = 8 << 20
	// attemptsAtOnce is how many outcomes are stored at once, at most.
	attemptsAtOnce = 5000
	// retryFirst and retryLast bound the time between two attempts at a queue.
	retryFirst, retryLast = time.Second, 30 * time.Second
	// lookEvery is how often the table is looked at, in case that a notification was lost. A look takes a hundredth of the time, at most.
	lookEvery = time.Minute
	lookShare = 100
	// aloneAtOnce bounds the queues of events without a key that are known at once.
	aloneAtOnce = 10_000
	// finishTimeout bounds the end of a lead, in which what was retried is still stored.
	finishTimeout = 2 * time.Second
	// collectAtOnce is how many delivered letters are removed at once, at most.
	collectAtOnce = 5000
	// foundAtOnce is how many messages that were found are stored at once.
	foundAtOnce = 1000
)

// deadLetters keeps what a sink does not deliver in the table, and has it delivered from there. One goroutine has a session for that, from the
// beginning of a term to its end, and does one thing after the other: it commits letters in the order in which they came, records what was retried,
// and reads what is to be retried next. What a sink calls only takes the mutex.
//
// A key is held from its first letter on until its queue is empty, both in the table and of letters that wait for their commit. As only that goroutine
// writes letters, and finds out under the mutex that there are none, no event is delivered before an earlier one of its key.
//
// What waits for its commit is in memory. It is bounded by the windows of the sink: an event that is kept counts as delivered only once it is
// committed, so that a sink whose window is full takes in no more; and the copy has no more than the event's own content.
type deadLetters struct {
	cfg *Config
	db  *pgxConn
	// retries has room for all that may be under way.
	retries chan *sink.Retry
	wake    chan struct{}
	done    chan struct{}

	mu     sync.Mutex
	record sql.SlotRecord
	held   map[string]*deadQueue
	// passed are events that may come by, and are not to be delivered then.
	passed  map[string]passedEvent
	letters []letter
	dones   []doneRetry
	// told and stored count retries that a sink is done with, and those of them whose outcome is stored.
	told, stored uint64
	// look asks for a look at the table, and finish for the end once there is nothing left to store.
	look, finish bool
	// stream, unless nil, is what events come from, and what is kept is retried beside it.
	stream *keptStream

	// What follows is used by the goroutine alone.

	due deadHeap
	// alone are the queues of events without a key, by number, up to aloneThrough; aloneMore says that there may be more behind that, and aloneDue that
	// they are due, and were not set aside a moment ago.
	alone                 map[int64]*deadQueue
	aloneThrough          int64
	aloneMore, aloneDue   bool
	underWay              int
	underWayBytes         int
	nextLook, nextCollect time.Time
	looking               time.Duration
}

// keptStream is what deadLetters knows of the stream.
type keptStream struct {
	// from is where it begins.
	from    event.LSN
	tracker *tracker
	// after is up to where events are to be delivered before anything is retried. In a destination in which each message names the one before it, those
	// that another bridge has sent may still arrive, or may not: they are to be found in the places where that has put them.
	after event.LSN
}

func (s *keptStream) allowsRetries() bool { return s.tracker.snapshot().write >= s.after }

// letter is one that waits for its commit.
type letter struct {
	sql.Letter
	size int
	// streamed says that it came by the stream, at the place that its position names.
	streamed bool
	queue    *deadQueue
	// kept, unless nil, is to be called when it is committed.
	kept func()
}

// doneRetry is a retry that a sink is done with.
type doneRetry struct {
	queue   *deadQueue
	letters []retriedLetter
	n       int
	seq     uint64
	failure *sink.Failure
}

// retriedLetter is one that is under way.
type retriedLetter struct {
	number int64
	passed string
}

// passedEvent says why an event is not to be delivered when it comes by.
type passedEvent int

const (
	// passedFinally is an event that is kept or was delivered in this epoch, or is discarded.
	passedFinally passedEvent = iota
	// passedAlone is one from an earlier epoch without a key, while it waits.
	passedAlone
)

// deadQueue are the kept events of a key, or one without.
type deadQueue struct {
	// key is nil if there is none, and number is then that of the event.
	key    *string
	number int64
	// waiting is how many letters wait for their commit. It is guarded by the mutex.
	waiting int

	// known says that something is known of the rows in the table; parked that they are not to be delivered.
	known, parked, underWay bool
	// index is that in the heap, or -1.
	index int
	due   time.Time
	wait  *backoff.ExponentialBackOff
	// most is how many events are retried next, at most.
	most  int
	bytes int
}

func (q *deadQueue) name() sql.Queue { return sql.Queue{Key: q.key, Number: q.number} }

var _ sink.DeadLetters = (*deadLetters)(nil)

func newDeadLetters(cfg *Config) *deadLetters {
	return &deadLetters{cfg: cfg, retries: make(chan *sink.Retry, retryQueues), wake: make(chan struct{}, 1), done: make(chan struct{}),
		held: map[string]*deadQueue{}, alone: map[int64]*deadQueue{}}
}

// open reads which keys are held, and starts the goroutine, whose error it hands to fail. The term has been taken: nobody else writes any more.
func (d *deadLetters) open(ctx context.Context, db *pgxConn, record sql.SlotRecord, fail func(error)) error {
	d.db, d.record = db, record
	if err := d.holdKeys(ctx, db); err != nil {
		return err
	}
	if n := len(d.held); n > 0 {
		d.cfg.Logger.Info("events of some keys are held in the dead letters; see ebb dead list", "slot", record.Name, "keys", n)
	}
	go func() {
		defer close(d.done)
		if err := d.run(ctx); err != nil && ctx.Err() == nil {
			fail(err)
		}
	}()
	return nil
}

// openDead opens the dead letters, in a session of their own on the server that has the lock. What it returns closes them once ctx is cancelled, which it does.
func (l *leader) openDead(ctx context.Context, cancel context.CancelCauseFunc) (func(), error) {
	db, err := sql.Connect(ctx, l.Postgres, l.Slot)
	if err != nil {
		return nil, err
	}
	shares, err := sql.SharesServer(ctx, db, l.lockPID)
	if err == nil && !shares {
		err = errTwoServers
	}
	if err == nil {
		err = l.dead.open(ctx, db, l.record, cancel)
	}
	if err != nil {
		closeQuietly(db)
		return nil, err
	}
	return func() {
		cancel(nil)
		<-l.dead.done
		closeQuietly(db)
	}, nil
}

// holdKeys holds the keys that have a queue in the table.
func (d *deadLetters) holdKeys(ctx context.Context, db *pgxConn) error {
	held, err := sql.HeldKeys(ctx, db, d.cfg.Slot)
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, h := range held {
		d.hold(h.Key)
	}
	return nil
}

// setRecord is called when the record has another term.
func (d *deadLetters) setRecord(r sql.SlotRecord) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.record = r
}

// begin is called when events come from the stream. From then on, what is kept is retried.
func (d *deadLetters) begin(s *keptStream, passed map[string]passedEvent) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stream, d.passed, d.look = s, passed, true
	d.wakeUp()
}

// decided is called when somebody has changed the table.
func (d *deadLetters) decided() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.look = true
	d.wakeUp()
}

// end has everything stored that came of retries, and waits for that.
func (d *deadLetters) end(ctx context.Context) {
	d.mu.Lock()
	d.finish = true
	d.wakeUp()
	d.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, finishTimeout)
	defer cancel()
	select {
	case <-d.done:
	case <-ctx.Done(): // it is retried or found once more
	}
}

// retried is how many retries a sink is done with so far.
func (d *deadLetters) retried() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.told
}

// hasStored reports whether the outcome of the first so many retries is stored.
func (d *deadLetters) hasStored(n uint64) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.stored >= n
}

func (d *deadLetters) wakeUp() {
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

// hold returns the queue of a key, which is held from now on.
func (d *deadLetters) hold(key string) *deadQueue {
	q := d.held[key]
	if q == nil {
		q = &deadQueue{key: &key, index: -1, most: 1}
		d.held[key] = q
	}
	return q
}

// Queue keeps an event if earlier ones of its key are kept, or if it was kept when it came by before.
func (d *deadLetters) Queue(e *event.Event, kept func()) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	var q *deadQueue
	if e.Key != nil {
		q = d.held[string(e.Key)]
	}
	if passed := d.hasPassed(e); q == nil && !passed {
		return false
	}
	// Should the queue be empty when this is committed, nothing keeps it from being delivered. What is there already stays as it is.
	l := newLetter(&sink.Letter{Event: e, Reason: sink.Queued, Retry: true})
	l.queue, l.kept = q, kept
	d.put(l)
	return true
}

// hasPassed reports whether an event that comes by is not to be delivered. It comes by once.
func (d *deadLetters) hasPassed(e *event.Event) bool {
	if len(d.passed) == 0 || e.Origin != event.Streamed {
		return false
	}
	var room [64]byte
	key := appendPassed(room[:0], e.ID, e.Position)
	_, ok := d.passed[string(key)]
	if ok {
		delete(d.passed, string(key))
	}
	return ok
}

// appendPassed appends what names an event, in whatever epoch.
func appendPassed[ID string | []byte](b []byte, id ID, at event.Position) []byte {
	return append(sql.AppendPlace(b, at), id...)
}

// Park keeps letters, and holds their key.
func (d *deadLetters) Park(letters []sink.Letter, kept func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := range letters {
		l := newLetter(&letters[i])
		if l.Key != nil {
			l.queue = d.hold(*l.Key)
		}
		if i == len(letters)-1 {
			l.kept = kept
		}
		d.put(l)
	}
}

func (d *deadLetters) put(l letter) {
	if l.queue != nil {
		l.queue.waiting++
	}
	d.letters = append(d.letters, l)
	d.wakeUp()
}

// Retries gives what is to be delivered out of turn.
func (d *deadLetters) Retries() <-chan *sink.Retry { return d.retries }

// newLetter copies a letter and its event, whose memory is the sink's.
func newLetter(from *sink.Letter) letter {
	e := from.Event
	l := letter{size: e.Size() + len(from.Detail), streamed: e.Origin == event.Streamed, Letter: sql.Letter{
		ID: string(e.ID), Topic: string(e.Topic), Payload: bytes.Clone(e.Payload), ContentType: e.ContentType,
		Headers: sql.HeadersJSON(e.Headers), Time: e.Time, Position: e.Position, Replay: e.Replay, Fault: e.Fault,
		Reason: from.Reason, Detail: from.Detail, Attempts: from.Attempts, FirstAt: from.FirstAt, LastAt: from.LastAt, Retry: from.Retry,
	}}
	if e.Key != nil {
		key := string(e.Key)
		l.Key = &key
	}
	return l
}

// work is what there is to do.
type work struct {
	record       sql.SlotRecord
	letters      []letter
	dones        []doneRetry
	look, finish bool
	stream       *keptStream
}

func (w *work) isNone() bool { return len(w.letters) == 0 && len(w.dones) == 0 && !w.look }

// take takes some of what there is to do.
func (d *deadLetters) take() work {
	d.mu.Lock()
	defer d.mu.Unlock()
	w := work{record: d.record, stream: d.stream, finish: d.finish}
	n, size := 0, 0
	for n < len(d.letters) && n < lettersAtOnce && (n == 0 || size+d.letters[n].size <= letterBytes) {
		size += d.letters[n].size
		n++
	}
	if w.letters, d.letters = d.letters[:n:n], d.letters[n:]; len(d.letters) == 0 {
		d.letters = nil
	}
	n, events := 0, 0
	for n < len(d.dones) && events < attemptsAtOnce {
		events += len(d.dones[n].letters)
		n++
	}
	if w.dones, d.dones = d.dones[:n:n], d.dones[n:]; len(d.dones) == 0 {
		d.dones = nil
	}
	w.look = d.stream != nil && (d.look || time.Now().After(d.nextLook))
	if w.look {
		d.look = false
	}
	return w
}

// run does what there is to do, until ctx ends or everything is stored that is to be before the end.
func (d *deadLetters) run(ctx context.Context) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		w := d.take()
		if len(w.letters) > 0 {
			if err := d.store(ctx, &w); err != nil {
				return err
			}
		}
		if len(w.dones) > 0 {
			if err := d.settle(ctx, &w); err != nil {
				return err
			}
		}
		if w.finish {
			if len(w.letters) == 0 && len(w.dones) == 0 {
				return nil
			}
			continue
		}
		next := time.Now().Add(lookEvery)
		if w.stream != nil {
			if w.look {
				if err := d.lookAtTable(ctx, &w); err != nil {
					return err
				}
			}
			if w.stream.allowsRetries() {
				var err error
				if next, err = d.retry(ctx, &w); err != nil {
					return err
				}
			} else {
				next = time.Now().Add(caughtUpPoll)
			}
			if err := d.collect(ctx, &w); err != nil {
				return err
			}
			next = minTime(next, d.nextLook, d.nextCollect)
		}
		if !w.isNone() {
			continue
		}
		timer.Reset(time.Until(next))
		select {
		case <-d.wake:
		case <-timer.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

func minTime(first time.Time, others ...time.Time) time.Time {
	for _, t := range others {
		if t.Before(first) {
			first = t
		}
	}
	return first
}

// store commits letters, and tells the sink.
func (d *deadLetters) store(ctx context.Context, w *work) error {
	if err := d.cfg.at("park"); err != nil {
		return err
	}
	letters := make([]sql.Letter, len(w.letters))
	for i := range w.letters {
		letters[i] = w.letters[i].Letter
	}
	if err := sql.StoreLetters(ctx, d.db, w.record, letters); err != nil {
		return err
	}
	if err := d.cfg.at("parked"); err != nil {
		return err
	}
	if w.stream != nil {
		if err := d.span(ctx, w); err != nil {
			return err
		}
	}
	d.mu.Lock()
	for i := range w.letters {
		l := &w.letters[i]
		switch q := l.queue; {
		case q != nil:
			q.waiting--
			if !q.known {
				// The first letters of a key.
				if q.known, q.parked = true, !l.Retry; l.Retry {
					q.due = d.afterWait(q, 0)
				}
			}
			d.schedule(q)
		case l.Retry:
			d.aloneMore = true
		}
	}
	d.mu.Unlock()
	for i := range w.letters {
		if kept := w.letters[i].kept; kept != nil {
			kept()
		}
	}
	return nil
}

// span has the slot not confirm anything from the events of letters on before the letters are in the log: a standby that has the one, and was
// promoted before it had the other, would have neither. Without a standby it is not done: behind a backlog, what is delivered meanwhile would all come
// again after a crash.
func (d *deadLetters) span(ctx context.Context, w *work) error {
	var first event.LSN
	for i := range w.letters {
		if at := w.letters[i].Position.Commit; w.letters[i].streamed && (first == 0 || at < first) {
			first = at
		}
	}
	if first == 0 {
		return nil
	}
	if followed, err := sql.HasStandby(ctx, d.db); err != nil || !followed {
		return err
	}
	committed, err := sql.FlushedLSN(ctx, d.db)
	if err != nil {
		return err
	}
	w.stream.tracker.span(first, committed)
	return nil
}

// readDead finds out, before a stream starts, which of the kept events are delivered, and which may come by again.
func (l *leader) readDead(ctx context.Context) (map[string]passedEvent, error) {
	if err := l.findRetried(ctx, l.recorded); err != nil {
		return nil, err
	}
	// Of a destination that may have forgotten events nothing is retried before all of these have come by (keptStream.after).
	if _, ok := l.Sink.(sink.Scanner); ok {
		if err := sql.RequeueComingBy(ctx, l.db, l.record, l.slot.ConfirmedFlush); err != nil {
			return nil, err
		}
	}
	passed := map[string]passedEvent{}
	err := sql.PassedLetters(ctx, l.db, l.Slot, l.slot.ConfirmedFlush, false, func(p sql.PassedLetter) {
		switch {
		case p.Discarded, p.Position.Epoch == l.record.Epochs.At(p.Position.Commit):
			passed[string(appendPassed(nil, p.ID, p.Position))] = passedFinally
		case p.Alone: // from before a replay
			passed[string(appendPassed(nil, p.ID, p.Position))] = passedAlone
		}
	})
	return passed, err
}
