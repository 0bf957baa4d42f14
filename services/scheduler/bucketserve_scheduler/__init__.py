"""The scheduler service: admission, buckets, batches, placement. Never sees an output token."""
