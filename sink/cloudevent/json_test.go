package cloudevent

import (
	"bytes"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"ebb/event"
)

func TestAppendJSON(t *testing.T) {
	full := fullEvent()
	full.Headers = append(full.Headers,
		event.Header{Name: []byte("subject"), Value: []byte("<not the subject>")},
		event.Header{Name: []byte("data"), Value: []byte(`"`)},
		event.Header{Name: []byte("xnote3"), Value: []byte("three")},
		event.Header{Name: []byte("X_Note"), Value: []byte("four")},
		event.Header{Name: []byte("_-_"), Value: []byte("nothing left")},
		event.Header{Name: []byte("ebbreplay"), Value: []byte("mine")},
	)
	with := func(contentType, payload string) event.Event {
		return event.Event{ID: []byte("1"), Topic: []byte("t"), ContentType: contentType, Payload: []byte(payload)}
	}
	const bare = `{"specversion":"1.0","id":"1","source":"ebb","type":"t",`
	for _, tt := range []struct {
		name  string
		event event.Event
		want  string
	}{
		{"full", full, `{"specversion":"1.0","id":"42","source":"ebb","type":"membership.changed","subject":"app/7 group \"é\" 100%",` +
			`"time":"2026-03-01T12:04:05.120000Z","datacontenttype":"application/json","ebbposition":"3:16/B374D848:7","ebborigin":"recovered",` +
			`"traceparent":"00-4bf9-00f0-01","xnote":" 5 % of 7\té ","xnote2":"","subject2":"<not the subject>","data2":"\"","xnote3":"three",` +
			`"xnote4":"four","header":"nothing left","ebbreplay2":"mine","data":{"a": 1.0}}`},
		{"empty key", event.Event{ID: []byte("1"), Topic: []byte("t"), Key: []byte{}},
			`{"specversion":"1.0","id":"1","source":"ebb","type":"t","subject":"","ebbposition":"0:0/0:0"}`},
		{"json stays", with("application/json", ` {"a" : "\u0000 < é"}	`), bare + `"datacontenttype":"application/json","ebbposition":"0:0/0:0","data": {"a" : "\u0000 < é"}	}`},
		{"json over lines", with("Application/JSON; charset=utf-8", "{\r\n  \"a\\\" \\\\\": [1, \"b  \\n\"],\n\t\"c\": null\n}"),
			bare + `"datacontenttype":"Application/JSON; charset=utf-8","ebbposition":"0:0/0:0","data":{"a\" \\":[1,"b  \n"],"c":null}}`},
		{"json suffix", with("application/problem+json", `null`), bare + `"datacontenttype":"application/problem+json","ebbposition":"0:0/0:0","data":null}`},
		{"text", with("text/plain", "a\nb"), bare + `"datacontenttype":"text/plain","ebbposition":"0:0/0:0","data":"a\nb"}`},
		{"text that is not UTF-8", with("text/plain; charset=latin1", "\xe9"), bare + `"datacontenttype":"text/plain; charset=latin1","ebbposition":"0:0/0:0","data_base64":"6Q=="}`},
		{"unknown", with("", `{}`), bare + `"ebbposition":"0:0/0:0","data_base64":"e30="}`},
		{"no payload", with("application/json", ""), bare + `"datacontenttype":"application/json","ebbposition":"0:0/0:0"}`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got, err := Envelope{Source: "ebb"}.AppendJSON([]byte("> "), &tt.event)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff("> "+tt.want, string(got)); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
			if !json.Valid(got[2:]) {
				t.Error("not valid JSON")
			}
		})
	}
	for _, payload := range []string{"{", "a", `{"a":"` + "\xff" + `"}`, "\n", "1 2"} {
		e := with("application/json", payload)
		if got, err := (Envelope{}).AppendJSON([]byte("kept"), &e); !errors.Is(err, ErrPayload) || string(got) != "kept" {
			t.Errorf("%q: got %q, %v, want ErrPayload", payload, got, err)
		}
	}
}

func TestAppendStringAgainstEncodingJSON(t *testing.T) {
	for _, s := range append(trickyTexts(), "\xff", "a\xc3", "\xed\xa0\x80", "\xf4\x90\x80\x80", "é\xc3\xc3é") {
		checkString(t, s)
	}
}

func checkString(t *testing.T, s string) {
	t.Helper()
	var want bytes.Buffer
	enc := json.NewEncoder(&want)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(s); err != nil {
		t.Fatal(err)
	}
	if got := string(appendString(nil, s)); got+"\n" != want.String() {
		t.Errorf("%q: got %s, want %s", s, got, want.String())
	}
	if got, want := appendString(nil, []byte(s)), appendString(nil, s); !bytes.Equal(got, want) {
		t.Errorf("%q: %s as bytes, %s as string", s, got, want)
	}
}

// FuzzAppendJSON finds out whether any event makes a line that is not one object of one line with every header and the payload in it.
func FuzzAppendJSON(f *testing.F) {
	for _, s := range trickyTexts() {
		f.Add("1", "t", s, "X-"+s, s, "text/plain", []byte(s))
	}
	f.Add("1", "t", "", "subject", "v", "application/json", []byte("{\n \"a\": \"\\\\\\\"\"}"))
	f.Fuzz(func(t *testing.T, id, topic, key, name, value, contentType string, payload []byte) {
		e := event.Event{ID: []byte(id), Topic: []byte(topic), Key: []byte(key), ContentType: contentType, Payload: payload,
			Headers: []event.Header{{Name: []byte(name), Value: []byte(value)}, {Name: []byte(name), Value: []byte(value)}}}
		line, err := Envelope{Source: topic}.AppendJSON(nil, &e)
		checkString(t, key)
		if err != nil {
			if !errors.Is(err, ErrHeader) && !errors.Is(err, ErrPayload) {
				t.Errorf("foreign error %v", err)
			}
			return
		}
		if bytes.ContainsAny(line, "\r\n") {
			t.Errorf("line break in %q", line)
		}
		if !utf8.Valid(line) {
			t.Errorf("not UTF-8: %q", line)
		}
		var got map[string]json.RawMessage
		if err := json.Unmarshal(line, &got); err != nil {
			t.Fatalf("%v: %q", err, line)
		}
		want := 6 // specversion, id, source, type, subject, ebbposition
		if contentType != "" {
			want++
		}
		if !strings.EqualFold(name, "content-type") {
			want += 2
		}
		if len(payload) > 0 {
			want++
		}
		if len(got) != want {
			t.Errorf("%d members, want %d: %s", len(got), want, line)
		}
		if isJSON(contentType) && len(payload) > 0 {
			var a, b bytes.Buffer
			if json.Compact(&a, payload) != nil || json.Compact(&b, got["data"]) != nil || !bytes.Equal(a.Bytes(), b.Bytes()) {
				t.Errorf("data %s, want %s", got["data"], payload)
			}
		}
	})
}

func BenchmarkHeaders(b *testing.B) {
	e, buf, n := fullEvent(), []byte(nil), 0
	emit := func(name string, value []byte) { n += len(value) }
	b.ReportAllocs()
	for b.Loop() {
		buf, _ = Envelope{Source: "ebb"}.Headers(&e, buf, emit)
	}
}

func BenchmarkAppendJSON(b *testing.B) {
	e, dst := fullEvent(), []byte(nil)
	b.ReportAllocs()
	for b.Loop() {
		dst, _ = Envelope{Source: "ebb"}.AppendJSON(dst[:0], &e)
	}
}
