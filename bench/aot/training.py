"""The compilations of the operators of a training step, by both routes, and of what stands around them."""

import math
from collections.abc import Iterator
from dataclasses import replace

import torch

from bench.aot.inference import encode_gemm
from bench.aot.spec import Spec, with_ones
from gemmascope.kernels.gpu import centring as gpu_centring
from gemmascope.kernels.gpu import conclusion as gpu_conclusion
from gemmascope.kernels.gpu import dense as gpu_dense
from gemmascope.kernels.gpu import encode as gpu_encode
from gemmascope.kernels.gpu import encode_gemm as gpu_encode_gemm
from gemmascope.kernels.gpu import entries as gpu_entries
from gemmascope.kernels.gpu import finishing as gpu_finishing
from gemmascope.kernels.gpu import latents as gpu_latents
from gemmascope.kernels.gpu import residual as gpu_residual
from gemmascope.kernels.gpu import selection as gpu_selection
from gemmascope.kernels.gpu import tokens as gpu_tokens
from gemmascope.kernels.gpu import transpose as gpu_transpose
from gemmascope.kernels.gpu import update as gpu_update
from gemmascope.kernels.gpu import weighted_sum as gpu_weighted_sum


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
        name="training_entries_begin",
        kernel=gpu_entries._begin_kernel,
        arguments={
            **{"threshold_ptr": "*fp32", "lower_ptr": "*fp32", "latents_ptr": "*i32"},
            **{"half_bandwidth": "fp32", "F": "i32", "capacity": "i32"},
        },
        constants={"BLOCK": gpu_entries.EDGE_BLOCK, "FILL": gpu_entries.FILL_BLOCK},
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


def topk(target: str) -> Iterator[Spec]:
    """The product and the selection of a TopK or BatchTopK step."""
    for dtype, torch_dtype, tf32 in (
        ("bf16", torch.bfloat16, False),
        ("fp32", torch.float32, False),
        ("fp32", torch.float32, True),
    ):
        chosen = {}
        for n_tokens, describable in ((16, True), (128, True), (4096, True), (4096, False)):
            config = gpu_encode_gemm.encode_config(target, torch_dtype, n_tokens, describable, tf32)
            kind = "tma" if config.descriptors else "ptr"
            tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
            chosen[f"{kind}_{tile}_{'tf32' if tf32 else dtype}"] = config
        for name, config in chosen.items():
            yield encode_gemm(target, f"topk_{name}", config, dtype, "largest")
            if config.block_m >= 128:
                yield encode_gemm(target, f"topk_{name}_even", config, dtype, "largest", masked=False)
            if config.descriptors:
                yield encode_gemm(target, f"topk_{name}_among", config, dtype, "largest_among")
    chosen = list(selection(target))
    yield from chosen
    if target == "sm_90":
        for spec in chosen:
            if spec.name in ("topk_select_64", "topk_mark"):  # of one latent: nobody waits for it
                yield replace(with_ones(spec, "F", "n_groups"), max_spill=512)


