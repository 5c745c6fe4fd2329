"""The records of a file, predicted and scored; start reading at `assess`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from moeplan.accuracy.fits import Constants, fit
from moeplan.accuracy.intervals import Residual, around, shipped_spread, spread_of
from moeplan.accuracy.judged import Judged, judged_of
from moeplan.accuracy.prediction import Refusal, Tier
from moeplan.accuracy.records import KINDS, Record, published, read
from moeplan.accuracy.scores import Ranking, Row, Summary, rankings, summaries
from moeplan.errors import MoeplanError, unknown_name

Progress = Callable[[str, float, float | None], None]
"""Is told a message, how much is done, and of how much in all."""
GROUP = ("hardware.gpu", "model.key")
"""Rows that are equal in these are one group, which is predicted without itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Excluded:
    """A record that is not predicted, and why."""

    id: str
    kind: str
    completeness: str
    scorable: bool
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Assessment:
    """Every record, predicted or with the reason why not."""

    rows: tuple[Row, ...]
    excluded: tuple[Excluded, ...]
    num_constants: int
    """Fitted to whole steps."""
    left_out: str
    """Without what each row is predicted."""

    @property
    def summary(self) -> dict[str, dict[str, Summary]]:
        """By kind and completeness, of the rows that count."""
        found: dict[str, dict[str, Summary]] = {}
        for (kind, completeness), each in summaries(self.rows, lambda row: (row.kind, row.completeness)).items():
            found.setdefault(kind, {})[completeness] = each
        return found

    def by(self, tag: str) -> dict[tuple[str, str], Summary]:
        """By kind and one of the tags source, gpu, model, precision."""
        return summaries(self.rows, lambda row: (row.kind, row.tags[tag]))

    @property
    def rankings(self) -> list[Ranking]:
        """Of layouts of one model, GPU and scale."""
        return rankings(self.rows)

    @property
    def lacks_scorable(self) -> bool:
        """Whether a record that should count, with everything known, is not predicted."""
        return any(each.scorable and each.completeness == "A" for each in self.excluded)

    def document(self) -> dict[str, Any]:
        """As JSON takes it."""
        from moeplan import __version__

        return {
            "schema": "moeplan.accuracy/v1", "moeplan_version": __version__, "num_constants": self.num_constants,
            "left_out": self.left_out, "rows": [row.record() for row in self.rows],
            "summary": {
                kind: {name: asdict(each) for name, each in inner.items()} for kind, inner in self.summary.items()
            },
            "rankings": [asdict(each) for each in self.rankings],
            "excluded": [asdict(each) for each in self.excluded],
        }  # fmt: skip


def assess(
    results: str | PathLike[str] | None = None,
    *,
    kinds: Sequence[str] | None = None,
    group_out: str | None = None,
    progress: Progress | None = None,
) -> Assessment:
    """The published results, each predicted without its group, or the records of a file of one's own.

    `group_out`: a field of the records, such as "hardware.gpu"; a row is predicted by constants fitted without the rows
    that are equal in it. Without it published rows are without their GPU and model, and one's own, which never enter a
    fit, by the constants that come with the package. Raises MoeplanError for a file that cannot be read.
    """
    for kind in kinds or ():
        if kind not in KINDS:
            raise MoeplanError(f"--kind: {unknown_name('kind', kind, KINDS)}")
    wanted = set(kinds or KINDS)
    records = [each for each in read(published() if results is None else Path(results)) if _is_wanted(each, wanted)]
    fields = (group_out,) if group_out else GROUP
    judged, excluded = _judged(records, fields, progress)
    if results is None or group_out:
        known = judged if results is None else _judged(_fitted(read(published())), fields, progress)[0]
        return _refitted(judged, known, excluded, fields, given=results is not None)
    return _as_shipped(judged, excluded)


def _is_wanted(record: Record, kinds: set[str]) -> bool:
    return record.get("kind") in kinds or record.get("kind") not in KINDS


def _fitted(records: Sequence[Record]) -> list[Record]:
    return [
        each for each in records if each["kind"] == "training_e2e" and each["scorable"] and each["completeness"] == "A"
    ]


