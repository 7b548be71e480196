-- An epoch holds from an LSN on: LSNs of another cluster or timeline are other places, and what is sent again after a reset of
-- the position is sent in an epoch of its own.
CREATE TABLE ebb.epoch (
    slot              text NOT NULL,
    epoch             integer NOT NULL,
    from_lsn          pg_lsn NOT NULL,
    system_identifier text NOT NULL,
    timeline          integer NOT NULL,
    reason            text NOT NULL,
    raised_at         timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (slot, epoch)
);
COMMENT ON TABLE ebb.epoch IS 'The epoch of a transaction is the highest one whose from_lsn is not behind its commit LSN.';

INSERT INTO ebb.epoch (slot, epoch, from_lsn, system_identifier, timeline, reason)
SELECT name, epoch, '0/0', system_identifier, timeline, 'setup' FROM ebb.slot;

ALTER TABLE ebb.slot
    -- Rises with each bridge that takes the lead, so that one before it, frozen and woken up, can record nothing any more.
    ADD COLUMN term bigint NOT NULL DEFAULT 0,
    -- What the publication looked like when the slot was made. One that was changed since may have had rows passed over.
    ADD COLUMN publication text,
    -- Where the recovery delivers, and the sequence number of the last message that it knows to be stored there.
    ADD COLUMN destination text,
    ADD COLUMN recovered_seq bigint,
    -- The history of this database and that of the destination part somewhere: ids may have been given out twice.
    ADD COLUMN diverged boolean NOT NULL DEFAULT false,
    -- The source that a stream was made for, where that is another one and an operator has said that it is to be gone on with.
    ADD COLUMN adopted text,
    ADD COLUMN made integer NOT NULL DEFAULT 1,
    ADD COLUMN made_because text;
COMMENT ON COLUMN ebb.slot.made IS 'How often the slot was made; the last time because of made_because.';

-- What was delivered before the snapshot was read, while stream_seq is of the moment in which the tick was stored. Behind it, and not
-- before it, may stand events of transactions that the snapshot does not see.
ALTER TABLE ebb.tick ADD COLUMN begin_seq bigint NOT NULL DEFAULT 0;

-- Rows that were removed from the buffer cannot be delivered again to a stream that has forgotten them. All of them have an xid
-- below through: a tick whose snapshot had seen all of these end is one that the stream must reach.
CREATE TABLE ebb.removed (
    only_row          boolean PRIMARY KEY DEFAULT true CHECK (only_row),
    through           xid8 NOT NULL,
    system_identifier text NOT NULL,
    removed_at        timestamptz NOT NULL DEFAULT clock_timestamp()
);
COMMENT ON TABLE ebb.removed IS 'Rows of transactions before through were removed from the buffer, the last ones at removed_at.';

CREATE FUNCTION ebb.note_removal() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp
AS $$
DECLARE
    newest xid8;
BEGIN
    IF TG_OP = 'DELETE' THEN
        SELECT o.xid INTO newest FROM removed_rows o ORDER BY o.xid DESC LIMIT 1;
    ELSE
        EXECUTE format('SELECT xid FROM %s ORDER BY xid DESC LIMIT 1', TG_RELID::regclass) INTO newest;
    END IF;
    IF newest IS NULL THEN
        RETURN NULL;
    END IF;
    INSERT INTO ebb.removed AS r (through, system_identifier)
    SELECT (newest::text::numeric + 1)::text::xid8, system_identifier::text FROM pg_control_system()
    ON CONFLICT (only_row) DO UPDATE SET
        through = CASE WHEN r.system_identifier = excluded.system_identifier THEN greatest(r.through, excluded.through)
                       ELSE excluded.through END,
        system_identifier = excluded.system_identifier, removed_at = excluded.removed_at;
    RETURN NULL;
END
$$;
REVOKE ALL ON FUNCTION ebb.note_removal() FROM PUBLIC;

DO $$
DECLARE
    part regclass;
BEGIN
    FOR part IN SELECT 'ebb.buffer'::regclass UNION ALL SELECT inhrelid FROM pg_inherits WHERE inhparent = 'ebb.buffer'::regclass LOOP
        EXECUTE format('CREATE TRIGGER note_removal AFTER DELETE ON %s REFERENCING OLD TABLE AS removed_rows '
            'FOR EACH STATEMENT EXECUTE FUNCTION ebb.note_removal()', part);
        EXECUTE format('CREATE TRIGGER note_truncation BEFORE TRUNCATE ON %s EXECUTE FUNCTION ebb.note_removal()', part);
    END LOOP;
END
$$;

GRANT SELECT, INSERT, UPDATE, DELETE ON ebb.epoch TO ebb_bridge;
GRANT SELECT ON ebb.removed TO ebb_bridge;
-- Rows from a dump have transaction ids of another cluster.
GRANT UPDATE (xid) ON ebb.buffer TO ebb_bridge;
