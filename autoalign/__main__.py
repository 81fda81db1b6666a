"""Run the command line as ``python -m autoalign``."""

import sys

from autoalign.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
