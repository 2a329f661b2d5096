"""``python -m asgi_metering.cli``."""

import sys

from asgi_metering.cli import main

if __name__ == "__main__":
    sys.exit(main())
