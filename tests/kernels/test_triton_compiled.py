"""The Triton kernels compiled for GPUs that need not be here: registers, spills, shared memory, width of the accesses.

Bounds hold for triton 3.7.1; registers and spills differ between its versions. Two blocks of eight warps, or what
amounts to as many threads, must fit a multiprocessor: 65,536 registers leave 128 to a thread.
"""

from __future__ import annotations

import importlib.util
import os

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets and cannot compile"),
]
SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a block can have; the compiler does not check
SPARSE = {
    **dict.fromkeys(("logits", "gradient"), "*bf16"),
    **dict.fromkeys(("logy", "logy_rest", "flip", "accuracy", "scale", "losses"), "*fp32"),
    **dict.fromkeys(("rests", "rest_slopes", "kept_slopes", "upstream"), "*fp32"),
    **dict.fromkeys(("bits", "classes"), "*i32"),
    **dict.fromkeys(("padding", "valid"), "*i8"),
    "bias": "*bf16",
    **dict.fromkeys(("C", "span", "row_stride", "gradient_stride", "upstream_stride", "words"), "i32"),
    **dict.fromkeys(("T", "tau", "mixture"), "fp32"),
}


def kind_of(form):
    """The number of a divergence, of which slam is the forward one."""
    from distilbeam.kernels.distillation.divergences import KINDS

    return KINDS.index("forward" if form == "slam" else form)


def for_kernel(kernel):
    return {name: kind for name, kind in SPARSE.items() if name in kernel.arg_names}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("form", ["forward", "slam", "both", "student", "absolute"])
@pytest.mark.parametrize(("classes", "kept"), [(32_000, 8), (128_256, 64)])
def test_rows_are_solved_sixteen_bytes_at_a_time_without_spills(capability, form, classes, kept):
    from triton_ahead_of_time import compile_for

    from distilbeam.kernels.distillation.triton_backend import solving_block
    from distilbeam.kernels.distillation.triton_kernels import solve_rows

    slam = form == "slam"
    flags = {"REST": True, "ENTROPY": not slam, "SLAM": slam, "FORWARD": slam, "ADD": False, "BIAS": False}
    flags |= {"PADDED": True, "MASKED": True, "K": kept, "KP": kept, "KIND": kind_of(form)}
    block = solving_block(classes)
    constants = {"BLOCK": block.pop("BLOCK"), **flags}
    found = compile_for(capability, solve_rows, for_kernel(solve_rows), constants, **block)
    assert found.spills == 0
    assert found.registers <= 64
    assert found.shared <= 4096 < SHARED[capability]
    assert found.instructions["LDG.E.128"] >= 1
    assert found.instructions["LDG.E.U16"] <= 1  # the kept logits alone are gathered one by one
    assert found.count("BAR.SYNC") <= 44
    assert sum(found.instructions.values()) <= (1344 if form in ("forward", "slam") else 1408)


GIVEN = {
    **SPARSE,
    **dict.fromkeys(("weight", "normalizer"), "*fp32"),
    **dict.fromkeys(("logy", "logy_rest"), "*fp16"),
    **dict.fromkeys(("ignore", "nought"), "i32"),
    "labels": "*bf16",
    "label_stride": "i32",
    "share": "fp32",
    "classes": "*i64",
}
LABELS = {  # as the kernels' flags say it
    "prepared": {"GIVEN": False, "TAIL": 0, "BUCKET": False, "HARD": False, "PADDED": True},
    "top-k": {"GIVEN": True, "TAIL": 1, "BUCKET": True, "HARD": False, "PADDED": False},
    "true classes": {"GIVEN": True, "TAIL": 0, "BUCKET": False, "HARD": True, "PADDED": False},
}


