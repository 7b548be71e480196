package config

import (
	"errors"
	"io/fs"
	"os"
)

// maxFile bounds the size of a configuration file, against the wrong file and what parsing it would cost.
const maxFile = 64 << 10

// Sources are the places that a configuration comes from; flags beat the environment, which beats the file.
type Sources struct {
	// File is the path of the file, as errors show it; empty for none.
	File string
	// FileRequired makes a missing file an error; without it a missing file counts as an empty one.
	FileRequired bool
	// Getenv looks up an environment variable, as os.LookupEnv does, which takes its place when it is nil.
	Getenv func(string) (string, bool)
	Flags  Flags
}

// Flags are the values given on the command line; an empty one counts as not given.
type Flags struct {
	Postgres string // --postgres
	Sink     string // --sink
}

// Load reads the configuration and checks all of it. Every error is an *Error, the first one found. A missing Postgres or sink
// is none; see RequirePostgres and RequireSink. Nothing is read or opened but the file, and what a Postgres DSN names (a
// password file, certificates).
func Load(s Sources) (*Config, error) {
	var data []byte
	if s.File != "" {
		var err error
		if data, err = readFile(s.File); err != nil {
			if !errors.Is(err, fs.ErrNotExist) || s.FileRequired {
				return nil, fileError(s.File, err)
			}
			s.File = ""
		}
	}
	return load(s, data)
}

// readFile reads no more than a little over maxFile.
func readFile(name string) ([]byte, error) {
	info, err := os.Stat(name)
	if err != nil {
		return nil, err
	}
	if info.Size() > maxFile {
		return nil, errTooLarge
	}
	return os.ReadFile(name)
}

var errTooLarge = errors.New("larger than 64KB; give the right file with --config FILE")

func fileError(name string, err error) *Error {
	var pathErr *fs.PathError
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return &Error{File: name, Msg: "no such file; write it, or give another one with --config FILE"}
	case errors.As(err, &pathErr):
		return &Error{File: name, Msg: "cannot be read: " + oneLine(pathErr.Err.Error())}
	}
	return &Error{File: name, Msg: oneLine(err.Error())}
}

// load is Load with the file's content at hand.
func load(s Sources, data []byte) (*Config, error) {
	getenv := s.Getenv
	if getenv == nil {
		getenv = os.LookupEnv
	}
	env := func(name string) source {
		text, _ := getenv(name)
		return source{name, text}
	}
	c := Default()
	d := &decoder{file: s.File, getenv: getenv, origins: map[string]origin{}}
	if err := d.decode(data, &c); err != nil {
		return nil, err
	}
	// Whatever the file says is checked before it is overridden: a file is right or wrong by itself.
	if p := c.check(); p != nil {
		return nil, d.located(p)
	}

	for _, o := range []struct {
		field *string
		check func(string) *problem
		given source
	}{
		{&c.Postgres, checkPostgres, firstSet(source{"--postgres", s.Flags.Postgres}, env("EBB_POSTGRES"), env("DATABASE_URL"))},
		{&c.Sink, checkSink, firstSet(source{"--sink", s.Flags.Sink}, env("EBB_SINK"))},
	} {
		if o.given.text == "" {
			continue
		}
		if p := o.check(o.given.text); p != nil {
			return nil, &Error{Key: o.given.name, Msg: p.msg()}
		}
		*o.field = o.given.text
	}
	return &c, nil
}

// source is a flag or a variable, and what it says.
type source struct{ name, text string }

// firstSet returns the first source that says anything. An empty variable counts as unset: that is how container files pass on
// a variable that nobody set.
func firstSet(sources ...source) source {
	for _, s := range sources {
		if s.text != "" {
			return s
		}
	}
	return source{}
}
