"""Runs inside limits: control groups, isolated runs, servers under load, the state of the machine, and their flags."""
