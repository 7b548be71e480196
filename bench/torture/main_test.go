package main

import (
	"slices"
	"testing"
)

func TestCommandFor(t *testing.T) {
	got := commandFor(7, []string{"--seed", "3", "--rounds=4", "--total", "1h", "--only", "nats-*", "-v", "--json=x", "--race"})
	if want := []string{"--seed=7", "--rounds=1", "--only", "nats-*", "-v", "--race"}; !slices.Equal(got, want) {
		t.Errorf("the command is %q, want %q", got, want)
	}
}

func TestParseStyles(t *testing.T) {
	if got, err := parseStyles("steady, large"); err != nil || !slices.Equal(got, []style{steady, large}) {
		t.Errorf("two producers are %v, %v", got, err)
	}
	if got, err := parseStyles(defaultStyles); err != nil || len(got) != 9 {
		t.Errorf("the default is %v, %v", got, err)
	}
	for _, wrong := range []string{"", "steady,", "quick"} {
		if _, err := parseStyles(wrong); err == nil {
			t.Errorf("%q is no error", wrong)
		}
	}
}
