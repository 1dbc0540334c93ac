"""`python -m headway`: the command line, for launchers that start modules."""

import sys

from headway.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
