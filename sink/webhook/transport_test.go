package webhook

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func writePEM(t *testing.T, name, kind string, der []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// clientPair writes a certificate of its own for a client.
func clientPair(t *testing.T) (cert, key string, pool *x509.CertPool) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	pool = x509.NewCertPool()
	pool.AddCert(parsed)
	return writePEM(t, "cert.pem", "CERTIFICATE", der), writePEM(t, "key.pem", "PRIVATE KEY", pkcs8), pool
}

func TestMutualTLSAndHTTP2(t *testing.T) {
	cert, key, pool := clientPair(t)
	var requests atomic.Int32
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		if r.ProtoMajor != 2 || len(r.TLS.PeerCertificates) != 1 {
			t.Errorf("%s with %d certificates", r.Proto, len(r.TLS.PeerCertificates))
		}
	}))
	server.EnableHTTP2 = true
	server.TLS = &tls.Config{ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: pool}
	server.StartTLS()
	t.Cleanup(server.Close)
	ca := writePEM(t, "ca.pem", "CERTIFICATE", server.Certificate().Raw)
	mustRun(t, open(t, Config{URL: server.URL, CA: ca, Cert: cert, Key: key}), 20)
	if requests.Load() != 20 {
		t.Errorf("%d requests", requests.Load())
	}

	// Whoever has the wrong papers waits, and says why.
	for _, tt := range []struct {
		cfg  Config
		want string
	}{
		{Config{URL: server.URL, Cert: cert, Key: key}, "certificate signed by unknown authority"},
		{Config{URL: server.URL, CA: ca}, ""}, // with TLS 1.3 it is chance whether the alert or the end of the connection is seen first
		{Config{URL: strings.Replace(server.URL, "127.0.0.1", "localhost", 1), CA: ca, Cert: cert, Key: key}, "not localhost"},
	} {
		ctx, cancel := context.WithCancel(context.Background())
		log := &logs{seen: cancel}
		tt.cfg.Logger = log.logger()
		if n, err := run(ctx, open(t, tt.cfg), events(1)); n != 0 || err == nil {
			t.Errorf("delivered %d, %v", n, err)
		}
		if got, _ := log.lines()[0]["reason"].(string); got == "" || !strings.Contains(got, tt.want) {
			t.Errorf("reason %q, want %q", got, tt.want)
		}
	}
	if requests.Load() != 20 {
		t.Errorf("%d requests, after some with the wrong papers", requests.Load())
	}
}

func TestTLSFilesRefused(t *testing.T) {
	cert, key, _ := clientPair(t)
	for _, tt := range []struct {
		cfg  Config
		want string
	}{
		{Config{URL: "https://h", CA: key}, "tls.ca: file " + key},
		{Config{URL: "https://h", CA: "/nowhere"}, "tls.ca: open /nowhere"},
		{Config{URL: "https://h", Cert: cert, Key: cert}, "tls.cert and tls.key"},
		{Config{URL: "https://h", Cert: cert}, "belong together"},
		{Config{URL: "http://h", Cert: cert, Key: key}, "not https"},
		{Config{URL: "http://u@h", BearerFile: cert}, "bearer_file"},
		{Config{URL: "http://h", BearerFile: cert, Headers: map[string]string{"authorization": "a"}}, "bearer_file"},
		{Config{URL: "http://h", Headers: map[string]string{"Webhook-id": "a"}}, `"Webhook-id"`},
		{Config{URL: "http://h", Window: -1}, "window"},
		{Config{URL: "http://h", Format: 3}, "format"},
	} {
		if _, err := New(tt.cfg); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("got %v, want %q", err, tt.want)
		}
	}
}
