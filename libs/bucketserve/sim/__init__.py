"""Discrete-event simulator: the production core and its rivals in virtual time (docs/architecture.md)."""
