"""What this machine can do: kernels, transfers and disks measured, and a cost model made of the measurements.

Plans and predictions use it.
"""
