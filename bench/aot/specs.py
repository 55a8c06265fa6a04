"""Which compilations `bench.aot` checks: every kernel in the configurations its operator file ships.

To add an operator: write a generator that takes the target and yields `Spec`s, with the block sizes and warps read from
the operator's own configuration table, and name it in `OPERATORS`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch

from gemmascope.kernels.gpu import centring as gpu_centring
from gemmascope.kernels.gpu import conclusion as gpu_conclusion
from gemmascope.kernels.gpu import decode as gpu_decode
from gemmascope.kernels.gpu import dense as gpu_dense
from gemmascope.kernels.gpu import encode as gpu_encode
from gemmascope.kernels.gpu import encode_gemm as gpu_encode_gemm
from gemmascope.kernels.gpu import entries as gpu_entries
from gemmascope.kernels.gpu import finishing as gpu_finishing
from gemmascope.kernels.gpu import jumprelu as gpu_jumprelu
from gemmascope.kernels.gpu import latents as gpu_latents
from gemmascope.kernels.gpu import residual as gpu_residual
from gemmascope.kernels.gpu import tokens as gpu_tokens
from gemmascope.kernels.gpu import transpose as gpu_transpose
from gemmascope.kernels.gpu import update as gpu_update
from gemmascope.kernels.gpu import weighted_sum as gpu_weighted_sum


@dataclass(frozen=True)
class Spec:
    """One kernel as one launch would compile it.

    arguments: the type of every run-time argument in Triton's spelling: "*bf16" (pointer), "i32", "fp32",
    "tensordesc<bf16[128,64]>". Pointers and integers count as divisible by 16, like real tensors and sizes, unless the
    kernel does not specialise them or ``unaligned`` names them. constants: the constexpr arguments, and integers that
    are 1, which the JIT makes constant too. num_stages: None is the backend's default. expects: instruction classes
    of `bench.aot.compilation` that must occur. max_spill: bytes of spill stores and loads allowed.
    """

    name: str
    kernel: object
    arguments: dict[str, str]
    constants: dict[str, object]
    num_warps: int = 4
    num_stages: int | None = None
    unaligned: tuple[str, ...] = ()
    expects: tuple[str, ...] = field(default=())
    max_spill: int = 0


def jumprelu(target: str) -> Iterator[Spec]:
    counts = {"N": "i32", "F": "i32"}
    vector_load = ("load128",)
    for dtype in ("bf16", "fp32"):
        forward, backward = gpu_jumprelu.FORWARD, gpu_jumprelu.BACKWARD
        yield Spec(
            name=f"jumprelu_fwd_{dtype}",
            kernel=gpu_jumprelu._jumprelu_fwd_kernel,
            arguments={
                "pre_ptr": f"*{dtype}",
                "b_enc_ptr": "*fp32",
                "threshold_ptr": "*fp32",
                "f_ptr": f"*{dtype}",
                "l0_ptr": "*i32",
                "firing_count_ptr": "*i32",
                "stride_pre_n": "i32",
                **counts,
            },
            constants={
                "stride_pre_f": 1,
                "BLOCK_N": forward.block_n,
                "BLOCK_F": forward.block_f,
                "TILES": forward.tiles,
            },
            num_warps=forward.num_warps,
            expects=vector_load,
        )
        yield Spec(
            name=f"jumprelu_bwd_{dtype}",
            kernel=gpu_jumprelu._jumprelu_bwd_kernel,
            arguments={
                "grad_f_ptr": f"*{dtype}",
                "grad_l0_ptr": "*fp32",
                "pre_ptr": f"*{dtype}",
                "b_enc_ptr": "*fp32",
                "threshold_ptr": "*fp32",
                "dpre_ptr": f"*{dtype}",
                "partial_ptr": "*fp32",
                "bandwidth": "fp32",
                "half_bandwidth": "fp32",
                "stride_grad_f_n": "i32",
                "stride_pre_n": "i32",
                **counts,
            },
            constants={
                "stride_grad_f_f": 1,
                "stride_grad_l0": 1,
                "stride_pre_f": 1,
                "BLOCK_N": backward.block_n,
                "BLOCK_F": backward.block_f,
                "TILES": backward.tiles,
            },
            num_warps=backward.num_warps,
            expects=vector_load,
        )
    reduce = gpu_jumprelu.REDUCE
    yield Spec(
        name="jumprelu_sum_partials",
        kernel=gpu_jumprelu._sum_partials_kernel,
        arguments={
            "partial_ptr": "*fp32",
            "db_enc_ptr": "*fp32",
            "dthreshold_ptr": "*fp32",
            "N_PARTIAL": "i32",
            "F": "i32",
        },
        constants={"BLOCK_N": reduce.block_n, "BLOCK_F": reduce.block_f},
        num_warps=reduce.num_warps,
        expects=vector_load,
    )


def matrix_instruction(target: str, dtype: str, block_m: int) -> str:
    """The instruction class that ``tl.dot`` should become."""
    if target.startswith("gfx"):
        return "mfma"
    wide = {"sm_90": "HGMMA", "sm_100": "tcgen05"}.get(target)
    return wide if wide and block_m >= 64 else "HMMA"


def encode_gemm(
    target: str,
    name: str,
    config: gpu_encode_gemm.EncodeConfig,
    dtype: str,
    mode: str = "sparse",
    masked: bool = True,
    **overrides,
) -> Spec:
    """masked: N or F ends inside a tile, as of a last batch."""
    sizes = {"N": "i32", "F": "i32", "D": "i32"}
    outputs = {"b_enc_ptr": "*fp32", "threshold_ptr": "*fp32", "half_bandwidth": "fp32", "words_ptr": "*i32"}
    outputs |= {"z_ptr": f"*{dtype}" if mode == "dense" else "*fp32", "window_ptr": "*i32", **sizes}
    constants = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "SPLIT": config.split,
        "GROUP_M": config.group_m,
        "MODE": mode,
        "MASKED": masked,
        "INPUT_PRECISION": config.input_precision,
    }
    if config.descriptors:
        kernel = gpu_encode_gemm._encode_fwd_descriptor_kernel
        operands = {
            "x_desc": f"tensordesc<{dtype}[{config.block_m},{config.block_k}]>",
            "W_enc_desc": f"tensordesc<{dtype}[{config.block_n},{config.block_k}]>",
        }
        expects = ("TMA",)
    else:
        kernel = gpu_encode_gemm._encode_fwd_kernel
        operands = {"x_ptr": f"*{dtype}", "W_enc_ptr": f"*{dtype}", "stride_xn": "i32", "stride_wf": "i32"}
        constants |= {"stride_xd": 1, "stride_wd": 1}
        expects = ("load128",) if target.startswith("gfx") else ("cp.async",)
    if dtype != "fp32" or config.input_precision == "tf32" or target.startswith("gfx"):
        expects += (matrix_instruction(target, dtype, config.block_m),)
    arguments = {key: kind for key, kind in {**operands, **outputs}.items() if key not in overrides}
    return Spec(
        name=name,
        kernel=kernel,
        arguments=arguments,
        constants=constants | overrides,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        expects=() if overrides else expects,
    )


def encode(target: str) -> Iterator[Spec]:
    for dtype, torch_dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)):
        chosen = {}
        for n_tokens in (16, 128, 4096) if dtype != "fp16" else (4096,):
            for describable in (True, False):
                config = gpu_encode_gemm.encode_config(target, torch_dtype, n_tokens, describable)
                kind = "tma" if config.descriptors else "ptr"
                chosen[f"encode_{kind}_{config.block_m}x{config.block_n}x{config.block_k}_{dtype}"] = config
        for name, config in chosen.items():
            yield encode_gemm(target, name, config, dtype)
            if config.block_m >= 128:
                yield encode_gemm(target, f"{name}_even", config, dtype, masked=False)
    segments = {"n_words": "i32", "per_row": "i32"}
    words = gpu_encode.SEGMENT // 32
    yield Spec(
        name="encode_count",
        kernel=gpu_encode._count_kernel,
        arguments={"words_ptr": "*i32", "counts_ptr": "*i32", "n_segments": "i32", **segments},
        constants={"WORDS": words, "BLOCK": gpu_encode.COUNT_BLOCK},
        unaligned=("per_row",),
        expects=("load128",),
    )
    compact = {
        "words_ptr": "*i32",
        "z_ptr": "*fp32",
        "threshold_ptr": "*fp32",
        "starts_ptr": "*i64",
        "values_ptr": "*fp32",
        "indices_ptr": "*i32",
        "room": "i32",
        "F": "i32",
        **segments,
    }
    yield Spec(
        name="encode_compact",
        kernel=gpu_encode._compact_kernel,
        arguments=compact,
        constants={"WORDS": words},
        num_warps=1,
        unaligned=("per_row",),
        expects=() if target.startswith("gfx") else ("load128",),  # two words a lane of 64
    )
    few = {key: kind for key, kind in compact.items() if key not in ("starts_ptr", "per_row")}
    yield Spec(
        name="encode_compact_rows",
        kernel=gpu_encode._compact_rows_kernel,
        arguments=few | {"offsets_ptr": "*i64"},
        constants={"WORDS": gpu_encode.ROW_BLOCK},
        expects=() if target.startswith("gfx") else ("load128",),
    )
    if target == "sm_90":  # sizes of 1 are compile-time constants, which the interpreter does not show
        ones = {"F": 1, "D": 1, "stride_xn": 1, "stride_wf": 1}
        yield encode_gemm(target, "encode_ptr_ones", gpu_encode_gemm.TINY, "bf16", **ones)
        ones = {"F": 1, "n_words": 1, "per_row": 1}
        arguments = {key: kind for key, kind in compact.items() if key not in ones}
        constants = {"WORDS": words, **ones}
        yield Spec("encode_compact_ones", gpu_encode._compact_kernel, arguments, constants, num_warps=1)


def training_encode(target: str) -> Iterator[Spec]:
    """The product of a training step: batches are large, operands aligned."""
    for dtype, torch_dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("fp32", torch.float32, False),
        ("fp32", torch.float32, True),
    ):
        chosen = {}
        for n_tokens, describable in ((128, True), (4096, True), (4096, False)):
            config = gpu_encode_gemm.encode_config(target, torch_dtype, n_tokens, describable, tf32)
            kind = "tma" if config.descriptors else "ptr"
            tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
            chosen[f"{kind}_{tile}_{'tf32' if tf32 else dtype}"] = config
        for name, config in chosen.items():
            if tf32:  # otherwise what inference compiles
                yield encode_gemm(target, f"training_entries_{name}", config, dtype)
                yield encode_gemm(target, f"training_entries_{name}_even", config, dtype, masked=False)
            yield encode_gemm(target, f"training_dense_{name}", config, dtype, "dense")
            if config.descriptors:
                yield encode_gemm(target, f"training_dense_{name}_even", config, dtype, "dense", masked=False)
    yield Spec(
        name="training_entries_edge",
        kernel=gpu_entries._lower_edge_kernel,
        arguments={"threshold_ptr": "*fp32", "lower_ptr": "*fp32", "half_bandwidth": "fp32", "F": "i32"},
        constants={"BLOCK": gpu_entries.EDGE_BLOCK},
    )
    segments = {"n_words": "i32", "per_row": "i32"}
    yield Spec(
        name="training_entries_move",
        kernel=gpu_entries._entries_kernel,
        arguments={
            "words_ptr": "*i32",
            "z_ptr": "*fp32",
            "threshold_ptr": "*fp32",
            "starts_ptr": "*i64",
            "z_out_ptr": "*fp32",
            "latents_ptr": "*i32",
            "tokens_ptr": "*i32",
            "first_token": "i32",
            "capacity": "i32",
            "F": "i32",
            **segments,
        },
        constants={"WORDS": gpu_encode.SEGMENT // 32},
        num_warps=1,
        unaligned=("per_row",),
        expects=() if target.startswith("gfx") else ("load128",),  # two words a lane of 64
    )


def dense(target: str) -> Iterator[Spec]:
    sizes = {"N": "i32", "F": "i32", "n_words": "i32"}
    count, backward = gpu_dense.COUNT, gpu_dense.BACKWARD
    yield Spec(
        name="dense_count",
        kernel=gpu_dense._count_bits_kernel,
        arguments={
            "active_ptr": "*i32",
            "window_ptr": "*i32",
            "l0_ptr": "*i32",
            "firing_count_ptr": "*i32",
            "touched_ptr": "*i32",
            **sizes,
        },
        constants={"BLOCK_N": count.block_n, "WORDS": count.words, "TILES": count.tiles},
        num_warps=count.num_warps,
        expects=("atomic",),
    )
    for dtype, options in (("bf16", False), ("bf16", True), ("fp32", False)):
        yield Spec(
            name=f"dense_bwd_{dtype}{'_tanh_ste' if options else ''}",
            kernel=gpu_dense._dense_bwd_kernel,
            arguments={
                "u_ptr": f"*{dtype}",
                "f_ptr": f"*{dtype}",
                "active_ptr": "*i32",
                "window_ptr": "*i32",
                "threshold_ptr": "*fp32",
                "s_ptr": "*fp32",
                "firing_count_ptr": "*i32",
                "partial_ptr": "*fp32",
                "stride_un": "i32",
                **dict.fromkeys(("scale", "bandwidth", "frequency_slope", "tanh_slope", "tanh_scale"), "fp32"),
                **sizes,
            },
            constants={
                "stride_uf": 1,
                "HAS_TANH": options,
                "STE_TO_Z": options,
                "BLOCK_N": backward.block_n,
                "WORDS": backward.words,
                "TILES": backward.tiles,
            },
            num_warps=backward.num_warps,
            # Four waves of 64 have eight bytes each of a tile of bf16.
            expects=() if target.startswith("gfx") and dtype == "bf16" else ("load128", "store128"),
        )


def decode(target: str) -> Iterator[Spec]:
    gather, dot = gpu_decode.GATHER, gpu_decode.DOT
    # Gathers are prefetched into shared memory where there are asynchronous copies, into registers on AMD.
    prefetch = ("load128",) if target.startswith("gfx") else ("cp.async",)
    one = [("ones", "bf16", {"D": 1, "stride_row": 1}, {"D": 1, "stride_grad_n": 1, "stride_wf": 1})]
    for suffix, dtype, sum_ones, dot_ones in [("bf16", "bf16", {}, {}), ("fp32", "fp32", {}, {})] + (
        one if target == "sm_90" else []
    ):
        arguments = {
            "values_ptr": "*fp32",
            "rows_ptr": "*i32",
            "offsets_ptr": "*i64",
            "table_ptr": f"*{dtype}",
            "bias_ptr": f"*{dtype}",
            "out_ptr": f"*{dtype}",
            "D": "i32",
            "stride_row": "i32",
        }
        yield Spec(
            name=f"decode_gather_sum_{suffix}",
            kernel=gpu_decode._gather_sum_kernel,
            arguments={key: kind for key, kind in arguments.items() if key not in sum_ones},
            constants={
                "stride_column": 1,
                "HAS_BIAS": True,
                "LANES": gather.lanes,
                "BLOCK_D": gather.block_d,
                "NUM_STAGES": gather.num_stages,
                **sum_ones,
            },
            num_warps=gather.num_warps,
            expects=() if sum_ones else prefetch,
        )
        arguments = {
            "grad_ptr": f"*{dtype}",
            "indices_ptr": "*i32",
            "offsets_ptr": "*i64",
            "W_dec_ptr": f"*{dtype}",
            "dvalues_ptr": "*fp32",
            "D": "i32",
            "stride_grad_n": "i32",
            "stride_wf": "i32",
        }
        yield Spec(
            name=f"decode_gather_dot_{suffix}",
            kernel=gpu_decode._gather_dot_kernel,
            arguments={key: kind for key, kind in arguments.items() if key not in dot_ones},
            constants={
                "stride_grad_d": 1,
                "stride_wd": 1,
                "LANES": dot.lanes,
                "BLOCK_D": dot.block_d,
                "NUM_STAGES": dot.num_stages,
                **dot_ones,
            },
            num_warps=dot.num_warps,
            expects=() if dot_ones else prefetch,
        )


def with_ones(spec: Spec, *sizes: str) -> Spec:
    """The compilation for sizes of 1, which the JIT makes constants and the interpreter does not show."""
    arguments = {name: kind for name, kind in spec.arguments.items() if name not in sizes}
    constants = spec.constants | dict.fromkeys(sizes, 1)
    return replace(spec, name=f"{spec.name}_ones", arguments=arguments, constants=constants, expects=())


def sparse_step(target: str) -> Iterator[Spec]:
    """The passes of a training step over the entries, and the update."""
    chosen = list(sparse_step_specs(target))
    yield from chosen
    if target == "sm_90":
        sizes = {"residual_bf16": ("capacity", "width", "D", "stride_xn", "stride_wf"), "latents": ("F",)}
        sizes |= {"update_long_lists_bf16": ("F",)}
        yield from (with_ones(spec, *sizes[spec.name]) for spec in chosen if spec.name in sizes)
        # A width that the blocks of columns do not fill.
        narrow = (spec for spec in update_specs(target, 640) if spec.name.endswith("bf16"))
        yield from (replace(spec, name=f"{spec.name}_640") for spec in narrow)


def sparse_step_specs(target: str) -> Iterator[Spec]:
    prefetch = ("load128",) if target.startswith("gfx") else ("cp.async",)
    entries = {"z_ptr": "*fp32", "latents_ptr": "*i32", "offsets_ptr": "*i64"}
    # Later entries make tiles too small for warp groups; the first takes tensor memory with Triton 3.9, not with 3.6.
    matrix = ("HGMMA", "HMMA") if target == "sm_90" else ("HMMA",)
    for dtype, torch_dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        config = gpu_residual.residual_config(target, torch_dtype)
        yield Spec(
            name=f"residual_{dtype}",
            kernel=gpu_residual._residual_kernel,
            arguments={
                **entries,
                "x_ptr": "*fp32",
                "W_dec_ptr": f"*{dtype}",
                "b_dec_ptr": "*fp32",
                "residual_ptr": f"*{dtype}",
                "shares_ptr": "*fp32",
                "l0_ptr": "*fp32",
                "capacity": "i32",
                "width": "i32",
                "D": "i32",
                "stride_xn": "i32",
                "stride_wf": "i32",
            },
            constants={
                "stride_xd": 1,
                "stride_wd": 1,
                "FIRST": config.first,
                "REST": config.rest,
                "BLOCK_D": config.block_d,
                "PARTS": config.parts,
            },
            num_warps=config.num_warps,
            expects=("load128", *(matrix if config.parts else ())),
        )
    yield Spec(
        name="residual_sum_shares",
        kernel=gpu_residual._sum_shares_kernel,
        arguments={
            "shares_ptr": "*fp32",
            "sums_ptr": "*fp32",
            "last_ptr": "*i64",
            "capacity": "i32",
            "width": "i32",
            "n_blocks": "i32",
        },
        constants={"BLOCK": gpu_residual.SUM_BLOCK},
        num_warps=gpu_residual.SUM_WARPS,
        unaligned=("n_blocks", "last_ptr"),
    )
    yield from transpose(entries)
    config = gpu_latents.CONFIG
    for suffix, options in (("", False), ("_all_options", True)):
        floats = ("scale", "bandwidth", "half_bandwidth", "tanh_scale")
        slopes = ("frequency_slope_ptr", "tanh_slope_ptr")
        outputs = ("dec_ptr", "dz_ptr", "db_enc_ptr", "dthreshold_ptr", "along_ptr")
        yield Spec(
            name=f"latents{suffix}",
            kernel=gpu_latents._latents_kernel,
            arguments={
                **entries,
                "tokens_ptr": "*i32",
                "order_ptr": "*i64",
                **dict.fromkeys(("u_ptr", "threshold_ptr", "s_ptr", *outputs), "*fp32"),
                "tokens_out_ptr": "*i32",
                "count_ptr": "*i32",
                "F": "i32",
                **dict.fromkeys(floats, "fp32"),
                **(dict.fromkeys(slopes, "*fp64") if options else {}),
            },
            constants={
                **({} if options else dict.fromkeys(slopes)),
                "STE_TO_Z": options,
                "BLOCK_F": config.block_f,
                "LANES": config.lanes,
                "LONG": config.long,
                "LONG_LANES": config.long_lanes,
            },
            # Two words a thread where every option is on: Triton 3.6, one target.
            max_spill=8 if options and target == "sm_80" else 0,
            num_warps=config.num_warps,
        )
    for dtype, config in (
        ("bf16", gpu_weighted_sum.ROWS),
        ("fp32", gpu_weighted_sum.ROWS),
        ("", gpu_weighted_sum.GROUPS),
    ):
        table = {"table_ptr": f"*{dtype or 'fp32'}", "out_ptr": "*fp32"}
        yield Spec(
            name=f"encoder_times_{dtype or 'groups'}",
            kernel=gpu_weighted_sum._sum_rows_kernel,
            arguments={
                **({"coefficients_ptr": "*fp32"} if dtype else {}),
                **table,
                **dict.fromkeys(("ROWS", "GROUP", "D", "stride_row"), "i32"),
            },
            constants={
                **({} if dtype else {"coefficients_ptr": None}),
                "stride_column": 1,
                "LANES": config.lanes,
                "BLOCK_D": config.block_d,
                "NUM_STAGES": config.num_stages,
            },
            num_warps=config.num_warps,
            expects=("load128",) if dtype else prefetch,
        )
    yield from update_specs(target)


def update_specs(target: str, d: int = 2304) -> Iterator[Spec]:
    """The width is a constant of these kernels."""
    config = gpu_update.CONFIG
    rows = ("enc_rows_ptr", "dec_rows_ptr")
    low = ("W_enc_low_ptr", "W_dec_low_ptr")
    of_latents = ("b_enc_ptr", "threshold_ptr", "b_enc_v_ptr", "threshold_v_ptr", "db_enc_ptr", "dthreshold_ptr")
    of_entries = {"dz_ptr": "*fp32", "dec_ptr": "*fp32", "tokens_ptr": "*i32", "along_ptr": "*fp32"}
    for source in ("entries", "dense"):
        for dtype in ("bf16", "fp32"):
            arguments = {
                **dict.fromkeys(("W_enc_ptr", "W_dec_ptr", "W_enc_v_ptr", "W_dec_v_ptr"), "*fp32"),
                **{"last_ptr": "*i64", "step_ptr": "*i64", "ok_ptr": "*i32"},
                **{"learning_rate_ptr": "*fp64", "eps": "fp32"},
            }
            if source == "entries":
                arguments |= of_entries | {"lists_ptr": "*i64", "squares_ptr": "*fp32"}
                arguments |= dict.fromkeys(rows, f"*{dtype}")
            else:
                arguments |= {"lists_ptr": "*i32", **dict.fromkeys(rows, "*fp32")}
            if dtype == "bf16":
                arguments |= dict.fromkeys(low, "*bf16")
            constants = {
                "D": d,
                "BETA2": 0.999,
                "LOG2_BETA2": math.log2(0.999),
                "LONG": config.long,
                "UNROLL": config.unroll,
                "BLOCK_D": config.block_d,
                **{name: None for name in (*low, *of_entries, "squares_ptr") if name not in arguments},
            }
            yield Spec(
                name=f"update_{source}_{dtype}",
                kernel=gpu_update._update_kernel,
                arguments={**arguments, **dict.fromkeys(of_latents, "*fp32")},
                constants={
                    **constants,
                    "LOG_THRESHOLD": dtype == "bf16",
                    "FROM_ENTRIES": source == "entries",
                    "BLOCKS": math.ceil(d / config.block_d),
                },
                num_warps=config.num_warps,
                expects=("load128", "store128"),
            )
            if source == "entries":
                yield Spec(
                    name=f"update_long_lists_{dtype}",
                    kernel=gpu_update._long_lists_kernel,
                    arguments={"F": "i32"} | {name: arguments[name] for name in arguments if name != low[1]},
                    constants={"LISTS": 16, "LANES": config.lanes}
                    | {name: constants[name] for name in constants if name != low[1]},
                    num_warps=config.long_warps,
                    expects=("load128",),
                )


def around_the_step(target: str) -> Iterator[Spec]:
    """What a training step does before and after its passes."""
    chosen = list(around_the_step_specs(target))
    yield from chosen
    if target == "sm_90":  # sizes of 1 are compile-time constants, which the interpreter does not show
        sizes = {
            "centre_bf16": ("N", "D"),
            "tokens_bf16": ("N", "D", "capacity", "parts"),
            "touched": ("N", "F", "D"),
            "conclude": ("N", "capacity", "x_parts", "f_parts", "blocks"),
            "finish": ("F", "D", "parts", "latent_blocks", "n_tokens"),
        }
        yield from (with_ones(spec, *sizes[spec.name]) for spec in chosen if spec.name in sizes)


def around_the_step_specs(target: str) -> Iterator[Spec]:
    sums = dict.fromkeys(("sums_ptr", "norms_ptr"), "*fp32")
    config = gpu_centring.CONFIG
    for dtype in ("bf16", "fp32"):
        yield Spec(
            name=f"centre_{dtype}",
            kernel=gpu_centring._centre_kernel,
            arguments={
                **{"x_ptr": "*fp32", "b_dec_ptr": "*fp32", "centred_ptr": f"*{dtype}", **sums},
                **dict.fromkeys(("N", "D", "tokens_per_part"), "i32"),
            },
            constants={"BLOCK_N": config.block_n, "BLOCK_D": config.block_d},
            num_warps=config.num_warps,
            expects=("load128",),
        )
    config = gpu_tokens.CONFIG
    vectors = ("squared_error_ptr", "l0_ptr", "s_ptr", "spread_ptr", "shares_ptr", "f_norms_ptr", "residual_sums_ptr")
    for dtype, options in (("bf16", False), ("fp32", False), ("bf16", True)):
        arguments = {
            **{"z_ptr": "*fp32", "latents_ptr": "*i32", "offsets_ptr": "*i64", "x_ptr": "*fp32"},
            **{"column_sums_ptr": "*fp32", "residual_ptr": f"*{dtype}", "coefficient_ptr": "*fp64"},
            **dict.fromkeys(vectors, "*fp32"),
            **dict.fromkeys(("N", "D", "capacity", "parts"), "i32"),
            **dict.fromkeys(("factor", "target", "tanh_scale"), "fp32"),
        }
        yield Spec(
            name=f"tokens_{dtype}{'_all_options' if options else ''}",
            kernel=gpu_tokens._tokens_kernel,
            arguments=arguments | ({"tanh_sums_ptr": "*fp32"} if options else {}),
            constants={
                **({} if options else {"tanh_sums_ptr": None}),
                **{"OF_L0": "quadratic" if options else "linear", "OF_BATCH": options},
                **{"PARTS": gpu_centring.CONFIG.parts, "BLOCK_N": config.block_n, "BLOCK_D": config.block_d},
                "BLOCK_E": config.block_e,
            },
            # Three words a thread in fp32: Triton 3.9, one target.
            max_spill=12 if dtype == "fp32" and target == "sm_100" else 0,
            num_warps=config.num_warps,
            expects=("load128",),
        )
    config = gpu_conclusion.CONFIG
    weights = {"W_enc_ptr": "*fp32", "W_dec_ptr": "*fp32", "W_enc_low_ptr": "*bf16", "W_dec_low_ptr": "*bf16"}
    for suffix, copies, from_lists in (("", True, True), ("_dense_fp32", False, False)):
        absent = dict.fromkeys(("W_enc_low_ptr", "W_dec_low_ptr", "column_ptr"))
        arguments = {
            **{"threshold_ptr": "*fp32", "lists_ptr": "*i64" if from_lists else "*i32", "firing_count_ptr": "*i32"},
            **weights,
            **{"column_ptr": "*fp64", "sums_ptr": "*fp32"},
            **dict.fromkeys(("N", "F", "D"), "i32"),
        }
        yield Spec(
            name=f"touched{suffix}",
            kernel=gpu_conclusion._touched_kernel,
            arguments=arguments if copies else {key: kind for key, kind in arguments.items() if key not in absent},
            constants={**({} if copies else absent), "FROM_LISTS": from_lists, "BLOCK_F": config.block_f},
            num_warps=config.warps_f,
        )
    vectors = ("squared_error_ptr", "l0_ptr", "s_ptr", "spread_ptr", "shares_ptr", "x_norms_ptr", "f_norms_ptr")
    for suffix, options in (("", False), ("_all_options", True)):
        arguments = {
            **dict.fromkeys((*vectors, "sums_ptr"), "*fp32"),
            **{"coefficient_ptr": "*fp64", "ok_ptr": "*i32", "number_ptr": "*i64", "figures_ptr": "*fp64"},
            **dict.fromkeys(("n_entries_ptr", "stalled_ptr", "skipped_ptr", "updates_ptr"), "*i64"),
            **dict.fromkeys(("N", "capacity", "x_parts", "f_parts", "blocks"), "i32"),
            **dict.fromkeys(("factor", "target", "frequency_scale", "tanh_scale", "bandwidth", "limit"), "fp32"),
            "root_n": "fp32",
        }
        yield Spec(
            name=f"conclude{suffix}",
            kernel=gpu_conclusion._conclude_kernel,
            arguments=arguments | ({"tanh_sums_ptr": "*fp32"} if options else {}),
            constants={
                **({} if options else {"tanh_sums_ptr": None}),
                **{"OF_L0": "quadratic" if options else "linear", "OF_BATCH": False, "HAS_FREQUENCY": options},
                **{"STE_TO_Z": options, "HAS_COPIES": True, "HAS_CAPACITY": True, "BLOCK": config.block},
            },
            num_warps=config.num_warps,
        )
    config = gpu_finishing.CONFIG
    yield Spec(
        name="finish",
        kernel=gpu_finishing._finish_kernel,
        arguments={
            **dict.fromkeys(("b_dec_ptr", "v_ptr", "sums_ptr", "of_encoder_ptr"), "*fp32"),
            **dict.fromkeys(("since_ptr", "updates_ptr", "number_ptr"), "*i64"),
            **{"firing_count_ptr": "*i32", "learning_rate_ptr": "*fp64", "ok_ptr": "*i32"},
            **dict.fromkeys(("F", "D", "parts", "latent_blocks", "n_tokens"), "i32"),
            **dict.fromkeys(("scale", "eps"), "fp32"),
        },
        constants={
            **{"BETA2": 0.999, "LOG2_BETA2": math.log2(0.999)},
            **{"BLOCK_F": config.block_f, "BLOCK_D": config.block_d, "BLOCK_N": config.block_n},
        },
        num_warps=config.num_warps,
    )


def transpose(entries: dict[str, str]) -> Iterator[Spec]:
    """The counting sort by latent, of 16,384 latents and 4,096 tokens. entries: types of pointers to them."""
    config = gpu_transpose.CONFIG
    read = {name: entries[name] for name in ("latents_ptr", "offsets_ptr")} | {"tokens_ptr": "*i32"}
    sizes = dict.fromkeys(("N", "F", "capacity", "per_latent"), "i32")
    grouping = {"GROUP": config.group, "BINS": 128}
    yield Spec(
        name="transpose_mark",
        kernel=gpu_transpose._mark_kernel,
        arguments={**read, **dict.fromkeys(("marks_ptr", "counts_ptr", "groups_ptr"), "*i32"), **sizes},
        constants={**grouping, "BLOCK": config.mark},
        num_warps=config.num_warps,
        expects=("atomic",),
    )
    yield Spec(
        name="transpose_starts",
        kernel=gpu_transpose._starts_kernel,
        arguments={
            **dict.fromkeys(("counts_ptr", "groups_ptr", "starts_ptr"), "*i32"),
            "offsets_ptr": "*i64",
            **dict.fromkeys(("n_blocks", "per_latent"), "i32"),
        },
        constants=grouping,
        num_warps=config.num_warps,
        expects=("load128", "store128"),
    )
    yield Spec(
        name="transpose_place",
        kernel=gpu_transpose._place_kernel,
        arguments={**read, **dict.fromkeys(("marks_ptr", "starts_ptr"), "*i32"), "order_ptr": "*i64", **sizes},
        constants={"BLOCK": config.place},
        num_warps=config.num_warps,
        expects=("load128",),
    )


OPERATORS = (jumprelu, encode, training_encode, dense, decode, sparse_step, around_the_step)


def specs(target: str) -> list[Spec]:
    """Everything that is compiled for ``target`` ("sm_90", "gfx942", …)."""
    return [spec for operator in OPERATORS for spec in operator(target)]
