"""Text to packed batches: readers, token shards, the exact order and mixture, batches."""
