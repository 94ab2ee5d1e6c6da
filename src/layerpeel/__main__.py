"""`python -m layerpeel` is the `layerpeel` command."""

from layerpeel.cli import main

main()
