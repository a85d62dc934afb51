"""`megapix doctor`: looks on every node for what would make a run fail later, before it starts (`examine.py`)."""
