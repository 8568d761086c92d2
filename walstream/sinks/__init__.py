"""Destinations that keep changes, one a module; `walstream.destinations.Sink` is the contract."""
