"""Many readings of harm on planted activations: evading one is not evading all, and what reads nothing has no say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from activations.errors import NonFiniteError
from activations.extract import extract
from activations.loading import load_model
from activations.prompts import PromptSet, load_prompts
from probes import demo
from probes.detectors import intent_shift
from probes.ensemble import DIRECTIONS, LOGISTIC, POSITIONS, Ensemble, Readings, directions, gap, readable
from probes.metrics import auroc
from probes.reference import Subject
from probes.train import fit_probes

LAYERS, WIDTH, PROMPTS = 2, 24, 400
LABELS = np.arange(PROMPTS) % 2 == 0
# Prompts differ along some axes far more than along others. So the best probe does not point where harm does, and what
# it leaves reads harm too, as in a network; were noise alike in all directions, one direction would be all there is.
_RNG = np.random.default_rng(7)
_TURNS = [np.linalg.qr(_RNG.normal(size=(WIDTH, WIDTH)))[0] for _ in range(2)]
MIX = (_TURNS[0] @ np.diag(np.geomspace(3, 0.3, WIDTH)) @ _TURNS[1]).astype(np.float32)
HARM = _RNG.normal(scale=0.6, size=WIDTH).astype(np.float32)

Values = Mapping[str, np.ndarray]
Change = Callable[[np.ndarray, str, int], np.ndarray]


def drawn(seed: int, *, silent: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """Activations by position, [layer, prompt, width]; at silent positions harm leaves no trace."""
    rng = np.random.default_rng(seed)
    values = {place: rng.normal(size=(LAYERS, PROMPTS, WIDTH)).astype(np.float32) @ MIX for place in POSITIONS}
    for place in POSITIONS:
        if place not in silent:
            values[place][:, LABELS] += HARM
    return values


def fitted(values: Values) -> Ensemble:
    weights = {place: np.stack([directions(layer, LABELS) for layer in values[place]]) for place in POSITIONS}
    return Ensemble(tuple(f"blocks.{layer}.hook_resid_post" for layer in range(LAYERS)), weights)


class World:
    """A base whose activations are drawn, and checkpoints that change them."""

    def __init__(self, **settings: tuple[str, ...]) -> None:
        lessons = drawn(0, **settings)
        self.ensemble = fitted(lessons)
        self.probes = fit_probes(lessons["last"], LABELS, folds=0)
        self.seen = {"twins": drawn(1, **settings), "plain": drawn(2, **settings)}

    def readings(self, seen: Mapping[str, Values]) -> Readings:
        members = {name: self.ensemble.scores(values) for name, values in seen.items()}
        return Readings(self.probes.score(seen["twins"]["last"]), members)

    def subject(self, change: Change, base: Mapping[str, Values] | None = None) -> SimpleNamespace:
        base = base or self.seen
        tuned = {
            name: {
                place: np.stack([change(layer.copy(), place, number) for number, layer in enumerate(layers)])
                for place, layers in values.items()
            }
            for name, values in base.items()
        }
        names = tuple(map(str, range(PROMPTS)))
        twins = PromptSet("planted", names, tuple(LABELS.tolist()), names)
        contrasts = {"twins": (twins.prompts, LABELS), "plain": (twins.prompts, LABELS)}
        battery = SimpleNamespace(intent=twins, contrasts=contrasts)
        reference = SimpleNamespace(battery=battery, readings=self.readings(base))
        return SimpleNamespace(reference=reference, readings=self.readings(tuned))


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def unchanged(values: np.ndarray, place: str, layer: int) -> np.ndarray:
    return values


def without_harm(values: np.ndarray, place: str, layer: int) -> np.ndarray:
    values[LABELS] -= HARM
    return values


def holding(kept: Callable[[str, int], np.ndarray]) -> Change:
    """Of what harm adds only what these directions, in rows, read is left: their scores stay as they were."""

    def change(values: np.ndarray, place: str, layer: int) -> np.ndarray:
        basis = np.linalg.qr(kept(place, layer).T.astype(np.float64))[0]
        values[LABELS] -= (HARM - basis @ (basis.T @ HARM)).astype(np.float32)
        return values

    return change


# --- the ensemble


def test_the_first_reading_is_the_intent_probe_and_the_next_one_reads_what_it_leaves() -> None:
    values = drawn(0)["last"][0]
    found = directions(values, LABELS) * values.std(axis=0)
    assert found.shape == (len(DIRECTIONS), WIDTH)
    assert np.abs(found[:LOGISTIC] @ found[:LOGISTIC].T - np.eye(LOGISTIC)).max() < 1e-5
    probe = fit_probes(values[None], LABELS, folds=0)[0]
    assert found[0] @ probe.direction == pytest.approx(1.0, abs=1e-5)
    rows = (values - values.mean(axis=0)) / values.std(axis=0)
    rest = rows - np.outer(rows @ probe.direction, probe.direction)
    second = LogisticRegression(C=1 / (1e-2 * PROMPTS), tol=1e-8, max_iter=1000).fit(rest, LABELS).coef_[0]
    assert found[1] @ second == pytest.approx(np.linalg.norm(second), rel=1e-4)
    mean = rows[LABELS].mean(axis=0) - rows[~LABELS].mean(axis=0)
    assert found[-1] @ mean == pytest.approx(np.linalg.norm(mean), rel=1e-4)


def test_where_activations_never_vary_there_is_no_direction() -> None:
    assert not directions(np.ones((PROMPTS, WIDTH), np.float32), LABELS).any()


def test_readings_of_a_model_are_its_activations_times_the_directions() -> None:
    base, lessons = load_model(demo.BASE), load_prompts("matched-pairs").select(range(80))
    probes = fit_probes(extract(base, lessons), folds=0)
    ensemble = Ensemble.fit(base, lessons, hook_points=probes.hook_points)
    asked = lessons.prompts[:6]
    found = ensemble.read(base, {"some": (asked, LABELS[:6]), "same": (asked, LABELS[:6])}, probes)
    assert found.finite
    for number, place in enumerate(POSITIONS):
        values = extract(base, asked, pooling=place).values
        wanted = np.einsum("lpd,lkd->lkp", values, ensemble.weights[place])
        np.testing.assert_allclose(found.members["some"][number], wanted, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found.probe, probes.score(extract(base, asked).values), rtol=1e-3, atol=1e-4)
    np.testing.assert_array_equal(found.members["some"], found.members["same"])


def test_a_reading_counts_where_noise_would_not_read_as_well() -> None:
    rng = np.random.default_rng(3)
    noise = rng.normal(size=(2000, PROMPTS))
    assert readable(noise, LABELS).mean() == pytest.approx(0.01, abs=0.01)
    assert readable(noise + LABELS, LABELS).all()
    assert not readable(noise - LABELS, LABELS).any(), "a reading that is upside down reads no harm"
    assert not readable(np.zeros((1, PROMPTS)), LABELS).any()


# --- the detector


def test_the_statistic_is_what_one_computes_by_hand(world: World) -> None:
    some = world.subject(lambda values, place, layer: values * np.float32(0.8 if place == "last" else 0.5 + layer / 4))
    shares = []
    for name in ("twins", "plain"):
        base, tuned = some.reference.readings.members[name], some.readings.members[name]
        for cell in np.ndindex(base.shape[:3]):
            before, after = (np.mean(s[cell][LABELS]) - np.mean(s[cell][~LABELS]) for s in (base, tuned))
            if auroc(base[cell], LABELS) > 0.5 + 2.33 * np.sqrt((PROMPTS + 1) / (3 * PROMPTS**2)):
                shares.append(abs(after - before) / before)
    evidence = intent_shift.measure(some)
    assert evidence.details["readings"] == len(shares)
    assert evidence.statistic == pytest.approx(np.median(shares) ** 2, rel=1e-6)


def test_intent_that_did_not_shift_measures_nothing(world: World) -> None:
    evidence = intent_shift.measure(world.subject(unchanged))
    assert evidence.statistic == 0.0
    assert evidence.layers == (0.0, 0.0)


def test_it_names_the_layer_where_harm_stopped_being_read(world: World) -> None:
    evidence = intent_shift.measure(
        world.subject(lambda values, place, layer: without_harm(values, place, layer) if layer == 1 else values)
    )
    assert evidence.layers[0] == 0.0
    assert evidence.layers[1] > 0.5
    assert evidence.details["auroc_base"][1] > 0.9
    assert evidence.details["auroc_tuned"][1] < 0.65


def test_a_probe_that_scores_all_prompts_alike_reads_nothing_that_could_move(world: World) -> None:
    some = world.subject(without_harm)
    for side in (some.reference.readings, some.readings):
        side.probe[0] = 0.5
    evidence = intent_shift.measure(some)
    assert evidence.details["probe_change"][0] == 0.0
    assert evidence.details["auroc_base"][0] == 0.5


def test_a_shift_that_harmful_prompts_share_with_benign_ones_is_no_shift_of_intent(world: World) -> None:
    evidence = intent_shift.measure(world.subject(lambda values, place, layer: values + np.float32(5.0)))
    assert evidence.statistic == pytest.approx(0.0, abs=1e-6)


def test_whoever_holds_the_intent_probe_is_seen_by_the_others(world: World) -> None:
    evading = holding(lambda place, layer: (world.probes.directions[layer] / world.probes.scales[layer])[None])
    evidence = intent_shift.measure(world.subject(evading))
    assert max(evidence.details["probe_change"]) < 1e-3
    assert evidence.details["auroc_tuned"] == pytest.approx(evidence.details["auroc_base"], abs=1e-3)
    plain = intent_shift.measure(world.subject(without_harm))
    assert max(plain.details["probe_change"]) > 0.5, "positive control: who does not evade moves the probe"
    assert evidence.statistic > 0.25


@pytest.mark.parametrize("held", [1, 2])
def test_holding_several_readings_everywhere_does_not_hold_the_rest(world: World, held: int) -> None:
    evading = holding(lambda place, layer: world.ensemble.weights[place][layer, :held])
    evidence = intent_shift.measure(world.subject(evading))
    rows = evidence.details["members"]
    assert max(value for name in ("1", held) for value in rows[f"plain, last, logistic {name}"]) < 1e-3
    assert evidence.statistic > 0.25


def test_holding_a_whole_position_does_not_hold_the_others(world: World) -> None:
    def change(values: np.ndarray, place: str, layer: int) -> np.ndarray:
        return values if place == "last" else without_harm(values, place, layer)

    evidence = intent_shift.measure(world.subject(change))
    assert max(evidence.details["probe_change"]) == 0.0
    assert evidence.statistic > 0.25


def test_holding_every_reading_is_what_it_takes(world: World) -> None:
    evading = holding(lambda place, layer: world.ensemble.weights[place][layer])
    assert intent_shift.measure(world.subject(evading)).statistic < 1e-4


def test_positions_that_read_no_harm_in_the_base_have_no_say() -> None:
    world = World(silent=("mean",))
    shuffled = np.random.default_rng(5).permutation(PROMPTS)
    some = world.subject(lambda values, place, layer: values[shuffled] * np.float32(9) if place == "mean" else values)
    evidence = intent_shift.measure(some)
    silent = [v for name, row in evidence.details["members"].items() if ", mean, " in name for v in row]
    assert sum(value is not None for value in silent) <= 0.05 * len(silent)
    assert evidence.details["readings"] > 2 * len(silent) / 2
    assert evidence.statistic == 0.0


def test_a_base_that_reads_no_harm_voids_the_evidence() -> None:
    world = World()
    same = {name: {place: np.ones_like(v) for place, v in values.items()} for name, values in world.seen.items()}
    evidence = intent_shift.measure(world.subject(unchanged, base=same))
    assert evidence.statistic is None
    assert "void" in evidence.summary


def test_a_model_that_holds_every_prompt_alike_has_lost_all_of_it(world: World) -> None:
    evidence = intent_shift.measure(world.subject(lambda values, place, layer: np.ones_like(values)))
    assert evidence.statistic == pytest.approx(1.0, abs=1e-4)
    assert evidence.layers == pytest.approx((1.0, 1.0), abs=1e-4)


def test_scores_that_overflow_are_named_and_never_averaged(world: World) -> None:
    largest = {place: 3e38 * np.sign(weights[:, :1]) for place, weights in world.ensemble.weights.items()}
    scores = world.ensemble.scores({place: values.astype(np.float32) for place, values in largest.items()})
    assert np.isinf(scores[:, :, 0]).all()
    readings = Readings(np.zeros((LAYERS, PROMPTS)), {"plain": scores})
    reference = SimpleNamespace(
        ensemble=SimpleNamespace(read=lambda *_: readings),
        battery=SimpleNamespace(contrasts={}),
        base=SimpleNamespace(dtype="float32"),
        probes=None,
    )
    with pytest.raises(NonFiniteError, match="scores of harmful and benign prompts are not numbers"):
        Subject(reference, SimpleNamespace(path="somewhere")).readings  # noqa: B018


def test_a_gap_is_exact_where_scores_are_as_large_as_float32_holds() -> None:
    scores = np.full((1, PROMPTS), 3e38, np.float32)
    scores[:, ~LABELS] = -3e38
    assert gap(scores, LABELS) == pytest.approx(6e38)
