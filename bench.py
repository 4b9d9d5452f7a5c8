"""Throughput of every engine in a bundle: `python bench.py build/x`; the same as `emoexport bench build/x`."""

import sys

from emoexport.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "bench")
    main()
