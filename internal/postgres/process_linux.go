package postgres

import "syscall"

// diesWithParent asks for an immediate shutdown (SIGQUIT, as pg_ctl's mode has it) when the parent is gone.
func diesWithParent(attr *syscall.SysProcAttr) { attr.Pdeathsig = syscall.SIGQUIT }
