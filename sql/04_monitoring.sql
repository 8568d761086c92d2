-- How replication stands: what to look at when walstream lags, and before the disk is full.
--
--     psql -d app -f sql/04_monitoring.sql
--     psql -d app -v slot=walstream -f sql/04_monitoring.sql     one slot only
--
-- Reads only. A role without pg_monitor sees nulls where other users' sessions are concerned.

\set ON_ERROR_STOP on
\if :{?slot} \else \set slot '' \endif

-- A standby does not write WAL: what it has replayed is the end of its WAL.
SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END
           AS wal_end
\gset

\echo '== Slots: what WAL each keeps on the disk (retained) and has not confirmed (lag)'
-- wal_status: reserved is good, extended is behind, unreserved is about to be lost, lost is lost.
-- The columns of newer versions are read as JSON, so that older ones answer too.
SELECT slot_name,
       plugin,
       database,
       active,
       active_pid,
       wal_status,
       pg_size_pretty(pg_wal_lsn_diff(:'wal_end', restart_lsn)) AS retained,
       pg_size_pretty(pg_wal_lsn_diff(:'wal_end', confirmed_flush_lsn)) AS lag,
       -- How much more may be written before the slot is lost; null: no limit but the disk.
       pg_size_pretty(safe_wal_size) AS until_lost,
       confirmed_flush_lsn,
       to_jsonb(s) ->> 'inactive_since' AS inactive_since,
       to_jsonb(s) ->> 'invalidation_reason' AS invalidation_reason
FROM pg_replication_slots AS s
WHERE slot_type = 'logical' AND :'slot' IN ('', slot_name)
ORDER BY restart_lsn;

\echo '== Walsenders: who streams, how long ago it reported, and how far behind it is'
SELECT r.pid,
       s.slot_name,
       r.usename,
       r.application_name,
       r.client_addr,
       r.state,
       r.sent_lsn,
       r.flush_lsn,
       pg_size_pretty(pg_wal_lsn_diff(:'wal_end', r.flush_lsn)) AS lag,
       date_trunc('milliseconds', r.flush_lag) AS lag_time,
       date_trunc('milliseconds', now() - r.reply_time) AS reported_ago,
       a.wait_event_type || '/' || a.wait_event AS waits_for
FROM pg_stat_replication AS r
LEFT JOIN pg_replication_slots AS s ON s.active_pid = r.pid
LEFT JOIN pg_stat_activity AS a ON a.pid = r.pid
WHERE :'slot' IN ('', s.slot_name)
ORDER BY r.flush_lsn;

\echo '== Spills: transactions too big for logical_decoding_work_mem go through the disk'
SELECT slot_name,
       total_txns AS transactions,
       pg_size_pretty(total_bytes) AS decoded,
       spill_txns AS spilled_transactions,
       pg_size_pretty(spill_bytes) AS spilled,
       current_setting('logical_decoding_work_mem') AS logical_decoding_work_mem,
       stats_reset
FROM pg_stat_replication_slots
WHERE :'slot' IN ('', slot_name)
ORDER BY slot_name;

\echo '== Transactions open for over a minute: their WAL is kept, and a new slot waits for them'
SELECT pid,
       datname,
       usename,
       application_name,
       state,
       date_trunc('seconds', now() - xact_start) AS open_for,
       coalesce(backend_xid, backend_xmin) AS xid,
       left(query, 60) AS query
FROM pg_stat_activity
WHERE xact_start < now() - interval '1 minute' AND backend_type = 'client backend'
UNION ALL
-- Forgotten ones of two-phase commit: COMMIT PREPARED or ROLLBACK PREPARED ends them.
SELECT NULL, database, owner, 'prepared: ' || gid, 'prepared',
       date_trunc('seconds', now() - prepared), transaction, NULL
FROM pg_prepared_xacts
ORDER BY open_for DESC;

\echo '== Room: slots and walsenders in use, and what bounds the WAL that a slot may keep'
SELECT (SELECT count(*) FROM pg_replication_slots) || ' of '
           || current_setting('max_replication_slots') AS slots,
       (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'walsender') || ' of '
           || current_setting('max_wal_senders') AS walsenders,
       -- -1: nothing does; a slot that nobody reads fills the disk.
       current_setting('max_slot_wal_keep_size') AS max_slot_wal_keep_size,
       current_setting('wal_sender_timeout') AS wal_sender_timeout;
