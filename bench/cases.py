"""The registry: which contenders there are and where, what each suite times, and the bars its ratios are held to."""

import importlib
from dataclasses import dataclass, replace

from bench.contenders import INFERENCE, INFERENCE_WITHOUT_MODULE, OPERATORS, TRAINING, Contender, UnavailableError

SKEW = 0.7  # decades by which firing frequencies differ, see `bench.timing.inputs`

# Name: module, class, arguments. Modules are imported when one of their contenders is asked for.
CONTENDERS: dict[str, tuple[str, str, dict]] = {
    "ours": ("bench.ours", "Ours", {"impl": "auto"}),
    "ours_cpu": ("bench.ours", "Ours", {"impl": "cpu"}),
    "ours_pytorch": ("bench.ours", "Ours", {"impl": "pytorch"}),
    "ours_dense": ("bench.ours", "Ours", {"impl": "auto", "route": "dense"}),
    "products": ("bench.peers.pytorch", "Products", {}),
    "dense": ("bench.peers.pytorch", "DensePyTorch", {}),
    "dense_compiled": ("bench.peers.pytorch", "DensePyTorch", {"compiled": True}),
    "embedding_bag": ("bench.peers.pytorch", "EmbeddingBag", {}),
    "torch_sparse": ("bench.peers.pytorch", "TorchSparse", {}),
    "saelens": ("bench.peers.saelens", "SAELens", {}),
    "saelens_autocast": ("bench.peers.saelens", "SAELens", {"autocast": True}),
    "saelens_compiled": ("bench.peers.saelens", "SAELens", {"compiled": True}),
    "dictionary_learning": ("bench.peers.dictionary_learning", "DictionaryLearning", {}),
    "sparsify": ("bench.peers.sparsify", "Sparsify", {}),
    "ours_topk": ("bench.selection", "Ours", {}),
    "ours_batchtopk": ("bench.selection", "Ours", {"of": "batch"}),
    "plain_topk": ("bench.selection", "PlainPyTorch", {}),
    "plain_topk_compiled": ("bench.selection", "PlainPyTorch", {"compiled": True}),
    "plain_batchtopk": ("bench.selection", "PlainPyTorch", {"of": "batch"}),
    "saelens_called": ("bench.accelerate", "SAELensCalled", {}),
    "saelens_accelerated": ("bench.accelerate", "SAELensCalled", {"accelerated": True}),
    "dictionary_learning_called": ("bench.accelerate", "DictionaryLearningCalled", {}),
    "dictionary_learning_accelerated": ("bench.accelerate", "DictionaryLearningCalled", {"accelerated": True}),
    "sparsify_called": ("bench.accelerate", "SparsifyCalled", {}),
    "sparsify_accelerated": ("bench.accelerate", "SparsifyCalled", {"accelerated": True}),
}


def make(name: str) -> Contender:
    """A new contender of the registry. Raises ValueError for a name that is not in it, `UnavailableError` when its
    module does not have it."""
    if name not in CONTENDERS:
        raise ValueError(f"contender: expected one of {', '.join(CONTENDERS)}, found {name!r}")
    module, attribute, arguments = CONTENDERS[name]
    try:
        contender = getattr(importlib.import_module(module), attribute)(**arguments)
    except (ImportError, AttributeError) as error:
        raise UnavailableError(str(error)) from None
    contender.name = name
    return contender


@dataclass(frozen=True)
class Shape:
    """Sizes of a published SAE. more: others of the same suite that are run one after another with it."""

    name: str
    d_model: int
    d_sae: int
    count: int = 1
    more: tuple["Shape", ...] = ()
    batch: int | None = None
    """Tokens of a batch, in a suite that does not vary them."""

    @property
    def all(self) -> tuple["Shape", ...]:
        return (self, *self.more)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("gemma-2-2b 16k", 2304, 16384),
        Shape("gemma-2-2b 65k", 2304, 65536),
        Shape("gemma-2-9b 131k", 3584, 131072),
        Shape("gemma-3-270m 2.5k", 640, 2560, batch=1024),
        Shape("minilm 4k", 384, 4096, batch=1024),
        Shape("gemma-2-2b 1m", 2304, 1048576),
        # 26 layers: residual stream and MLP output are 2,304 wide, the attention heads' output 8·256.
        Shape("gemma-2-2b 78x16k", 2304, 16384, 52, (Shape("gemma-2-2b att 16k", 2048, 16384, 26),)),
    )
}


