//go:build !linux

package main

import (
	"errors"
	"syscall"
)

var errNotHere = errors.New("only on Linux")

func diesWithParent(*syscall.SysProcAttr) {}

func mountMemory(string, int64) error { return errNotHere }

func resizeMemory(string, int64) error { return errNotHere }

func usedMemory(string) (int64, error) { return 0, errNotHere }

func unmount(string) error { return errNotHere }

func limitFileSize(int, uint64) error { return errNotHere }
