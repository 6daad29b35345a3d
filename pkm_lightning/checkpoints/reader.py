"""Opens a checkpoint of any kind. All checks of what is on disk stand here.

| kind | on disk | tensors |
|---|---|---|
| `file` | one file, written by `torch.save` | mapped read-only |
| `folder` | written by several ranks; see `pkm_lightning.checkpoints.sharded` | read on demand, in parts |
| `exported` | weights as safetensors; see `pkm_lightning.checkpoints.export` | mapped read-only |

Opening reads no tensor; `SavedCheckpoint.check_sums` reads all of them: 0.15 s of CPU per GB beside the disk.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pkm_lightning.checkpoints.companions import advice_for_folder
from pkm_lightning.checkpoints.folder import Chunk, FolderContent
from pkm_lightning.checkpoints.mapped import DamagedFileError, MappedFile
from pkm_lightning.checkpoints.replaced_rows import with_rows
from pkm_lightning.checkpoints.safetensors import looks_like_safetensors
from pkm_lightning.checkpoints.single_file import MappedContent, fill, read_archive, read_exported
from pkm_lightning.checkpoints.sums import ALL, Share
from pkm_lightning.checkpoints.tree import restore
from pkm_lightning.errors import CheckpointError


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Returns the checkpoint of `run_dir` with the highest step, or None."""
    # Steps are padded to eight digits, so that names sort as numbers.
    entries = (run_dir / "checkpoints").glob("step-*.ckpt")
    checkpoints = sorted(entry for entry in entries if entry.stem.removeprefix("step-").isdigit())
    return checkpoints[-1] if checkpoints else None


def later_buffers(module: nn.Module, prefix: str = "") -> set[str]:
    """Returns the names of buffers that `module` has got since a release, and that earlier checkpoints lack.

    A module lists its own in `later_buffers` and loads without them.
    """
    return {
        f"{prefix}{name}.{buffer}"
        for name, part in module.named_modules()
        for buffer in getattr(part, "later_buffers", ())
    }


def open_checkpoint(path: str | Path) -> SavedCheckpoint:
    """Opens a checkpoint of this package.

    Raises:
        CheckpointError: missing, damaged, of another format version, or not written by this package.
    """
    checkpoint = SavedCheckpoint(path)
    checkpoint.check_content()
    return checkpoint


@dataclass(frozen=True)
class DerivedTensor:
    """A tensor that is computed from stored ones whenever it is read, such as a sum of two.

    Attributes:
        shape, dtype: of the values.
        values: computes them.
    """

    shape: torch.Size
    dtype: torch.dtype
    values: Callable[[], Tensor]


