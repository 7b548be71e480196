-- The highest id that had been given out before the snapshot was read, by which what it does not see is found without reading the rest.
ALTER TABLE ebb.tick ADD COLUMN last_id bigint;
GRANT SELECT ON SEQUENCE ebb.buffer_id_seq TO ebb_bridge;

-- Partitions are truncated as a whole: there is nothing in them for vacuum to do, wraparound apart, which it sees to in any case.
DO $$
DECLARE
    part regclass;
BEGIN
    FOR part IN SELECT inhrelid FROM pg_inherits WHERE inhparent = 'ebb.buffer'::regclass LOOP
        EXECUTE format('ALTER TABLE %s SET (autovacuum_enabled = off, toast.autovacuum_enabled = off)', part);
    END LOOP;
END
$$;

-- As before, but that ebb.collect, which has read the partition already, says what the newest transaction in it is.
CREATE OR REPLACE FUNCTION ebb.note_removal() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    xid xid8;
BEGIN
    IF TG_OP = 'DELETE' THEN
        SELECT o.xid INTO xid FROM removed_rows o ORDER BY o.xid DESC LIMIT 1;
    ELSIF current_setting('ebb.collecting', true) = TG_RELID::regclass::text THEN
        RETURN NULL;
    ELSE
        EXECUTE format('SELECT xid FROM %s ORDER BY xid DESC LIMIT 1', TG_RELID::regclass) INTO xid;
    END IF;
    PERFORM ebb.removed_up_to(xid);
    RETURN NULL;
END
$$;

CREATE FUNCTION ebb.removed_up_to(xid xid8) RETURNS void
    LANGUAGE sql SET search_path = pg_catalog, pg_temp
BEGIN ATOMIC
    INSERT INTO ebb.removed AS r (newest, system_identifier)
    SELECT xid, system_identifier::text FROM pg_control_system() WHERE xid IS NOT NULL
    ON CONFLICT (only_row) DO UPDATE SET
        newest = CASE WHEN r.system_identifier = excluded.system_identifier THEN greatest(r.newest, excluded.newest)
                      ELSE excluded.newest END,
        system_identifier = excluded.system_identifier, removed_at = excluded.removed_at;
END;

-- Empties one partition if nothing in it is needed any more: every row is visible in a tick that is older than keep. Says what came of
-- it: collected, empty, current (producers write there, or soon will), kept, undelivered (and older than keep), in use, or superseded.
--
-- A transaction may be open still that has inserted into the partition long ago. SHARE waits for those, so that what is read under it is
-- all that there is; ACCESS EXCLUSIVE, which follows, comes in before anybody who waits to insert. Nobody waits longer than lock_timeout
-- for this, but a producer whose clock was set back while the partition is read.
CREATE FUNCTION ebb.collect(slot text, term bigint, bucket integer, keep interval) RETURNS text
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '100ms'
AS $$
DECLARE
    part   regclass := format('ebb.buffer_%s', to_char(bucket, 'FM00'))::regclass;
    blocks bigint := pg_relation_size(part) / current_setting('block_size')::bigint;
    writes integer;
    old    pg_snapshot; -- of the newest tick that is older than keep
    latest pg_snapshot; -- of the newest one
    newest xid8;
    stays  text;
BEGIN
    IF blocks = 0 THEN
        RETURN 'empty';
    END IF;
    EXECUTE (SELECT 'SELECT ' || pg_get_expr(d.adbin, d.adrelid)
             FROM pg_attrdef d JOIN pg_attribute a ON (a.attrelid, a.attnum) = (d.adrelid, d.adnum)
             WHERE d.adrelid = 'ebb.buffer'::regclass AND a.attname = 'bucket') INTO writes;
    IF collect.bucket IN (writes, (writes + 1) % 16) THEN
        RETURN 'current';
    END IF;

    -- Whoever takes ticks back, because a destination has forgotten what they recorded, writes this row.
    PERFORM FROM ebb.slot s WHERE s.name = collect.slot AND s.term = collect.term AND s.snapshot IS NOT NULL FOR SHARE;
    IF NOT FOUND THEN
        RETURN 'superseded';
    END IF;
    SELECT t.snapshot INTO latest FROM ebb.tick t
    WHERE t.slot = collect.slot AND t.system_identifier = (SELECT c.system_identifier::text FROM pg_control_system() c)
    ORDER BY t.id DESC LIMIT 1;
    SELECT t.snapshot INTO old FROM ebb.tick t
    WHERE t.slot = collect.slot AND t.system_identifier = (SELECT c.system_identifier::text FROM pg_control_system() c)
      AND t.delivered_at < clock_timestamp() - keep
    ORDER BY t.id DESC LIMIT 1;

    -- The rows that came last are in the last block. In most cases they say already that the partition stays.
    EXECUTE format($q$SELECT CASE WHEN NOT coalesce(pg_visible_in_snapshot(b.xid, $2), false) AND b.created_at < clock_timestamp() - $3
                                  THEN 'undelivered' ELSE 'kept' END
        FROM ONLY %s b WHERE b.ctid >= '(%s,0)'::tid AND NOT coalesce(pg_visible_in_snapshot(b.xid, $1), false) LIMIT 1$q$, part, blocks - 1)
    INTO stays USING old, latest, keep;
    IF stays IS NOT NULL THEN
        RETURN stays;
    END IF;
    IF EXISTS (SELECT FROM pg_locks l WHERE l.locktype = 'relation' AND l.relation = part AND l.pid <> pg_backend_pid()
               AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())) THEN
        RETURN 'in use';
    END IF;

    EXECUTE format('LOCK TABLE ONLY %s IN SHARE MODE', part);
    EXECUTE format('SELECT b.xid FROM ONLY %s b ORDER BY b.xid DESC LIMIT 1', part) INTO newest;
    IF newest >= pg_snapshot_xmin(old) OR old IS NULL AND newest IS NOT NULL THEN
        EXECUTE format($q$SELECT CASE WHEN NOT coalesce(pg_visible_in_snapshot(b.xid, $2), false) AND b.created_at < clock_timestamp() - $3
                                      THEN 'undelivered' ELSE 'kept' END
            FROM ONLY %s b WHERE NOT coalesce(pg_visible_in_snapshot(b.xid, $1), false) LIMIT 1$q$, part)
        INTO stays USING old, latest, keep;
        IF stays IS NOT NULL THEN
            RETURN stays;
        END IF;
    END IF;
    PERFORM ebb.removed_up_to(newest);
    PERFORM set_config('ebb.collecting', part::text, true);
    EXECUTE format('TRUNCATE ONLY %s', part);
    PERFORM set_config('ebb.collecting', '', true);
    RETURN 'collected';
END
$$;
REVOKE ALL ON FUNCTION ebb.collect(text, bigint, integer, interval), ebb.removed_up_to(xid8) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION ebb.collect(text, bigint, integer, interval) TO ebb_bridge;
