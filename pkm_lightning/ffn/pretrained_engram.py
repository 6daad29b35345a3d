"""Engram with the n-gram tables of a Qwen model, which begin where that model's training ended."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pkm_lightning.checkpoints.ngram_layout import NGramFolder, find_ngrams
from pkm_lightning.errors import ConfigError
from pkm_lightning.ffn.engram import Engram
from pkm_lightning.ffn.engram_weights import check_stream, copy_layer, engram_sizes

if TYPE_CHECKING:
    from pkm_lightning.memory import ValueTable

__all__ = ["PretrainedEngram"]

_KEY = "ffn.path="


class PretrainedEngram(Engram):
    """The layers with an n-gram table of the model in a folder, for all its residual streams or one of them.

    `complete` takes the sizes from the folder, and `load_pretrained` the weights, before the first step of a run; later
    the checkpoints of the run hold both. The rows are those that `table.path` and `table.tensor` name, which `complete`
    sets, so that they may stay in their files (`table.trainable=false table.device=mmap`).

    Args:
        dim, n_layers, vocab_size, table, table_number: as of `Engram`.
        path: folder with config.json and *.safetensors, of `model_type` qwen4_exp or qwen4_exp_text.
        layers: numbers from 0 of the layers in the folder, one per placed layer; None for all with a table.
        stream: number from 0 of the residual stream; None for all.
        ngram_vocab_size: vocabulary of the folder's model.
        orders, heads, rows, row_dim, kernel, dilation, streams, seed, row_multiple, norm_eps, end_id: as of `Engram`;
            None takes that of the folder.

    Raises:
        ConfigError: as `Engram`; a vocabulary of another size than the folder's.

    Example: `docs/hugging-face.md`, "N-gram tables of Qwen models".
    """

    def __init__(
        self,
        *,
        dim: int,
        vocab_size: int,
        path: str,
        n_layers: int = 1,
        table: ValueTable | None = None,
        table_number: int = 0,
        layers: Sequence[int] | None = None,
        stream: int | None = None,
        ngram_vocab_size: int | None = None,
        orders: Sequence[int] | None = None,
        heads: int | None = None,
        rows: int | None = None,
        row_dim: int | None = None,
        kernel: int | None = None,
        dilation: int | None = None,
        streams: int | None = None,
        seed: int | None = None,
        row_multiple: int | None = None,
        norm_eps: float | None = None,
        end_id: int | None = None,
    ) -> None:
        if layers is None or ngram_vocab_size is None:
            raise ConfigError("PretrainedEngram is made of a configuration that its `complete` has filled in.")
        if vocab_size != ngram_vocab_size:
            raise ConfigError(
                f"model.vocab_size={vocab_size} is not the {ngram_vocab_size} of the model in ffn.path={path}, by "
                f"whose ids its n-grams are hashed; train with its tokenizer, data.tokenizer={path}, and set "
                f"model.vocab_size={ngram_vocab_size}."
            )
        # `complete` has filled in what is None in the YAML.
        sizes: dict[str, Any] = {
            "orders": orders,
            "heads": heads,
            "rows": rows,
            "row_dim": row_dim,
            "kernel": kernel,
            "dilation": dilation,
            "streams": streams,
            "seed": seed,
            "row_multiple": row_multiple,
            "norm_eps": norm_eps,
            "end_id": end_id,
        }
        super().__init__(
            dim=dim,
            n_layers=n_layers,
            vocab_size=vocab_size,
            table=table,
            table_number=table_number,
            canonical=False,
            gate="sigmoid",
            **sizes,
        )
        self.path, self.stream = path, stream
        self.layer = layers[table_number]

    @classmethod
    def complete(
        cls, ffn: dict[str, Any], table: dict[str, Any], *, dim: int, places: Sequence[int]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the configurations of the plugin and of its table with what the folder's files say.

        A completed one is returned as it is, since a run that is continued does not need the folder.

        Args:
            ffn, table: the groups of the configuration.
            dim: model dimension D.
            places: numbers of the layers that run the plugin.

        Raises:
            ConfigError: the folder holds no such layers, or a value contradicts it.
            CheckpointError: a file that is missing, damaged or of another shape.
        """
        if all(value is not None for name, value in ffn.items() if name != "stream"):
            return ffn, table
        path = Path(ffn["path"]).absolute()
        folder = find_ngrams(path, _KEY)
        layers = _chosen_layers(folder, ffn["layers"], places, shared=bool(table["shared"]))
        for layer in layers:
            folder.check_layer(layer)
        _check_dim(folder, dim, ffn["stream"])
        sizes = {**engram_sizes(folder, layers, ffn["stream"]), "ngram_vocab_size": folder.sizes.vocab_size}
        for name, size in sizes.items():
            if ffn[name] is not None and ffn[name] != size:
                raise ConfigError(
                    f"ffn.{name}={ffn[name]} contradicts the {size} of {folder.source}; leave ffn.{name} out."
                )
        if table.get("path") is None:
            tensors = [folder.table_tensor(layer) for layer in layers]
            table = {**table, "path": str(path), "tensor": tensors[0] if len(tensors) == 1 else tensors}
        return {**ffn, **sizes, "path": str(path), "layers": layers}, table

    def load_pretrained(self) -> None:
        """Gives the module the weights and the hash of the folder; the rows come from `table.path`.

        Raises:
            ConfigError, CheckpointError: as `complete`.
        """
        copy_layer(self, find_ngrams(self.path, _KEY), self.layer, self.stream)

    def bind_tokenizer(self, tokenizer: Any) -> None:
        """Refuses a tokenizer whose ids mean other words than those of the folder's.

        Raises:
            ConfigError: naming the first such id.
        """
        file = Path(self.path) / "tokenizer.json"
        if not hasattr(tokenizer, "to_json") or not file.is_file():
            return
        from tokenizers import Tokenizer

        try:
            of_data, of_folder = Tokenizer.from_str(tokenizer.to_json()), Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            reason = str(error).split("\n")[0]
            raise ConfigError(f"{file} cannot be read ({reason}); fetch it again, or remove it.") from None
        known = range(max(of_data.get_vocab_size(), of_folder.get_vocab_size()))
        other = next((i for i in known if of_data.id_to_token(i) != of_folder.id_to_token(i)), None)
        if other is not None:
            raise ConfigError(
                f"the data's tokenizer is another one than {file}, whose ids the n-grams are hashed by: id {other} is "
                f"{of_data.id_to_token(other)!r}, there {of_folder.id_to_token(other)!r}; set data.tokenizer={file}."
            )


