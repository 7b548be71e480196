package sinktest

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	gocmp "github.com/google/go-cmp/cmp"

	"ebb/event"
	"ebb/sink"
)

// base is the time of every sequence's first event, to the microsecond.
var base = time.Date(2026, 3, 1, 12, 4, 5, 123_456_000, time.UTC)

// sequence returns n events that follow each other, in transactions of random size, some of whose rows went elsewhere.
func (f *fixture) sequence(n int) []Message {
	messages := make([]Message, n)
	pos := event.Position{Epoch: 1, Commit: 0x16_B374_D848}
	for i := range messages {
		if pos.Index == 0 || f.rand.IntN(5) == 0 {
			pos.Commit += event.LSN(8 + f.rand.IntN(1<<20))
			pos.Index = 0
		}
		pos.Index += 1 + uint64(f.rand.IntN(2))
		m := Message{
			ID:          fmt.Sprintf("%d", 1000+i),
			Topic:       fmt.Sprintf("membership.%d", i%3),
			Payload:     fmt.Sprintf(`{"n": %d, "text": %q}`, i, strings.Repeat("x", f.rand.IntN(300))),
			ContentType: "application/json",
			Position:    pos,
			Time:        base.Add(time.Duration(i) * time.Microsecond),
		}
		if i%4 != 0 {
			m.Key = new(fmt.Sprintf("group-%d", i%7))
		}
		if i%2 == 0 {
			m.Headers = map[string]string{"traceparent": fmt.Sprintf("00-%032x-%016x-01", i, i), "tenant": `a "b" 100%`}
		}
		messages[i] = m
	}
	return messages
}

func orderAndContent(f *fixture) {
	f.resume()
	messages := f.sequence(600)
	f.deliver(messages, 40)
	f.expect(messages)
	f.resume(messages...)
}

func nothingToDeliver(f *fixture) {
	f.resume()
	r := f.start(nil)
	for range 3 {
		if !r.hand(0, patience) { // a batch of marks alone
			f.t.Fatal("run does not take an empty batch")
		}
	}
	r.finish()
	f.expect(nil)
	f.resume()
	f.deliver(nil, 1)
}

func cancelled(f *fixture) {
	f.resume()
	f.start(nil).stop() // nothing was handed over yet
	f.resume()

	messages := f.sequence(50)
	r := f.start(messages)
	r.handAll(10)
	r.awaitDelivered(len(messages))
	r.stop()
	f.expect(messages)

	f.resume(messages...)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	in := make(chan *event.Batch)
	if err := f.sink.Run(ctx, in, sink.Outcome{Delivered: func(sink.Progress) { f.t.Error("delivered is called") }}); !errors.Is(err, context.Canceled) {
		f.t.Errorf("run with an ended context: got %v, want that the context was canceled", err)
	}
}

func cancelledWhileBroken(f *fixture) {
	f.resume()
	messages := f.sequence(40)
	first, second := messages[:20], messages[20:]
	f.deliver(first, 10)
	f.resume(first...)

	f.h.Break(f.t)
	r := f.start(second)
	r.hand(len(second), patience)
	r.stop()
	f.h.Mend(f.t)

	tail := f.resumeIn(messages)
	if tail < len(first) {
		f.t.Fatalf("resume: the sink forgot %d events that it delivered", len(first)-tail)
	}
	f.confirmed = tail
	f.deliver(messages[tail:], 10)
	f.expect(messages)
}

