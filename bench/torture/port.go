package main

import (
	"errors"
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
)

var ports = struct {
	mu    sync.Mutex
	given map[int]bool
}{given: map[int]bool{}}

// freePort finds a port below those that systems hand to outgoing connections: one of these could take the port away while its
// server is down. It gives none twice.
func freePort() (int, error) {
	const low, high = 12000, 20000
	ports.mu.Lock()
	defer ports.mu.Unlock()
	for range 500 {
		port := low + rand.IntN(high-low)
		if ports.given[port] {
			continue
		}
		listener, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err != nil {
			continue
		}
		listener.Close()
		ports.given[port] = true
		return port, nil
	}
	return 0, errors.New("found no free port")
}
