"""The documented spelling of the command: ``python -m src.cli …`` from a clone, ``minifoundation …`` once installed."""

import sys

try:
    from minifoundation.__main__ import run
except ModuleNotFoundError as error:
    sys.exit(f"error: {error.name} is not installed; run: pip install -r requirements.txt")

if __name__ == "__main__":
    run()
