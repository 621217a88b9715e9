"""`python -m engine` is `octavo`."""

from engine.cli import main

main()
