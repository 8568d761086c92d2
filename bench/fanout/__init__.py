"""How many clients by HTTP one walstream serves how fast: real PostgreSQL, real sockets.

``python -m bench.fanout --help`` says what can be asked for. Everything runs on this machine, on a
private cluster that is thrown away: the server, walstream, and the clients, in two processes of
their own. Each client is checked to have got exactly what it should.
"""
