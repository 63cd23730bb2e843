"""`python -m sandbox.cli`: the command without its script."""

from sandbox.cli import main

main()
