"""Tests; each makes the tiny models that it needs."""

import os

# Files of tests run side by side, and what they start besides: a thread that waits by spinning takes their core.
# It is read when OpenMP's library is loaded, as with torch.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# OpenBLAS spins all the same, and products of tiny matrices do not gain from more threads than one. ggml's are not
# meant: a graph is computed by as many threads as its caller says.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
