"""MACHINE: seconds and bytes of one task on one device; knows nothing of time order."""
