"""The data plane: sample order as a pure function of (seed, position), reading, decoding, micro batches."""
