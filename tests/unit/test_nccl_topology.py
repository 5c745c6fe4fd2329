"""NCCL's topology XML: good machines become clusters, what looks wrong is said, what is wrong is one sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from moeplan.catalogue.citations import citations
from moeplan.catalogue.figures import cluster_spec
from moeplan.catalogue.resolve import entry
from moeplan.catalogue.sheet import Sheet, moved
from moeplan.cli import app
from moeplan.domain.cluster import Cluster, build_cluster
from moeplan.errors import CatalogueError
from moeplan.importers._node_report import report
from moeplan.importers.nccl_topology import read

DATA = Path(__file__).parents[1] / "data" / "node_topologies"
GOOD = sorted(path.name for path in DATA.glob("*.xml"))
NETWORKED = [name for name in GOOD if name != "one-gpu.xml"]
H100 = (DATA / "dgx-h100.xml").read_text(encoding="utf-8")
DGX1 = (DATA / "dgx-1-v100.xml").read_text(encoding="utf-8")
TRAYS = (DATA / "gb300-two-trays.xml").read_text(encoding="utf-8")
GB = 1e9
Mutation = Callable[[str], str]


def sheet_of(path: Path) -> Sheet:
    """A topology file as the catalogue reads it."""
    return entry(str(path), "topologies")


def cluster_of(path: Path, nodes: int = 1) -> Cluster:
    """The cluster of so many machines that a topology file describes."""
    sheet = sheet_of(path)
    whole = Sheet(data={"cluster": {k: v for k, v in sheet.data.items() if k not in ("about", "sources")}}, spots={})
    spec = cluster_spec(Sheet(data=whole.data, spots=moved(sheet.spots, ("cluster",)) | {(): sheet.spots[()]}))
    return build_cluster(spec.model_copy(update={"nodes": nodes}))


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "topo.xml"
    path.write_text(text, encoding="utf-8")
    return path


def replaced(old: str, new: str, count: int = 1) -> Mutation:
    """The first `count` of `old` as `new`; all of them with -1."""

    def mutate(text: str) -> str:
        assert old in text
        return text.replace(old, new, count)

    return mutate


def without(pattern: str, count: int = 1) -> Mutation:
    """Without the first `count` matches of a pattern."""

    def mutate(text: str) -> str:
        assert re.search(pattern, text, re.DOTALL)
        return re.sub(pattern, "", text, count=count, flags=re.DOTALL)

    return mutate


def findings(text: str) -> list[Mapping[str, Any]]:
    found: list[Mapping[str, Any]] = report(text.encode())["findings"]
    return found


@pytest.mark.parametrize(("name", "nodes"), [*((name, 1) for name in GOOD), *((name, 2) for name in NETWORKED)])
def test_every_pair_of_gpus_of_a_good_file_has_a_path_that_starts_and_ends_right(name: str, nodes: int) -> None:
    cluster = cluster_of(DATA / name, nodes)
    for a in range(cluster.num_gpus):
        for b in range(cluster.num_gpus):
            path = cluster.path(a, b)
            assert bool(path) == (a != b)
            if path:
                assert cluster.link_ends(path[0])[0] == cluster.gpu_name(a)
                assert cluster.link_ends(path[-1])[1] == cluster.gpu_name(b)


@pytest.mark.parametrize("name", GOOD)
def test_the_doctor_and_the_cluster_agree_on_nics_and_bandwidths(name: str) -> None:
    cluster, document = cluster_of(DATA / name), report(DATA / name)
    assert cluster.wiring is not None
    assert [f"nic{nic}" for nic in cluster.wiring.nic_G] == [gpu["nic"] for gpu in document["gpus"] if gpu["nic"]]
    for a, row in enumerate(document["bandwidth_bytes_per_s"]):
        for b, told in enumerate(row):
            if a != b:
                is_switched = "nvswitch" in " ".join(map(cluster.link_name, cluster.path(a, b)))
                wanted = told * 0.85 if is_switched else told
                assert cluster.path_bandwidth_bytes_per_s([a], [b])[0] == pytest.approx(wanted)


def test_a_dgx_h100_is_the_catalogues_hgx_h100_rail_but_for_nccls_rates() -> None:
    ours = cluster_of(DATA / "dgx-h100.xml", 2)
    theirs = cluster_of(Path(__file__).parents[2] / "topologies" / "hgx-h100-rail.yaml", 2)
    assert ours.spec.gpu == theirs.spec.gpu
    assert ours.wiring is not None
    assert theirs.wiring is not None
    assert ours.wiring.nic_G.tolist() == theirs.wiring.nic_G.tolist()
    for b in range(1, 8):
        names = [[cluster.link_ends(link) for link in cluster.path(0, b)] for cluster in (ours, theirs)]
        assert names[0] == names[1] == [("n0.gpu0", "n0.nvswitch"), ("n0.nvswitch", f"n0.gpu{b}")]
    sources, targets = np.zeros(15, dtype=np.int32), np.arange(1, 16, dtype=np.int32)
    rails = targets[[*range(7), 7]]  # the other GPUs of the machine, and the own rail of the next
    same = np.zeros(len(rails), dtype=np.int32)
    assert ours.path_latency_s(same, rails) == pytest.approx(theirs.path_latency_s(same, rails))
    assert ours.path_overhead_s(sources, targets) == pytest.approx(theirs.path_overhead_s(sources, targets))
    ratio = ours.path_bandwidth_bytes_per_s([0], [1]) / theirs.path_bandwidth_bytes_per_s([0], [1])
    assert 0.95 < ratio[0] < 1.05


def test_what_is_assumed_is_what_the_catalogue_assumes_for_an_h100() -> None:
    ours = sheet_of(DATA / "dgx-h100.xml").data
    theirs = entry("hgx-h100-rail", "topologies").data
    for key in ("latency", "efficiency", "message_overhead"):
        assert ours["nic"][key]["value"] == theirs["nic"][key]["value"]
    assert ours["fabric"]["latency"]["value"] == theirs["fabric"]["latency"]["value"]
    assert ours["links"]["nvlink"]["latency"]["value"] == theirs["links"]["nvlink"]["latency"]["value"]


@pytest.mark.parametrize(
    ("name", "link", "bytes_per_s"),
    [
        ("dgx-h100.xml", "nvlink", 20.6 * GB),
        ("dgx-h100.xml", "pcie_gen5_x16", 16 * 240 / 80 * GB),
        ("dgx-h100.xml", "socket_link", 22 * GB),
        ("dgx-a100.xml", "nvlink", 20 * GB),
        ("dgx-a100.xml", "pcie_gen4_x16", 16 * 120 / 80 * GB),
        ("dgx-a100.xml", "socket_link", 16 * GB),
        ("dgx-1-v100.xml", "nvlink_direct", 20 * GB),
        ("dgx-1-v100.xml", "pcie_gen3_x16", 16 * 60 / 80 * GB),
        ("dgx-1-v100.xml", "socket_link", 6 * GB),
        ("pcie-two-sockets.xml", "socket_link", 10 * GB),
        ("gb200-tray.xml", "nvlink", 40.1 * GB),
        ("gb200-tray.xml", "c2c", 5 * 44.712 * GB),
        ("gb200-tray.xml", "socket_link", 6 * GB),
    ],
)
def test_a_wire_carries_what_nccl_counts(name: str, link: str, bytes_per_s: float) -> None:
    assert cluster_of(DATA / name).spec.links[link].bandwidth_bytes_per_s == pytest.approx(bytes_per_s)


@pytest.mark.parametrize(
    ("name", "gpus", "nics", "sheet"),
    [
        ("dgx-h100.xml", 8, 8, "h100-sxm"),
        ("dgx-a100.xml", 8, 8, "a100-80gb-sxm"),
        ("dgx-1-v100.xml", 8, 4, "v100-sxm2-16gb"),
        ("pcie-two-sockets.xml", 4, 1, "v100-pcie"),
        ("gb200-tray.xml", 4, 4, "gb200"),
        ("gb300-two-trays.xml", 8, 8, "gb300"),
        ("one-gpu.xml", 1, 0, "rtx-4090"),
    ],
)
def test_devices_are_counted_and_the_gpu_is_known_by_its_pci_device(
    name: str, gpus: int, nics: int, sheet: str
) -> None:
    spec = cluster_of(DATA / name).spec
    assert (spec.gpus_per_node, spec.nic.per_node if spec.nic else 0, spec.gpu.name) == (gpus, nics, sheet)


def test_the_hybrid_cube_has_its_double_and_single_links() -> None:
    cluster = cluster_of(DATA / "dgx-1-v100.xml")
    rates = [cluster.path_bandwidth_bytes_per_s([0], [b])[0] / GB for b in range(1, 8)]
    assert rates == pytest.approx([20, 20, 40, 40, 6, 6, 6])


def test_every_figure_is_of_the_file_of_nccl_or_assumed() -> None:
    rows = citations(sheet_of(DATA / "dgx-h100.xml").data)
    ours = [row for row in rows if not row.figure.startswith("gpu.")]
    assert {row.kind for row in ours} == {"published", "assumed"}
    assert {row.figure for row in ours if row.cite == "dgx-h100.xml, written by NCCL"} == {
        "gpus_per_node", "nic.per_node", "nic.bandwidth",
    }  # fmt: skip
    told = " ".join(read(DATA / "dgx-h100.xml").assumptions)
    assert all(row.figure in told for row in ours if row.kind == "assumed")
    assert "single switch" in told


def test_the_same_file_gives_an_equal_topology_and_the_same_bytes() -> None:
    first, second = read(DATA / "dgx-1-v100.xml"), read((DATA / "dgx-1-v100.xml").read_bytes())
    assert first.topology["wiring"] == second.topology["wiring"]
    again = read(DATA / "dgx-1-v100.xml")
    assert json.dumps(first.topology) == json.dumps(again.topology)
    assert first == again


def test_the_order_of_the_tree_does_not_number_the_gpus(tmp_path: Path) -> None:
    blocks = re.findall(r"  <cpu.*?</cpu>\n", H100, re.DOTALL)
    turned = '<system version="1">\n' + blocks[1] + blocks[0] + "</system>\n"
    cluster = cluster_of(written(tmp_path, turned))
    assert cluster.wiring is not None
    assert cluster.wiring.nic_G.tolist() == list(range(8))


def test_a_slower_nic_is_held_up_by_its_own_wire(tmp_path: Path) -> None:
    text = replaced('speed="400000"', 'speed="200000"')(H100)
    cluster = cluster_of(written(tmp_path, text), 2)
    assert cluster.spec.nic is not None
    assert cluster.spec.nic.bandwidth_bytes_per_s == 50e9
    assert cluster.path_bandwidth_bytes_per_s([0, 1], [8, 9]) == pytest.approx([25e9, 48e9])


def test_two_ports_of_a_card_share_its_slot(tmp_path: Path) -> None:
    text = H100.replace("</nic>", '<net name="second" dev="20" speed="400000" gdr="1"/></nic>', 1)
    cluster = cluster_of(written(tmp_path, text), 2)
    assert {end for ends in map(cluster.link_ends, range(cluster.num_links)) for end in ends} >= {"n0.card0", "n0.nic8"}
    assert cluster.spec.nic is not None
    assert cluster.spec.nic.per_node == 9


def test_a_port_that_is_no_pci_device_hangs_on_its_socket(tmp_path: Path) -> None:
    text = without("<pci busid=.0000:af.*?</pci>")((DATA / "pcie-two-sockets.xml").read_text(encoding="utf-8"))
    text = text.replace("</cpu>", '<nic><net name="eth0" dev="0" speed="0"/></nic></cpu>', 1)
    cluster = cluster_of(written(tmp_path, text), 2)
    assert cluster.spec.nic is not None
    assert cluster.spec.nic.bandwidth_bytes_per_s == pytest.approx(10e9 / 8)
    assert cluster.path_bandwidth_bytes_per_s([0], [4]) == pytest.approx([10e9 / 8 * 0.96])


def test_a_power9_gpu_is_wired_to_its_processor(tmp_path: Path) -> None:
    text = DGX1.replace('arch="x86_64"', 'arch="ppc64"')
    text = re.sub(
        r'<nvlink target="0000:8[56].*?/>', '<nvlink target="0004:04:00.0" count="2" tclass="0x068001"/>', text
    )
    text = without("<nvlink target=.0000:8[9a].*?/>", 0)(text)
    text = re.sub(r'(?s)<pci busid="0000:83.*(?=</cpu>)', "", text)
    cluster = cluster_of(written(tmp_path, text))
    assert cluster.spec.links["c2c"].bandwidth_bytes_per_s == pytest.approx(40e9)


def test_a_job_that_did_not_see_all_gpus_can_be_imported(tmp_path: Path) -> None:
    half = re.sub(r"(?s)  <cpu numaid=.1.*</cpu>\n", "", DGX1)
    assert cluster_of(written(tmp_path, half)).num_gpus == 4
    assert {each["severity"] for each in findings(half)} == {"note"}


@pytest.mark.parametrize("written_so", ["0000:1B:00.0", "00000000:1b:00.0"])
def test_a_bus_id_may_be_written_as_other_programs_do(tmp_path: Path, written_so: str) -> None:
    text = DGX1.replace('target="0000:06:00.0"', f'target="{written_so}"').replace(
        '<pci busid="0000:06:00.0"', f'<pci busid="{written_so}"'
    )
    assert cluster_of(written(tmp_path, text)).num_gpus == 8


def test_unknown_elements_and_attributes_are_left_out_as_nccl_does(tmp_path: Path) -> None:
    text = H100.replace("<nic>", '<nic future="1"><telemetry rate="9"/>', 1)
    assert cluster_of(written(tmp_path, text)).num_gpus == 8
    assert [each["severity"] for each in findings(text)] == ["note"]


def test_a_gpu_on_no_sheet_has_to_be_named(tmp_path: Path) -> None:
    text = H100.replace('"0x2330"', '"0x2329"')
    with pytest.raises(CatalogueError, match=r"PCI device is 0x2329.*set cluster.gpu=h100-sxm") as caught:
        cluster_of(written(tmp_path, text))
    assert "\n" not in str(caught.value)
    scenario = tmp_path / "other.yaml"
    scenario.write_text("about: the GPU is named\nextends: ./topo.xml\ngpu: h200-sxm\n", encoding="utf-8")
    assert cluster_of(scenario).spec.gpu.name == "h200-sxm"


def test_without_a_pci_device_the_gpu_is_a_guess_and_said_to_be(tmp_path: Path) -> None:
    text = without(' device="0x2330"', 0)(H100)
    imported = read(written(tmp_path, text))
    assert imported.topology["gpu"] == "h100-sxm"
    assert any("a guess" in sentence for sentence in imported.assumptions)


def test_a_good_machine_has_no_findings() -> None:
    assert [findings((DATA / name).read_text()) for name in ("dgx-h100.xml", "dgx-a100.xml", "gb200-tray.xml")] == [
        [], [], [],
    ]  # fmt: skip


GPU3 = "0000:61:00.0"
NVLINKS_OF_GPU3 = r'(?<=<gpu dev="3" sm="90" rank="3" gdr="1">).*?(?=\s*</gpu>)'
ODD: dict[str, tuple[str, Mutation, str, str]] = {
    "a missing NVLink row": (H100, without(NVLINKS_OF_GPU3), "error", r"gpu3 \(0000:61:00.0\): has no NVLink, but 7"),
    "a missing row in a fused dump": (
        TRAYS, without(r'<nvlink[^>]*>\s*(?=<c2c[^>]*>\s*</gpu>\s*</pci>\s*<pci busid="0002)'), "error",
        "gpu1 .*has no NVLink, but 7 of its 7 peers have up to 18",
    ),
    "a switch fewer": (H100, without("<nvlink[^>]*>"), "warning", "has 14 NVLinks, its peers have up to 18"),
    "a link with one end": (
        DGX1, without('<nvlink target="0000:07[^>]*>'), "error", "gpu1 .*1 NVLinks to gpu0, which has 0",
    ),
    "a link of two counts": (DGX1, replaced('count="2"', 'count="1"'), "error", "has 2 NVLinks to gpu0, which has 1"),
    "a link to itself": (DGX1, replaced('target="0000:07', 'target="0000:06'), "error", "NVLink to itself"),
    "other switches": (
        H100, replaced('"0000:05:00.0"', '"fffffff:ffff:ff"'), "warning", "names 4 NVSwitches, most of its peers",
    ),
    "two rows with one target": (
        H100, replaced('target="0000:06:00.0"', 'target="0000:05:00.0"'), "error", "two nvlink rows with the target",
    ),
    "a narrow slot": (
        H100, replaced('subsystem_device="0x16c1" link_speed="32.0 GT/s PCIe" link_width="16"',
                       'subsystem_device="0x16c1" link_speed="32.0 GT/s PCIe" link_width="8"'),
        "warning", r"gpu0.*its PCIe link is 32 GT/s x8, that of 0000:43:00.0 is 32 GT/s x16",
    ),
    "a slow slot": (
        H100, replaced('subsystem_device="0x16c1" link_speed="32.0', 'subsystem_device="0x16c1" link_speed="16.0'),
        "warning", "gpu0.*16 GT/s x16",
    ),
    "a slow switch": (H100, replaced('link_speed="32.0', 'link_speed="16.0'), "warning", "pci 0000:18:00.0.*16 GT/s"),
    "an unknown speed": (H100, replaced('"32.0 GT/s PCIe"', '"Unknown"'), "warning", "do not say"),
    "an empty speed": (H100, replaced('link_speed="32.0 GT/s PCIe"', 'link_speed=""'), "warning", "do not say"),
    "a width of 0": (H100, replaced('link_width="16"', 'link_width="0"'), "warning", "do not say how fast"),
    "a width that Linux does not know": (H100, replaced('"16"', '"255"'), "warning", "do not say how fast"),
    "a speed that NCCL cannot read": (H100, replaced("32.0 GT/s PCIe", "32.0 GT/s", -1), "note", "NCCL cannot read"),
    "a NIC faster than its slot": (H100, replaced('speed="400000"', 'speed="800000"'), "warning", "800 Gbit/s in all"),
    "a NIC without gdr": (H100, lambda text: re.sub('maxconn="131072" gdr="1"', 'gdr="0"', text, count=1),
                          "warning", r"nic0 \(mlx5_0\).*gdr=0"),
    "a GPU without gdr": (H100, replaced('rank="2" gdr="1"', 'rank="2" gdr="0"'), "warning", "gpu2.*gdr=0"),
    "a port without speed": (H100, replaced('speed="400000"', 'speed="0"'), "warning", "has no speed, or 0"),
    "a port with speed -1": (H100, replaced('speed="400000"', 'speed="-1"'), "warning", "has no speed, or 0"),
    "a slow port": (
        H100, replaced('speed="400000"', 'speed="200000"'), "warning", "200 Gbit/s, the same card elsewhere 400",
    ),
    "two ports of one number": (H100, replaced('dev="1" latency', 'dev="0" latency'), "error", "net dev=0: two ports"),
    "two GPUs of one number": (H100, replaced('gpu dev="3"', 'gpu dev="2"'), "error", "dev=2: two GPUs have it"),
    "two GPUs of one rank": (H100, replaced('rank="3"', 'rank="2"'), "error", "rank=2: two GPUs have it"),
    "a bus id twice": (H100, replaced(GPU3, "0000:52:00.0"), "error", "busid=0000:52:00.0: two devices"),
    "a block twice": (
        H100, lambda text: text.replace("</cpu>", re.findall(r"(?s)    <pci.*?\n    </pci>\n", text)[0] + "</cpu>", 1),
        "error", "two devices of a host have it",
    ),
    "a numaid twice": (H100, replaced('numaid="1"', 'numaid="0"'), "error", "two cpu elements of a host"),
    "two gpu elements in a slot": (
        H100, replaced("</gpu>", '</gpu><gpu dev="8" sm="90" rank="8" gdr="1"/>'), "error",
        "two gpu elements in one slot",
    ),
    "two hosts without a network": (
        H100, lambda text: text.replace("0x8a1c5b6cf1d3a1e7", "0x1", 1).replace("<nvlink", "<x"),
        "error", "2 hosts in one file, which no NVLink network joins",
    ),
    "two hosts on one NVLink network": (TRAYS, lambda text: text, "note", "2 hosts in one file, all on one NVLink"),
    "an unknown sm": (H100, replaced('sm="90"', 'sm="91"', -1), "warning", "sm=91 is no compute capability"),
    "GPUs of two kinds": (H100, replaced('device="0x2330"', 'device="0x2335"'), "error", "of another kind than most"),
    "no GPU": (H100, without("<gpu.*?</gpu>", 0), "error", "there is no GPU"),
    "a GPU without its element": (H100, without("<gpu.*?</gpu>"), "note", "is a GPU by its class"),
    "no NIC": (H100, without("<nic>.*?</nic>", 0), "note", "there is no NIC"),
    "no numaid": (H100, replaced('numaid="1"', 'numaid="-1"'), "note", "has no numaid"),
    "an unknown processor": (H100, replaced("GenuineIntel", "HygonGenuine"), "note", "NCCL does not know the"),
    "a NIC across the sockets": (
        (DATA / "pcie-two-sockets.xml").read_text(encoding="utf-8"), lambda text: text, "warning",
        "another socket than all 4 GPUs",
    ),
    "a GPU behind the processor": (
        (DATA / "pcie-two-sockets.xml").read_text(encoding="utf-8"), lambda text: text, "warning",
        "no switch joins it with its nearest NIC.*the way is SYS",
    ),
    "GPUs that share a NIC": (DGX1, lambda text: text, "note", "is the NIC of 2 GPUs: gpu0, gpu1"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_the_doctor_sees(name: str) -> None:
    text, mutate, severity, words = ODD[name]
    found = [each for each in findings(mutate(text)) if re.search(words, f"{each['where']}: {each['what']}")]
    assert found, findings(mutate(text))
    assert found[0]["severity"] == severity
    assert found[0]["why"]
    assert found[0]["remedy"]


@pytest.mark.parametrize("name", ODD)
def test_an_error_of_the_doctor_is_refused_and_anything_else_is_imported(tmp_path: Path, name: str) -> None:
    text, mutate, _, _ = ODD[name]
    path = written(tmp_path, mutate(text))
    errors = [each for each in findings(mutate(text)) if each["severity"] == "error"]
    if not errors:
        assert cluster_of(path).num_gpus
        return
    with pytest.raises(CatalogueError) as caught:
        cluster_of(path)
    assert re.match(rf"{re.escape(str(path))}(:\d+)?: ", str(caught.value))
    assert any(each["what"] in str(caught.value) and each["remedy"] in str(caught.value) for each in errors)


BROKEN: dict[str, tuple[str | bytes, str]] = {
    "nothing": ("", "is empty"),
    "blanks": ("  \n\n", "is empty"),
    "binary": (bytes(range(1, 256)) * 4, "not UTF-8"),
    "zero bytes": (H100.replace("sm=", "\0").encode(), "zero bytes"),
    "UTF-16": (H100.encode("utf-16"), "byte order mark"),
    "a byte order mark": (b"\xef\xbb\xbf" + H100.encode(), "byte order mark"),
    "a document type": ('<!DOCTYPE system SYSTEM "x.dtd">\n' + H100, "DOCTYPE.*not read; remove it"),
    "a billion laughs": (
        '<?xml version="1.0"?><!DOCTYPE s [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;">]><system version="1">&b;</system>',
        "DOCTYPE",
    ),
    "an entity of the outside": ('<!DOCTYPE s [<!ENTITY x SYSTEM "file:///x">]><system>&x;</system>', "DOCTYPE"),
    "an entity without a type": ('<system version="1">&laughs;</system>', "not XML: undefined entity"),
    "a cut file": (H100[: len(H100) // 2], "not XML"),
    "a tag left open": (H100.replace("</system>", ""), "not XML: no element found"),
    "tags that cross": (H100.replace("</gpu>", "</pci>", 1), "not XML: mismatched tag"),
    "two roots": (H100 + H100, "not XML: junk after document element"),
    "an attribute twice": (H100.replace('dev="0"', 'dev="0" dev="1"', 1), "duplicate attribute"),
    "text that is no XML": ("GPU0 GPU1\n", "not XML"),
    "another root": ('<graphs version="1"/>', "found <graphs>, allowed is <system>"),
    "a later version": (H100.replace('version="1"', 'version="2"', 1), "version: found 2, allowed is 1"),
    "10,000 levels": ('<system version="1">' + "<pci>" * 10_000 + "</pci>" * 10_000 + "</system>", "more than 32 deep"),
    "641 children": ('<system version="1">' + '<cpu numaid="0"/>' * 641 + "</system>", "more than 640 children"),
    "too many elements": (
        '<system version="1">' + ("<cpu>" + "<x/>" * 639 + "</cpu>") * 40 + "</system>", "more than 20000 elements",
    ),
    "a huge attribute": (H100.replace("0x10de", "1" * 100_000, 1), "a text of 100000 characters, allowed are 255"),
    "a huge name": (f'<system version="1"><{"a" * 300}/></system>', "a text of 300 characters"),
    "a width that is no number": (H100.replace('"16"', '"NaN"', 1), "<pci> link_width: found 'NaN'"),
    "a negative width": (H100.replace('link_width="16"', 'link_width="-16"', 1), "whole number from 0 to 255"),
    "an infinite speed": (H100.replace('speed="400000"', 'speed="inf"', 1), "<net> speed: found 'inf'"),
    "a speed with a unit": (H100.replace('speed="400000"', 'speed="400G"', 1), "<net> speed: found '400G'"),
    "a speed of nobody": (H100.replace('speed="400000"', 'speed="3"', 1), "found 3, allowed are Mbit/s from 10"),
    "a negative count": (H100.replace('count="5"', 'count="-5"', 1), "<nvlink> count: found '-5'.*from 1 to 72"),
    "a count of 0": (H100.replace('count="5"', 'count="0"', 1), "<nvlink> count: found '0'"),
    "a count of many digits": (H100.replace('count="5"', f'count="{"9" * 99}"', 1), "<nvlink> count: found"),
    "no count": (H100.replace(' count="5"', "", 1), "<nvlink> count: is missing"),
    "no target": (re.sub(' target="[^"]*"', "", H100, count=1), "<nvlink> target: is missing"),
    "no tclass": (re.sub(' tclass="[^"]*"', "", H100, count=1), "<nvlink> tclass: is missing"),
    "a target that is no bus id": (H100.replace("0000:05:00.0", "switch", 1), "<nvlink> target: found 'switch'"),
    "no bus id": (re.sub(' busid="[^"]*"', "", H100, count=1), "<pci> busid: is missing"),
    "a bus id that is none": (H100.replace("0000:18:00.0", "xyz", 1), "<pci> busid: found 'xyz', allowed is a bus id"),
    "no dev": (H100.replace('<gpu dev="0"', "<gpu", 1), "<gpu> dev: is missing"),
    "no sm": (H100.replace(' sm="90"', "", 1), "<gpu> sm: is missing"),
    "an sm that is a word": (H100.replace('sm="90"', 'sm="hopper"', 1), "<gpu> sm: found 'hopper'"),
    "gdr that is a word": (H100.replace('gdr="1"', 'gdr="yes"', 1), "gdr: found 'yes'"),
    "a numaid that is a word": (H100.replace('numaid="0"', 'numaid="left"', 1), "<cpu> numaid: found 'left'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path, name: str) -> None:
    data, words = BROKEN[name]
    path = tmp_path / "topo.xml"
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8"))
    with pytest.raises(CatalogueError, match=words) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < 400


def test_more_than_16_mib_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = written(tmp_path, "<system>" + " " * (16 * 2**20))
    with pytest.raises(CatalogueError, match="larger than 16777216 bytes"):
        read(path)


@pytest.mark.parametrize("path", ["nowhere.xml", "/dev/null", "/", "a\0b.xml"])
def test_what_is_no_file_is_refused(path: str) -> None:
    with pytest.raises(CatalogueError, match=r"cannot be read|is not a regular file"):
        read(path)


def test_an_encoding_that_lies_does_no_harm() -> None:
    for encoding in ("UTF-16", "utf-7", "no-such-thing"):
        try:
            imported = read(f'<?xml version="1.0" encoding="{encoding}"?>\n{H100}'.encode())
        except CatalogueError:
            continue
        assert imported.topology["gpu"] == "h100-sxm"


def test_what_would_move_a_cursor_does_not_come_through() -> None:
    text = H100.replace('name="mlx5_0"', 'name="mlx&#x85;5&#x202e;"', 1).replace(
        'maxconn="131072" gdr="1"', 'gdr="0"', 1
    )
    assert all(char.isprintable() for each in findings(text) for char in each["where"] + each["what"])


NASTY = ["", "0", "-1", "1", "16", "NaN", "1e999", "0x7fffffff", "9" * 40, "fffffff:ff:ff.0", "0000:1b:00.0", "\u202e"]


@st.composite
def mutated(draw: st.DrawFn, names: tuple[str, ...] = tuple(GOOD)) -> str:
    """A good file after a few random changes: of characters, lines and the values of attributes."""
    text = (DATA / draw(st.sampled_from(names))).read_text(encoding="utf-8")
    for _ in range(draw(st.integers(1, 4))):
        lines = text.split("\n")
        here = draw(st.integers(0, len(lines) - 1))
        there = draw(st.integers(0, len(lines) - 1))
        match draw(st.sampled_from(["drop", "double", "swap", "cut", "value", "value", "value", "insert"])):
            case "drop":
                del lines[here]
            case "double":
                lines.insert(there, lines[here])
            case "swap":
                lines[here], lines[there] = lines[there], lines[here]
            case "cut":
                lines[here] = lines[here][: draw(st.integers(0, 60))]
            case "value":
                nasty = f'"{draw(st.sampled_from(NASTY))}"'
                lines[here] = re.sub(r'"[^"]*"', nasty, lines[here], count=draw(st.integers(1, 9)))
            case _:
                where = draw(st.integers(0, len(lines[here])))
                lines[here] = lines[here][:where] + draw(st.text(max_size=4)) + lines[here][where:]
        text = "\n".join(lines)
    return text


@given(text=mutated())
@settings(max_examples=200, deadline=None)
def test_a_file_with_any_change_is_a_cluster_or_a_sentence(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "topo.xml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    document, cluster = outcome(report, path), outcome(cluster_of, path)
    if isinstance(document, CatalogueError):
        assert isinstance(cluster, CatalogueError)
        assert "\n" not in str(document)
    elif isinstance(cluster, CatalogueError):
        assert str(cluster).count("\n") <= 2
    else:
        assert cluster.num_gpus == len(document["gpus"])
        assert all(each["severity"] != "error" for each in document["findings"])


def outcome(verb: Callable[[Path], Any], path: Path) -> Any:
    """What a verb makes of a file, or the error that it raises on purpose."""
    try:
        return verb(path)
    except CatalogueError as error:
        return error


def run(*words: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, list(words))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize("name", GOOD)
def test_the_doctor_prints_every_good_file(name: str) -> None:
    status, out, err = run("network", "doctor", str(DATA / name))
    assert (status, err) == (0, "")
    assert "PCIe tree" in out
    assert ("Nothing looks wrong." in out) != ("What looks wrong" in out)


def test_the_doctor_has_a_document_for_other_programs() -> None:
    status, out, _ = run("network", "doctor", str(DATA / "dgx-h100.xml"), "--json")
    document = json.loads(out)
    assert (status, document["schema"], document["findings"]) == (0, "moeplan.network-doctor/v1", [])
    assert document["links"][0][1] == "NV18"
    assert document["bandwidth_bytes_per_s"][0][1] == pytest.approx(370.8e9)
    assert [gpu["nic"] for gpu in document["gpus"]] == [f"nic{n}" for n in range(8)]


def test_findings_end_in_status_1_only_when_strict(tmp_path: Path) -> None:
    odd = str(written(tmp_path, without("<nvlink[^>]*>")(H100)))
    assert [run("network", "doctor", odd)[0], run("network", "doctor", odd, "--strict")[0]] == [0, 1]
    assert run("network", "doctor", str(DATA / "dgx-h100.xml"), "--strict")[0] == 0
    assert "warning: gpu0 (0000:1b:00.0) (line 5): has 14 NVLinks" in run("network", "doctor", odd)[1]


def test_a_file_that_cannot_be_read_ends_in_status_2(tmp_path: Path) -> None:
    status, out, err = run("network", "doctor", str(written(tmp_path, "<system")))
    assert (status, out) == (2, "")
    assert err.startswith("moeplan: ")
    assert err.count("\n") == 1


def test_a_plan_for_machines_of_an_xml_file_comes_out(tmp_path: Path) -> None:
    path = written(tmp_path, H100)
    few = (
        "tp=1", "pp=1", "cp=1", "etp=1", "ep=8", "micro_batch=1", "recompute=none", "zero_dense=1", "zero_expert=1",
        "overlap_degree=1", "schedule=one_f_one_b", "arbitration=fair", "rank_order=tp-cp-ep-dp-pp",
        "all_to_all=linear",
    )  # fmt: skip
    choices = [word for choice in few for word in ("--set", f"choose.{choice}")]
    given_words = ["--model", "tiny-moe", "--cluster", str(path), "--nodes", "2", "--global-batch", "32", "--seq", "64"]
    status, out, err = run("plan", *given_words, *choices, "--set", "cluster.nic.bandwidth=25GB/s", "--json")
    assert status == 0, err
    result = json.loads(out)
    assert result["plan"]["ep"] == 8
    cluster = result["scenario"]["cluster"]
    assert (cluster["name"], cluster["nodes"]["value"], cluster["nic"]["bandwidth"]["value"]) == ("topo", 2, "25GB/s")


def test_a_scenario_may_name_an_xml_file_beside_it(tmp_path: Path) -> None:
    written(tmp_path, H100)
    scenario = tmp_path / "mine.yaml"
    scenario.write_text(
        "about: two machines of a file\nsources: {me: {cite: 'my own'}}\nmodel: tiny-moe\n"
        "cluster: {extends: topo.xml, nodes: {value: 2, source: me}}\n"
        "workload: {phase: train, global_batch: {value: 16, source: me}, sequence: {value: 64, source: me}}\n"
        "routing: {router: balanced}\n",
        encoding="utf-8",
    )
    status, out, err = run("sources", str(scenario), "--json")
    assert status == 0, err
    rows = {row["figure"]: row for row in json.loads(out)}
    assert rows["cluster.nic.bandwidth"]["cite"] == "topo.xml, written by NCCL"
    assert rows["cluster.nodes"]["cite"] == "my own"
