package main

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

const (
	workPrefix = "ebb-tortured-"
	ownerLock  = "owner.lock"
)

// makeWorkDir makes the directory for everything, and removes those of runs that were killed, with the file systems that these had
// mounted. A lock, which ends with its process, tells them.
func makeWorkDir() (string, error) {
	left, _ := filepath.Glob(filepath.Join(os.TempDir(), workPrefix+"*"))
	for _, dir := range left {
		if lock := lockDir(dir); lock != nil {
			disks, _ := filepath.Glob(filepath.Join(dir, "*", "disk"))
			for _, disk := range disks {
				_ = unmount(disk) // an ordinary directory is none
			}
			_ = os.RemoveAll(dir)
			lock.Close()
		}
	}
	dir, err := os.MkdirTemp("", workPrefix)
	if err != nil {
		return "", fmt.Errorf("make a directory: %w", err)
	}
	if err := os.WriteFile(filepath.Join(dir, ownerLock), nil, 0o600); err != nil {
		return "", fmt.Errorf("make a directory: %w", err)
	}
	if owned = lockDir(dir); owned == nil {
		return "", fmt.Errorf("lock %s: somebody else has it", dir)
	}
	return dir, nil
}

// owned stays open, and locked, as long as the process lives.
var owned *os.File

// lockDir returns nil when somebody else has the directory.
func lockDir(dir string) *os.File {
	file, err := os.OpenFile(filepath.Join(dir, ownerLock), os.O_RDWR, 0)
	if err != nil {
		return nil
	}
	if syscall.Flock(int(file.Fd()), syscall.LOCK_EX|syscall.LOCK_NB) != nil {
		file.Close()
		return nil
	}
	return file
}
