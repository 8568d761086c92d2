-- What Postgres writes into the WAL about the old version of an updated or deleted row.
--
--     psql -d app -f sql/02_replica_identity.sql                            show, change nothing
--     psql -d app -v full=public.messages_v2 -f sql/02_replica_identity.sql
--     psql -d app -v index=public.reminders:reminders_code_key -f sql/02_replica_identity.sql
--     psql -d app -v default=public.messages_v2 -f sql/02_replica_identity.sql              undo
--
-- DEFAULT   the primary key. Without one, updates and deletes of the table never reach walstream.
-- FULL      every column: filters on deleted rows, the old values of an update, TOASTed values that
--           an update did not touch. Costs WAL: the whole old row, for each update and delete.
-- INDEX     the columns of a unique index on NOT NULL columns: a key where there is no primary key.
-- NOTHING   updates and deletes never reach walstream.
--
--   full, default   tables, comma-separated, written as in SQL: public.orders,"Odd"."Na.me"
--   index           table:index pairs, comma-separated
--
-- Each change takes an ACCESS EXCLUSIVE lock for a moment, behind running queries of the table: it
-- gives up after three seconds and can be run again. It holds for rows changed from then on.

\set ON_ERROR_STOP on
\if :{?full} \else \set full '' \endif
\if :{?index} \else \set index '' \endif
\if :{?default} \else \set default '' \endif

BEGIN;

SET LOCAL lock_timeout = '3s';

SELECT format('ALTER TABLE %s REPLICA IDENTITY FULL', trim(name)::regclass)
FROM regexp_split_to_table(nullif(:'full', ''), ',') AS name
JOIN pg_class ON oid = trim(name)::regclass
WHERE relreplident <> 'f'
\gexec

SELECT format(
    'ALTER TABLE %s REPLICA IDENTITY USING INDEX %I',
    split_part(trim(pair), ':', 1)::regclass, split_part(trim(pair), ':', 2)
)
FROM regexp_split_to_table(nullif(:'index', ''), ',') AS pair
\gexec

SELECT format('ALTER TABLE %s REPLICA IDENTITY DEFAULT', trim(name)::regclass)
FROM regexp_split_to_table(nullif(:'default', ''), ',') AS name
JOIN pg_class ON oid = trim(name)::regclass
WHERE relreplident <> 'd'
\gexec

COMMIT;

-- How it stands. Of a partitioned table it is the partitions' identity that counts.
SELECT c.oid::regclass AS "table",
       CASE c.relreplident
           WHEN 'd' THEN 'default'
           WHEN 'f' THEN 'full'
           WHEN 'i' THEN 'index ' || coalesce(i.indexrelid::regclass::text, '(dropped)')
           WHEN 'n' THEN 'nothing'
       END AS "replica identity",
       CASE
           WHEN c.relreplident = 'f' THEN 'every column'
           ELSE coalesce(
               (
                   SELECT string_agg(a.attname, ', ' ORDER BY a.attnum)
                   FROM pg_attribute AS a
                   WHERE a.attrelid = c.oid AND a.attnum = ANY (i.indkey)
               ),
               'none: updates and deletes are lost'
           )
       END AS "old values in the WAL"
FROM pg_class AS c
LEFT JOIN pg_index AS i ON i.indrelid = c.oid AND CASE c.relreplident
    WHEN 'd' THEN i.indisprimary
    WHEN 'i' THEN i.indisreplident
END
WHERE c.relkind IN ('r', 'p')
  AND c.relpersistence = 'p'
  AND c.relnamespace::regnamespace::text NOT IN ('pg_catalog', 'information_schema')
ORDER BY c.oid::regclass::text;
