package webhook

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	ceevent "github.com/cloudevents/sdk-go/v2/event"
	cehttp "github.com/cloudevents/sdk-go/v2/protocol/http"
	"github.com/google/go-cmp/cmp"

	"ebb/event"
	"ebb/internal/pgtest"
	"ebb/sink"
	"ebb/sink/cloudevent"
	"ebb/sink/sinktest"
)

func TestMain(m *testing.M) { pgtest.Main(m) }

func TestConformance(t *testing.T) {
	for _, f := range []struct {
		name string
		cfg  Config
		read func(*http.Request, []byte) ([]sinktest.Message, error)
	}{
		{"binary", Config{}, readBinary},
		{"binary, one at a time", Config{Concurrency: 1, Window: 1}, readBinary},
		{"structured", Config{Format: Structured}, readStructured},
		{"batch", Config{Format: Batch, Concurrency: 3, Batch: 7, Gzip: true}, readBatch},
	} {
		t.Run(f.name, func(t *testing.T) { conform(t, f.cfg, f.read) })
	}
}

func conform(t *testing.T, cfg Config, read func(*http.Request, []byte) ([]sinktest.Message, error)) {
	type receiver struct {
		mu       sync.Mutex
		messages []sinktest.Message
		broken   bool
	}
	var r *receiver
	sinktest.Run(t, sinktest.Harness{
		New: func(t *testing.T) sink.Sink {
			mine := &receiver{}
			r = mine
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
				body, err := readBody(req)
				mine.mu.Lock()
				defer mine.mu.Unlock()
				if mine.broken || err != nil {
					panic(http.ErrAbortHandler) // the connection ends without a response
				}
				messages, err := read(req, body)
				if err != nil {
					t.Error(err)
				}
				mine.messages = append(mine.messages, messages...)
			}))
			t.Cleanup(server.Close)
			cfg := cfg
			cfg.URL, cfg.MaxBackoff = server.URL, 100*time.Millisecond
			return open(t, cfg)
		},
		Received: func(*testing.T) []sinktest.Message {
			r.mu.Lock()
			defer r.mu.Unlock()
			return slices.Clone(r.messages)
		},
		Break: func(*testing.T) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.broken = true
		},
		Mend: func(*testing.T) {
			r.mu.Lock()
			defer r.mu.Unlock()
			r.broken = false
		},
		PerKey: true,
		Parks:  true,
	})
}

// readBody returns the body of a request, decompressed.
func readBody(r *http.Request) ([]byte, error) {
	if r.Header.Get("Content-Encoding") != "gzip" {
		return io.ReadAll(r.Body)
	}
	z, err := gzip.NewReader(r.Body)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(z)
}

func readBinary(r *http.Request, body []byte) ([]sinktest.Message, error) {
	r.Body = io.NopCloser(bytes.NewReader(body))
	if e, err := cehttp.NewEventFromHTTPRequest(r); err != nil || e.Validate() != nil {
		return nil, fmt.Errorf("the SDK does not take event %s: %w", r.Header.Get("ce-id"), errors.Join(err, e.Validate()))
	}
	m, err := sinktest.FromBinary(r.Header, body)
	return []sinktest.Message{m}, err
}

func readStructured(r *http.Request, body []byte) ([]sinktest.Message, error) {
	r.Body = io.NopCloser(bytes.NewReader(body))
	e, err := cehttp.NewEventFromHTTPRequest(r)
	if err != nil {
		return nil, fmt.Errorf("the SDK does not take %.200s: %w", body, err)
	}
	m, err := fromSDK(e, body)
	return []sinktest.Message{m}, err
}

func readBatch(r *http.Request, body []byte) ([]sinktest.Message, error) {
	if len(body) > maxBatchBytes && bytes.Count(body, []byte(`"ebbposition"`)) > 1 {
		return nil, fmt.Errorf("a batch of %d bytes", len(body))
	}
	r.Body = io.NopCloser(bytes.NewReader(body))
	events, err := cehttp.NewEventsFromHTTPRequest(r)
	if err != nil {
		return nil, fmt.Errorf("the SDK does not take %.200s: %w", body, err)
	}
	var objects []json.RawMessage
	if err := json.Unmarshal(body, &objects); err != nil {
		return nil, err
	}
	messages := make([]sinktest.Message, len(events))
	for i := range events {
		if messages[i], err = fromSDK(&events[i], objects[i]); err != nil {
			return nil, err
		}
	}
	return messages, nil
}

