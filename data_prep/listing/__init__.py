"""What the kinds of sources share: files, tar files, captions, classes, splits, and how they are read."""
