"""Does a direction do what it says? Add it to the residual stream, or take it out, and see whether the model refuses.

A probe that tells harmful from benign may read what the model never uses. Adding a direction and ablating it are those
of Arditi et al. 2024 (arXiv:2406.11717, section 2.4); the readout is the log-odds of beginning a refusal at the first
answer token. Random directions of the same length are the null: any large enough push changes something.

Use `mean_difference`, not a logistic probe's direction: on the shipped base (`benchmarks/hygiene.py`, layer 1, a step
as long as the class means are apart) it adds 5.1 nats on benign prompts and its opposite takes 5.7 from harmful ones,
further than all of 20 evenly drawn directions (at most 2.0), while the probe's own adds 0.7, within their range, and
the cleaned probe's 0.5. It proves no intent there: directions drawn like activations move refusal by up to 6 nats
(p 0.14), and where refusal is erased within the classes, 4.4 of its length of 33 are left and add 0.6 nats; where it is
erased altogether, 1.8 are left and add nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from activations.answers import answer_logprobs
from activations.errors import HookPointError, NonFiniteError, OptionError
from activations.hook_points import RESID_POST, Site
from activations.models import Model
from probes.folds import checked_labels
from probes.metrics import empirical_p

__all__ = [
    "CausalEffect",
    "Effect",
    "ablated",
    "causal_effect",
    "mean_difference",
    "random_directions",
    "refusal_log_odds",
    "steered",
]

# Where an edit changes the stream itself: the other hook points are copies on their way into or out of a part.
_STREAM = ("hook_resid_pre", RESID_POST)
# A direction is called one where its length is not rounding.
_SHORTEST = 1e-12

Direction = Float[np.ndarray, " d_model"]


@contextmanager
def steered(model: Model, direction: Direction, hook_points: Sequence[str], *, alpha: float) -> Iterator[Model]:
    """Within the `with` block, `alpha` times the unit direction is added to every token at these hook points.

    Extraction, answers and generation inside the block all see it, packed or not, with whatever checkpoint is applied;
    hooks set later at the same place see the changed stream. The hooks are gone after the block, however it ends.
    `Model.tuned`, and so the provenance of what is extracted inside, names the edit.

    Args:
        model: The model.
        direction: Any length but 0, in the coordinates of the residual stream; see `Probe.residual_direction`.
        hook_points: Names such as "blocks.3.hook_resid_post".
        alpha: Length of what is added, in units of the residual stream; negative for the opposite direction.

    Raises:
        HookPointError: The model has no such place, or it is not the residual stream before or after a block.
        NonFiniteError: The direction or `alpha` is NaN or infinite.
        OptionError: The direction is zero or of another width than the stream, or no hook point is named.
    """
    if not np.isfinite(alpha):
        raise NonFiniteError(f"alpha is {alpha}: expected a length")
    step = torch.from_numpy(alpha * _unit(model, direction))

    def add(hidden: Tensor) -> Tensor:
        return hidden + step.to(hidden)

    with _edited(model, hook_points, add, _name("steered", step, hook_points)):
        yield model


@contextmanager
def ablated(model: Model, direction: Direction, hook_points: Sequence[str]) -> Iterator[Model]:
    """Within the `with` block, the stream has no component along the direction at these hook points; see `steered`.

    Later blocks may write it again: name every layer's hook point to keep it out.

    Raises:
        HookPointError, NonFiniteError, OptionError: As in `steered`.
    """
    unit = torch.from_numpy(_unit(model, direction))

    def ablate(hidden: Tensor) -> Tensor:
        along = unit.to(hidden.device, torch.float32)
        # In float32: half precision would leave some thousandths of a large component behind.
        whole = hidden.float()
        return (whole - (whole @ along)[..., None] * along).to(hidden.dtype)

    with _edited(model, hook_points, ablate, _name("ablated", unit, hook_points)):
        yield model


def mean_difference(activations: Float[np.ndarray, "prompt d_model"], labels: np.ndarray) -> Direction:
    """From the benign mean to the harmful one, unscaled: its length is a natural `alpha`.

    Raises:
        LabelError: Only one class is present, or labels are not one for each prompt.
    """
    truth = checked_labels(labels, len(activations))
    means = [activations[rows].mean(axis=0, dtype=np.float64) for rows in (truth, ~truth)]
    return np.asarray(means[0] - means[1])


def refusal_log_odds(
    model: Model, prompts: Sequence[Sequence[int]], refusal_tokens: Sequence[int]
) -> Float[np.ndarray, " prompt"]:
    """Log-odds that the first answer token opens a refusal, in nats.

    Args:
        model: The model, with whatever is applied to it.
        prompts: Token ids of each prompt, chat template applied.
        refusal_tokens: See `Reference.refusal_tokens`.

    Raises:
        OptionError: No refusal tokens, or all of the vocabulary.
    """
    logprobs = answer_logprobs(model, prompts, torch.zeros(len(prompts), 1, dtype=torch.long))[:, 0].double()
    opens = torch.zeros(logprobs.shape[1], dtype=torch.bool)
    opens[list(refusal_tokens)] = True
    if not opens.any() or opens.all():
        raise OptionError(
            f"{int(opens.sum())} of {len(opens)} tokens open a refusal: expected some and not all",
            hint="The base must refuse harmful prompts more often than benign ones.",
        )
    # Two sums of logs: 1 - p would lose a probability near 1.
    odds = logprobs[:, opens].logsumexp(1) - logprobs[:, ~opens].logsumexp(1)
    return np.asarray(odds.numpy())


@dataclass(frozen=True)
class Effect:
    """What one edit does to the refusal log-odds on one class of prompts: means over prompts, in nats.

    Attributes:
        change: Edited minus untouched.
        null: The same for random directions of the same length.
        p_value: Share of the null at least as far in the expected direction, `change` counted with it.
        expected: 1 where a direction of harmful intent should raise refusal, -1 where it should lower it.
    """

    change: float
    null: tuple[float, ...]
    p_value: float
    expected: int

    @property
    def as_it_should(self) -> bool:
        """Whether the change goes the expected way, and further than every random direction's."""
        return self.expected * self.change > max(0.0, *(self.expected * value for value in self.null))


