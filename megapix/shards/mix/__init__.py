"""Mixes: several data sets in one file, each with a weight, and what they must have in common."""
