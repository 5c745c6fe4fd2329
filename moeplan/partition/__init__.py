"""MACHINE: who holds and does what under a plan: ranks, stages, tokens, weights, bytes; and whether it is legal and
fits.
"""
