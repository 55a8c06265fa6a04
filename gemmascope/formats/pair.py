"""Two files that are one thing, an SAE's weights and their config: replaced together, read together.

No rename replaces two files. A writer completes both in a folder of its own; the rename of that folder to ``.new-NAME``
(NAME is that of the weights) is the commit. From then on what lies in it is in force, and for what has left it the file
outside. Then both move to their places, which changes nothing in force, and the folder goes. Of a process killed
between, the next writer makes the moves; readers look into the folder first, so that they need not write.
"""

import contextlib
import errno
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import BadFileError, EnvironmentProblemError
from .files import ATTEMPTS, LOCK, create, finish, flush_folder, open_file, shown, staging


class Pair(NamedTuple):
    """The places of two files in one folder."""

    weights: Path
    config: Path

    @property
    def committed(self) -> Path:
        """The folder of what was saved and has not come to its place."""
        return self.weights.with_name(f".new-{self.weights.name}")

    def places(self, path: Path) -> tuple[Path, Path]:
        """Where the file ``path`` of the pair may be, in the order to look: a writer moves it from first to second."""
        return self.committed / path.name, path

    @contextlib.contextmanager
    def open(self) -> Iterator[tuple[io.BufferedReader, io.BufferedReader | None]]:
        """The files of one save, weights and config, open for reading; None where there is no config.

        Raises BadFileError when there are no weights; EnvironmentProblemError when others keep replacing them.
        """
        for _ in range(ATTEMPTS):
            with contextlib.ExitStack() as files:
                config, weights, again = (self._open(path, files) for path in (self.config, self.weights, self.config))
                # The config before the weights were opened is that after: all three were in force at once.
                if _is_same(config, again):
                    if weights is None:
                        raise BadFileError(f"{shown(self.weights)}: expected a file, found none")
                    yield weights, config
                    return
        raise EnvironmentProblemError(f"{shown(self.weights)}: cannot be read: other processes keep replacing it")

    def _open(self, path: Path, files: contextlib.ExitStack) -> io.BufferedReader | None:
        for place in self.places(path):
            if os.path.lexists(place):
                try:
                    return files.enter_context(open_file(place))
                except BadFileError as error:
                    # Moved on, or a link to nothing. That it is there again says no more: another writer's may be.
                    if not isinstance(error.__cause__, FileNotFoundError) or place.is_symlink():
                        raise
        return None

    @contextlib.contextmanager
    def replacing(self) -> Iterator["Pair"]:
        """Yields temporary places of both files, which become the pair in force when the block ends, or not at all.

        As with `atomic_write`; an EnvironmentProblemError may also come when the files are in force but cannot be moved
        to their places, which the next writer does.
        """
        with staging(self.weights) as stage:
            if self.config.is_dir():
                raise IsADirectoryError(f"{self.config.name} is a folder")
            temporary = Pair(*(stage / path.name for path in self))
            modes = [create(path) for path in temporary]
            yield temporary
            for path, mode in zip(temporary, modes, strict=True):
                finish(path, mode)
            flush_folder(stage)
            self._commit(stage)

    def _commit(self, stage: Path) -> None:
        for _ in range(ATTEMPTS):
            self._settle()
            try:
                os.rename(stage, self.committed)  # also over an empty folder, never over another writer's files
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
        else:
            raise FileExistsError(f"other files stay in {self.committed.name}")
        flush_folder(self.weights.parent)
        self._settle()

    def _settle(self) -> None:
        """Move what is committed to its place; several processes may do so at once."""
        if not os.path.lexists(self.committed):
            return
        for path in self:
            with contextlib.suppress(FileNotFoundError):
                os.replace(self.committed / path.name, path)
        flush_folder(self.weights.parent)
        with contextlib.suppress(OSError):
            (self.committed / LOCK).unlink(missing_ok=True)
            self.committed.rmdir()


def _is_same(one: io.BufferedReader | None, other: io.BufferedReader | None) -> bool:
    if one is None or other is None:
        return one is other
    return os.path.samestat(os.fstat(one.fileno()), os.fstat(other.fileno()))
