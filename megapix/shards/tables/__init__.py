"""The compact tables beside `index.json`, read in place and checked once on each node."""
