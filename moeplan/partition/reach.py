"""How many tokens have at least one choice in a block of experts: what a token costs that goes to a block once.

A router's counts say how often each expert is chosen, not which experts go together. Where tokens were recorded one by
one they are counted. Elsewhere each token is taken to draw its experts by the law with the most entropy among those
that choose each expert as often: P(set) in proportion to the product of its experts' weights, within `top_groups` of
the groups if the model limits them. Such a sum is a coefficient of a product of polynomials, a factor for each expert.

Axes: L layers, S sources, R rows (layers and sources that differ), B blocks, E experts, Q groups of a model, N experts
of a group, K choices so far (0 .. top_k), Y groups so far (0 .. top_groups).

Reference: Chen, Dempster, Liu, "Weighted finite population sampling to maximize entropy", Biometrika 81, 1994.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from moeplan.domain.program import Floats, Ints
from moeplan.domain.routing import Routing, TokenSets

Flags = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


class Limit(NamedTuple):
    """A token's experts come from `top_groups` of `num_groups` groups (DeepSeek); (1, 1): from anywhere."""

    num_groups: int = 1
    top_groups: int = 1


ANYWHERE = Limit()


def reach_LSB(routing: Routing, block_E: Ints, limit: Limit = ANYWHERE) -> Floats:
    """(L, S, B) tokens of each source with a choice in each block that travels; experts of block -1 are in none."""
    return reach_of_parts(routing, (block_E == np.arange(int(block_E.max()) + 1)[:, None]).astype(np.float64), limit)


def reach_of_parts(routing: Routing, part_BE: Floats, limit: Limit = ANYWHERE) -> Floats:
    """The same where block b has replicas of expert e that get a part of its tokens, as likely any token as another,
    whatever else the token chose.

    max over e of part[e] kept[e] <= reach <= min(tokens, sum over e of part[e] kept[e]). A choice that was dropped does
    not count, as likely for one token as for another; an empty place that travels along is a parcel of its own.
    """
    nothing_LSE = np.zeros(routing.tokens_LSE.shape)
    padded_LSE = nothing_LSE if routing.padded_LSE is None else routing.padded_LSE
    dropped_LSE = nothing_LSE if routing.dropped_LSE is None else routing.dropped_LSE
    kept_LSE = routing.tokens_LSE - padded_LSE
    chosen_LSE = kept_LSE + dropped_LSE
    lost_LSE = np.divide(dropped_LSE, chosen_LSE, out=np.zeros_like(nothing_LSE), where=chosen_LSE > 0)
    if routing.sets_LS is not None:
        missed_LSB = _missed_by_sets(routing.sets_LS, lost_LSE, part_BE)
    else:
        chance_LSE = chosen_LSE / max(routing.tokens_per_source, 1)
        missed_LSB = _missed_by_law(chance_LSE, lost_LSE, part_BE, routing.top_k, limit)
    least_LSB = np.stack([(part_E * kept_LSE).max(axis=2) for part_E in part_BE], axis=2)
    most_LSB = np.minimum(kept_LSE @ part_BE.T, routing.tokens_per_source)
    reach_LSB = np.clip(routing.tokens_per_source * (1.0 - missed_LSB), least_LSB, most_LSB)
    return np.asarray(reach_LSB + padded_LSE @ part_BE.T)


def _not_there(part_E: Floats, lost_E: Floats) -> Floats:
    """Chance that a choice of each expert is none in a block: it was dropped, or went to a replica elsewhere."""
    return np.asarray(lost_E * part_E + (1.0 - part_E))


def _missed_by_sets(sets_LS: tuple[tuple[TokenSets, ...], ...], lost_LSE: Floats, part_BE: Floats) -> Floats:
    """(L, S, B) part of the recorded tokens without a choice left in each block."""
    missed_LSB = np.empty((*lost_LSE.shape[:2], len(part_BE)))
    known: dict[tuple[int, bytes], Floats] = {}
    for layer, source in np.ndindex(lost_LSE.shape[:2]):
        sets, lost_E = sets_LS[layer][source % len(sets_LS[layer])], lost_LSE[layer, source]
        key = (id(sets), lost_E.tobytes())
        if key not in known:
            known[key] = np.array([_missed_by(sets, _not_there(part_E, lost_E)) for part_E in part_BE])
        missed_LSB[layer, source] = known[key]
    return missed_LSB


