-- Tables of one's own from which a slot carries events. One that has not started is new: its start counts when the slot is made.
CREATE TABLE ebb.own_table (
    slot       text NOT NULL,
    schema     text NOT NULL,
    name       text NOT NULL,
    started_at timestamptz,
    PRIMARY KEY (slot, schema, name)
);
COMMENT ON TABLE ebb.own_table IS 'Tables other than ebb.buffer whose events a slot carries, and since when.';

-- Rows of such tables from before the slot are read in the snapshot with which it was made, which lasts as long as the session. So as long
-- as this is set, a slot that was made by another session is to be made anew.
ALTER TABLE ebb.slot ADD COLUMN own_pending boolean NOT NULL DEFAULT false;

GRANT SELECT, INSERT, UPDATE, DELETE ON ebb.own_table TO ebb_bridge;

-- While no bridge carries the events of the buffer, nothing may be put there: it would count as recorded with what is delivered from other
-- tables.
CREATE FUNCTION ebb.refuse_put() RETURNS trigger LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp
AS $$
BEGIN
    RAISE EXCEPTION 'ebb.buffer is not among the buffers of the bridge'
        USING ERRCODE = 'object_not_in_prerequisite_state', HINT = 'Add it to buffers in the configuration, and run ebb setup.';
END
$$;
REVOKE ALL ON FUNCTION ebb.refuse_put() FROM PUBLIC;
