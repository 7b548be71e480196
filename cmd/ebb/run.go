package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"

	"ebb/bridge"
	"ebb/internal/config"
	"ebb/internal/natsserver"
	"ebb/internal/redact"
	"ebb/internal/statusserver"
	"ebb/sink"
	"ebb/sink/jetstream"
	"ebb/sink/stdout"
	"ebb/sink/webhook"
)

// runFlags are what an operator decides at one start.
type runFlags struct {
	adopt, acceptGap bool
}

func newRun(a *app) *cobra.Command {
	var flags runFlags
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Deliver events until told to stop",
		Long: "Run delivers events from the slot to the sink. It waits for a Postgres or a sink that is not there yet or goes away.\n" +
			"SIGINT or SIGTERM makes it finish what it has begun; a second one ends it at once.",
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, log, err := a.loadForPostgres()
			if err != nil {
				return err
			}
			if err := cfg.RequireSink(); err != nil {
				return err
			}
			return run(cmd.Context(), cfg, log, flags)
		},
	}
	cmd.Flags().BoolVar(&flags.adopt, "adopt", false, "go on from this database, although the stream belongs to another one or holds events "+
		"that this one\ndoes not have, as after a restore or a failover that lost transactions; stop the other database's bridge first")
	cmd.Flags().BoolVar(&flags.acceptGap, "accept-gap", false, "go on although the stream has lost events that are not in the buffer any more")
	return cmd
}

// run delivers until ctx ends.
func run(ctx context.Context, cfg *config.Config, log *slog.Logger, flags runFlags) (err error) {
	log.Info("starting", "version", version(), "postgres", redact.URL(cfg.Postgres), "sink", redact.URL(cfg.Sink), "slot", cfg.Slot)
	destination, stop, err := openSink(cfg, log)
	if err != nil {
		return err
	}
	defer stop()
	defer func() { err = errors.Join(err, destination.Close()) }()
	var role atomic.Value
	role.Store(bridge.RoleNone)
	page := statusserver.Start(statusserver.Config{
		Addr: cfg.Listen,
		Status: func(ctx context.Context) (any, error) {
			s, err := readStatus(ctx, cfg)
			if err == nil {
				s.Role = role.Load().(bridge.Role)
			}
			return s, err
		},
		Ready: func() error {
			if role.Load() == bridge.RoleNone {
				return errors.New("waiting for Postgres")
			}
			return nil
		},
		Logger: log,
	})
	defer func() { err = errors.Join(err, page.Close()) }()
	defer context.AfterFunc(ctx, func() { log.Info("stopping; a second signal ends this at once") })()
	bc := bridgeConfig(cfg, log)
	bc.Sink = destination
	bc.Adopt, bc.AcceptGap = flags.adopt, flags.acceptGap
	bc.OnRole = func(r bridge.Role) { role.Store(r) }
	err = bridge.Run(ctx, bc)
	if err == nil {
		log.Info("stopped")
	}
	return err
}

// bridgeConfig is what all that has to do with the slot needs to know.
func bridgeConfig(cfg *config.Config, log *slog.Logger) bridge.Config {
	return bridge.Config{
		Postgres:    cfg.Postgres,
		Slot:        cfg.Slot,
		Publication: cfg.Publication,
		Buffers:     buffersOf(cfg),
		Destination: destinationOf(cfg),
		Logger:      log,
		TickEvery:   cfg.Recorded.Every,
		TickKeep:    max(cfg.Recorded.Keep, cfg.Replay.Window, time.Minute),
		Keep:        cfg.Recorded.Keep,
		Flow:        flowOf(cfg),
		Trail:       bridge.Trail{Window: cfg.Replay.Window, MaxWAL: int64(cfg.Replay.MaxWAL)},
		Block:       cfg.Blocks(),
	}
}

// destinationOf names where the configured sink delivers, without secrets. Another server of the same cluster is the same
// destination, another stream is not.
func destinationOf(cfg *config.Config) string {
	switch cfg.SinkKind() {
	case config.SinkKindHTTP:
		return redact.URL(cfg.Sink)
	case config.SinkKindEmbedded:
		return "embedded " + cfg.NATS.Stream
	case config.SinkKindNATS:
		return "nats " + cfg.NATS.Stream
	default:
		return cfg.Sink
	}
}

