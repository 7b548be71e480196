package decode

import (
	"context"
	"encoding/binary"
	"flag"
	"os"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5"
)

var update = flag.Bool("update", false, "capture testdata/pgoutput.bin anew from the server at EBB_CAPTURE_POSTGRES")

// captureFile holds what pgoutput of Postgres 15 sent for captureSQL: of each message its length, four bytes, big-endian, and
// the message.
const captureFile = "testdata/pgoutput.bin"

// captureSchema and captureSQL are what was captured. The statements between two empty lines are one transaction.
const captureSchema = `
create schema ebb;
create table ebb.buffer (
  id bigint generated always as identity, topic text not null, key text, payload json not null, headers jsonb,
  created_at timestamptz not null default now(), bucket smallint not null default 0
) partition by list (bucket);
create table ebb.buffer_0 partition of ebb.buffer for values in (0);
create table ebb.buffer_1 partition of ebb.buffer for values in (1);
create schema app;
create type app.mood as enum ('fine', 'grim');
create domain app.email as text check (value like '%@%');
create table app.account (id int primary key, mood app.mood, email app.email, note varchar(40));
alter table app.account replica identity full;
create publication ebb for table ebb.buffer (id, topic, key, payload, headers), app.account
  with (publish_via_partition_root = true);
select pg_replication_origin_create('elsewhere');
`

const captureSQL = `
insert into ebb.buffer (topic, key, payload, headers) values
  ('member.added', 'group-1', '{"n":  1}', '{"traceparent": "00-ab-cd-01", "n": 7}');

insert into ebb.buffer (topic, payload) values ('member.added', 'null');
insert into ebb.buffer (topic, key, payload, bucket) values ('grüße.✓', '', '"žluťoučký 🐎 \u00e9"', 1);
insert into app.account values (1, 'fine', 'a@example.org', null), (2, null, null, 'ünï');
insert into ebb.buffer (topic, key, payload, headers) values
  ('member.removed', 'group-1', '[]', '{"q": "\"\\ ü \n", "o": {"a": [1, "}"]}, "t": true, "z": null, "f": 1.50, "": ""}');

update app.account set note = 'x' where id = 1;
delete from app.account where id = 2;
update app.account set id = 3 where id = 1;

select pg_logical_emit_message(true, 'ebb', 'inside');
insert into ebb.buffer (topic, payload, headers) values ('after.message', '1', '{}');
select pg_logical_emit_message(true, 'other', '');

select pg_logical_emit_message(false, 'ebb', 'outside');

insert into ebb.buffer (topic, payload) values ('rolled.back', '0');
select set_config('app.rollback', 'yes', true);

alter publication ebb set table ebb.buffer, app.account;
alter table ebb.buffer drop column created_at, drop column key;
alter table ebb.buffer add column tenant text default 'acme', add column key text;
insert into ebb.buffer (topic, key, payload) values ('after.alter', 'group-2', '2');

truncate app.account, ebb.buffer_1 restart identity;

insert into ebb.buffer (topic, payload)
  select 'big', to_json(string_agg(md5(i::text), '')) from generate_series(1, 600) i;

insert into ebb.buffer (topic, key, payload) select 'many', 'k' || i % 3, to_json(i) from generate_series(1, 50) i;

select pg_replication_origin_session_setup('elsewhere');

select pg_replication_origin_xact_setup('AB/CDEF0123', '2026-01-02 03:04:05.678901Z');
insert into ebb.buffer (topic, payload) values ('from.elsewhere', '3');
`

// capture returns the captured messages, after capturing them if the flag says so.
func capture(tb testing.TB) [][]byte {
	tb.Helper()
	if *update {
		*update = false
		url := os.Getenv("EBB_CAPTURE_POSTGRES")
		if url == "" {
			tb.Fatal("-update needs EBB_CAPTURE_POSTGRES")
		}
		captureFrom(tb, url)
	}
	data, err := os.ReadFile(captureFile)
	if err != nil {
		tb.Fatal(err)
	}
	var msgs [][]byte
	for len(data) > 0 {
		n := 4 + int(binary.BigEndian.Uint32(data))
		msgs = append(msgs, data[4:n:n])
		data = data[n:]
	}
	return msgs
}

// captureFrom writes captureFile. It needs a superuser's URL of a server with wal_level=logical,
// in which it makes a database of its own.
func captureFrom(tb testing.TB, url string) {
	tb.Helper()
	ctx := context.Background()
	exec := func(conn *pgx.Conn, sql string) {
		tb.Helper()
		if _, err := conn.PgConn().Exec(ctx, sql).ReadAll(); err != nil {
			tb.Fatalf("%s: %v", sql, err)
		}
	}
	open := func(database string) *pgx.Conn {
		tb.Helper()
		cfg, err := pgx.ParseConfig(url)
		if err != nil {
			tb.Fatal(err)
		}
		if database != "" {
			cfg.Database = database
		}
		conn, err := pgx.ConnectConfig(ctx, cfg)
		if err != nil {
			tb.Fatal(err)
		}
		tb.Cleanup(func() { conn.Close(ctx) })
		return conn
	}
	admin := open("")
	exec(admin, "create database ebb_capture template template0 encoding utf8")
	conn := open("ebb_capture")

	exec(conn, captureSchema)
	exec(conn, "select pg_create_logical_replication_slot('ebb_capture', 'pgoutput')")
	for _, sql := range strings.Split(captureSQL, "\n\n") {
		end := "commit"
		if strings.Contains(sql, "app.rollback") {
			end = "rollback"
		}
		exec(conn, "begin")
		exec(conn, sql)
		exec(conn, end)
	}
	rows, err := conn.Query(ctx, `select data from pg_logical_slot_get_binary_changes('ebb_capture', null, null,
		'proto_version', '1', 'publication_names', 'ebb', 'messages', 'true')`)
	if err != nil {
		tb.Fatal(err)
	}
	msgs, err := pgx.CollectRows(rows, pgx.RowTo[[]byte])
	if err != nil {
		tb.Fatal(err)
	}
	exec(conn, `select pg_drop_replication_slot('ebb_capture');
		select pg_replication_origin_session_reset();
		select pg_replication_origin_drop('elsewhere')`)
	conn.Close(ctx)
	exec(admin, "drop database ebb_capture")

	var data []byte
	for _, msg := range msgs {
		data = append(binary.BigEndian.AppendUint32(data, uint32(len(msg))), msg...)
	}
	if err := os.WriteFile(captureFile, data, 0o644); err != nil {
		tb.Fatal(err)
	}
}
