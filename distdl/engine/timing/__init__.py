"""The time of a training: where each rank spends it, and shards by measured speed."""
