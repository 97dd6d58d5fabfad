"""`python -m altiplano.cli`, the same as the console script."""

from altiplano.cli.app import main

main()
