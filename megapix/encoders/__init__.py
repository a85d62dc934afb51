"""Frozen networks of others: image and text encoders, and those that score."""
