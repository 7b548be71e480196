package postgres

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// BinEnv names the environment variable with the directory of the server programs to use before all others.
const BinEnv = "EBB_PG_BIN"

// OldestMajor is the oldest major version that Find takes without being told to by BinEnv.
const OldestMajor = 14

// programs must all be in a directory for it to count as an installation. psql is none of them: Debian's packages put a wrapper of
// that name in /usr/bin, away from the server's programs.
var programs = []string{"initdb", "postgres", "pg_ctl"}

// Installation is a directory of Postgres server programs.
type Installation struct {
	BinDir  string // absolute
	Version string // as the server prints it: "15.14", "18beta1"
	Major   int
}

// Program returns the path of one of the programs.
func (i Installation) Program(name string) string { return filepath.Join(i.BinDir, name) }

func (i Installation) String() string { return fmt.Sprintf("Postgres %s in %s", i.Version, i.BinDir) }

// Find looks for Postgres server programs: in the directory that BinEnv names, in PATH, then the newest of the places where
// packages put them. When there are none it fetches them into the user's cache directory (that needs the network once).
func Find(ctx context.Context) (Installation, error) { return systemFinder().find(ctx) }

// FindAtLeast looks for server programs of a major version or a later one: in the directory that BinEnv names, in PATH, then the newest
// of the places where packages put them and of the cache directory. It fetches nothing.
func FindAtLeast(ctx context.Context, major int) (Installation, error) {
	return systemFinder().findAtLeast(ctx, major)
}

func systemFinder() finder {
	return finder{
		bin:    os.Getenv(BinEnv),
		path:   filepath.SplitList(os.Getenv("PATH")),
		places: packagePlaces,
		cache:  CacheDir(),
		fetch:  fetch,
	}
}

// packagePlaces are where the usual packages put the server programs: Debian and Ubuntu, the PGDG packages of Red Hat's kind,
// Alpine, Homebrew on both kinds of Mac and on Linux, Postgres.app, and an installation from source.
var packagePlaces = []string{
	"/usr/lib/postgresql/*/bin",
	"/usr/pgsql-*/bin",
	"/usr/libexec/postgresql*",
	"/opt/homebrew/opt/postgresql*/bin",
	"/usr/local/opt/postgresql*/bin",
	"/home/linuxbrew/.linuxbrew/opt/postgresql*/bin",
	"/Applications/Postgres.app/Contents/Versions/*/bin",
	"/usr/local/pgsql/bin",
}

type finder struct {
	bin    string
	path   []string
	places []string
	cache  string // may be empty
	fetch  func(context.Context) (Installation, error)
}

func (f finder) find(ctx context.Context) (Installation, error) {
	if f.bin != "" {
		found, err := At(ctx, f.bin)
		if err != nil {
			return Installation{}, fmt.Errorf("%s: %w; set it to a directory that holds %s, or unset it",
				BinEnv, err, strings.Join(programs, ", "))
		}
		return found, nil
	}

	found, unfit, ok := f.installed(ctx, OldestMajor, f.places)
	if ok {
		return found, nil
	}
	if err := ctx.Err(); err != nil {
		return Installation{}, fmt.Errorf("find Postgres: %w", err)
	}

	found, err := f.fetch(ctx)
	if err != nil {
		return Installation{}, fmt.Errorf("no Postgres server programs in PATH or the usual places%s, and fetch them: %w; "+
			"install them (`apt-get install postgresql`, `brew install postgresql@17`), "+
			"or set %s to the directory that holds %s", passedOver(unfit), err, BinEnv, strings.Join(programs, ", "))
	}
	return found, nil
}

func (f finder) findAtLeast(ctx context.Context, major int) (Installation, error) {
	places := f.places
	if f.cache != "" {
		places = append(slices.Clone(places), filepath.Join(f.cache, "postgres-*", "bin"))
	}
	f.path = slices.Insert(slices.Clone(f.path), 0, f.bin)
	found, unfit, ok := f.installed(ctx, major, places)
	if !ok {
		return Installation{}, fmt.Errorf("no server programs of Postgres %d or later%s", major, passedOver(unfit))
	}
	return found, nil
}

