"""What the SAEs of other packages have in common when they run on our kernels: when they may, and by which operators.

Everything works on the tensors that it is given, which are the module's own: nothing is copied that could go stale.
"""

from collections.abc import Iterator, Mapping
from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from .. import kernels
from ..autocast import affine, without_autocast
from ..kernels import SparseCode, density, validation

# Elements of z that are looked through for the k largest of each token at a time.
Z_ELEMENTS = 1 << 25

if TYPE_CHECKING:
    Base: TypeAlias = Any  # the class of another package that comes behind it
else:
    Base = object


Shapes: TypeAlias = dict[str, tuple[str, ...]]


class State(NamedTuple):
    """What an accelerated module remembers: who computes, and the shapes and strides that its weights had."""

    impl: str
    layout: Mapping[str, tuple[torch.Size, tuple[int, ...]]]


class Accelerated(Base):
    """Comes before a class of another package and takes over its encode, decode and forward where the kernels can.

    SHAPES: the tensors that must be there, by their paths, with their sizes by name: those of 2 dimensions of which one
    is d_sae are weights whose memory is laid out latent by latent.
    """

    SHAPES: ClassVar[Shapes] = {}
    METHODS: ClassVar[tuple[str, ...]] = ("encode", "decode", "forward")
    """What is taken over, so that nobody between may have overridden it."""
    OWN_WEIGHTS: ClassVar[bool] = True
    """Whether weights are always parameters of the module, rather than read when they are asked for."""
    _accelerated: State
    _theirs: ClassVar[type]
    """The class that the module had."""
    _known: ClassVar[type]
    """The class of the package among its ancestors."""

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        """Why this one cannot be taken although its class can, or None."""
        return None


class Family(NamedTuple):
    """A package: what of it is taken, by the names of its classes, and what to do with the others."""

    package: str
    taken: Mapping[str, type[Accelerated]]
    way_out: str = ""


def attribute(module: Any, path: str) -> Any:
    return reduce(getattr, path.split("."), module)


def weights(kind: type[Accelerated]) -> Iterator[tuple[str, int]]:
    """Paths of the weights that are laid out latent by latent, and which dimension counts the latents."""
    for path, shape in kind.SHAPES.items():
        if len(shape) == 2 and "d_sae" in shape:
            yield path, shape.index("d_sae")


# ---- when the kernels may run


