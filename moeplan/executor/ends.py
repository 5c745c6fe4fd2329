"""The model's two ends: the embedding, and the head with its loss. Tensor ranks share the words of both.

Axes: T tokens of all tensor ranks, V words of one, R tensor ranks, Q what each tells of its words (`Loss`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeplan.executor.lane import Task
from moeplan.executor.layers import Tape, normed
from moeplan.executor.rank import Rank


class Ends:
    """Embedding, head and loss of one rank."""

    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self.me = rank.tensor_ranks.index(rank.number)
        self.loss = 0.0

    def begin(self, words_N: Tensor, target_N: Tensor) -> None:
        """A new step, on all tokens of its batch."""
        self.words_N, self.target_N, self.loss = words_N, target_N, 0.0

    def embedded(self, task: Task) -> Tensor:
        """The rows of all tensor ranks' tokens whose words are here, 0 for others."""
        table = self.rank.unit(task.chunk, task.layer, expert=False).value("embedding")
        word_T = self.words_N[self.rank.group_T(task.microbatch)] - self.me * len(table)
        here_T = (word_T >= 0) & (word_T < len(table))
        return table[word_T.clamp(0, len(table) - 1)] * here_T[:, None]

    def add_embedding_gradient(self, task: Task, gradient: Tensor) -> None:
        """Adds the gradient of each of all tensor ranks' tokens to its word's row, if that is here."""
        unit = self.rank.unit(task.chunk, task.layer, expert=False)
        table = unit.gradient_view("embedding", task.microbatch)
        word_T = self.words_N[self.rank.group_T(task.microbatch)] - self.me * len(table)
        here = torch.nonzero((word_T >= 0) & (word_T < len(table)))[:, 0]
        table.index_add_(0, word_T[here], gradient[here].to(table.dtype))

    def scores(self, tape: Tape, x: Tensor) -> Tensor:
        """(T, V) in fp32, behind the final norm."""
        normal = normed(tape, x, self.rank.scenario.model.norm, "final_norm")
        return tape.linear(normal, "head").to(torch.float32)

    def loss_of(self, task: Task, scores_TV: Tensor) -> Loss:
        """The micro-batch's part of the mean cross entropy of the batch, as far as this rank's words tell."""
        target_T = self.target_N[self.rank.group_T(task.microbatch)] - self.me * scores_TV.shape[1]
        return Loss(scores_TV, target_T, scale=1.0 / self.rank.scenario.workload.step_tokens)


class Loss:
    """The sum of the tokens' cross entropies times `scale`; a target that is not from 0 to V is another rank's word.

    Of each token a rank tells its greatest score, the sum of exponentials of scores less that, and the target's score.
    Reference: Shoeybi et al., "Megatron-LM" (2019), section 3, which exchanges as little.
    """

    def __init__(self, scores_TV: Tensor, target_T: Tensor, *, scale: float) -> None:
        self.scale = scale
        self.here_T = (target_T >= 0) & (target_T < scores_TV.shape[1])
        self.at_T1 = target_T.clamp(0, scores_TV.shape[1] - 1)[:, None]
        self.most_T = scores_TV.max(dim=1).values
        self.share_TV = (scores_TV - self.most_T[:, None]).exp_()
        own_T = scores_TV.gather(1, self.at_T1)[:, 0] * self.here_T
        self.told_QT = torch.stack([self.most_T, self.share_TV.sum(dim=1), own_T])

    def total(self, told_RQT: Tensor) -> float:
        """The loss, from what all ranks tell; `gradient` may be asked for behind it."""
        most_RT, sum_RT, own_RT = told_RQT.unbind(dim=1)
        top_T = most_RT.max(dim=0).values
        total_T = (sum_RT * (most_RT - top_T).exp()).sum(dim=0)
        self.factor_T = (self.most_T - top_T).exp() / total_T
        return float((total_T.log() + top_T - own_RT.sum(dim=0)).sum()) * self.scale

    def gradient(self) -> Tensor:
        """(T, V), of the scores; what is kept for it is used up."""
        found = self.share_TV.mul_(self.factor_T[:, None])
        found.scatter_add_(1, self.at_T1, -self.here_T[:, None].to(found.dtype))
        return found.mul_(self.scale)
