"""`BaseSAE`: what the SAEs share, whatever selects the latents that fire."""

import copy
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from ..autocast import without_autocast
from ..checks import FLOATS, check_device, check_int, check_number, check_type, dtype_name
from ..errors import BadFileError
from ..formats import export, folding, release
from ..formats.export import KINDS
from ..formats.files import shown
from ..formats.manifest import SAEConfig
from ..formats.stored import StoredSAE, keys_of, problem_in_numbers
from ..kernels import SparseCode
from .codec import Codec

# What an SAE of each architecture may have been trained as; first, what it is where it does not say.
KINDS_OF: Mapping[str, tuple[str, ...]] = {
    "jump_relu": ("jumprelu", "relu", "gated", "batchtopk", "matryoshka"),
    "topk": ("topk",),
}


class BaseSAE(Codec):
    """One encoder, one decoder, an input scale C and a pre-encoder bias.

        z = (x/C − b_dec)·W_enc + b_enc;   x̂ = C·(f·W_dec + b_dec)

    A subclass says which latents fire: it has `encode_sparse` and `_encode_densely`, and names in ``PARAMETERS`` all
    that f depends on.
    """

    # What a state dict holds beside the parameters: attributes of the same names, and their dtypes there.
    SCALARS: ClassVar[Mapping[str, torch.dtype]] = {"input_scale": torch.float64, "pre_encoder_bias": torch.bool}
    ARCHITECTURE: ClassVar[str]
    # As what every SAE of the class is trained; None: as its metadata say.
    KIND: ClassVar[str | None] = None
    # Parameters that training moves beside W_enc, b_enc, W_dec, b_dec and the threshold.
    OTHERS: ClassVar[Sequence[str]] = ()

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        *,
        pre_encoder_bias: bool,
        input_scale: float,
        impl: str,
        metadata: dict[str, Any] | None,
        generator: torch.Generator | None,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ):
        super().__init__()
        check_int("d_model", d_model, 1)
        check_int("d_sae", d_sae, 1)
        check_number("input_scale", input_scale, 0, open_low=True)
        check_type("pre_encoder_bias", pre_encoder_bias, bool)
        check_type("impl", impl, str)
        if metadata is not None:
            check_type("metadata", metadata, dict)
        if generator is not None:
            check_type("generator", generator, torch.Generator)
            if generator.device.type != "cpu":
                raise ValueError(f"generator: expected one of the CPU, got {generator.device}")
        check_type("dtype", dtype, torch.dtype)
        check_float("dtype", dtype)
        device = check_device("device", "cpu" if device is None else device)
        self.pre_encoder_bias = pre_encoder_bias
        self.input_scale = float(input_scale)
        self.impl = impl
        self.metadata = dict(metadata or {})

        drawn_on = "meta" if device.type == "meta" else "cpu"
        W_dec = torch.empty(d_sae, d_model, dtype=torch.float32, device=drawn_on)
        bound = math.sqrt(6 / d_model)
        W_dec.uniform_(-bound, bound, generator=generator)
        W_dec /= W_dec.norm(dim=1, keepdim=True)
        options = {"device": device, "dtype": dtype}
        self.W_enc = nn.Parameter(W_dec.clone().to(**options).T)
        self.b_enc = nn.Parameter(torch.zeros(d_sae, **options))
        self.W_dec = nn.Parameter(W_dec.to(**options))
        self.b_dec = nn.Parameter(torch.zeros(d_model, **options))

    @property
    def d_model(self) -> int:
        return self.W_dec.shape[1]

    @property
    def kind(self) -> str:
        """As what it was trained: `jumprelu`, `relu`, `gated`, `topk`, `batchtopk` or `matryoshka`.

        A file holds most of them as the JumpReLU SAEs that they are: then the ``kind`` of its metadata says it, and
        without one it is `jumprelu`."""
        if self.KIND is not None:
            return self.KIND
        kinds = KINDS_OF[self.ARCHITECTURE]
        said = self.metadata.get("kind")
        return said if said in kinds else kinds[0]

    @property
    def is_folded(self) -> bool:
        return self.input_scale == 1.0 and not self.pre_encoder_bias

    def extra_repr(self) -> str:
        folded = "folded" if self.is_folded else f"input_scale={self.input_scale:.6g}"
        return f"d_model={self.d_model}, d_sae={self.d_sae}, {folded}, impl={self.impl!r}"

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """The parameters, and what else the function of the SAE depends on: ``input_scale``, an fp64 scalar, and
        ``pre_encoder_bias``, a bool scalar.

        The tensors are the parameters themselves, W_enc the transposed view that it is. Therefore
        `safetensors.torch.save_file` refuses the dict, naming W_enc; `safetensors.torch.save_model` takes the module.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, dtype in self.SCALARS.items():
            destination[prefix + name] = torch.tensor(getattr(self, name), dtype=dtype, device="cpu")

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Also with ``assign=True`` W_enc stays latent-major."""
        found = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, found, error_msgs)
        scalars = {prefix + name: name for name in self.SCALARS}
        unexpected_keys += [key for key in found if key not in scalars]
        for key, name in scalars.items():
            if key not in state_dict:
                missing_keys += [key] if strict else []
                continue
            problem = self._scalar_problem(name, state_dict[key])
            if problem:
                error_msgs.append(f"{key}: {problem}")
            else:
                setattr(self, name, state_dict[key].item())
        if not self.W_enc.T.is_contiguous():
            self.W_enc = nn.Parameter(self.W_enc.detach().T.contiguous().T, self.W_enc.requires_grad)

    def _scalar_problem(self, name: str, value: Any) -> str | None:
        """Why `value` of a state dict cannot be that attribute, or None."""
        if not isinstance(value, Tensor):
            return f"expected a torch.Tensor, got {type(value).__name__}"
        if value.shape != ():
            return f"expected a scalar, got shape {list(value.shape)}"
        if name == "pre_encoder_bias":
            return None if value.dtype == torch.bool else f"expected bool, got {dtype_name(value.dtype)}"
        if value.dtype not in (torch.float32, torch.float64):  # a scale of fewer digits would be another function
            return f"expected float64, got {dtype_name(value.dtype)}"
        scale = value.item()
        return None if math.isfinite(scale) and scale > 0 else f"expected a finite number > 0, got {scale}"

    def _encoder_input(self, x: Tensor) -> Tensor:
        x = super()._encoder_input(x)
        if self.input_scale != 1.0:
            x = x / self.input_scale
        return x - self.b_dec if self.pre_encoder_bias else x

    def decode(self, f: Tensor | SparseCode) -> Tensor:
        """x̂ [..., d_model] of dense activations [..., d_sae], or [N, d_model] of a `SparseCode`."""
        x_hat = self._decoded(f)
        return x_hat * self.input_scale if self.input_scale != 1.0 else x_hat

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction x̂ of x [..., d_model], in the shape and dtype of x.

        Differentiable. Where no gradient is asked for (``torch.no_grad()``, or nothing requires one) it is made from
        the active entries alone, by `encode_sparse` and `decode`, unless they are so many that whole matrices are
        faster (`gemmascope.kernels.density`).
        """
        f = self._activations(x)
        x_hat = self.decode(f)
        # Only entries lose the shape: FSDP2 warns of an output that is a view.
        return (x_hat.reshape(x.shape) if isinstance(f, SparseCode) else x_hat).to(x.dtype)

    def released(self) -> Codec:
        """What a training leaves: the same function, folded, as a class that files hold. A copy."""
        return self.fold()

    @torch.no_grad()
    @without_autocast
    def fold(self) -> Self:
        """The same function with input_scale 1 and no pre-encoder bias (arXiv 2408.05147, appendix A), as a copy. See
        `formats.folding.fold`."""
        tensors, config = folding.fold(*self.stored())
        folded = copy.deepcopy(self)
        for key in tensors.keys() - {"W_enc", "W_dec"}:
            getattr(folded, key).copy_(tensors[key])
        folded.input_scale, folded.pre_encoder_bias = config.input_scale, config.pre_encoder_bias
        return folded

    # ---- files

    def _config(self) -> SAEConfig:
        """What a file says of this SAE beside its tensors."""
        return SAEConfig(self.input_scale, self.pre_encoder_bias, self.metadata, architecture=self.ARCHITECTURE)

    def stored(self) -> StoredSAE:
        """The tensors, detached, the threshold at least 0, and what goes with them, as `formats` writes them."""
        config = self._config()
        tensors = {key: getattr(self, key).detach() for key in keys_of(config)}
        if "threshold" in tensors:
            tensors["threshold"] = tensors["threshold"].clamp(min=0)
        return StoredSAE(tensors, config)

    @classmethod
    def _of_config(cls, config: SAEConfig, **options: Any) -> Self:
        """An SAE of one latent of width 1 with that config."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike) -> None:
        """Write the SAE: Gemma Scope 1 when ``path`` ends in .npz (which TopK cannot), else a folder of safetensors and
        config.json.

        The weights reload to the same bits, but that thresholds below 0 are written as the 0 they count as. See
        `formats.release.write`.
        """
        release.write(path, *self.stored())

    @classmethod
    def load(
        cls, path: str | os.PathLike, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Read what `save` wrote, a Gemma Scope 1 or 2 file or folder, or a folder of SAELens, sparsify or
        dictionary_learning. See `formats.release.read`.

        device: None is the CPU. dtype: of the weights, None for that of the file; the threshold comes out as fp32 (fp64
        with fp64 weights). Raises BadFileError for all that `formats.release.read` refuses and for an SAE of another
        class, which `gemmascope.load_sae` opens; ValueError for a dtype in which a weight is Inf.
        """
        device, dtype = check_placement(device, dtype)
        return cls._from_stored(release.read(path), shown(path), device, dtype)

    @classmethod
    def from_pretrained(
        cls,
        repo: str | os.PathLike,
        path: str | os.PathLike,
        *,
        revision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Self:
        """An SAE from a Hugging Face repository, or from a local folder of that name.

            JumpReLUSAE.from_pretrained("google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71")

        device, dtype: as for `load`. See `formats.release.read_pretrained`.
        """
        device, dtype = check_placement(device, dtype)
        stored = release.read_pretrained(repo, path, revision=revision)
        return cls._from_stored(stored, f"{shown(repo)}/{shown(path)}", device, dtype)

    @classmethod
    def _from_stored(cls, stored: StoredSAE, name: str, device: torch.device, dtype: torch.dtype | None) -> Self:
        """name: of the file, for errors. device, dtype: as `check_placement` returns them."""
        tensors, config = stored
        if config.architecture != cls.ARCHITECTURE:
            raise BadFileError(
                f"{name}: expected {KINDS[cls.ARCHITECTURE].name}, found {KINDS[config.architecture].name}:"
                " gemmascope.load_sae opens both"
            )
        # One latent of width 1, since the constructor draws random weights: the stored ones take their place.
        sae = cls._of_config(
            config,
            pre_encoder_bias=config.pre_encoder_bias,
            input_scale=config.input_scale,
            metadata=config.metadata,
            device="cpu",
        )
        weights = placed(tensors, device, dtype or tensors["W_dec"].dtype)
        weights["W_enc"] = weights["W_enc"].T.contiguous().T
        for key, tensor in weights.items():
            setattr(sae, key, nn.Parameter(tensor.contiguous() if key != "W_enc" else tensor))
        return sae


def check_placement(
    device: torch.device | str | None, dtype: torch.dtype | None
) -> tuple[torch.device, torch.dtype | None]:
    """The arguments ``device`` and ``dtype`` of loading. Raises as their checks do, before anything is read."""
    if dtype is not None:
        check_type("dtype", dtype, torch.dtype)
        check_float("dtype", dtype)
    return check_device("device", "cpu" if device is None else device), dtype


def check_float(name: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        raise TypeError(f"{name}: expected {' or '.join(map(dtype_name, FLOATS))}, got {dtype_name(dtype)}")


def placed(tensors: dict[str, Tensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights of a file in ``dtype``, the threshold in fp32 at least, on the device. Raises ValueError for a dtype
    in which a weight is Inf."""
    found = export.cast(tensors, dtype)
    for key, tensor in found.items():
        if tensor is not tensors[key] and problem_in_numbers({key: tensor}):
            raise ValueError(f"dtype: expected one that holds {key}, got {dtype_name(dtype)}, in which it is Inf")
    return {key: tensor.to(device) for key, tensor in found.items()}
