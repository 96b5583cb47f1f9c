"""Faults of the system injected into commands, for `bench.system_faults`."""
