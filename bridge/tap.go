package bridge

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"

	"ebb/decode"
	"ebb/event"
	"ebb/replication"
	"ebb/sql"
)

// tap reads events that were delivered once more, beside the bridge that leads, through a temporary copy of the trailing slot.
type tap struct {
	out     *replication.Stream
	decoder *decode.Decoder
	// until is where the log ended when the tap was opened.
	until event.LSN
	// most is how many events a batch holds, at most.
	most int
}

// openTap opens a tap that begins with the transactions that commit at or behind an LSN. The trailing slot must not be ahead of that.
func openTap(ctx context.Context, cfg *Config, db *pgxConn, record sql.SlotRecord, from event.LSN) (_ *tap, err error) {
	t := &tap{most: maxBatchEvents}
	own, err := lookUpOwn(ctx, db, cfg)
	if err != nil {
		return nil, err
	}
	for i := range own.buffers {
		own.buffers[i].RowKey = nil // nothing is marked
	}
	dc := decode.Config{Epochs: record.Epochs, Buffers: own.buffers}
	if dc.Token, err = sql.MessageToken(ctx, db); err != nil {
		return nil, err
	}
	// Nothing else is asked in this session while the tap is read.
	dc.LookUp = func(oids []uint32) (decode.Types, event.LSN, error) { return cfg.lookUpIn(ctx, db, oids) }
	t.decoder = decode.New(dc)
	if t.until, err = replication.FlushedTo(ctx, db); err != nil {
		return nil, err
	}
	conn, err := replication.Connect(ctx, cfg.Postgres, cfg.Slot+" replay")
	if err != nil {
		return nil, err
	}
	name := "ebb_tap_" + strings.ToLower(rand.Text())
	if err := conn.CopyTemporary(ctx, replication.TrailOf(cfg.Slot), name); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	if t.out, err = conn.StartAt(ctx, name, cfg.Publication, from); err != nil {
		return nil, err
	}
	return t, nil
}

// next returns the next events, or none at the end of what there was when the tap was opened. The batch is the caller's, who releases it.
func (t *tap) next(ctx context.Context) (*event.Batch, error) {
	batch := event.NewBatch()
	for {
		for {
			msg, ok, err := t.out.Next()
			if err != nil {
				return nil, err
			}
			if !ok {
				break
			}
			if msg.Data != nil {
				if err := t.decoder.Decode(msg.Data, batch); err != nil {
					return nil, err
				}
			}
			ended := msg.Data == nil && msg.WALEnd >= t.until
			if n := len(batch.Marks); n > 0 {
				ended = ended || batch.Marks[n-1].Last >= t.until
			}
			if ended && !t.decoder.InTransaction() {
				t.until = 0
				return batch, nil
			}
			if len(batch.Events) >= t.most || batch.Size() >= maxBatchBytes {
				return batch, nil
			}
		}
		if len(batch.Events) > 0 {
			return batch, nil
		}
		if err := t.out.Fill(ctx, true); err != nil {
			return nil, err
		}
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("read what was delivered: %w", err)
		}
	}
}

// ended reports whether everything was read.
func (t *tap) ended() bool { return t.until == 0 }

func (t *tap) close() error { return t.out.Close() }
