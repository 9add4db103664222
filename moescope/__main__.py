"""`python -m moescope` is `moescope`."""

import sys

from moescope.supervisor import main

if __name__ == "__main__":
    sys.exit(main())
