"""From a source to tar shards and their index, resumable after a kill."""
