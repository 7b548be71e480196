-- Anybody may call pg_logical_emit_message, with any prefix. What begins with this token was written by ebb.emit.
CREATE TABLE ebb.message_token (
    only_row boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    token    uuid NOT NULL DEFAULT gen_random_uuid()
);
INSERT INTO ebb.message_token DEFAULT VALUES;
REVOKE ALL ON ebb.message_token FROM PUBLIC;
GRANT SELECT ON ebb.message_token TO ebb_bridge;
COMMENT ON TABLE ebb.message_token IS 'A secret: who knows it can write messages that are delivered as events. Who may read the log (REPLICATION) sees it there.';

-- The content is the token; a byte with the version of what follows; topic, key and headers, each behind its length, or -1 for NULL;
-- and the payload. All text is in UTF-8, as nobody converts what is in a message.
CREATE FUNCTION ebb.emit(topic text, payload json, key text DEFAULT NULL, headers jsonb DEFAULT NULL) RETURNS pg_lsn
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    topic_bytes   bytea := convert_to(emit.topic, 'UTF8');
    key_bytes     bytea := convert_to(emit.key, 'UTF8');
    headers_bytes bytea := convert_to(emit.headers::text, 'UTF8');
BEGIN
    IF emit.topic IS NULL OR emit.payload IS NULL THEN
        RAISE EXCEPTION 'ebb.emit needs a topic and a payload that are not null' USING ERRCODE = 'not_null_violation';
    END IF;
    IF jsonb_typeof(emit.headers) <> 'object' THEN
        RAISE EXCEPTION 'the headers of ebb.emit are to be a JSON object' USING ERRCODE = 'check_violation', CONSTRAINT = 'headers_are_an_object';
    END IF;
    -- A message that no slot can read is lost, and nothing would tell.
    IF current_setting('wal_level') <> 'logical' THEN
        RAISE EXCEPTION 'ebb.emit needs wal_level = logical' USING ERRCODE = 'object_not_in_prerequisite_state',
            HINT = 'Set it (ALTER SYSTEM SET wal_level = logical) and restart the server, or use ebb.put.';
    END IF;
    IF (SELECT f.limit_bytes > 0 AND f.on_full = 'reject' FROM ebb.flow f) THEN
        PERFORM ebb.check_flow();
    END IF;
    RETURN pg_logical_emit_message(true, 'ebb', (SELECT uuid_send(token) FROM ebb.message_token) || '\x01'::bytea
        || int4send(octet_length(topic_bytes)) || topic_bytes
        || int4send(coalesce(octet_length(key_bytes), -1)) || coalesce(key_bytes, '')
        || int4send(coalesce(octet_length(headers_bytes), -1)) || coalesce(headers_bytes, '')
        || convert_to(emit.payload::text, 'UTF8'));
END
$$;

CREATE FUNCTION ebb.emit(topic text, payload jsonb, key text DEFAULT NULL, headers jsonb DEFAULT NULL) RETURNS pg_lsn
    LANGUAGE sql
    RETURN ebb.emit(topic, payload::pg_catalog.text::pg_catalog.json, key, headers);

CREATE FUNCTION ebb.emit(topic text, payload text, key text DEFAULT NULL, headers jsonb DEFAULT NULL) RETURNS pg_lsn
    LANGUAGE sql
    RETURN ebb.emit(topic, payload::pg_catalog.json, key, headers);

COMMENT ON FUNCTION ebb.emit(text, json, text, jsonb) IS 'Writes an event to the log alone, delivered if and when this transaction commits; returns where it is.';
COMMENT ON FUNCTION ebb.emit(text, jsonb, text, jsonb) IS 'Writes an event to the log alone, delivered if and when this transaction commits; returns where it is.';
COMMENT ON FUNCTION ebb.emit(text, text, text, jsonb) IS 'Writes an event, whose payload is JSON text, to the log alone, delivered if and when this transaction commits; returns where it is.';

DO $$
DECLARE
    fn regprocedure;
BEGIN
    FOR fn IN SELECT oid::regprocedure FROM pg_proc WHERE pronamespace = 'ebb'::regnamespace AND proname = 'emit' LOOP
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', fn);
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO ebb_producer', fn);
    END LOOP;
END
$$;
