package main

import (
	"encoding/json"
	"os"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"ebb/internal/natstest"
	"ebb/internal/pgtest"
)

// peakMemory is the largest resident size that the program has had, in bytes.
func (p *program) peakMemory(t *testing.T) int64 {
	t.Helper()
	if runtime.GOOS == "linux" {
		status, err := os.ReadFile("/proc/" + strconv.Itoa(p.cmd.Process.Pid) + "/status")
		if err != nil {
			t.Fatal(err)
		}
		_, rest, _ := strings.Cut(string(status), "VmHWM:")
		text, _, _ := strings.Cut(strings.TrimSpace(rest), " ")
		kb, err := strconv.ParseInt(text, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		return kb << 10
	}
	// Elsewhere it is known when the program has ended.
	p.stop(t)
	size := p.cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss
	if runtime.GOOS != "darwin" {
		size <<= 10
	}
	return size
}

func TestMemoryStaysFlatInAHugeTransaction(t *testing.T) {
	events, limit := 1_000_000, int64(100<<20)
	if testing.Short() {
		events = 100_000
	}
	if raceDetector {
		limit *= 4 // its own memory is several times the program's
	}
	db, broker := pgtest.New(t), natstest.New(t)
	s := newSite(t, db, broker.URL())
	s.setup(t)
	bridge := s.streaming(t)
	db.Exec(t, `INSERT INTO ebb.buffer (topic, key, payload)
		SELECT 'huge', 'k' || n % 100, json_build_object('n', n, 'filler', repeat('x', 80)) FROM generate_series(1, `+strconv.Itoa(events)+`) n`)
	delivered(t, broker, 3*time.Minute, events)
	s.confirms(t, 40*time.Second)
	peak := bridge.peakMemory(t)
	t.Logf("%d events in one transaction: peak resident memory %.1f MB", events, float64(peak)/(1<<20))
	if peak > limit {
		t.Errorf("peak resident memory %d bytes, want at most %d", peak, limit)
	}

	// There are as many messages as rows; each that is looked at is in its place.
	stream, err := broker.JetStream(t).Stream(t.Context(), "EBB")
	if err != nil {
		t.Fatal(err)
	}
	for seq := 1; seq <= events; seq += events / 499 {
		m, err := stream.GetMsg(t.Context(), uint64(seq))
		if err != nil {
			t.Fatal(err)
		}
		var payload struct{ N int }
		if err := json.Unmarshal(m.Data, &payload); err != nil || payload.N != seq {
			t.Fatalf("message %d is %s (%v)", seq, m.Data, err)
		}
	}
}
