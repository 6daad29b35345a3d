"""Which keys a verb reads: one that would do nothing is refused, so that nobody believes that it did something."""

from __future__ import annotations

from collections.abc import Iterable

from omegaconf import DictConfig, OmegaConf

from pkm_lightning.build.keys import MemoryKeys
from pkm_lightning.compare.overrides import key_of
from pkm_lightning.compare.settings import COMPARE_KEYS
from pkm_lightning.errors import ConfigError, nearest

#: Keys of a command and the verbs that read them; every verb reads the others.
VERBS_OF = {
    "file": ("export",),
    "overwrite": ("export",),
    "out": ("predict", "compare", "report", "prepare"),
    "format": ("info",),
    "ckpt": ("fit", "validate", "test", "predict", "export", "compare"),  # fit and compare say what to do instead
    "resume": ("fit", "compare", "info"),
    "device_memory": ("fit", "compare", "info"),
    "trust_config": ("fit", "validate", "test", "predict", "compare", "info"),
    "packages": ("prepare",),
    "sets": ("prepare",),
}
#: Verbs that read nothing but these keys.
KEYS_OF = {
    "export": ("run_dir", "ckpt", "file", "overwrite"),
    "report": ("runs", "out", "report", "experiment"),
    "prepare": ("data", "packages", "sets", "out"),
}
#: The keys at the top of a configuration.
TOP_KEYS = (
    *("placement", "table", "ffn", "model", "data", "optim", "strategy", "trainer", "callbacks", "logger"),
    *("devices", "device_memory", "seed", "match", "match_budget", "run_dir", "resume", "ckpt", "file", "overwrite"),
    *("trust_config", "format", "out"),
)


def check_read(verb: str, overrides: Iterable[str], config: DictConfig) -> None:
    """Refuses overrides that `verb` does not read, and keys at the top of `config` that nothing reads.

    Raises:
        ConfigError: naming the key and what reads it.
    """
    for override in overrides:
        key = key_of(override)
        top = key.split(".")[0].split("/")[0].split("@")[0]
        allowed = KEYS_OF.get(verb)
        if allowed is not None and top not in allowed:
            raise ConfigError(f"{override}: {verb} does not read {top}; leave it out. It reads: {', '.join(allowed)}.")
        if verb not in VERBS_OF.get(top, (verb,)):
            raise ConfigError(f"{override}: {verb} does not read {top}, only {', '.join(VERBS_OF[top])}; leave it out.")
    text = str(OmegaConf.to_container(config, resolve=False))
    memory = OmegaConf.select(config, "model.memory")
    sizes = memory if isinstance(memory, DictConfig) else {}
    for keys, prefix, known in (
        (config, "", (*TOP_KEYS, *COMPARE_KEYS, *VERBS_OF)),
        (sizes, "model.memory.", MemoryKeys.__annotations__),
    ):
        for name in map(str, keys):
            # Another key may refer to it.
            if name not in known and f"${{{prefix}{name}" not in text:
                raise ConfigError(
                    f"{prefix}{name} is not a key of the configuration; leave it out.{nearest(name, known)}"
                )
