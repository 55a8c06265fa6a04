"""`accelerate`: the SAEs of other packages, with their own interface, on our kernels."""

import functools
from collections.abc import Iterator
from typing import Any, TypeVar

from torch import nn

from ..checks import check_tensor, check_type
from ..kernels import dispatch
from . import foreign, foreign_circuit_tracer, foreign_dictionary_learning, foreign_saelens, foreign_sparsify
from .foreign import Accelerated, Family, State, attribute, weights

M = TypeVar("M", bound=nn.Module)

# By the first name of the modules that the classes come from: nothing is imported to recognise one.
FAMILIES: dict[str, Family] = {
    "sae_lens": foreign_saelens.FAMILY,
    "dictionary_learning": foreign_dictionary_learning.FAMILY,
    "sparsify": foreign_sparsify.FAMILY,
    "circuit_tracer": foreign_circuit_tracer.FAMILY,
}


def _root(kind: type) -> str:
    return kind.__module__.partition(".")[0]


def _known_class(kind: type) -> type | None:
    """The nearest ancestor of ``kind`` that is a class of one of the packages and encodes and decodes, or None."""
    known = next((base for base in kind.__mro__ if _root(base) in FAMILIES), None)
    encodes = known and all(callable(getattr(known, name, None)) for name in ("encode", "decode"))
    return known if encodes else None


def _taken_by(kind: type) -> type[Accelerated] | None:
    known = _known_class(kind)
    return None if known is None else FAMILIES[_root(known)].taken.get(known.__name__)


@functools.cache
def _accelerated_class(theirs: type) -> type:
    """A subclass of ``theirs`` whose methods are ours first."""
    ours = _taken_by(theirs)
    if ours is None:
        raise TypeError(f"expected a class that can be accelerated, got {theirs.__module__}.{theirs.__qualname__}")

    def reduced(self, protocol):
        """As a module of its own class, which is taken again when it is read: ours has no name to be found by."""
        make, arguments, *rest = super(made, self).__reduce_ex__(max(protocol, 2))
        return (_made_anew, (theirs,), *rest) if arguments == (made,) else (make, arguments, *rest)

    content = {
        "__module__": __name__,
        "__doc__": theirs.__doc__,
        "__reduce_ex__": reduced,
        "_theirs": theirs,
        "_known": _known_class(theirs),
    }
    # Theirs comes first among the bases, so that objects of both classes are laid out alike and may change from one to
    # the other; in the order in which methods are looked up, ours does.
    before = [base for base in ours.__mro__ if base is not object]
    kind = type(theirs)
    meta = type(kind.__name__, (kind,), {"mro": lambda made: [made, *before, *theirs.__mro__]})
    made = meta(f"Accelerated{theirs.__name__}", (theirs, ours), content)
    return made


def _made_anew(theirs: type) -> Any:
    """For copies and pickles: an accelerated module without its contents."""
    kind: Any = _accelerated_class(theirs)
    return kind.__new__(kind)


def _problem(module: Any) -> str | None:
    """Why ``module``, which has a known class, cannot be accelerated, or None."""
    kind = type(module)
    known: Any = _known_class(kind)
    ours = _taken_by(kind)
    if ours is None:
        family = FAMILIES[_root(known)]
        return f"expected one of {family.package}'s {', '.join(family.taken)}, got {kind.__name__}{family.way_out}"
    for name in ours.METHODS:
        owner = next(base for base in kind.__mro__ if name in vars(base))
        if name in vars(module):
            return f"{name}: expected the method of {known.__name__}, got one of this object's own"
        if _root(owner) != _root(known):
            return f"{name}: expected the method of {known.__name__}, got that of {owner.__name__}"
    try:
        _check_tensors(module, ours)
    except (TypeError, ValueError) as error:
        return str(error)
    return ours.why_not(module)


def _check_tensors(module: Any, ours: type[Accelerated]) -> None:
    """Raise TypeError or ValueError unless the tensors are there, of shapes that fit and on one device."""
    sizes: dict[str, int] = {}
    device = None
    for path, shape in ours.SHAPES.items():
        try:
            tensor = attribute(module, path)
        except AttributeError:
            raise TypeError(f"{path}: expected a tensor, got no attribute of that name") from None
        check_tensor(path, tensor, tuple(sizes.get(name, name) for name in shape), device=device)
        sizes |= dict(zip(shape, tensor.shape, strict=True))
        device = tensor.device
        if tensor.is_meta:
            raise ValueError(f"{path}: expected a tensor that holds numbers, got one on the meta device")
    dtype = None
    for path, _ in weights(ours):
        weight = attribute(module, path)
        if ours.OWN_WEIGHTS and not isinstance(weight, nn.Parameter):
            raise TypeError(f"{path}: expected a Parameter, got {type(weight).__name__}")
        dtype = dtype or weight.dtype
        if weight.dtype != dtype:
            raise TypeError(f"{path}: expected dtype {dtype}, got {weight.dtype}")