// fromSDK takes the payload from the object itself, of which it is the last member: the SDK does not keep its white space.
func fromSDK(e *ceevent.Event, object []byte) (sinktest.Message, error) {
	// CloudEvents knows no blank type and no blank subject; rows do.
	blank := strings.TrimSpace(e.Type()) == "" || strings.TrimSpace(e.Subject()) == ""
	if err := e.Validate(); err != nil && !blank {
		return sinktest.Message{}, err
	}
	m := sinktest.Message{ID: e.ID(), Topic: e.Type(), ContentType: e.DataContentType(), Time: e.Time(), Headers: map[string]string{}}
	var raw struct {
		Subject *string `json:"subject"`
	}
	if err := json.Unmarshal(object, &raw); err != nil {
		return m, err
	}
	if raw.Subject != nil && *raw.Subject != e.Subject() {
		return m, fmt.Errorf("subject %q is %q to the SDK", *raw.Subject, e.Subject())
	}
	m.Key = raw.Subject
	_, data, _ := strings.Cut(string(object), `,"data":`)
	m.Payload = strings.TrimSuffix(data, "}")
	var err error
	for name, value := range e.Extensions() {
		text, ok := value.(string)
		switch {
		case !ok:
			return m, fmt.Errorf("extension %s is a %T", name, value)
		case name == "ebbposition":
			m.Position, err = event.ParsePosition(text)
		case name == "ebborigin":
			m.Origin = event.Origin(text)
		default:
			m.Headers[name] = text
		}
		if err != nil {
			return m, err
		}
	}
	return m, nil
}

