"""Which expert is where: host and device pools, replacement policies, disk reads, prefetch, router traces.

`offload.lossy`, `offload.experts` and the plans read it; it computes nothing.
"""
