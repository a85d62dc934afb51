"""`python -m megapix`, which the launchers start on every rank."""

from megapix.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
