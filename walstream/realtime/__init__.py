"""The protocol of the Supabase Realtime clients: Phoenix channels over WebSockets.

What a client's messages mean and what is answered is decided in pure modules; `visits`, and what
it uses, carries it out.
"""
