package webhook

import (
	"errors"
	"io"
	"sync"
)

// payloadBody lends a payload to the requests of one attempt. net/http may read a request's body after it has returned the response,
// when the memory of the payload is already another event's; so the payload is taken back by seal, and not merely no longer used.
type payloadBody struct {
	mu sync.Mutex
	p  []byte
	// sealed is told apart from an empty payload, so that a reader that had read everything sees the end and no error, which
	// would cost the connection.
	sealed bool
}

var errSealed = errors.New("the receiver answered before it had read the payload")

// seal ends the loan. No reader looks at the payload once it has returned.
func (b *payloadBody) seal() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.p, b.sealed = nil, true
}

// reader returns another reader of the payload, from its beginning.
func (b *payloadBody) reader() io.ReadCloser {
	b.mu.Lock()
	defer b.mu.Unlock()
	return &payloadReader{body: b, left: len(b.p)}
}

type payloadReader struct {
	body *payloadBody
	left int
}

func (r *payloadReader) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	r.body.mu.Lock()
	defer r.body.mu.Unlock()
	if r.body.sealed {
		return 0, errSealed
	}
	n := copy(p, r.body.p[len(r.body.p)-r.left:])
	r.left -= n
	return n, nil
}

func (r *payloadReader) Close() error { return nil }
