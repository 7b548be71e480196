package cloudevent

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/cloudevents/sdk-go/v2/binding"
	sdkevent "github.com/cloudevents/sdk-go/v2/event"
	cehttp "github.com/cloudevents/sdk-go/v2/protocol/http"
	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"ebb/event"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var commitTime = time.Date(2026, 3, 1, 13, 4, 5, 120_000_999, time.FixedZone("CET", 3600))

func fullEvent() event.Event {
	return event.Event{
		Position:    event.Position{Epoch: 3, Commit: 0x16B374D848, Index: 7},
		ID:          []byte("42"),
		Topic:       []byte("membership.changed"),
		Key:         []byte("app/7 group \"é\" 100%"),
		Payload:     []byte("{\"a\": 1.0}"),
		ContentType: "application/json",
		Headers: []event.Header{
			{Name: []byte("traceparent"), Value: []byte("00-4bf9-00f0-01")},
			{Name: []byte("X-Note"), Value: []byte(" 5 % of 7\té ")},
			{Name: []byte("x-note"), Value: []byte("")},
		},
		Time:   commitTime,
		Origin: event.Recovered,
	}
}

// lines returns what a format emits, a line a header, or nothing when it refuses.
func lines(t *testing.T, headers func(e *event.Event, buf []byte, emit func(string, []byte)) ([]byte, error), e *event.Event) (string, error) {
	t.Helper()
	var b strings.Builder
	_, err := headers(e, nil, func(name string, value []byte) { fmt.Fprintf(&b, "%s: %s|\n", name, value) })
	if err != nil && b.Len() > 0 {
		t.Errorf("emitted before the error: %s", b.String())
	}
	return b.String(), err
}

func TestHeaders(t *testing.T) {
	full := fullEvent()
	overridden := full
	overridden.Headers = []event.Header{{Name: []byte("Content-Type"), Value: []byte("text/csv; note=é")}, {Name: []byte("a"), Value: []byte("b")}}
	untyped := full
	untyped.Headers = []event.Header{{Name: []byte("content-type")}}

	for _, tt := range []struct {
		name      string
		event     event.Event
		want, raw string
	}{
		{"full", full, `ce-specversion: 1.0|
ce-id: 42|
ce-source: /ebb%20one|
ce-type: membership.changed|
ce-subject: app/7%20group%20%22%C3%A9%22%20100%25|
ce-time: 2026-03-01T12:04:05.120000Z|
content-type: application/json|
traceparent: 00-4bf9-00f0-01|
X-Note: %205 % of 7%09%C3%A9%20|
x-note: |
Ebb-Position: 3:16/B374D848:7|
Ebb-Origin: recovered|
`, `content-type: application/json|
traceparent: 00-4bf9-00f0-01|
X-Note: %205 % of 7%09%C3%A9%20|
x-note: |
Ebb-Position: 3:16/B374D848:7|
Ebb-Origin: recovered|
`},
		{"bare", event.Event{ID: []byte("1"), Topic: []byte("t")}, `ce-specversion: 1.0|
ce-id: 1|
ce-source: /ebb%20one|
ce-type: t|
Ebb-Position: 0:0/0:0|
`, `Ebb-Position: 0:0/0:0|
`},
		{"empty key", event.Event{ID: []byte("1"), Topic: []byte("a\nb"), Key: []byte{}, Time: time.Unix(0, 0)}, `ce-specversion: 1.0|
ce-id: 1|
ce-source: /ebb%20one|
ce-type: a%0Ab|
ce-subject: |
ce-time: 1970-01-01T00:00:00.000000Z|
Ebb-Position: 0:0/0:0|
`, `Ebb-Position: 0:0/0:0|
`},
		{"content type of the producer", overridden, `ce-specversion: 1.0|
ce-id: 42|
ce-source: /ebb%20one|
ce-type: membership.changed|
ce-subject: app/7%20group%20%22%C3%A9%22%20100%25|
ce-time: 2026-03-01T12:04:05.120000Z|
content-type: text/csv; note=%C3%A9|
a: b|
Ebb-Position: 3:16/B374D848:7|
Ebb-Origin: recovered|
`, `content-type: text/csv; note=%C3%A9|
a: b|
Ebb-Position: 3:16/B374D848:7|
Ebb-Origin: recovered|
`},
		{"no content type by wish of the producer", untyped, `ce-specversion: 1.0|
ce-id: 42|
ce-source: /ebb%20one|
ce-type: membership.changed|
ce-subject: app/7%20group%20%22%C3%A9%22%20100%25|
ce-time: 2026-03-01T12:04:05.120000Z|
Ebb-Position: 3:16/B374D848:7|
Ebb-Origin: recovered|
`, `Ebb-Position: 3:16/B374D848:7|
Ebb-Origin: recovered|
`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := lines(t, Envelope{Source: "/ebb one"}.Headers, &tt.event)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("binary (-want +got):\n%s", diff)
			}
			got, err = lines(t, RawHeaders, &tt.event)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.raw, got); diff != "" {
				t.Errorf("raw (-want +got):\n%s", diff)
			}
		})
	}
}

