"""Writes the tables and the plot of kernels/README.md from the JSON files under kernels/bench/results.

`--check` writes nothing and exits 1 if they are out of step.
"""

import sys
from pathlib import Path

from qdm_cli.engine.bench.tables import update

if __name__ == "__main__":
    check = "--check" in sys.argv[1:]
    stale = update(Path(__file__).resolve().parents[1], check=check)
    for path in stale:
        print(f"{'out of step' if check else 'written'}: {path}")
    sys.exit(bool(check and stale))
