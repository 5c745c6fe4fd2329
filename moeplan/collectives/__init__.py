"""MENU: how an exchange is done. Each file is one algorithm; its name is what `all_to_all: NAME` of a plan says.

A dish has `OPERATIONS`, the operations that it can do (all_to_all, all_gather, reduce_scatter, all_reduce), and

    waves(operation, groups_NG, share_GG, cluster) -> list[Wave]

the transfers of all the groups at once, for an exchange of one byte (`Exchange.size_bytes == 1`), in waves: a wave
starts when the one before has ended. `share_GG` is None for equal shares. `applies(groups_NG, cluster)` says whether
the algorithm differs from `linear` on these groups; a plan that asks for it elsewhere is refused.

Law (tests/contracts/test_collectives.py): every byte arrives once: what each rank holds after the last wave is what
the operation says, and no wave moves bytes that its sender has not got. Example, an exchange over one hub:

    OPERATIONS = ("all_to_all",)

    def applies(groups_NG, cluster):
        return groups_NG.shape[1] > 2

    def waves(operation, groups_NG, share_GG, cluster):
        hub = groups_NG[:, :1]
        ...                                      # wave 1: everything to member 0; wave 2: member 0 to everyone
"""

from moeplan.domain.program import Wave

__all__ = ["Wave"]
