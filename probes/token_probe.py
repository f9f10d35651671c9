"""A probe over all tokens of long prompts: it learns where to look and what to read there.

Pooling the last token or the mean loses what a few tokens in the middle say. Here a learned query weighs tokens
(attention pooling, one softmax over a prompt's tokens) and a direction reads their weighted mean; both are trained
together. The problem is not convex: several starts are tried, and the one with the lowest training loss is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import einsum
from jaxtyping import Bool, Float
from torch import Tensor

from activations.errors import NonFiniteError, OptionError
from probes.crossval import checked_strengths, held_out_scores
from probes.folds import Groups, checked_labels, deal_folds, refuse_copied_texts, shuffled_labels
from probes.metrics import auroc, auroc_interval, auroc_rows, group_numbers
from probes.rows import check_device, standardised

__all__ = ["TokenMetrics", "TokenProbe", "fit_token_probe"]

# Starts besides the mean over all tokens: axes along which tokens vary more in one class, looked at from both ends.
_AXES = 3

_NOT_FINITE = "the tokens hold NaN or infinite values"

# Adam (Kingma and Ba 2015): further steps changed no AUROC by more than 0.01 on planted problems.
_STEPS, _RATE = 300, 0.05


@dataclass(frozen=True)
class TokenMetrics:
    """How well a token probe separates held-out prompts, beside what needs less.

    Attributes:
        auroc: Cross-validated.
        interval: Its 95 % interval, which knows the groups.
        null_shuffled: Cross-validated AUROC under shuffled labels, one a shuffle, everything else alike.
        mean_pooling: Cross-validated AUROC of the same read-out from the plain mean over tokens.
    """

    auroc: float
    interval: tuple[float, float]
    null_shuffled: tuple[float, ...]
    mean_pooling: float


@dataclass(frozen=True, eq=False)
class TokenProbe:
    """A read-out of one layer that weighs tokens.

    Attributes:
        query: Tokens weigh as the exponential of their product with it, in standardised coordinates.
        weights: What is read from the weighted mean; the score is log odds.
        bias: Added to it.
        mean: Subtracted from every token before anything else.
        scale: Divides what is left.
        metrics: None where nothing was held out.
    """

    query: Float[np.ndarray, " d_model"]
    weights: Float[np.ndarray, " d_model"]
    bias: float
    mean: Float[np.ndarray, " d_model"]
    scale: Float[np.ndarray, " d_model"]
    metrics: TokenMetrics | None

    def attention(self, tokens: Float[np.ndarray, "token d_model"]) -> Float[np.ndarray, " token"]:
        """How much each token of a prompt counts; sums to 1.

        Raises:
            NonFiniteError: A token is NaN or infinite.
            OptionError: There are no tokens, or their width is another.
        """
        tokens = np.asarray(tokens)
        if tokens.ndim != 2 or not len(tokens) or tokens.shape[1] != len(self.query):
            raise OptionError(
                f"a prompt has shape {tokens.shape}: expected [token, {len(self.query)}], one token or more"
            )
        if not np.isfinite(tokens).all():
            raise NonFiniteError(_NOT_FINITE)
        looked = ((tokens - self.mean) / self.scale) @ self.query
        weight = np.exp(looked - looked.max())
        return np.asarray(weight / weight.sum())

    def score(self, prompts: Sequence[Float[np.ndarray, "token d_model"]]) -> Float[np.ndarray, " prompt"]:
        """Log odds of each prompt; above 0 reads as harmful.

        Raises:
            NonFiniteError, OptionError: As in `attention`.
        """
        weights = self.weights / self.scale
        read = [self.attention(tokens) @ ((tokens - self.mean) @ weights) for tokens in map(np.asarray, prompts)]
        return np.array(read, dtype=np.float64) + self.bias


def fit_token_probe(
    prompts: Sequence[Float[np.ndarray, "token d_model"]],
    labels: Bool[np.ndarray, " prompt"] | Sequence[bool],
    *,
    groups: Groups | None = None,
    l2: float = 1e-2,
    folds: int = 5,
    shuffles: int = 5,
    seed: int = 0,
    device: str = "cpu",
) -> TokenProbe:
    """Fit a token probe at one layer and measure it on held-out prompts.

    Cost: 300 steps, each two passes over all tokens padded to the longest prompt, with 7 starts for each of
    `1 + (1 + shuffles) * folds` fits. Memory: the tokens, padded, in float32.

    Args:
        prompts: The tokens of each prompt at one layer, as `[tokens[layer] for tokens in activations.tokens]`.
        labels: True where the prompt is harmful.
        groups: Prompts that must stay together; each its own when None.
        l2: Penalty on query and weights.
        folds: Of the cross-validation; 0 fits without measuring.
        shuffles: Labellings of the null.
        seed: Of folds, shuffles and starts.
        device: Where the products are done.

    Raises:
        LabelError: Labels or groups are not one for each prompt, of one class, or too few to hold any out; or equal
            prompts stand in different groups, so that they may be held out from each other.
        NonFiniteError: A token is NaN or infinite.
        OptionError: A prompt has no tokens or another width than the first, or an option is impossible.
    """
    truth, members = checked_labels(labels, len(prompts)), group_numbers(groups, len(prompts))
    strength, *others = checked_strengths(l2)
    check_device(device)
    if shuffles < 0 or others:
        raise OptionError(f"shuffles is {shuffles} and l2 {l2}: expected 0 or more shuffles, and one strength")
    if folds not in (0, *range(2, len(prompts) + 1)):
        raise OptionError(f"folds is {folds}: expected 2 to {len(prompts)}, or 0 to fit without measuring")
    prompts = [np.asarray(tokens) for tokens in prompts]
    padded, mask, mean, scale = _padded(prompts, device)
    if folds:
        refuse_copied_texts([tokens.tobytes() for tokens in prompts], members, "have the same activations")
    rng = np.random.default_rng(seed)
    labellings = [truth, *(shuffled_labels(truth, members, rng) for _ in range(shuffles if folds else 0))]
    held_out = [deal_folds(one, members, folds, rng) for one in labellings] if folds else []
    whole = _fit(padded, mask, truth, np.ones_like(truth), strength)
    metrics = None
    if folds:
        scores = [_held_out(padded, mask, *one, strength) for one in zip(labellings, held_out, strict=True)]
        areas = auroc_rows(np.stack([probe for probe, _ in scores]), np.stack(labellings)).tolist()
        probe, pooled = scores[0]
        interval = auroc_interval(probe, truth, groups=members)
        metrics = TokenMetrics(areas[0], interval, tuple(areas[1:]), auroc(pooled, truth))
    query, weights, bias = (one.double().cpu().numpy() for one in whole[:3])
    return TokenProbe(query, weights, float(bias), mean, scale, metrics)


def _held_out(
    padded: Tensor, mask: Tensor, truth: np.ndarray, fold: np.ndarray, l2: float
) -> tuple[Float[np.ndarray, " prompt"], Float[np.ndarray, " prompt"]]:
    """Scores of prompts that were not seen, of the probe and of the same read-out from the mean over tokens."""
    fits = [_fit(padded, mask, truth, fold != one, l2) for one in range(int(fold.max()) + 1)]
    probe, pooled = (torch.stack([fit[which] for fit in fits]).cpu().numpy() for which in (3, 4))
    return held_out_scores(probe, fold), held_out_scores(pooled, fold)


def _fit(
    padded: Tensor, mask: Tensor, truth: np.ndarray, kept: np.ndarray, l2: float
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Query, weights and bias of the best start, its scores of all prompts, and those of the mean over tokens."""
    targets, seen = torch.from_numpy(truth).to(padded), torch.from_numpy(kept).to(padded)
    shares = seen / seen.sum()
    query = _starts(padded, mask, targets, shares)
    # The first column looks at all tokens alike throughout: mean pooling.
    learns = torch.ones(len(query), 1).to(query)
    learns[0] = 0
    weights, bias = torch.zeros_like(query), query.new_zeros(len(query), 1)
    parameters = [one.requires_grad_() for one in (query, weights, bias)]
    optimiser = torch.optim.Adam(parameters, lr=_RATE)
    for _ in range(_STEPS):
        optimiser.zero_grad()
        _losses(_scores(padded, mask, query * learns, weights, bias), targets, shares).add(
            l2 / 2 * (weights.square().sum(1) + (query * learns).square().sum(1))
        ).sum().backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    with torch.no_grad():
        query = query * learns
        scores = _scores(padded, mask, query, weights, bias)
        losses = _losses(scores, targets, shares) + l2 / 2 * (weights.square().sum(1) + query.square().sum(1))
        best = int(losses.argmin())
        return query[best], weights[best].detach(), bias[best, 0].detach(), scores[best], scores[0]


