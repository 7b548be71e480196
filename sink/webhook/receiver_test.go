package webhook

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	standardwebhooks "github.com/standard-webhooks/standard-webhooks/libraries/go"

	"ebb/internal/pgtest"
)

// What is between the two lines is in docs/http.md, word for word; TestReceiverOfTheGuide sees to that.
// --8<--

// take answers 2xx once the event has had its effect, and a repetition of it as well.
func take(w http.ResponseWriter, r *http.Request, wh *standardwebhooks.Webhook, db *pgx.Conn, apply func(pgx.Tx, []byte) error) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 16<<20))
	if err != nil || wh.Verify(body, r.Header) != nil {
		http.Error(w, "the body cannot be read, or its signature is wrong", http.StatusUnauthorized)
		return
	}
	err = pgx.BeginFunc(r.Context(), db, func(tx pgx.Tx) error {
		seen, err := tx.Exec(r.Context(), "INSERT INTO received (source, id) VALUES ($1, $2) ON CONFLICT DO NOTHING",
			r.Header.Get("ce-source"), r.Header.Get("ce-id"))
		if err != nil || seen.RowsAffected() == 0 {
			return err
		}
		return apply(tx, body)
	})
	if err != nil {
		http.Error(w, "try again", http.StatusServiceUnavailable)
	}
}

// --8<--

// TestReceiverOfTheGuide: with the receiver of docs/http.md each event has its effect once, whatever happens to requests and responses.
func TestReceiverOfTheGuide(t *testing.T) {
	code, err := os.ReadFile("receiver_test.go")
	if err != nil {
		t.Fatal(err)
	}
	guide, err := os.ReadFile("../../docs/http.md")
	if err != nil {
		t.Fatal(err)
	}
	const marker = "// --8<--\n"
	text := strings.Split(string(code), marker)[1]
	create := "CREATE TABLE received (source text, id text, at timestamptz DEFAULT now(), PRIMARY KEY (source, id));"
	for _, part := range []string{strings.TrimSpace(text), create} {
		if !strings.Contains(string(guide), part) {
			t.Errorf("docs/http.md does not have:\n%s", part)
		}
	}

	db := pgtest.New(t)
	db.Exec(t, create, "CREATE TABLE effect (n int, key text, nr bigint GENERATED ALWAYS AS IDENTITY)")
	conn, err := pgx.Connect(t.Context(), db.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	secret := newSecret(t)
	wh, err := standardwebhooks.NewWebhook(secret)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex // a connection is one goroutine's at a time
	requests := 0
	server := serve(t, func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		requests++
		r = r.WithContext(context.WithoutCancel(r.Context()))
		take(w, r, wh, conn, func(tx pgx.Tx, body []byte) error {
			if rand.IntN(5) == 0 {
				return fmt.Errorf("no luck")
			}
			_, err := tx.Exec(r.Context(), "INSERT INTO effect (n, key) SELECT (j->>'n')::int, j->>'key' FROM (SELECT $1::json j) x", body)
			return err
		})
		if rand.IntN(5) == 0 { // it has happened, and the sink does not hear of it
			panic(http.ErrAbortHandler)
		}
	})
	const n = 200
	s := open(t, Config{URL: server.URL, Secrets: []string{secret}, MaxBackoff: 10 * time.Millisecond})
	deliverNotes(t, s, notes(n, 10, rand.New(rand.NewPCG(1, 2))), n)
	for what, want := range map[string]int{
		"SELECT count(*)::int FROM effect":          n,
		"SELECT count(DISTINCT n)::int FROM effect": n,
		"SELECT count(*)::int FROM (SELECT n < lag(n) OVER (PARTITION BY key ORDER BY nr) AS b, key FROM effect) x WHERE b AND key <> ''": 0,
	} {
		if got := pgtest.Value[int](t, db, what); got != want {
			t.Errorf("%s: got %d, want %d", what, got, want)
		}
	}
	if requests <= n {
		t.Errorf("%d requests: nothing was sent twice", requests)
	}

	// A forged event has none.
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, server.URL, strings.NewReader(`{"n": 1000}`))
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{"ce-id": "1000", "ce-source": "test", "webhook-id": "1000", "webhook-timestamp": fmt.Sprint(time.Now().Unix()),
		"webhook-signature": "v1,AAAA"} {
		req.Header.Set(name, value)
	}
	if resp, err := http.DefaultClient.Do(req); err == nil {
		resp.Body.Close()
		if resp.StatusCode != http.StatusUnauthorized {
			t.Errorf("status %d for a forged event", resp.StatusCode)
		}
	}
	http.DefaultClient.CloseIdleConnections()
	if got := pgtest.Value[int](t, db, "SELECT count(*)::int FROM effect"); got != n {
		t.Errorf("a forged event had an effect: %d", got)
	}
}
