"""Which keys a verb reads: one that would do nothing is refused, so that nobody believes that it did something."""

from __future__ import annotations

import re
from collections.abc import Iterable

from omegaconf import DictConfig, OmegaConf

from pkm_lightning.build.keys import MemoryKeys
from pkm_lightning.cli.edit_words import ACTIONS
from pkm_lightning.compare.overrides import key_of
from pkm_lightning.compare.settings import COMPARE_KEYS
from pkm_lightning.errors import ConfigError, nearest

#: Keys of answers to given prompts, and of all answers.
PROMPT_KEYS = ("prompt", "prompts_file", "samples", "batch_size")
GENERATION_KEYS = (
    *("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "sample_seed"),
    "extrapolate",
)
#: Keys of an evaluation, each an argument of `inference.harness_settings.read_settings`.
EVALUATION_KEYS = ("tasks", "tasks_dir", "limit", "num_fewshot", "batch_size")
#: Keys of an inspection, besides `format` and `out`.
INSPECTION_KEYS = (
    *("text", "texts_file", "effects", "mask", "mask_table", "data_path", "data_tokens", "questions", "readers"),
    "show",
)
#: Keys of `edit` alone.
EDIT_KEYS = (
    "action",
    *(key for key in ACTIONS["write"] if key not in ("batch_size", "sample_seed", "overwrite", "data")),
)
_ON_SAVED = ("validate", "test", "predict", "generate", "chat", "evaluate", "inspect")
#: Keys of a command and the verbs that read them; every verb reads the others.
VERBS_OF: dict[str, tuple[str, ...]] = {
    "file": ("export", "edit"),
    "dir": ("export", "edit"),
    "overwrite": ("export", "prepare", "edit"),
    "quantize": ("export", "edit"),
    "out": ("predict", "generate", "evaluate", "inspect", "compare", "report", "prepare"),
    "format": ("info", "inspect", "export", "edit"),
    "ckpt": ("fit", *_ON_SAVED, "export", "edit", "compare"),  # fit and compare say what to do instead
    "edits": (*_ON_SAVED, "export", "edit"),
    "resume": ("fit", "compare", "info"),
    "init_from": ("fit",),
    **dict.fromkeys(("objective", "objective_mode", "sweep_dir"), ("fit",)),
    "device_memory": ("fit", "compare", "info"),
    "trust_config": ("fit", *_ON_SAVED, "edit", "compare", "info"),
    **dict.fromkeys(EVALUATION_KEYS, ("evaluate",)),
    **dict.fromkeys(INSPECTION_KEYS, ("inspect",)),
    **dict.fromkeys(PROMPT_KEYS, ("generate", "predict")),
    **dict.fromkeys(GENERATION_KEYS, ("generate", "chat", "predict")),
    "batch_size": ("generate", "predict", "evaluate", "edit"),
    "sample_seed": ("generate", "chat", "predict", "edit"),
    **dict.fromkeys(EDIT_KEYS, ("edit",)),
    "system": ("chat",),
    "packages": ("prepare",),
    "sets": ("prepare",),
}
#: Verbs that read nothing but these keys.
KEYS_OF = {
    "export": (
        *("run_dir", "ckpt", "edits", "model", "ffn", "extra_ffns", "placement", "table", "seed"),
        *("format", "file", "dir", "overwrite", "quantize"),
    ),
    "edit": (
        *("run_dir", "ckpt", "trust_config", "trainer", "table", "action"),
        *dict.fromkeys(key for keys in ACTIONS.values() for key in keys),
    ),
    "report": ("runs", "out", "report", "experiment"),
    "prepare": ("data", "packages", "sets", "out", "overwrite", "model", "experiment"),
}
#: Callbacks that an evaluation runs, and their keys that it does not read.
_CALLBACKS_OF: dict[str, dict[str, tuple[str, ...]]] = {
    "validate": {"progress_bar": (), "recall": ("test_items", "path"), "stored_bits": ("widths",)},
    "test": {"progress_bar": (), "recall": ("val_items", "path"), "without_table": (), "stored_bits": ()},
    "predict": {"progress_bar": ()},
}
#: Keys of the Trainer that an evaluation does not read.
_TRAINING_KEYS = (
    *("max_steps", "max_epochs", "min_steps", "min_epochs", "val_check_interval", "check_val_every_n_epoch"),
    *("log_every_n_steps", "num_sanity_val_steps", "gradient_clip_val", "gradient_clip_algorithm"),
    *("accumulate_grad_batches", "enable_model_summary", "overfit_batches", "limit_train_batches"),
)
#: Verbs that read a run, and compose no configuration of it.
VERBS_WITHOUT_VARIANTS = ("generate", "chat", "evaluate", "inspect", "export")
#: The place of the table of a further variant.
PATH_OF_EXTRA = re.compile(r"extra_ffns\.(\w+)\.table\.path")
#: Groups in the order in which they stand in `configs/config.yaml`.
GROUPS = (
    *("placement", "table", "extra_ffns", "ffn", "optim", "model", "data", "finetune", "strategy"),
    "trainer",
    *("callbacks", "logger"),
)
#: The keys at the top of a configuration.
TOP_KEYS = (
    *GROUPS,
    *("devices", "device_memory", "seed", "match", "match_budget", "run_dir", "init_from", "resume", "ckpt"),
    *("trust_config", "format", "out"),
)


def is_path_of_extra(verb: str, key: str) -> bool:
    """Returns whether `verb`, which knows no variants of the run that it reads, takes `key` all the same."""
    return verb in VERBS_WITHOUT_VARIANTS and PATH_OF_EXTRA.fullmatch(key) is not None


def check_read(verb: str, overrides: Iterable[str], config: DictConfig) -> None:
    """Refuses overrides that `verb` does not read, and keys at the top of `config` that nothing reads.

    Raises:
        ConfigError: naming the key and what reads it.
    """
    known_keys = (*TOP_KEYS, *COMPARE_KEYS, *VERBS_OF)
    for override in overrides:
        key = key_of(override)
        top = key.split(".")[0].split("/")[0].split("@")[0]
        allowed = KEYS_OF.get(verb)
        if is_path_of_extra(verb, key):
            continue
        if allowed is not None and top not in allowed:
            raise ConfigError(f"{override}: {verb} does not read {top}; leave it out. It reads: {', '.join(allowed)}.")
        if verb not in VERBS_OF.get(top, (verb,)):
            raise ConfigError(f"{override}: {verb} does not read {top}, only {', '.join(VERBS_OF[top])}; leave it out.")
        if override.startswith("~") and key in known_keys and key not in GROUPS:
            raise ConfigError(f"{override}: {verb} cannot do without {key}; set {key}=VALUE, or leave it as it is.")
        if verb in _CALLBACKS_OF:
            _check_evaluation(verb, override, key)
    text = str(OmegaConf.to_container(config, resolve=False))
    memory = OmegaConf.select(config, "model.memory")
    sizes = memory if isinstance(memory, DictConfig) else {}
    for keys, prefix, known in (
        (config, "", known_keys),
        (sizes, "model.memory.", MemoryKeys.__annotations__),
    ):
        for name in map(str, keys):
            # Another key may refer to it.
            if name not in known and f"${{{prefix}{name}" not in text:
                raise ConfigError(
                    f"{prefix}{name} is not a key of the configuration; leave it out.{nearest(name, known)}"
                )


def _check_evaluation(verb: str, override: str, key: str) -> None:
    """Refuses a key of training, which an evaluation composes and does not read."""
    group, _, rest = key.partition(".")
    name, _, leaf = rest.partition(".")
    callbacks = _CALLBACKS_OF[verb]
    if group == "logger" or (group == "trainer" and name in _TRAINING_KEYS):
        raise ConfigError(f"{override}: {verb} does not read {key}, which is for training; leave it out.")
    if group == "callbacks" and name and (name not in callbacks or leaf in callbacks[name]):
        raise ConfigError(
            f"{override}: {verb} does not read {key}, of all callbacks it runs {' and '.join(callbacks)}; leave it out."
        )