def has_hooks(*modules: nn.Module) -> bool:
    """Whether a call of one of them would run a hook."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind, None) for module in modules for kind in kinds)


def runs_here(module: nn.Module, *tensors: Any) -> bool:
    """Whether the kernels can do the work: on plain tensors of floats, no gradient asked for, outside a compiler.

    What they cannot do is left to the module's own class, errors about what is no tensor of floats included.
    """
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.ndim == 0:
            return False
        try:
            validation.check_plain("x", tensor)
        except TypeError:
            return False
    return not torch.is_grad_enabled() or not any(t.requires_grad for t in (*tensors, *module.parameters()))


# ---- memory, latent by latent


def _shares_memory(module: nn.Module, tensor: Tensor) -> bool:
    """Whether others see the same memory: another parameter of the module, or another process."""
    start = tensor.untyped_storage().data_ptr()
    tied = (t for t in (*module.parameters(), *module.buffers()) if t is not tensor and not t.is_meta)
    return (tensor.device.type == "cpu" and tensor.is_shared()) or any(
        t.untyped_storage().data_ptr() == start for t in tied
    )


def rows_of(module: Any, path: str) -> Tensor:
    """The weight at ``path`` as [d_sae, width], contiguous where its memory may be laid out so.

    It is the parameter's own memory. One that has come since the module was taken is laid out anew, values unchanged.
    """
    weight = attribute(module, path)
    latent = module.SHAPES[path].index("d_sae")
    rows = weight.detach() if latent == 0 else weight.detach().T
    if rows.is_contiguous() or not isinstance(weight, nn.Parameter) or _shares_memory(module, weight):
        return rows
    with torch.inference_mode(False), torch.no_grad():
        rows = rows.contiguous()
        weight.data = rows if latent == 0 else rows.T
    return rows


def lay_out(module: Any) -> None:
    """Every weight latent by latent."""
    for path, _ in weights(type(module)):
        rows_of(module, path)


@torch.inference_mode(False)
@torch.no_grad()
def lay_back(module: Any, layout: Mapping[str, tuple[torch.Size, tuple[int, ...]]]) -> None:
    """Every weight with the strides that it had, but for one of another shape, which came since."""
    for path, (shape, stride) in layout.items():
        weight = attribute(module, path)
        if weight.shape == shape and weight.stride() != stride and not _shares_memory(module, weight):
            before = torch.empty_strided(weight.shape, stride, dtype=weight.dtype, device=weight.device)
            weight.data = before.copy_(weight)


# ---- the operators


def _fp32(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))


def without_zeros(code: SparseCode) -> SparseCode:
    """The code without entries of value 0: what `SparseCode.from_dense` finds in its dense form."""
    keep = code.values != 0
    if bool(keep.all()):
        return code
    kept = torch.zeros(code.nnz + 1, dtype=torch.int64, device=keep.device)
    torch.cumsum(keep, 0, out=kept[1:])
    return SparseCode(code.values[keep], code.indices[keep], kept[code.offsets], code.d_sae)


def above(x: Tensor, rows: Tensor, b_enc: Tensor, threshold: Tensor, impl: str) -> SparseCode:
    """f = z·1[z > θ] with z = x·rowsᵀ + b_enc. x [N, d]; rows [d_sae, d] of the same dtype; θ [d_sae] or a scalar."""
    theta = _fp32(threshold).to(torch.promote_types(x.dtype, torch.float32)).expand(rows.shape[0])
    return kernels.encode(x, rows.T, b_enc.detach(), theta.contiguous(), impl=impl)


def positive(x: Tensor, rows: Tensor, b_enc: Tensor, threshold: Tensor, impl: str) -> SparseCode:
    """f = relu(z)·1[z > θ]: a θ below 0 counts as 0."""
    return above(x, rows, b_enc, threshold.detach().clamp(min=0), impl)


def rectified(x: Tensor, rows: Tensor, b_enc: Tensor, impl: str) -> SparseCode:
    """f = relu(z)"""
    return above(x, rows, b_enc, torch.zeros((), device=x.device), impl)


def gated(x: Tensor, rows: Tensor, b_gate: Tensor, r_mag: Tensor, b_mag: Tensor, impl: str) -> SparseCode:
    """f = 1[y + b_gate > 0]·relu(e^r·y + b_mag) with y = x·rowsᵀ (arXiv 2404.16014, §3.2).

    Both are positive where y > max(−b_gate, −e^−r·b_mag), so that the encoder runs on the weights as they are.
    """
    b_gate, r_mag, b_mag = _fp32(b_gate), _fp32(r_mag), _fp32(b_mag)
    shrunk = torch.exp(-r_mag.clamp(min=-88))  # finite, as a b_mag of 0 times infinity would be NaN
    code = above(x, rows, torch.zeros_like(b_mag), torch.maximum(-b_gate, -b_mag * shrunk), impl)
    latents = code.indices.long()
    values = torch.relu(code.values * r_mag.exp()[latents] + b_mag[latents])
    return without_zeros(code._replace(values=values))


def _largest(z: Tensor, k: int, relu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Values, latents and how many there are a token, of the k largest z of each; latents ascending, zeros left out."""
    values, latents = torch.topk(z, k, dim=-1, sorted=False)
    latents, order = torch.sort(latents, dim=-1)
    values = values.gather(-1, order)
    if relu:
        values = torch.relu(values)
    keep = values != 0
    return values[keep], latents[keep].to(torch.int32), keep.sum(-1)


def largest(
    x: Tensor, rows: Tensor, b_enc: Tensor, k: int, impl: str, *, scale: Tensor | None = None, relu: bool = True
) -> SparseCode:
    """The k largest z = (x·rowsᵀ + b_enc)·scale of each token, then relu; among equal ones as torch.topk chooses."""
    d_sae, parts = rows.shape[0], []
    for few in x.split(max(1, Z_ELEMENTS // max(1, d_sae))):
        z = kernels.preactivations(few, rows.T, b_enc.detach(), impl=impl)
        parts.append(_largest(z if scale is None else z * scale, k, relu))
    values, latents, counts = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    offsets = torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device)
    torch.cumsum(counts, 0, out=offsets[1:])
    return SparseCode(values, latents, offsets, d_sae)


def dense(code: SparseCode, lead: torch.Size, dtype: torch.dtype) -> Tensor:
    """[*lead, d_sae]"""
    return code.to_dense().to(dtype).reshape(*lead, code.d_sae)


def entries_of(f: Any, rows: Tensor) -> SparseCode | None:
    """Dense activations [..., d_sae] as the code of their entries, or None where their own product is as fast, or is
    to say what is wrong with them."""
    if f.shape[-1] != rows.shape[0] or f.dtype != rows.dtype or f.device != rows.device:
        return None
    if int(torch.count_nonzero(f)) > density.decode_dense_above(f.device) * f.numel():
        return None
    return SparseCode.from_dense(f.detach().reshape(-1, f.shape[-1]))


@without_autocast
def decoded(code: SparseCode, lead: torch.Size, rows: Tensor, b_dec: Tensor, impl: str) -> Tensor:
    """Σ f_j·rows[j] + b_dec [*lead, width], in the dtype of ``rows``."""
    if density.is_sparse(code):
        x_hat = kernels.decode(code, rows, b_dec.detach(), impl=impl)
    else:
        x_hat = affine(code.to_dense().to(rows.dtype), rows, b_dec.detach())
    return x_hat.reshape(*lead, rows.shape[1])
