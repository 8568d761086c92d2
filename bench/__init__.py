"""walstream against pg_recvlogical on the same WAL, and the time from commit to handler.

Everything runs on a private cluster that is thrown away. ``python -m bench --help`` says what can
be asked for. Not installed with walstream.
"""