// open returns a sink that does not wait long.
func open(t testing.TB, cfg Config) *Sink {
	t.Helper()
	if cfg.Source == "" {
		cfg.Source = "test"
	}
	if cfg.MinBackoff == 0 {
		cfg.MinBackoff = time.Millisecond
	}
	s, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// events returns a batch of n events of one key, the first of which has id 1.
func events(n int) *event.Batch {
	b := event.NewBatch()
	for i := range n {
		b.Events = append(b.Events, event.Event{
			Position: event.Position{Epoch: 1, Commit: 0x10, Index: uint64(i + 1)}, ID: b.Copy(fmt.Append(nil, i+1)), Topic: b.Copy([]byte("t")), Key: b.Copy([]byte("k")),
			Payload: b.Copy(fmt.Appendf(nil, `{"n": %d}`, i+1)), ContentType: "application/json",
		})
	}
	return b
}

// run delivers the batches and returns how many events s said are delivered.
func run(ctx context.Context, s *Sink, batches ...*event.Batch) (int, error) {
	in := make(chan *event.Batch, len(batches))
	for _, b := range batches {
		in <- b
	}
	close(in)
	n := 0
	err := s.Run(ctx, in, sink.Outcome{Delivered: func(p sink.Progress) { n += p.Events }})
	return n, err
}

func mustRun(t *testing.T, s *Sink, n int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if got, err := run(ctx, s, events(n)); err != nil || got != n {
		t.Fatalf("delivered %d of %d: %v", got, n, err)
	}
}

// serve starts a receiver that is closed at the end of the test.
func serve(t testing.TB, h http.HandlerFunc) *httptest.Server {
	t.Helper()
	server := httptest.NewServer(h)
	t.Cleanup(server.Close)
	return server
}

func TestRequest(t *testing.T) {
	var got *http.Request
	var body []byte
	server := serve(t, func(w http.ResponseWriter, r *http.Request) {
		got = r
		body, _ = io.ReadAll(r.Body)
	})
	s := open(t, Config{
		URL:     strings.Replace(server.URL, "://", "://us%20er:p%2Fw@", 1) + "/hook?key=1#fragment",
		Headers: map[string]string{"x-tenant": "operator's"},
	})
	b := event.NewBatch()
	payload := "{\n\t\"a\": \"é\x00\"}\r\n"
	b.Events = append(b.Events, event.Event{
		Position: event.Position{Epoch: 2, Commit: 0x10, Index: 3}, ID: []byte("7"), Topic: []byte("a b"), Key: []byte{}, Payload: []byte(payload),
		ContentType: "application/json", Time: time.Unix(1, 5000), Origin: event.Recovered,
		Headers: []event.Header{
			{Name: []byte("X-Tenant"), Value: []byte("producer's")}, {Name: []byte("authorization"), Value: []byte("producer's")},
			{Name: []byte("user-agent"), Value: []byte("producer's")}, {Name: []byte("webhook-Signature"), Value: []byte("producer's")},
			{Name: []byte("X-Two"), Value: []byte("1")}, {Name: []byte("x-two"), Value: []byte("2")},
		},
	})
	if n, err := run(context.Background(), s, b); n != 1 || err != nil {
		t.Fatal(n, err)
	}
	if at, err := strconv.ParseInt(got.Header.Get("Webhook-Timestamp"), 10, 64); err != nil || time.Since(time.Unix(at, 0)).Abs() > time.Minute {
		t.Errorf("webhook-timestamp %q", got.Header.Get("Webhook-Timestamp"))
	}
	got.Header.Del("Webhook-Timestamp")
	want := http.Header{
		"Webhook-Id": {"7"}, "Ce-Specversion": {"1.0"}, "Ce-Id": {"7"}, "Ce-Source": {"test"}, "Ce-Type": {"a%20b"}, "Ce-Subject": {""},
		"Ce-Time": {"1970-01-01T00:00:01.000005Z"}, "Content-Type": {"application/json"}, "Ebb-Position": {"2:0/10:3"}, "Ebb-Origin": {"recovered"},
		"Content-Length": {fmt.Sprint(len(payload))}, "X-Tenant": {"operator's"}, "X-Two": {"1", "2"}, "User-Agent": {"producer's"},
		"Authorization": {"Basic dXMgZXI6cC93"},
	}
	if diff := cmp.Diff(want, got.Header); diff != "" {
		t.Errorf("header (-want +got):\n%s", diff)
	}
	if got.Method != "POST" || got.RequestURI != "/hook?key=1" || got.TransferEncoding != nil {
		t.Errorf("%s %s, transfer encoding %v", got.Method, got.RequestURI, got.TransferEncoding)
	}
	if string(body) != payload {
		t.Errorf("body %q, want %q", body, payload)
	}
}

func TestEmptyPayload(t *testing.T) {
	var length atomic.Int64
	server := serve(t, func(_ http.ResponseWriter, r *http.Request) { length.Store(r.ContentLength) })
	length.Store(-2)
	b := events(1)
	b.Events[0].Payload = nil
	if n, err := run(context.Background(), open(t, Config{URL: server.URL}), b); n != 1 || err != nil || length.Load() != 0 {
		t.Errorf("delivered %d, %v, content length %d", n, err, length.Load())
	}
}

func TestRetries(t *testing.T) {
	for _, status := range []int{300, 301, 302, 304, 307, 308, 400, 401, 404, 408, 410, 425, 429, 500, 503, 599} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			var ids []string
			server := serve(t, func(w http.ResponseWriter, r *http.Request) {
				body, _ := io.ReadAll(r.Body)
				ids = append(ids, r.Header.Get("ce-id")+" "+string(body))
				if r.URL.Path != "/" {
					t.Errorf("redirect followed to %s", r.URL)
				}
				if len(ids) <= 3 {
					w.Header().Set("Location", "/elsewhere")
					w.WriteHeader(status)
					return
				}
				w.WriteHeader(204)
			})
			mustRun(t, open(t, Config{URL: server.URL + "/"}), 2)
			first := `1 {"n": 1}`
			if diff := cmp.Diff([]string{first, first, first, first, `2 {"n": 2}`}, ids); diff != "" {
				t.Errorf("requests (-want +got):\n%s", diff)
			}
		})
	}
}

func TestConnectionIsReused(t *testing.T) {
	var connections, requests atomic.Int32
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		if requests.Add(1)%2 == 0 {
			w.WriteHeader(500)
		}
		_, _ = w.Write(make([]byte, maxDrain-1))
	}))
	server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			connections.Add(1)
		}
	}
	server.Start()
	t.Cleanup(server.Close)
	mustRun(t, open(t, Config{URL: server.URL}), 50)
	if n := connections.Load(); n != 1 {
		t.Errorf("%d connections for %d requests, want one", n, requests.Load())
	}
}

