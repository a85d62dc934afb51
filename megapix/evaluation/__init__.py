"""`megapix evaluate`: images from weights, their scores against reference statistics, and a manifest to repeat it."""
