"""Destinations that keep changes. Each is one module; `walstream.delivery.Sink` is the contract."""
