"""The scheduling core: pure decisions, no I/O, no clock, no randomness (docs/architecture.md, "The pure core")."""
