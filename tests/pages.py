"""The commands that the pages show, what they need beside them, and versions of them that run in seconds."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path

import pyarrow.parquet
from ngram_folders import write_folder
from shard_folders import text
from shard_folders import write_folder as write_tokens
from small import SMALL_RUN
from small_packages import write_packages
from tokenizer_makers import rank_file, sentencepiece_model
from tree import ROOT

from pkm_lightning.cli.edit_words import with_action
from pkm_lightning.cli.main import PRIMARY_CONFIGURATIONS
from pkm_lightning.data.facts.invented import InventedChoice
from pkm_lightning.data.facts.invented_files import write_invented
from pkm_lightning.data.tokenizer import bytes_tokenizer

README = ROOT / "README.md"
PAGES = (README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))
OURS = "python -m pkm_lightning "

_SHORT = ("trainer.max_steps=2", "trainer.val_check_interval=2", "callbacks.step_checkpoint.every_n_steps=2")
#: Recall and samples generate answers token by token, which is most of a small run.
_SILENT = ("~callbacks.recall", "~callbacks.samples")
_TEXT_SIZES = ("data.vocab_size=270", "data.seq_len=16", "data.global_batch_size=2")


def blocks(page: Path, language: str = "bash") -> list[str]:
    """Returns the code blocks of `page` in `language`."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.S)


def commands(page: Path) -> list[str]:
    """Returns the command lines of `page`, without the lines of scripts."""
    return [line for block in blocks(page) if not block.startswith("#!") for line in block.splitlines() if line]


def of_the_package(page: Path) -> list[str]:
    """Returns the commands of `page` that start with `python -m pkm_lightning`."""
    return [command for command in commands(page) if command.startswith(OURS)]


def words(command: str) -> list[str]:
    """Returns the verb and the arguments of a command of the package, launched by whatever stands before them."""
    split = shlex.split(command, comments=True)
    return split[split.index("pkm_lightning") + 1 :]


