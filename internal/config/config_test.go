package config

import (
	"encoding/base64"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const testDSN = "postgres://ebb:hush@localhost:5432/app"

// env returns a look-up of variables given as NAME=value.
func env(vars ...string) func(string) (string, bool) {
	return func(name string) (string, bool) {
		for _, v := range vars {
			if value, ok := strings.CutPrefix(v, name+"="); ok {
				return value, true
			}
		}
		return "", false
	}
}

func write(t *testing.T, text string) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "ebb.yaml")
	if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return name
}

func TestSampleIsTheDefault(t *testing.T) {
	got, err := Load(Sources{File: "testdata/ebb.yaml", FileRequired: true, Getenv: env("DATABASE_URL=" + testDSN)})
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.Postgres = testDSN
	want.Sink = "nats://127.0.0.1:4222"
	if diff := cmp.Diff(&want, got); diff != "" {
		t.Errorf("the sample and Default differ (-default +sample):\n%s", diff)
	}
}

// The sample must name every key, so that it is the documentation of all of them.
func TestSampleIsComplete(t *testing.T) {
	data, err := os.ReadFile("testdata/ebb.yaml")
	if err != nil {
		t.Fatal(err)
	}
	d := &decoder{file: "ebb.yaml", getenv: env("DATABASE_URL=" + testDSN), origins: map[string]origin{}}
	c := Default()
	if err := d.decode(data, &c); err != nil {
		t.Fatal(err)
	}
	walk("", d.entries(&c), func(key string) {
		// The managed table, which the sample shows, cannot have it.
		if _, ok := d.origins[strings.ReplaceAll(key, "[]", "[0]")]; !ok && key != "buffers[].content_type" {
			t.Errorf("the sample does not have %s", key)
		}
		if want(key) == "" {
			t.Errorf("no mend is known for %s", key)
		}
	})
}

func TestTableNames(t *testing.T) {
	for text, want := range map[string][2]string{
		"outbox":           {"public", "outbox"},
		"App.OutBox":       {"app", "outbox"},
		`"App"."Out""Box"`: {"App", `Out"Box`},
		`app."out.box"`:    {"app", "out.box"},
		"größe_1$":         {"public", "größe_1$"},
	} {
		b := Buffer{Table: text}
		if schema, table := b.Name(); schema != want[0] || table != want[1] {
			t.Errorf("%s is read as %q.%q", text, schema, table)
		}
	}
	for _, text := range []string{"", ".", "a.", ".a", "a b", "1a", `"`, `"a`, `""`, `"a"b`, "a.b.c", "a;b", "-", strings.Repeat("a", 64)} {
		if _, _, ok := parseTable(text); ok {
			t.Errorf("%q is read as a table", text)
		}
	}
}

// Every configuration shown in the documentation loads.
func TestDocumentedConfigurations(t *testing.T) {
	found := 0
	pages, err := filepath.Glob("../../docs/*.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, page := range append(pages, "../../README.md") {
		data, err := os.ReadFile(page)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		blocks := strings.Split(string(data), "```yaml\n")
		for _, block := range blocks[1:] {
			block, _, _ = strings.Cut(block, "```")
			if !strings.HasPrefix(block, "postgres:") && !strings.HasPrefix(block, "# ebb.yaml") {
				continue
			}
			// Variables of a documented file are any; those that stand in for flags are not set.
			getenv := func(name string) (string, bool) {
				if strings.HasPrefix(name, "EBB_") {
					return "", false
				}
				return testDSN, true
			}
			found++
			if _, err := load(Sources{File: page, Getenv: getenv}, []byte(block)); err != nil {
				t.Errorf("a configuration in the documentation is refused: %v", err)
			}
		}
	}
	if found == 0 {
		t.Error("the documentation shows no configuration")
	}
}

func TestDefaultIsValid(t *testing.T) {
	c := Default()
	if err := c.Validate(); err != nil {
		t.Fatal(err)
	}
	got, err := Load(Sources{Getenv: env()})
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(&c, got); diff != "" {
		t.Error(diff)
	}
	if got.SinkKind() != SinkKindNone {
		t.Errorf("SinkKind of no sink is %v", got.SinkKind())
	}
}

