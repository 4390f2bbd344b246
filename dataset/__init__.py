"""Dataset configuration, sources, buckets, caches and batches."""
