"""MACHINE: a program runs in virtual time and becomes a timeline. Start reading at `simulate.py`."""