def compiled_given(capability, kernel, kept, block, label, shifted, form="forward"):
    """Compile one of the kernels that read octets; of odd vocabularies nothing is known about where rows begin."""
    from triton_ahead_of_time import compile_for

    flags = {**LABELS[label], "MASKED": True, "WEIGHTED": True, "DIVIDED": True, "ENTROPY": True, "WIDE": False}
    flags |= {"K": kept, "KP": kept, "SHIFTED": shifted, "KIND": kind_of(form)}
    kinds = {**GIVEN, **({"logy": "*fp32", "logy_rest": "*fp32", "classes": "*i32"} if label == "prepared" else {})}
    constants = {name: value for name, value in {**flags, **block}.items() if name in kernel.arg_names}
    options = {name: value for name, value in block.items() if name not in kernel.arg_names}
    signature = {name: kind for name, kind in kinds.items() if name in kernel.arg_names}
    odd = ("C", "row_stride", "gradient_stride", "label_stride") if shifted else ()
    return compile_for(capability, kernel, signature, constants, odd=odd, **options), constants


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.exhaustive), 90])
@pytest.mark.parametrize(("classes", "kept"), [(32_000, 8), (50_257, 64), (128_256, 64)])
@pytest.mark.parametrize("label", LABELS)
def test_value_and_gradient_in_one_kernel_hold_their_rows_without_spills(capability, classes, kept, label):
    from distilbeam.kernels.distillation.triton_given_backend import EDGE, held_blocks
    from distilbeam.kernels.distillation.triton_one_kernel import value_and_gradient

    shifted = classes % 8 > 0
    kept = 1 if label == "true classes" else kept
    block = held_blocks(classes - EDGE if shifted else classes)
    found, constants = compiled_given(capability, value_and_gradient, kept, block, label, shifted)
    assert found.spills == 0
    assert found.registers <= 128  # 16 warps of them: a row to a multiprocessor
    assert found.shared <= 8192
    assert found.count("LDG.E.EF.128") >= constants["HELD"]  # of what is held, 16 bytes at a time
    assert found.count("STG.E.EF.128") >= constants["HELD"]
    assert found.instructions["LDG.E.U16"] <= 5  # kept logits, the octets around them and the row's edge
    assert found.instructions["STG.E.U16"] <= 2
    assert found.count("BAR.SYNC") <= 56
    assert sum(found.instructions.values()) <= 2560


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("classes", "kept"), [(32_000, 8), (50_257, 64), (128_256, 64)])
@pytest.mark.parametrize("name", ["solve_octets", "spread_octets"])
def test_two_kernels_read_and_write_octets_wherever_rows_begin(capability, classes, kept, name):
    from distilbeam.kernels.distillation import triton_two_kernels
    from distilbeam.kernels.distillation.triton_backend import SPAN, solving_block, spreading_block

    solving = name == "solve_octets"
    block = solving_block(classes) if solving else spreading_block(SPAN)
    kernel = getattr(triton_two_kernels, name)
    found, _ = compiled_given(capability, kernel, kept, block, "top-k", classes % 8 > 0)
    assert found.spills == 0
    assert found.registers <= (64 if solving else 32)
    assert found.shared <= 256
    assert found.count("LDG.E.128") >= 2
    assert found.instructions["LDG.E.U16"] <= 5
    assert found.instructions["STG.E.U16"] <= 2
    assert solving or found.count("STG.E.128") >= 2
    assert found.count("BAR.SYNC") <= (56 if solving else 1)
    assert sum(found.instructions.values()) <= (1408 if solving else 304)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("classes", [32_000, 50_257, 128_256])
def test_the_kernel_that_prepares_dense_labels_reads_both_in_octets_and_spills_nothing(capability, classes):
    from distilbeam.kernels.distillation.triton_dense import dense_value_and_gradient
    from distilbeam.kernels.distillation.triton_given_backend import dense_block

    shifted = classes % 8 > 0
    found, _ = compiled_given(capability, dense_value_and_gradient, 1, dense_block(8192), "top-k", shifted)
    assert found.spills == 0
    assert found.registers <= 64  # 32 warps of them
    assert found.instructions["LDG.E.EL.128"] >= 2  # logits and labels
    assert found.instructions["LDG.E.EF.128"] >= 2
    assert found.instructions["STG.E.EF.128"] >= 1
    assert found.instructions["LDG.E.U16"] <= 2  # the edges
    assert found.instructions["STG.E.U16"] <= 1
    assert found.count("BAR.SYNC") <= 17
    assert sum(found.instructions.values()) <= 1024


