"""MACHINE: a plan becomes a program. Start reading at `compile_plan.py`."""
