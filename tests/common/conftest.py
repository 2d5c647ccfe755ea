"""Gets transformers' own tests: they are in its source distribution, not in its wheel."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "hub"))  # tiny base models
