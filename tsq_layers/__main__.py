"""``python -m tsq_layers`` is ``tsq``."""

import sys

from tsq_layers.cli import main

if __name__ == "__main__":
    sys.exit(main())