def furnish(folder: Path) -> None:
    """Writes what the commands name: the FFN of docs/extending.md, configurations, texts, prompts, packages."""
    (folder / "my_ffn.py").write_text(blocks(ROOT / "docs" / "extending.md", "python")[0])
    (folder / "my_configs" / "ffn").mkdir(parents=True)
    (folder / "my_configs" / "ffn" / "mine.yaml").write_text("_target_: my_ffn.MyFFN\n")
    (folder / "my_configs" / "experiment").mkdir()
    (folder / "my_configs" / "experiment" / "mixture.yaml").write_text(blocks(ROOT / "docs" / "ffns.md", "yaml")[0])
    (folder / "my_texts").mkdir()
    (folder / "my_texts" / "prose.txt").write_text("The quick brown fox jumps over the lazy dog. " * 60)
    records = [{"prompt": f"{i} and one is", "answer": str(i + 1)} for i in range(60)]
    (folder / "my_answers.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    turns = [{"role": "user", "content": "Rome?"}, {"role": "assistant", "content": "Yes."}]
    (folder / "my_chats.jsonl").write_text(f"{json.dumps({'messages': turns})}\n" * 60)
    (folder / "my_rows").mkdir()
    for split in ("train", "validation"):
        rows = pyarrow.table({"body": [f"Row {i} has a text of its own. " * 4 for i in range(60)]})
        pyarrow.parquet.write_table(rows, folder / "my_rows" / f"{split}-00000-of-00001.parquet")
    with contextlib.chdir(folder):
        exec(blocks(ROOT / "docs" / "tokenizers.md", "python")[0], {})
    (folder / "my_facts.jsonl").write_text(blocks(ROOT / "docs" / "editing.md", "json")[0])
    (folder / "prompts.txt").write_text("The capital of France is\n")
    for name in ("my_books", "my_code"):
        documents = [text(f"{name} has document {i}") for i in range(40)]
        write_tokens(folder, {"train": documents, "validation": documents[:4]}, name=name)
    (folder / "mine.tiktoken").write_bytes(rank_file({bytes([byte]): byte for byte in range(256)}))
    (folder / "mine.model").write_bytes(sentencepiece_model("bpe"))
    write_packages(folder / "packages")
    write_invented(InventedChoice(100, 4, 50, 0, 0), folder / "invented")  # as docs/changing-knowledge.md prepares them
    # The vocabulary of a Qwen model is larger than that of its tokenizer too.
    write_folder(folder / "qwen", changes={"hidden_size": 64, "vocab_size": 320, "eos_token_id": 0})
    bytes_tokenizer().save(folder / "qwen" / "tokenizer.json")
    # Imported here: it brings transformers, which few tests that show commands need.
    from pretrained_models import save_gguf

    save_gguf("llama", folder / "smollm2.gguf")


def small_version(command: str, *, silent: bool) -> list[str]:
    """Returns verb and arguments with small sizes; a size that the command sets gives way, everything else stays.

    Args:
        silent: leave out what generates text, which takes most of the time of a small run.
    """
    verb, *arguments = words(command)
    if verb == "edit" and any(argument.startswith("facts=") for argument in arguments):
        return [verb, *arguments, "max_steps=2", "drift_tokens=256"]
    if verb not in ("fit", "compare"):
        return [verb, *arguments, *(["report.resamples=100"] if verb == "report" else [])]
    # PEER finds no size for equal FLOPs among very few keys.
    left_out = ("~", "model.memory.n_keys=") if verb == "compare" else ("logger=",)
    sizes = [size for size in SMALL_RUN if not size.startswith(left_out)]
    if verb == "compare":
        sizes += ["seeds=1", "lr_sweep=null", "jobs=2", "report.resamples=100"]
    elif silent:
        sizes = [size for size in sizes if "callbacks.recall" not in size and "callbacks.samples" not in size]
        sizes += [*_SHORT, *_SILENT]
    if {"data=text", "data=jsonl", "data=hf"} & set(arguments):
        sizes = [*(size for size in sizes if not size.startswith("data.")), *_TEXT_SIZES]
    if {"data=tokens", "data=mix"} & set(arguments):
        sizes = [*(size for size in sizes if not size.startswith("data.")), *_TEXT_SIZES[1:]]
    if any("=invented/" in argument for argument in arguments):  # whose records are longer
        sizes = [size for size in sizes if not size.startswith("data.seq_len=")] + ["data.seq_len=96"]
    if {"experiment=capacity", "data=biographies"} & set(arguments):
        sizes = [*(size for size in sizes if not size.startswith("data.")), "data.exposures=2"]
    if any(argument.startswith("data.skip=") for argument in arguments):  # of people alone
        sizes = [size for size in sizes if not size.startswith(("data.countries=", "data.cities=", "data.control"))]
    if "model=hf" in arguments:  # whose memories read more slots than the small one has keys
        sizes = [size for size in sizes if not size.startswith("model.")]
    # Callbacks that the command leaves out have no sizes.
    chosen = next((a.partition("=")[2].strip("[]").split(",") for a in arguments if a.startswith("callbacks=")), [])
    if chosen and "default" not in chosen:
        sizes = [s for s in sizes if "callbacks." not in s or _key(s).split(".")[1] in chosen]
    sizes = list({_key(size): size for size in sizes}.values())
    small = {_key(size) for size in sizes}
    flags = [argument for argument in arguments if argument.startswith("-")]
    kept = [a for a in arguments if a not in flags and _key(a) not in small]
    return [verb, *flags, *kept, *sizes]


def compositions(shown: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Returns kind and overrides of few compositions that have every override of the commands `shown`.

    Commands of a kind share a composition unless they set something different under the same first name of a key. The
    kinds are the names of primary configurations, and `fit` in one process.
    """
    merged: list[tuple[str, dict[str, list[str]]]] = []
    alone: list[tuple[str, list[str]]] = []
    for command in shown:
        verb, *arguments = words(command)
        arguments = [argument for argument in arguments if not argument.startswith("-")]
        kind = PRIMARY_CONFIGURATIONS.get(verb, "config")
        arguments = with_action(verb, arguments)
        if verb == "fit" and not any(argument.startswith("strategy=") for argument in arguments):
            kind = "fit"
        # These do not go with the FFNs and sizes of other commands.
        if {"model=hf", "finetune=sparse", "experiment=capacity"} & set(arguments):
            alone.append((kind, arguments))
            continue
        for overrides in _expanded(arguments):
            by_name: dict[str, list[str]] = {}
            for override in overrides:
                by_name.setdefault(re.split(r"[./]", _key(override))[0], []).append(override)
            for other, together in merged:
                if other == kind and all(together.get(key, own) == own for key, own in by_name.items()):
                    together.update(by_name)
                    break
            else:
                merged.append((kind, by_name))
    return [*alone, *((kind, [o for overrides in together.values() for o in overrides]) for kind, together in merged)]


def _expanded(overrides: list[str]) -> list[list[str]]:
    """Returns the overrides with the first value of each list, as in `ffn=dense,moe`, and each further value alone."""
    first, further = [], []
    for override in overrides:
        key, _, value = override.partition("=")
        values = [value] if value.startswith(("[", "{")) else value.split(",")
        first.append(f"{key}={values[0]}")
        further += [[f"{key}={other}"] for other in values[1:]]
    return [first, *further]


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]