// TestIdleConnectionClosed is about a receiver that closes an idle connection at the moment that the next request comes: the
// request is sent again at once, and is no failure.
func TestIdleConnectionClosed(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	defer l.Close()
	wg.Go(func() {
		for first := true; ; first = false {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			r := bufio.NewReader(conn)
			read := func() {
				if req, err := http.ReadRequest(r); err == nil {
					_, _ = io.Copy(io.Discard, req.Body)
				}
			}
			read()
			_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
			if first {
				read() // the second request, which gets no answer
			}
			conn.Close()
		}
	})
	log := &logs{}
	mustRun(t, open(t, Config{URL: "http://" + l.Addr().String(), Logger: log.logger()}), 2)
	if lines := log.lines(); len(lines) != 0 {
		t.Errorf("logged %v", lines)
	}
}

// TestAnswerBeforePayload is about a receiver that says yes before it has read what it is sent. net/http may go on reading the payload then, as the
// interface of a RoundTripper allows, when the batch is long released.
func TestAnswerBeforePayload(t *testing.T) {
	s := open(t, Config{URL: "http://127.0.0.1"})
	var late io.Reader
	s.client.Transport = roundTrip(func(r *http.Request) (*http.Response, error) {
		if n, err := r.Body.Read(make([]byte, 4)); n != 4 || err != nil {
			t.Errorf("read %d, %v", n, err)
		}
		late = r.Body
		return &http.Response{StatusCode: 202, Body: http.NoBody}, nil
	})
	mustRun(t, s, 1)
	sinktest.Scribble()
	if b, err := io.ReadAll(late); string(b) != `: 1}` || err != nil {
		t.Errorf("read %q of a released batch, %v", b, err)
	}

	s.client.Transport = roundTrip(func(r *http.Request) (*http.Response, error) {
		again, err := r.GetBody()
		if err != nil {
			return nil, err
		}
		for _, body := range []io.Reader{r.Body, again} {
			if b, err := io.ReadAll(body); string(b) != `{"n": 1}` || err != nil {
				t.Errorf("read %q, %v", b, err)
			}
		}
		return &http.Response{StatusCode: 202, Body: http.NoBody}, nil
	})
	mustRun(t, s, 1)
}

type roundTrip func(*http.Request) (*http.Response, error)

func (f roundTrip) RoundTrip(r *http.Request) (*http.Response, error) { return f(r) }

func TestEndlessResponse(t *testing.T) {
	stop := make(chan struct{})
	server := serve(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = w.Write([]byte("x"))
		_ = http.NewResponseController(w).Flush()
		select {
		case <-r.Context().Done():
		case <-stop:
		}
	})
	defer close(stop)
	start := time.Now()
	mustRun(t, open(t, Config{URL: server.URL, Timeout: time.Minute}), 1)
	if d := time.Since(start); d > 20*time.Second {
		t.Errorf("delivered after %v", d)
	}
}

func TestTimeout(t *testing.T) {
	var requests atomic.Int32
	server := serve(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		if requests.Add(1) == 1 {
			<-r.Context().Done()
		}
	})
	log := &logs{}
	mustRun(t, open(t, Config{URL: server.URL, Timeout: 50 * time.Millisecond, Logger: log.logger()}), 1)
	if got := log.lines()[0]["reason"]; got != "no answer within 50ms" {
		t.Errorf("reason %q", got)
	}
}

func TestContextEndsRequest(t *testing.T) {
	arrived := make(chan struct{})
	server := serve(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		close(arrived)
		<-r.Context().Done()
	})
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		<-arrived
		cancel()
	}()
	start := time.Now()
	if n, err := run(ctx, open(t, Config{URL: server.URL}), events(1)); n != 0 || !errors.Is(err, context.Canceled) {
		t.Errorf("delivered %d, %v", n, err)
	}
	if d := time.Since(start); d > 5*time.Second {
		t.Errorf("ended after %v", d)
	}
}

func TestContextEndsPause(t *testing.T) {
	server := serve(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Retry-After", "3000")
		w.WriteHeader(503)
	})
	ctx, cancel := context.WithCancel(context.Background())
	log := &logs{seen: cancel}
	if n, err := run(ctx, open(t, Config{URL: server.URL, Logger: log.logger()}), events(1)); n != 0 || !errors.Is(err, context.Canceled) {
		t.Errorf("delivered %d, %v", n, err)
	}
	if got := log.lines()[0]["retry_in"]; got != float64(3000*time.Second) {
		t.Errorf("retry in %v, want 3000 s", got)
	}
}

