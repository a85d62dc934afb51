"""Preparation of WebDataset shards: sources.py (what can be read) -> transform.py (image policy) -> write.py."""
