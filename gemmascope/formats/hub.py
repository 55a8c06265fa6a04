"""Files of Hugging Face repositories, with the hub's many errors as ours."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from ..errors import BadFileError, EnvironmentProblemError


def fetch(repo: str, revision: str | None, path: PurePosixPath, optional: bool = False) -> Path | None:
    """The local copy of one file of ``repo``; None when there is none and it is ``optional``.

    Raises BadFileError when the repository, revision or file does not exist; EnvironmentProblemError when
    huggingface_hub is not installed, the network is away or access is restricted.
    """
    name = f"{repo}/{path}"
    with _hub(name, repo, revision) as (hub, errors):
        try:
            return Path(hub.hf_hub_download(repo, str(path), revision=revision))
        except (errors.LocalEntryNotFoundError, errors.EntryNotFoundError):
            if optional:
                return None
            raise


def snapshot(repo: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The folder of the local copies of the files of ``repo`` that match one of ``patterns``. Raises as `fetch`."""
    with _hub(repo, repo, revision) as (hub, _):
        return Path(hub.snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))


@contextmanager
def _hub(name: str, repo: str, revision: str | None) -> Iterator[tuple]:
    """The package huggingface_hub and its errors, which become ours in this block; ``name`` is what is fetched."""
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise EnvironmentProblemError(
            "huggingface_hub: expected to be installed to read from the hub, found none:"
            ' pip install "gemmascope[train]"'
        ) from error
    try:
        yield huggingface_hub, errors
    except errors.HFValidationError as error:
        raise BadFileError(f"repo: expected an existing folder or 'owner/name', found {repo!r}") from error
    except errors.GatedRepoError as error:
        raise EnvironmentProblemError(
            f"{name}: access is restricted: accept its licence on huggingface.co and log in (hf auth login)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise BadFileError(f"{repo}: expected a Hugging Face repository, found none (or a private one)") from error
    except errors.RevisionNotFoundError as error:
        raise BadFileError(f"{repo}: expected revision {revision!r}, found none of that name") from error
    except errors.LocalEntryNotFoundError as error:
        raise EnvironmentProblemError(f"{name}: not in the local cache and the hub cannot be reached") from error
    except errors.EntryNotFoundError as error:
        raise BadFileError(f"{name}: expected a file of that name in the repository, found none") from error
    except Exception as error:  # the HTTP client's own errors, whose classes differ between versions of the hub
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise EnvironmentProblemError(f"{name}: cannot be fetched: {reason}") from error
