"""`JumpReLUSAE`: the sparse autoencoder as a torch module."""

import copy
import math
import os
from typing import Any

import torch
from torch import Tensor, nn

from .. import kernels
from ..autocast import affine, without_autocast
from ..checks import FLOATS, check_device, check_floating, check_int, check_number, check_type, dtype_name
from ..formats import release
from ..formats.manifest import SAEConfig
from ..formats.release import StoredSAE
from ..kernels import JumpReLUOutput, SparseCode, density

# What a state dict holds beside the parameters, which are the attributes of the same names.
STATE_SCALARS = {"input_scale": torch.float64, "pre_encoder_bias": torch.bool}


def _scalar_problem(name: str, value: Any) -> str | None:
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


class JumpReLUSAE(nn.Module):
    r"""JumpReLU sparse autoencoder (Gemma Scope, arXiv 2408.05147, equations 1-4).

        z = (x/C − b_dec)·W_enc + b_enc;   f = z·1[z > θ];   x̂ = C·(f·W_dec + b_dec)

    C = ``input_scale`` makes the inputs' mean squared norm 1 during training; ``pre_encoder_bias`` says whether b_dec
    is subtracted first. `fold` returns the same function with C = 1 and no pre-encoder bias, the form Gemma Scope
    releases.

    A latent whose θ is below 0 has θ = 0, as in f = relu(z)·1[z > θ] by which Gemma Scope's files are read: one's own
    optimiser may take θ there, its gradient arrives all the same, and what is saved is 0. See `project_`.

    Parameters: ``W_enc`` [d_model, d_sae] (stored latent-major: the transposed view of a contiguous [d_sae, d_model]),
    ``W_dec`` [d_sae, d_model], ``b_enc`` [d_sae], ``b_dec`` [d_model], ``threshold`` [d_sae], which stays fp32 whatever
    dtype the module is moved to (in bf16 it would stop learning, and the gate would move), or fp64 with fp64. Products
    are formed in the dtype of the weights, inside torch.autocast too: the same bits as without.

    ``torch.func.functional_call`` takes other weights for a call; the transforms of torch.func (vmap, grad, jvp) are
    refused with a TypeError, by their name. `fully_shard` (FSDP2) refuses W_enc, which is not contiguous.

    Initialised as in Gemma Scope: W_dec He-uniform with unit-norm rows, W_enc its transpose, biases 0. The weights are
    drawn on the CPU, so that a seed means the same ones on every device.

    d_model, d_sae: positive ints. threshold_init: ≥ 0. impl: who computes, see `gemmascope.kernels`. metadata: free
    JSON-able facts that travel with the weights (``model``, ``site``, …). generator: of the CPU. device: None is the
    CPU, whatever PyTorch's default is. dtype: fp32, bf16, fp16 or fp64. Raises ValueError or TypeError on bad values.
    """

    def __init__(
        self,
        d_model: int,
        d_sae: int,
        *,
        pre_encoder_bias: bool = True,
        input_scale: float = 1.0,
        threshold_init: float = 1e-3,
        impl: str = "auto",
        metadata: dict[str, Any] | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        check_int("d_model", d_model, 1)
        check_int("d_sae", d_sae, 1)
        check_number("input_scale", input_scale, 0, open_low=True)
        check_number("threshold_init", threshold_init, 0)
        check_type("pre_encoder_bias", pre_encoder_bias, bool)
        check_type("impl", impl, str)
        if metadata is not None:
            check_type("metadata", metadata, dict)
        if generator is not None:
            check_type("generator", generator, torch.Generator)
            if generator.device.type != "cpu":
                raise ValueError(f"generator: expected one of the CPU, got {generator.device}")
        check_type("dtype", dtype, torch.dtype)
        if dtype not in FLOATS:
            raise TypeError(f"dtype: expected {' or '.join(map(dtype_name, FLOATS))}, got {dtype_name(dtype)}")
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
        threshold_dtype = torch.promote_types(dtype, torch.float32)
        self.threshold = nn.Parameter(torch.full((d_sae,), threshold_init, device=device, dtype=threshold_dtype))

    @property
    def d_model(self) -> int:
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        return self.W_dec.shape[0]

    @property
    def is_folded(self) -> bool:
        return self.input_scale == 1.0 and not self.pre_encoder_bias

    def extra_repr(self) -> str:
        folded = "folded" if self.is_folded else f"input_scale={self.input_scale:.6g}"
        return f"d_model={self.d_model}, d_sae={self.d_sae}, {folded}, impl={self.impl!r}"

    def _apply(self, fn, recurse=True):
        threshold, grad = self.threshold.detach(), self.threshold.grad
        grad = None if grad is None else grad.detach()
        super()._apply(fn, recurse)
        moved = self.threshold
        if moved.dtype != torch.float32 and moved.dtype != torch.float64:
            moved.data = threshold.to(device=moved.device, dtype=torch.float32)
            if grad is not None:
                moved.grad = grad.to(device=moved.device, dtype=torch.float32)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        """The parameters, and what else the function of the SAE depends on: ``input_scale``, an fp64 scalar, and
        ``pre_encoder_bias``, a bool scalar.

        The tensors are the parameters themselves, W_enc the transposed view that it is. Therefore
        `safetensors.torch.save_file` refuses the dict, naming W_enc; `safetensors.torch.save_model` takes the module.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, dtype in STATE_SCALARS.items():
            destination[prefix + name] = torch.tensor(getattr(self, name), dtype=dtype, device="cpu")

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ):
        """Also with ``assign=True`` the threshold keeps its dtype and W_enc stays latent-major."""
        found = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, found, error_msgs)
        scalars = {prefix + name: name for name in STATE_SCALARS}
        unexpected_keys += [key for key in found if key not in scalars]
        for key, name in scalars.items():
            if key not in state_dict:
                missing_keys += [key] if strict else []
                continue
            problem = _scalar_problem(name, state_dict[key])
            if problem:
                error_msgs.append(f"{key}: {problem}")
            else:
                setattr(self, name, state_dict[key].item())
        dtype = torch.promote_types(self.W_dec.dtype, torch.float32)
        if self.threshold.dtype != dtype:
            self.threshold = nn.Parameter(self.threshold.detach().to(dtype), self.threshold.requires_grad)
        if not self.W_enc.T.is_contiguous():
            self.W_enc = nn.Parameter(self.W_enc.detach().T.contiguous().T, self.W_enc.requires_grad)

    def _check_rows(self, name: str, rows: Tensor, width: int) -> None:
        check_floating(name, rows)
        if rows.ndim == 0 or rows.shape[-1] != width:
            raise ValueError(f"{name}: expected shape [..., {width}], got {list(rows.shape)}")
        if rows.device != self.W_enc.device:
            raise ValueError(f"{name}: expected device {self.W_enc.device}, got {rows.device}")

    def _encoder_input(self, x: Tensor) -> Tensor:
        """x [..., d_model] as the [N, d_model] that W_enc multiplies."""
        self._check_rows("x", x, self.d_model)
        x = x.reshape(-1, self.d_model).to(self.W_enc.dtype)
        if self.input_scale != 1.0:
            x = x / self.input_scale
        return x - self.b_dec if self.pre_encoder_bias else x

    def _goes_densely(self, x: Tensor) -> bool:
        """Whether every latent of every token is needed: for a gradient, or for a graph whose shapes are known."""
        if torch.compiler.is_compiling():
            return True
        tensors = (x, self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.threshold)
        return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)

    @without_autocast
    def jumprelu(self, x: Tensor, bandwidth: float = 1e-3) -> JumpReLUOutput:
        """f [N, d_sae], l0 [N] and firing counts [d_sae] of x [..., d_model]; differentiable.

        The gate is decided on the fp32 (fp64) pre-activations, the same bits as in `encode_sparse`.
        """
        z = kernels.preactivations(self._encoder_input(x), self.W_enc, self.b_enc, impl=self.impl)
        threshold = torch.where(self.threshold < 0, self.threshold - self.threshold.detach(), self.threshold)
        out = kernels.jumprelu(z, z.new_zeros(self.d_sae), threshold, bandwidth, impl=self.impl)
        return out._replace(f=out.f.to(self.W_enc.dtype))

    def encode(self, x: Tensor) -> Tensor:
        """Dense activations [..., d_sae] of x [..., d_model], in the dtype of the weights.

        Differentiable; where no gradient is asked for, filled from the entries of `encode_sparse`. Either way the same
        latents fire.
        """
        if not isinstance(x, Tensor) or self._goes_densely(x):
            f = self.jumprelu(x).f
        else:
            f = self.encode_sparse(x).to_dense().to(self.W_enc.dtype)
        return f.reshape(*x.shape[:-1], self.d_sae)

    @without_autocast
    def encode_sparse(self, x: Tensor) -> SparseCode:
        """Active latents of the tokens of x [..., d_model], flattened to N rows. Not differentiable."""
        with torch.no_grad():
            threshold = self.threshold.clamp(min=0)
            return kernels.encode(self._encoder_input(x), self.W_enc, self.b_enc, threshold, impl=self.impl)

    @without_autocast
    def _decode_entries(self, code: SparseCode) -> Tensor:
        return kernels.decode(code, self.W_dec, self.b_dec, impl=self.impl)

    def decode(self, f: Tensor | SparseCode) -> Tensor:
        """x̂ [..., d_model] of dense activations [..., d_sae], or [N, d_model] of a `SparseCode`."""
        if isinstance(f, SparseCode):
            x_hat = self._decode_entries(f)
        elif not isinstance(f, Tensor):
            raise TypeError(f"f: expected a torch.Tensor or a SparseCode, got {type(f).__name__}")
        else:
            self._check_rows("f", f, self.d_sae)
            x_hat = affine(f.to(self.W_dec.dtype), self.W_dec, self.b_dec)
        return x_hat * self.input_scale if self.input_scale != 1.0 else x_hat

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction x̂ of x [..., d_model], in the shape and dtype of x.

        Differentiable. Where no gradient is asked for (``torch.no_grad()``, or nothing requires one) it is made from
        the active entries alone, by `encode_sparse` and `decode`, unless they are so many that whole matrices are
        faster (`gemmascope.kernels.density`).
        """
        if not isinstance(x, Tensor) or self._goes_densely(x):
            return self.decode(self.encode(x)).to(x.dtype)
        code = self.encode_sparse(x)
        x_hat = self.decode(code if density.is_sparse(code) else code.to_dense())
        return x_hat.reshape(x.shape).to(x.dtype)

    @torch.no_grad()
    def project_(self) -> "JumpReLUSAE":
        """Back, in place, to where the recipe keeps an SAE after each update: rows of W_dec of unit norm (arXiv
        2408.05147 §3.2; those of zeros stay so) and thresholds of at least 0. Returns the SAE.

            optimiser.step()
            sae.project_()
        """
        norm = self.W_dec.norm(dim=1, keepdim=True)
        self.W_dec.div_(torch.where(norm > 0, norm, 1))
        self.threshold.clamp_(min=0)
        return self

    @torch.no_grad()
    @without_autocast
    def fold(self) -> "JumpReLUSAE":
        """The same function with input_scale 1 and no pre-encoder bias (arXiv 2408.05147, appendix A), as a copy.

        b_enc' = C·b_enc − C·b_dec·W_enc;  b_dec' = C·b_dec;  θ' = C·θ;  W_enc and W_dec unchanged.
        """
        folded, scale = copy.deepcopy(self), self.input_scale
        if self.pre_encoder_bias:
            folded.b_enc.sub_(self.b_dec @ self.W_enc)
        folded.b_enc.mul_(scale)
        folded.b_dec.mul_(scale)
        folded.threshold.clamp_(min=0).mul_(scale)
        folded.pre_encoder_bias, folded.input_scale = False, 1.0
        return folded

    def save(self, path: str | os.PathLike) -> None:
        """Write the SAE: Gemma Scope 1 when ``path`` ends in .npz, else a folder of safetensors and config.json.

        The weights reload to the same bits, but that thresholds below 0 are written as the 0 they count as. See
        `formats.release.write`.
        """
        tensors = {key: getattr(self, key).detach() for key in release.KEYS}
        tensors["threshold"] = tensors["threshold"].clamp(min=0)
        release.write(path, tensors, SAEConfig(self.input_scale, self.pre_encoder_bias, self.metadata))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "JumpReLUSAE":
        """Read what `save` wrote, or a Gemma Scope 1 or 2 file or folder. See `formats.release.read`.

        Weights keep the dtype of the file; the threshold comes out as fp32 (fp64 with fp64 weights).
        """
        return cls._from_stored(release.read(path))

    @classmethod
    def from_pretrained(
        cls, repo: str | os.PathLike, path: str | os.PathLike, *, revision: str | None = None
    ) -> "JumpReLUSAE":
        """An SAE from a Hugging Face repository, or from a local folder of that name.

            JumpReLUSAE.from_pretrained("google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71")

        See `formats.release.read_pretrained`.
        """
        return cls._from_stored(release.read_pretrained(repo, path, revision=revision))

    @classmethod
    def _from_stored(cls, stored: StoredSAE) -> "JumpReLUSAE":
        tensors, config = stored
        # One latent of width 1, since the constructor draws random weights: the stored ones take their place.
        sae = cls(
            *(1, 1),
            pre_encoder_bias=config.pre_encoder_bias,
            input_scale=config.input_scale,
            metadata=config.metadata,
            device="cpu",
        )
        threshold = tensors["threshold"]
        sae.W_enc = nn.Parameter(tensors["W_enc"].T.contiguous().T)
        sae.W_dec = nn.Parameter(tensors["W_dec"].contiguous())
        sae.b_enc = nn.Parameter(tensors["b_enc"])
        sae.b_dec = nn.Parameter(tensors["b_dec"])
        sae.threshold = nn.Parameter(threshold.to(torch.promote_types(tensors["W_dec"].dtype, torch.float32)))
        return sae