@pytest.mark.parametrize("capability", [80, 90])
def test_gradients_are_multiplied_sixteen_bytes_at_a_time(capability):
    from triton_ahead_of_time import compile_for

    from distilbeam.kernels.distillation.triton_octets import rescale

    kinds = {
        "gradient": "*bf16",
        "upstream": "*fp32",
        **dict.fromkeys(("C", "gradient_stride", "upstream_stride"), "i32"),
    }
    found = compile_for(capability, rescale, kinds, {"BLOCK": 4096}, num_warps=4)
    assert found.spills == 0
    assert found.registers <= 64
    assert found.count("LDG.E.128") == found.count("STG.E.128") == 4  # 4,096 numbers of 128 threads
    assert found.count("BAR.SYNC") == 0


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kind", ["backward", "in place"])
def test_gradients_are_spread_sixteen_bytes_at_a_time_without_spills(capability, kind):
    from triton_ahead_of_time import compile_for

    from distilbeam.kernels.distillation.triton_backend import spreading_block
    from distilbeam.kernels.distillation.triton_kernels import spread_rows

    back = kind == "backward"
    flags = {"REST": True, "ADD": False, "BIAS": not back, "SCALED": back, "MARKED": not back, "IN_PLACE": not back}
    flags |= {"PADDED": True, "MASKED": True, "K": 64, "KP": 64}
    block = spreading_block(128_256)
    constants = {"BLOCK": block.pop("BLOCK"), **flags}
    signature = {**for_kernel(spread_rows), "logits": "*bf16" if back else "*fp32"}
    found = compile_for(capability, spread_rows, signature, constants, **block)
    assert found.spills == 0
    assert found.registers <= 128
    assert found.instructions["LDG.E.128"] >= 1
    assert found.instructions["STG.E.128"] >= 1
    assert found.instructions["STG.E.U16"] <= 1  # the kept classes
    assert found.count("BAR.SYNC") <= 3
    assert sum(found.instructions.values()) <= 448


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("classes", [10, 1000, 4096])
@pytest.mark.parametrize("form", ["forward", "slam", "both", "student", "absolute"])
def test_the_dense_kernel_keeps_its_row_in_registers(capability, classes, form):
    import triton
    from triton_ahead_of_time import compile_for

    from distilbeam.kernels.distillation.triton_backend import dense_warps
    from distilbeam.kernels.distillation.triton_dense import dense_rows

    block = triton.next_power_of_2(classes)
    slam = form == "slam"
    constants = {"BLOCK": block, "ENTROPY": not slam, "SLAM": slam, "FORWARD": slam, "ADD": False}
    constants |= {"KIND": kind_of(form)}
    found = compile_for(capability, dense_rows, for_kernel(dense_rows), constants, num_warps=dense_warps(block))
    assert found.spills == 0
    assert found.registers <= 112
    assert found.shared <= 4096
    assert found.count("BAR.SYNC") <= 24
    assert sum(found.instructions.values()) <= 1344
    if classes > 100:
        assert found.count("LDG.E.128") >= 2
        assert found.count("STG.E.128") >= 1


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("form", ["forward", "both", "student", "absolute"])
def test_the_kernel_of_long_dense_rows_moves_sixteen_bytes_at_a_time_and_spills_nothing(capability, form):
    from triton_ahead_of_time import compile_for

    from distilbeam.kernels.distillation.triton_backend import LONG_DENSE
    from distilbeam.kernels.distillation.triton_dense import dense_sweeps

    block = dict(LONG_DENSE)
    constants = {"BLOCK": block.pop("BLOCK"), "ENTROPY": True, "ADD": False, "KIND": kind_of(form)}
    found = compile_for(capability, dense_sweeps, for_kernel(dense_sweeps), constants, **block)
    assert found.spills == 0
    assert found.registers <= 64
    assert found.count("BAR.SYNC") <= (12 if form == "forward" else 14)  # one more sum over the row
    assert sum(found.instructions.values()) <= (720 if form == "forward" else 1856)
    assert found.instructions["LDG.E.EL.128"] >= 2  # logits and targets
    assert found.instructions["LDG.E.EF.128"] >= 2
    assert found.instructions["STG.E.EF.128"] >= 1
