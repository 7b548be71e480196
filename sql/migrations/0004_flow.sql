-- How far the buffer may fill, as the configuration has it, in the one row of this table: put reads it, so that it holds with no bridge running.
CREATE TABLE ebb.flow (
    only_row    boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    slot        text NOT NULL DEFAULT '',
    warn_bytes  bigint NOT NULL DEFAULT 0 CHECK (warn_bytes >= 0),
    limit_bytes bigint NOT NULL DEFAULT 0 CHECK (limit_bytes >= 0),
    on_full     text NOT NULL DEFAULT 'reject' CHECK (on_full IN ('reject', 'allow')),
    -- Once full, the buffer stays closed until it has drained to a fraction of the limit. The bridge that leads keeps this.
    closed      boolean NOT NULL DEFAULT false,
    changed_at  timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- The trigger of ebb.limit_inserts is on ebb.buffer, and does for put what put does without it.
    inserts     boolean NOT NULL DEFAULT false
);
INSERT INTO ebb.flow DEFAULT VALUES;
COMMENT ON TABLE ebb.flow IS 'The flow limits of the configuration, on the lag of slot; 0 is none. closed is how the bridge found the buffer last.';

-- A slot that is not there is measured from where delivery was last recorded: so a lost slot does not let the buffer fill in silence, and
-- what removes the slot and the schema together stops nobody. Where nothing is known, as before the first slot is made, there is no lag.
CREATE VIEW ebb.flow_now AS
SELECT f.slot, f.warn_bytes, f.limit_bytes, f.on_full, f.closed, f.inserts, l.lag_bytes, f.limit_bytes / 5 * 4 AS reopen_bytes,
       f.limit_bytes > 0 AND l.lag_bytes > CASE WHEN f.closed THEN f.limit_bytes / 5 * 4 ELSE f.limit_bytes END AS is_full
FROM ebb.flow f
CROSS JOIN LATERAL (
    SELECT greatest(0, pg_wal_lsn_diff(
        CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END,
        coalesce(
            (SELECT r.confirmed_flush_lsn FROM pg_get_replication_slots() r
             WHERE r.slot_name = f.slot AND r.datoid = (SELECT oid FROM pg_database WHERE datname = current_database())),
            (SELECT t.lsn FROM ebb.tick t
             WHERE t.slot = f.slot AND t.system_identifier = (SELECT system_identifier::text FROM pg_control_system())
             ORDER BY t.id DESC LIMIT 1),
            (SELECT s.consistent_point FROM ebb.slot s
             WHERE s.name = f.slot AND s.system_identifier = (SELECT system_identifier::text FROM pg_control_system())))))::bigint AS lag_bytes
    OFFSET 0) l; -- which keeps the lag from being computed for each mention of it
COMMENT ON VIEW ebb.flow_now IS 'The flow limits, and how they stand now.';

CREATE FUNCTION ebb.flow_state(slot text) RETURNS text
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
    SELECT coalesce((
        SELECT CASE WHEN n.is_full AND n.on_full = 'reject' THEN 'closed'
                    WHEN n.is_full OR n.warn_bytes > 0 AND n.lag_bytes > n.warn_bytes THEN 'warn'
                    ELSE 'open' END
        FROM ebb.flow_now n WHERE n.slot = flow_state.slot), 'open')
$$;
COMMENT ON FUNCTION ebb.flow_state(text) IS 'open, warn (the lag is past flow.warn) or closed (ebb.put is refused).';

-- It returns true or raises.
CREATE FUNCTION ebb.check_flow() RETURNS boolean
    LANGUAGE plpgsql
AS $$
DECLARE
    n record;
BEGIN
    SELECT * INTO n FROM ebb.flow_now WHERE is_full AND on_full = 'reject';
    IF NOT FOUND THEN
        RETURN true;
    END IF;
    RAISE EXCEPTION USING
        ERRCODE = 'configuration_limit_exceeded',
        MESSAGE = format('the event buffer is full: slot "%s" lags by %s bytes (%s), and flow.limit is %s bytes (%s)',
            n.slot, n.lag_bytes, pg_size_pretty(n.lag_bytes), n.limit_bytes, pg_size_pretty(n.limit_bytes)),
        DETAIL = format('It takes events again when the lag is down to %s bytes.', n.reopen_bytes),
        HINT = 'Roll back and try again later. See with ebb status whether a bridge runs and its sink takes events; '
            'or raise flow.limit, or set flow.on_full to allow, and run ebb setup.';
END
$$;

