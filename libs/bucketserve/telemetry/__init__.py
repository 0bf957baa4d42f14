"""Traces, metrics and logs: names in one catalogue, set-up without globals. Knows no service."""
