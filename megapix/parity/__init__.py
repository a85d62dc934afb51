"""Parity of ZeRO-2 and a plain PyTorch reference: `megapix doctor --parity`."""