func TestRequire(t *testing.T) {
	c := Default()
	for _, tt := range []struct {
		err  error
		want string
	}{
		{c.RequirePostgres(), "postgres: not set; give --postgres URL, or set EBB_POSTGRES or DATABASE_URL, " +
			"or write postgres: URL in the configuration file"},
		{c.RequireSink(), "sink: not set; give --sink URL, or set EBB_SINK, or write sink: URL in the configuration file"},
	} {
		var e *Error
		if !errors.As(tt.err, &e) {
			t.Fatalf("%T is no *Error", tt.err)
		}
		if e.Error() != tt.want {
			t.Errorf("got  %s\nwant %s", e, tt.want)
		}
	}
	c.Postgres, c.Sink = testDSN, "stdout"
	if err := errors.Join(c.RequirePostgres(), c.RequireSink()); err != nil {
		t.Error(err)
	}
}

func TestPrecedence(t *testing.T) {
	file := "postgres: postgres://file/db\nsink: nats://file\n"
	for _, tt := range []struct {
		name           string
		env            []string
		flags          Flags
		postgres, sink string
	}{
		{"file", nil, Flags{}, "postgres://file/db", "nats://file"},
		{"empty variables are unset", []string{"EBB_POSTGRES=", "DATABASE_URL=", "EBB_SINK="}, Flags{}, "postgres://file/db", "nats://file"},
		{"environment beats file", []string{"DATABASE_URL=postgres://env/db", "EBB_SINK=nats://env"}, Flags{}, "postgres://env/db", "nats://env"},
		{"EBB_POSTGRES beats DATABASE_URL", []string{"DATABASE_URL=postgres://no/db", "EBB_POSTGRES=postgres://yes/db"}, Flags{}, "postgres://yes/db", "nats://file"},
		{"an empty EBB_POSTGRES does not", []string{"DATABASE_URL=postgres://yes/db", "EBB_POSTGRES="}, Flags{}, "postgres://yes/db", "nats://file"},
		{
			"flags beat all",
			[]string{"DATABASE_URL=postgres://no/db", "EBB_POSTGRES=postgres://no/db", "EBB_SINK=nats://no"},
			Flags{Postgres: "postgres://flag/db", Sink: "stdout"}, "postgres://flag/db", "stdout",
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := Load(Sources{File: write(t, file), Getenv: env(tt.env...), Flags: tt.flags})
			if err != nil {
				t.Fatal(err)
			}
			if c.Postgres != tt.postgres || c.Sink != tt.sink {
				t.Errorf("got postgres %q, sink %q", c.Postgres, c.Sink)
			}
		})
	}
}

func TestWrongEnvironmentAndFlags(t *testing.T) {
	for _, tt := range []struct {
		env   []string
		flags Flags
		want  string
	}{
		{[]string{"EBB_SINK=kafka://u:hush@h"}, Flags{}, `EBB_SINK: "kafka://xxxxx@h" is a URL of no known scheme; write ` + wants["sink"]},
		{nil, Flags{Sink: "127.0.0.1:4222"}, `--sink: "127.0.0.1:4222" is not a URL with a scheme, nor stdout or embedded; write ` + wants["sink"]},
		{[]string{"DATABASE_URL=mysql://u:hush@h/db"}, Flags{}, "DATABASE_URL: the value is not a Postgres URL or DSN; write " + wants["postgres"]},
		{[]string{"EBB_POSTGRES=postgres://u:hu/sh@h/db"}, Flags{}, "EBB_POSTGRES: the value is not a Postgres URL or DSN: invalid port; " +
			"special characters in the user name and the password are written as %XX; write " + wants["postgres"]},
		{nil, Flags{Postgres: "host=h password='hush"}, "--postgres: the value is not a Postgres URL or DSN: " +
			"failed to parse as keyword/value (unterminated quoted string in connection info string); write " + wants["postgres"]},
		{nil, Flags{Postgres: "postgres://u:hush@h/db?sslmode=hush"}, "--postgres: the value is not a Postgres URL or DSN: " +
			"failed to configure TLS (sslmode is invalid); write " + wants["postgres"]},
	} {
		_, err := Load(Sources{Getenv: env(tt.env...), Flags: tt.flags})
		var e *Error
		if !errors.As(err, &e) {
			t.Errorf("%v is no *Error, want %s", err, tt.want)
			continue
		}
		if err.Error() != tt.want {
			t.Errorf("got  %s\nwant %s", err, tt.want)
		}
		if strings.Contains(err.Error(), "hush") {
			t.Errorf("a secret in %s", err)
		}
	}
}