def selection(target: str) -> Iterator[Spec]:
    rows, few = {"F": "i32", "n_groups": "i32"}, gpu_selection.FEW
    lists = dict.fromkeys(("list_ptr", "listed_ptr"), "*i32")
    for k, config in ((64, few), (256, gpu_selection.MANY)):
        yield Spec(
            name=f"topk_select_{k}",
            kernel=gpu_selection._select_kernel,
            arguments={"z_ptr": "*fp32", "keys_ptr": "*i32", "list_ptr": "*i32", "k": "i32", **rows},
            constants={"BLOCK": config.block, "TILE": config.tile},
            num_warps=config.num_warps,
            expects=("load128",),
        )
    counts, state = {"counts_ptr": "*i32"}, {"state_ptr": "*i32"}
    for shift, width in gpu_selection.DIGITS:
        digit = {"SHIFT": shift, "WIDTH": width}
        yield Spec(
            name=f"topk_count_keys_{shift}",
            kernel=gpu_selection._count_keys_kernel,
            arguments={"z_ptr": "*fp32", **lists, **counts, **state, **rows},
            constants={**digit, "TILE": few.tile},
            num_warps=few.num_warps,
            expects=("load128", "atomic"),
        )
    for shift, width in gpu_selection.DIGITS[: gpu_selection.GROUP_DIGITS]:
        yield Spec(
            name=f"topk_count_groups_{shift}",
            kernel=gpu_selection._count_groups_kernel,
            arguments={"keys_ptr": "*i32", **counts, **state, "size": "i32"},
            constants={"SHIFT": shift, "WIDTH": width, "BLOCK": gpu_selection.COUNT_BLOCK},
            expects=("load128", "atomic"),
        )
    yield Spec("topk_pick", gpu_selection._pick_kernel, {**counts, **state}, {"SHIFT": 23})
    yield Spec(
        name="topk_list",
        kernel=gpu_selection._list_kernel,
        arguments={"keys_ptr": "*i32", **lists, **state, "n_groups": "i32"},
        constants={"BLOCK": few.block},
        num_warps=few.num_warps,
    )
    yield Spec(
        name="topk_count_ties",
        kernel=gpu_selection._count_ties_kernel,
        arguments={"z_ptr": "*fp32", **lists, **state, "ties_ptr": "*i32", **rows},
        constants={"TILE": few.tile},
        num_warps=few.num_warps,
        expects=("load128",),
    )
    yield Spec(
        name="topk_mark",
        kernel=gpu_selection._mark_kernel,
        arguments={"z_ptr": "*fp32", **lists, "words_ptr": "*i32", **state, "ties_ptr": "*i64", **rows},
        constants={"TILE": few.tile},
        num_warps=few.num_warps,
        expects=("load128",),
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
    # At most four words a thread of the long lists: Triton 3.6, one target.
    spill = {"update_entries_bf16": 0, "update_long_lists_bf16": 16 if target == "sm_80" else 0}
    with_moments = (spec for spec in update_specs(target, beta1=0.9) if spec.name in spill)
    yield from (replace(spec, name=f"{spec.name}_beta1", max_spill=spill[spec.name]) for spec in with_moments)
    # A transcoder from the attention of Gemma 2 2B to its residual stream.
    of_two_widths = (spec for spec in update_specs(target, d_in=2048) if spec.name in spill)
    yield from (replace(spec, name=f"{spec.name}_two_widths", max_spill=spill[spec.name]) for spec in of_two_widths)


def update_specs(target: str, d: int = 2304, beta1: float = 0.0, d_in: int | None = None) -> Iterator[Spec]:
    """The widths and Adam's decays are constants of these kernels. d_in: of W_enc, if it is not ``d``."""
    config = gpu_update.CONFIG
    rows = ("enc_rows_ptr", "dec_rows_ptr")
    low = ("W_enc_low_ptr", "W_dec_low_ptr")
    first = ("W_enc_m_ptr", "W_dec_m_ptr", "b_enc_m_ptr", "threshold_m_ptr")
    of_latents = ("b_enc_ptr", "threshold_ptr", "b_enc_v_ptr", "threshold_v_ptr", "db_enc_ptr", "dthreshold_ptr")
    of_latents += first[2:] if beta1 else ()
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
            if beta1:
                arguments |= dict.fromkeys(first[:2], "*fp32")
            constants = {
                "D_IN": d_in or d,
                "D_OUT": d,
                "BETA1": beta1,
                "LOG2_BETA1": math.log2(beta1) if beta1 else None,
                "BETA2": 0.999,
                "LOG2_BETA2": math.log2(0.999),
                "LONG": config.long,
                "UNROLL": config.unroll,
                "BLOCK_D": config.block_d,
                **{name: None for name in (*low, *of_entries, "squares_ptr", *first[:2]) if name not in arguments},
            }
            yield Spec(
                name=f"update_{source}_{dtype}",
                kernel=gpu_update._update_kernel,
                arguments={**arguments, **dict.fromkeys(of_latents, "*fp32")},
                constants={
                    **constants,
                    **({} if beta1 else dict.fromkeys(first[2:])),
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


def around_the_step(target: str) -> Iterator[Spec]:
    """What a training step does before and after its passes."""
    chosen = list(around_the_step_specs(target))
    yield from chosen
    if target == "sm_90":  # sizes of 1 are compile-time constants, which the interpreter does not show
        sizes = {
            "centre_bf16": ("N", "D", "F"),
            "tokens_bf16": ("N", "D", "capacity", "parts"),
            "touched": ("N", "F", "D"),
            "conclude": ("N", "capacity", "x_parts", "f_parts", "blocks"),
            "finish": ("F", "D", "parts", "encoder_parts", "latent_blocks", "n_tokens"),
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
                **dict.fromkeys(("x_ptr", "b_dec_ptr", "threshold_ptr"), "*fp32"),
                **{"centred_ptr": f"*{dtype}", **sums},
                **dict.fromkeys(("N", "D", "F", "tokens_per_part"), "i32"),
            },
            constants={"BLOCK_N": config.block_n, "BLOCK_D": config.block_d, "BLOCK_F": config.block_f},
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
                **{"OF_L0": "quadratic" if options else "linear", "OF_BATCH": options, "OF_F": False},
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
                **{"OF_F": False, "STE_TO_Z": options, "HAS_COPIES": True, "HAS_CAPACITY": True, "BLOCK": config.block},
            },
            num_warps=config.num_warps,
        )
    config = gpu_finishing.CONFIG
    for beta1 in (0.0, 0.9):
        arguments = {
            **dict.fromkeys(("b_dec_ptr", "v_ptr", "sums_ptr", "of_encoder_ptr"), "*fp32"),
            **dict.fromkeys(("since_ptr", "updates_ptr", "number_ptr"), "*i64"),
            **{"firing_count_ptr": "*i32", "learning_rate_ptr": "*fp64", "ok_ptr": "*i32"},
            **dict.fromkeys(("F", "D", "parts", "encoder_parts", "latent_blocks", "n_tokens"), "i32"),
            **dict.fromkeys(("scale", "eps"), "fp32"),
        }
        yield Spec(
            name="finish_beta1" if beta1 else "finish",
            kernel=gpu_finishing._finish_kernel,
            arguments=arguments | ({"m_ptr": "*fp32"} if beta1 else {}),
            constants={
                **({} if beta1 else {"m_ptr": None}),
                **{"BETA1": beta1, "LOG2_BETA1": math.log2(beta1) if beta1 else None},
                **{"BETA2": 0.999, "LOG2_BETA2": math.log2(0.999)},
                **{"BLOCK_F": config.block_f, "BLOCK_D": config.block_d, "BLOCK_N": config.block_n},
                "LANES": config.lanes,
            },
            num_warps=config.num_warps,
        )
