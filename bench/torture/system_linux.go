package main

import (
	"fmt"
	"syscall"

	"golang.org/x/sys/unix"
)

func diesWithParent(attr *syscall.SysProcAttr) { attr.Pdeathsig = syscall.SIGKILL }

// mountMemory mounts a file system of its own, of a fixed size, on a directory. Only root may.
func mountMemory(dir string, size int64) error {
	if err := unix.Mount("ebb-torture", dir, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, fmt.Sprintf("size=%d", size)); err != nil {
		return fmt.Errorf("mount a tmpfs: %w", err)
	}
	return nil
}

// resizeMemory changes the size of a file system that mountMemory has mounted. It cannot be less than what is used.
func resizeMemory(dir string, size int64) error {
	if err := unix.Mount("ebb-torture", dir, "tmpfs", unix.MS_REMOUNT|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, fmt.Sprintf("size=%d", size)); err != nil {
		return fmt.Errorf("resize the tmpfs to %d bytes: %w", size, err)
	}
	return nil
}

func usedMemory(dir string) (int64, error) {
	var stat unix.Statfs_t
	if err := unix.Statfs(dir, &stat); err != nil {
		return 0, fmt.Errorf("measure the tmpfs: %w", err)
	}
	return int64(stat.Blocks-stat.Bfree) * stat.Bsize, nil
}

func unmount(dir string) error { return unix.Unmount(dir, unix.MNT_DETACH) }

// limitFileSize has every write of a process fail with EFBIG that would make a file larger than size. 0 lifts the limit.
func limitFileSize(pid int, size uint64) error {
	var limit unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_FSIZE, nil, &limit); err != nil {
		return fmt.Errorf("read the limit on files: %w", err)
	}
	limit.Cur = limit.Max
	if size > 0 {
		limit.Cur = size
	}
	if err := unix.Prlimit(pid, unix.RLIMIT_FSIZE, &limit, nil); err != nil {
		return fmt.Errorf("limit files: %w", err)
	}
	return nil
}
