CREATE SCHEMA IF NOT EXISTS ebb;
COMMENT ON SCHEMA ebb IS 'The buffer of ebb, the event buffer bridge, and what it keeps of its own state.';

CREATE TABLE ebb.migration (
    version    integer PRIMARY KEY,
    name       text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE ebb.migration IS 'The migrations of this schema that were applied.';

-- Roles belong to the whole cluster: another database of it may have made them.
DO $$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'ebb_producer') THEN
        CREATE ROLE ebb_producer NOLOGIN;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'ebb_bridge') THEN
        CREATE ROLE ebb_bridge NOLOGIN;
    END IF;
EXCEPTION WHEN duplicate_object OR unique_violation THEN
    NULL; -- another setup, in another database, was faster
END
$$;

-- A ring of 16 partitions, each for an eighth of the time for which delivered rows are kept: half of the ring holds
-- rows that are kept, the other half is free to be emptied, and no partition is ever missing.
CREATE TABLE ebb.buffer (
    id         bigint GENERATED ALWAYS AS IDENTITY,
    topic      text NOT NULL,
    key        text,
    payload    json NOT NULL,
    headers    jsonb,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    xid        xid8 NOT NULL DEFAULT pg_current_xact_id(),
    bucket     smallint NOT NULL DEFAULT (extract(epoch FROM clock_timestamp())::bigint / 450 % 16)::smallint,
    PRIMARY KEY (id, bucket),
    CONSTRAINT headers_are_an_object CHECK (jsonb_typeof(headers) = 'object')
) PARTITION BY LIST (bucket);

DO $$
BEGIN
    FOR bucket IN 0..15 LOOP
        EXECUTE format('CREATE TABLE ebb.buffer_%s PARTITION OF ebb.buffer FOR VALUES IN (%s)',
            to_char(bucket, 'FM00'), bucket);
    END LOOP;
END
$$;

COMMENT ON TABLE ebb.buffer IS 'Events that a service writes in the transaction that they belong to. ebb delivers them in commit order.';
COMMENT ON COLUMN ebb.buffer.id IS 'The id of the event in every delivery.';
COMMENT ON COLUMN ebb.buffer.key IS 'What the event is about; events of a key stay in order. NULL: nothing in particular.';
COMMENT ON COLUMN ebb.buffer.payload IS 'Delivered byte for byte, which is why it is json and not jsonb.';
COMMENT ON COLUMN ebb.buffer.headers IS 'An object; strings are delivered as they are, other values as their JSON text.';
COMMENT ON COLUMN ebb.buffer.xid IS 'By which a snapshot tells whether the row was delivered, without a write to the row.';

-- By which this buffer is told from one that was torn down, whose ids began at 1 as well.
CREATE TABLE ebb.identity (id uuid NOT NULL DEFAULT gen_random_uuid());
INSERT INTO ebb.identity DEFAULT VALUES;
COMMENT ON TABLE ebb.identity IS 'The one row names this buffer to the streams that hold its events.';

-- One row for each slot that ebb made. A slot without such a row was made by somebody else, or by a setup that was killed.
CREATE TABLE ebb.slot (
    name              text PRIMARY KEY,
    system_identifier text NOT NULL,
    timeline          integer NOT NULL,
    epoch             integer NOT NULL,
    -- Rows that this snapshot sees are not in the slot: they are delivered from the table, those apart that the tick
    -- recovered_after had recorded already. NULL: the slot is being made, and if there is one, it is not this one.
    snapshot          pg_snapshot,
    consistent_point  pg_lsn,
    created_at        timestamptz NOT NULL DEFAULT clock_timestamp(),
    recovered_after   bigint,
    recovered_id      bigint,
    recovered_events  bigint NOT NULL DEFAULT 0,
    recovered_at      timestamptz
);
COMMENT ON TABLE ebb.slot IS 'What ebb knows of its replication slots; recovered_at is null until the rows from before the slot are delivered.';

-- A tick is the recorded mark of all rows that its snapshot sees.
CREATE TABLE ebb.tick (
    id                bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    lsn               pg_lsn NOT NULL,
    snapshot          pg_snapshot NOT NULL,
    delivered_at      timestamptz NOT NULL DEFAULT clock_timestamp(),
    position          text NOT NULL,
    stream_seq        bigint NOT NULL,
    epoch             integer NOT NULL,
    events            bigint NOT NULL,
    slot              text NOT NULL,
    system_identifier text NOT NULL,
    destination       text NOT NULL
);
COMMENT ON TABLE ebb.tick IS 'Every row whose xid is visible in snapshot was delivered by delivered_at, to destination, in or before position.';

-- It has more rights than a producer, who may not read the buffer and so could not get back the id.
CREATE FUNCTION ebb.put(topic text, payload json, key text DEFAULT NULL, headers jsonb DEFAULT NULL) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    event_id bigint;
BEGIN
    INSERT INTO ebb.buffer (topic, key, payload, headers)
    VALUES (put.topic, put.key, put.payload, put.headers)
    RETURNING buffer.id INTO event_id;
    RETURN event_id;
END
$$;

CREATE FUNCTION ebb.put(topic text, payload jsonb, key text DEFAULT NULL, headers jsonb DEFAULT NULL) RETURNS bigint
    LANGUAGE sql
AS $$ SELECT ebb.put(topic, payload::text::json, key, headers) $$;

CREATE FUNCTION ebb.put(topic text, payload text, key text DEFAULT NULL, headers jsonb DEFAULT NULL) RETURNS bigint
    LANGUAGE sql
AS $$ SELECT ebb.put(topic, payload::json, key, headers) $$;

COMMENT ON FUNCTION ebb.put(text, json, text, jsonb) IS 'Puts an event into the buffer, delivered if and when this transaction commits; returns its id.';
COMMENT ON FUNCTION ebb.put(text, jsonb, text, jsonb) IS 'Puts an event into the buffer, delivered if and when this transaction commits; returns its id.';
COMMENT ON FUNCTION ebb.put(text, text, text, jsonb) IS 'Puts an event, whose payload is JSON text, into the buffer, delivered if and when this transaction commits; returns its id.';

-- The first tick that can see a transaction is found without reading the ticks before it.
CREATE INDEX tick_xmax ON ebb.tick (pg_snapshot_xmax(snapshot), id);

REVOKE ALL ON ALL FUNCTIONS IN SCHEMA ebb FROM PUBLIC;
GRANT USAGE ON SCHEMA ebb TO ebb_producer, ebb_bridge;
GRANT INSERT (topic, key, payload, headers) ON ebb.buffer TO ebb_producer;
GRANT EXECUTE ON ALL FUNCTIONS IN SCHEMA ebb TO ebb_producer;
GRANT SELECT ON ebb.buffer, ebb.migration, ebb.identity TO ebb_bridge;
GRANT SELECT, INSERT, UPDATE, DELETE ON ebb.slot, ebb.tick TO ebb_bridge;
