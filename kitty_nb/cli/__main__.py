"""`python -m kitty_nb.cli`: the command line without its script."""

from kitty_nb.cli import main

main()
