"""MENU: experts of one layer are put on GPUs, with replicas. Each file is one placer; `--placer NAME` chooses it.

A dish has

    place(problem, *, rng, time_limit_s) -> PlacedLayer

Law, held by `tests/contracts/test_placers.py` for every dish: the placement is legal (every expert somewhere, none
twice on a GPU, every slot used, no GPU over ceil(slots / GPUs)), conserves tokens, its value is what the checker works
out, its bound is never above its value, and the same `rng` gives the same placement.

A complete dish:

    \"\"\"Expert e on GPU e // slots: what a framework does unasked.\"\"\"

    from moeplan.domain.placement import LayerPlacement, PlacedLayer, PlacementProblem
    from moeplan.placers._check import certified

    def place(problem, *, rng, time_limit_s):
        \"\"\"The experts in order, as many on a GPU as it has slots.\"\"\"
        placement = LayerPlacement.even(range(problem.num_experts), [...])
        return certified(problem, placement)
"""
