-- Takes away what walstream left in the cluster: its slot, its grants in this database, its role.
--
--     psql -d app -f sql/09_tear_down.sql
--     psql -d app -v role=walstream -v slot=walstream -f sql/09_tear_down.sql
--
-- Stop walstream first. Run it as a superuser in the database that the slot belongs to. When the
-- role was granted rights in other databases too, the last statement fails and says where.
--
--   role, slot   their names; walstream. Empty: leave it.
--
-- Replica identities stay as they are: 02_replica_identity.sql shows them and sets them back. So
-- does output_plugin_libraries: ALTER SYSTEM RESET output_plugin_libraries, then pg_reload_conf().

\set ON_ERROR_STOP on
\if :{?role} \else \set role walstream \endif
\if :{?slot} \else \set slot walstream \endif

-- Without its slot walstream cannot go on where it stopped. A slot that is streamed from refuses,
-- and says by which process.
SELECT pg_drop_replication_slot(slot_name) AS dropped, slot_name
FROM pg_replication_slots
WHERE slot_name = :'slot' AND slot_type = 'logical' AND database = current_database();

BEGIN;

-- DROP OWNED takes the role's rights away, and would drop what it owns: refuse that.
SELECT set_config('walstream.role', :'role', true) \g /dev/null
DO $$
DECLARE
    found text;
BEGIN
    SELECT string_agg(pg_describe_object(classid, objid, objsubid), ', ')
    INTO found
    FROM pg_shdepend
    JOIN pg_roles AS r ON refclassid = 'pg_authid'::regclass AND refobjid = r.oid
    JOIN pg_database AS d ON dbid = d.oid
    WHERE r.rolname = current_setting('walstream.role')
      AND d.datname = current_database()
      AND deptype = 'o';
    IF found IS NOT NULL THEN
        RAISE 'the role % owns %', current_setting('walstream.role'), found
            USING HINT = 'Give them to another role (REASSIGN OWNED) or drop them first.';
    END IF;
END
$$;

SELECT format('DROP OWNED BY %I', rolname) FROM pg_roles WHERE rolname = :'role'
\gexec
SELECT format('DROP ROLE %I', rolname) FROM pg_roles WHERE rolname = :'role'
\gexec

COMMIT;