// openSink makes the sink that is configured, and starts the server that belongs to it, if it is the embedded one. stop ends
// that, after the sink is closed.
func openSink(cfg *config.Config, log *slog.Logger) (_ sink.Sink, stop func(), err error) {
	nothing := func() {}
	switch cfg.SinkKind() {
	case config.SinkKindStdout:
		return stdout.New(stdout.Config{Out: os.Stdout, Source: cfg.Source, Logger: log}), nothing, nil
	case config.SinkKindHTTP:
		s, err := openWebhook(cfg, log)
		return s, nothing, err
	case config.SinkKindNATS:
		s, err := openJetStream(cfg, cfg.Sink, log)
		return s, nothing, err
	case config.SinkKindEmbedded:
		embedded, err := embeddedConfig(cfg, log)
		if err != nil {
			return nil, nil, err
		}
		server, err := natsserver.Start(embedded)
		if err != nil {
			return nil, nil, fmt.Errorf("start the embedded NATS server: %w", err)
		}
		log.Info("the embedded NATS server is up", "url", server.ClientURL(), "store", cfg.Embedded.Store)
		s, err := openJetStream(cfg, server.ClientURL(), log)
		if err != nil {
			server.Shutdown()
			return nil, nil, err
		}
		return s, server.Shutdown, nil
	}
	return nil, nil, cfg.RequireSink()
}

// embeddedConfig has the embedded server write to its disk before it acknowledges anything.
func embeddedConfig(cfg *config.Config, log *slog.Logger) (natsserver.Config, error) {
	c := natsserver.Config{StoreDir: cfg.Embedded.Store, ConfigFile: cfg.Embedded.Config, SyncAlways: true, Logger: log}
	if c.ConfigFile != "" {
		return c, nil
	}
	host, port, err := net.SplitHostPort(cfg.Embedded.Listen)
	if err != nil {
		return c, fmt.Errorf("embedded.listen: %w", err)
	}
	c.Host = host
	if c.Port, err = net.LookupPort("tcp", port); err != nil {
		return c, fmt.Errorf("embedded.listen: %w", err)
	}
	return c, nil
}

func openWebhook(cfg *config.Config, log *slog.Logger) (*webhook.Sink, error) {
	format := webhook.Binary
	switch cfg.HTTP.Format {
	case config.FormatStructured:
		format = webhook.Structured
	case config.FormatBatch:
		format = webhook.Batch
	}
	s, err := webhook.New(webhook.Config{
		URL:         cfg.Sink,
		Source:      cfg.Source,
		Format:      format,
		Secrets:     cfg.HTTP.Secrets,
		BearerFile:  cfg.HTTP.BearerFile,
		Headers:     cfg.HTTP.Headers,
		Timeout:     cfg.HTTP.Timeout,
		Concurrency: cfg.HTTP.Concurrency,
		Batch:       cfg.HTTP.Batch,
		Window:      cfg.HTTP.Window,
		Gzip:        cfg.HTTP.Gzip,
		CA:          cfg.HTTP.TLS.CA,
		Cert:        cfg.HTTP.TLS.Cert,
		Key:         cfg.HTTP.TLS.Key,
		Logger:      log,
	})
	if err != nil {
		return nil, fmt.Errorf("http: %w", err)
	}
	return s, nil
}

func openJetStream(cfg *config.Config, servers string, log *slog.Logger) (*jetstream.Sink, error) {
	return jetstream.New(jetstream.Config{
		Servers:      servers,
		Stream:       cfg.NATS.Stream,
		Subject:      cfg.NATS.Subject,
		Source:       cfg.Source,
		Raw:          cfg.NATS.Format == config.FormatRaw,
		CreateStream: cfg.NATS.CreateStream,
		Replicas:     cfg.NATS.Replicas,
		Exclusive:    cfg.NATS.Exclusive,
		Creds:        cfg.NATS.Creds,
		CA:           cfg.NATS.TLS.CA,
		Cert:         cfg.NATS.TLS.Cert,
		Key:          cfg.NATS.TLS.Key,
		Name:         "ebb " + cfg.Slot,
		Logger:       log,
	})
}
