package webhook

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"os"
	"time"
)

const (
	// maxConnect is how long a connection may take to come about, and then its TLS handshake.
	maxConnect = 10 * time.Second
	// pingAfter is how long an HTTP/2 connection may be silent before it is asked whether it is alive, and pingTimeout how long it may take to
	// answer: one that is dead would else be used again for every request.
	pingAfter, pingTimeout = 15 * time.Second, 10 * time.Second
	// maxResponseHeader bounds what a receiver can make ebb hold, for each request in flight.
	maxResponseHeader = 64 << 10
)

// newTransport keeps a connection for each request that may be in flight, or one for all of them where the receiver speaks HTTP/2.
func newTransport(cfg Config) (*http.Transport, error) {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.DialContext = (&net.Dialer{Timeout: min(maxConnect, cfg.Timeout), KeepAlive: 15 * time.Second}).DialContext
	t.TLSHandshakeTimeout = min(maxConnect, cfg.Timeout)
	t.MaxResponseHeaderBytes = maxResponseHeader
	t.MaxIdleConns = 0
	t.MaxIdleConnsPerHost = cfg.Concurrency
	t.DisableCompression = true
	t.HTTP2 = &http.HTTP2Config{SendPingTimeout: pingAfter, PingTimeout: pingTimeout}
	if cfg.CA == "" && cfg.Cert == "" {
		return t, nil
	}
	t.TLSClientConfig = &tls.Config{MinVersion: tls.VersionTLS12}
	if cfg.CA != "" {
		pem, err := os.ReadFile(cfg.CA)
		if err != nil {
			return nil, fmt.Errorf("tls.ca: %w", err)
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("tls.ca: file %s: no certificate in it; want certificates in PEM form", cfg.CA)
		}
		t.TLSClientConfig.RootCAs = pool
	}
	if cfg.Cert != "" {
		load := func() (*tls.Certificate, error) {
			pair, err := tls.LoadX509KeyPair(cfg.Cert, cfg.Key)
			if err != nil {
				return nil, fmt.Errorf("tls.cert and tls.key: %w; want a certificate and its key in PEM form", err)
			}
			return &pair, nil
		}
		if _, err := load(); err != nil {
			return nil, err
		}
		t.TLSClientConfig.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() }
	}
	return t, nil
}
