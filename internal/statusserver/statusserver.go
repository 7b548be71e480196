// Package statusserver tells over HTTP how a running bridge is.
package statusserver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"
)

// readTimeout bounds a request, and shutdownTimeout the end of those that are under way.
const (
	readTimeout     = 5 * time.Second
	shutdownTimeout = time.Second
)

// Config says what is told.
type Config struct {
	// Addr is the host:port to listen on; "" is nowhere.
	Addr string
	// Status returns what /status.json shows.
	Status func(context.Context) (any, error)
	// Ready returns nil when the bridge delivers, or could at once; otherwise what it waits for.
	Ready  func() error
	Logger *slog.Logger
}

// Server serves /status.json, /healthz and /readyz.
type Server struct {
	http *http.Server
	done chan struct{}
}

// Start listens. That the port is taken, or anything else is wrong with it, is a warning: events matter more.
func Start(cfg Config) *Server {
	s := &Server{done: make(chan struct{})}
	if cfg.Addr == "" {
		close(s.done)
		return s
	}
	listener, err := net.Listen("tcp", cfg.Addr)
	if err != nil {
		cfg.Logger.Warn("no status is served; choose another address with listen, or \"\" for none", "error", err)
		close(s.done)
		return s
	}
	cfg.Logger.Info("serving status", "url", "http://"+listener.Addr().String()+"/status.json")
	s.http = &http.Server{Handler: handler(cfg), ReadTimeout: readTimeout}
	go func() {
		defer close(s.done)
		if err := s.http.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
			cfg.Logger.Error("status is no longer served", "error", err)
		}
	}()
	return s
}

// Close stops serving.
func (s *Server) Close() error {
	if s.http != nil {
		ctx, cancel := context.WithTimeout(context.Background(), shutdownTimeout)
		defer cancel()
		if err := s.http.Shutdown(ctx); err != nil {
			return errors.Join(fmt.Errorf("stop serving status: %w", err), s.http.Close())
		}
	}
	<-s.done
	return nil
}

func handler(cfg Config) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "alive") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := cfg.Ready(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		fmt.Fprintln(w, "ready")
	})
	mux.HandleFunc("GET /status.json", func(w http.ResponseWriter, r *http.Request) {
		status, err := cfg.Status(r.Context())
		if err != nil {
			cfg.Logger.Warn("status cannot be read", "error", err)
			http.Error(w, "status cannot be read; the log says why", http.StatusServiceUnavailable)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(status); err != nil {
			cfg.Logger.Debug("a client went away", "error", err)
		}
	})
	return mux
}
