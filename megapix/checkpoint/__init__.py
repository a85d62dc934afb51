"""A run's state on disk: what a checkpoint holds, which one a run resumes from, and how one is written whole.

RUN/config.json                      the resolved configuration
RUN/checkpoints/latest               name of the checkpoint to resume from
RUN/checkpoints/images-000064000/
    rank-00000-of-00002.safetensors  rank 0's share of four flat fp32 vectors: weights, both Adam moments, EMA
    rank-00001-of-00002.safetensors
    state.json                       counters, configuration, layout; size and SHA-256 of every file, and of itself

A flat vector is the network's parameters end to end in their order, so any number of ranks reads any checkpoint: each
rank the range that is its share.
"""
