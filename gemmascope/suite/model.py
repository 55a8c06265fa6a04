"""The language model of a run: any Gemma 2 or 3 from the hub or a folder, and what identifies it."""

import hashlib
import os
import platform
import re
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors
import torch
from torch import nn

from ..checks import check_device, check_type, dtype_name
from ..errors import BadFileError, EnvironmentProblemError
from ..formats.files import open_file, read_json, shown
from ..formats.hub import fetch, snapshot
from ..sites import Site, all_sites, site_width
from ..sites.decoder import find_decoder, refuse_attention_without_cap
from ..version import __version__
from .config import ModelSection

# Of config.json. A multimodal Gemma 3 is one of "gemma3", whose text model has the sites.
MODEL_TYPES = ("gemma2", "gemma3_text", "gemma3")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
WANTED = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja")
_COMMIT = re.compile(r"[0-9a-f]{40}", re.ASCII)
_HASHED_AT_ONCE = 16 << 20

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Loaded:
    """A language model that is ready to run, or on the device meta, where it only has shapes."""

    model: nn.Module
    tokenizer: Any
    """From the same place; None beside a model on meta."""
    identity: dict[str, Any]
    """What a run that goes on must find unchanged, as values of JSON."""
    name: str
    """For people and for the metadata of SAEs, such as ``google/gemma-2-2b``."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """Every site of it, layer by layer."""
        return tuple(all_sites(self.model))

    def width(self, site: Site) -> int:
        return site_width(self.model, site)

    @property
    def is_meta(self) -> bool:
        return next(self.model.parameters()).is_meta


@contextmanager
def plain_defaults() -> Iterator[None]:
    """PyTorch's own default dtype and device: transformers and AdamW make tensors by them, whatever the caller set."""
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float32)
    try:
        with nullcontext() if device.type == "cpu" else torch.device("cpu"):  # the latter slows every operator
            yield
    finally:
        torch.set_default_dtype(dtype)


def as_device(device: torch.device | str) -> torch.device:
    """The device of that name; ``auto`` is the first GPU that PyTorch sees, else the CPU. Raises as `check_device`."""
    if device == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return check_device("run.device", device)


def dtype_of(section: ModelSection, device: torch.device) -> torch.dtype:
    """The dtype of the weights: ``auto`` is bfloat16 on a GPU and float32 elsewhere."""
    if section.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return torch.float32 if section.dtype == "float32" else torch.bfloat16


@plain_defaults()
def load_model(
    section: ModelSection,
    device: torch.device | str = "auto",
    progress: Progress | None = None,
    others: Collection[str] = (),
) -> Loaded:
    """The model and its tokenizer, in evaluation mode, without gradients, on ``device``.

    ``section.name`` is a folder, else a repository of the hub, fetched once; without the network (or with
    HF_HUB_OFFLINE=1) the hub's cache serves. Nothing but safetensors and JSON is read. ``progress(bytes, of)`` while a
    folder's weights are hashed. others: types of models that are taken too, though they have no decoder of a Gemma.

    Raises ValueError for what is no Gemma 2 or 3, or is quantised, and for a revision of a folder; BadFileError for a
    repository, revision or file that is missing or damaged; EnvironmentProblemError for restricted access, no network,
    attention that drops the soft-cap, packages that are missing, no such device and too little memory.
    """
    check_type("section", section, ModelSection)
    device, place = as_device(device), _Place.of(section)
    config = place.config(section, others)
    transformers = _transformers()
    folder, dtype = place.whole(), dtype_of(section, device)
    identity = _identity(section, place, config, dtype)
    if place.commit is None:
        identity["files"] = content_of(folder, progress)
    try:
        with _without_bars(transformers):
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation=section.attention,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise EnvironmentProblemError(f"model: expected memory for {place.name}, found too little") from error
    except ImportError as error:
        raise EnvironmentProblemError(f"model: cannot be loaded: {_first_line(error)}") from error
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise BadFileError(f"{shown(folder)}: expected weights of a Gemma, found {_first_line(error)}") from error
    _refuse_gaps(folder, report)
    if identity["type"] not in others:
        find_decoder(model)
    return Loaded(_moved(model, device), _tokenizer(folder), identity, place.name)


@plain_defaults()
def load_architecture(section: ModelSection, device: torch.device | str = "auto") -> Loaded:
    """The same model without weights, on the device meta: what a plan needs. Reads config.json alone; raises as
    `load_model`. device: the one on which it would run, by which dtype ``auto`` goes."""
    check_type("section", section, ModelSection)
    place = _Place.of(section)
    config, dtype = place.config(section), dtype_of(section, as_device(device))
    return architecture(config, place.name, dtype, _identity(section, place, config, dtype))


def architecture(config: Any, name: str, dtype: torch.dtype, identity: dict[str, Any] | None = None) -> Loaded:
    """A model on the device meta from a config of transformers. Raises ValueError for one of which none can be made."""
    transformers = _transformers()
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, TypeError, KeyError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"{name}: expected the config of a Gemma, found {_first_line(error)}") from error
    find_decoder(model)
    return Loaded(model.requires_grad_(False).eval(), None, identity or {}, name)


