"""MENU: how an exchange is done. Each file is one algorithm; its name is what `all_to_all: NAME` of a plan says.

A dish has `OPERATIONS`, the operations that it can do (all_to_all, all_gather, reduce_scatter, all_reduce, broadcast),
and

    waves(exchange, cluster) -> list[Wave]

the transfers of all the exchange's groups at once, for one byte (as if `exchange.size_bytes == 1`), in waves: a wave
starts when the one before has ended. `exchange.share_GG` is None for equal shares. A broadcast is from member 0.
`applies(groups_NG, cluster)` says whether the algorithm can be done on these groups and, if all-to-alls are all that it
does, differs there from `linear`; a plan that asks for it elsewhere is refused.

A dish with `COUNTS_COPIES = True` sends one copy of a token to a node, however many choices the token has there, and
gets `exchange.reach_GB`, what there is for each node. With it a combine is its dispatch the other way, one sum for each
copy: `share_GG` is that of the combine, `reach_GB` that of the dispatch. Without it (None) a parcel has one receiver.

Law (tests/contracts/test_collectives.py): every byte arrives once: what each rank holds after the last wave is what
the operation says, and no wave moves bytes that its sender has not got. Example, an exchange over one hub:

    OPERATIONS = ("all_to_all",)

    def applies(groups_NG, cluster):
        return groups_NG.shape[1] > 2

    def waves(exchange, cluster):
        hub = exchange.groups_NG[:, :1]
        ...                                      # wave 1: everything to member 0; wave 2: member 0 to everyone
"""

from moeplan.domain.program import Wave

__all__ = ["Wave"]
