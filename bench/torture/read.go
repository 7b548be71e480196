package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"ebb/event"
	"ebb/sink/cloudevent"
)

// readTable reads the rows of the buffer, by id.
func readTable(ctx context.Context, url string) ([]row, error) {
	db, err := pgx.Connect(ctx, url)
	if err != nil {
		return nil, fmt.Errorf("read the table: %w", err)
	}
	defer db.Close(context.WithoutCancel(ctx))
	rows, err := db.Query(ctx, "SELECT id, topic, key, payload::text FROM ebb.buffer ORDER BY id")
	if err != nil {
		return nil, fmt.Errorf("read the table: %w", err)
	}
	var table []row
	var id int64
	var topic, payload string
	var key *string
	_, err = pgx.ForEachRow(rows, []any{&id, &topic, &key, &payload}, func() error {
		r := row{id: id}
		if err := json.Unmarshal([]byte(payload), &r.cargo); err != nil {
			return fmt.Errorf("row %d: %w", id, err)
		}
		text := ""
		if key != nil {
			text = *key
		}
		r.content = contentOf(topic, text, key != nil, payload)
		table = append(table, r)
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("read the table: %w", err)
	}
	return table, nil
}

// openStream connects to the server itself, without a proxy.
func openStream(url string) (*nats.Conn, jetstream.JetStream, error) {
	nc, err := nats.Connect(url, nats.MaxReconnects(-1), nats.ReconnectWait(50*time.Millisecond))
	if err != nil {
		return nil, nil, fmt.Errorf("connect to NATS: %w", err)
	}
	js, err := jetstream.New(nc)
	if err != nil {
		nc.Close()
		return nil, nil, fmt.Errorf("connect to NATS: %w", err)
	}
	return nc, js, nil
}

func countStream(ctx context.Context, url string) (int, error) {
	nc, js, err := openStream(url)
	if err != nil {
		return 0, err
	}
	defer nc.Close()
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	stream, err := js.Stream(ctx, streamName)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("look at the stream: %w", err)
	}
	return int(stream.CachedInfo().State.Msgs), nil
}

// readStream reads all that the stream holds, in order.
func readStream(ctx context.Context, url string) ([]message, error) {
	nc, js, err := openStream(url)
	if err != nil {
		return nil, err
	}
	defer nc.Close()
	stream, err := js.Stream(ctx, streamName)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the stream: %w", err)
	}
	state := stream.CachedInfo().State
	if state.Msgs == 0 {
		return nil, nil
	}
	consumer, err := stream.OrderedConsumer(ctx, jetstream.OrderedConsumerConfig{DeliverPolicy: jetstream.DeliverAllPolicy})
	if err != nil {
		return nil, fmt.Errorf("read the stream: %w", err)
	}
	iterator, err := consumer.Messages(jetstream.PullMaxMessages(2000))
	if err != nil {
		return nil, fmt.Errorf("read the stream: %w", err)
	}
	defer iterator.Stop()
	messages := make([]message, 0, state.Msgs)
	for {
		m, err := iterator.Next(jetstream.NextContext(ctx))
		if err != nil {
			return nil, fmt.Errorf("read the stream: %w", err)
		}
		meta, err := m.Metadata()
		if err != nil {
			return nil, fmt.Errorf("read the stream: %w", err)
		}
		read, err := readMessage(m.Headers(), m.Data(), meta.Sequence.Stream)
		if err != nil {
			return nil, err
		}
		messages = append(messages, read)
		if meta.Sequence.Stream >= state.LastSeq || meta.NumPending == 0 {
			return messages, nil
		}
	}
}

func readMessage(headers nats.Header, data []byte, sequence uint64) (message, error) {
	id, err := strconv.ParseInt(headers.Get("ce-id"), 10, 64)
	if err != nil {
		return message{}, fmt.Errorf("message %d has no id of the buffer: %w", sequence, err)
	}
	position, err := event.ParsePosition(headers.Get(cloudevent.HeaderPosition))
	if err != nil {
		return message{}, fmt.Errorf("message %d has no position: %w", sequence, err)
	}
	_, hasKey := headers["ce-subject"]
	key := string(cloudevent.AppendDecoded(nil, headers.Get("ce-subject")))
	return message{
		sequence:  sequence,
		id:        id,
		position:  position,
		recovered: headers.Get(cloudevent.HeaderOrigin) != "",
		content:   contentOf(headers.Get("ce-type"), key, hasKey, string(data)),
	}, nil
}