@dataclass(frozen=True)
class _Place:
    """Where a model is: a folder, or a commit of a repository."""

    name: str
    folder: Path | None
    commit: str | None
    config_file: Path
    repo: str | None

    @classmethod
    def of(cls, section: ModelSection) -> "_Place":
        folder = Path(section.name)
        if folder.is_dir():
            if section.revision is not None:
                raise ValueError(
                    f"model.revision: expected none for the folder {shown(folder)}, got {section.revision!r}"
                )
            name = folder.resolve().name
            return cls(name, folder, None, folder / "config.json", None)
        if folder.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", section.name) or section.name.startswith("."):
            raise ValueError(f"model.name: expected a folder or OWNER/NAME on the hub, found neither: {section.name}")
        file = fetch(section.name, section.revision, PurePosixPath("config.json"))
        assert file is not None
        commit = file.parent.name if _COMMIT.fullmatch(file.parent.name) else section.revision
        return cls(section.name, None, commit, file, section.name)

    def config(self, section: ModelSection, others: Collection[str] = ()) -> Any:
        """The model's config, refused where it is none of ours or its attention would deceive."""
        facts = read_json(self.config_file)
        kind = facts.get("model_type") if isinstance(facts, dict) else None
        if kind not in (*MODEL_TYPES, *others):
            raise ValueError(f"model.name: expected a Gemma 2 or Gemma 3, got {self.name}, whose type is {kind!r}")
        if facts.get("quantization_config") is not None:
            raise ValueError(f"model.name: expected weights that are not quantised, got {self.name}, which are")
        transformers = _transformers()
        try:
            config = transformers.AutoConfig.from_pretrained(self.config_file.parent, local_files_only=True)
            config._attn_implementation = section.attention
            text = config.get_text_config()
        except Exception as error:  # whatever the checks of a config raise, which differ between versions
            raise BadFileError(
                f"{shown(self.config_file)}: expected a Gemma's config, found {_first_line(error)}"
            ) from error
        refuse_attention_without_cap(text)
        return config

    def whole(self) -> Path:
        """The folder with all files of the model, fetched if need be."""
        return self.folder or snapshot(str(self.repo), self.commit, WANTED)


def _identity(section: ModelSection, place: _Place, config: Any, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "name": place.name,
        "revision": place.commit,
        "files": None,
        "type": config.model_type,
        "dtype": dtype_name(dtype),
        "attention": section.attention,
    }


def content_of(folder: Path, progress: Progress | None = None) -> str:
    """A hash of config.json and of the weights of a folder: SHA-256 over the names and SHA-256 of these files."""
    files = sorted([folder / "config.json", *folder.glob("*.safetensors")])
    try:
        total, done = sum(file.stat().st_size for file in files), 0
    except OSError as error:
        raise EnvironmentProblemError(f"{shown(folder)}: cannot be read: {error.strerror}") from error
    every = hashlib.sha256()
    for path in files:
        digest = hashlib.sha256()
        with open_file(path) as file:
            while chunk := file.read(_HASHED_AT_ONCE):
                digest.update(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
        every.update(f"{digest.hexdigest()}  {path.name}\n".encode())
    return every.hexdigest()


def _refuse_gaps(folder: Path, report: dict[str, Any]) -> None:
    """transformers fills weights that are missing with random ones, and says so in a log only."""
    missing = sorted(map(str, report.get("missing_keys") or ()))
    mismatched = sorted(map(str, report.get("mismatched_keys") or ()))
    if missing or mismatched:
        what = f"{missing[0]} missing" if missing else f"{mismatched[0]} of another shape"
        rest = len(missing) + len(mismatched) - 1
        raise BadFileError(
            f"{shown(folder)}: expected all weights of its config, found {what}" + (f" and {rest} more" if rest else "")
        )


def _moved(model: nn.Module, device: torch.device) -> nn.Module:
    try:
        return model.requires_grad_(False).eval().to(device)
    except torch.OutOfMemoryError as error:
        size = sum(p.nbytes for p in model.parameters()) / 2**30
        raise EnvironmentProblemError(f"model: expected {size:.1f} GiB of memory on {device}, found less") from error


def _tokenizer(folder: Path) -> Any:
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        # transformers would make an empty one.
        raise BadFileError(f"{shown(folder)}: expected a tokenizer, {' or '.join(TOKENIZER_FILES)}, found neither")
    try:
        return _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # of as many kinds as there are kinds of tokenizers
        raise BadFileError(f"{shown(folder)}: expected a tokenizer, found {_first_line(error)}") from error


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise EnvironmentProblemError(
            'transformers: expected to be installed to load a model, found none: pip install "gemmascope[train]"'
        ) from error
    return transformers


@contextmanager
def _without_bars(transformers: Any) -> Iterator[None]:
    """The bars of transformers, which fail where standard error is closed."""
    bars = transformers.utils.logging
    shown_before = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown_before:
            bars.enable_progress_bar()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def environment(device: torch.device | str) -> dict[str, Any]:
    """What bit-exact results also depend on: versions, device, threads; as values of JSON."""
    device = as_device(device)
    is_gpu = device.type == "cuda"
    return {
        "gemmascope": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": str(_transformers().__version__),
        "device": torch.cuda.get_device_name(device) if is_gpu else f"{device.type} {platform.machine()}",
        "threads": None if is_gpu else torch.get_num_threads(),
        "processors": os.cpu_count(),
    }
