package natstest

import (
	"errors"
	"strconv"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m, Leaks()...) }

func TestMessagesReadsTheWholeStreamInOrder(t *testing.T) {
	s := New(t)
	js := s.JetStream(t)
	stream, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "S", Subjects: []string{"s.>"}})
	if err != nil {
		t.Fatal(err)
	}
	if got := s.Messages(t, "S"); len(got) != 0 {
		t.Fatalf("an empty stream has %d messages", len(got))
	}
	const n = 20_000
	for i := 1; i <= n; i++ {
		msg := &nats.Msg{Subject: "s." + strconv.Itoa(i%7), Data: []byte(strconv.Itoa(i)), Header: nats.Header{"ce-id": {strconv.Itoa(i)}}}
		if _, err := js.PublishMsgAsync(msg); err != nil {
			t.Fatal(err)
		}
	}
	<-js.PublishAsyncComplete()
	// Holes at the start, in the middle, and at the end.
	for _, seq := range []uint64{1, 2, n / 2, n} {
		if err := stream.DeleteMsg(t.Context(), seq); err != nil {
			t.Fatal(err)
		}
	}
	start := time.Now()
	got := s.Messages(t, "S")
	t.Logf("read in %s", time.Since(start))
	if len(got) != n-4 {
		t.Fatalf("%d messages, want %d", len(got), n-4)
	}
	last := uint64(0)
	for _, msg := range got {
		i := strconv.FormatUint(msg.Sequence, 10)
		if msg.Sequence <= last || string(msg.Data) != i || msg.Header["ce-id"][0] != i ||
			msg.Subject != "s."+strconv.FormatUint(msg.Sequence%7, 10) || msg.Time.IsZero() {
			t.Fatalf("message %+v after sequence %d", msg, last)
		}
		last = msg.Sequence
	}
}

func TestRestartKeepsURLAndStore(t *testing.T) {
	s := New(t)
	js := s.JetStream(t)
	if _, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "S", Subjects: []string{"s"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := js.Publish(t.Context(), "s", []byte("before")); err != nil {
		t.Fatal(err)
	}
	url := s.URL()
	s.Restart(t)
	s.Stop(t)
	if _, err := nats.Connect(url); !errors.Is(err, nats.ErrNoServers) {
		t.Errorf("connect to a stopped server: %v", err)
	}
	s.Start(t)
	if got := s.Messages(t, "S"); s.URL() != url || len(got) != 1 || string(got[0].Data) != "before" {
		t.Errorf("at %s, was %s: messages %v", s.URL(), url, got)
	}
	// The connection from before comes back.
	if err := js.Conn().FlushTimeout(10 * time.Second); err != nil {
		t.Error(err)
	}
}

func TestMaxPayload(t *testing.T) {
	s := New(t, MaxPayload(2000))
	if got := s.Connect(t).MaxPayload(); got != 2000 {
		t.Errorf("max_payload is %d", got)
	}
}
