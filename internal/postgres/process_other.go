//go:build !linux

package postgres

import "syscall"

// diesWithParent does nothing: only Linux offers it. Elsewhere a server outlives a parent that was killed.
func diesWithParent(*syscall.SysProcAttr) {}
