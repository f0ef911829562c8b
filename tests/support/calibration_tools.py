"""What tests of calibration share."""

from __future__ import annotations

import json
from pathlib import Path

TEXT = Path(json.__file__).read_bytes() + Path(json.decoder.__file__).read_bytes()
CALL = 8  # tokens of the largest graph, a chunk
TOKENS = 1024 + 5  # what recipes need at least, and single tokens behind it