def _missed_by(sets: TokenSets, left_E: Floats) -> float:
    """Part of the tokens that keep nothing, where a choice of expert e is none with chance `left_E[e]`."""
    left_U = left_E[sets.experts_UK].prod(axis=1)
    return float(left_U @ sets.count_U / max(int(sets.count_U.sum()), 1))


def _missed_by_law(chance_LSE: Floats, lost_LSE: Floats, part_BE: Floats, top_k: int, limit: Limit) -> Floats:
    """(L, S, B) chance that a token has no choice left in each block: Z(weights times the chance of none there) / Z.

    Z(weights) is the sum over the sets of experts that a token may choose of the product of their weights.
    """
    rows = np.concatenate([chance_LSE, lost_LSE], axis=2).reshape(-1, 2 * chance_LSE.shape[2])
    rows, back = np.unique(rows, axis=0, return_inverse=True)
    look = _looked_up if len(rows) == 1 else _looked_for
    found = np.concatenate(
        [look(np.round(part, 12).tobytes(), part_BE.tobytes(), len(part_BE), top_k, limit) for part in _cut(rows)]
    )
    return found[back.ravel()].reshape(*chance_LSE.shape[:2], len(part_BE))


def _looked_for(rows: bytes, blocks: bytes, num_blocks: int, top_k: int, limit: Limit) -> Floats:
    """(R, B) of rows of chances and of what is lost."""
    part_BE = np.frombuffer(blocks).reshape(num_blocks, -1)
    chance_RE, lost_RE = np.split(np.frombuffer(rows).reshape(-1, 2 * part_BE.shape[1]), 2, axis=1)
    weight_RE, fits_R = _weights(chance_RE, top_k, limit)
    found_RB = np.empty((len(chance_RE), num_blocks))
    for rows_R, within in ((fits_R, limit), (~fits_R, ANYWHERE)):
        if not rows_R.any():
            continue
        weight, lost = weight_RE[rows_R], lost_RE[rows_R]
        left = [_total(weight * _not_there(part_E, lost), top_k, within) for part_E in part_BE]
        found_RB[rows_R] = np.stack(left, axis=1) / _total(weight, top_k, within)[:, None]
    return found_RB


_looked_up = lru_cache(maxsize=1024)(_looked_for)
"""Where all sources are alike, which many micro-batches and groups have in common."""


def _total(weight_RE: Floats, top_k: int, limit: Limit) -> Floats:
    """(R,) Z: of y^top_groups z^top_k the coefficient in the product over groups of 1 + y product(1 + weight z)."""
    inside_RQK = _products(weight_RE, top_k, limit)[:, :, -1]
    return _over_groups(inside_RQK, limit)[:, -1, limit.top_groups, top_k]


def _products(weight_RE: Floats, top_k: int, limit: Limit) -> Floats:
    """(R, Q, N + 1, K): coefficients of the product over the first n experts of each group."""
    weight_RQN = weight_RE.reshape(len(weight_RE), limit.num_groups, -1)
    found = np.zeros((*weight_RQN.shape[:2], weight_RQN.shape[2] + 1, top_k + 1))
    found[:, :, 0, 0] = 1.0
    for n in range(weight_RQN.shape[2]):
        found[:, :, n + 1] = found[:, :, n]
        found[:, :, n + 1, 1:] += weight_RQN[:, :, n, None] * found[:, :, n, :-1]
    return found


def _over_groups(inside_RQK: Floats, limit: Limit) -> Floats:
    """(R, Q + 1, Y, K): coefficients of the product over the first q groups of 1 + y inside."""
    rows, groups, picks = inside_RQK.shape
    found = np.zeros((rows, groups + 1, limit.top_groups + 1, picks))
    found[:, 0, 0, 0] = 1.0
    for q in range(groups):
        found[:, q + 1] = found[:, q]
        for k in range(picks):
            found[:, q + 1, 1:, k:] += inside_RQK[:, q, k, None, None] * found[:, q, :-1, : picks - k]
    return found


# ---- the weights with which each expert is chosen as often as it should be

_ROUNDS = 300
_CLOSE, _UNLIKE = 1e-9, 1e-5
_STEP = 0.6
"""A whole step overshoots for ever where two experts share one choice."""
_RANGE = 300.0
"""Of the logarithm of a product of weights: no table of ours overflows."""
_ROWS = 512
"""At a time, so that tables stay in some tens of megabytes."""