CREATE OR REPLACE FUNCTION ebb.put(topic text, payload json, key text DEFAULT NULL, headers jsonb DEFAULT NULL) RETURNS bigint
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    event_id bigint;
BEGIN
    -- One statement: a second one, to read the limits, would cost a fifth of the first.
    INSERT INTO ebb.buffer (topic, key, payload, headers)
    SELECT put.topic, put.key, put.payload, put.headers
    WHERE CASE WHEN (SELECT f.limit_bytes > 0 AND f.on_full = 'reject' AND NOT f.inserts FROM ebb.flow f) THEN ebb.check_flow() ELSE true END
    RETURNING buffer.id INTO event_id;
    RETURN event_id;
END
$$;

-- Their bodies are parsed here: a caller's search_path changes nothing, and they can still be inlined.
CREATE OR REPLACE FUNCTION ebb.put(topic text, payload jsonb, key text DEFAULT NULL, headers jsonb DEFAULT NULL) RETURNS bigint
    LANGUAGE sql
    RETURN ebb.put(topic, payload::pg_catalog.text::pg_catalog.json, key, headers);

CREATE OR REPLACE FUNCTION ebb.put(topic text, payload text, key text DEFAULT NULL, headers jsonb DEFAULT NULL) RETURNS bigint
    LANGUAGE sql
    RETURN ebb.put(topic, payload::pg_catalog.json, key, headers);

CREATE FUNCTION ebb.limit_insert() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF (SELECT f.limit_bytes > 0 AND f.on_full = 'reject' FROM ebb.flow f) THEN
        PERFORM ebb.check_flow();
    END IF;
    RETURN NULL;
END
$$;

-- It is called by the owner of the table and of this schema. The rights are the caller's.
CREATE FUNCTION ebb.limit_inserts(limited boolean, buffer regclass DEFAULT 'ebb.buffer') RETURNS void
    LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF limited THEN
        EXECUTE format('CREATE OR REPLACE TRIGGER limit_inserts BEFORE INSERT ON %s EXECUTE FUNCTION ebb.limit_insert()', buffer);
    ELSIF EXISTS (SELECT FROM pg_trigger t WHERE t.tgrelid = buffer AND t.tgname = 'limit_inserts' AND t.tgfoid = 'ebb.limit_insert'::regproc) THEN
        EXECUTE format('DROP TRIGGER limit_inserts ON %s', buffer);
    END IF;
    IF buffer = 'ebb.buffer'::regclass THEN
        UPDATE ebb.flow SET inserts = limited WHERE inserts <> limited;
    END IF;
END
$$;
COMMENT ON FUNCTION ebb.limit_inserts(boolean, regclass) IS 'Holds plain INSERTs into a table to flow.limit as ebb.put is, or no longer.';

-- What COMMIT waits for in this server: so many (wanted) of the names, of which any or the first ones that are connected. The server has
-- checked the syntax. It compares names without regard to case, and takes a quoted asterisk for one as well.
CREATE FUNCTION ebb.standby_names(setting text, OUT any_of boolean, OUT wanted integer, OUT names text[])
    LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    tokens text[] := ARRAY(SELECT m[1] FROM regexp_matches(setting, '("(?:[^"]|"")*"|[(),]|[^\s(),"]+)', 'g') m);
BEGIN
    any_of := lower(tokens[1]) = 'any' AND tokens[2] <> ',';
    wanted := 1;
    IF any_of OR lower(tokens[1]) = 'first' AND tokens[2] <> ',' THEN
        wanted := tokens[2]::integer;
        tokens := tokens[3:];
    ELSIF tokens[2] = '(' THEN
        wanted := tokens[1]::integer;
        tokens := tokens[2:];
    END IF;
    names := ARRAY(
        SELECT DISTINCT lower((CASE WHEN t LIKE '"%' THEN replace(substr(t, 2, length(t) - 2), '""', '"') ELSE t END) COLLATE "C")
        FROM unnest(tokens) t WHERE t NOT IN ('(', ')', ','));
END
$$;

-- Says why a COMMIT cannot be had to wait for the delivery from a slot, or NULL. What must not be is that it would return without.
CREATE FUNCTION ebb.inline_finding(slot text) RETURNS text
    LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    setting text := current_setting('synchronous_standby_names');
    s record;
    others text;
