"""`megapix doctor`: preflight checks on every node for what would make a run fail later."""
