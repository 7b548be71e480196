package webhook

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"

	"ebb/event"
)

func newSecret(t *testing.T) string {
	t.Helper()
	key := make([]byte, 24)
	if _, err := rand.Read(key); err != nil {
		t.Fatal(err)
	}
	return "whsec_" + base64.StdEncoding.EncodeToString(key)
}

// verifies reports whether a request verifies with a symmetric secret, by the official library.
func verifies(t *testing.T, secret string, header http.Header, body []byte) bool {
	t.Helper()
	wh, err := standardwebhooks.NewWebhook(secret)
	if err != nil {
		t.Fatal(err)
	}
	err = wh.Verify(body, header)
	if err != nil && !errors.Is(err, standardwebhooks.ErrNoMatchingSignature) {
		t.Error(err)
	}
	return err == nil
}

// verifiesKey is the same for ed25519, which that library does not have, by the text of the specification.
func verifiesKey(public ed25519.PublicKey, header http.Header, body []byte) bool {
	content := []byte(header.Get("webhook-id") + "." + header.Get("webhook-timestamp") + "." + string(body))
	for s := range strings.SplitSeq(header.Get("webhook-signature"), " ") {
		if encoded, ok := strings.CutPrefix(s, "v1a,"); ok {
			signature, err := base64.StdEncoding.DecodeString(encoded)
			if err == nil && ed25519.Verify(public, content, signature) {
				return true
			}
		}
	}
	return false
}

type received struct {
	header http.Header
	body   []byte // decompressed
}

// keep is a receiver that takes everything and remembers it.
func keep(t *testing.T) (url string, requests func() []received) {
	var mu sync.Mutex
	var all []received
	server := serve(t, func(_ http.ResponseWriter, r *http.Request) {
		body, err := readBody(r)
		if err != nil {
			t.Error(err)
		}
		mu.Lock()
		defer mu.Unlock()
		all = append(all, received{r.Header.Clone(), body})
	})
	return server.URL, func() []received {
		mu.Lock()
		defer mu.Unlock()
		return all
	}
}

func TestSignatures(t *testing.T) {
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	older, newer, other := newSecret(t), newSecret(t), newSecret(t)
	for _, key := range [][]byte{private, private.Seed()} {
		for _, gz := range []bool{false, true} {
			for _, format := range []Format{Binary, Structured, Batch} {
				url, requests := keep(t)
				s := open(t, Config{URL: url, Format: format, Gzip: gz, Secrets: []string{older, newer, "whsk_" + base64.StdEncoding.EncodeToString(key)}})
				mustRun(t, s, 3)
				for _, r := range requests() {
					switch {
					case !verifies(t, older, r.header, r.body), !verifies(t, newer, r.header, r.body):
						t.Errorf("format %d, gzip %v: a signature does not verify: %v", format, gz, r.header)
					case !verifiesKey(public, r.header, r.body):
						t.Errorf("format %d, gzip %v: the ed25519 signature does not verify: %v", format, gz, r.header)
					case verifies(t, other, r.header, r.body), verifies(t, older, r.header, append(bytes.Clone(r.body), ' ')):
						t.Errorf("format %d, gzip %v: whatever is sent verifies", format, gz)
					case (r.header.Get("Content-Encoding") == "gzip") != gz:
						t.Errorf("Content-Encoding %q, gzip %v", r.header.Get("Content-Encoding"), gz)
					}
				}
			}
		}
	}
}

// TestMessageID: the same for the same events, another for others, and without a full stop.
func TestMessageID(t *testing.T) {
	parcels := func(ids ...string) (all []*parcel) {
		for _, id := range ids {
			all = append(all, &parcel{event: event.Event{ID: []byte(id)}})
		}
		return all
	}
	if got := messageID(parcels("a.b ü")); got != "a%2Eb%20%C3%BC" {
		t.Errorf("got %q", got)
	}
	seen := map[string]string{}
	for _, ids := range [][]string{{"1", "2"}, {"1", "x", "2"}, {"1", "y", "2"}, {"2", "1"}, {"12", ""}, {"", "12"}, {"1"}, {"2"}} {
		id := messageID(parcels(ids...))
		if id != messageID(parcels(ids...)) || strings.Contains(id, ".") {
			t.Errorf("%q: %q", ids, id)
		}
		if before, ok := seen[id]; ok {
			t.Errorf("%q and %q have the same webhook-id %s", before, ids, id)
		}
		seen[id] = strings.Join(ids, ",")
	}
	sum := sha256.Sum256([]byte("\x00\x00\x00\x00\x00\x00\x00\x011\x00\x00\x00\x00\x00\x00\x00\x012"))
	if got, want := messageID(parcels("1", "2")), "batch_"+hex.EncodeToString(sum[:16]); got != want {
		t.Errorf("got %s, want %s: it must not change from version to version", got, want)
	}
}