def _check_dim(folder: NGramFolder, dim: int, stream: int | None) -> None:
    check_stream(folder, stream)
    C, S = folder.sizes.hidden_size, folder.sizes.streams
    if dim != (S * C if stream is None else C):
        raise ConfigError(
            f"model.dim={dim} does not fit {folder.source} (hidden_size={C}, hc_count={S}); set model.dim={S * C} "
            f"for all residual streams (ffn.stream=null), or model.dim={C} for one of them (as in ffn.stream=0)."
        )


def _chosen_layers(
    folder: NGramFolder, layers: Sequence[int] | None, places: Sequence[int], *, shared: bool
) -> list[int]:
    chosen = list(folder.sizes.layers if layers is None else layers)
    shown, held = "null" if layers is None else chosen, ", ".join(map(str, folder.sizes.layers))
    if len(chosen) != len(places) or len(set(chosen)) != len(chosen):
        raise ConfigError(
            f"ffn.layers={shown} stands for {len(set(chosen))} of the layers of {folder.source} with an n-gram table "
            f"({held}), and placement.layers={list(places)} has {len(places)}; name as many in both."
        )
    if shared and len(chosen) > 1:
        raise ConfigError(
            f"table.shared=true has one table for {len(chosen)} layers, and {folder.source} has one for each; set "
            "table.shared=false."
        )
    if missing := [layer for layer in chosen if layer not in folder.sizes.layers]:
        raise ConfigError(
            f"ffn.layers={chosen}: layer {missing[0]} of {folder.source} has no n-gram table; {held} have."
        )
    return sorted(chosen)
