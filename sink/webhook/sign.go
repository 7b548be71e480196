package webhook

import (
	"bytes"
	"crypto/ed25519"
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// signer signs as Standard Webhooks 1.0 says. Nothing that it returns, nor an error, holds its key.
type signer interface {
	// sign returns the signature of content with its version before it.
	sign(content []byte) string
}

// minSecretBytes is what Standard Webhooks asks of a symmetric secret.
const minSecretBytes = 24

var errSecret = errors.New("want whsec_ or whsk_ and a key in base64: at least 24 random bytes behind whsec_, an ed25519 private key of 32 or 64 bytes behind whsk_")

// parseSecret never quotes what it was given.
func parseSecret(text []byte) (signer, error) {
	s := string(bytes.TrimSpace(text))
	if encoded, ok := strings.CutPrefix(s, "whsec_"); ok {
		key, err := base64.StdEncoding.DecodeString(encoded)
		if err != nil || len(key) < minSecretBytes {
			return nil, errSecret
		}
		return symmetric(key), nil
	}
	encoded, ok := strings.CutPrefix(s, "whsk_")
	key, err := base64.StdEncoding.DecodeString(encoded)
	switch {
	case !ok || err != nil:
	case len(key) == ed25519.SeedSize:
		return asymmetric(ed25519.NewKeyFromSeed(key)), nil
	case len(key) == ed25519.PrivateKeySize && bytes.Equal(ed25519.NewKeyFromSeed(key[:ed25519.SeedSize]), key):
		return asymmetric(key), nil
	}
	return nil, errSecret
}

type symmetric []byte

func (k symmetric) sign(content []byte) string {
	h := hmac.New(sha256.New, k)
	h.Write(content)
	return "v1," + base64.StdEncoding.EncodeToString(h.Sum(nil))
}

type asymmetric ed25519.PrivateKey

func (k asymmetric) sign(content []byte) string {
	return "v1a," + base64.StdEncoding.EncodeToString(ed25519.Sign(ed25519.PrivateKey(k), content))
}

// secrets are those that are valid now, in the order in which they were given.
type secrets []func() (signer, error)

// newSecrets reads the secrets, so that one that is wrong is found out at the start.
func newSecrets(given []string) (secrets, error) {
	var all secrets
	for i, text := range given {
		var get func() (signer, error)
		if path, ok := strings.CutPrefix(text, "file:"); ok {
			get = (&watched[signer]{path: path, parse: parseSecret}).get
		} else {
			s, err := parseSecret([]byte(text))
			get = func() (signer, error) { return s, err }
		}
		if _, err := get(); err != nil {
			return nil, fmt.Errorf("secrets[%d]: %w", i, err)
		}
		all = append(all, get)
	}
	return all, nil
}

// sign sets the Standard Webhooks headers. What is signed is the body before it is compressed.
func (s secrets) sign(m *message, now time.Time) error {
	timestamp := strconv.FormatInt(now.Unix(), 10)
	m.header["Webhook-Id"] = []string{m.id}
	m.header["Webhook-Timestamp"] = []string{timestamp}
	if len(s) == 0 {
		return nil
	}
	content := make([]byte, 0, len(m.id)+len(timestamp)+len(m.body)+2)
	content = append(append(content, m.id...), '.')
	content = append(append(content, timestamp...), '.')
	content = append(content, m.body...)
	signatures := make([]string, len(s))
	for i, get := range s {
		key, err := get()
		if err != nil {
			return fmt.Errorf("secrets[%d]: %w", i, err)
		}
		signatures[i] = key.sign(content)
	}
	m.header["Webhook-Signature"] = []string{strings.Join(signatures, " ")}
	return nil
}

// watched is what a file holds, which is read again when it has changed. One that is missing or wrong is an error until it is mended: what
// it held before may have been withdrawn.
type watched[T any] struct {
	path  string
	parse func([]byte) (T, error)

	mu    sync.Mutex
	info  os.FileInfo // of what value is; nil when it is to be read again in any case
	value T
}

const (
	// maxWatched bounds a file, against the wrong one.
	maxWatched = 64 << 10
	// settled is how old a file must be for its time of change to tell whether it is the same: clocks of file systems tick slowly.
	settled = time.Second
)

func (w *watched[T]) get() (T, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var none T
	if info, err := os.Stat(w.path); err == nil && w.info != nil && os.SameFile(info, w.info) && info.ModTime().Equal(w.info.ModTime()) && info.Size() == w.info.Size() {
		return w.value, nil
	}
	w.info = nil
	f, err := os.Open(w.path)
	if err != nil {
		return none, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return none, err
	}
	text, err := io.ReadAll(io.LimitReader(f, maxWatched+1))
	if err != nil {
		return none, err
	}
	if len(text) > maxWatched {
		return none, fmt.Errorf("file %s: larger than 64 KB; name the right file", w.path)
	}
	value, err := w.parse(text)
	if err != nil {
		return none, fmt.Errorf("file %s: %w", w.path, err)
	}
	if time.Since(info.ModTime()) > settled {
		w.info, w.value = info, value
	}
	return value, nil
}

// parseToken never quotes what it was given.
func parseToken(text []byte) (string, error) {
	token := string(bytes.TrimSpace(text))
	if token == "" || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
		return "", errors.New("want one token, of printable ASCII characters without spaces")
	}
	return token, nil
}