def _judged(
    records: Sequence[Record], fields: Sequence[str], progress: Progress | None
) -> tuple[list[Judged], list[Excluded]]:
    found, lost, ids = list[Judged](), list[Excluded](), set[str]()
    for number, record in enumerate(records):
        if progress is not None:
            progress(f"predicting {record['id']}", number, len(records))
        answer = judged_of(record, group=tuple(str(_field(record, field)) for field in fields))
        if isinstance(answer, Judged) and record["id"] in ids:
            answer = Refusal(f"id: {record['id']!r} stands twice; give each record a name of its own")
        if isinstance(answer, Refusal):
            kind, completeness = str(record.get("kind")), str(record["completeness"])
            lost.append(
                Excluded(
                    id=record["id"],
                    kind=kind,
                    completeness=completeness,
                    scorable=record["scorable"],
                    reason=answer.reason,
                )
            )
        else:
            found.append(answer)
        ids.add(record["id"])
    return found, lost


def _field(record: Record, path: str) -> object:
    """The value at `hardware.gpu`. Raises MoeplanError for a path that no record can have."""
    found: Any = record
    for step in path.split("."):
        if not isinstance(found, Mapping):
            return None
        found = found.get(step)
    return found


# ---- predictions


def _refitted(
    judged: Sequence[Judged],
    known: Sequence[Judged],
    excluded: Sequence[Excluded],
    fields: Sequence[str],
    *,
    given: bool,
) -> Assessment:
    """Each group by constants fitted to the others."""
    seen = [each.trained for each in known if each.trained is not None and _enters(each)]
    whole = fit([each.observation for each in seen]) if seen else None
    constants: dict[tuple[str, ...], Constants | None] = {}
    residuals, tiers = list[Residual](), list[Tier]()
    values = list[dict[str, float]]()
    for each in judged:
        others = [other for other in seen if other.observation.group != each.group]
        if each.group not in constants:
            constants[each.group] = fit([other.observation for other in others]) if others else None
        tiers.append(each.tier(others))
        values.append(each.values(constants[each.group]))
        residuals += [_residual(each, tiers[-1], values[-1], name) for name in each.measured]
    rows = []
    for each, tier, value in zip(judged, tiers, values, strict=True):
        for name in each.measured:
            spread = spread_of(_residual(each, tier, value, name), residuals)
            rows.append(_row(each, tier, value, name, around(value[name], spread)))
    number = len(whole.values) if whole is not None else 0
    return Assessment(
        rows=tuple(rows), excluded=tuple(excluded), num_constants=number, left_out="rows of its " + " and ".join(fields)
    )


def _enters(each: Judged) -> bool:
    record = each.record
    return bool(record["scorable"] and record["completeness"] == "A" and record["weight"] > 0)


def _as_shipped(judged: Sequence[Judged], excluded: Sequence[Excluded]) -> Assessment:
    from moeplan.accuracy.intervals import shipped

    rows = []
    for each in judged:
        value, tier = each.values(None), each.tier(None)
        for name in each.measured:
            spread = shipped_spread(each.kind, tier, is_guessed=bool(each.guessed))
            rows.append(_row(each, tier, value, name, around(value[name], spread)))
    return Assessment(
        rows=tuple(rows), excluded=tuple(excluded), num_constants=int(shipped()["num_constants"]),
        left_out="entering a fit",
    )  # fmt: skip


def _residual(each: Judged, tier: Tier, value: Mapping[str, float], name: str) -> Residual:
    counts = each.record["weight"] if each.record["scorable"] else 0.0
    return Residual(
        kind=each.kind, tier=tier, is_guessed=bool(each.guessed), group=each.group,
        log_ratio=math.log(each.measured[name] / value[name]), weight=counts / len(each.measured),
    )  # fmt: skip


def _row(each: Judged, tier: Tier, value: Mapping[str, float], name: str, interval: tuple[float, float]) -> Row:
    record = each.record
    return Row(
        id=record["id"], kind=each.kind, completeness=record["completeness"], quantity=name, predicted=value[name],
        measured=each.measured[name], interval=interval, tier=tier, weight=record["weight"] / len(each.measured),
        scorable=record["scorable"], tags=each.tags, guessed=each.guessed,
    )  # fmt: skip
