"""The program, whose processes have ten seconds to meet instead of a minute."""

from __future__ import annotations

import sys
from datetime import timedelta

from minifoundation.cli import main
from minifoundation.distributed import start

if __name__ == "__main__":
    start.MEETING = timedelta(seconds=10)
    sys.exit(main())