func TestValues(t *testing.T) {
	secret, seed := base64.StdEncoding.EncodeToString(make([]byte, 24)), base64.StdEncoding.EncodeToString(make([]byte, 32))
	c, err := Load(Sources{File: write(t, `
# ${UNSET} in a comment is nobody's business
postgres: "host=a,b user=ebb password='${PASSWORD}' target_session_attrs=primary"
slot: ${STAGE}_ebb
publication: "Ebb, the publication"
source: https://shop.example/orders
listen: ""
buffers:
  - {topic: topic, table: ebb.buffer}
sink: nats://a:4222, tls://b
nats:
  stream: ORDERS
  subject: "shop.${STAGE}.{topic}.{key}"
  format: raw
  create_stream: "${NO}"
  replicas: ${THREE}
  creds: /run/secrets/nats.creds
  on_reject: block
  tls: {ca: "${DIR}/ca.pem", cert: cert.pem, key: key.pem}
embedded:
  store: /var/lib/ebb
  listen: "[::1]:0"
  config: |-
    nats.conf
http:
  headers:
    X-Token: Bearer ${TOKEN}
    X-Plain: "$${TOKEN} costs $5 $$"
  timeout: 1m30s
  format: batch
  secrets: ["${SECRET}", "file:${DIR}/secret", "whsk_${SEED}"]
  concurrency: 4
  batch: 7
  window: 300
  on_reject: block
  bearer_file: ${DIR}/token
  gzip: true
  tls: {ca: "${DIR}/ca.pem", cert: cert.pem, key: key.pem}
replay: {window: 0}
recorded:
  every: 500ms
  keep: 90m
`), Getenv: env("PASSWORD=a: b # c\nslot: evil", "STAGE=prod", "NO=false", "THREE=3", "DIR=/etc", "TOKEN=t: #${STAGE}",
		"SECRET=whsec_"+secret, "SEED="+seed)})
	if err != nil {
		t.Fatal(err)
	}
	want := Default()
	want.Postgres = "host=a,b user=ebb password='a: b # c\nslot: evil' target_session_attrs=primary"
	want.Slot = "prod_ebb"
	want.Publication = "Ebb, the publication"
	want.Source = "https://shop.example/orders"
	want.Listen = ""
	want.Sink = "nats://a:4222, tls://b"
	want.NATS = NATS{
		Stream: "ORDERS", Subject: "shop.prod.{topic}.{key}", Format: FormatRaw, Replicas: 3, Exclusive: true, OnReject: OnRejectBlock,
		Creds: "/run/secrets/nats.creds", TLS: TLS{CA: "/etc/ca.pem", Cert: "cert.pem", Key: "key.pem"},
	}
	want.Embedded = Embedded{Store: "/var/lib/ebb", Listen: "[::1]:0", Config: "nats.conf"}
	want.HTTP = HTTP{
		Format: FormatBatch, Secrets: []string{"whsec_" + secret, "file:/etc/secret", "whsk_" + seed}, Concurrency: 4, Batch: 7, Window: 300, OnReject: OnRejectBlock,
		Headers:    map[string]string{"X-Token": "Bearer t: #${STAGE}", "X-Plain": "${TOKEN} costs $5 $$"},
		BearerFile: "/etc/token", Gzip: true, TLS: TLS{CA: "/etc/ca.pem", Cert: "cert.pem", Key: "key.pem"},
	}
	want.HTTP.Timeout = 90 * time.Second
	want.Replay.Window = 0
	want.Recorded = Recorded{Every: 500 * time.Millisecond, Keep: 90 * time.Minute}
	if diff := cmp.Diff(&want, c); diff != "" {
		t.Error(diff)
	}
}

func TestFlow(t *testing.T) {
	for _, tt := range []struct {
		file string
		want Flow
	}{
		{"{}", Flow{Warn: GB, OnFull: OnFullReject}},
		{"{limit: 64KB}", Flow{Warn: GB, Limit: 64 * KB, OnFull: OnFullReject}}, // the default does not stand in the way
		{"{limit: 4GB, warn: 4GB, on_full: allow}", Flow{Warn: 4 * GB, Limit: 4 * GB, OnFull: OnFullAllow}},
		{"{warn: 8GB}", Flow{Warn: 8 * GB, OnFull: OnFullReject}},
		{"{warn: 0, limit: 1}", Flow{Limit: 1, OnFull: OnFullReject}},
	} {
		c, err := load(Sources{Getenv: env()}, []byte("flow: "+tt.file+"\n"))
		if err != nil || c.Flow != tt.want {
			t.Errorf("%s is %+v, %v, want %+v", tt.file, c, err, tt.want)
		}
	}
}

