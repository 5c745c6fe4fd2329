"""MACHINE: one box becomes several nodes, joined by real TCP at a stated rate. Start reading at `emulate.py`."""
