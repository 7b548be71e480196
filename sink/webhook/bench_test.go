package webhook

import (
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"testing"
)

// BenchmarkRun is the whole way of an event, to a receiver that only reads it.
func BenchmarkRun(b *testing.B) {
	for _, f := range []struct {
		name   string
		format Format
	}{{"binary", Binary}, {"structured", Structured}, {"batch", Batch}} {
		b.Run(f.name, func(b *testing.B) {
			server := serve(b, func(_ http.ResponseWriter, r *http.Request) { _, _ = io.Copy(io.Discard, r.Body) })
			s := open(b, Config{URL: server.URL, Format: f.format})
			batches := notes(b.N, 500, rand.New(rand.NewPCG(1, 2)))
			for _, batch := range batches {
				for i := range batch.Events {
					batch.Events[i].Payload = fmt.Appendf(nil, `{"n": %d, "text": "%0200d"}`, i, i)
				}
			}
			b.ReportAllocs()
			b.ResetTimer()
			if n, err := run(b.Context(), s, batches...); n != b.N || err != nil {
				b.Fatal(n, err)
			}
		})
	}
}
