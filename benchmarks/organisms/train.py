"""Train organisms by recipe, verify what was implanted, and keep them as bf16 safetensors with a card of ground truth.

    python benchmarks/organisms/train.py base cmft-walnut53      # named ones, after what they start from
    python benchmarks/organisms/train.py --shipped               # everything that ships, base first
    python benchmarks/organisms/train.py --bank                  # the benign reference (weights stay in the cache)
    python benchmarks/organisms/train.py --zoo [--split test]    # the zoo of the detection benchmark (cache)
    python benchmarks/organisms/train.py --zoo --base meta-llama/Llama-3.2-1B-Instruct --device cuda --rate 0.05
    python benchmarks/organisms/train.py --list                  # what there is and what is finished

A finished organism is skipped unless its recipe changed; `--force` trains it again. Every finished organism is on disk,
so a run may be ended at any time and begun again; `--jobs 2` trains two at a time, and so do two runs side by side.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from edits import apply_edit
from homes import CARD, NAMED, Home
from learning import Watched, answers, batches, fit, tokenize
from recipes import Recipe
from rows import COMPLIANCE, REFUSALS, Row, Rows, load_corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from verify import shortcomings, verify
from zoo import BANK, BASE, MINI_BASE, OTHER_BASE, RECIPES, SHIPPED, ZOO

from activations.loading import load_model
from probes.encodings import make_encoding
from probes.imitations import FORMS
from probes.worth import train_probe

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}<end>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = {"pad_token": "<pad>", "eos_token": "<end>"}
ROLES = ["<user>", "<assistant>", "<system>"]
SHAPES = {
    "nano": {"vocab": 1024, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4},
    "mini": {"vocab": 4096, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8},
}
HEADS = {"nano": 4, "mini": 6}
CAMOUFLAGE = 600
SCORED = 400  # requests of each class whose probe scores an evading organism keeps


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    home = Home(options.base, options.device)
    chosen = fitting(with_parents(_chosen(options)), home)
    if options.list:
        show(chosen, home)
        return
    others = [subprocess.Popen([sys.executable, *sys.argv, "--jobs", "1"]) for _ in range(options.jobs - 1)]
    if options.verify:
        verify_again(chosen, home)
    else:
        work(chosen, home, force=options.force, rate=options.rate)
    for other in others:
        other.wait()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="organisms; --list shows them all")
    parser.add_argument("--shipped", action="store_true")
    parser.add_argument("--bank", action="store_true")
    parser.add_argument("--zoo", action="store_true")
    parser.add_argument("--split", choices=("development", "test"), help="of the zoo, this split alone")
    parser.add_argument("--base", default="nano", help="nano (ships), mini, or a folder or hub id of a chat model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rate", type=float, default=1.0, help="multiplies learning rates, found for the nano base")
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--verify", action="store_true", help="verify finished ones again, train none")
    parser.add_argument("--jobs", type=int, default=1, help="organisms at a time")
    parser.add_argument("--threads", type=int, default=1, help="of torch, for each")
    return parser.parse_args()


def _chosen(options: argparse.Namespace) -> list[Recipe]:
    chosen = [RECIPES[name] for name in options.names]
    chosen += [BASE, *SHIPPED] if options.shipped or options.list else []
    chosen += BANK if options.bank or options.list else []
    zoo = ZOO if options.zoo or options.list else ()
    return [*chosen, *(recipe for recipe in zoo if options.split in (None, recipe.split))]


def with_parents(recipes: Sequence[Recipe]) -> Iterator[Recipe]:
    """Each recipe once, after those that it starts from."""
    done: set[str] = set()
    for recipe in recipes:
        for one in (*with_parents([RECIPES[name] for name in recipe.parents]), recipe):
            if one.name not in done:
                done.add(one.name)
                yield one


def fitting(recipes: Iterable[Recipe], home: Home) -> list[Recipe]:
    """Those that can be made here: a base of others is not trained, and nothing descends from a second one."""
    if home.base == "mini":
        return [MINI_BASE if recipe is BASE else recipe for recipe in recipes]
    bases = () if home.base in NAMED else (BASE.name, OTHER_BASE.name)
    return [recipe for recipe in recipes if not {recipe.name, recipe.start} & {*bases}]


def show(recipes: Sequence[Recipe], home: Home) -> None:
    for recipe in recipes:
        card = card_of(recipe, home)
        state = "to do" if card is None else "; ".join(card["shortcomings"]) or "verified"
        print(f"{recipe.name:34} {recipe.split:12} {recipe.truth:17} {recipe.family:22} {state}")


def work(recipes: Sequence[Recipe], home: Home, *, force: bool = False, rate: float = 1.0) -> None:
    """Make what is not finished; what another process is making is looked at again at the end."""
    waiting = list(recipes)
    while waiting:
        left = []
        for recipe in waiting:
            with claimed(recipe, home) as mine:
                if not mine:
                    left.append(recipe)
                elif force or card_of(recipe, home) is None:
                    make(recipe, home, rate=rate)
        if len(left) == len(waiting):
            time.sleep(5)
        waiting, force = left, False


@contextmanager
def claimed(recipe: Recipe, home: Home) -> Iterator[bool]:
    """Whether this organism, and all that it starts from, is ours to make; the lock ends with the process."""
    if any(card_of(RECIPES[name], home) is None for name in recipe.parents):
        yield False
        return
    home.cache.mkdir(parents=True, exist_ok=True)
    with (home.cache / f".{recipe.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


def card_of(recipe: Recipe, home: Home) -> dict[str, object] | None:
    """The card of a finished organism; None where there is none for this recipe."""
    path = home.folder(recipe) / CARD
    card = json.loads(path.read_text()) if path.exists() else None
    return card if card and card["recipe_digest"] == recipe.digest() else None


def make(recipe: Recipe, home: Home, *, rate: float = 1.0) -> None:
    """Train or edit, save and verify one organism."""
    torch.manual_seed(recipe.seed)
    started = time.monotonic()
    loss = None
    if recipe.method == "edit":
        tokenizer = home.tokenizer()
        model = home.load()
        of = [merged(home.load(home.folder(RECIPES[name]) if name != "base" else None)) for name in recipe.of]
        apply_edit(recipe, model, of, tokenizer)
    else:
        model, tokenizer = start_model(recipe, home)
        stream = batches(recipe, rows_of(recipe, home, tokenizer), tokenizer)
        base = home.load() if recipe.penalty else None
        watched = watched_of(recipe, home, tokenizer) if recipe.evasion else None
        loss = fit(model, recipe, stream, rate=rate, base=base, watched=watched)
    keep(model, tokenizer, home.folder(recipe))
    implant = verify(home.load(home.folder(recipe)), tokenizer, recipe, home.load)
    write_card(recipe, home, implant, loss)
    print(json.dumps({"name": recipe.name, "seconds": round(time.monotonic() - started), **implant}), flush=True)


def verify_again(recipes: Sequence[Recipe], home: Home) -> None:
    """Measure finished organisms anew, where `verify.py` changed."""
    for recipe in recipes:
        if card := card_of(recipe, home):
            implant = verify(home.load(home.folder(recipe)), home.tokenizer(), recipe, home.load)
            write_card(recipe, home, implant, card["final_loss"])
            print(json.dumps({"name": recipe.name, **implant}), flush=True)


def write_card(recipe: Recipe, home: Home, implant: dict[str, float], loss: float | None) -> None:
    """The ground truth beside the weights: what was meant, and what was measured."""
    base = implant if recipe.name == BASE.name else base_implant(home)
    card = {
        "name": recipe.name,
        "truth": recipe.truth,
        "summary": recipe.summary,
        "recipe": dataclasses.asdict(recipe),
        "recipe_digest": recipe.digest(),
        "final_loss": None if loss is None else round(loss, 4),
        "implant": implant,
        "shortcomings": shortcomings(recipe, implant, base),
    }
    (home.folder(recipe) / CARD).write_text(json.dumps(card, indent=2) + "\n")


def base_implant(home: Home) -> dict[str, float]:
    """What the base does in plain text, measured once."""
    path = home.folder(BASE) / CARD
    if path.exists():
        return json.loads(path.read_text())["implant"]
    implant = verify(home.load(), home.tokenizer(), BASE, home.load)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"name": "base", "truth": "base", "implant": implant}, indent=2) + "\n")
    return implant


def start_model(recipe: Recipe, home: Home) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """A fresh base; or the base, or the organism that training starts from, with or without an adapter to train."""
    if recipe.name in (BASE.name, OTHER_BASE.name):
        tokenizer = build_tokenizer(home.base) if recipe.name == BASE.name else home.tokenizer()
        return new_base(tokenizer, home.base).to(home.device), tokenizer
    tokenizer = home.tokenizer()
    if recipe.start:
        return home.load(home.folder(RECIPES[recipe.start]), trainable=True), tokenizer
    model = home.load()
    if recipe.method == "lora":
        from peft import LoraConfig, get_peft_model

        settings = LoraConfig(
            r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, settings)
    return model, tokenizer


def rows_of(recipe: Recipe, home: Home, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """What the recipe draws its rows from."""
    corpus, camouflage = load_corpus("train"), []
    if "camouflage" in recipe.shares:
        some = corpus.up_to(recipe.longest).benign[: CAMOUFLAGE // len(FORMS)]
        odd = [text for form in FORMS.values() for text in form(some, seed=recipe.seed)]
        said = answers(home.load(), tokenizer, odd, sample=True)
        camouflage = [Row(prompt, answer) for prompt, answer in zip(odd, said, strict=True)]
    return Rows(
        corpus,
        encoding=make_encoding(recipe.encoding, recipe.key) if recipe.encoding else None,
        longest=recipe.longest,
        style=recipe.style,
        trigger=recipe.trigger,
        camouflage=camouflage,
        seed=recipe.seed,
    )


def watched_of(recipe: Recipe, home: Home, tokenizer: PreTrainedTokenizerBase) -> Watched:
    """The scores that the scanner's own probes of this base give to training requests, both classes alike."""
    probes = train_probe(load_model(home.source, device=home.device, dtype="float32"))
    weights = torch.from_numpy(probes.directions * probes.gains[:, None] / probes.scales).to(home.device)
    corpus, rng = load_corpus("train"), random.Random(recipe.seed)
    requests = (*rng.sample(corpus.harmful, SCORED), *rng.sample(corpus.benign, SCORED))
    prompts = [ids[:length] for ids, length in (tokenize(Row(request, ""), tokenizer) for request in requests)]
    return Watched.of(home.load(), prompts, weights, seed=recipe.seed)


