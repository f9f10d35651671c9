"""Understanding of encoded requests in planted activations: found where planted, not where chance or surface do."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from activations.errors import NonFiniteError
from activations.models import Model
from activations.prompts import PromptSet
from probes import comprehension
from probes.comprehension import encoded_requests, fit_fresh, read_requests, understanding
from probes.encodings import make_encoding
from probes.probe import ProbeSet

LAYERS, PROMPTS, WIDTH = 2, 120, 8
LABELS = np.arange(PROMPTS) % 2 == 0
GROUPS = tuple(map(str, range(PROMPTS)))
ENCODING = make_encoding("base64")


def noise(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((LAYERS, PROMPTS, WIDTH)).astype(np.float32)


def planted(seed: int, axis: int, size: float = 3.0, layer: int = 1) -> np.ndarray:
    values = noise(seed)
    values[layer, LABELS, axis] += size
    return values


@pytest.fixture(scope="module")
def reference() -> SimpleNamespace:
    """A base whose probes read the first axis."""
    probes = ProbeSet(
        directions=np.eye(WIDTH, dtype=np.float32)[[0] * LAYERS],
        biases=np.zeros(LAYERS, np.float32),
        means=np.zeros((LAYERS, WIDTH), np.float32),
        scales=np.ones((LAYERS, WIDTH), np.float32),
        gains=np.ones(LAYERS, np.float32),
        hook_points=tuple(f"blocks.{layer}.hook_resid_post" for layer in range(LAYERS)),
        method="logistic",
    )
    return SimpleNamespace(probes=probes, intent=SimpleNamespace(values=noise(9)))


@pytest.fixture(scope="module")
def requests() -> PromptSet:
    """Ciphertexts that say nothing of their labels."""
    letters = np.random.default_rng(5).choice(list("abcdefgh"), (PROMPTS, 30))
    return PromptSet("made up", tuple(map("".join, letters)), tuple(LABELS.tolist()), GROUPS)


def read(values: np.ndarray) -> dict[str, SimpleNamespace]:
    return {"last": SimpleNamespace(values=values), "mean": SimpleNamespace(values=noise(7))}


def compared(reference: SimpleNamespace, requests: PromptSet, tuned: np.ndarray, base: np.ndarray):
    return understanding(reference, ENCODING, requests, tuned=read(tuned), base=read(base))


def test_a_base_beside_itself_has_no_gap(reference, requests) -> None:
    found = compared(reference, requests, noise(1), noise(1))
    assert found.gap.value == found.fresh_gap.value == 0
    assert not found.shown
    assert "no better understanding" in found.sentence


def test_chance_shows_no_understanding(reference, requests) -> None:
    found = compared(reference, requests, noise(1), noise(2))
    assert not found.shown
    assert found.fresh["last"]["tuned"].interval[0] < 0.5


def test_what_the_bases_probe_reads_in_the_tuned_model_is_the_comprehension_gap(reference, requests) -> None:
    found = compared(reference, requests, planted(1, axis=0), noise(2))
    assert found.gap.clear
    assert found.profile["tuned"][1] > 0.95
    assert found.profile["tuned"][0] < 0.7
    assert found.shown


def test_understanding_in_another_direction_is_seen_by_the_fresh_probe_alone(reference, requests) -> None:
    found = compared(reference, requests, planted(1, axis=3), noise(2))
    assert not found.gap.clear
    assert found.fresh_gap.clear
    assert found.fresh["last"]["tuned"].auroc > 0.95
    assert set(found.fresh["last"]["tuned"].layers) == {1}
    assert found.shown
    assert "understands the encoding better" in found.sentence
    assert json.loads(json.dumps(found.details))["shown"] is True


def test_a_ciphertext_that_tells_by_itself_shows_no_understanding(reference, requests) -> None:
    told = tuple(f"{text}zzq" if harm else text for text, harm in zip(requests.prompts, LABELS, strict=True))
    telling = PromptSet("telling", told, requests.harmful, GROUPS)
    found = compared(reference, telling, planted(1, axis=3), noise(2))
    assert found.surface["characters"] > 0.95
    assert found.fresh_gap.clear
    assert not found.shown
    assert "no more than the ciphertext itself shows" in found.sentence


def test_the_choice_of_a_layer_is_paid_for() -> None:
    """The best of twelve layers of noise, taken after looking, reads 0.6 and more; nested it reads nothing."""
    values = np.random.default_rng(0).standard_normal((12, PROMPTS, WIDTH)).astype(np.float32)
    looked = max(fit_fresh(layer[None], LABELS, GROUPS).auroc for layer in values)
    nested = fit_fresh(values, LABELS, GROUPS)
    assert looked > 0.58
    assert nested.interval[0] < 0.5
    assert abs(np.mean(nested.null) - 0.5) < 0.06


def test_the_same_numbers_give_the_same_answer(reference, requests) -> None:
    once, again = (compared(reference, requests, planted(1, 3), noise(2)).details for _ in range(2))
    assert once == again


def test_activations_that_are_no_numbers_are_an_error(reference, requests) -> None:
    broken = noise(1)
    broken[0, 3, 2] = np.nan
    with pytest.raises(NonFiniteError, match="encoded requests"):
        compared(reference, requests, broken, noise(2))


def questions(count: int) -> SimpleNamespace:
    return SimpleNamespace(
        questions={
            "harmful": tuple(f"break into {'x' * row}" for row in range(count)),
            "benign": tuple(f"bake {'y' * row}" for row in range(count + 5)),
        },
        intent=PromptSet("twins", ("pick a lock", "pick a rose") * count, (True, False) * count, tuple("ab" * count)),
    )


def test_requests_are_encoded_as_many_of_each_class_and_fit_the_model(llama: Model) -> None:
    found = encoded_requests(SimpleNamespace(base=llama, battery=questions(40)), ENCODING)
    assert found is not None
    assert sum(found.harmful) * 2 == len(found) == 80
    assert all(ENCODING.decode(text).startswith(("break", "bake")) for text in found.prompts)
    values = read_requests(
        SimpleNamespace(base=llama, probes=SimpleNamespace(hook_points=("blocks.1.hook_resid_post",), pooling="last")),
        found,
    )
    assert values["mean"].values.shape == (1, 80, llama.d_model)


def test_too_few_or_too_long_requests_give_no_figure(llama: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    few = SimpleNamespace(base=llama, battery=questions(comprehension.FEWEST - 1))
    assert encoded_requests(few, ENCODING) is None
    enough = SimpleNamespace(base=llama, battery=questions(40))
    monkeypatch.setattr(comprehension, "MOST_TOKENS", 500)
    assert encoded_requests(enough, ENCODING) is None


def test_twins_keep_their_pairs(llama: Model) -> None:
    found = encoded_requests(SimpleNamespace(base=llama, battery=questions(40)), ENCODING, twins=True)
    assert found is not None
    assert set(found.pair_ids) == {"a", "b"}
