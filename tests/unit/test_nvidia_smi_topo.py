"""The table of `nvidia-smi topo -m`: read from whatever a terminal makes of it, checked, and turned into a cluster."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from moeplan.catalogue.figures import cluster_spec
from moeplan.catalogue.resolve import entry
from moeplan.catalogue.sheet import Sheet, moved
from moeplan.cli import app
from moeplan.domain.cluster import Cluster, build_cluster
from moeplan.errors import CatalogueError
from moeplan.importers._node_report import report
from moeplan.importers.nvidia_smi_topo import read

DATA = Path(__file__).parents[1] / "data" / "node_topologies"
GOOD = sorted(path.name for path in DATA.glob("*.txt"))
HGX_H100 = Path(__file__).parents[2] / "topologies" / "hgx-h100-rail.yaml"
H100 = (DATA / "dgx-h100.txt").read_text(encoding="utf-8")
DGX1 = (DATA / "dgx-1-v100.txt").read_text(encoding="utf-8")
BOX = (DATA / "pcie-two-sockets.txt").read_text(encoding="utf-8")


def cluster_of(path: Path, nodes: int = 1) -> Cluster:
    """The cluster of so many machines that a table describes."""
    sheet = entry(str(path), "topologies")
    data = {"cluster": {key: value for key, value in sheet.data.items() if key not in ("about", "sources")}}
    spec = cluster_spec(Sheet(data=data, spots=moved(sheet.spots, ("cluster",)) | {(): sheet.spots[()]}))
    return build_cluster(spec.model_copy(update={"nodes": nodes}))


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "topo.txt"
    path.write_text(text, encoding="utf-8", newline="")
    return path


def findings(text: str) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = report(text.encode())["findings"]
    return found


def table(cells: list[list[str]], nics: int = 0, behind: str = "") -> str:
    """A table of these cells; the last `nics` devices are NICs."""
    count = len(cells) - nics
    names = [f"GPU{n}" for n in range(count)] + [f"NIC{n}" for n in range(nics)]
    rows = ["\t".join([name, *row]) + behind * name.startswith("GPU") for name, row in zip(names, cells, strict=True)]
    return "\t" + "\t".join(names) + ("\tCPU Affinity\tNUMA Affinity" if behind else "") + "\n" + "\n".join(rows) + "\n"


def meshed(count: int, links: int) -> str:
    """A table in which each pair of GPUs has the same NVLinks."""
    return table([["X" if a == b else f"NV{links}" for b in range(count)] for a in range(count)])


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("nodes", [1, 2])
def test_every_pair_of_gpus_of_a_good_table_has_a_path_that_starts_and_ends_right(name: str, nodes: int) -> None:
    cluster = cluster_of(DATA / name, nodes)
    for a in range(cluster.num_gpus):
        for b in range(cluster.num_gpus):
            path = cluster.path(a, b)
            assert bool(path) == (a != b)
            if path:
                assert cluster.link_ends(path[0])[0] == cluster.gpu_name(a)
                assert cluster.link_ends(path[-1])[1] == cluster.gpu_name(b)


@pytest.mark.parametrize("name", GOOD)
def test_a_table_and_the_xml_of_the_same_machine_agree(name: str) -> None:
    ours, theirs = report(DATA / name), report(DATA / name.replace(".txt", ".xml"))
    assert ours["gpu"]["sheet"] == theirs["gpu"]["sheet"] or name == "dgx-1-v100.txt"
    assert [gpu["nic"] for gpu in ours["gpus"]] == [gpu["nic"] for gpu in theirs["gpus"]]
    assert [gpu["nic_distance"] for gpu in ours["gpus"]] == [gpu["nic_distance"] for gpu in theirs["gpus"]]
    assert [gpu["socket"] for gpu in ours["gpus"]] == [gpu["socket"] for gpu in theirs["gpus"]]
    named = [[re.sub("NODE", "PHB", word) for word in row] for row in ours["links"]]
    assert named == theirs["links"]
    first, second = cluster_of(DATA / name, 2), cluster_of(DATA / name.replace(".txt", ".xml"), 2)
    for b in range(1, first.num_gpus):
        assert len(first.path(0, b)) == len(second.path(0, b))


def test_a_dgx_h100_is_the_catalogues_hgx_h100_rail_but_for_nccls_rates() -> None:
    ours, theirs = cluster_of(DATA / "dgx-h100.txt", 2), cluster_of(HGX_H100, 2)
    assert ours.spec.gpu == theirs.spec.gpu
    assert ours.wiring is not None
    assert theirs.wiring is not None
    assert ours.wiring.nic_G.tolist() == theirs.wiring.nic_G.tolist() == list(range(8))
    assert ours.path_latency_s([0, 0], [1, 8]) == pytest.approx(theirs.path_latency_s([0, 0], [1, 8]))
    assert ours.spec.nic is not None
    assert ours.spec.nic.bandwidth_bytes_per_s == 50e9


@pytest.mark.parametrize("name", GOOD)
def test_the_distances_of_the_tree_are_those_of_the_table(name: str) -> None:
    assert not [each for each in findings((DATA / name).read_text()) if "by the rows of others" in each["what"]]


@pytest.mark.parametrize(
    ("count", "links", "is_switch"),
    [(2, 12, False), (2, 18, False), (4, 4, False), (4, 6, False), (4, 12, True), (8, 18, True), (16, 6, True)],
)
def test_equal_links_between_all_are_a_switch_where_no_gpu_has_so_many_ports(
    tmp_path: Path, count: int, links: int, is_switch: bool
) -> None:
    wiring = read(written(tmp_path, meshed(count, links))).topology["wiring"]
    assert ({"from": "gpu*", "to": "nvswitch", "link": "nvlink", "count": links} in wiring) == is_switch
    assert ({"from": "gpu0", "to": "gpu1", "link": "nvlink_direct", "count": links} in wiring) == (not is_switch)


def test_a_gpu_with_fewer_links_to_the_switch_keeps_its_own_number(tmp_path: Path) -> None:
    cells = [["X" if a == b else "NV17" if 3 in (a, b) else "NV18" for b in range(8)] for a in range(8)]
    topology = read(written(tmp_path, table(cells))).topology
    assert {"from": "gpu3", "to": "nvswitch", "link": "nvlink", "count": 17} in topology["wiring"]
    assert {"from": "gpu4", "to": "nvswitch", "link": "nvlink", "count": 18} in topology["wiring"]
    assert [each["severity"] for each in findings(table(cells)) if "17 NVLinks" in each["what"]] == ["warning"]


@pytest.mark.parametrize(
    ("driver", "sheet"),
    [
        ("NVIDIA H200", "h200-sxm"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb-sxm"),
        ("Tesla V100-SXM2-32GB", "v100-sxm2-32gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
    ],
)
def test_the_list_of_gpus_before_the_table_names_the_sheet(tmp_path: Path, driver: str, sheet: str) -> None:
    imported = read(written(tmp_path, H100.replace("NVIDIA H100 80GB HBM3", driver)))
    assert imported.topology["gpu"] == sheet
    assert not any("a guess" in sentence.split(":")[-1] for sentence in imported.assumptions if "gpu is" in sentence)


def test_without_the_list_the_gpu_is_a_guess_by_its_links_and_said_to_be(tmp_path: Path) -> None:
    imported = read(written(tmp_path, re.sub("(?m)^GPU .*\n", "", H100)))
    assert imported.topology["gpu"] == "h100-sxm"
    assert "gpu is h100-sxm: it has 18 NVLinks, and nothing else tells; a guess." in imported.assumptions
    assert imported.topology["links"]["nvlink"]["bandwidth"]["source"] == "assumed"


def test_speeds_that_the_table_does_not_have_are_assumed() -> None:
    links = read(DATA / "dgx-h100.txt").topology["links"]
    assert links["nvlink"]["bandwidth"] == {
        "value": "20.6 GB/s", "source": "nccl", "note": "per link and direction, NCCL's for compute capability 9.0",
    }  # fmt: skip
    assert links["pcie_gen5_x16"]["bandwidth"]["source"] == "assumed"
    assert links["socket_link"]["bandwidth"]["source"] == "assumed"


def test_a_gpu_that_nothing_tells_has_to_be_named(tmp_path: Path) -> None:
    path = written(tmp_path, re.sub("(?m)^GPU .*\n", "", BOX))
    with pytest.raises(CatalogueError, match=r"it has 0 NVLinks, and nothing else tells.*set cluster.gpu="):
        cluster_of(path)
    scenario = tmp_path / "other.yaml"
    scenario.write_text("about: the GPU is named\nextends: topo.txt\ngpu: rtx-4090\n", encoding="utf-8")
    assert cluster_of(scenario).spec.gpu.name == "rtx-4090"


def test_a_pcie_switch_a_switch_of_switches_and_a_host_bridge_become_wires(tmp_path: Path) -> None:
    text = table(
        [
            ["X", "PIX", "PXB", "PHB", "NODE", "PIX"],
            ["PIX", "X", "PXB", "PHB", "NODE", "PIX"],
            ["PXB", "PXB", "X", "PHB", "NODE", "PXB"],
            ["PHB", "PHB", "PHB", "X", "NODE", "PHB"],
            ["NODE", "NODE", "NODE", "NODE", "X", "NODE"],
            ["PIX", "PIX", "PXB", "PHB", "NODE", "X"],
        ],
        nics=1,
    )
    scenario = tmp_path / "named.yaml"
    written(tmp_path, text)
    scenario.write_text("about: the GPU is named\nextends: topo.txt\ngpu: v100-pcie\n", encoding="utf-8")
    cluster = cluster_of(scenario)
    assert [len(cluster.path(0, b)) for b in range(1, 5)] == [2, 4, 4, 4]
    assert [each for each in findings(text) if "by the rows of others" in each["what"]] == []


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("colours", lambda text: re.sub(r"NV18|PIX", lambda word: f"\x1b[1;32m{word[0]}\x1b[0m", text)),
        ("Windows line ends", lambda text: text.replace("\n", "\r\n")),
        ("old line ends", lambda text: text.replace("\n", "\r")),
        ("spaces for tabs", lambda text: text.replace("\t", "   ")),
        ("no legend", lambda text: text[: text.index("Legend")]),
        ("no list of NICs", lambda text: text[: text.index("NIC Legend")]),
        ("a prompt", lambda text: "root@node7:~# nvidia-smi topo -m\n" + text + "root@node7:~#\n"),
        ("a quotation", lambda text: "```\n" + text + "```\n"),
        ("columns run together", lambda text: text.replace("NODE\tNODE", "NODENODE")),
        ("a bell", lambda text: text.replace("GPU1\t", "GPU1\t\x07")),
        ("empty lines", lambda text: text.replace("\n", "\n\n")),
    ],
)
def test_what_a_terminal_adds_or_takes_changes_nothing(name: str, change: Any) -> None:
    before, after = report(H100.encode()), report(change(H100).encode())
    assert name
    for key in ("links", "bandwidth_bytes_per_s", "gpu"):
        assert before[key] == after[key]
    assert [gpu["nic"] for gpu in before["gpus"]] == [gpu["nic"] for gpu in after["gpus"]]
    assert after["findings"] == []


@pytest.mark.parametrize(
    ("behind", "wanted"),
    [
        ("\t0-55\t0\t \tN/A", 0),
        ("\t0-55\t0\t\tN/A", 0),
        ("\t\t1\t\tN/A", 1),
        ("\t0-55\t3", 3),
        ("\t0-55\t0-1", None),
        ("\t0-55\tN/A", None),
        ("", None),
    ],
)
def test_the_affinity_is_counted_from_the_right(behind: str, wanted: int | None) -> None:
    heads = "GPU0\tCPU Affinity\tNUMA Affinity" + ("\tGPU NUMA ID" if behind.count("\t") > 2 else "")
    document = report(f"\t{heads}\nGPU0\t X {behind}\n".encode())
    assert document["sockets"][0]["numa"] == wanted


def test_nics_may_be_called_by_their_own_names(tmp_path: Path) -> None:
    text = re.sub("NIC(\\d)", r"mlx5_\1", DGX1)
    assert [nic["device"] for nic in report(text.encode())["nics"]] == [f"mlx5_{n}" for n in range(4)]
    assert cluster_of(written(tmp_path, text)).spec.nic is not None


def test_gpus_of_one_memory_share_a_socket_where_their_cells_are_nvlinks() -> None:
    cells = [["X" if a == b else "NV18" for b in range(8)] for a in range(8)]
    near = report(table(cells, behind="\t0-7\t0").encode())
    assert {gpu["socket"] for gpu in near["gpus"]} == {"socket0"}
    lines = table(cells, behind="\t0-7\t0").split("\n")
    lines[5:9] = [line[:-1] + "1" for line in lines[5:9]]
    far = report("\n".join(lines).encode())
    assert [gpu["socket"] for gpu in far["gpus"]] == ["socket0"] * 4 + ["socket1"] * 4


def swapped(text: str, row: str, column: int, cell: str) -> str:
    """The table with another cell."""
    lines = text.split("\n")
    number = next(n for n, line in enumerate(lines) if line.startswith(f"{row}\t"))
    words = lines[number].split("\t")
    words[column + 1] = cell
    lines[number] = "\t".join(words)
    return "\n".join(lines)


def row_of(text: str, name: str) -> str:
    return next(line for line in text.split("\n") if line.startswith(f"{name}\t")) + "\n"


def without_links(text: str, gpu: int) -> str:
    """The table with SYS in place of all NVLinks of one GPU."""
    for other in set(range(8)) - {gpu}:
        text = swapped(swapped(text, f"GPU{gpu}", other, "SYS"), f"GPU{other}", gpu, "SYS")
    return text


ODD = {
    "a GPU without NVLink": (without_links(H100, 3), "error", "gpu3: has no NVLink, but 7 of its 7 peers"),
    "a link with one end": (swapped(DGX1, "GPU0", 1, "SYS"), "error", "GPU0 and GPU1: SYS in one direction and NV1"),
    "a link of two counts": (swapped(DGX1, "GPU0", 3, "NV1"), "error", "GPU0 and GPU3: NV1 in one direction and NV2"),
    "a distance of two minds": (swapped(BOX, "GPU0", 1, "SYS"), "error", "GPU0 and GPU1: SYS in one .* and PIX"),
    "a row twice": (
        H100.replace("\nGPU3\t", "\n" + row_of(H100, "GPU2") + "GPU3\t"), "error", "GPU2: has two rows.*equal",
    ),
    "two rows that differ": (
        H100.replace("\nGPU3\t", "\n" + row_of(H100, "GPU2").replace("NV18", "NV17") + "GPU3\t"), "error",
        "GPU2: has two rows, in lines 12 and 13, and they differ",
    ),
    "GPUs of two kinds": (H100.replace("H100 80GB HBM3", "H200", 1), "error", "GPUs of 2 kinds"),
    "distances of no tree": (
        swapped(swapped(BOX, "GPU0", 2, "SYS"), "GPU2", 0, "SYS"), "warning",
        "GPU0 and GPU2: SYS in the table, but NODE",
    ),
    "a NIC across the sockets": (BOX, "warning", "is on another socket than all 4 GPUs"),
    "a GPU behind the processor": (BOX, "warning", "the way is SYS"),
    "GPUs that share a NIC": (DGX1, "note", "is the NIC of 2 GPUs"),
    "no NIC": (meshed(8, 18), "note", "there is no NIC"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_the_doctor_sees(name: str) -> None:
    text, severity, words = ODD[name]
    found = [each for each in findings(text) if re.search(words, f"{each['where']}: {each['what']}")]
    assert found, findings(text)
    assert found[0]["severity"] == severity


@pytest.mark.parametrize("name", ODD)
def test_an_error_of_the_doctor_is_refused_and_anything_else_is_imported(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, ODD[name][0])
    errors = [each for each in findings(ODD[name][0]) if each["severity"] == "error"]
    if not errors:
        assert cluster_of(path).num_gpus
        return
    with pytest.raises(CatalogueError) as caught:
        cluster_of(path)
    assert any(each["what"] in str(caught.value) for each in errors)


BROKEN: dict[str, tuple[str | bytes, str]] = {
    "nothing": ("", "is empty"),
    "binary": (bytes(range(1, 256)), "not UTF-8"),
    "zero bytes": (b"\0" * 100, "zero bytes"),
    "what a PowerShell writes": (H100.encode("utf-16"), "byte order mark"),
    "another program's table": ("Mem: 1 2 3\nSwap: 0 0 0\n", "no table: no line starts with GPU0"),
    "no header": (H100[H100.index("\nGPU0") :], "no table"),
    "a row without its column": (H100.replace("NIC7", "NIC9", 1), "NIC7: has a row and no column"),
    "a column without its row": (H100.replace(row_of(H100, "GPU5"), ""), "GPU5: has a column and no row"),
    "a cut table": (H100[: H100.index("\nGPU4")], "GPU4: has a column and no row"),
    "a cut row": (H100[: H100.index("GPU4\tNV18") + 20], "GPU4: found 3 cells for 16 columns"),
    "a cell fewer": (H100.replace("GPU2\tNV18\t", "GPU2\t", 1), "GPU2: found 15 cells for 16 columns"),
    "a cell more": (H100.replace("GPU0\t X \t", "GPU0\t X \tNV18\t", 1), "GPU0: found 17 cells for 16 columns"),
    "an unknown symbol": (swapped(H100, "GPU2", 5, "WARP"), "GPU2: found 'WARP', allowed are X, NV1 to NV99"),
    "no links": (swapped(H100, "GPU2", 5, "NV0"), "GPU2: found NV0 under GPU5"),
    "links to a NIC": (swapped(H100, "GPU2", 9, "NV2"), "GPU2: found NV2 under NIC1, NVLinks join two GPUs"),
    "NaN links": (swapped(H100, "GPU2", 5, "NVnan"), "found 'NVnan'"),
    "negative links": (swapped(H100, "GPU2", 5, "NV-2"), "found 'NV-2'"),
    "a bad diagonal": (swapped(H100, "GPU2", 2, "NV18"), "GPU2: found NV18 under GPU2, X stands for itself"),
    "X elsewhere": (swapped(H100, "GPU2", 4, "X"), "GPU2: found X under GPU4, X stands for itself"),
    "a column twice": ("\tGPU0\tGPU0\nGPU0\tX\tX\n", "GPU0: has two columns"),
    "a name that is none": ("\tGPU0\t<b>\nGPU0\tX\tSYS\n", "is not the name of a device"),
    "too many columns": ("\t" + "\t".join(f"GPU{n}" for n in range(2000)) + "\n", "is beyond 1152 columns"),
    "too many lines": ("\n" * 20_000 + H100, "more than 10000 lines"),
    "a huge cell": (swapped(H100, "GPU2", 5, "Q" * 100_000), r"GPU2: found 'QQQ.*\.\.\."),
    "an XML file": ("<system/>", "no table"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, name: str) -> None:
    data, words = BROKEN[name]
    path = tmp_path / "topo.txt"
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    with pytest.raises(CatalogueError, match=words) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


NASTY = ["", "X", "NV0", "NV1", "NV18", "NV99", "PIX", "SYS", "NaN", "-1", "GPU0", "N/A"]


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """A good table after a few random changes of characters, words and lines."""
    text = (DATA / draw(st.sampled_from(GOOD))).read_text(encoding="utf-8")
    for _ in range(draw(st.integers(1, 4))):
        lines = text.split("\n")
        here, there = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
        match draw(st.sampled_from(["drop", "double", "swap", "word", "word", "word", "insert", "join"])):
            case "drop":
                del lines[here]
            case "double":
                lines.insert(there, lines[here])
            case "swap":
                lines[here], lines[there] = lines[there], lines[here]
            case "word":
                words = lines[here].split("\t")
                nasty = st.sampled_from(
                    ["", "X", "NV0", "NV1", "NV18", "NV99", "PIX", "SYS", "NaN", "-1", "GPU0", "N/A"]
                )
                words[draw(st.integers(0, len(words) - 1))] = draw(nasty)
                lines[here] = "\t".join(words)
            case "join":
                lines[here] = lines[here].replace("\t", "", draw(st.integers(1, 9)))
            case _:
                where = draw(st.integers(0, len(lines[here])))
                lines[here] = lines[here][:where] + draw(st.text(max_size=4)) + lines[here][where:]
        text = "\n".join(lines)
    return text


@given(text=mutated())
@settings(max_examples=200, deadline=None)
def test_a_table_with_any_change_is_a_cluster_or_a_sentence(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "topo.txt"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    try:
        cluster = cluster_of(path)
    except CatalogueError as error:
        message = str(error)
    else:
        message = ""
        assert cluster.num_gpus == len(report(path)["gpus"])
    assert message.count("\n") <= 2


def test_the_doctor_reads_either_format() -> None:
    result = CliRunner().invoke(app, ["network", "doctor", str(DATA / "dgx-h100.txt"), "--json"])
    document = json.loads(result.stdout)
    assert (result.exit_code, document["format"], document["findings"]) == (0, "nvidia-smi topo -m", [])
    assert document["links"][0][1] == "NV18"
    assert document["bandwidth_bytes_per_s"][0][1] == pytest.approx(370.8e9)
    printed = CliRunner().invoke(app, ["network", "doctor", str(DATA / "pcie-two-sockets.txt"), "--strict"])
    assert (printed.exit_code, "What looks wrong: 5 warnings, 1 note" in printed.stdout) == (1, True)
