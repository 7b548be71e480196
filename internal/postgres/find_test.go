package postgres

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// fakeInstallation makes a directory of programs that say a version and do nothing else.
func fakeInstallation(t *testing.T, dir, version string) string {
	t.Helper()
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, program := range programs {
		script := fmt.Sprintf("#!/bin/sh\necho '%s (PostgreSQL) %s'\n", program, version)
		if err := os.WriteFile(filepath.Join(dir, program), []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestFindOrder(t *testing.T) {
	root := t.TempDir()
	named := fakeInstallation(t, filepath.Join(root, "named"), "16.1")
	inPath := fakeInstallation(t, filepath.Join(root, "path"), "15.2")
	linked := filepath.Join(root, "linked")
	if err := os.Mkdir(linked, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, program := range programs {
		if err := os.Symlink(filepath.Join(inPath, program), filepath.Join(linked, program)); err != nil {
			t.Fatal(err)
		}
	}
	onlyClients := filepath.Join(root, "clients")
	if err := os.MkdirAll(onlyClients, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(onlyClients, "psql"), nil, 0o755); err != nil {
		t.Fatal(err)
	}
	fakeInstallation(t, filepath.Join(root, "lib", "9.6", "bin"), "9.6.24")
	newest := fakeInstallation(t, filepath.Join(root, "lib", "17", "bin"), "17beta1")
	fakeInstallation(t, filepath.Join(root, "lib", "16", "bin"), "16.9 (Debian 16.9-1)")
	old := fakeInstallation(t, filepath.Join(root, "old"), "13.1")
	fetched := Installation{BinDir: "/fetched", Version: "17.5", Major: 17}

	packaged := []string{filepath.Join(root, "lib", "*", "bin")}
	for name, test := range map[string]struct {
		finder finder
		want   string
	}{
		"named":                 {finder{bin: named, path: []string{inPath}, places: packaged}, named},
		"path before packages":  {finder{path: []string{"", "relative", onlyClients, inPath}, places: packaged}, inPath},
		"link in path":          {finder{path: []string{linked}}, inPath},
		"newest package":        {finder{path: []string{onlyClients, old}, places: packaged}, newest},
		"named may be old":      {finder{bin: old}, old},
		"fetched as the last":   {finder{path: []string{onlyClients, old}}, "/fetched"},
		"nowhere but the fetch": {finder{}, "/fetched"},
	} {
		t.Run(name, func(t *testing.T) {
			test.finder.fetch = func(context.Context) (Installation, error) { return fetched, nil }
			got, err := test.finder.find(t.Context())
			if err != nil || got.BinDir != test.want {
				t.Errorf("found %v, %v; want %s", got, err, test.want)
			}
		})
	}
}

func TestFindAtLeast(t *testing.T) {
	root := t.TempDir()
	named := fakeInstallation(t, filepath.Join(root, "named"), "17.3")
	inPath := fakeInstallation(t, filepath.Join(root, "path"), "16.2")
	fakeInstallation(t, filepath.Join(root, "lib", "15", "bin"), "15.1")
	packaged := fakeInstallation(t, filepath.Join(root, "lib", "17", "bin"), "17.1")
	cached := fakeInstallation(t, filepath.Join(root, "cache", "postgres-18.4.0-beta.17", "bin"), "18.4")
	all := finder{bin: named, path: []string{inPath}, places: []string{filepath.Join(root, "lib", "*", "bin")},
		cache: filepath.Join(root, "cache")}
	uncached := finder{path: []string{inPath}, places: all.places}
	for name, test := range map[string]struct {
		finder finder
		major  int
		want   string
	}{
		"named":                  {all, 16, named},
		"named is too old":       {all, 18, cached},
		"path":                   {uncached, 16, inPath},
		"newest package":         {uncached, 17, packaged},
		"cache is the newest":    {finder{path: []string{inPath}, places: all.places, cache: all.cache}, 17, cached},
		"all there are too old":  {uncached, 18, ""},
		"named holds no program": {finder{bin: root, path: []string{inPath}}, 15, inPath},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := test.finder.findAtLeast(t.Context(), test.major)
			if got.BinDir != test.want || (err != nil) != (test.want == "") {
				t.Errorf("found %v, %v; want %s", got, err, test.want)
			}
			if err != nil && (!strings.Contains(err.Error(), "Postgres 18") || !strings.Contains(err.Error(), "17.1")) {
				t.Errorf("error %v", err)
			}
		})
	}
}

func TestFindSaysTheMend(t *testing.T) {
	old := fakeInstallation(t, t.TempDir(), "13.1")
	offline := errors.New("no network")
	for name, test := range map[string]struct {
		finder finder
		wants  []string
	}{
		"named is empty": {finder{bin: t.TempDir()}, []string{"EBB_PG_BIN", "holds no initdb", "initdb, postgres, pg_ctl"}},
		"none": {finder{path: []string{old}},
			[]string{"no network", "13.1", "apt-get install postgresql", "brew install postgresql@17", "EBB_PG_BIN"}},
	} {
		t.Run(name, func(t *testing.T) {
			test.finder.fetch = func(context.Context) (Installation, error) { return Installation{}, offline }
			_, err := test.finder.find(t.Context())
			if err == nil {
				t.Fatal("no error")
			}
			for _, want := range test.wants {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error %q does not say %q", err, want)
				}
			}
			if test.finder.bin == "" && !errors.Is(err, offline) {
				t.Errorf("error %v does not wrap the fetch's", err)
			}
		})
	}
}

func TestParseVersion(t *testing.T) {
	for printed, want := range map[string]string{
		"postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)\n": "15.14 15",
		"postgres (PostgreSQL) 18beta1\n":                        "18beta1 18",
		"postgres (PostgreSQL) 9.6.24":                           "9.6.24 9",
		"postgres (PostgreSQL) ":                                 " 0",
		"postgres (PostgreSQL) devel":                            " 0",
		"psql 15":                                                " 0",
	} {
		version, major, err := parseVersion(printed)
		if got := version + " " + strconv.Itoa(major); got != want || (err != nil) != (major == 0) {
			t.Errorf("%q: %q, %v; want %q", printed, got, err, want)
		}
	}
}

// TestFetch has the real programs "downloaded", so that what is put into the cache is put to the same test.
func TestFetch(t *testing.T) {
	found, err := Find(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	account, err := serverAccount("")
	if err != nil {
		t.Fatal(err)
	}
	temp, err := makeTempDir(account)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := temp.remove(); err != nil {
			t.Error(err)
		}
	}()
	downloads := 0
	link := func(target string) func(context.Context, string, string) error {
		return func(_ context.Context, dir, _ string) error {
			downloads++
			if err := os.Mkdir(dir, 0o755); err != nil {
				return err
			}
			return os.Symlink(target, filepath.Join(dir, "bin"))
		}
	}

	broken := fakeInstallation(t, t.TempDir(), "17.5") // its initdb makes nothing, or cannot be reached
	if err := os.WriteFile(filepath.Join(broken, "initdb"), []byte("#!/bin/sh\nexit 3\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if got, err := fetchInto(t.Context(), temp.path, account, link(broken)); err == nil {
		t.Errorf("broken programs were taken: %v", got)
	}
	for range 2 {
		got, err := fetchInto(t.Context(), temp.path, account, link(found.BinDir))
		if err != nil || got.Major != found.Major {
			t.Fatalf("fetched %v, %v", got, err)
		}
	}
	if downloads != 2 {
		t.Errorf("%d downloads, want one of the broken and one of the whole", downloads)
	}
	left, err := filepath.Glob(filepath.Join(temp.path, "fetch-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left over: %v, %v", left, err)
	}
}
