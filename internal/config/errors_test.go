package config

import (
	"errors"
	"strings"
	"testing"
)

// wrong holds files and the one line that each is answered with.
var wrong = []struct{ file, want string }{
	// Not a file of keys and values.
	{"slot: 'ebb\nsink: x\n", "ebb.yaml:1: not YAML: could not find end character of single-quoted text"},
	{"slot: ebb\nnats:\n\tstream: X\n", "ebb.yaml:3: not YAML: found a tab, which cannot start any token"},
	{"- slot\n", "ebb.yaml:1: not a configuration; write keys and values, such as slot: ebb"},
	{"slot\n", "ebb.yaml:1: not a configuration; write keys and values, such as slot: ebb"},
	{"slot: ebb\n---\nslot: ebb\n", "ebb.yaml:3: a second document; write the whole configuration in one"},
	{"slot: ebb\nsource: \xff\n", "ebb.yaml:2: not YAML: not UTF-8 text; save the file as UTF-8"},
	{"slot: ebb\nsource: \x00\n", "ebb.yaml:2: not YAML: the control character U+0000; remove it"},
	{"slot: &a ebb\nsource: *a\n", "ebb.yaml:1: slot: a YAML anchor, alias or tag, not a text; write " + wants["slot"]},
	{"<<: {slot: ebb}\n", "ebb.yaml:1: a YAML anchor, alias, tag or complex key; write plain keys and values"},

	// Keys.
	{"slot: ebb\n\nnats:\n  stream: X\n  replica: 3\n", "ebb.yaml:5: nats.replica: unknown key; did you mean nats.replicas?"},
	{"stream: X\n", "ebb.yaml:1: stream: unknown key; did you mean nats.stream?"},
	{"http:\n  nats:\n    stream: x\n", "ebb.yaml:2: http.nats: unknown key; did you mean nats?"},
	{"Slot: ebb\n", "ebb.yaml:1: Slot: unknown key; did you mean slot?"},
	{"flow:\n  kafka_brokers: x\n", "ebb.yaml:2: flow.kafka_brokers: unknown key; write one of warn, limit, on_full"},
	{"buffers:\n  - table: ebb.buffer\n    payloads: x\n", "ebb.yaml:3: buffers[0].payloads: unknown key; did you mean buffers[0].payload?"},
	{"slot: a\nsink: stdout\nslot: b\n", "ebb.yaml:3: slot: written twice, first on line 1; keep one of them"},
	{"nats:\n  stream: A\n\n  stream: B\n", "ebb.yaml:4: nats.stream: written twice, first on line 2; keep one of them"},
	{"postgres:postgres://u:hush@h/db\nslot: ebb\n", ""}, // whatever it says, without the password
	{"postgres://u:hush@h/db: x\n", "ebb.yaml:1: postgres://u:xxxxx@h/db: unknown key; write one of postgres, slot, publication, source, " +
		"listen, buffers, sink, nats, embedded, http, replay, flow, recorded"},

	// Types.
	{"nats:\n  replicas: three\n", `ebb.yaml:2: nats.replicas: "three" is not a number; write 1, 3 or 5`},
	{"nats:\n  replicas: \"3\"\n", `ebb.yaml:2: nats.replicas: "3" is not a number; write 1, 3 or 5`},
	{"nats:\n  replicas: 1.5\n", `ebb.yaml:2: nats.replicas: 1.5 is not a number; write 1, 3 or 5`},
	{"nats:\n  replicas: [1]\n", `ebb.yaml:2: nats.replicas: a list, not a number; write 1, 3 or 5`},
	{"nats:\n  replicas: ${HUSH}\n", `ebb.yaml:2: nats.replicas: the value of "${HUSH}" is not a number; write 1, 3 or 5`},
	{"nats:\n  create_stream: yes\n", `ebb.yaml:2: nats.create_stream: "yes" is neither true nor false; write true or false`},
	{"nats:\n  create_stream: 1\n", `ebb.yaml:2: nats.create_stream: 1 is neither true nor false; write true or false`},
	{"nats: nats://h\n", "ebb.yaml:1: nats: a single value, not a set of keys; write its options on lines of their own, indented"},
	{"slot: ebb\nnats:\nsink: stdout\n", "ebb.yaml:2: nats: no value; write its options on lines of their own, indented, or leave the key out"},
	{"slot:\n", "ebb.yaml:1: slot: no value; write " + wants["slot"]},
	{"slot: 5\n", "ebb.yaml:1: slot: 5 is not a text; write " + wants["slot"]},
	{"slot: true\n", "ebb.yaml:1: slot: true is not a text; write " + wants["slot"]},
	{"slot: {a: b}\n", "ebb.yaml:1: slot: a set of keys, not a text; write " + wants["slot"]},
	{"listen: 7070\n", "ebb.yaml:1: listen: 7070 is not a text; write " + wants["listen"]},
	{"http:\n  timeout: 30\n", "ebb.yaml:2: http.timeout: 30 is a duration without its unit; write a duration such as 30s, 90m or 1h"},
	{"http:\n  timeout: soon\n", `ebb.yaml:2: http.timeout: "soon" is not a duration; write a duration such as 30s, 90m or 1h`},
	{"recorded:\n  keep: 7d\n", `ebb.yaml:2: recorded.keep: "7d" is not a duration; write a duration such as 90m or 1h, at least 10s`},
	{"replay:\n  max_wal: 4 GB\n", `ebb.yaml:2: replay.max_wal: "4 GB" is not a size; write a size such as 512MB or 4GB`},
	{"flow:\n  warn: -1\n", `ebb.yaml:2: flow.warn: -1 is not a size; write a size such as 512MB or 1GB, or 0 for none`},
	{"buffers: ebb.buffer\n", "ebb.yaml:1: buffers: a single value, not a list; write a list of tables, or leave the key out for the managed table"},
	{"buffers:\n", "ebb.yaml:1: buffers: no value; write a list of tables, or leave the key out for the managed table"},
	{"buffers:\n  - ebb.buffer\n", "ebb.yaml:2: buffers[0]: a single value, not a set of keys; write table: NAME and its columns below the dash"},
	{"http:\n  headers: [a]\n", "ebb.yaml:2: http.headers: a list, not a set of keys; write {NAME: VALUE}"},
	{"http:\n  headers:\n    X-A: 1\n", "ebb.yaml:3: http.headers.X-A: the value is not a text; write a text"},

	// Variables.
	{"postgres: ${NOBODY}\n", "ebb.yaml:1: postgres: the environment variable NOBODY is not set; set it, or write " + wants["postgres"]},
	{"nats:\n  tls: {ca: '${NOBODY}/ca.pem'}\n", "ebb.yaml:2: nats.tls.ca: the environment variable NOBODY is not set; set it, or write the path of a PEM file"},
	{"http:\n  secrets:\n    - whsec_hush\n    - ${NOBODY}\n", "ebb.yaml:4: http.secrets[1]: the environment variable NOBODY is not set; set it, or write " + wants["http.secrets[]"]},
	{"slot: a${b\n", "ebb.yaml:1: slot: a ${ without the name of a variable and a } behind it; write ${NAME}, or $${ for a plain ${"},
	{"slot: ${A-b}\n", "ebb.yaml:1: slot: a ${ without the name of a variable and a } behind it; write ${NAME}, or $${ for a plain ${"},

	// Values.
	{"postgres: mysql://u:hush@h/db\n", "ebb.yaml:1: postgres: the value is not a Postgres URL or DSN; write " + wants["postgres"]},
	{"postgres: postgres://u:hu#sh@h:port/db\n", "ebb.yaml:1: postgres: the value is not a Postgres URL or DSN: invalid port; " +
		"special characters in the user name and the password are written as %XX; write " + wants["postgres"]},
	{"slot: Ebb-1\n", `ebb.yaml:1: slot: "Ebb-1" is not the name of a slot; write 1 to 57 of the characters a-z, 0-9 and _, such as ebb`},
	{"slot: \"\"\n", `ebb.yaml:1: slot: "" is not the name of a slot; write ` + wants["slot"]},
	{"slot: " + strings.Repeat("a", 58) + "\n", `ebb.yaml:1: slot: "` + strings.Repeat("a", 58) + `" is not the name of a slot; write ` + wants["slot"]},
	{"slot: ${HUSH}-x\n", `ebb.yaml:1: slot: the value of "${HUSH}-x" is not the name of a slot; write ` + wants["slot"]},
	{"publication: \"\"\n", `ebb.yaml:1: publication: "" is not the name of a publication; write a name of 1 to 63 bytes, such as ebb`},
	{"source: \"\"\n", `ebb.yaml:1: source: "" is not a URI reference; write ` + wants["source"]},
	{"source: a b\n", `ebb.yaml:1: source: "a b" is not a URI reference; write ` + wants["source"]},
	{"listen: localhost\n", `ebb.yaml:1: listen: "localhost" is not host:port; write ` + wants["listen"]},
	{"listen: localhost:70000\n", `ebb.yaml:1: listen: "localhost:70000" is not host:port; write ` + wants["listen"]},
	{"sink: localhost:4222\n", `ebb.yaml:1: sink: "localhost:4222" is not a URL with a scheme, nor stdout or embedded; write ` + wants["sink"]},
	{"sink: kafka://u:hush@h\n", `ebb.yaml:1: sink: "kafka://xxxxx@h" is a URL of no known scheme; write ` + wants["sink"]},
	{"sink: \"kafka://u:hush@${NUMBER}\"\n", `ebb.yaml:1: sink: the value of "kafka://xxxxx@${NUMBER}" is a URL of no known scheme; write ` + wants["sink"]},
	{"sink: nats://a,http://b\n", `ebb.yaml:1: sink: "nats://a, http://b" is more than one URL; HTTP takes one; write ` + wants["sink"]},
	{"sink: http://a,http://b\n", `ebb.yaml:1: sink: "http://a, http://b" is more than one URL; HTTP takes one; write ` + wants["sink"]},
	{"sink: nats://a,wss://b\n", `ebb.yaml:1: sink: "nats://a, wss://b" is a mixture of schemes; NATS servers are all nats or tls, or all ws or wss; write ` + wants["sink"]},
	{"sink: 'nats://'\n", `ebb.yaml:1: sink: "nats://" is a URL that cannot be read; write ` + wants["sink"]},
	{"sink: nats://h:99999\n", `ebb.yaml:1: sink: "nats://h:99999" is a URL with an impossible port; write ` + wants["sink"]},
	{"sink: nats://h/stream\n", `ebb.yaml:1: sink: "nats://h/stream" is a URL with a path, which NATS does not have; write ` + wants["sink"]},
	{"nats:\n  stream: a.b\n", `ebb.yaml:2: nats.stream: "a.b" is not the name of a stream; write ` + wants["nats.stream"]},
	{"nats:\n  subject: ebb..x\n", `ebb.yaml:2: nats.subject: "ebb..x" is a subject with an empty token; write ` + wants["nats.subject"]},
	{"nats:\n  subject: ebb.>\n", `ebb.yaml:2: nats.subject: "ebb.>" is a subject with a wildcard; write ` + wants["nats.subject"]},
	{"nats:\n  subject: ebb.{id}\n", `ebb.yaml:2: nats.subject: "ebb.{id}" is a subject with a placeholder that is neither {topic} nor {key}; write ` + wants["nats.subject"]},
	{"nats:\n  subject: ebb. x\n", `ebb.yaml:2: nats.subject: "ebb. x" is a subject with a space, a control character or a letter outside ASCII; write ` + wants["nats.subject"]},
	{"nats:\n  subject: $JS.x\n", `ebb.yaml:2: nats.subject: "$JS.x" is a subject that belongs to the NATS server; write ` + wants["nats.subject"]},
	{"nats:\n  subject: \"\"\n", `ebb.yaml:2: nats.subject: "" is not a subject; write ` + wants["nats.subject"]},
	{"nats:\n  format: json\n", `ebb.yaml:2: nats.format: "json" is not cloudevents or raw; write cloudevents or raw`},
	{"nats:\n  replicas: 2\n", "ebb.yaml:2: nats.replicas: 2 is not a number of replicas; write 1, 3 or 5"},
	{"nats:\n  tls:\n    ca: ca.pem\n    cert: cert.pem\n", `ebb.yaml:4: nats.tls.cert: "cert.pem" is set without nats.tls.key; write the paths of two PEM files, or neither`},
	{"nats:\n  tls: {cert: '', key: key.pem}\n", `ebb.yaml:2: nats.tls.key: "key.pem" is set without nats.tls.cert; write the paths of two PEM files, or neither`},
	{"embedded:\n  store: ''\n", `ebb.yaml:2: embedded.store: "" is not a directory; write the path of a directory, such as ./ebb-data`},
	{"embedded:\n  listen: ''\n", `ebb.yaml:2: embedded.listen: "" is not host:port; write host:port such as 127.0.0.1:4222`},
	{"http:\n  headers:\n    'X Y': a\n", `ebb.yaml:3: http.headers.X Y: "X Y" is not the name of a header; write letters, digits and dashes`},
	{"http:\n  headers:\n    ce-id: a\n", `ebb.yaml:3: http.headers.ce-id: "ce-id" is a header that ebb sets itself; leave it out`},
	{"http:\n  headers:\n    X-A: a\n    x-a: b\n", `ebb.yaml:4: http.headers.x-a: "x-a" is the same header as "X-A"; keep one of them`},
	{"http:\n  headers:\n    Authorization: \"hush\\n\"\n", `ebb.yaml:3: http.headers.Authorization: the value holds a control character; write a text of one line`},
	{"http:\n  timeout: 0s\n", "ebb.yaml:2: http.timeout: 0s is not above zero; write a duration such as 30s, 90m or 1h"},
	{"recorded:\n  every: 0\n", "ebb.yaml:2: recorded.every: 0s is not above zero; write a duration such as 500ms or 1s"},
	{"recorded:\n  keep: 9s\n", "ebb.yaml:2: recorded.keep: 9s is too short; write a duration such as 90m or 1h, at least 10s"},
	{"recorded:\n  every: 1m\n  keep: 10s\n", "ebb.yaml:2: recorded.every: 1m0s is longer than recorded.keep, 10s; write a shorter one, such as 1s"},
	{"buffers: []\n", "ebb.yaml:1: buffers: [] names no table; write a list of tables, or leave the key out for the managed table"},
	{"buffers:\n  - id: id\n", `ebb.yaml:2: buffers[0].table: "" is not the name of a table; write a table such as ebb.buffer or public.outbox`},
	{"buffers:\n  - table: own\n    id: id\n", `ebb.yaml:2: buffers[0].topic: "" is not a topic; write ` + wants["buffers[].topic"]},
	{"buffers:\n  - table: ebb.buffer\n    delivered: never\n", `ebb.yaml:3: buffers[0].delivered: "never" is not keep, mark or delete; write keep, mark or delete`},
	{"buffers:\n  - table: ebb.buffer\n    start: then\n", `ebb.yaml:3: buffers[0].start: "then" is not now or all; write now or all`},
	{"buffers:\n  - table: ebb.buffer\n    topic: {value: a.b}\n", `ebb.yaml:3: buffers[0].topic.value: "a.b" is not possible for ebb.buffer, whose mapping is fixed; write topic: topic, or leave the key out`},
	{"buffers:\n  - table: ebb.buffer\n    key: ''\n", `ebb.yaml:3: buffers[0].key: "" is not possible for ebb.buffer, whose mapping is fixed; write key, or leave the key out`},
	{"buffers:\n  - table: ebb.buffer\n    delivered: mark\n", `ebb.yaml:3: buffers[0].delivered: "mark" is not possible for ebb.buffer, whose mapping is fixed; write keep, or leave the key out`},
	{"buffers:\n  - table: ebb.buffer\n    content_type: text/plain\n", `ebb.yaml:3: buffers[0].content_type: "text/plain" is not possible for ebb.buffer, whose mapping is fixed; leave the key out`},
	{"buffers:\n  - table: ebb.slot\n    topic: name\n", `ebb.yaml:2: buffers[0].table: "ebb.slot" is in the schema that holds what ebb keeps itself; write ebb.buffer, or the name of a table of your own`},
	{"buffers:\n  - table: a.b.c\n    topic: t\n", `ebb.yaml:2: buffers[0].table: "a.b.c" is not the name of a table; write a table such as ebb.buffer or public.outbox`},
	{"buffers:\n  - table: outbox\n    topic: t\n  - table: public.OUTBOX\n    topic: t\n", `ebb.yaml:4: buffers[1].table: "public.OUTBOX" is the table of buffers[0] as well; keep one of them`},
	{"buffers:\n  - table: own\n    topic: t\n    delivered: mark\n    recorded: ''\n", `ebb.yaml:5: buffers[0].recorded: "" is not the name of a column, which delivered: mark needs; write the name of a column`},
	{"buffers:\n  - table: own\n    topic: recorded\n    delivered: mark\n", `ebb.yaml:2: buffers[0].recorded: "recorded" is the column of topic as well, which a mark would change; write the name of a column`},
	{"buffers:\n  - table: own\n    topic: t\n    payload: p\n    content_type: binary\n", `ebb.yaml:5: buffers[0].content_type: "binary" is not a media type; write a media type such as application/json, or leave the key out`},
	{"buffers:\n  - table: own\n    topic: t\n    content_type: text/xml\n", `ebb.yaml:4: buffers[0].content_type: "text/xml" is set without a payload column; the whole row is application/json; write a media type such as application/json, or leave the key out`},
	{"flow:\n  on_full: foo\n", `ebb.yaml:2: flow.on_full: "foo" is not reject or allow; write reject or allow`},
	{"http:\n  on_reject: drop\n", `ebb.yaml:2: http.on_reject: "drop" is not park or block; write park or block`},
	{"http:\n  format: raw\n", `ebb.yaml:2: http.format: "raw" is not cloudevents, structured or batch; write cloudevents, structured or batch`},
	{"http:\n  batch: 0\n", "ebb.yaml:2: http.batch: 0 is too few; write a number from 1 to 10000"},
	{"replay:\n  window: -1h\n", "ebb.yaml:2: replay.window: -1h0m0s is below zero; write a duration such as 90m or 1h, or 0 for none"},
	{"flow:\n  warn: 2GB\n  limit: 64MB\n", "ebb.yaml:2: flow.warn: 2GB is more than flow.limit, 64MB; write a smaller one, or leave the key out"},

	{"http:\n  secrets: [whsec_hush]\n", "ebb.yaml:2: http.secrets[0]: the value is not a secret of Standard Webhooks; write " + wants["http.secrets[]"]},
	{"http:\n  secrets: [\"file:\"]\n", "ebb.yaml:2: http.secrets[0]: the value is not a secret of Standard Webhooks; write " + wants["http.secrets[]"]},
	{"http:\n  secrets: [whsk_aHVzaA==]\n", "ebb.yaml:2: http.secrets[0]: the value is not a secret of Standard Webhooks; write " + wants["http.secrets[]"]},
	{"http:\n  concurrency: 1001\n", "ebb.yaml:2: http.concurrency: 1001 is too many; write a number from 1 to 1000"},
	{"http:\n  tls: {cert: a}\n", `ebb.yaml:2: http.tls.cert: "a" is set without http.tls.key; write ` + wants["http.tls.cert"]},
	{"http:\n  bearer_file: a\n  headers: {authorization: hush}\n", "ebb.yaml:3: http.headers.authorization: the value is set beside http.bearer_file; keep one of them"},
	{"nats:\n  on_reject: ''\n", `ebb.yaml:2: nats.on_reject: "" is not park or block; write park or block`},
	{"replay:\n  window: 10ms\n", "ebb.yaml:2: replay.window: 10ms is too short; write a duration such as 90m or 1h, or 0 for none"},
	{"replay:\n  max_wal: 0\n", "ebb.yaml:2: replay.max_wal: 0 is not above zero; write a size such as 512MB or 4GB"},

	// Lines survive what stands before them.
	{"\ufeff# one\r\nslot: >-\r\n  e\r\n\r\nsource: |\r\n  x\r\n", "ebb.yaml:5: source: \"x\\n\" is not a URI reference; write " + wants["source"]},
	{"%YAML 1.2\n---\nslot: A\n", `ebb.yaml:3: slot: "A" is not the name of a slot; write ` + wants["slot"]},
}

func TestWrong(t *testing.T) {
	for _, tt := range wrong {
		_, err := load(Sources{File: "ebb.yaml", Getenv: env("HUSH=hush", "NUMBER=3")}, []byte(tt.file))
		var e *Error
		if !errors.As(err, &e) {
			t.Errorf("%q: %v is no *Error", tt.file, err)
			continue
		}
		if tt.want != "" && err.Error() != tt.want {
			t.Errorf("%q\ngot  %s\nwant %s", tt.file, err, tt.want)
		}
		if tt.want == "" {
			t.Logf("%q: %v", tt.file, err)
		}
		if strings.Contains(err.Error(), "hush") {
			t.Errorf("a secret in %s", err)
		}
	}
}
