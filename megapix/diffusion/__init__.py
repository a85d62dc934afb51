"""The objective, the sampler and the condition; a network is any callable here."""