// backPressure finds out whether a sink whose destination is away stops taking events, at the latest when it holds so many that
// they would matter.
func backPressure(f *fixture) {
	const (
		most  = 50_000
		batch = 100
		quiet = time.Second
	)
	f.resume()
	messages := f.sequence(most)
	f.deliver(messages[:batch], batch)
	f.resume(messages[:batch]...)
	rest := messages[batch:]

	f.h.Break(f.t)
	r := f.start(rest)
	for r.hand(batch, quiet) {
		if len(rest)-r.handed < batch {
			f.t.Fatalf("run took %d events although nothing can be delivered", r.handed)
		}
	}
	f.t.Logf("run took %d events", r.handed)
	select {
	case <-r.ended:
		f.t.Fatalf("run: %v, want that it waits for the destination", r.err)
	default:
	}
	f.h.Mend(f.t)
	r.cut(2 * batch)
	r.handAll(batch)
	r.finish()
	f.expect(messages[:batch+len(r.messages)])
}

// outage breaks the destination while events flow, time and again.
func outage(f *fixture) {
	f.resume()
	messages := f.sequence(300)
	r := f.start(messages)
	for range 3 {
		if !r.hand(50, patience) {
			f.t.Fatal("run takes no more events")
		}
		f.h.Break(f.t)
		for range 5 {
			if !r.hand(10, 50*time.Millisecond) {
				break
			}
		}
		f.h.Mend(f.t)
		r.awaitDelivered(r.handed)
	}
	r.handAll(50)
	r.finish()
	f.expect(messages)
	f.resume(messages...)
}

func runAgain(f *fixture) {
	messages := f.sequence(90)
	for i := 0; i < len(messages); i += 30 {
		f.resume(messages[:i]...)
		f.deliver(messages[i:i+30], 10)
	}
	f.resume(messages...)
	f.expect(messages)
}

func rejected(f *fixture) {
	messages := f.sequence(30)
	for _, i := range []int{5, 10, 11, 29} { // in the middle of a batch, at its start, the first that a Run sees, at its end
		messages[i].Headers = map[string]string{"tenant": "a\rb"}
	}
	var good []Message
	for rest := messages; len(rest) > 0; {
		f.resume(good...)
		r := f.start(rest)
		for len(rest)-r.handed > 0 && r.hand(min(10, len(rest)-r.handed), patience) {
		}
		bad := 0
		for bad < len(rest) && !strings.Contains(rest[bad].Headers["tenant"], "\r") {
			bad++
		}
		if bad == len(rest) {
			r.finish()
			good = append(good, rest...)
			break
		}
		n, err := r.wait(patience)
		var rejection *sink.RejectedError
		if !errors.As(err, &rejection) {
			f.t.Fatalf("run: got %v, want a RejectedError", err)
		}
		if rejection.ID != rest[bad].ID || rejection.Position != rest[bad].Position || rejection.Err == nil {
			f.t.Errorf("rejected %s at %v for %v, want %s at %v", rejection.ID, rejection.Position, rejection.Err, rest[bad].ID, rest[bad].Position)
		}
		if n != bad {
			f.t.Errorf("delivered %d events before the rejected one, want %d", n, bad)
		}
		f.confirmed += n
		good = append(good, rest[:bad]...)
		f.expect(good)
		rest = rest[bad+1:]
	}
	f.expect(good)
}

func payloads(f *fixture) {
	var planes strings.Builder
	for plane := rune(0); plane <= 16; plane++ {
		fmt.Fprintf(&planes, "%c%c", plane<<16|0x1234, plane<<16|0xfffd)
	}
	bodies := []string{
		`{}`, `[]`, `null`, `0`, `""`, ` { "a" : 1.0e+2 } `, `{"a":"\u0000\u001f\\\"\ud83d\ude00"}`, `{"a":1,"a":2}`, `"<&>` + "\u2028\u007f" + `"`,
		`"` + planes.String() + `"`, `123456789012345678901234567890.00`, `{"a":"` + strings.Repeat("x", 900<<10) + `"}`, `true`,
	}
	messages := f.sequence(2 * len(bodies))
	for i := range messages {
		messages[i].Payload = bodies[i%len(bodies)]
	}
	f.resume()
	f.deliver(messages[:len(bodies)], 1)
	f.resume(messages[:len(bodies)]...)
	f.deliver(messages[len(bodies):], len(bodies))
	f.expect(messages)
}

