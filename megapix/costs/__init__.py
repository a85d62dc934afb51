"""Parameters, FLOPs, bytes and seconds, counted by hand; `megapix plan` prints them. Imports no torch."""
