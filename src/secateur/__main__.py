"""`python -m secateur`."""

from secateur.cli.app import main

main()
