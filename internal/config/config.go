// Package config is the configuration of ebb: file, environment, flags.
//
// Load reads a file strictly: an unknown key, a key written twice, a wrong type, an unset variable or an impossible value is
// refused with an [*Error] that names the file, the line, the key, what is wrong and what would be right. What a value says is
// never expanded into YAML: variables are put into scalars after the file has been parsed.
package config

import "time"

// Config is the whole configuration. Default returns one with every default filled in; Load fills in the rest.
type Config struct {
	// Postgres is a libpq URL or DSN; it may name several hosts. Empty: not configured, see RequirePostgres.
	Postgres string
	// Slot is the name of the replication slot; the names of further slots are made from it.
	Slot string
	// Publication is the name of the publication that holds the buffer tables.
	Publication string
	// Source is the CloudEvents source of every event, a URI reference.
	Source string
	// Listen is the host:port of the page, status, metrics and health. Empty turns it off.
	Listen string
	// Buffers are the tables that are carried. There is always at least one.
	Buffers []Buffer
	// Sink is where events go: one URL, several comma-separated NATS URLs, or a word. Empty: not configured, see RequireSink.
	Sink     string
	NATS     NATS
	Embedded Embedded
	HTTP     HTTP
	Replay   Replay
	Flow     Flow
	Recorded Recorded
}

// Buffer maps the columns of a buffer table to the parts of an event. An empty column name means that there is none.
type Buffer struct {
	// Table is a name as Postgres writes it; see Name.
	Table   string
	ID      string
	Topic   Topic
	Key     string
	Payload string
	// ContentType is the media type of the payload; empty for the one that follows from the column's type.
	ContentType string
	Headers     string
	// Delivered says what happens to a delivered row: DeliveredKeep, DeliveredMark or DeliveredDelete.
	Delivered string
	// Recorded is the column that DeliveredMark sets.
	Recorded string
	// Start says what happens to rows that are there at the first start: StartNow leaves them, StartAll carries them.
	Start string
}

// Topic is a column or a literal; exactly one of the two is set.
type Topic struct {
	Column string
	Value  string
}

// NATS holds the options of a NATS sink, and of the embedded one.
type NATS struct {
	Stream string
	// Subject is a template with the placeholders {topic} and {key}.
	Subject string
	// Format is FormatCloudEvents or FormatRaw.
	Format string
	// CreateStream creates the stream when it is missing; an existing stream is never altered.
	CreateStream bool
	// Replicas of a stream that ebb creates: 1, 3 or 5.
	Replicas  int
	Exclusive bool
	// Creds is the path of a NATS credentials file.
	Creds string
	TLS   TLS
	// OnReject is OnRejectPark or OnRejectBlock.
	OnReject string
}

// TLS holds paths of PEM files. Cert and Key are both set or both empty.
type TLS struct {
	CA   string
	Cert string
	Key  string
}

// Embedded holds the options of the in-process NATS server.
type Embedded struct {
	// Store is the directory of the server's streams.
	Store  string
	Listen string
	// Config is the path of a nats-server configuration file to use instead of the other options.
	Config string
}

// HTTP holds the options of an HTTP sink.
type HTTP struct {
	// Format is FormatCloudEvents, FormatStructured or FormatBatch.
	Format string
	// Secrets are Standard Webhooks secrets (whsec_…, whsk_…), or file:PATH for a file that holds one.
	Secrets []string
	Headers map[string]string
	// BearerFile is the path of a file that holds a bearer token.
	BearerFile string
	Timeout    time.Duration
	// Concurrency is how many requests are in flight at once.
	Concurrency int
	// Batch is how many events a request of FormatBatch carries at most.
	Batch int
	// Window is how many events, from the oldest undelivered one on, are under way. When it is full, a key that is stuck is set aside.
	Window int
	// Gzip compresses the bodies of requests.
	Gzip bool
	TLS  TLS
	// OnReject is OnRejectPark or OnRejectBlock.
	OnReject string
}

// Replay bounds the trailing slot.
type Replay struct {
	// Window is how far the trailing slot stays behind; 0 is no trailing slot.
	Window time.Duration
	MaxWAL Size
}

// Flow holds limits on the lag of the main slot, in bytes of WAL; 0 is none.
type Flow struct {
	Warn  Size
	Limit Size
	// OnFull is OnFullReject or OnFullAllow.
	OnFull string
}

