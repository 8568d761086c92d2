-- Allows wal2json as an output plugin, where the server asks for that.
--
--     psql -d app -f sql/03_output_plugin_libraries.sql
--
-- The minor releases of August 2026 (14.24, 15.19, 16.15, 17.11, 18.6; CVE-2026-6471) brought the
-- setting output_plugin_libraries: the list of the libraries that roles with REPLICATION may use as
-- output plugins, at first without wal2json. Older servers do not know the setting, and would not
-- start with it in their configuration: there this file does nothing.
--
-- Run it as a superuser. It takes effect at once, for the whole cluster, without a restart.
--
-- Undo: ALTER SYSTEM RESET output_plugin_libraries; SELECT pg_reload_conf();

\set ON_ERROR_STOP on

-- ALTER SYSTEM replaces the list: keep what is in it.
WITH present AS (
    SELECT trim(both ' "' FROM library) AS library, place
    FROM pg_settings,
         regexp_split_to_table(setting, ',') WITH ORDINALITY AS listed (library, place)
    WHERE name = 'output_plugin_libraries'
)
SELECT format(
    'ALTER SYSTEM SET output_plugin_libraries = %s, ''wal2json''',
    string_agg(quote_literal(library), ', ' ORDER BY place)
)
FROM present
HAVING count(*) > 0 AND NOT bool_or(library = 'wal2json')
\gexec

SELECT pg_reload_conf() \g /dev/null

SELECT coalesce(
    (SELECT setting FROM pg_settings WHERE name = 'output_plugin_libraries'),
    '(this server does not know the setting, and allows every library)'
) AS output_plugin_libraries;
