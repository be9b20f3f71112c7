"""The program, whose processes divide the optimizer on a CPU too, as they do on GPUs."""

from __future__ import annotations

import sys

from minifoundation.cli import main
from minifoundation.train import parallel

if __name__ == "__main__":
    parallel.owners = lambda config, machine, world: world.local_size
    sys.exit(main())
