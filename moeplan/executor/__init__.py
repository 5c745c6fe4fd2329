"""MACHINE: a program becomes a timeline on real devices. Start reading at `execute.py`."""