func TestAbsentReceiver(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	addr := l.Addr().String()
	l.Close()

	refused := make(chan struct{})
	log := &logs{seen: sync.OnceFunc(func() { close(refused) })}
	s := open(t, Config{URL: "http://u:secret-password@" + addr + "/path?token=secret-token", Logger: log.logger(), MaxBackoff: 20 * time.Millisecond})
	if pos, err := s.Resume(context.Background(), sink.Known{}); err != nil || !pos.Position.IsZero() {
		t.Fatalf("resume: %v, %v", pos, err)
	}
	ended := make(chan error, 1)
	go func() {
		n, err := run(context.Background(), s, events(3))
		if err == nil && n != 3 {
			err = fmt.Errorf("delivered %d of 3", n)
		}
		ended <- err
	}()
	<-refused
	if l, err = net.Listen("tcp", addr); err != nil {
		t.Fatalf("somebody else took the port meanwhile: %v", err)
	}
	server := &httptest.Server{Listener: l, Config: &http.Server{Handler: http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})}}
	server.Start()
	defer server.Close()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	lines := log.lines()
	if len(lines) != 2 || lines[0]["reason"] != "dial: connect: connection refused" || lines[0]["level"] != "WARN" || lines[1]["level"] != "INFO" {
		t.Errorf("logged %v", lines)
	}
	if text := fmt.Sprint(lines); strings.Contains(text, "secret") {
		t.Errorf("logged a secret: %s", text)
	}
}

func TestRejected(t *testing.T) {
	var ids []string
	server := serve(t, func(_ http.ResponseWriter, r *http.Request) { ids = append(ids, r.Header.Get("ce-id")) })
	b := events(3)
	b.Events[1].Headers = []event.Header{{Name: []byte("Transfer-Encoding"), Value: []byte("chunked")}}
	n, err := run(context.Background(), open(t, Config{URL: server.URL}), b)
	var rejection *sink.RejectedError
	if !errors.As(err, &rejection) || rejection.ID != "2" || !errors.Is(err, cloudevent.ErrHeader) || n != 1 || len(ids) != 1 {
		t.Errorf("delivered %d (%v), %v", n, ids, err)
	}
}

func TestConfigRefused(t *testing.T) {
	for _, tt := range []struct {
		cfg  Config
		want string
	}{
		{Config{URL: "http://u:secret/pass@host:80/"}, "cannot be parsed"},
		{Config{URL: "http://u:secret@host:secret/"}, "cannot be parsed"},
		{Config{URL: "secret://u:secret@host"}, "another scheme"},
		{Config{URL: "http:///secret"}, "names no host"},
		{Config{URL: ""}, "another scheme"},
		{Config{URL: "http://h", Timeout: -1}, "timeout"},
		{Config{URL: "http://h", MinBackoff: 2, MaxBackoff: 1}, "backoff"},
		{Config{URL: "http://h", Headers: map[string]string{"ce-id": "secret"}}, `"ce-id"`},
		{Config{URL: "http://h", Headers: map[string]string{"Content-type": "secret"}}, `"Content-type"`},
		{Config{URL: "http://h", Headers: map[string]string{"A": "secret\n"}}, `"A"`},
		{Config{URL: "http://h", Headers: map[string]string{"A": "secret\x00"}}, `"A"`},
		{Config{URL: "http://h", Headers: map[string]string{"A": "secret", "a": "secret"}}, `"a"`},
	} {
		_, err := New(tt.cfg)
		if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%+v: got %v, want an error with %q and no secret", tt.cfg, err, tt.want)
		}
	}
}

// logs keeps what is logged.
type logs struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	seen func() // called for each line
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.seen != nil {
		l.seen()
	}
	return l.buf.Write(p)
}

func (l *logs) logger() *slog.Logger { return slog.New(slog.NewJSONHandler(l, nil)) }

func (l *logs) lines() []map[string]any {
	l.mu.Lock()
	defer l.mu.Unlock()
	var lines []map[string]any
	for line := range strings.Lines(l.buf.String()) {
		var m map[string]any
		if err := json.Unmarshal([]byte(line), &m); err != nil {
			panic(err)
		}
		lines = append(lines, m)
	}
	return lines
}
