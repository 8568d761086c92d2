-- The tables of dead letters, where walstream may not make them itself: store = "postgres" under
-- [dead_letters].
--
--     psql -d app -f sql/05_dead_letters.sql
--     psql -d app -v role=walstream -v schema=walstream -f sql/05_dead_letters.sql
--
-- Run it in the database that [dead_letters] dsn leads to, with the rights to make a schema there,
-- once the role exists. It does nothing to tables that are there already.
--
--   role     who reads and writes dead letters; walstream
--   schema   where the tables are: schema under [dead_letters]; walstream
--
-- Letters hold rows, masked as their routes mask them: nobody else is granted anything. When this
-- is the database that changes come from, let no route cover the schema: a letter would make changes.
--
-- Undo: DROP SCHEMA walstream CASCADE drops all letters, and the changes in them are given up.

\set ON_ERROR_STOP on
\if :{?role} \else \set role walstream \endif
\if :{?schema} \else \set schema walstream \endif

BEGIN;

SELECT format('CREATE SCHEMA %I', :'schema')
WHERE NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = :'schema')
\gexec

SELECT NOT EXISTS (
    SELECT FROM pg_tables WHERE schemaname = :'schema' AND tablename = 'dead_letters_version'
) AS missing
\gset
\if :missing

CREATE TABLE :"schema".dead_letters (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    slot text NOT NULL,
    route text NOT NULL,
    change_id text NOT NULL,
    lsn pg_lsn NOT NULL,
    ordinal bigint NOT NULL,
    operation text NOT NULL,
    relation_schema text,
    relation_name text,
    keys text NOT NULL,
    attempts integer NOT NULL,
    error text NOT NULL,
    traceback text NOT NULL,
    first_failed_at timestamptz,
    last_failed_at timestamptz,
    size_bytes bigint NOT NULL,
    parked boolean NOT NULL,
    stored_at timestamptz NOT NULL,
    payload bytea NOT NULL,
    deliveries integer NOT NULL DEFAULT 1,
    UNIQUE (slot, route, change_id)
);
CREATE INDEX dead_letters_in_order ON :"schema".dead_letters (slot, lsn, ordinal, id);

CREATE TABLE :"schema".dead_letter_keys (
    letter_id bigint NOT NULL REFERENCES :"schema".dead_letters ON DELETE CASCADE,
    slot text NOT NULL,
    route text NOT NULL,
    relation text NOT NULL,
    key_values text NOT NULL
);
CREATE INDEX dead_letter_keys_by_letter ON :"schema".dead_letter_keys (letter_id);
-- A B-tree refuses long values.
CREATE INDEX dead_letter_keys_by_key
    ON :"schema".dead_letter_keys (slot, route, relation, left(key_values, 200));

CREATE TABLE :"schema".dead_letters_version (version integer NOT NULL);
INSERT INTO :"schema".dead_letters_version VALUES (1);

\endif

GRANT USAGE ON SCHEMA :"schema" TO :"role";
GRANT SELECT, INSERT, UPDATE, DELETE ON :"schema".dead_letters, :"schema".dead_letter_keys
    TO :"role";
GRANT SELECT ON :"schema".dead_letters_version TO :"role";

COMMIT;

SELECT slot, route, count(*) AS letters, count(*) FILTER (WHERE parked) AS parked,
       pg_size_pretty(sum(size_bytes)) AS size, min(stored_at) AS oldest
FROM :"schema".dead_letters
GROUP BY slot, route
ORDER BY slot, route;