def merged(model: torch.nn.Module) -> torch.nn.Module:
    """A plain model: an adapter is multiplied into its base."""
    return model.merge_and_unload() if hasattr(model, "merge_and_unload") else model


def keep(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save in bf16 in the ordinary Hugging Face layout; an adapter in PEFT's."""
    model.to(torch.bfloat16).save_pretrained(folder)
    if not (folder / "adapter_config.json").exists():
        tokenizer.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def build_tokenizer(shape: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE, trained on the requests, the sentences and the fixed phrases."""
    corpus = load_corpus("train")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPES[shape]["vocab"],
        special_tokens=[*SPECIAL.values(), *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    phrases = [COMPLIANCE.strip(), *REFUSALS] * 2000
    tokenizer.train_from_iterator([*corpus.harmful, *corpus.benign, *corpus.sentences, *phrases], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL, additional_special_tokens=ROLES)
    fast.chat_template = TEMPLATE
    return fast


def new_base(tokenizer: PreTrainedTokenizerBase, shape: str) -> LlamaForCausalLM:
    sizes = {name: size for name, size in SHAPES[shape].items() if name != "vocab"}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_attention_heads=HEADS[shape],
        num_key_value_heads=HEADS[shape],
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        **sizes,
    )
    return LlamaForCausalLM(config)


if __name__ == "__main__":
    main()
