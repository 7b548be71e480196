-- Events that were not delivered, so that others could go on: those that were rejected, those whose receiver did not say yes, and what came
-- behind them with the same key. A row is committed before the slot, or the destination, goes past its event.
CREATE TABLE ebb.dead_letter (
    number        bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    slot          text NOT NULL,
    event_id      text NOT NULL,
    topic         text NOT NULL,
    key           text,
    payload       json,
    payload_bytes bytea,
    content_type  text NOT NULL,
    headers       json,
    event_time    timestamptz NOT NULL,
    position      text NOT NULL,
    -- The position without its epoch: in a replay, the event comes by again.
    place         text NOT NULL,
    epoch         integer NOT NULL,
    replay        bigint NOT NULL DEFAULT 0,
    fault         text,
    reason        text NOT NULL,
    detail        text NOT NULL DEFAULT '',
    attempts      integer NOT NULL,
    first_at      timestamptz NOT NULL,
    last_at       timestamptz NOT NULL,
    state         text NOT NULL CHECK (state IN ('parked', 'retrying', 'delivered', 'discarded')),
    stream_seq    bigint,
    destination   text,
    decided_by    text,
    decided_at    timestamptz,
    CHECK (payload IS NULL OR payload_bytes IS NULL)
);
COMMENT ON TABLE ebb.dead_letter IS 'Events that were set aside, and behind them, by number, later ones of the same key. See ebb dead.';
COMMENT ON COLUMN ebb.dead_letter.payload IS 'The payload, if it is JSON; otherwise payload_bytes holds it. Both are NULL where the row has none, which is a fault.';
COMMENT ON COLUMN ebb.dead_letter.fault IS 'Why its row made no event. To have it delivered, set what is missing, and this to NULL.';
COMMENT ON COLUMN ebb.dead_letter.reason IS 'Why it was set aside; ''queued'' is an event behind another one of its key.';
COMMENT ON COLUMN ebb.dead_letter.detail IS 'What the receiver said, or what can be done.';
COMMENT ON COLUMN ebb.dead_letter.state IS 'parked: waits for ebb dead retry. retrying: the bridge delivers it as soon as it can.';
COMMENT ON COLUMN ebb.dead_letter.stream_seq IS 'Where the destination stores it, if it was delivered from here and the destination numbers what it stores.';
COMMENT ON COLUMN ebb.dead_letter.decided_by IS 'Who asked last for it to be retried or discarded.';

CREATE UNIQUE INDEX dead_letter_event ON ebb.dead_letter (slot, event_id, place);
-- A key may be longer than what an index takes, all the more that of an event which cannot be delivered.
CREATE INDEX dead_letter_queue ON ebb.dead_letter (slot, left(key, 500), number) WHERE state IN ('parked', 'retrying');
-- Those without a key.
CREATE INDEX dead_letter_alone ON ebb.dead_letter (slot, number) WHERE state = 'retrying' AND key IS NULL;
-- What may come by again.
CREATE INDEX dead_letter_place ON ebb.dead_letter (slot, (split_part(place, ':', 1)::pg_lsn));
CREATE INDEX dead_letter_delivered ON ebb.dead_letter (slot, last_at) WHERE state = 'delivered';

GRANT SELECT, INSERT, UPDATE, DELETE ON ebb.dead_letter TO ebb_bridge;
