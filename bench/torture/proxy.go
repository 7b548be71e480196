package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	toxiproxy "github.com/Shopify/toxiproxy/v2"
	"github.com/Shopify/toxiproxy/v2/stream"
	"github.com/Shopify/toxiproxy/v2/toxics"
	"github.com/rs/zerolog"
)

// The toxics of our own. toxiproxy's bandwidth drops bytes in the middle of a connection when it is taken away while the peer does
// not read for five seconds, which no network does; and it has none that holds everything back.
func init() {
	toxics.Register("hold", new(holdToxic))
	toxics.Register("throttle", new(throttleToxic))
}

// holdToxic lets nothing pass until it is taken away.
type holdToxic struct{}

func (*holdToxic) Pipe(stub *toxics.ToxicStub) { <-stub.Interrupt }

// throttleToxic lets Rate KB pass in a second.
type throttleToxic struct {
	Rate int64 `json:"rate"`
}

func (t *throttleToxic) Pipe(stub *toxics.ToxicStub) {
	for {
		select {
		case <-stub.Interrupt:
			return
		case c := <-stub.Input:
			if c == nil {
				stub.Close()
				return
			}
			const slice = 50 * time.Millisecond
			most := int(max(1, t.Rate*1024*int64(slice)/int64(time.Second)))
			for len(c.Data) > 0 {
				n := min(most, len(c.Data))
				select {
				case <-time.After(slice * time.Duration(n) / time.Duration(most)):
					stub.Output <- &stream.StreamChunk{Data: c.Data[:n], Timestamp: c.Timestamp}
					c.Data = c.Data[n:]
				case <-stub.Interrupt:
					stub.Output <- c
					return
				}
			}
		}
	}
}

// direction is that of bytes through a proxy.
type direction string

const (
	toServer direction = "upstream"
	toClient direction = "downstream"
)

// proxy stands between one bridge and one server.
type proxy struct {
	name, listen, server string

	mu    sync.Mutex
	proxy *toxiproxy.Proxy
	known map[string]bool // toxics that are in place
	// replaced counts proxies that hung and were given up.
	replaced int
}

// proxyServer is what toxiproxy wants to know. It serves nothing.
var proxyServer = toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop())

func newProxy(name, server string) (*proxy, error) {
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	p := &proxy{name: name, listen: fmt.Sprintf("127.0.0.1:%d", port), server: server}
	return p, p.open()
}

func (p *proxy) open() error {
	p.known = map[string]bool{}
	p.proxy = toxiproxy.NewProxy(proxyServer, p.name, p.listen, p.server)
	if err := p.proxy.Start(); err != nil {
		return fmt.Errorf("start proxy %s: %w", p.name, err)
	}
	return nil
}

// hangs is how long a change of a proxy may take. toxiproxy can lock itself up when a process is killed that was not reading.
const hangs = 20 * time.Second

// do makes a change. A proxy that hangs is given up for a new one: what it had open stays open until the bridge ends.
func (p *proxy) do(change func() error) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	result := make(chan error, 1)
	go func() { result <- change() }()
	select {
	case err := <-result:
		return err
	case <-time.After(hangs):
		old := p.proxy
		go old.Stop() // closes its listener, if nothing else
		p.replaced++
		var err error
		for range 100 {
			if err = p.open(); err == nil {
				return nil
			}
			time.Sleep(50 * time.Millisecond)
		}
		return err
	}
}

// cut closes every connection and refuses new ones, until restore.
func (p *proxy) cut() error {
	return p.do(func() error { p.proxy.Stop(); return nil })
}

func (p *proxy) restore() error {
	return p.do(func() error {
		if err := p.proxy.Start(); err != nil && !errors.Is(err, toxiproxy.ErrProxyAlreadyStarted) {
			return fmt.Errorf("start proxy %s again: %w", p.name, err)
		}
		return nil
	})
}

// set has the toxic work in one direction, with the attributes given.
//
// A toxic that was used once stays in place, and works on none of the connections (toxicity 0) while it is not wanted: unlike taking
// it away, this keeps the bytes that it holds.
func (p *proxy) set(toxic string, d direction, attributes map[string]any) error {
	return p.do(func() error {
		name := toxic + "_" + string(d)
		body := map[string]any{"name": name, "type": toxic, "stream": string(d), "toxicity": 1.0, "attributes": attributes}
		text, err := json.Marshal(body)
		if err != nil {
			return err
		}
		if p.known[name] {
			_, err = p.proxy.Toxics.UpdateToxicJson(name, strings.NewReader(string(text)))
		} else {
			_, err = p.proxy.Toxics.AddToxicJson(strings.NewReader(string(text)))
		}
		if err != nil {
			return fmt.Errorf("set %s on proxy %s: %w", name, p.name, err)
		}
		p.known[name] = true
		return nil
	})
}

// unset ends what set has begun.
func (p *proxy) unset(toxic string, d direction) error {
	return p.do(func() error {
		name := toxic + "_" + string(d)
		if !p.known[name] {
			return nil // the proxy is another one by now
		}
		if _, err := p.proxy.Toxics.UpdateToxicJson(name, strings.NewReader(`{"toxicity": 0}`)); err != nil {
			return fmt.Errorf("unset %s on proxy %s: %w", name, p.name, err)
		}
		return nil
	})
}

// vanish has all bytes of some directions vanish, until appear, which closes the connections: what was lost on them cannot be made
// good.
func (p *proxy) vanish(directions []direction) error {
	var errs []error
	for _, d := range directions {
		errs = append(errs, p.set("timeout", d, map[string]any{"timeout": 0}))
	}
	return errors.Join(errs...)
}

func (p *proxy) appear(ctx context.Context, directions []direction) error {
	errs := []error{p.cut()}
	// The connections are closed, and their goroutines end in a moment. Those that are left meet the toxic's cleanup.
	time.Sleep(100 * time.Millisecond)
	for _, d := range directions {
		errs = append(errs, p.do(func() error {
			name := "timeout_" + string(d)
			if !p.known[name] {
				return nil
			}
			delete(p.known, name)
			return p.proxy.Toxics.RemoveToxic(ctx, name)
		}))
	}
	return errors.Join(append(errs, p.restore())...)
}

func (p *proxy) close() { _ = p.cut() }
