"""Changes for clients that come and go: who wants which, what each may see, and what it missed.

::

    delivery -> LiveSink.take -> journal, or memory -> Hub.publish -> index -> views -> clients
                                        |                                              ^
                                        +------ replay, up to the hub's position ------+

Nothing here speaks HTTP: `walstream.gateway` does.
"""
