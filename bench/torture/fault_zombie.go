package main

import (
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"
)

// zombieWaits is how long the next leader may take until it looks at the stream: it waits for transactions that write.
const zombieWaits = 8 * time.Second

// zombie has messages of a leader that was deposed arrive at the worst moment: when the next one, which has to recover from the table,
// has read the stream's tail and is reading the ids in front of it. That it does is seen by the consumer that it makes.
func (r *round) zombie(f fault) error {
	leader, ok := r.fleet.leader()
	if !ok {
		return errors.New("no bridge led")
	}
	nc, err := nats.Connect(r.broker.url())
	if err != nil {
		return fmt.Errorf("connect to NATS: %w", err)
	}
	defer nc.Close()
	scans := make(chan *nats.Msg, 16)
	if _, err := nc.ChanSubscribe("$JS.API.CONSUMER.CREATE."+streamName+".>", scans); err != nil {
		return fmt.Errorf("watch NATS: %w", err)
	}
	if err := leader.nats.set("hold", toServer, map[string]any{}); err != nil {
		return err
	}
	r.wait(f.lasts)
	// It sleeps as well: it would be the first to lead again.
	leader.freeze()
	defer leader.thaw()
	err = r.terminateLeader()
	if err == nil {
		err = r.dropSlots(f)
	}
	if err == nil {
		select {
		case <-scans:
		case <-time.After(zombieWaits):
			err = errors.New("no bridge read the ids of the stream")
		case <-r.ctx.Done():
		}
	}
	return errors.Join(err, leader.nats.unset("hold", toServer))
}