func TestHeadersRefused(t *testing.T) {
	for _, tt := range []struct{ name, value, want string }{
		{"", "x", `header "": header cannot be passed on: a name must not be empty`},
		{"a b", "x", `header "a b": header cannot be passed on: a name must be a token`},
		{"a:", "x", "token"},
		{"a\r\nb", "x", `header "a\r\nb"`},
		{"é", "x", "token"},
		{"Nats-Msg-Id", "x", "reserved"},
		{"nATS-", "x", "reserved"},
		{"EBB-Position", "x", "reserved"},
		{"ce-id", "x", "reserved"},
		{"Host", "x", "governs"},
		{"content-length", "5", "governs"},
		{"Transfer-Encoding", "chunked", "governs"},
		{"connection", "close", "governs"},
		{"TE", "trailers", "governs"},
		{"Expect", "100-continue", "governs"},
		{"ok", "a\rb", `header "ok": header cannot be passed on: its value holds a line break`},
		{"ok", "a\n", "line break"},
		{"content-type", "a\n", "line break"},
		{strings.Repeat("é", 100), "", `…"`},
	} {
		e := fullEvent()
		e.Headers = append(e.Headers, event.Header{Name: []byte(tt.name), Value: []byte(tt.value)})
		for format, headers := range map[string]func(*event.Event, []byte, func(string, []byte)) ([]byte, error){
			"binary": Envelope{}.Headers,
			"raw":    RawHeaders,
			"json": func(e *event.Event, buf []byte, _ func(string, []byte)) ([]byte, error) {
				b, err := Envelope{}.AppendJSON([]byte("kept"), e)
				if err != nil && string(b) != "kept" {
					t.Errorf("json %q: dst came back as %q", tt.name, b)
				}
				return b, err
			},
		} {
			_, err := lines(t, headers, &e)
			if !errors.Is(err, ErrHeader) || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%s %q: %q: got error %v, want ErrHeader with %q", format, tt.name, tt.value, err, tt.want)
			}
			if err != nil && strings.ContainsAny(err.Error(), "\r\n") {
				t.Errorf("%s %q: error holds a line break: %v", format, tt.name, err)
			}
		}
	}
}

func TestHeadersContentTypeRefused(t *testing.T) {
	two := fullEvent()
	two.Headers = []event.Header{{Name: []byte("content-type"), Value: []byte("a/b")}, {Name: []byte("Content-Type"), Value: []byte("a/b")}}
	if _, err := lines(t, RawHeaders, &two); !errors.Is(err, ErrHeader) {
		t.Errorf("two content types: got %v, want ErrHeader", err)
	}
	nested := fullEvent()
	nested.Headers = []event.Header{{Name: []byte("content-type"), Value: []byte("application/CloudEvents+json")}}
	if _, err := lines(t, Envelope{}.Headers, &nested); !errors.Is(err, ErrHeader) {
		t.Errorf("an event in binary mode that says it is in structured mode: got %v, want ErrHeader", err)
	}
	if _, err := lines(t, RawHeaders, &nested); err != nil {
		t.Errorf("raw: %v", err)
	}
}

func TestHeadersDoNotAllocate(t *testing.T) {
	e, c, buf, n := fullEvent(), Envelope{Source: "ebb"}, make([]byte, 0, 512), 0
	emit := func(name string, value []byte) { n += len(name) + len(value) }
	for name, headers := range map[string]func(*event.Event, []byte, func(string, []byte)) ([]byte, error){
		"binary": c.Headers, "raw": RawHeaders,
	} {
		if got := testing.AllocsPerRun(100, func() {
			var err error
			if buf, err = headers(&e, buf, emit); err != nil {
				t.Fatal(err)
			}
		}); got != 0 {
			t.Errorf("%s: %v allocations an event, want none", name, got)
		}
	}
	dst := make([]byte, 0, 4096)
	e.Headers = nil
	if got := testing.AllocsPerRun(100, func() { dst, _ = c.AppendJSON(dst[:0], &e) }); got != 0 {
		t.Errorf("json: %v allocations an event without headers, want none", got)
	}
}

// trickyTexts are those that go wrong somewhere: every plane of Unicode, what percent-encoding, JSON and HTTP give a meaning to.
func trickyTexts() []string {
	texts := []string{
		"plain", "a b", " a", "a ", `"`, `a"b`, "%", "%25", "%zz", "100%", "a%2", "\\", `\u0000`, "a\tb", "a\nb", "a\r\nb", "\x00", "\x1f", "\x7f", "~!",
		"é", "\u0080", "\u07ff", "\u0800", "\u2028\u2029", "\ufffd", "\uffff", "e\u0301", "<a&b>", "*.>", "a,b;c=d", "ÿ",
	}
	for plane := rune(0); plane <= 16; plane++ {
		texts = append(texts, fmt.Sprintf("plane %d: %c%c%c", plane, plane<<16|0x41, plane<<16|0x1234, plane<<16|0xfffd))
	}
	return texts
}