def _saes_in(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of each SAE of these packages in ``model``, itself included, each once."""
    seen = set()
    for name, module in model.named_modules():
        held = {name: module}
        # What SAELens's models keep beside their submodules.
        for hook, sae in getattr(module, "acts_to_saes", {}).items() if _root(type(module)) == "sae_lens" else ():
            held[".".join(filter(None, (name, hook)))] = sae
        for path, each in held.items():
            if id(each) not in seen and _is_sae(each):
                seen.add(id(each))
                yield path, each


def _is_sae(module: nn.Module) -> bool:
    """Whether it encodes and decodes itself, and is no set of such as do."""
    if _known_class(type(module)) is None:
        return False
    return _taken_by(type(module)) is not None or not any(_taken_by(type(each)) for each in module.modules())


def accelerate(module: M, *, impl: str = "auto") -> M:
    """Put an SAE of another package, or every one in a model, onto our kernels; returns ``module`` itself.

    Taken are the SAEs of SAELens (standard, JumpReLU, TopK, gated; BatchTopK as it is stored, which is JumpReLU) and
    its transcoders, the dictionaries of dictionary_learning, the `SparseCoder` of sparsify, the `SingleLayerTranscoder`
    of circuit-tracer; and a model that holds some, such as a `HookedSAETransformer` or a `TranscoderSet`.

    The object stays what it is: its class becomes a subclass, made for it, of the one it had, so that ``isinstance``,
    configuration, hooks, parameters, saving and moving are those of its package. Its `encode` and `decode`, and what
    calls them, compute by entries: the same numbers up to rounding, gates decided in fp32. Parameters stay the same
    objects with the same values; the memory of the weights is laid out latent by latent, of which `decelerate` leaves
    no trace.

    Left to the package's own code: calls that need a gradient (so wrap inference in ``torch.no_grad()``), that are
    compiled, whose hooks ask for pre-activations, or with options that change what is computed.

    impl: who computes, see `gemmascope.kernels`. A module that is accelerated already gets the new ``impl``.

    Raises TypeError where nothing of these packages is found, ValueError naming what cannot be taken and why; then
    nothing has been changed.
    """
    check_type("module", module, nn.Module)
    if impl not in dispatch.IMPLS:
        raise ValueError(f"impl: expected one of {', '.join(map(repr, dispatch.IMPLS))}, got {impl!r}")
    found = list(_saes_in(module))
    if not found:
        expected = "an SAE of SAELens, dictionary_learning, sparsify or circuit-tracer, or a model that holds some"
        raise TypeError(f"module: expected {expected}, got {type(module).__module__}.{type(module).__qualname__}")
    for path, sae in found:
        problem = None if isinstance(sae, Accelerated) else _problem(sae)
        if problem:
            raise ValueError(f"{path or 'module'}: {problem}")
    for _, sae in found:
        if isinstance(sae, Accelerated):
            layout = sae._accelerated.layout
        else:
            sae.__class__ = _accelerated_class(type(sae))
            held = {path: attribute(sae, path) for path, _ in weights(type(sae))}
            layout = {path: (w.shape, w.stride()) for path, w in held.items() if isinstance(w, nn.Parameter)}
        sae.__dict__["_accelerated"] = State(impl, layout)
        foreign.lay_out(sae)
    return module


def decelerate(module: M) -> M:
    """Give back what `accelerate` took: the object, or every one in a model, is of its own class again.

    Parameters are the same objects, with their values of now in the memory layout of then. Returns ``module``. Raises
    TypeError where nothing in it is accelerated.
    """
    check_type("module", module, nn.Module)
    found = [(path, sae) for path, sae in _saes_in(module) if isinstance(sae, Accelerated)]
    if not found:
        raise TypeError(f"module: expected what accelerate returned, got {type(module).__name__}")
    for path, sae in found:
        if "_theirs" not in vars(type(sae)):
            raise ValueError(f"{path or 'module'}: expected the class that accelerate made, got {type(sae).__name__}")
    for _, sae in found:
        layout = sae._accelerated.layout
        sae.__class__ = type(sae)._theirs
        del sae.__dict__["_accelerated"]
        foreign.lay_back(sae, layout)
    return module
