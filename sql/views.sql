CREATE OR REPLACE VIEW ebb.events AS
SELECT b.id, b.topic, b.key, b.payload, b.headers, b.created_at,
       (SELECT t.delivered_at FROM ebb.tick t
        WHERE t.system_identifier = (SELECT system_identifier::text FROM pg_control_system())
          AND pg_snapshot_xmax(t.snapshot) > b.xid AND pg_visible_in_snapshot(b.xid, t.snapshot)
        ORDER BY pg_snapshot_xmax(t.snapshot), t.id LIMIT 1) AS recorded_at
FROM ebb.buffer b;
COMMENT ON VIEW ebb.events IS 'Events of the buffer, with the time at which their delivery was recorded, or of the oldest record that is still kept.';

CREATE OR REPLACE VIEW ebb.backlog AS
SELECT b.id, b.topic, b.key, b.payload, b.headers, b.created_at, clock_timestamp() - b.created_at AS age
FROM ebb.buffer b
WHERE coalesce(NOT pg_visible_in_snapshot(b.xid, (
    SELECT t.snapshot FROM ebb.tick t
    WHERE t.system_identifier = (SELECT system_identifier::text FROM pg_control_system())
    ORDER BY t.id DESC LIMIT 1)), true);
COMMENT ON VIEW ebb.backlog IS 'Events that are not recorded as delivered.';

-- How large the backlog is and how old its oldest event, without reading all of it. Whatever a tick does not see began to write after an
-- older tick was stored, whose transaction it sees with all before, and so has a higher id than had been given out by then; a thousand is
-- for sessions that had just been given an id and no transaction id yet. Of the ids behind that, and of those behind the newest tick, the first
-- ones are looked at; if there are more, it is estimated from these how many of the others are of the backlog.
CREATE OR REPLACE FUNCTION ebb.backlog_size(OUT events bigint, OUT estimated boolean, OUT oldest timestamptz)
    LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp
    SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off
AS $$
DECLARE
    looked_at constant bigint := 30000;
    tick      ebb.tick;
    bounds    bigint[];
    part      record;
BEGIN
    SELECT * INTO tick FROM ebb.tick t
    WHERE t.system_identifier = (SELECT c.system_identifier::text FROM pg_control_system() c) ORDER BY t.id DESC LIMIT 1;
    SELECT ARRAY[coalesce(max(t.last_id) - 1000, 0), greatest(max(t.last_id) - 1000, tick.last_id, 0), (SELECT last_value FROM ebb.buffer_id_seq)]
    INTO bounds FROM ebb.tick t
    WHERE (t.slot, t.system_identifier) = (tick.slot, tick.system_identifier) AND t.xid < pg_snapshot_xmin(tick.snapshot);
    events := 0;
    estimated := false;
    FOR i IN 1..2 LOOP
        SELECT count(*) AS seen, min(b.id) AS first, max(b.id) AS last, count(*) FILTER (WHERE b.waits) AS waiting,
               min(b.created_at) FILTER (WHERE b.waits) AS oldest
        INTO part
        FROM (SELECT e.id, e.created_at, coalesce(NOT pg_visible_in_snapshot(e.xid, tick.snapshot), true) AS waits
              FROM ebb.buffer e WHERE e.id > bounds[i] AND e.id <= bounds[i + 1] ORDER BY e.id LIMIT looked_at) b;
        events := events + part.waiting;
        oldest := least(oldest, part.oldest);
        IF part.seen = looked_at AND part.last < bounds[i + 1] THEN
            estimated := true;
            events := events + (part.waiting::numeric / (part.last - part.first + 1) * (bounds[i + 1] - part.last))::bigint;
        END IF;
    END LOOP;
END
$$;
REVOKE ALL ON FUNCTION ebb.backlog_size() FROM PUBLIC;
GRANT EXECUTE ON FUNCTION ebb.backlog_size() TO ebb_producer, ebb_bridge;
COMMENT ON FUNCTION ebb.backlog_size() IS 'How many events are not recorded as delivered, estimated if they are many, and when the oldest was made.';

CREATE OR REPLACE VIEW ebb.status AS
SELECT s.name AS slot,
       coalesce(r.active, false) AS active,
       pg_wal_lsn_diff(greatest(w.lsn, r.confirmed_flush_lsn), r.confirmed_flush_lsn)::bigint AS lag_bytes,
       pg_wal_lsn_diff(greatest(w.lsn, r.restart_lsn), r.restart_lsn)::bigint AS retained_wal_bytes,
       b.events AS backlog,
       clock_timestamp() - b.oldest AS oldest_age,
       ebb.flow_state(s.name) AS flow,
       EXISTS (SELECT FROM pg_locks l
               WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
                 AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
                 AND (l.classid::bigint << 32 | l.objid::bigint) = hashtextextended('ebb leader on ' || s.name, 0)) AS leader,
       (SELECT count(*) FROM ebb.dead_letter d WHERE d.slot = s.name AND d.state IN ('parked', 'retrying')) AS dead_letters
FROM ebb.slot s
LEFT JOIN pg_replication_slots r ON r.slot_name = s.name AND r.database = current_database()
CROSS JOIN (SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END AS lsn) w
CROSS JOIN ebb.backlog_size() b;
COMMENT ON VIEW ebb.status IS 'How delivery from each slot goes; active is false and the sizes are null for a slot that is missing.';

GRANT SELECT ON ebb.events, ebb.backlog, ebb.status TO ebb_producer, ebb_bridge;
