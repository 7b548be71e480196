package natstest

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
)

// publish publishes messages number from to number to. One that is not acknowledged is published again, with an expectation that
// keeps it from being stored twice.
func publish(t *testing.T, js jetstream.JetStream, from, to int) {
	t.Helper()
	for i := from; i <= to; i++ {
		eventually(t, func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, time.Second)
			defer cancel()
			_, err := js.Publish(ctx, "s", []byte(strconv.Itoa(i)), jetstream.WithExpectLastSequence(uint64(i-1)))
			if api := (*jetstream.APIError)(nil); errors.As(err, &api) && api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence &&
				strings.HasSuffix(api.Description, ": "+strconv.Itoa(i)) {
				return nil // stored already
			}
			return err
		})
	}
}

func TestClusterStreamSurvivesItsLeaders(t *testing.T) {
	began := time.Now()
	step := func(what string) {
		t.Logf("%-20s %s", what, time.Since(began).Round(time.Millisecond))
		began = time.Now()
	}
	c := NewCluster(t, 3)
	step("cluster ready")
	if urls := strings.Split(c.URLs(), ","); len(urls) != 3 || urls[1] != c.Server(1).URL() {
		t.Errorf("URLs %v", urls)
	}
	js := c.JetStream(t)
	_, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "S", Subjects: []string{"s"}, Replicas: 3})
	if err != nil {
		t.Fatal(err)
	}
	c.WaitHealthy(t, "S")
	step("stream healthy")
	publish(t, js, 1, 100)
	step("100 messages")

	former := c.StreamLeader(t, "S")
	c.StepDown(t, "S")
	leader := c.StreamLeader(t, "S")
	if leader == former {
		t.Errorf("server %d leads as before", leader)
	}
	step("stepped down")
	publish(t, js, 101, 200)

	url := c.Server(leader).URL()
	c.Server(leader).Stop(t)
	step("leader stopped")
	if next := c.StreamLeader(t, "S"); next == leader {
		t.Errorf("the stopped server %d leads", leader)
	}
	step("another leads")
	publish(t, js, 201, 300)
	step("100 messages")
	c.Server(leader).Start(t)
	step("started")
	c.WaitHealthy(t, "S")
	step("stream healthy")
	if c.Server(leader).URL() != url {
		t.Errorf("at %s after the restart, was %s", c.Server(leader).URL(), url)
	}

	// The one that was away has all of it: it can do without one of the others.
	c.Server((leader + 1) % 3).Restart(t)
	step("another restarted")
	c.WaitHealthy(t, "S")
	step("stream healthy")
	publish(t, js, 301, 310)
	got := c.Messages(t, "S")
	step("read")
	if len(got) != 310 {
		t.Fatalf("%d messages, want 310", len(got))
	}
	for i, msg := range got {
		if want := strconv.Itoa(i + 1); string(msg.Data) != want || msg.Sequence != uint64(i+1) {
			t.Fatalf("message %d is %q at sequence %d", i+1, msg.Data, msg.Sequence)
		}
	}
}
