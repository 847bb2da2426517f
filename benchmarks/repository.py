"""Puts the root of the repository on the path: imported first by the benchmarks that use ``tests.helpers``."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))
