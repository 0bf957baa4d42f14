"""Adapters of ports.QueueStore: memory (the reference) and Redis. Policy is not here: a store only moves records."""
