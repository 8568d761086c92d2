-- The tables in which transactional handlers record how far they have come: exactly once.
--
--     psql -d target -f sql/06_progress.sql
--     psql -d target -v role=walstream -f sql/06_progress.sql
--
-- Run it as the owner of the database that the handlers write to, in that database, when walstream
-- may not make the tables there itself. The role must exist; it may be another one than streams.
--
--   role   the role that the handlers' connection string names; walstream
--
-- Undo: DROP TABLE walstream.progress, walstream.replayed. Without them a handler does not
-- recognise what comes again.

\set ON_ERROR_STOP on
\if :{?role} \else \set role walstream \endif

-- Said on every second run, and of no use.
SET client_min_messages = warning;

BEGIN;

-- walstream makes the same tables; as many as want to at a time wait for each other here.
SELECT pg_advisory_xact_lock(hashtextextended('walstream.progress', 0)) \g /dev/null

CREATE SCHEMA IF NOT EXISTS walstream;

-- A row says: of this slot of this cluster on this timeline, the route has applied everything up to and with this
-- change. Deleting the row makes it apply whatever comes.
CREATE TABLE IF NOT EXISTS walstream.progress (
    slot text,
    route text,
    system_identifier text NOT NULL,
    end_lsn pg_lsn NOT NULL DEFAULT '0/0',
    ordinal bigint NOT NULL DEFAULT 0,
    recorded_at timestamptz NOT NULL DEFAULT now(),
    timeline int,
    PRIMARY KEY (slot, route)
);

-- Tables that were made before this column came. Unknown is filled in when walstream starts.
ALTER TABLE walstream.progress ADD COLUMN IF NOT EXISTS timeline int;

-- A row says: this dead letter was replayed. They go when the route has no letters any more.
CREATE TABLE IF NOT EXISTS walstream.replayed (
    slot text,
    route text,
    end_lsn pg_lsn,
    ordinal bigint,
    replayed_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (slot, route, end_lsn, ordinal)
);

GRANT USAGE ON SCHEMA walstream TO :"role";
GRANT SELECT, INSERT, UPDATE ON walstream.progress TO :"role";
GRANT SELECT, INSERT, DELETE ON walstream.replayed TO :"role";

COMMIT;

SELECT slot, route, system_identifier, timeline, end_lsn, ordinal, now() - recorded_at AS recorded_ago
FROM walstream.progress
ORDER BY slot, route;