def _cut(table_RE: Floats) -> list[Floats]:
    return [table_RE[start : start + _ROWS] for start in range(0, len(table_RE), _ROWS)]


def _weights(chance_RE: Floats, top_k: int, limit: Limit) -> tuple[Floats, Flags]:
    """Weights by row, and whether they are of a law within the groups: where no such law chooses each expert as often,
    because the popular ones lie in too many groups, the limit is given up.

    Where all chances are alike the weights are 1, and nothing has to be found.
    """
    if np.ptp(chance_RE) < 1e-12:
        return np.ones_like(chance_RE), np.ones(len(chance_RE), bool)
    rounded = np.asarray(np.round(np.clip(chance_RE, 1e-10, 1 - 1e-10), 12), np.float64)
    return _kept(rounded.tobytes(), rounded.shape, top_k, limit)


@lru_cache(maxsize=256)
def _kept(table: bytes, shape: tuple[int, int], top_k: int, limit: Limit) -> tuple[Floats, Flags]:
    wanted_RE = np.frombuffer(table).reshape(shape)
    log_RE, error_R = _fitted(wanted_RE, top_k, limit)
    fits_R = (error_R <= _UNLIKE) | (limit == ANYWHERE)
    if not fits_R.all():
        log_RE[~fits_R] = _fitted(wanted_RE[~fits_R], top_k, ANYWHERE)[0]
    return np.exp(log_RE), fits_R


def _fitted(wanted_RE: Floats, top_k: int, limit: Limit) -> tuple[Floats, Floats]:
    """Logarithms of weights by fixed point on those of the odds, and by how much each row's chances are off."""
    odds_RE = np.log(wanted_RE / (1 - wanted_RE))
    log_RE, error_R, step_R = odds_RE.copy(), np.full(len(odds_RE), np.inf), np.ones(len(odds_RE))
    left_R = np.arange(len(odds_RE))
    for _ in range(_ROUNDS):
        log_RE[left_R] -= log_RE[left_R].mean(axis=1, keepdims=True)
        log_RE[left_R] = np.clip(log_RE[left_R], -_RANGE / top_k, _RANGE / top_k)
        found_RE = np.clip(_inclusion(np.exp(log_RE[left_R]), top_k, limit), 1e-12, 1 - 1e-12)
        error = np.abs(found_RE - wanted_RE[left_R]).max(axis=1)
        step_R[left_R[error > 0.5 * error_R[left_R]]] = _STEP
        error_R[left_R] = error
        log_RE[left_R] += step_R[left_R, None] * (odds_RE[left_R] - np.log(found_RE / (1 - found_RE)))
        left_R = left_R[error > _CLOSE]
        if not len(left_R):
            break
    return log_RE, error_R


def _inclusion(weight_RE: Floats, top_k: int, limit: Limit) -> Floats:
    """(R, E) chance that a token chooses each expert: weight x dZ / dweight / Z, by the product of all others."""
    before_RQNK = _products(weight_RE, top_k, limit)
    behind_RQNK = _products(weight_RE[:, ::-1], top_k, limit)[:, ::-1, ::-1]
    first, last = (_over_groups(table, limit) for table in (before_RQNK[:, :, -1], before_RQNK[:, ::-1, -1]))
    slope_RQK = _others(first, last[:, ::-1], limit)
    at = np.add.outer(np.arange(top_k + 1), np.arange(top_k + 1)) + 1
    hankel = np.where(at <= top_k, slope_RQK[..., np.minimum(at, top_k)], 0.0)
    slope_RQN = np.einsum("rqnc,rqcd,rqnd->rqn", before_RQNK[:, :, :-1], hankel, behind_RQNK[:, :, 1:], optimize=True)
    total_R = first[:, -1, limit.top_groups, top_k]
    return np.asarray(weight_RE * slope_RQN.reshape(weight_RE.shape) / total_R[:, None])


def _others(first_RQYK: Floats, last_RQYK: Floats, limit: Limit) -> Floats:
    """(R, Q, K): what a group's coefficient of z^k is multiplied by in Z: the product of all other groups."""
    rows, groups, _, picks = first_RQYK.shape
    found = np.zeros((rows, groups - 1, picks))
    for y in range(limit.top_groups):
        left, right = first_RQYK[:, :-1, y], last_RQYK[:, 1:, limit.top_groups - 1 - y]
        for k in range(picks):
            found[..., k] += (left[..., : picks - k] * right[..., picks - 1 - k :: -1]).sum(axis=-1)
    return found