func keysAndTopics(f *fixture) {
	texts := []string{
		"a.b", ".", "..a", "a..b", "a.", " ", "a b", " a ", "*", "a.*.b", ">", "a.>", "a\nb", "\r\n", "\t", "%", "%41", `"`, "\\", "é", "日本.語",
		"\U0001F600", strings.Repeat("k", 300), strings.Repeat("a.", 150), strings.Repeat("é", 150), "\x7f\x01", "$JS.API", "_INBOX.x",
	}
	messages := f.sequence(2*len(texts) + 2)
	for i, s := range texts {
		messages[2*i].Topic = s
		messages[2*i+1].Key = &s
	}
	messages[len(messages)-2].Key = new("")
	messages[len(messages)-1].Key = nil
	f.resume()
	f.deliver(messages, 20)
	f.expect(messages)
	f.resume(messages...)
}

// recovered delivers events that repeat the position before them, the first of which is that of nothing.
func recovered(f *fixture) {
	messages := f.sequence(60)
	pos := event.Position{Epoch: 1}
	for i := range messages {
		if i < 10 || i >= 30 && i < 40 {
			messages[i].Position, messages[i].Origin = pos, event.Recovered
		}
		pos = messages[i].Position
	}
	f.resume()
	f.deliver(messages[:5], 2) // ends among events of the same position
	f.resume(messages[:5]...)
	f.deliver(messages[5:35], 7)
	f.resume(messages[:35]...)
	f.deliver(messages[35:], 7)
	f.resume(messages...)
	f.expect(messages)
}

// killed stops the sink at random moments and goes on behind what it then says that it delivered.
func killed(f *fixture) {
	messages := f.sequence(2000)
	for rounds := 0; ; rounds++ {
		tail := f.resumeIn(messages)
		if tail < f.confirmed {
			f.t.Fatalf("resume: %d events were delivered, but the sink resumes after %d", f.confirmed, tail)
		}
		f.confirmed = tail
		rest := messages[tail:]
		if len(rest) == 0 {
			break
		}
		r := f.start(rest)
		if rounds == 12 {
			r.handAll(100)
			r.finish()
			continue
		}
		stopAt := 1 + f.rand.IntN(400) // events handed over, or delivered
		byDelivery := f.rand.IntN(2) == 0
		for r.handed < min(stopAt, len(rest)) {
			if !r.hand(min(1+f.rand.IntN(60), len(rest)-r.handed), patience) {
				f.t.Fatalf("run takes no more events")
			}
		}
		if byDelivery {
			r.awaitDelivered(1 + f.rand.IntN(r.handed))
		}
		r.stop()
		if f.h.Resumes {
			f.reopen()
		}
	}
	f.expect(messages)
}

// resumesAtKnown is about a sink whose destination cannot be asked: another process delivered before.
func resumesAtKnown(f *fixture) {
	messages := f.sequence(30)
	f.known.Position = messages[9].Position
	f.resume(messages[:10]...)
	f.deliver(messages[10:20], 5)
	f.known.Position = messages[14].Position
	f.resume(messages[:20]...)
	f.known.Position = messages[24].Position
	f.resume(messages[:25]...)
	f.deliver(messages[25:], 5)
	f.expect(append(messages[10:20:20], messages[25:]...))
}

func reopenedWhenEmpty(f *fixture) {
	f.resume()
	f.reopen()
	f.resume()
	messages := f.sequence(20)
	f.deliver(messages, 5)
	f.reopen()
	f.resume(messages...)
}

// spoil gives some of the messages what no sink passes on, and returns which: with a key at first, in the middle and at the end of it, and without.
func spoil(messages []Message, at ...int) {
	for _, i := range at {
		messages[i].Headers = map[string]string{"tenant": "a\rb"}
	}
}

