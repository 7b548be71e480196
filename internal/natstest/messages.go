package natstest

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
)

// Msg is a message of a stream.
type Msg struct {
	Sequence uint64
	Subject  string
	Header   nats.Header
	Data     []byte
	Time     time.Time // when it was stored
}

// Messages returns all that the stream holds when it is called, in order.
func (s *Server) Messages(t testing.TB, stream string) []Msg {
	t.Helper()
	return messages(t, s.URL(), stream)
}

func messages(t testing.TB, urls, stream string) []Msg {
	t.Helper()
	conn, err := nats.Connect(urls)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	js, err := jetstream.New(conn)
	if err != nil {
		t.Fatal(err)
	}
	// A consumer on a replica that has been restarted may stand still: the next one begins again.
	for range 3 {
		var messages []Msg
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 30*time.Second)
		messages, err = read(ctx, js, stream)
		cancel()
		if err == nil {
			return messages
		}
	}
	t.Fatalf("read the stream %s: %v", stream, err)
	return nil
}

func read(ctx context.Context, js jetstream.JetStream, name string) ([]Msg, error) {
	stream, err := js.Stream(ctx, name)
	if err != nil {
		return nil, err
	}
	state, replicas := stream.CachedInfo().State, stream.CachedInfo().Config.Replicas
	if state.Msgs == 0 {
		return nil, nil
	}
	consumer, err := stream.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{DeliverPolicy: jetstream.DeliverAllPolicy})
	if err != nil {
		return nil, err
	}
	iterator, err := consumer.Messages(jetstream.PullMaxMessages(5000))
	if err != nil {
		return nil, err
	}
	// Stop alone does not wait for the ordered consumer's goroutines; closing the connection, which follows, ends them.
	defer iterator.Stop()
	messages := make([]Msg, 0, state.Msgs)
	for {
		msg, err := iterator.Next(jetstream.NextContext(ctx))
		if err != nil {
			return nil, err
		}
		meta, err := msg.Metadata()
		if err != nil {
			return nil, err
		}
		if meta.Sequence.Stream > state.LastSeq {
			return messages, nil
		}
		messages = append(messages, Msg{
			Sequence: meta.Sequence.Stream,
			Subject:  msg.Subject(),
			Header:   msg.Headers(),
			Data:     slices.Clone(msg.Data()),
			Time:     meta.Timestamp,
		})
		if meta.Sequence.Stream == state.LastSeq || uint64(len(messages)) == state.Msgs {
			return messages, nil
		}
		// Messages may be removed meanwhile. But a consumer may sit on a replica that does not know of the last ones yet.
		if meta.NumPending == 0 && replicas == 1 {
			return messages, nil
		}
	}
}