@dataclass(frozen=True)
class CausalEffect:
    """What a direction does to refusal, for each class of prompts.

    Attributes:
        untouched: Class to the mean refusal log-odds without an edit.
        added: Class to the effect of adding the direction.
        opposite: Of adding its opposite; the null is that of `added`.
        ablated: Of taking it out.
        alpha: Length of what was added.
    """

    untouched: Mapping[str, float]
    added: Mapping[str, Effect]
    opposite: Mapping[str, Effect]
    ablated: Mapping[str, Effect]
    alpha: float


def causal_effect(
    model: Model,
    direction: Direction,
    hook_points: Sequence[str],
    prompts: Mapping[str, Sequence[Sequence[int]]],
    *,
    refusal_tokens: Sequence[int],
    alpha: float,
    ablate_at: Sequence[str] | None = None,
    like: Float[np.ndarray, "prompt d_model"] | None = None,
    nulls: int = 20,
    seed: int = 0,
) -> CausalEffect:
    """Add a direction of harmful intent, its opposite and random ones, ablate it and random ones, and watch refusal.

    Cost: 3 + 2 * `nulls` forward passes over the prompts, and one without an edit.

    Args:
        model: The model, with whatever checkpoint is applied to it.
        direction: Towards harmful, in the residual stream; its length does not count.
        hook_points: Where it is added.
        prompts: Class ("harmful", "benign") to the token ids of its prompts, chat template applied.
        refusal_tokens: See `Reference.refusal_tokens`.
        alpha: Length of what is added; the length of `mean_difference` at the hook point is what tells the classes
            apart there.
        ablate_at: Where it is ablated; None for the stream after every block, and before the first.
        like: Activations whose covariance the random directions are given: a harder null than directions drawn evenly
            from all, most of which the model never uses.
        nulls: How many random directions; p-values go no lower than 1 / (1 + nulls).
        seed: Of the random directions.

    Raises:
        HookPointError, NonFiniteError: As in `steered`.
        OptionError: As in `steered` and `refusal_log_odds`; or no prompts, or fewer than 20 random directions.
    """
    if nulls < 20 or not prompts or not all(prompts.values()):
        raise OptionError(
            f"{nulls} random directions and {sum(map(len, prompts.values()))} prompts: expected at least 20, and "
            "prompts in every class"
        )
    everywhere = (model.hook_points.names(_STREAM[0])[0], *model.hook_points.names(RESID_POST))
    readout = _Readout(model, prompts, refusal_tokens)
    places = everywhere if ablate_at is None else ablate_at
    own = _edits(readout, direction, hook_points, places, alpha)
    random = [
        _edits(readout, other, hook_points, places, alpha, opposite=False)
        for other in random_directions(model.d_model, nulls, like=like, seed=seed)
    ]
    untouched = readout()

    def effects(edit: str, null: str, sign: int) -> dict[str, Effect]:
        return {
            name: _effect(own[edit][name] - start, [found[null][name] - start for found in random], sign)
            for name, start in untouched.items()
        }

    return CausalEffect(
        untouched,
        effects("added", "added", 1),
        effects("opposite", "added", -1),
        effects("ablated", "ablated", -1),
        alpha,
    )


