"""`python -m megapix`, which the launchers start on every rank."""

from megapix.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