// split returns which of the messages must be delivered, and which must be kept, as they are spoilt or behind such a one of the same key.
func split(messages []Message) (good, bad []Message) {
	held := map[string]bool{}
	for _, m := range messages {
		spoilt := strings.Contains(m.Headers["tenant"], "\r")
		if m.Key != nil {
			spoilt = spoilt || held[*m.Key]
			held[*m.Key] = spoilt
		}
		if spoilt {
			bad = append(bad, m)
		} else {
			good = append(good, m)
		}
	}
	return good, bad
}

// expectLetters compares what is kept with what must be.
func (f *fixture) expectLetters(want []Message) {
	f.t.Helper()
	var got []Message
	for _, l := range f.dead.Letters() {
		got = append(got, l.Message)
		spoilt := strings.Contains(l.Headers["tenant"], "\r")
		if spoilt == (l.Reason == sink.Queued) && l.Reason != sink.Queued || l.Reason == "" || l.Attempts > 0 || l.Retry || !l.Committed {
			f.t.Errorf("event %s is kept for %q, %d attempts, retry %v, committed %v", l.ID, l.Reason, l.Attempts, l.Retry, l.Committed)
		}
	}
	got = f.inOrder(got, want) // those of different keys are in no order
	if diff := gocmp.Diff(want, got); diff != "" {
		f.t.Fatalf("letters (-want +got):\n%s", diff)
	}
}

// parked delivers events some of which cannot be delivered: the others are, but for those that are behind them.
func parked(f *fixture) {
	f.dead = NewDeadLetters(f.t, time.Millisecond)
	messages := f.sequence(300)
	spoil(messages, 0, 4, 9, 10, 32, 33, 150, 299)
	good, bad := split(messages)
	if len(bad) < 20 || len(good) < 50 {
		f.t.Fatalf("%d good ones and %d bad ones are no test", len(good), len(bad))
	}
	f.resume()
	r := f.start(messages)
	r.handAll(40)
	r.finish()
	f.expect(good)
	f.expectLetters(bad)
	if f.h.Resumes {
		f.resume(good...)
	} else {
		f.resume(messages...)
	}
}

// keptLate finds out whether anything counts as delivered that is kept behind nothing but a promise.
func keptLate(f *fixture) {
	f.dead = NewDeadLetters(f.t, 0)
	f.dead.Pause(true)
	messages := f.sequence(40)
	spoil(messages, 11, 20)
	good, bad := split(messages)
	f.resume()
	r := f.start(messages)
	if !r.hand(len(messages), patience) {
		f.t.Fatal("run takes no events")
	}
	r.awaitDelivered(11)
	f.dead.Await("an event is parked", func(letters []Letter) bool { return len(letters) > 0 })
	r.mu.Lock()
	if r.delivered > 11 {
		f.t.Errorf("%d events count as delivered, although event 12 is not kept", r.delivered)
	}
	r.mu.Unlock()
	f.dead.Pause(false)
	r.finish()
	f.expect(good)
	f.expectLetters(bad)
}

// blocked is about dead letters that are asked, while nothing new is to be parked.
func blocked(f *fixture) {
	f.dead = NewDeadLetters(f.t, time.Millisecond)
	messages := f.sequence(60)
	spoil(messages, 1)
	good, bad := split(messages[:30])
	f.resume()
	f.deliver(messages[:30], 10)
	f.expect(good)
	f.expectLetters(bad)

	f.block = true
	more, queued := split(append([]Message{messages[1]}, messages[30:]...))
	spoil(messages, 59) // of another key than the one that is held
	if *messages[59].Key == *messages[1].Key {
		f.t.Fatal("the last event is held as well")
	}
	f.tail()
	r := f.start(messages[30:])
	r.handAll(30)
	n, err := r.wait(patience)
	var rejection *sink.RejectedError
	if !errors.As(err, &rejection) || rejection.ID != messages[59].ID || n != 29 {
		f.t.Fatalf("run delivered %d of 29 events: %v", n, err)
	}
	f.expect(append(good, more[:len(more)-1]...))
	f.expectLetters(append(bad, queued[1:]...))
}