// TestBinaryAgainstSDK sends headers over the wire format of HTTP and lets the CloudEvents SDK read them. The SDK leaves
// percent-encoding to its caller, so net/url decodes it.
func TestBinaryAgainstSDK(t *testing.T) {
	for _, text := range trickyTexts() {
		e := fullEvent()
		e.ID, e.Topic, e.Key = []byte("id "+text), []byte(text), []byte(text)
		e.Headers = []event.Header{{Name: []byte("X-Text"), Value: []byte(strings.NewReplacer("\r", "", "\n", "").Replace(text))}}

		var wire bytes.Buffer
		fmt.Fprintf(&wire, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n", len(e.Payload))
		_, err := Envelope{Source: "/" + text}.Headers(&e, nil, func(name string, value []byte) {
			fmt.Fprintf(&wire, "%s: %s\r\n", name, value)
		})
		if err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		wire.WriteString("\r\n")
		wire.Write(e.Payload)
		req, err := http.ReadRequest(bufio.NewReader(&wire))
		if err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		got, err := binding.ToEvent(context.Background(), cehttp.NewMessageFromHttpRequest(req))
		if err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		unescape := func(s string) string {
			u, err := url.PathUnescape(s)
			if err != nil {
				t.Errorf("%q: %v", text, err)
			}
			return u
		}
		want := map[string]string{"id": "id " + text, "type": text, "subject": text, "source": "/" + text, "data": string(e.Payload),
			"type of data": "application/json", "time": "2026-03-01T12:04:05.12Z"}
		if diff := cmp.Diff(want, map[string]string{
			"id": unescape(got.ID()), "type": unescape(got.Type()), "subject": unescape(got.Subject()), "source": unescape(got.Source()),
			"data": string(got.Data()), "type of data": got.DataContentType(), "time": got.Time().Format(time.RFC3339Nano),
		}); diff != "" {
			t.Errorf("%q (-want +got):\n%s", text, diff)
		}
		if got := string(AppendDecoded(nil, req.Header.Get("ce-subject"))); got != text {
			t.Errorf("AppendDecoded: got %q, want %q", got, text)
		}
		if got := req.Header.Get("Ebb-Position"); got != e.Position.String() {
			t.Errorf("position %q", got)
		}
	}
}

func TestStructuredAgainstSDK(t *testing.T) {
	for _, text := range trickyTexts() {
		e := fullEvent()
		e.ID, e.Topic, e.Key = []byte("id "+text), []byte(text), []byte(text)
		e.Headers = []event.Header{{Name: []byte("X-Text"), Value: []byte(strings.NewReplacer("\r", "", "\n", "").Replace(text))}}
		e.ContentType, e.Payload = "text/plain", []byte(text)
		line, err := Envelope{Source: "/" + url.PathEscape(text)}.AppendJSON(nil, &e)
		if err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		var got sdkevent.Event
		if err := got.UnmarshalJSON(line); err != nil {
			t.Fatalf("%q: %v\n%s", text, err, line)
		}
		want := map[string]any{"id": "id " + text, "type": text, "subject": text, "source": "/" + url.PathEscape(text), "data": text,
			"type of data": "text/plain", "time": "2026-03-01T12:04:05.12Z", "extensions": map[string]any{
				"xtext": string(e.Headers[0].Value), "ebbposition": "3:16/B374D848:7", "ebborigin": "recovered"}}
		if diff := cmp.Diff(want, map[string]any{"id": got.ID(), "type": got.Type(), "subject": got.Subject(), "source": got.Source(),
			"data": string(got.Data()), "type of data": got.DataContentType(), "time": got.Time().Format(time.RFC3339Nano),
			"extensions": got.Extensions()}); diff != "" {
			t.Errorf("%q (-want +got):\n%s", text, diff)
		}
		if strings.TrimSpace(text) == text && !strings.ContainsAny(text, "\x00") {
			if err := got.Validate(); err != nil {
				t.Errorf("%q: the SDK finds it invalid: %v", text, err)
			}
		}
	}

	e := fullEvent()
	e.ContentType, e.Payload = "application/octet-stream", []byte{0, 0xff, '\n', '"'}
	line, err := Envelope{Source: "ebb"}.AppendJSON(nil, &e)
	if err != nil {
		t.Fatal(err)
	}
	var got sdkevent.Event
	if err := got.UnmarshalJSON(line); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got.Data(), e.Payload) {
		t.Errorf("data %q, want %q", got.Data(), e.Payload)
	}
}
