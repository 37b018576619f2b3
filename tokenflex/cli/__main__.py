"""``python -m tokenflex.cli``."""

import sys

from tokenflex.cli import main

if __name__ == "__main__":
    sys.exit(main())
