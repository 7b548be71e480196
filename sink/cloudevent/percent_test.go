package cloudevent

import (
	"bytes"
	"net/url"
	"testing"
)

func TestEncoded(t *testing.T) {
	// Those of the binding's §3.1.3.2 first.
	for in, want := range map[string]string{
		"Euro € 😀": "Euro%20%E2%82%AC%20%F0%9F%98%80",
		"a b":      "a%20b", `"`: "%22", "%": "%25", "!~": "!~", "\x7f": "%7F", "\x00\xff": "%00%FF", "": "",
	} {
		if got := string(AppendEncoded([]byte("x"), in)); got != "x"+want {
			t.Errorf("%q: got %q, want %q", in, got, want)
		}
	}
	for in, want := range map[string]string{"%": "%", "%2": "%2", "%zz": "%zz", "%e2%82%ac": "€", "a%2Gb%": "a%2Gb%", "%%41": "%A"} {
		if got := string(AppendDecoded([]byte("x"), in)); got != "x"+want {
			t.Errorf("decode %q: got %q, want %q", in, got, want)
		}
	}
	for in, want := range map[string]string{
		"a  b": "a  b", " a": "%20a", "a ": "a%20", " ": "%20", "  ": "%20%20", "%20": "%20", "\t": "%09", "é\"": "%C3%A9\"", "": "",
	} {
		if got := string(appendValue([]byte("x"), in)); got != "x"+want {
			t.Errorf("value %q: got %q, want %q", in, got, want)
		}
	}
}

func FuzzEncoded(f *testing.F) {
	for _, s := range trickyTexts() {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, s []byte) {
		enc := AppendEncoded(nil, s)
		for _, c := range enc {
			if c <= ' ' || c >= 0x7f || c == '"' {
				t.Fatalf("%q: %q must not be in %q", s, c, enc)
			}
		}
		if dec := AppendDecoded(nil, enc); !bytes.Equal(dec, s) {
			t.Fatalf("%q comes back as %q", s, dec)
		}
		if dec, err := url.PathUnescape(string(enc)); err != nil || dec != string(s) {
			t.Fatalf("net/url reads %q as %q, %v", enc, dec, err)
		}
		for _, c := range appendValue(nil, s) {
			if c < ' ' || c >= 0x7f {
				t.Fatalf("value %q: %q must not be in it", s, c)
			}
		}
	})
}
