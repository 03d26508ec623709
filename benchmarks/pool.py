# SPDX-License-Identifier: Apache-2.0
"""What a warm pool costs: `python benchmarks/pool.py --help`. The work is in pooled.py."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

if __name__ == "__main__":
    # A script has its own directory in sys.path, and a package must be found from the one above.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    sys.exit(importlib.import_module("benchmarks.pooled").main())
