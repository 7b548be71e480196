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

CREATE OR REPLACE VIEW ebb.status AS
SELECT s.name AS slot,
       coalesce(r.active, false) AS active,
       pg_wal_lsn_diff(greatest(w.lsn, r.confirmed_flush_lsn), r.confirmed_flush_lsn)::bigint AS lag_bytes,
       pg_wal_lsn_diff(greatest(w.lsn, r.restart_lsn), r.restart_lsn)::bigint AS retained_wal_bytes,
       b.backlog,
       b.oldest_age,
       ebb.flow_state(s.name) AS flow,
       EXISTS (SELECT FROM pg_locks l
               WHERE l.locktype = 'advisory' AND l.granted AND l.objsubid = 1
                 AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
                 AND (l.classid::bigint << 32 | l.objid::bigint) = hashtextextended('ebb leader on ' || s.name, 0)) AS leader,
       0::bigint AS dead_letters   -- nothing is set aside yet
FROM ebb.slot s
LEFT JOIN pg_replication_slots r ON r.slot_name = s.name AND r.database = current_database()
CROSS JOIN (SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END AS lsn) w
CROSS JOIN (SELECT count(*) AS backlog, max(age) AS oldest_age FROM ebb.backlog) b;
COMMENT ON VIEW ebb.status IS 'How delivery from each slot goes; active is false and the sizes are null for a slot that is missing.';

GRANT SELECT ON ebb.events, ebb.backlog, ebb.status TO ebb_producer, ebb_bridge;
