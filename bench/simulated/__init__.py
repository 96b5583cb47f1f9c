"""Machines with a device that exist as speeds only, and ways of using the device, played on them."""
