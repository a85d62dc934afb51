"""`megapix evaluate`: samples from weights, their scores against reference statistics, and a manifest to repeat it."""
