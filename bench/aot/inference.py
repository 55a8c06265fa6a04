"""The compilations of the operators of inference, and of the product that training shares with them."""

from collections.abc import Iterator

import torch

from bench.aot.spec import Spec, matrix_instruction
from gemmascope.kernels.gpu import decode as gpu_decode
from gemmascope.kernels.gpu import encode as gpu_encode
from gemmascope.kernels.gpu import encode_gemm as gpu_encode_gemm
from gemmascope.kernels.gpu import jumprelu as gpu_jumprelu


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


def encode_gemm(
    target: str,
    name: str,
    config: gpu_encode_gemm.EncodeConfig,
    dtype: str,
    mode: str = "sparse",
    masked: bool = True,
    **overrides,
) -> Spec:
    """masked: N or F ends inside a tile, as of a last batch. Mode "largest_among": largest,
    of some latents."""
    sizes = {"N": "i32", "F": "i32", "D": "i32"}
    outputs = {"b_enc_ptr": "*fp32", "threshold_ptr": "*fp32", "half_bandwidth": "fp32", "words_ptr": "*i32"}
    outputs |= {"z_ptr": f"*{dtype}" if mode == "dense" else "*fp32", "window_ptr": "*i32", **sizes}
    if mode == "largest_among":
        outputs["threshold_ptr"] = "*i8"
    constants = {
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "SPLIT": config.split,
        "GROUP_M": config.group_m,
        "MODE": mode.removesuffix("_among"),
        "MASKED": masked,
        "INPUT_PRECISION": config.input_precision,
    }
    if mode == "largest":
        del outputs["threshold_ptr"]
        constants["threshold_ptr"] = None
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
        arguments={**dict.fromkeys(("words_ptr", "counts_ptr", "totals_ptr"), "*i32"), "n_segments": "i32", **segments},
        constants={"WORDS": words, "BLOCK": gpu_encode.COUNT_BLOCK},
        unaligned=("per_row",),
        expects=("load128",),
    )
    yield Spec(
        name="encode_scan",
        kernel=gpu_encode._scan_kernel,
        arguments={
            **dict.fromkeys(("counts_ptr", "totals_ptr"), "*i32"),
            **dict.fromkeys(("starts_ptr", "offsets_ptr"), "*i64"),
            **dict.fromkeys(("n_segments", "first_row", "per_row"), "i32"),
        },
        constants={
            "GROUP": gpu_encode.SCAN_BLOCK,
            "TOTALS_OF_GROUP": gpu_encode.SCAN_BLOCK // gpu_encode.COUNT_BLOCK,
            "BLOCK": gpu_encode.SCAN_TOTALS,
        },
        unaligned=("n_segments", "first_row", "per_row"),
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
