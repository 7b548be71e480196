package main

import (
	"ebb/bridge"
	"ebb/decode"
	"ebb/internal/config"
	"ebb/sql"
)

// buffersOf are the configured buffers as the bridge takes them.
func buffersOf(cfg *config.Config) []bridge.Buffer {
	var buffers []bridge.Buffer
	for i := range cfg.Buffers {
		b := &cfg.Buffers[i]
		if b.Managed() {
			buffers = append(buffers, bridge.Managed())
			continue
		}
		own := bridge.Buffer{
			Buffer: decode.Buffer{
				ID: b.ID, Topic: b.Topic.Column, TopicValue: b.Topic.Value, Key: b.Key, Payload: b.Payload, ContentType: b.ContentType, Headers: b.Headers,
			},
			Delivered: rowsOf[b.Delivered],
			StartAll:  b.Start == config.StartAll,
		}
		own.Schema, own.Table = b.Name()
		if own.Delivered == sql.Mark {
			own.Recorded = b.Recorded
		}
		buffers = append(buffers, own)
	}
	return buffers
}

// rowsOf says what is done with rows of delivered events.
var rowsOf = map[string]sql.Delivered{config.DeliveredKeep: sql.Keep, config.DeliveredMark: sql.Mark, config.DeliveredDelete: sql.Delete}
