package postgres

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// account is whom the server runs as. A nil account is the one of this process: Postgres refuses to run as root, so root has to
// pick another one, and nobody else can.
type account struct {
	name     string
	uid, gid uint32
}

// serverAccount picks the account for the data directory: its owner when it has one, else postgres, else nobody.
func serverAccount(dataDir string) (*account, error) {
	if os.Geteuid() != 0 {
		return nil, nil
	}
	if dataDir != "" {
		if info, err := os.Stat(filepath.Join(dataDir, "PG_VERSION")); err == nil {
			stat, ok := info.Sys().(*syscall.Stat_t)
			if ok && stat.Uid != 0 {
				return &account{name: userName(stat.Uid), uid: stat.Uid, gid: stat.Gid}, nil
			}
		}
	}
	for _, name := range []string{"postgres", "nobody"} {
		found, err := user.Lookup(name)
		if unknown := user.UnknownUserError(""); errors.As(err, &unknown) {
			continue
		} else if err != nil {
			return nil, fmt.Errorf("look up the user %s: %w", name, err)
		}
		uid, err := strconv.ParseInt(found.Uid, 10, 64) // macOS prints -2 for nobody
		if err != nil {
			return nil, fmt.Errorf("look up the user %s: %w", name, err)
		}
		gid, err := strconv.ParseInt(found.Gid, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("look up the user %s: %w", name, err)
		}
		return &account{name: name, uid: uint32(uid), gid: uint32(gid)}, nil
	}
	return nil, errors.New("Postgres does not run as root, and there is neither a user postgres nor nobody to run it as; " +
		"add one (`useradd --system postgres`), or start this program as an ordinary user")
}

func userName(uid uint32) string {
	id := strconv.FormatUint(uint64(uid), 10)
	if found, err := user.LookupId(id); err == nil {
		return found.Username
	}
	return id
}

// sysProcAttr is the account's share of a process's attributes.
func (a *account) sysProcAttr() *syscall.SysProcAttr {
	// A process group of its own keeps a terminal's Ctrl-C away from the server: whoever started it decides when it stops.
	attr := &syscall.SysProcAttr{Setpgid: true}
	if a != nil {
		attr.Credential = &syscall.Credential{Uid: a.uid, Gid: a.gid}
	}
	return attr
}

func (a *account) chown(path string) error {
	if a == nil {
		return nil
	}
	if err := os.Chown(path, int(a.uid), int(a.gid)); err != nil {
		return fmt.Errorf("give %s to the user %s: %w", path, a.name, err)
	}
	return nil
}

// canRun tries whether the account can run the program and work in dir. The kernel is asked rather than the mode bits, which know
// nothing of access control lists; they only help to name the culprit.
func (a *account) canRun(program, dir string) error {
	if a == nil {
		return nil
	}
	try := func(workDir string) error {
		cmd := exec.Command(program, "--version")
		cmd.Dir, cmd.SysProcAttr = workDir, a.sysProcAttr()
		return cmd.Run()
	}
	if err := try("/"); err != nil {
		return fmt.Errorf("the user %s, whom the server runs as because Postgres refuses root, cannot run %s%s: %w",
			a.name, program, a.blockedAt(program), err)
	}
	if err := try(dir); err != nil {
		return fmt.Errorf("the user %s, whom the server runs as because Postgres refuses root, cannot reach the directory %s%s: %w; "+
			"choose another directory, or start this program as an ordinary user", a.name, dir, a.blockedAt(dir), err)
	}
	return nil
}

// blockedAt names the first directory on the way to path that the account cannot pass, by the mode bits.
func (a *account) blockedAt(path string) string {
	at := "/"
	for _, part := range strings.Split(strings.Trim(filepath.Dir(path), "/"), "/") {
		at = filepath.Join(at, part)
		info, err := os.Stat(at)
		if err != nil {
			return ""
		}
		if !a.passes(info) {
			return fmt.Sprintf(" (it cannot pass %s, which has mode %s)", at, info.Mode())
		}
	}
	return ""
}

func (a *account) passes(info fs.FileInfo) bool {
	stat, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return true
	}
	switch {
	case stat.Uid == a.uid:
		return info.Mode()&0o100 != 0
	case stat.Gid == a.gid:
		return info.Mode()&0o010 != 0
	}
	return info.Mode()&0o001 != 0
}
