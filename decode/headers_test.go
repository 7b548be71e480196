package decode

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"ebb/event"
)

// headersByDecoder does what appendHeaders does, by encoding/json's token stream.
func headersByDecoder(object []byte) (headers []event.Header, ok bool) {
	if string(bytes.TrimSpace(object)) == "null" {
		return nil, true
	}
	d := json.NewDecoder(bytes.NewReader(object))
	if t, err := d.Token(); err != nil || t != json.Delim('{') {
		return nil, false
	}
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return nil, false
		}
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			return nil, false
		}
		h := event.Header{Name: []byte(name.(string)), Value: value}
		var s string
		if value[0] == '"' && json.Unmarshal(value, &s) == nil {
			h.Value = []byte(s)
		}
		headers = append(headers, h)
	}
	return headers, json.Valid(object)
}

func FuzzHeaders(f *testing.F) {
	for _, seed := range []string{
		`{}`, ` { } `, `{"a":"b"}`, "{\n\t\"a\" : 1.50 ,\r\"b\": [ 1, {\"c\": \"}\\\"\"} ] , \"a\":null}", `{"":""}`,
		`{"\ud83d\ude00":"\ud83d \u0000"}`, "{\"a\":\"\xff\"}", `[]`, `null`, ``, `{"a":1}}`, `{"a"}`, `{"a":1,}`, `{"a":"\x"}`, `"{}"`,
		`{"a":{"b":{}},"c":[[],[{}]],"d":true,"e\\":"\\"}`, "{\"a\":[\"\xff\"]}",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, object []byte) {
		batch := event.NewBatch()
		defer batch.Release()
		got, err := appendHeaders(batch, object)
		want, ok := headersByDecoder(object)
		if ok != (err == nil) {
			t.Fatalf("err = %v, encoding/json says valid = %v", err, ok)
		}
		if !ok {
			return
		}
		if diff := cmp.Diff(want, got, cmpopts.EquateEmpty()); diff != "" {
			t.Errorf("-encoding/json +ours:\n%s", diff)
		}
	})
}

func TestDeeplyNestedHeadersAreRefused(t *testing.T) {
	const deep = 1 << 20
	object := `{"a":` + strings.Repeat("[", deep) + strings.Repeat("]", deep) + `}`
	if _, err := appendHeaders(event.NewBatch(), []byte(object)); err == nil {
		t.Error("no error")
	}
}
