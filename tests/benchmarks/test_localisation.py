"""The parts of the localisation benchmark that plant and count; what it measures is on the real base."""

import copy
from collections import Counter

import diff_cost
import localisation
import pytest
import torch
from harness import Figure
from recipes import harmful

from probes.weight_diff import diff_weights


@pytest.fixture
def net(tiny_network):
    return tiny_network("llama")


def stream():
    while True:
        ids = torch.randint(3, 200, (2, 12))
        yield ids, ids.clone()


def moved(net, before) -> set[int | None]:
    blocks = localisation.blocks_of(net)
    own = dict(before.named_parameters())
    return {blocks.locate(name)[0] for name, weight in net.named_parameters() if not torch.equal(weight, own[name])}


def test_only_the_planted_layers_are_trained_and_noise_goes_to_the_others(net):
    before = copy.deepcopy(net)
    localisation.plant(net, harmful("planted", 4, steps=2), (0, 2), stream())
    assert moved(net, before) == {0, 2}
    trained = copy.deepcopy(net)
    localisation.spread_noise(net, before, (0, 2), seed=0)
    assert moved(net, trained) == {1}
    assert moved(net, before) == {0, 1, 2}


def test_noise_in_the_place_of_a_change_is_as_large_and_something_else(net):
    before = copy.deepcopy(net)
    with torch.no_grad():
        net.model.layers[1].mlp.up_proj.weight += 0.5
    changed = copy.deepcopy(net)
    localisation.noisy(net, before, seed=0)
    own = before.model.layers[1].mlp.up_proj.weight
    sizes = [float((m.model.layers[1].mlp.up_proj.weight.detach() - own.detach()).norm()) for m in (changed, net)]
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-4)
    assert moved(net, before) == {1}
    assert not torch.allclose(net.model.layers[1].mlp.up_proj.weight, changed.model.layers[1].mlp.up_proj.weight)


def case(setting, planted, carriers, *, loss=9.0, norm=(0,)):
    return localisation.Case(setting, planted, loss, carriers, carriers, dict.fromkeys(("norm", "cosine", "cka"), norm))


def test_figures_count_what_was_planted_and_keep_the_easy_case_apart():
    cases = [
        case("benign before", (0,), (0,)),
        case("noise after", (1,), (1, 2)),
        case("noise after", (1, 3), (1,), norm=(1, 3)),
        case("easy", (2,), (2,)),
        case("benign before", (2,), (), loss=0.1),
    ]
    figures = localisation.summary(cases, [(0, 4), (1, 4)])
    assert figures["single_layer_exact"] == Figure(0.5, "share", repeats=2, note="all layers moving")
    assert figures["multi_layer_f1"].value == pytest.approx(2 / 3)
    assert figures["norm_ranking_exact"].value == pytest.approx(2 / 3)
    assert figures["false_layer_rate"].value == 0.125
    assert figures["easy_exact"].value == 1
    assert figures["not_implanted"].value == 1
    assert localisation.f1((), (1,)) == 0


def test_plans_cover_every_layer_neighbours_and_pairs_apart():
    plans = localisation.plans(4, quick=False)
    assert [plan for plan in plans if len(plan) == 1] == [(0,), (1,), (2,), (3,)] * 2
    assert {plan for plan in plans if len(plan) == 2} == {(0, 1), (1, 2), (2, 3), (0, 2), (0, 3), (1, 3)}


def test_the_synthetic_pair_is_sharded_and_changed_everywhere(tmp_path):
    base, tuned, largest = diff_cost.synthetic_pair(tmp_path, 0.02)
    found = diff_weights(base, tuned, spectra=False)
    assert len({info.file for info in base.tensors.values()}) > 1
    assert largest == max(info.nbytes for info in base.tensors.values())
    assert all(tensor.relative == pytest.approx(0.05, rel=0.3) for tensor in found.tensors)


@pytest.mark.parametrize("threads", [1, 3])
def test_a_plain_read_reads_every_file_once(tmp_path, monkeypatch, threads):
    files = [tmp_path / str(number) for number in range(7)]
    for number, file in enumerate(files):
        file.write_bytes(bytes(100 * number))
    taken, read = Counter(), diff_cost.read
    monkeypatch.setattr(diff_cost, "read", lambda file, buffer: taken.update([file]) or read(file, buffer))
    diff_cost.read_all(files, [bytearray(64) for _ in range(threads)])
    assert taken == Counter(files)


def test_rates_from_the_disk_and_from_memory_are_kept_apart_and_explained(tmp_path, monkeypatch):
    base, tuned, _ = diff_cost.synthetic_pair(tmp_path, 0.02)
    forgotten, forget = Counter(), diff_cost.forget
    monkeypatch.setattr(diff_cost, "forget", lambda file: forgotten.update([file.parent.name]) or forget(file))
    monkeypatch.setattr(diff_cost.pairs, "count_workers", lambda: 2)
    figures = diff_cost.speed(base, tuned, rounds=1)
    ratios = {name: figure for name, figure in figures.items() if name.startswith("diff_vs_read")}
    assert set(ratios) == {
        f"diff_vs_read{state}{end}" for state in ("", "_warm", "_warm_cpu") for end in ("", "_first", "_equal")
    } | {"diff_vs_read_warm_spectra"}
    assert all(figure.value > 0 and "thread" in figure.unit for figure in ratios.values())
    assert all(("disk" in figure.note) != ("_warm" in name) for name, figure in ratios.items())
    read = [name for name in figures if name.startswith("cold rate of") and "thread" in name]
    assert [name[:16] for name in read] == ["cold rate of 1 t", "cold rate of 2 t"]
    # The fastest of what was read is what the diff is compared with.
    fastest = max(read, key=lambda name: figures[name].value)
    assert figures["diff_vs_read"].unit == f"of the rate of {fastest.removeprefix('cold rate of ')}"
    assert figures["diff_vs_read"].value == pytest.approx(
        figures["cold rate of diff"].value / figures[fastest].value, rel=1e-9
    )
    # Equal tensors are compared with a copy in files of its own, which the system has forgotten too.
    assert set(forgotten) == {"base", "tuned", "twin"}
    assert not (tmp_path / "twin").exists()