// TestRetriesAreTheSame: a request that is repeated has the webhook-id and the body of the first one, and a signature of its own time.
func TestRetriesAreTheSame(t *testing.T) {
	secret := newSecret(t)
	var ids, bodies []string
	server := serve(t, func(w http.ResponseWriter, r *http.Request) {
		body, err := readBody(r)
		if err != nil {
			t.Error(err)
		}
		if !verifies(t, secret, r.Header, body) {
			t.Error("the signature does not verify")
		}
		ids, bodies = append(ids, r.Header.Get("webhook-id")), append(bodies, string(body))
		if len(ids) < 4 {
			w.WriteHeader(503)
		}
	})
	mustRun(t, open(t, Config{URL: server.URL, Format: Batch, Secrets: []string{secret}}), 5)
	for i := range ids {
		if len(ids) != 4 || ids[i] != ids[0] || bodies[i] != bodies[0] {
			t.Fatalf("requests %q with bodies %q", ids, bodies)
		}
	}
}

// TestFilesAreReadAgain: a secret and a token that are changed while ebb runs are those of the next request, and while a file is missing nothing is
// sent.
func TestFilesAreReadAgain(t *testing.T) {
	dir := t.TempDir()
	secretFile, tokenFile := filepath.Join(dir, "secret"), filepath.Join(dir, "token")
	put := func(name, text string) {
		t.Helper()
		if err := os.WriteFile(name, []byte(text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	first, second := newSecret(t), newSecret(t)
	put(secretFile, first)
	put(tokenFile, "token-number-one")
	url, requests := keep(t)
	log := &logs{}
	s := open(t, Config{URL: url, Secrets: []string{"file:" + secretFile}, BearerFile: tokenFile, Logger: log.logger()})
	check := func(secret, token string) {
		t.Helper()
		mustRun(t, s, 1)
		all := requests()
		r := all[len(all)-1]
		if !verifies(t, secret, r.header, r.body) {
			t.Errorf("request %d is not signed with the secret that is in the file", len(all))
		}
		if got := r.header.Get("Authorization"); got != "Bearer "+token {
			t.Errorf("Authorization %q, want token %q", got, token)
		}
	}
	check(first, "token-number-one")
	put(secretFile, second)
	put(tokenFile, "token-number-two") // of the same length, within a tick of the file system's clock
	check(second, "token-number-two")

	past := time.Now().Add(-time.Hour)
	if err := os.Chtimes(tokenFile, past, past); err != nil {
		t.Fatal(err)
	}
	check(second, "token-number-two")
	put(tokenFile, "token-number-three")
	check(second, "token-number-three")

	if err := os.Remove(tokenFile); err != nil {
		t.Fatal(err)
	}
	before := len(requests())
	ctx, cancel := context.WithCancel(context.Background())
	log.seen = cancel
	if n, err := run(ctx, s, events(1)); n != 0 || !errors.Is(err, context.Canceled) || len(requests()) != before {
		t.Errorf("delivered %d without a token, %v", n, err)
	}
	if text := fmt.Sprint(log.lines()); !strings.Contains(text, "bearer_file: open "+tokenFile) || strings.Contains(text, "token-number") || strings.Contains(text, "whsec_") {
		t.Errorf("logged %s", text)
	}
}

// TestSecretsStaySecret: neither errors nor the log hold them, not even when the receiver sends them back.
func TestSecretsStaySecret(t *testing.T) {
	for _, secret := range []string{"hush", "whsec_hush", "whsec_" + base64.StdEncoding.EncodeToString([]byte("hush")), "whsk_hush", "whsk_aHVzaA==", "file:/nowhere"} {
		_, err := New(Config{URL: "http://h", Secrets: []string{newSecret(t), secret}})
		if err == nil || !strings.Contains(err.Error(), "secrets[1]") || strings.Contains(err.Error(), "hush") || strings.Contains(err.Error(), "aHVzaA") {
			t.Errorf("%q: %v", secret, err)
		}
	}
	file := filepath.Join(t.TempDir(), "f")
	for _, content := range []string{"hush hush", "", "hush\nhush", strings.Repeat("hush", 20_000)} {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, cfg := range []Config{{URL: "http://h", BearerFile: file}, {URL: "http://h", Secrets: []string{"file:" + file}}} {
			if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), file) || strings.Contains(err.Error(), "hush") {
				t.Errorf("%.20q: %v", content, err)
			}
		}
	}
	if err := os.WriteFile(file, []byte("the-hush-token"), 0o600); err != nil {
		t.Fatal(err)
	}
	server := serve(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(500)
		_, _ = fmt.Fprint(w, r.Header)
	})
	ctx, cancel := context.WithCancel(context.Background())
	log := &logs{seen: cancel}
	secret := newSecret(t)
	_, _ = run(ctx, open(t, Config{URL: server.URL, BearerFile: file, Secrets: []string{secret}, Logger: log.logger()}), events(1))
	if text := fmt.Sprint(log.lines()); strings.Contains(text, "hush") || !strings.Contains(text, hidden) || strings.Contains(text, secret) {
		t.Errorf("logged %s", text)
	}
}

// TestEncodedPayload: what the producer has compressed is not compressed again.
func TestEncodedPayload(t *testing.T) {
	var encoding []string
	server := serve(t, func(_ http.ResponseWriter, r *http.Request) { encoding = r.Header["Content-Encoding"] })
	b := events(1)
	b.Events[0].Headers = []event.Header{{Name: []byte("content-encoding"), Value: []byte("br")}}
	if n, err := run(context.Background(), open(t, Config{URL: server.URL, Gzip: true}), b); n != 1 || err != nil || len(encoding) != 1 || encoding[0] != "br" {
		t.Errorf("delivered %d, %v, encodings %q", n, err, encoding)
	}
}