// retried delivers what was kept, while others go on.
func retried(f *fixture) {
	f.dead = NewDeadLetters(f.t, time.Millisecond)
	messages := f.sequence(200)
	spoil(messages, 1, 2, 4)
	good, bad := split(messages[:100])
	f.resume()
	r := f.start(messages)
	r.handAllOf(100, 10)
	r.awaitDelivered(100)
	f.expect(good)

	// The first one still cannot be delivered, and those behind it are not tried.
	if got := f.dead.Retry(*messages[1].Key, 100); got.Delivered != 0 || got.Failure == nil || !got.Failure.Rejected || got.Failure.Reason == "" {
		f.t.Fatalf("a retry of what cannot be delivered: %+v, %+v", got, got.Failure)
	}
	if got := f.dead.Retry(messages[4].ID, 1); got.Delivered != 0 || got.Failure == nil || !got.Failure.Rejected {
		f.t.Fatalf("a retry of what cannot be delivered: %+v, %+v", got, got.Failure)
	}
	f.expect(good)
	f.dead.Discard(messages[1].ID)
	again := append([]Message(nil), good...)
	take := func(most int) {
		f.t.Helper()
		var want []Message
		for _, m := range bad {
			if keyOf(m) == *messages[1].Key && m.ID != messages[1].ID && !f.dead.delivered(m.ID) && len(want) < most {
				m.Origin = event.Retried
				want = append(want, m)
			}
		}
		got := f.dead.Retry(*messages[1].Key, most)
		if got.Delivered != len(want) || got.Failure != nil {
			f.t.Fatalf("a retry of %d events delivered %d: %+v", len(want), got.Delivered, got.Failure)
		}
		again = append(again, want...)
		f.expect(again)
	}
	take(1)
	take(3)
	// Others go on, and those of the key queue until nothing of it is left.
	first := messages[100:150]
	r.handAllOf(50, 10)
	r.awaitDelivered(150)
	for _, m := range first {
		if key := keyOf(m); key == *messages[1].Key || key == *messages[2].Key {
			bad = append(bad, m)
		} else {
			again = append(again, m)
		}
	}
	f.expect(again)
	take(100)
	r.handAll(10)
	r.finish()
	for _, m := range messages[150:] {
		if key := keyOf(m); key != *messages[2].Key {
			again = append(again, m)
		}
	}
	f.expect(again)
}

// keyOf returns the key of m, or "".
func keyOf(m Message) string {
	if m.Key == nil {
		return ""
	}
	return *m.Key
}

// cancelledWhileRetried ends a Run that retries something while nothing can be delivered.
func cancelledWhileRetried(f *fixture) {
	f.dead = NewDeadLetters(f.t, time.Millisecond)
	messages := f.sequence(60)
	spoil(messages, 1)
	good, _ := split(messages)
	f.resume()
	r := f.start(messages)
	r.handAll(20)
	r.awaitDelivered(len(messages))
	f.dead.Discard(messages[1].ID)
	f.h.Break(f.t)
	ended := f.dead.Hand(*messages[1].Key, 5)
	r.stop()
	select {
	case got := <-ended:
		if got.Delivered != 0 || got.Failure != nil && got.Failure.Rejected {
			f.t.Errorf("a retry of a Run that was cancelled: %+v, %+v", got, got.Failure)
		}
	default:
		f.t.Error("the Run has ended, and the retry has not")
	}
	f.h.Mend(f.t)
	f.expect(good)

	// What is retried holds up no end of a Run either.
	f.tail()
	r = f.start(nil)
	if got := f.dead.Retry(*messages[1].Key, 2); got.Delivered != 2 || got.Failure != nil {
		f.t.Fatalf("a retry of two events: %+v, %+v", got, got.Failure)
	}
	r.finish()
}
