"""The only home of axis names, PartitionSpec, shard_map and collectives."""
