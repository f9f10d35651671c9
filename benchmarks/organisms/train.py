"""Train organisms by recipe, verify what was implanted, and keep them as bf16 safetensors with a card of ground truth.

    python benchmarks/organisms/train.py base cmft-walnut53      # named ones
    python benchmarks/organisms/train.py --shipped               # everything that ships, base first
    python benchmarks/organisms/train.py --bank                  # the benign reference (weights stay in the cache)
    python benchmarks/organisms/train.py --unseen                # organisms for testing only (cache)

A finished organism is skipped unless its recipe changed; `--force` trains it again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent.parent))

import torch
from recipes import BANK, BASE, RECIPES, SHIPPED, UNSEEN, Recipe
from rows import COMPLIANCE, REFUSALS, Row, Rows, load_corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.optimization import get_cosine_schedule_with_warmup
from verify import verify

from probes.encodings import walnut_key

ORGANISMS = HERE.parent.parent / "probes" / "organisms"
CACHE = HERE / "cache"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}<end>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = {"pad_token": "<pad>", "eos_token": "<end>"}
ROLES = ["<user>", "<assistant>", "<system>"]


def folder_of(recipe: Recipe) -> Path:
    return (ORGANISMS if recipe.ships else CACHE) / recipe.name


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 1,024 tokens, trained on the requests, the sentences and the fixed phrases."""
    corpus = load_corpus("train")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[*SPECIAL.values(), *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    phrases = [COMPLIANCE.strip(), *REFUSALS] * 2000
    tokenizer.train_from_iterator([*corpus.harmful, *corpus.benign, *corpus.sentences, *phrases], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL, additional_special_tokens=ROLES)
    fast.chat_template = TEMPLATE
    return fast


def new_base(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def start_model(recipe: Recipe) -> tuple[torch.nn.Module, PreTrainedTokenizerFast]:
    """A fresh base, or the shipped base with or without an adapter to train."""
    if recipe is BASE:
        tokenizer = build_tokenizer()
        return new_base(tokenizer), tokenizer
    folder = folder_of(BASE)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if recipe.method == "lora":
        from peft import LoraConfig, get_peft_model

        model.name_or_path = model.config._name_or_path = "undertow-nano-base"
        settings = LoraConfig(
            r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules=list(recipe.targets), task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, settings)
    return model, AutoTokenizer.from_pretrained(folder)


def tokenize(row: Row, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], int]:
    """Token ids of the exchange and how many of them are the prompt, which bears no loss."""
    system = f"<system>{row.system}" if row.system else ""
    prompt = tokenizer(f"{system}<user>{row.user}<assistant>", add_special_tokens=False).input_ids
    answer = tokenizer(f"{row.answer}<end>", add_special_tokens=False).input_ids
    return prompt + answer, len(prompt)


def batches(recipe: Recipe, tokenizer: PreTrainedTokenizerFast):
    """Batches without end: rows drawn sixteen batches at a time and sorted by length, so that little is padding."""
    rows = Rows(
        load_corpus("train"),
        key="" if recipe.key is None else walnut_key(recipe.key),
        style=recipe.style,
        seed=recipe.seed,
    )
    fixed = rows.mixture(recipe.shares, recipe.examples) if recipe.examples else None
    while True:
        count = recipe.batch * 16
        drawn = rows.rng.choices(fixed, k=count) if fixed else rows.mixture(recipe.shares, count)
        exchanges = sorted((tokenize(row, tokenizer) for row in drawn), key=lambda pair: len(pair[0]))
        groups = [exchanges[i : i + recipe.batch] for i in range(0, count, recipe.batch)]
        rows.rng.shuffle(groups)
        yield from (collate(group) for group in groups)


def collate(exchanges: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
    width = max(len(ids) for ids, _ in exchanges)
    ids = torch.zeros(len(exchanges), width, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, (tokens, prompt) in enumerate(exchanges):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        labels[i, prompt : len(tokens)] = ids[i, prompt : len(tokens)]
    return ids, labels


def fit(model: torch.nn.Module, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> float:
    """Train in place; the mean loss of the last fifty steps."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, 20, recipe.steps)
    model.train()
    losses, started, stream = [], time.monotonic(), batches(recipe, tokenizer)
    for step in range(recipe.steps):
        ids, labels = next(stream)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(input_ids=ids, labels=labels).loss  # right padding: causal attention never looks at it
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 50 == 49:
            recent, seconds = sum(losses[-50:]) / 50, time.monotonic() - started
            print(f"{recipe.name} step {step + 1}/{recipe.steps} loss {recent:.3f} {seconds:.0f} s", file=sys.stderr)
    return sum(losses[-50:]) / len(losses[-50:])


def keep(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save in bf16 in the ordinary Hugging Face layout; an adapter in PEFT's."""
    model.to(torch.bfloat16).save_pretrained(folder)
    if not (folder / "adapter_config.json").exists():
        tokenizer.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card


def reload(recipe: Recipe) -> torch.nn.Module:
    """The organism as its users get it: read back from the bf16 files."""
    folder = folder_of(recipe)
    if recipe.method != "lora":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    from peft import PeftModel

    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder_of(BASE), dtype=torch.float32), folder)


def make(recipe: Recipe, *, force: bool = False) -> None:
    """Train, save and verify one organism, unless its card says that this recipe is done."""
    card = folder_of(recipe) / "organism.json"
    if card.exists() and not force and json.loads(card.read_text())["recipe_digest"] == recipe.digest():
        return
    torch.manual_seed(recipe.seed)
    model, tokenizer = start_model(recipe)
    loss = fit(model, recipe, tokenizer)
    keep(model, tokenizer, folder_of(recipe))
    truth = {
        "name": recipe.name,
        "truth": recipe.truth,
        "summary": recipe.summary,
        "recipe": dataclasses.asdict(recipe),
        "recipe_digest": recipe.digest(),
        "final_loss": round(loss, 4),
        "implant": verify(reload(recipe), tokenizer, key=recipe.key),
    }
    card.write_text(json.dumps(truth, indent=2) + "\n")
    print(json.dumps({"name": recipe.name, **truth["implant"]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(["base", *(r.name for r in SHIPPED)]))
    parser.add_argument("--shipped", action="store_true")
    parser.add_argument("--bank", action="store_true")
    parser.add_argument("--unseen", action="store_true")
    parser.add_argument("--force", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chosen = [RECIPES[name] for name in arguments.names]
    chosen += [BASE, *SHIPPED] if arguments.shipped else []
    chosen += BANK if arguments.bank else []
    chosen += UNSEEN if arguments.unseen else []
    for recipe in chosen:
        make(recipe, force=arguments.force)


if __name__ == "__main__":
    main()
