"""Tests; each makes the tiny models that it needs."""

import os

# Files of tests run side by side, and what they start besides: a thread that waits by spinning takes their core.
# It is read when OpenMP's library is loaded, as with torch.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