// Recorded says how delivery is recorded in the database.
type Recorded struct {
	// Every is the time between two ticks.
	Every time.Duration
	// Keep is how long delivered rows stay in the managed buffer.
	Keep time.Duration
}

// ManagedTable is the buffer table that ebb setup creates.
const ManagedTable = "ebb.buffer"

// The words that Sink may be instead of a URL.
const (
	SinkStdout   = "stdout"
	SinkEmbedded = "embedded"
)

// The words of enumerations.
const (
	FormatCloudEvents = "cloudevents"
	FormatRaw         = "raw"
	FormatStructured  = "structured"
	FormatBatch       = "batch"

	DeliveredKeep   = "keep"
	DeliveredMark   = "mark"
	DeliveredDelete = "delete"

	StartNow = "now"
	StartAll = "all"

	OnRejectPark  = "park"
	OnRejectBlock = "block"

	OnFullReject = "reject"
	OnFullAllow  = "allow"
)

// Default returns the configuration of an empty file. It names no Postgres and no sink.
func Default() Config {
	return Config{
		Slot:        "ebb",
		Publication: "ebb",
		Source:      "ebb",
		Listen:      "127.0.0.1:7070",
		Buffers:     []Buffer{managedBuffer()},
		NATS: NATS{
			Stream:       "EBB",
			Subject:      "ebb.{topic}",
			Format:       FormatCloudEvents,
			CreateStream: true,
			Replicas:     1,
			Exclusive:    true,
			OnReject:     OnRejectPark,
		},
		Embedded: Embedded{
			Store:  "./ebb-data",
			Listen: "127.0.0.1:4222",
		},
		HTTP: HTTP{
			Format:      FormatCloudEvents,
			Timeout:     30 * time.Second,
			Concurrency: 16,
			Batch:       100,
			Window:      10_000,
			OnReject:    OnRejectPark,
		},
		Replay: Replay{
			Window: time.Hour,
			MaxWAL: 4 * GB,
		},
		Flow: Flow{
			Warn:   GB,
			OnFull: OnFullReject,
		},
		Recorded: Recorded{
			Every: time.Second,
			Keep:  time.Hour,
		},
	}
}

// managedBuffer is the mapping of the managed table.
func managedBuffer() Buffer {
	return Buffer{
		Table:     ManagedTable,
		ID:        "id",
		Topic:     Topic{Column: "topic"},
		Key:       "key",
		Payload:   "payload",
		Headers:   "headers",
		Delivered: DeliveredKeep,
		Recorded:  "recorded",
		Start:     StartNow,
	}
}

// ownBuffer holds the defaults of a buffer table that is not the managed one: no column is guessed.
func ownBuffer() Buffer {
	return Buffer{Delivered: DeliveredKeep, Recorded: "recorded", Start: StartNow}
}

// RequirePostgres returns an *Error when no Postgres is configured.
func (c *Config) RequirePostgres() error {
	if c.Postgres != "" {
		return nil
	}
	return &Error{Key: "postgres", Msg: "not set; give --postgres URL, or set EBB_POSTGRES or DATABASE_URL, " +
		"or write postgres: URL in the configuration file"}
}

// RequireSink returns an *Error when no sink is configured.
func (c *Config) RequireSink() error {
	if c.Sink != "" {
		return nil
	}
	return &Error{Key: "sink", Msg: "not set; give --sink URL, or set EBB_SINK, " +
		"or write sink: URL in the configuration file"}
}

// Blocks reports whether an event that the configured sink rejects holds up what is behind it, instead of being parked. The embedded sink goes
// by the options of NATS.
func (c *Config) Blocks() bool {
	switch c.SinkKind() {
	case SinkKindHTTP:
		return c.HTTP.OnReject == OnRejectBlock
	case SinkKindNATS, SinkKindEmbedded:
		return c.NATS.OnReject == OnRejectBlock
	}
	return false
}

// SinkKind says which sink is configured.
type SinkKind int

// The kinds of sinks.
const (
	SinkKindNone SinkKind = iota
	SinkKindNATS
	SinkKindHTTP
	SinkKindStdout
	SinkKindEmbedded
)

// SinkKind returns the kind of Sink, which has been checked by Load.
func (c *Config) SinkKind() SinkKind {
	switch c.Sink {
	case "":
		return SinkKindNone
	case SinkStdout:
		return SinkKindStdout
	case SinkEmbedded:
		return SinkKindEmbedded
	}
	if family, _ := sinkFamily(c.Sink); family == "http" {
		return SinkKindHTTP
	}
	return SinkKindNATS
}
