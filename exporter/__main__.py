"""`python -m emoexport` is the command `emoexport`, where the package is on the path and not installed."""

from emoexport.cli import main

main()