def random_directions(
    width: int, count: int, *, like: Float[np.ndarray, "prompt d_model"] | None = None, seed: int = 0
) -> Float[np.ndarray, "count d_model"]:
    """Random directions, drawn evenly from all or with the covariance of some activations; not of unit length."""
    rng = np.random.default_rng(seed)
    if like is None:
        return rng.standard_normal((count, width))
    rows = np.asarray(like, dtype=np.float64)
    return np.asarray(rng.standard_normal((count, len(rows))) @ (rows - rows.mean(axis=0)))


@dataclass(frozen=True)
class _Readout:
    model: Model
    prompts: Mapping[str, Sequence[Sequence[int]]]
    refusal_tokens: Sequence[int]

    def __call__(self) -> dict[str, float]:
        """Class to mean refusal log-odds of the model as it is now."""
        return {
            name: float(refusal_log_odds(self.model, ids, self.refusal_tokens).mean())
            for name, ids in self.prompts.items()
        }


def _edits(
    readout: _Readout,
    direction: Direction,
    add_at: Sequence[str],
    ablate_at: Sequence[str],
    alpha: float,
    *,
    opposite: bool = True,
) -> dict[str, dict[str, float]]:
    """Edit to class to mean refusal log-odds under it."""
    found = {}
    for name, length in (("added", alpha), ("opposite", -alpha))[: 1 + opposite]:
        with steered(readout.model, direction, add_at, alpha=length):
            found[name] = readout()
    with ablated(readout.model, direction, ablate_at):
        found["ablated"] = readout()
    return found


def _effect(change: float, null: Sequence[float], sign: int) -> Effect:
    p_value, _ = empirical_p(sign * change, [sign * value for value in null])
    return Effect(change, tuple(null), p_value, sign)


def _unit(model: Model, direction: Direction) -> Float[np.ndarray, " d_model"]:
    vector = np.asarray(direction, dtype=np.float64)
    if vector.shape != (model.d_model,):
        raise OptionError(
            f"the direction has shape {vector.shape}: expected ({model.d_model},), the width of the stream"
        )
    if not np.isfinite(vector).all():
        raise NonFiniteError("the direction holds NaN or infinite values")
    length = float(np.linalg.norm(vector))
    if length < _SHORTEST:
        raise OptionError("the direction is zero: it points nowhere")
    return vector / length


@contextmanager
def _edited(model: Model, hook_points: Sequence[str], edit: Callable[[Tensor], Tensor], what: str) -> Iterator[None]:
    """Hooks that put `edit(hidden)` in the place of the residual stream at each hook point."""
    if not hook_points:
        raise OptionError("no hook point is named: nothing would be edited")
    for name in hook_points:
        if name.rpartition(".")[2] not in _STREAM or name.count(".") != 2:
            raise HookPointError(
                f"{name!r} is not the residual stream itself, so nothing can be added to that there",
                hint=f"Name {' or '.join(f'blocks.N.{kind}' for kind in _STREAM)}.",
            )
    sites = [model.hook_points.resolve(name) for name in hook_points]
    with ExitStack() as stack:
        stack.enter_context(model.edited(what))
        for site in sites:
            stack.callback(_attach(site, edit).remove)
        yield


def _name(kind: str, step: Tensor, hook_points: Sequence[str]) -> str:
    """Tells one edit from another in a provenance."""
    digest = hashlib.sha256(step.numpy().tobytes() + repr(tuple(hook_points)).encode())
    return f"{kind}-{digest.hexdigest()[:16]}"


def _attach(site: Site, edit: Callable[[Tensor], Tensor]) -> RemovableHandle:
    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if not isinstance(output, tuple):
            return edit(output)
        return tuple(edit(part) if i == site.element else part for i, part in enumerate(output))

    if site.side == "input":
        return site.module.register_forward_pre_hook(before, with_kwargs=True)
    return site.module.register_forward_hook(after)