BEGIN
    SELECT * INTO s FROM ebb.standby_names(setting);
    IF cardinality(s.names) = 0 THEN
        RETURN 'synchronous_standby_names is empty, so that COMMIT would not wait';
    ELSIF '*' = ANY (s.names) THEN
        RETURN format('synchronous_standby_names is %L, so that COMMIT would wait for whichever standby there is', setting);
    ELSIF slot <> ALL (s.names) THEN
        RETURN format('synchronous_standby_names is %L, which does not name slot %s, so that COMMIT would wait for others', setting, slot);
    ELSIF s.any_of THEN
        RETURN format('synchronous_standby_names is %L, whose ANY lets COMMIT return when others have answered', setting);
    ELSIF s.wanted > cardinality(s.names) THEN
        RETURN format('synchronous_standby_names is %L, which wants more standbys than it names, so that COMMIT would never return', setting);
    ELSIF s.wanted < cardinality(s.names) THEN
        RETURN format('synchronous_standby_names is %L, which lets COMMIT return when another than slot %s has answered', setting, slot);
    END IF;
    -- Bridges of other databases are no standbys, and what they wait for comes to them all.
    SELECT string_agg(name, ', ') INTO others FROM unnest(s.names) name
    WHERE name <> slot AND NOT EXISTS (SELECT FROM pg_replication_slots r WHERE r.slot_name = name AND r.plugin = 'pgoutput');
    IF others IS NOT NULL THEN
        RETURN format('synchronous_standby_names is %L, which mixes slot %s with other standbys (%s)', setting, slot, others);
    END IF;
    RETURN NULL;
END
$$;

-- Says whether synchronous_standby_names is about a slot at all: COMMITs may wait for the walsender of its bridge.
CREATE FUNCTION ebb.inline_concerns(slot text) RETURNS boolean
    LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$ SELECT names && ARRAY[slot, '*'] FROM ebb.standby_names(current_setting('synchronous_standby_names')) $$;

CREATE FUNCTION ebb.deliver_on_commit() RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    slot text;
    ready boolean;
    finding text;
BEGIN
    SELECT s.name, s.snapshot IS NOT NULL AND r.wal_status IS DISTINCT FROM 'lost' AND r.slot_name IS NOT NULL INTO slot, ready
    FROM ebb.slot s LEFT JOIN pg_replication_slots r ON r.slot_name = s.name AND r.database = current_database()
    ORDER BY s.created_at DESC LIMIT 1;
    IF slot IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = 'delivery cannot be waited for: there is no slot', HINT = 'Run ebb setup.';
    END IF;
    finding := ebb.inline_finding(slot);
    IF finding IS NOT NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = 'delivery cannot be waited for: ' || finding,
            HINT = format('Set synchronous_commit = local for every database of this server, then synchronous_standby_names = %L, '
                'and reload the configuration; ebb doctor says how.', format('FIRST 1 ("%s")', slot));
    END IF;
    -- To wait would keep the slot from being made, for which every transaction that has written must end.
    IF NOT ready THEN
        RAISE EXCEPTION USING ERRCODE = 'object_not_in_prerequisite_state',
            MESSAGE = format('delivery cannot be waited for: slot "%s" is lost', slot),
            HINT = 'Try again later: a running bridge makes it anew (ebb run).';
    END IF;
    -- remote_write waits for the position that a bridge reports as delivered; local for this transaction, wherever this is called.
    PERFORM set_config('synchronous_commit', 'remote_write', true);
END
$$;
COMMENT ON FUNCTION ebb.deliver_on_commit() IS 'Has the COMMIT of this transaction return only after its events are delivered.';

-- A COMMIT that waits for delivery holds up the slot that is being made, without which it will never return, and the recovery of its own rows.
-- Its session is ended: so it does not seem to have been delivered, and what it has committed will be.
CREATE FUNCTION ebb.end_waits(slot text, OUT pid integer, OUT role text, OUT ended boolean) RETURNS SETOF record
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    IF NOT EXISTS (SELECT FROM ebb.slot s WHERE s.name = end_waits.slot AND (s.snapshot IS NULL OR s.recovered_at IS NULL))
        OR ebb.inline_finding(slot) IS NOT NULL THEN -- they wait for others as well
        RETURN;
    END IF;
    FOR pid, role IN SELECT a.pid, a.usename FROM pg_stat_activity a
        WHERE a.wait_event = 'SyncRep' AND a.datname = current_database() AND a.backend_type = 'client backend' LOOP
        BEGIN
            ended := pg_terminate_backend(pid);
        EXCEPTION WHEN insufficient_privilege THEN
            ended := false; -- of a superuser, or the owner of this schema may not signal others
        END;
        RETURN NEXT;
    END LOOP;
END
$$;

REVOKE ALL ON FUNCTION ebb.flow_state(text), ebb.check_flow(), ebb.limit_insert(), ebb.limit_inserts(boolean, regclass),
    ebb.standby_names(text), ebb.inline_finding(text), ebb.inline_concerns(text), ebb.deliver_on_commit(), ebb.end_waits(text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION ebb.flow_state(text) TO ebb_producer, ebb_bridge;
GRANT EXECUTE ON FUNCTION ebb.deliver_on_commit() TO ebb_producer;
GRANT EXECUTE ON FUNCTION ebb.inline_finding(text), ebb.inline_concerns(text), ebb.end_waits(text) TO ebb_bridge;
GRANT SELECT ON ebb.flow_now TO ebb_bridge;
GRANT SELECT, INSERT, UPDATE ON ebb.flow TO ebb_bridge;
