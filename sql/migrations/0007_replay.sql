-- Deliveries that are to be repeated. The bridge that leads takes up what is requested, after a NOTIFY, or when it starts.
CREATE TABLE ebb.replay (
    id           bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    slot         text NOT NULL,
    from_lsn     pg_lsn NOT NULL,
    place        text NOT NULL,
    events       bigint,
    requested_by text NOT NULL DEFAULT session_user,
    requested_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    state        text NOT NULL DEFAULT 'requested' CHECK (state IN ('requested', 'running', 'done', 'cancelled', 'failed')),
    epoch        integer,
    -- The last event that had been delivered when it began, up to which events are delivered again.
    through      text,
    -- Where the destination held it. Void says that it has forgotten that since.
    destination  text,
    held_seq     bigint,
    void         boolean NOT NULL DEFAULT false,
    delivered    bigint NOT NULL DEFAULT 0,
    position     text,
    started_at   timestamptz,
    ended_at     timestamptz,
    detail       text
);
COMMENT ON TABLE ebb.replay IS 'Resets of the position: transactions that committed at or behind from_lsn are delivered again, in an epoch of their own.';
COMMENT ON COLUMN ebb.replay.place IS 'The place as it was asked for.';
COMMENT ON COLUMN ebb.replay.events IS 'How many events there were to deliver again, as far as that was counted before.';

-- There is one at a time.
CREATE UNIQUE INDEX replay_active ON ebb.replay (slot) WHERE state IN ('requested', 'running');

ALTER TABLE ebb.slot
    -- The slot is to be dropped and copied from the trailing one, as the position is to go back.
    ADD COLUMN reset boolean NOT NULL DEFAULT false,
    -- What stands before trail_lsn, which the trailing slot is not ahead of, was delivered to trail_destination in messages up to trail_seq.
    ADD COLUMN trail_lsn pg_lsn,
    ADD COLUMN trail_seq bigint,
    ADD COLUMN trail_destination text;

-- In an epoch that a replay began, the transactions are the same as in the one before it.
ALTER TABLE ebb.epoch ADD COLUMN replay bigint;

GRANT SELECT, INSERT, UPDATE ON ebb.replay TO ebb_bridge;
