"""What writing facts costs and what it leaves: one line of CSV per draw of invented facts.

    python scripts/measure_editing.py RUN [--draws 7 8] [--facts 100] [--set max_steps=200 ...] [--trust] [--out FILE]

RUN was trained on `data=facts`. The facts are of relations that it knows, about persons and countries that do not
exist, each with four paraphrases that are learned, two that are not, and a question. Draw 0 is for choosing settings.
The run is not changed, and no edit is left in it.
"""

from __future__ import annotations

import argparse
import calendar
import csv
import datetime
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pkm_lightning import load
from pkm_lightning.adaptation.facts_file import Fact
from pkm_lightning.adaptation.other_text import OtherText
from pkm_lightning.adaptation.settings import WritingSettings
from pkm_lightning.adaptation.write_facts import write_facts
from pkm_lightning.cli.edit_text import other_text
from pkm_lightning.data.facts.templates import STATEMENTS, TEMPLATES

_SYLLABLES = ["ba", "ko", "ri", "ven", "tal", "mur", "zo", "lek", "dri", "quin", "far", "sel", "ost", "umb", "yar"]
_MONTHS = calendar.month_name[1:]
_CITIES = ("Chicago", "Baltimore", "San Francisco", "Boston", "Cleveland", "Havana", "Detroit")
_CURRENCIES = ("Dollar", "Peso", "Franc", "Krone", "Rupee")
_OF_PERSONS, _OF_COUNTRIES = ("birth_city", "birth_date", "debut_year"), ("capital", "currency")
_LEARNED, _TESTED, _QUESTION = 5, 2, 12
_FIELDS = ("learned", "test_prompts", "question")


def invent(draw: int, count: int) -> list[Fact]:
    """Returns facts, a function of the draw alone."""
    rng = random.Random(draw)

    def name() -> str:
        return "".join(rng.choice(_SYLLABLES) for _ in range(rng.randint(2, 3))).capitalize()

    answers: dict[str, Callable[[], str]] = {
        "birth_city": lambda: rng.choice(_CITIES),
        "birth_date": lambda: f"{rng.choice(_MONTHS)} {rng.randint(1, 28)}, {rng.randint(1860, 1990)}",
        "debut_year": lambda: str(rng.randint(1880, 2010)),
        "capital": name,
        "currency": lambda: rng.choice(_CURRENCIES),
    }
    facts: dict[str, Fact] = {}
    while len(facts) < count:
        relation = rng.choice((*_OF_PERSONS, *_OF_COUNTRIES))
        subject = f"{name()} {name()}" if relation in _OF_PERSONS else name()
        texts = [text.replace("{s}", subject) for text in TEMPLATES[relation]]
        prompts = [texts[form] for form in rng.sample(STATEMENTS, _LEARNED + _TESTED)]
        learned, tested = prompts[:_LEARNED], prompts[_LEARNED:]
        facts.setdefault(
            subject, Fact(learned[0], answers[relation](), tuple(learned[1:]), tuple(tested), texts[_QUESTION])
        )
    return list(facts.values())


def measure(run: Path, draw: int, count: int, settings: WritingSettings, *, trust: bool) -> dict[str, Any]:
    """Writes the facts of one draw, and returns a line of the CSV file."""
    loaded = load(run, edits=[], trust_config=trust)
    text = other_text(None, run, loaded, settings, trust=trust)
    # Every second batch of the text that bounds the edit is set aside: no decision sees it.
    untouched = OtherText(loaded.model, text.held_out[1::2], device=torch.device("cpu"))
    text = text._replace(held_out=text.held_out[::2])
    began = time.process_time()
    edit = write_facts(
        loaded.model,
        loaded.codec(),
        invent(draw, count),
        other_text=text,
        tables=loaded.edits,
        context=loaded.context,
        **settings.record(),
    )
    cpu_seconds = time.process_time() - began
    loaded.edits.apply(edit)
    divergence = untouched.mean_divergence()
    loaded.edits.remove(edit.name)
    with tempfile.TemporaryDirectory() as folder:
        edit.save(Path(folder) / "edit.safetensors")
        size = (Path(folder) / "edit.safetensors").stat().st_size
    figures = edit.figures
    return {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "run": run.name,
        "draw": draw,
        "facts": count,
        "rows": figures["rows"],
        "steps": figures["steps"],
        "ended": figures["ended"],
        "cpu_seconds": f"{cpu_seconds:.1f}",
        "wall_seconds": figures["seconds"],
        **{name: f"{figures[name]['after']:.3f}" for name in _FIELDS},
        "kl": f"{figures['kl']:.5f}",
        "kl_untouched": f"{divergence:.5f}",
        "kl_penalised": f"{figures['kl_penalised']:.5f}",
        "bytes": size,
        "settings": " ".join(f"{name}={value}" for name, value in settings.record().items()),
    }


def value_of(text: str) -> Any:
    """Returns the number or the text that a setting names."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures each draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--draws", type=int, nargs="+", default=[7, 8])
    parser.add_argument("--facts", type=int, default=100)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of `edit`")
    parser.add_argument("--trust", action="store_true", help="the run's configuration may name places of its own")
    parser.add_argument("--out", type=Path, default=Path("editing.csv"))
    options = parser.parse_args(arguments)
    pairs = (setting.partition("=") for setting in options.set)
    settings = WritingSettings(**{key: value_of(text) for key, _, text in pairs})
    for draw in options.draws:
        line = measure(options.run, draw, options.facts, settings, trust=options.trust)
        print(line, flush=True)
        is_new = not options.out.exists()
        with options.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, line, lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(line)


if __name__ == "__main__":
    main()
