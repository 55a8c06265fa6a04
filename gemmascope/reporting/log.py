"""The log of a training: a row of JSON for each SAE at each step that was logged, appended as they come.

What a killed process leaves is at worst a last line cut short. It is dropped when the log is opened again, with the
rows after the step that the run resumes from, so that a run that was interrupted leaves the log of one that was not.
"""

import json
import math
import os
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from ..checks import check_int, check_type
from ..errors import BadFileError, EnvironmentProblemError
from ..formats.files import as_path, open_file, shown
from ..sites import Site

TRAIN_LOG = "train_log.jsonl"
MAX_LINE_BYTES = 1 << 16
LARGEST = 1e30  # what figures have room for
# More rows than curves show. Of a longer log every second step is read, or every fourth, ….
MAX_ROWS = 200_000


class TrainLog:
    """Appends to the log ``path``; it and its folder are made if missing.

        with TrainLog(folder / TRAIN_LOG, {"layer_3/resid": Site(3, "resid")}, step=resumed_step) as log:
            log.append(step, {"layer_3/resid": {"l0": 41.2, "fvu": 0.12}})

    sites: of every SAE that rows will name. step: rows after it are dropped; 0 for a new training. A line written
    stays when the process is killed; after `sync` also when the machine is.

    Raises BadFileError when what is there is no such log, EnvironmentProblemError when it cannot be opened or cut.
    """

    def __init__(self, path: str | os.PathLike, sites: Mapping[str, Site], *, step: int = 0):
        self.path = as_path("path", path)
        check_type("sites", sites, Mapping)
        check_int("step", step, 0)
        for name, site in sites.items():
            check_type("sites: key", name, str)
            check_type(f"sites[{name!r}]", site, Site)
        self.sites = {name: str(site) for name, site in sites.items()}
        end = _end_of(self.path, step) if step and os.path.lexists(self.path) else 0
        self._file: int | None = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            os.ftruncate(self._file, end)
        except OSError as error:
            self.close()
            raise self._problem(error) from error
        except ValueError as error:  # a NUL in the name
            raise ValueError(f"path: expected a path, got {shown(self.path)}") from error

    def append(self, step: int, rows: Mapping[str, Mapping[str, float | None]]) -> None:
        """Write a row for each SAE of ``rows`` {name: figures}; figures that are not finite become null.

        Raises ValueError for an unknown SAE, a closed log and figures that are no numbers; EnvironmentProblemError when
        they cannot be written (the disk is full, …), and then the log ends with the rows before them.
        """
        check_int("step", step, 0)
        lines = "".join(self._line(step, name, figures) for name, figures in rows.items()).encode()
        if self._file is None:
            raise ValueError(f"log: expected one that is open, got {shown(self.path)} closed")
        try:
            end, left = os.fstat(self._file).st_size, memoryview(lines)
            try:
                while left:
                    left = left[os.write(self._file, left) :]
            except OSError:
                with suppress(OSError):
                    os.ftruncate(self._file, end)
                raise
        except OSError as error:
            raise self._problem(error) from error

    def _line(self, step: int, name: str, figures: Mapping[str, float | None]) -> str:
        if name not in self.sites:
            raise ValueError(f"rows: expected SAEs among sites, got {name!r:.60}")
        row: dict[str, Any] = {"step": step, "sae": name, "site": self.sites[name]}
        for key, value in figures.items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise ValueError(f"rows[{name!r}][{key!r}]: expected a number or None, got {value!r:.40}")
            row[key] = value if value is not None and math.isfinite(value) else None
        return json.dumps(row) + "\n"

    def sync(self) -> None:
        """Flush all rows to the disk. Raises EnvironmentProblemError when that fails."""
        if self._file is not None:
            try:
                os.fsync(self._file)
            except OSError as error:
                raise self._problem(error) from error

    def close(self) -> None:
        """No more rows; a second call does nothing."""
        descriptor, self._file = self._file, None
        if descriptor is not None:
            with suppress(OSError):
                os.close(descriptor)

    def __enter__(self) -> "TrainLog":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _problem(self, error: OSError) -> EnvironmentProblemError:
        return EnvironmentProblemError(f"{shown(self.path)}: cannot be written: {error.strerror or error}")


def _end_of(path: os.PathLike, step: int) -> int:
    """Bytes of the log that stay: those before its first row after ``step``, and before a damaged end.

    A power failure may leave more than a line cut short there, of which a RuntimeWarning says."""
    end, stays, first_bad = 0, True, 0
    with open_file(path) as file:
        number = 0
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            row = row_of(line) if line.endswith(b"\n") else None
            if row is None:
                stays, first_bad = False, first_bad or number
            elif first_bad:
                raise not_a_row(path, first_bad)
            elif not stays or row["step"] > step:
                stays = False
            else:
                end += len(line)
    if number > first_bad > 0:
        message = f"{shown(path)}: {number - first_bad + 1} damaged lines at its end are dropped"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
    return end


def read_rows(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The rows of the log ``path``, one for each step and SAE in the order of steps: the last written, where a resume
    repeats. `sae_of` says whose they are. Of a log of more than `MAX_ROWS` every 2ⁿ-th of its steps.

    An incomplete last line, as a kill leaves it, is ignored. Raises BadFileError when anything else is not a row.
    """
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    steps: dict[int, int] = {}  # numbered in the order they appear
    every, number = 1, 0
    with open_file(path) as file:
        while line := file.readline(MAX_LINE_BYTES):
            number += 1
            row = row_of(line)
            if row is not None:
                if steps.setdefault(row["step"], len(steps)) % every == 0:
                    rows[row["step"], sae_of(row)] = row
                while len(rows) > MAX_ROWS and every < len(steps):
                    every *= 2
                    rows = {key: row for key, row in rows.items() if steps[key[0]] % every == 0}
            elif line.endswith(b"\n") or len(line) == MAX_LINE_BYTES:
                raise not_a_row(path, number)
    return sorted(rows.values(), key=lambda row: row["step"])


def sae_of(row: Mapping[str, Any]) -> str:
    """The name of the SAE that a row is of; in logs of one SAE a site, that of the site."""
    return row.get("sae", row["site"])


def not_a_row(path: str | os.PathLike, number: int) -> BadFileError:
    return BadFileError(f"{shown(path)}: line {number}: expected an object with 'step' and 'site'")


def row_of(line: bytes) -> dict[str, Any] | None:
    """A row, or None for what is none. Figures may be NaN or infinite, as those of a training that failed."""
    try:
        row = json.loads(line, parse_constant=lambda text: math.nan)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or not isinstance(row.get("site"), str):
        return None
    if not isinstance(row.get("sae", ""), str):
        return None
    figures = (value for key, value in row.items() if key not in ("site", "sae"))
    return row if all(value is None or is_figure(value) for value in figures) else None


def is_figure(value: Any) -> bool:
    return type(value) in (int, float) and not abs(value) > LARGEST  # NaN, which JSON of ours has in logs alone, is one
