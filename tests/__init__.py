"""The tests of walstream; most of them run against a real PostgreSQL."""
