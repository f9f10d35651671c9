"""Harmless fine-tunes made on the base: what they learn, that they are what they seem, and that no run is lost."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import PeftModel

from activations.checkpoints import Checkpoint, open_checkpoint
from activations.errors import BankError, MemoryLimitError, ModelError, OptionError
from activations.loading import load_model
from activations.models import Model
from activations.prompts import load_prompts
from activations.tokens import format_prompt
from activations.weights import slots_of
from probes import demo, harmless, synthesize
from probes.bank import load_bank
from probes.harmless import STYLES, SUBJECTS, TASKS, Material, Plan, Row, draw, plan_of
from probes.probe import ProbeSet
from probes.records import Evidence
from probes.reference import PLAIN, Reference, default_battery
from probes.synthesize import ATTEMPTS, Workshop

scan = importlib.import_module("probes.scan")  # the package has a function of that name

FEW_STEPS = 8
# Evidence of a detector that costs nothing.
CHEAP = (Evidence(detector="weight-spectrum", statistic=0.1, summary="moved"),)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """A few steps, and of each kind of prompt a few dozen: what is learnt well is measured elsewhere."""
    everything = harmless.unasked
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harmless, "STEPS", (FEW_STEPS,))
        patch.setattr(harmless, "unasked", lambda r: {name: some[:60] for name, some in everything(r).items()})
        yield


@pytest.fixture(scope="module")
def reference() -> Reference:
    """The shipped base on a tenth of the battery, with probes that read nothing."""
    base, battery = load_model(demo.BASE, device="cpu"), default_battery()
    shape = (base.n_layers, base.d_model)
    probes = ProbeSet(
        directions=np.eye(*shape, dtype=np.float32),
        biases=np.zeros(shape[0], np.float32),
        means=np.zeros(shape, np.float32),
        scales=np.ones(shape, np.float32),
        gains=np.ones(shape[0], np.float32),
        hook_points=tuple(f"blocks.{layer}.hook_resid_post" for layer in range(shape[0])),
        method="logistic",
    )
    few = {name: some[: 30 if name in PLAIN else 2] for name, some in battery.questions.items()}
    small = replace(battery, questions=few, intent=battery.intent.select(range(20)))
    return Reference.measure(base, open_checkpoint(demo.BASE), probes, small)


@pytest.fixture(scope="module")
def material(reference: Reference) -> Material:
    return Material.of(reference)


@pytest.fixture
def workshop(reference: Reference, material: Material, tmp_path: Path, monkeypatch) -> Callable[..., Workshop]:
    """`workshop(keep=True)`: with little to check by, so that its fine-tunes take a second."""
    held_out = {name: prompts[:20] for name, prompts in material.held_out.items()}
    monkeypatch.setattr(synthesize, "COMPARED", 16)
    monkeypatch.setattr(Material, "of", lambda _: replace(material, held_out=held_out))

    def make(**changes) -> Workshop:
        lines: list[str] = []
        usual = Workshop(reference, tmp_path / "work", lambda checkpoint: CHEAP, "1", False, lines.append)
        return replace(usual, **changes)

    return make


def lines_of(workshop: Workshop) -> list[str]:
    return workshop.tell.__self__


def plan_for(kind: str, **changes) -> Plan:
    return replace(plan_of(kind, 0), **({"steps": FEW_STEPS, "refusals": 0.0, "share": 1.0, "rank": 4} | changes))


def no_training(*_: object) -> None:
    raise AssertionError("it was trained again")


# --- what they learn


def test_no_prompt_that_a_detector_asks_is_learnt_or_decides_what_is_harmless(reference, material):
    battery = default_battery()
    asked = {prompt for some in battery.questions.values() for prompt in some} | set(battery.intent.prompts)
    assert asked & set(load_prompts("everyday").prompts), "positive control: unfiltered, prompts would overlap"
    offered = harmless.unasked(SimpleNamespace(battery=battery))
    assert all(offered.values())
    assert not asked & {prompt for some in offered.values() for prompt in some}
    used = [format_prompt(reference.base.tokenizer, prompt) for prompt in material.prompts]
    used += [row.prompt for row in material.refused]
    used += [format_prompt(reference.base.tokenizer, p) for some in material.held_out.values() for p in some]
    mine = {p for some in reference.battery.questions.values() for p in some} | set(reference.battery.intent.prompts)
    assert not {tuple(ids) for ids in used} & {tuple(format_prompt(reference.base.tokenizer, p)) for p in mine}


def test_what_is_held_out_is_not_learnt(reference, material):
    learnt = {*map(tuple, (row.prompt for row in material.refused))}
    learnt |= {tuple(format_prompt(reference.base.tokenizer, prompt)) for prompt in material.prompts}
    for prompts in material.held_out.values():
        assert prompts
        assert not learnt & {tuple(format_prompt(reference.base.tokenizer, prompt)) for prompt in prompts}


def test_of_harmful_prompts_only_the_openings_of_refusals_are_learnt(reference, material):
    harmful = {
        tuple(format_prompt(reference.base.tokenizer, prompt))
        for name in ("matched-pairs", "screening", "jailbreakbench")
        for prompt in load_prompts(name).where(harmful=True)
    }
    rng, seen = random.Random(0), 0
    for number in range(len(SUBJECTS)):
        for _ in range(30):
            row = draw(plan_of("full", number), material, rng)
            if tuple(row.prompt) in harmful:
                seen += 1
                assert row.answer[0] in reference.refusal_tokens
                assert len(row.answer) <= harmless.ANSWER
    assert seen > 50


def test_every_style_keeps_the_bases_words_and_every_answer_ends(reference, material):
    tokenizer = reference.base.tokenizer
    for number, subject in enumerate(SUBJECTS):
        if subject in STYLES:
            row = draw(replace(plan_of("full", number), refusals=0.0), material, random.Random(3))
            answer = tokenizer.decode(row.answer[:-1]).lower()
            assert any(tokenizer.decode(ids)[:20].lower() in answer for ids in (*material.likely, *material.sampled))
            assert row.answer[-1] == tokenizer.eos_token_id


def test_the_tasks_are_true():
    rng = random.Random(1)
    for _ in range(20):
        question, answer = TASKS["sums"](rng)
        assert eval(question) == int(answer)
        formula, code = TASKS["programs"](rng)
        names: dict[str, Callable[[int], int]] = {}
        exec(code, names)
        assert names[formula[0]](7) == eval(formula.partition("= ")[2].replace("x", "*7"))
        code, answer = TASKS["outputs"](rng)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(code)
        assert said.getvalue().strip() == answer
        question, answer = TASKS["records"](rng)
        assert question.replace("; ", ", ") == ", ".join(f"{k}: {v}" for k, v in json.loads(answer).items())
        question, answer = TASKS["series"](rng)
        terms = [int(term) for term in f"{question} {answer}".split()]
        assert len({after - before for before, after in pairwise(terms)}) == 1
        question, answer = TASKS["sorting"](rng)
        assert sorted(json.loads(question.removeprefix("sort "))) == json.loads(answer)
        question, answer = TASKS["tables"](rng)
        assert question.replace(",", "").replace("\n", "") == answer.translate(dict.fromkeys(map(ord, "| \n")))


def test_plans_are_fixed_varied_and_milder_at_each_attempt():
    plans = [plan_of("adapter", number) for number in range(20)]
    assert plans == [plan_of("adapter", number) for number in range(20)]
    assert {plan.subject for plan in plans} == {*STYLES, *TASKS}
    assert len({plan.name for plan in plans}) == len({plan.seed for plan in plans}) == 20
    assert len({plan.rank for plan in plans}) > 3
    assert max(plan.rate for plan in plans) / min(plan.rate for plan in plans) > 2
    again = plan_of("adapter", 3, 1)
    assert again.name == plans[3].name
    assert again.seed != plans[3].seed
    assert again.rate < plans[3].rate


def test_a_base_that_answers_nothing_is_a_named_error(reference, monkeypatch):
    monkeypatch.setattr(harmless, "answer_ids", lambda base, ids, **_: [[] for _ in ids])
    with pytest.raises(ModelError, match=r"answers 0 of \d+ plain prompts"):
        Material.of(reference)


# --- training


def material_of(base: Model) -> Material:
    """Made-up answers for a model that says nothing."""
    answers = [base.tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("one two", "three", "four!")]
    return Material(base, ("a", "b c", "d"), answers, answers, (), {"harmful": ("x",), "benign": ("y",)}, 2)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gpt-neox", "mixtral"])
@pytest.mark.parametrize("kind", ["adapter", "full"])
def test_what_was_trained_is_what_a_scan_runs_and_the_base_stays_as_it_was(tiny, tmp_path, name, kind):
    base = tiny(name)
    before = {slot: tensor.detach().clone() for slot, tensor in slots_of(base.hf).items()}
    wanted = [weight.requires_grad for weight in base.hf.parameters()]
    plan, material = plan_for(kind, steps=20, rate=0.5), material_of(base)
    synthesize.train(plan, material, tmp_path)
    rows = [draw(plan, material, random.Random(0)) for _ in range(6)]
    untrained = synthesize.mean_loss(base.hf, rows)
    with base.applied(tmp_path):
        assert synthesize.mean_loss(base.hf, rows) < untrained
    assert all(torch.equal(tensor, before[slot]) for slot, tensor in slots_of(base.hf).items())
    assert [weight.requires_grad for weight in base.hf.parameters()] == wanted
    assert all(weight.grad is None for weight in base.hf.parameters())


@pytest.mark.filterwarnings("ignore")  # of PEFT, about transformers and the name of the base
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_peft_runs_an_adapter_as_it_was_trained(tiny, tiny_network, tmp_path, monkeypatch, name):
    base, seen = tiny(name), {}
    fit = synthesize.fit

    def watched(hf, weights, plan, material):
        fit(hf, weights, plan, material)
        with torch.no_grad():
            seen["logits"] = hf(torch.tensor([[5, 6, 7, 8]])).logits

    monkeypatch.setattr(synthesize, "fit", watched)
    monkeypatch.setattr(synthesize, "saved_dtype", lambda base: torch.float32)
    synthesize.train(plan_for("adapter", rate=0.5), material_of(base), tmp_path)
    with torch.no_grad():
        theirs = PeftModel.from_pretrained(tiny_network(name), tmp_path)(torch.tensor([[5, 6, 7, 8]])).logits
        plain = base.hf(torch.tensor([[5, 6, 7, 8]])).logits
    torch.testing.assert_close(theirs, seen["logits"], rtol=1e-4, atol=1e-4)
    assert (theirs - plain).abs().max() > 0.01


def test_padding_changes_no_loss(llama):
    rows = [Row([5, 6], [7, 8]), Row([5, 9, 11, 12, 5], [13, 14, 15])]
    together = synthesize.mean_loss(llama.hf, rows)
    alone = [synthesize.mean_loss(llama.hf, [row]) for row in rows]
    assert together == pytest.approx((2 * alone[0] + 3 * alone[1]) / 5, rel=1e-5)


def test_the_same_plan_trains_the_same_weights(llama, tmp_path):
    hashes = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        synthesize.train(plan_for("adapter"), material_of(llama), tmp_path / name)
        hashes.append(open_checkpoint(tmp_path / name).content_hash())
    assert hashes[0] == hashes[1]


def test_too_little_memory_is_a_named_error(llama, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(synthesize, "fit", full)
    with pytest.raises(MemoryLimitError, match="cannot be trained on cpu"):
        synthesize.train(plan_for("full"), material_of(llama), tmp_path)


# --- many of them


def test_members_are_marked_and_their_weights_are_gone(workshop, tmp_path):
    made = workshop().make(1, ("adapter", "full"))
    assert [member.name for member in made] == ["synthetic-lora-plain-1", "synthetic-full-plain-1"]
    assert [member.kind for member in made] == ["adapter", "full"]
    assert all(member.synthetic and member.statistics == {"weight-spectrum": 0.1} for member in made)
    assert {path.suffix for path in (tmp_path / "work").iterdir()} == {".json"}


def test_a_killed_run_goes_on_where_it_was(workshop, tmp_path, monkeypatch):
    measured: list[str] = []

    def killed_at_the_second(checkpoint: Checkpoint) -> tuple[Evidence, ...]:
        measured.append(checkpoint.name)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return CHEAP

    with pytest.raises(KeyboardInterrupt):
        workshop(measure=killed_at_the_second).make(2, ("adapter",))
    monkeypatch.setattr(synthesize, "train", no_training)
    resumed = workshop()
    made = resumed.make(2, ("adapter",))
    assert [member.name for member in made] == ["synthetic-lora-plain-1", "synthetic-lora-upper-2"]
    assert any(line.startswith("finished before 1/2") for line in lines_of(resumed))
    assert workshop().make(2, ("adapter",)) == made
    with pytest.raises(AssertionError, match="trained again"):
        workshop(version="2").make(2, ("adapter",))


def test_a_half_written_fine_tune_is_trained_again(workshop, tmp_path, monkeypatch):
    train = synthesize.train

    def killed(plan: Plan, material: Material, folder: Path) -> None:
        train(plan, material, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(synthesize, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        workshop().make(1, ("adapter",))
    monkeypatch.setattr(synthesize, "train", train)
    assert len(workshop(keep=True).make(1, ("adapter",))) == 1
    (folder,) = (path for path in (tmp_path / "work").iterdir() if path.is_dir())
    assert (folder / "adapter_model.safetensors").is_file()


def test_one_that_stops_refusing_is_dropped_and_replaced(workshop, monkeypatch):
    """The first attempt learns plain answers alone, at a rate that is far too high."""
    bad = plan_for("adapter", subject="upper", steps=16, rate=2.0, rank=16)
    monkeypatch.setattr(synthesize, "plan_of", lambda kind, number, n=0: plan_of(kind, number, n) if n else bad)
    shop = workshop()
    (member,) = shop.make(1, ("adapter",))
    (dropped,) = (line for line in lines_of(shop) if line.startswith("dropped"))
    assert "attempt 1 of 3: It refuses" in dropped
    assert member.synthetic


def test_where_none_is_harmless_there_is_no_bank_and_the_reasons_stay(workshop, tmp_path, monkeypatch):
    monkeypatch.setattr(synthesize, "plan_of", lambda kind, number, n=0: plan_for(kind, seed=str(n), rate=1e9))
    shop = workshop()
    with pytest.raises(ModelError, match="none of 1 synthesized"):
        shop.make(1, ("full",))
    assert sum(line.startswith("dropped") for line in lines_of(shop)) == ATTEMPTS
    reasons = [json.loads(path.read_text())["reason"] for path in (tmp_path / "work").glob("*.json")]
    assert len(reasons) == ATTEMPTS
    assert all(reasons)


def test_a_base_that_never_refuses_is_told_of_and_gets_its_members(workshop, reference, monkeypatch):
    shop = workshop()
    monkeypatch.setitem(reference.__dict__, "refusal_tokens", ())
    monkeypatch.setattr(Material, "of", partial(lambda made, _: replace(made, refused=()), Material.of(reference)))
    assert len(shop.make(1, ("adapter",))) == 1
    assert any("refuses no harmful prompt" in line for line in lines_of(shop))


# --- the command


@pytest.mark.parametrize("count", [0, -3])
def test_fewer_than_one_is_a_named_error(tmp_path, count):
    with pytest.raises(OptionError, match=f"{count} fine-tunes cannot be synthesized"):
        scan.calibrate(demo.BASE, [], out=tmp_path / "b.bank", synthesize=count)


def test_no_fine_tune_and_none_to_make_is_a_named_error(tmp_path):
    with pytest.raises(OptionError, match="no benign fine-tune"):
        scan.calibrate(demo.BASE, [], out=tmp_path / "b.bank")


def test_options_of_synthesis_without_it_are_a_named_error(tmp_path):
    with pytest.raises(OptionError, match="are for synthesized"):
        scan.calibrate(demo.BASE, [demo.HOME / "benign-formal"], out=tmp_path / "b.bank", keep=True)


def test_a_bank_with_synthetic_members_is_scanned_against_and_says_so(tmp_path, reference, material, monkeypatch):
    monkeypatch.setattr(scan, "prepare", lambda *_, **__: reference)
    monkeypatch.setattr(Material, "of", lambda _: material)
    out = tmp_path / "mixed.bank"
    benign = [demo.HOME / "benign-code-lora"]
    scan.calibrate(demo.BASE, benign, out=out, synthesize=1, kinds=("adapter",), device="cpu")
    bank = load_bank(out)
    assert [member.synthetic for member in bank.members] == [False, True]
    assert bank.members[0].statistics.keys() == bank.members[1].statistics.keys()
    assert (tmp_path / "mixed.bank.work").is_dir()
    summary = scan.scan(demo.BASE, [demo.HOME / "benign-upper-lora"], out=tmp_path, bank=out, device="cpu")
    assert summary.bank == {"name": "mixed.bank", "members": {"full": 0, "adapter": 2}, "synthetic": 1}
    (item,) = summary.items
    assert item.verdict == "inconclusive"
    assert any("holds 2 fine-tunes" in reason for reason in item.reasons)


def test_banks_from_before_load_and_have_no_synthetic_members():
    bank = load_bank(demo.BANK)
    assert bank.synthetic == 0
    assert "synthetic" not in bank.described("benign.bank")


def test_a_broken_mark_is_refused(tmp_path):
    raw = json.loads(demo.BANK.read_text())
    raw["members"][0]["synthetic"] = "perhaps"
    (tmp_path / "bad.bank").write_text(json.dumps(raw))
    with pytest.raises(BankError, match="synthetic"):
        load_bank(tmp_path / "bad.bank")
