"""Numbers of a run: meters, TensorBoard, profiles, norms per block."""
