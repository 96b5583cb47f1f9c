"""Methods that make a model smaller: pure functions from what a calibration pass learnt to decisions and their cost."""
