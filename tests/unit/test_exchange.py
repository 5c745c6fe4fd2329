"""One exchange alone on a cluster: bounds hold, bytes are kept, what a user gets wrong is named."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import moeplan as mp
from moeplan import menu
from moeplan.cli import app
from moeplan.exporters._exchange_picture import traffic_bytes
from moeplan.network import FlowSet, all_to_all, finish_times

CLUSTERS = {
    "hgx-h100-rail": {"fabric.nodes_per_leaf": 2},
    "hgx-h100-fat-tree": {"fabric.nodes_per_leaf": 2, "fabric.oversubscription": 4.0},
    "hgx-h100-rail-only": {},
    "trevor": {},
    "slingshot-dragonfly": {},
    "hgx-h100-degraded": {"nodes": 12},
}
ALGORITHMS = [
    name for name in menu.names("collectives") if "all_to_all" in menu.load("collectives", name, "OPERATIONS")
]


def skewed(gpus: int) -> np.ndarray:
    rng = np.random.default_rng(7)
    return rng.integers(0, 10**6, (gpus, gpus)) * (rng.random((gpus, gpus)) < 0.9) * 1.0


@pytest.mark.parametrize("name", CLUSTERS)
def test_no_algorithm_beats_its_links_or_the_cut(name: str) -> None:
    cluster = mp.cluster_from(name, changes={"nodes": 4} | CLUSTERS[name])
    traffic = skewed(cluster.num_gpus)
    members = np.arange(cluster.num_gpus)[None]
    times = {}
    for algorithm in ALGORITHMS:
        if not menu.load("collectives", algorithm, "applies")(members, cluster):
            continue
        for given in ({"traffic_bytes_GG": traffic}, {"size_bytes": 1e6}):
            found = all_to_all(cluster, algorithm=algorithm, **given)
            assert found.time_s >= found.bound_s * (1 - 1e-9)
            assert found.bound_s > 0
            assert found.time_s >= found.cut_bound_s * (1 - 1e-9), algorithm
            assert (found.finish_s_F <= found.time_s * (1 + 1e-12)).all()
            assert found.bottleneck_busy_s <= found.time_s * (1 + 1e-9)
            assert sum(found.tier_bytes.values()) >= 0.5 * found.cut_bound_s
        times[algorithm] = found.time_s
    assert "linear" in times


def test_every_link_carries_the_bytes_of_the_flows_over_it() -> None:
    cluster = mp.cluster_from("p4d", nodes=2)
    assert cluster.path_gap_s([0], [15]) == 0
    traffic = skewed(16)
    found = all_to_all(cluster, traffic_bytes_GG=traffic)
    wanted = np.zeros(cluster.num_links)
    for source, target in np.ndindex(16, 16):
        for link in cluster.path(source, target):
            wanted[link] += traffic[source, target]
    np.testing.assert_allclose(found.load_bytes_K, wanted, rtol=1e-12)


def test_what_stays_on_a_gpu_is_not_sent() -> None:
    cluster = mp.cluster_from("hgx-h100-rail", nodes=2)
    found = all_to_all(cluster, traffic_bytes_GG=np.diag(np.full(16, 1e6)) + np.eye(16, k=1))
    assert found.tier_bytes["same GPU"] == 0
    assert sum(found.tier_bytes.values()) == pytest.approx(15)


def test_a_gap_between_messages_costs_many_small_ones_most() -> None:
    plain = mp.cluster_from("hgx-h100-rail", nodes=4)
    gapped = mp.cluster_from("hgx-h100-rail", nodes=4, changes={"nic.message_gap": "5 us"})
    ratios = [
        all_to_all(gapped, size_bytes=size).time_s / all_to_all(plain, size_bytes=size).time_s
        for size in (2.0**20, 2.0**28)
    ]
    assert ratios[0] > 2
    assert 1 < ratios[1] < 1.1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "give either size_bytes or traffic_bytes_GG"),
        ({"size_bytes": -1.0}, "above 0"),
        ({"size_bytes": float("nan")}, "above 0"),
        ({"traffic_bytes_GG": np.ones((3, 3))}, r"shape \(3, 3\) is not \(16, 16\)"),
        ({"traffic_bytes_GG": -np.ones((16, 16))}, "bytes are finite and 0 or more"),
        ({"traffic_bytes_GG": np.full((16, 16), np.nan)}, "bytes are finite and 0 or more"),
        ({"traffic_bytes_GG": np.zeros((16, 16))}, "nothing moves"),
        ({"size_bytes": 1e6, "ranks": np.array([0, 0])}, "each GPU of the group once"),
        ({"size_bytes": 1e6, "ranks": np.array([0, 99])}, "GPUs 0 to 15"),
        ({"size_bytes": 1e6, "algorithm": "linaer"}, "did you mean 'linear'"),
        ({"size_bytes": 1e6, "algorithm": "tree"}, "not all_to_all"),
        ({"size_bytes": 1e6, "fidelity": "packet"}, "unknown fidelity"),
        ({"size_bytes": 1e6, "tolerance": 0.1}, "has no effect"),
        ({"size_bytes": 1e6, "fidelity": "batched", "tolerance": 2.0}, "share from 0 to 1"),
    ],
)
def test_what_a_user_gets_wrong_is_named(given: dict[str, object], said: str) -> None:
    cluster = mp.cluster_from("hgx-h100-rail", nodes=2)
    with pytest.raises(mp.MoeplanError, match=said):
        all_to_all(cluster, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"capacity_bytes_per_s_K": np.array([1.0, 0.0])}, "capacity 1 is 0.0"),
        ({"capacity_bytes_per_s_K": np.array([1.0, np.nan])}, "capacity 1 is nan"),
        ({"size_bytes_F": np.array([-1.0])}, "size 0 is -1.0"),
        ({"start_s_F": np.array([np.inf])}, "start 0 is inf"),
        ({"weight_F": np.array([0.0])}, "weight 0 is 0.0"),
        ({"link_I": np.array([0, 2], np.int32)}, "a path has link 2"),
        ({"link_I": np.array([1, 1], np.int32)}, "flow 0 crosses a link twice"),
        ({"first_F1": np.array([0, 1])}, "does not cut 2 links into 1 paths"),
        ({"link_I": np.zeros(0, np.int32), "first_F1": np.array([0, 0])}, "neither a link nor a rate cap"),
    ],
)
def test_flows_that_cannot_be_are_refused(change: dict[str, np.ndarray], said: str) -> None:
    given = {
        "capacity_bytes_per_s_K": np.ones(2), "link_I": np.array([0, 1], np.int32), "first_F1": np.array([0, 2]),
        "size_bytes_F": np.ones(1),
    }  # fmt: skip
    with pytest.raises(mp.SimulationError, match=said):
        finish_times(FlowSet(**(given | change)))  # type: ignore[arg-type]


# ---- the command


def run(*words: str) -> tuple[int, str]:
    found = CliRunner().invoke(app, ["network", "a2a", *words])
    return found.exit_code, found.output


@pytest.mark.parametrize("algorithm", ["linear", "pairwise_rounds"])
@pytest.mark.parametrize("each", [1, 8])
def test_the_picture_shows_what_every_gpu_sends(algorithm: str, each: int) -> None:
    cluster = mp.cluster_from("hgx-h100-rail", nodes=2)
    found = mp.network.all_to_all(cluster, size_bytes=16.0, algorithm=algorithm)
    one = np.ones((16, 16)) - np.eye(16)
    wanted = one.reshape(16 // each, each, 16 // each, each).sum(axis=(1, 3))
    assert traffic_bytes(found, 16, each) == pytest.approx(wanted)


def test_the_command_times_all_algorithms_and_draws_the_fastest(tmp_path: Path) -> None:
    picture = tmp_path / "heat.png"
    status, text = run(
        "--cluster", "hgx-h100-rail", "--nodes", "2", "--bytes", "1MiB", "--json", "--plot", str(picture)
    )
    assert status == 0
    found = json.loads(text)
    times = [each["time_s"] for each in found["results"]]
    assert times == sorted(times)
    assert {"linear", "two_stage"} <= {each["algorithm"] for each in found["results"]}
    assert picture.stat().st_size > 10_000


def test_the_command_takes_a_matrix_from_a_file(tmp_path: Path) -> None:
    np.savez(tmp_path / "counts.npz", traffic=skewed(16))
    np.savetxt(tmp_path / "counts.csv", skewed(16), delimiter=",")
    words = ("--cluster", "hgx-h100-rail", "--nodes", "2", "--algorithm", "linear", "--json")
    answers = [run(*words, "--traffic", str(tmp_path / name)) for name in ("counts.npz", "counts.csv")]
    assert answers[0] == answers[1]
    assert answers[0][0] == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--bytes", "64"), "--bytes: '64'"),
        ((), "give either --bytes"),
        (("--bytes", "1MiB", "--traffic", "x.npz"), "give either --bytes"),
        (("--traffic", "nowhere.npz"), "nowhere.npz"),
        (("--bytes", "1MiB", "--ranks", "0-x"), "not a number or a range"),
        (("--bytes", "1MiB", "--ranks", "0-99"), "GPUs 0 to 15"),
        (("--bytes", "1MiB", "--algorithm", "lineer"), "did you mean 'linear'"),
        (("--bytes", "1MiB", "--plot", "x.txt"), "x.txt"),
    ],
)
def test_the_command_names_what_is_wrong(words: tuple[str, ...], said: str) -> None:
    status, text = run("--cluster", "hgx-h100-rail", "--nodes", "2", *words)
    assert status == 2
    assert said in text.replace("\n", " ")
    assert "Traceback" not in text
