-- The role that walstream connects as, and what it may do.
--
--     psql -d app -f sql/01_role_and_grants.sql
--     psql -d app -v schemas=public,sales -v monitor=on -f sql/01_role_and_grants.sql
--
-- Run it as a superuser in the database whose changes are wanted, again after adding a schema.
-- Then give the role its password with \password walstream, which keeps it out of logs and history.
--
--   role      the name of the role; walstream
--   schemas   the schemas that hold the tables of its routes, comma-separated; public
--   monitor   on: the role may also see what other sessions do (pg_monitor), so that
--             `walstream check` can name who blocks a slot; off
--
-- Undo: 09_tear_down.sql

\set ON_ERROR_STOP on
\if :{?role} \else \set role walstream \endif
\if :{?schemas} \else \set schemas public \endif
\if :{?monitor} \else \set monitor off \endif

BEGIN;

-- REPLICATION is the right to read the WAL, and with it every change of every table in the
-- databases that the role may connect to: the grants below do not narrow what a slot delivers.
-- A role that exists already keeps its password and its other attributes.
SELECT format('CREATE ROLE %I', :'role')
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = :'role')
\gexec
ALTER ROLE :"role" LOGIN REPLICATION;

SELECT format('GRANT CONNECT ON DATABASE %I TO %I', current_database(), :'role')
\gexec

-- To read the catalog, to check filters against the columns, and to take snapshots.
SELECT format('GRANT USAGE ON SCHEMA %I TO %I', trim(name), :'role')
FROM regexp_split_to_table(:'schemas', ',') AS name
\gexec
SELECT format('GRANT SELECT ON ALL TABLES IN SCHEMA %I TO %I', trim(name), :'role')
FROM regexp_split_to_table(:'schemas', ',') AS name
\gexec

-- Tables that the user of this script makes later. Other owners' tables need the same statement
-- with FOR ROLE, run by that owner or a superuser.
SELECT format(
    'ALTER DEFAULT PRIVILEGES IN SCHEMA %I GRANT SELECT ON TABLES TO %I', trim(name), :'role'
)
FROM regexp_split_to_table(:'schemas', ',') AS name
\gexec

-- GRANT or REVOKE, when it is not so already.
SELECT format(
    CASE :'monitor'::boolean
        WHEN true THEN 'GRANT pg_monitor TO %I'
        ELSE 'REVOKE pg_monitor FROM %I'
    END,
    rolname
)
FROM pg_roles AS r
WHERE rolname = :'role'
  AND :'monitor'::boolean <> EXISTS (
      SELECT FROM pg_auth_members WHERE roleid = 'pg_monitor'::regrole AND member = r.oid
  )
\gexec

COMMIT;

SELECT rolname AS role, rolcanlogin AS login, rolreplication AS replication,
       pg_has_role(oid, 'pg_monitor', 'member') AS monitor
FROM pg_roles
WHERE rolname = :'role';
