"""The network's condition in a run: classes, or text from an encoder or from stored features."""
