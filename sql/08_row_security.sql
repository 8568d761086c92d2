-- Row security on messages_v2, reminders and user_interactions, and a role that asks about it: for
-- roles of walstream with rls = true (docs/access.md).
--
--     psql -d app -f sql/07_live_tables.sql
--     psql -d app -f sql/08_row_security.sql
--     psql -d app -v schema=chat -v asker=walstream_asks -f sql/08_row_security.sql
--
-- Run it as a superuser. Then give the role that asks its password with \password walstream_asks,
-- and walstream its connection string: [access.row_security] dsn, or dsn_file.
--
--   schema   where the tables are; public
--   asker    the role that walstream asks as: it has no rights of its own, and takes on those of the
--            readers for one question at a time; walstream_asks
--
-- The roles of readers are those of Supabase, anon and authenticated: made if they are missing, and
-- left alone otherwise, as are policies of these names. What they say is to be fitted to your
-- tables: here whoever has signed in sees the messages of the conversations that the token names,
-- and all reminders, and everybody sees what is done.
--
-- The application that writes needs a policy, too, unless it owns the tables: nobody else may write.
--
-- Undo: ALTER TABLE messages_v2 DISABLE ROW LEVEL SECURITY, likewise the others, then
-- DROP OWNED BY walstream_asks; DROP ROLE walstream_asks;

\set ON_ERROR_STOP on
\if :{?schema} \else \set schema public \endif
\if :{?asker} \else \set asker walstream_asks \endif

BEGIN;

SET LOCAL lock_timeout = '3s';

-- Not a superuser, and without BYPASSRLS: row security does not hold for those, and walstream
-- refuses them. NOINHERIT: on its own it reads nothing.
SELECT format('CREATE ROLE %I NOLOGIN', name)
FROM unnest(ARRAY['anon', 'authenticated']) AS name
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name)
\gexec
SELECT format('CREATE ROLE %I', :'asker')
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = :'asker')
\gexec
ALTER ROLE :"asker" LOGIN NOINHERIT NOSUPERUSER NOBYPASSRLS;
SELECT format('GRANT %I TO %I', reader.rolname, asker.rolname)
FROM pg_roles AS reader, pg_roles AS asker
WHERE reader.rolname IN ('anon', 'authenticated') AND asker.rolname = :'asker'
  AND NOT EXISTS (
      SELECT FROM pg_auth_members WHERE roleid = reader.oid AND member = asker.oid
  )
\gexec
SELECT format('GRANT CONNECT ON DATABASE %I TO %I', current_database(), :'asker')
\gexec

GRANT USAGE ON SCHEMA :"schema" TO anon, authenticated;
GRANT SELECT ON :"schema".messages_v2, :"schema".reminders, :"schema".user_interactions
    TO authenticated;
GRANT SELECT ON :"schema".user_interactions TO anon;

ALTER TABLE :"schema".messages_v2 ENABLE ROW LEVEL SECURITY;
ALTER TABLE :"schema".reminders ENABLE ROW LEVEL SECURITY;
ALTER TABLE :"schema".user_interactions ENABLE ROW LEVEL SECURITY;

-- The claims of the token are where Supabase has them; auth.uid() reads them there, too. Those who
-- sign tokens put the conversations of a user into them.
SELECT format('CREATE POLICY %I ON %I.%I FOR SELECT TO %s USING (%s)',
              name, :'schema', table_name, readers, condition)
FROM (
    VALUES
        ('messages_of_conversation', 'messages_v2', 'authenticated',
         $$conversation_id IN (SELECT jsonb_array_elements_text(
             current_setting('request.jwt.claims', true)::jsonb -> 'conversations'))$$),
        ('reminders_of_all', 'reminders', 'authenticated', 'true'),
        ('interactions_of_all', 'user_interactions', 'anon, authenticated', 'true')
) AS wanted (name, table_name, readers, condition)
WHERE NOT EXISTS (
    SELECT FROM pg_policies
    WHERE schemaname = :'schema' AND tablename = table_name AND policyname = name
)
\gexec

COMMIT;

SELECT c.relname AS "table", c.relrowsecurity AS "row security", p.policyname AS policy,
       array_to_string(p.roles, ', ') AS "for"
FROM pg_class AS c
LEFT JOIN pg_policies AS p ON p.schemaname = :'schema' AND p.tablename = c.relname
WHERE c.relnamespace = format('%I', :'schema')::regnamespace
  AND c.relname IN ('messages_v2', 'reminders', 'user_interactions')
ORDER BY c.relname, p.policyname;
