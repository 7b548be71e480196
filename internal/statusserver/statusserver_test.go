package statusserver

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func freeAddr(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}

func TestServer(t *testing.T) {
	var logged bytes.Buffer
	var ready, status error
	cfg := Config{
		Addr:   freeAddr(t),
		Status: func(context.Context) (any, error) { return map[string]int{"n": 7}, status },
		Ready:  func() error { return ready },
		Logger: slog.New(slog.NewTextHandler(&logged, nil)),
	}
	s := Start(cfg)
	get := func(path string) (int, string) {
		t.Helper()
		client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		resp, err := client.Get("http://" + cfg.Addr + path)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp.StatusCode, strings.TrimSpace(string(body))
	}
	check := func(path string, wantCode int, wantBody string) {
		t.Helper()
		if code, body := get(path); code != wantCode || body != wantBody {
			t.Errorf("%s: %d %q, want %d %q", path, code, body, wantCode, wantBody)
		}
	}
	check("/healthz", 200, "alive")
	check("/readyz", 200, "ready")
	check("/status.json", 200, `{"n":7}`)
	ready, status = errors.New("waiting for Postgres"), errors.New("dial postgres://me:secret@db")
	check("/readyz", 503, "waiting for Postgres")
	check("/status.json", 503, "status cannot be read; the log says why")
	if code, _ := get("/nothing"); code != 404 {
		t.Errorf("/nothing: %d", code)
	}

	// A taken port, and none, are no reason not to run.
	for _, addr := range []string{cfg.Addr, ""} {
		second := cfg
		second.Addr = addr
		if err := Start(second).Close(); err != nil {
			t.Error(err)
		}
	}
	if !strings.Contains(logged.String(), "level=WARN") || !strings.Contains(logged.String(), "listen") {
		t.Errorf("a taken port is no warning:\n%s", logged.String())
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
