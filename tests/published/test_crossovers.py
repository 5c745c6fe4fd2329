"""Which all-to-all is the faster one, and where that changes, as the papers say that it does.

Tutel (Hwang et al., MLSys 2023, section 3.4 and figure of 64 to 4,096 GPUs): two_dh wins for small messages at any
scale, and for large ones only where GPUs are many. HetuMoE (Nie et al., 2022): a node's leader gathers and sends for
all; its one link is what binds where every GPU has a card of its own.
"""

import moeplan as mp
from moeplan.domain.cluster import Cluster
from moeplan.network import all_to_all

MIB = 2.0**20


def azure(gpus: int) -> Cluster:
    return mp.cluster_from("azure-ndv4", nodes=gpus // 8)


def gain(gpus: int, size_bytes: float, *, algorithm: str, over: str = "linear") -> float:
    cluster = azure(gpus)
    return all_to_all(cluster, size_bytes=size_bytes, algorithm=over).time_s / (
        all_to_all(cluster, size_bytes=size_bytes, algorithm=algorithm).time_s
    )


def test_two_dh_wins_for_small_messages_at_any_scale() -> None:
    for gpus in (64, 256, 512):
        assert gain(gpus, 1 * MIB, algorithm="two_dh") > 1


def test_two_dh_loses_for_large_messages_at_small_scale() -> None:
    assert gain(64, 256 * MIB, algorithm="two_dh") < 1


def test_two_dh_gains_with_scale_until_it_wins_for_large_messages_as_well() -> None:
    gains = [gain(gpus, 32 * MIB, algorithm="two_dh") for gpus in (64, 256, 1024)]
    assert gains == sorted(gains)
    assert gains[0] < 1 < gains[-1]


def test_a_leader_is_slower_than_all_cards_together_when_its_link_binds() -> None:
    for gpus in (64, 256):
        assert gain(gpus, 64 * MIB, algorithm="leader_gather", over="two_stage") < 0.5


def test_a_leader_helps_where_a_node_has_one_card_and_messages_are_small() -> None:
    cluster = mp.cluster_from("trevor", nodes=16)
    gathered, direct = (
        all_to_all(cluster, size_bytes=64 * 1024.0, algorithm=name).time_s for name in ("leader_gather", "linear")
    )
    assert gathered < direct