def shape_of(text: str) -> Shape:
    """A shape by its name, or any d_model x d_sae written as 2304x16384."""
    if text in SHAPES:
        return SHAPES[text]
    sizes = text.split("x")
    if len(sizes) != 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ValueError(f"shape: expected {', '.join(map(repr, SHAPES))} or d_model x d_sae, found {text!r}")
    d, f = map(int, sizes)
    known = (shape for shape in SHAPES.values() if (shape.d_model, shape.d_sae, shape.count) == (d, f, 1))
    return next(known, Shape(text, d, f))


@dataclass(frozen=True)
class Case:
    """One comparison: the parts that are timed, who contends, on which inputs."""

    suite: str
    shape: Shape
    tokens: int
    l0: float
    dtype: str
    parts: tuple[str, ...]
    contenders: tuple[str, ...]
    skew: float = SKEW
    operators: bool = False
    """Also time each operator of our sparse step."""
    beta1: float = 0.0
    """Adam's; above 0 whatever makes updates has first moments."""

    @property
    def title(self) -> str:
        moment = f", β1 {self.beta1:g}" if self.beta1 else ""
        return f"{self.shape.name}, {self.tokens:,} tokens, L0 {self.l0:g}, {self.dtype}{moment}"

    def facts(self) -> dict[str, object]:
        """What a row says of its case."""
        return {
            "shape": self.shape.name,
            "d_model": self.shape.d_model,
            "d_sae": self.shape.d_sae,
            "tokens": self.tokens,
            "target_l0": self.l0,
            "dtype": self.dtype,
            "skew": self.skew,
            "beta1": self.beta1,
            "parts": list(self.parts),
        }


PEERS = ("dense", "dense_compiled", "saelens", "saelens_autocast", "dictionary_learning", "sparsify")
CPU_PEERS = ("dense", "dense_compiled", "saelens", "dictionary_learning", "sparsify")
DECODERS = ("embedding_bag", "torch_sparse")
ACCELERATED = tuple(
    f"{package}_{how}"
    for package in ("saelens", "dictionary_learning", "sparsify")
    for how in ("called", "accelerated")
)


@dataclass(frozen=True)
class Suite:
    """What varies in it, and its defaults."""

    device: str
    dtype: str
    rounds: int
    shapes: tuple[str, ...]
    tokens: tuple[int, ...]
    l0: tuple[float, ...]
    comparisons: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]
    """(parts, contenders), a case each."""
    operators: bool = False
    once: tuple[str, ...] = ()
    """Shapes of which only the part `infer` is timed, at the fewest tokens and the most."""


SUITES = {
    "step": Suite(
        "cuda", "bf16", 20,
        ("gemma-2-2b 16k", "gemma-2-2b 65k", "gemma-2-9b 131k", "gemma-2-2b 1m"), (4096,), (20, 64, 200),
        ((TRAINING, ("ours", "ours_dense", *PEERS)),),
        operators=True,
    ),
    "kernels": Suite(
        "cuda", "bf16", 20, ("gemma-2-2b 16k", "gemma-2-9b 131k"), (4096,), (20, 64, 200),
        ((OPERATORS, ("ours", "products", *DECODERS)),),
    ),
    "inference": Suite(
        "cuda", "bf16", 20, ("gemma-2-2b 16k", "gemma-2-9b 131k"), (1, 8, 64, 512, 4096), (64,),
        ((INFERENCE, ("ours", "products", "dense", "dense_compiled", "saelens", *DECODERS)),),
        once=("gemma-2-2b 78x16k",),
    ),
    "cpu": Suite(
        "cpu", "fp32", 4, ("gemma-2-2b 16k", "gemma-3-270m 2.5k", "minilm 4k"), (512,), (64,),
        (
            (TRAINING, ("ours_cpu", "ours_pytorch", *CPU_PEERS)),
            (INFERENCE, ("ours_cpu", "ours_pytorch", "products", *CPU_PEERS, *DECODERS)),
        ),
    ),
    "topk": Suite(
        "cuda", "bf16", 20, ("gemma-2-2b 16k", "gemma-2-9b 131k"), (4096,), (64,),
        (
            (("encode",), ("ours_topk", "plain_topk", "plain_topk_compiled", "sparsify")),
            (("encode",), ("ours_batchtopk", "plain_batchtopk")),
        ),
    ),
    "accelerate": Suite(
        "cpu", "fp32", 4, ("gemma-2-2b 16k", "gemma-2-2b 65k"), (1, 64, 4096), (64,),
        ((INFERENCE_WITHOUT_MODULE, ACCELERATED),),
    ),
}  # fmt: skip