func TestSinkKind(t *testing.T) {
	for sink, want := range map[string]SinkKind{
		"":                               SinkKindNone,
		"stdout":                         SinkKindStdout,
		"embedded":                       SinkKindEmbedded,
		"nats://127.0.0.1:4222":          SinkKindNATS,
		"nats://token@a,tls://u:p@b:1":   SinkKindNATS,
		"tls://nats.example":             SinkKindNATS,
		"ws://a:80/,wss://b":             SinkKindNATS,
		"http://127.0.0.1:8080/in?a=b,c": SinkKindHTTP,
		"https://u:p@hooks.example/ebb":  SinkKindHTTP,
	} {
		c := Default()
		c.Sink = sink
		if err := c.Validate(); err != nil {
			t.Errorf("%s: %v", sink, err)
		}
		if got := c.SinkKind(); got != want {
			t.Errorf("SinkKind of %q is %v, want %v", sink, got, want)
		}
	}
}

// An event that is rejected holds up others where the options of the configured sink say so, and those of the others do not count.
func TestBlocks(t *testing.T) {
	for _, tt := range []struct {
		sink, nats, http string
		want             bool
	}{
		{"", "block", "block", false},
		{"stdout", "block", "block", false},
		{"nats://a", "park", "block", false},
		{"nats://a", "block", "park", true},
		{"embedded", "park", "block", false},
		{"embedded", "block", "park", true},
		{"http://a", "block", "park", false},
		{"https://a", "park", "block", true},
	} {
		c := Default()
		c.Sink = tt.sink
		if c.Blocks() {
			t.Errorf("%q blocks by default", tt.sink)
		}
		c.NATS.OnReject, c.HTTP.OnReject = tt.nats, tt.http
		if got := c.Blocks(); got != tt.want {
			t.Errorf("%+v: Blocks is %t", tt, got)
		}
	}
}

func TestSize(t *testing.T) {
	for text, want := range map[string]Size{"0": 0, "1": 1, "1000": 1000, "64KB": 64 * KB, "512MB": 512 * MB, "4GB": 4 * GB} {
		got, ok := parseSize(text)
		if !ok || got != want {
			t.Errorf("parseSize(%q) = %d, %v", text, got, ok)
		}
		if got.String() != text {
			t.Errorf("Size(%d) is %q, want %q", got, got, text)
		}
	}
	for _, text := range []string{"", "-1", "+1", "1.5GB", "4 GB", "4gb", "4G", "GB", "9223372036854775807KB", "99999999999999999999", "0x10"} {
		if got, ok := parseSize(text); ok {
			t.Errorf("parseSize(%q) = %d", text, got)
		}
	}
}

func TestFiles(t *testing.T) {
	dir := t.TempDir()
	missing := filepath.Join(dir, "none.yaml")
	if _, err := Load(Sources{File: missing, Getenv: env()}); err != nil {
		t.Errorf("a missing file that nobody asked for: %v", err)
	}
	large := write(t, strings.Repeat("#\n", maxFile))
	for _, tt := range []struct{ file, want string }{
		{missing, missing + ": no such file; write it, or give another one with --config FILE"},
		{dir, dir + ": cannot be read: is a directory"},
		{large, large + ": larger than 64KB; give the right file with --config FILE"},
	} {
		_, err := Load(Sources{File: tt.file, FileRequired: true, Getenv: env()})
		var e *Error
		if !errors.As(err, &e) || e.Error() != tt.want || e.File != tt.file {
			t.Errorf("got  %v\nwant %s", err, tt.want)
		}
	}
}

func FuzzLoad(f *testing.F) {
	sample, err := os.ReadFile("testdata/ebb.yaml")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(sample)
	for _, tt := range wrong {
		f.Add([]byte(tt.file))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) > 4<<10 {
			return
		}
		c, err := load(Sources{File: "ebb.yaml", Getenv: env("HUSH=hush", "NUMBER=3")}, data)
		if err == nil {
			if err := c.Validate(); err != nil {
				t.Fatalf("loaded and not valid: %v", err)
			}
			return
		}
		var e *Error
		if !errors.As(err, &e) {
			t.Fatalf("%T is no *Error: %v", err, err)
		}
		lines := strings.Count(string(data), "\n") + strings.Count(string(data), "\r") + 1
		if e.File != "ebb.yaml" || e.Line < 1 || e.Line > lines {
			t.Errorf("no place in the file (of %d lines): %v", lines, err)
		}
		if e.Msg == "" || strings.ContainsAny(err.Error(), "\r\n") {
			t.Errorf("not one line: %q", err.Error())
		}
	})
}
