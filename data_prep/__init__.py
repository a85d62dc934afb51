"""Preparation of WebDataset shards: sources/ (what can be read) -> plan.py -> shard.py -> write.py."""