def cases(
    suite: str, *, shapes=(), tokens=(), l0=(), dtype=None, only=(), parts=(), skew: float = SKEW, beta1: float = 0.0
) -> list[Case]:
    """The cases of a suite; what is given takes the place of the suite's own. With beta1 above 0 only those that train.
    Raises ValueError for a beta1 that is none, or of a suite that does not train."""
    spec = SUITES[suite]
    if not 0 <= beta1 < 1:
        raise ValueError(f"beta1: expected at least 0 and less than 1, got {beta1}")
    found = []
    for name in shapes or (*spec.shapes, *spec.once):
        shape = shape_of(name)
        counts = tuple(tokens or ((shape.batch,) if shape.batch and len(spec.tokens) == 1 else spec.tokens))
        if shape.more and not tokens:
            counts = (min(counts), max(counts))
        for n in counts:
            for target in l0 or spec.l0:
                for all_parts, contenders in spec.comparisons:
                    kept = tuple(part for part in all_parts if part in (parts or all_parts))
                    if not kept or (shape.more and "infer" not in kept):
                        continue
                    if beta1 and not set(kept) & set(TRAINING):
                        continue
                    numbers = (n, target, dtype or spec.dtype)
                    case = Case(suite, shape, *numbers, kept, contenders, skew, spec.operators, beta1)
                    if shape.more:
                        case = replace(case, parts=("infer",), operators=False)
                    if only:
                        case = replace(case, contenders=tuple(only))
                    found.append(case)
    if beta1 and not found:
        raise ValueError(f"beta1: expected a suite and parts that train, got {suite!r} without {', '.join(TRAINING)}")
    return found


@dataclass(frozen=True)
class Bar:
    """``contender`` takes at least ``ratio`` times as long as ``ours`` in ``part``: at `BARS_SHAPE`, or everywhere."""

    suite: str
    part: str
    ours: str
    contender: str
    ratio: float
    everywhere: bool = False
    """In every case of the suite."""


# On 2 cores of a CPU; floors, not aims.
BARS = (
    Bar("cpu", "step", "ours_cpu", "dense", 5.0),
    Bar("cpu", "step", "ours_cpu", "saelens", 6.0),
    Bar("cpu", "step", "ours_cpu", "sparsify", 2.5),
    Bar("cpu", "infer", "ours_cpu", "saelens", 3.0),
    Bar("cpu", "step", "ours_pytorch", "dense", 3.0),
    Bar("cpu", "infer", "ours_pytorch", "saelens", 2.0),
    *(Bar("cpu", "step", "ours_cpu", peer, 1.0, everywhere=True) for peer in CPU_PEERS),
)
BARS_SHAPE = ("gemma-2-2b 16k", 512, 64)


def judge(suite: str, rows: list[dict]) -> list[dict]:
    """Each bar of a suite as a dict: `at_least`, the least `ratio` found or None, `met` or None (not measured). Rows
    with a first moment do not count."""
    found = []
    for bar in BARS:
        if bar.suite != suite:
            continue
        ratios = [
            row["ratio_to"][bar.ours]
            for row in rows
            if row["kind"] == "time"
            and not row["beta1"]
            and (row["part"], row["contender"]) == (bar.part, bar.contender)
            and (bar.everywhere or (row["shape"], row["tokens"], row["target_l0"]) == BARS_SHAPE)
            and bar.ours in row["ratio_to"]
        ]
        ratio = min(ratios, default=None)
        met = None if ratio is None else ratio >= bar.ratio
        found.append(
            {"part": bar.part, "ours": bar.ours, "contender": bar.contender, "at_least": bar.ratio}
            | {"everywhere": bar.everywhere, "ratio": ratio, "met": met}
        )
    return found
