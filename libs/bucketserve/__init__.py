"""BucketServe: LLM serving over gRPC with adaptive length buckets and memory-sized batches."""

__all__ = ["__version__"]

__version__ = "0.1.0"
