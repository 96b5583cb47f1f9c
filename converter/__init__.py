"""Checkpoints in, GGUF out: calibration, compression, quantisation, reports.

Only commands that convert import it; serving never does, so that a server needs no torch.
"""
