"""Mixes of data sets: which set and sample stands where (`turns`, `order`), where they lie, and reading them."""
