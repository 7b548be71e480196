package redact

import (
	"strings"
	"testing"
)

func TestURL(t *testing.T) {
	for text, want := range map[string]string{
		"":         "",
		"stdout":   "stdout",
		"nats://h": "nats://h",
		"postgres://ebb:hush@h:5432/app?sslmode=require":             "postgres://ebb:xxxxx@h:5432/app?sslmode=require",
		"postgres://ebb@h/app":                                       "postgres://ebb@h/app",
		"postgresql://ebb:hush@a:1,b:2/app":                          "postgresql://ebb:xxxxx@a:1,b:2/app",
		"postgres://h/app?user=ebb&password=hush&sslpassword=hush#x": "postgres://h/app?user=ebb&password=xxxxx&sslpassword=xxxxx#x",
		"postgres://h/app?p%61ssword=hush":                           "postgres://h/app?p%61ssword=xxxxx",
		"postgres://ebb:hu/sh@h/app":                                 "postgres://ebb:xxxxx@h/app",
		"postgres://ebb:hu@sh#hush@h/app":                            "postgres://ebb:xxxxx@h/app",
		"postgres://ebb:12/hush@h/app":                               "postgres://ebb:xxxxx@h/app",
		"postgres://ebb:%zzhush@h/app":                               "postgres://ebb:xxxxx@h/app",
		"ebb:hush@h/app":                                             "xxxxx@h/app",
		"host=h password=hush user=ebb":                              "host=h password=xxxxx user=ebb",
		`host=h password = 'hu\'sh hush' user=ebb`:                   "host=h password = xxxxx user=ebb",
		"password='hush hush":                                        "password=xxxxx",
		"nats://hush@h:4222":                                         "nats://xxxxx@h:4222",
		"nats://u:hush@a:4222,nats://u:hush@b":                       "nats://xxxxx@a:4222, nats://xxxxx@b",
		"https://u:hush@h/in?token=hush&a=hush#x":                    "https://xxxxx@h/in?token=xxxxx&a=xxxxx#x",
		"https://h/in/a@b":                                           "https://xxxxx@b",
	} {
		if got := URL(text); got != want {
			t.Errorf("URL(%q)\ngot  %s\nwant %s", text, got, want)
		}
		if strings.Contains(URL(text), "hush") {
			t.Errorf("a secret in %q", URL(text))
		}
	}
}