// installed looks in PATH, then for the newest in the places. It returns what is there and was passed over as well, for an error.
func (f finder) installed(ctx context.Context, oldest int, places []string) (_ Installation, unfit []string, ok bool) {
	fit := func(dir string) (Installation, bool) {
		if !filepath.IsAbs(dir) || missingProgram(dir) != nil {
			return Installation{}, false
		}
		found, err := At(ctx, dir)
		if err == nil && found.Major < oldest {
			err = fmt.Errorf("%s is older than version %d", found, oldest)
		}
		if err != nil {
			unfit = append(unfit, err.Error())
			return Installation{}, false
		}
		return found, true
	}

	for _, dir := range f.path {
		if found, ok := fit(dir); ok {
			return found, nil, true
		}
	}
	var packaged []Installation
	for _, pattern := range places {
		dirs, _ := filepath.Glob(pattern) // the patterns are constants
		for _, dir := range dirs {
			if found, ok := fit(dir); ok {
				packaged = append(packaged, found)
			}
		}
	}
	if len(packaged) == 0 {
		return Installation{}, unfit, false
	}
	return slices.MaxFunc(packaged, func(a, b Installation) int { return cmp.Compare(a.Major, b.Major) }), nil, true
}

func passedOver(unfit []string) string {
	if len(unfit) == 0 {
		return ""
	}
	return " (passed over: " + strings.Join(unfit, "; ") + ")"
}

// At looks at one directory of server programs.
func At(ctx context.Context, dir string) (Installation, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return Installation{}, fmt.Errorf("directory of Postgres programs: %w", err)
	}
	if err := missingProgram(dir); err != nil {
		return Installation{}, err
	}
	out, err := exec.CommandContext(ctx, filepath.Join(dir, "postgres"), "--version").Output()
	if err != nil {
		detail := ""
		if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
			detail = ": " + strings.TrimSpace(string(exit.Stderr))
		}
		return Installation{}, fmt.Errorf("ask the version of %s/postgres: %w%s", dir, err, detail)
	}
	version, major, err := parseVersion(string(out))
	if err != nil {
		return Installation{}, fmt.Errorf("ask the version of %s/postgres: %w", dir, err)
	}
	// A link in PATH leads to the package's own directory, which has the client programs as well.
	if target, err := filepath.EvalSymlinks(filepath.Join(dir, "postgres")); err == nil && missingProgram(filepath.Dir(target)) == nil {
		dir = filepath.Dir(target)
	}
	return Installation{BinDir: dir, Version: version, Major: major}, nil
}

// missingProgram says which of the programs dir does not hold.
func missingProgram(dir string) error {
	for _, program := range programs {
		path := filepath.Join(dir, program)
		info, err := os.Stat(path)
		switch {
		case err != nil:
			return fmt.Errorf("directory %s holds no %s: %w", dir, program, err)
		case info.IsDir() || info.Mode()&0o111 == 0:
			return fmt.Errorf("%s is not an executable file", path)
		}
	}
	return nil
}

// parseVersion reads what `postgres --version` prints, such as "postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)".
func parseVersion(printed string) (version string, major int, err error) {
	_, rest, ok := strings.Cut(printed, "(PostgreSQL) ")
	fields := strings.Fields(rest)
	if !ok || len(fields) == 0 {
		return "", 0, fmt.Errorf("%q is no Postgres version", strings.TrimSpace(printed))
	}
	version = fields[0]
	digits := strings.IndexFunc(version, func(r rune) bool { return r < '0' || r > '9' })
	if digits < 0 {
		digits = len(version)
	}
	major, err = strconv.Atoi(version[:digits])
	if err != nil {
		return "", 0, fmt.Errorf("%q is no Postgres version", version)
	}
	return version, major, nil
}