class SavedCheckpoint:
    """A checkpoint on disk, of any LightningModule; `open_checkpoint` accepts those of this package only.

    Attributes:
        path: of the file or folder.
        kind: `file`, `folder` or `exported`.
        skeleton: the content with `{"__tensor__": name}` in place of each tensor.
        shapes: shape and dtype of each tensor by name; see `pkm_lightning.checkpoints.tree`.

    Raises:
        CheckpointError: missing, damaged, or exported in another format version.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise CheckpointError(f"ckpt={path} does not exist.")
        self.kind: Literal["file", "folder", "exported"] = "file"
        self._content: FolderContent | MappedContent
        with self._damage_reported():
            if self.path.is_dir():
                self.kind, self._content = "folder", FolderContent(self.path)
            elif looks_like_safetensors(self.path):
                self.kind, self._content = "exported", read_exported(self.path)
            else:
                self._content = read_archive(self.path)
        self.skeleton: Any = self._content.skeleton
        self.shapes = dict(self._content.shapes)
        self._included: dict[str, Sequence[tuple[MappedFile, Tensor]]] = {}
        self._derived: dict[str, DerivedTensor] = {}
        self._stored_names: dict[str, str] = {}
        self._replaced: dict[str, tuple[Tensor, Tensor]] = {}

    def check_content(self) -> None:
        """Refuses a checkpoint of another package.

        Raises:
            CheckpointError: it lacks weights, counters or a configuration.
        """
        # A foreign file may hold anything under these keys.
        content = self.skeleton if isinstance(self.skeleton, dict) else {}
        hyper_parameters = content.get("hyper_parameters")
        config = hyper_parameters.get("config") if isinstance(hyper_parameters, dict) else None
        keys = config.keys() if isinstance(config, dict) else set()
        if not {"tokens_seen", "state_dict"} <= content.keys() or not {"model", "ffn", "data", "trainer"} <= keys:
            raise CheckpointError(
                f"{self.path} was not written by this package; use one from a run's checkpoints folder."
            )

    def check_training(self) -> None:
        """Refuses a checkpoint that training cannot continue from.

        Raises:
            CheckpointError: it holds weights only.
        """
        if not {"optimizer_states", "lr_schedulers", "loops"} <= self.skeleton.keys():
            raise CheckpointError(
                f"{self.path} holds weights only, from which training cannot continue; restore the run's own "
                "checkpoint, or start again with resume=never."
            )

    def check_weights(self, shapes: Mapping[str, Sequence[int] | None], later: Collection[str] = ()) -> None:
        """Refuses weights other than those of a module whose state has these names and shapes; see `misfits`.

        Raises:
            CheckpointError: names what is missing, unexpected, or of another shape.
        """
        misfits = self.misfits(shapes, later)
        if misfits:
            raise CheckpointError(
                f"{self.path} does not fit its configuration ({misfits}); restore the config.yaml that it was "
                "trained with, or use another checkpoint."
            )

    def misfits(self, shapes: Mapping[str, Sequence[int] | None], later: Collection[str] = ()) -> str:
        """Returns what is missing, unexpected or of another shape, in words; an empty text if all weights fit.

        Args:
            shapes: by the names in the module's state; None is any shape.
            later: names that an earlier version of the module lacked, as `later_buffers` returns them.
        """
        names = (name for name in self.shapes if name.startswith("state_dict."))
        saved = {name.removeprefix("state_dict."): tuple(self.shapes[name][0]) for name in names}
        expected = {name: tuple(saved.get(name, ()) if shape is None else shape) for name, shape in shapes.items()}
        common = sorted(saved.keys() & expected.keys())
        faults = {
            "missing": sorted(expected.keys() - saved.keys() - set(later)),
            "unexpected": sorted(saved.keys() - expected.keys()),
            "of another shape": [f"{n} {saved[n]}, not {expected[n]}" for n in common if saved[n] != expected[n]],
        }
        return "; ".join(f"{kind}: {_few(names)}" for kind, names in faults.items() if names)

    def check_sums(self, without: Collection[str] = (), share: Share = ALL) -> None:
        """Compares the file or folder to the sums that were stored when it was written.

        Args:
            without: names of tensors that are not read.
            share: what this rank reads, where several check one checkpoint together.

        Raises:
            CheckpointError: something differs; names the file and the tensor.
        """
        with self._damage_reported():
            self._content.check_sums(without, share)

    @property
    def config(self) -> dict[str, Any]:
        """The resolved configuration of the run; not checked for classes of other packages."""
        return dict(self.skeleton["hyper_parameters"]["config"])

    def optimizer(self, number: int) -> dict[str, Any]:
        """Returns the skeleton of an optimizer's state dict."""
        states: dict[str, Any] = self.skeleton["optimizer_states"][number]
        return states

    def read_into(self, targets: dict[str, Tensor]) -> None:
        """Fills `targets` in place, of a DTensor this rank's part. Collective for a folder: call on all ranks.

        Raises:
            CheckpointError: a tensor's shape differs from its target's, or a file cannot be read.
        """
        for name, target in targets.items():
            if self.shapes[name][0] != target.shape:
                raise CheckpointError(
                    f"{self.path}: {name} has the shape {tuple(self.shapes[name][0])}, here it is "
                    f"{tuple(target.shape)}: it was written with another configuration."
                )
        self._content.read_into(
            {self._stored(n): t for n, t in targets.items() if self._stored(n) not in self._derived}
        )
        for name, target in targets.items():
            if (derived := self._derived.get(self._stored(name))) is not None:
                fill(target, derived.values())

    def read(self, without: Sequence[str] = ()) -> dict[str, Any]:
        """Returns everything but the top-level keys `without`, whole on every rank, in memory that may be written to.

        Collective for a folder: call on all ranks.
        """
        skeleton, names = self._part(without)
        tensors = {name: torch.empty(self.shapes[name][0], dtype=self.shapes[name][1]) for name in names}
        self.read_into(tensors)
        with self._damage_reported():
            return dict(restore(skeleton, tensors))

    def map(self, without: Sequence[str] = ()) -> dict[str, Any]:
        """Returns what `read` returns, but the tensors of one file stay there, and a write to them ends the process."""
        skeleton, names = self._part(without)
        with self._damage_reported():
            return dict(restore(skeleton, self._content.mapped(names)))

    def include(
        self, rows: Mapping[str, Sequence[tuple[MappedFile, Tensor]]], config: Mapping[str, Any], digests: Sequence[str]
    ) -> None:
        """Adds tensors that lie in files of their own to those that `chunks` returns, for an export.

        Args:
            rows: mapped parts of tensors, one below the other, by the names of these.
            config: in which they are weights like the others.
            digests: names of the tensors that stood for them.
        """
        for name in digests:
            del self.shapes[name]
        for name, parts in rows.items():
            first = parts[0][1]
            shape = torch.Size((sum(len(values) for _, values in parts), *first.shape[1:]))
            self.shapes[name], self._included[name] = (shape, first.dtype), parts
        self.skeleton = {**self.skeleton, "hyper_parameters": {"config": dict(config)}}

    def derive(
        self, tensors: Mapping[str, DerivedTensor], *, without: Collection[str], config: Mapping[str, Any]
    ) -> None:
        """Replaces stored tensors by computed ones in what `read_into` and `chunks` return.

        Args:
            tensors: by name.
            without: names of the tensors that they are computed from.
            config: in which they are weights like the others.
        """
        for name in without:
            del self.shapes[name]
        self.shapes |= {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        self._derived |= tensors
        self.skeleton = {**self.skeleton, "hyper_parameters": {"config": dict(config)}}

    def rename(self, names: Mapping[str, str]) -> None:
        """Renames tensors, for a model whose modules have other names: `names` maps new ones to those of before."""
        renamed = {new: self.shapes[old] for new, old in names.items()}
        stored = {new: self._stored(old) for new, old in names.items()}
        for old in names.values():
            self.shapes.pop(old, None)
        self.shapes |= renamed
        self._stored_names |= stored

    def whole(self, name: str) -> Tensor:
        """Returns a stored tensor whole: a view of the file, or put together from the parts that ranks wrote."""
        with self._damage_reported():
            chunks = self._content.chunks(name)
        shape, dtype = self._content.shapes[name]
        if len(chunks) == 1:
            return chunks[0].values
        values = torch.empty(shape, dtype=dtype)
        for offsets, part in chunks:
            values[tuple(slice(low, low + size) for low, size in zip(offsets, part.shape, strict=True))] = part
        return values

    def replace_rows(self, rows: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Puts rows into the place of those that `chunks` returns, for an export.

        Args:
            rows: numbers of rows, ascending, (U,), and their values, (U, ...), by the name of the tensor.
        """
        self._replaced.update(rows)

    def chunks(self, name: str) -> list[Chunk]:
        """Returns the mapped blocks of a tensor: one, or as many as ranks wrote; more where rows are replaced.

        Raises:
            CheckpointError: a file is damaged.
        """
        name = self._stored(name)
        chunks = self._stored_chunks(name)
        return with_rows(chunks, *self._replaced[name]) if name in self._replaced else chunks

    def _stored_chunks(self, name: str) -> list[Chunk]:
        if name in self._derived:
            return [Chunk((0,) * len(self._derived[name].shape), self._derived[name].values())]
        if name in self._included:
            values = [values for _, values in self._included[name]]
            starts = accumulate((len(part) for part in values), initial=0)
            return [Chunk((start, 0), part) for start, part in zip(starts, values, strict=False)]
        with self._damage_reported():
            return self._content.chunks(name)

    def forget(self) -> None:
        """Releases the memory of all pages read through `chunks` so far."""
        self._content.forget()
        for parts in self._included.values():
            for file, _ in parts:
                file.forget()

    def _stored(self, name: str) -> str:
        return self._stored_names.get(name, name)

    def _part(self, without: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
        skeleton = {key: value for key, value in self.skeleton.items() if key not in without}
        return skeleton, [name for name in self.shapes if name.split(".")[0] not in without]

    @contextlib.contextmanager
    def _damage_reported(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            raise
        except DamagedFileError as error:
            raise CheckpointError(f"{self.path} is damaged ({error}); use another one.") from None
        except PermissionError as error:
            raise CheckpointError(f"{self.path} cannot be read ({error.strerror}); use another one.") from None
        except Exception:  # torch has half a dozen classes for a file that it cannot read
            raise CheckpointError(f"{self.path} is damaged or no checkpoint; {_better(self.path)}.") from None


def _better(path: Path) -> str:
    """Returns what to give in the place of `path`: of a folder with weights these, or the folder as a model."""
    if advice := advice_for_folder(path):
        return advice
    inside = next(iter(sorted(path.glob("*.safetensors"))), None)
    return "use another one" if inside is None else f"give its file: ckpt={inside}"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