def _losses(scores: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
    return (torch.nn.functional.softplus(scores) - targets * scores) @ shares


def _scores(padded: Tensor, mask: Tensor, query: Tensor, weights: Tensor, bias: Tensor) -> Tensor:
    looked = einsum(padded, query, "prompt token d, start d -> start prompt token") + mask
    read = einsum(padded, weights, "prompt token d, start d -> start prompt token")
    return (looked.softmax(-1) * read).sum(-1) + bias


def _starts(padded: Tensor, mask: Tensor, targets: Tensor, shares: Tensor) -> Tensor:
    """No query twice (one stays so), and both ends of the axes along which tokens vary most differently by class.

    Within prompts: what moves a prompt as a whole says nothing of where to look. Power iteration on the difference of
    the two classes' covariances.
    """
    real = (mask == 0).to(padded)[..., None]
    lengths = real.sum(1, keepdim=True)
    centred = (padded - (padded * real).sum(1, keepdim=True) / lengths) * real
    harmful, benign = shares * targets, shares * (1 - targets)
    by_class = (harmful / harmful.sum() - benign / benign.sum())[:, None, None] / lengths
    generator = np.random.default_rng(0).standard_normal((padded.shape[2], min(_AXES, padded.shape[2])))
    axes = torch.linalg.qr(torch.from_numpy(generator).to(padded)).Q
    for _ in range(20):
        along = (centred @ axes) * by_class
        axes = torch.linalg.qr(einsum(centred, along, "prompt token d, prompt token k -> d k")).Q
    none = padded.new_zeros(2, padded.shape[2])
    return torch.cat([none, axes.T, -axes.T]).contiguous()


def _padded(
    prompts: Sequence[np.ndarray], device: str
) -> tuple[Float[Tensor, "prompt token d_model"], Float[Tensor, "prompt token"], np.ndarray, np.ndarray]:
    """Standardised tokens with zeros behind them, minus infinity where there is none, and mean and scale."""
    widths = {tokens.shape[1:] for tokens in prompts}
    if len(widths) != 1 or len(next(iter(widths))) != 1 or not all(len(tokens) for tokens in prompts):
        raise OptionError("a prompt has no tokens or another width: expected one array [token, d_model] a prompt")
    rows, mean, scale = standardised(np.concatenate(prompts), device)
    if not (np.isfinite(mean).all() and np.isfinite(scale).all()):
        raise NonFiniteError(_NOT_FINITE)
    ends = np.cumsum([len(tokens) for tokens in prompts]).tolist()
    parts = [rows[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    padded = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True)
    lengths = torch.tensor([len(tokens) for tokens in prompts], device=padded.device)[:, None]
    missing = torch.arange(padded.shape[1], device=padded.device) >= lengths
    return padded, torch.zeros_like(missing, dtype=padded.dtype).masked_fill(missing, -torch.inf), mean, scale
