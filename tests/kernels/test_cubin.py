# SPDX-License-Identifier: Apache-2.0
"""Kernels compiled ahead of time, without a GPU: registers, shared memory, spills, occupancy."""

import os
import re
import subprocess

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") == "1":
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from vtc.kernels.attention_reduce import triton as attention  # noqa: E402
from vtc.kernels.compact_tokens import triton as compact  # noqa: E402
from vtc.kernels.merge_tokens import triton as merge  # noqa: E402
from vtc.kernels.similarity_reduce import triton as similarity  # noqa: E402

REGISTERS = 65536
THREADS = 2048
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}
"""Shared memory of a multiprocessor in bytes; CUDA keeps 1 KB of it for every resident block."""
BLOCKS = 32

BF16, FP32 = ("bf16", torch.bfloat16), ("fp32", torch.float32)


def similarity_case(name, n, c, dtype, kind):
    types = {
        "x_ptr": f"*{dtype[0]}",
        "y_ptr": f"*{dtype[0]}",
        "index_ptr": "*i32",
        "margin": "fp32",
    }
    types |= {"alpha": "fp32", "out_ptr": "*fp32", "x_length_ptr": "*i64", "y_length_ptr": "*i64"}
    types |= {"x_mask_ptr": "*u8", "y_mask_ptr": "*u8"}
    types |= {"x_scale_ptr": "*fp32", "y_scale_ptr": "*fp32"}
    flags = dict.fromkeys(("NORMALIZE", "X_LENGTHS", "Y_LENGTHS"), True)
    flags |= dict.fromkeys(("X_MASK", "Y_MASK", "SKIP_DIAGONAL"), kind == "max")
    flags |= {"KIND": similarity.KINDS[kind], "MEAN": kind != "max"}
    config = similarity.config(n, n, c, dtype[1], kind)
    return (
        f"similarity-{kind}-{name}-{dtype[0]}",
        similarity.similarity_kernel,
        types,
        flags,
        config,
    )


def attention_case(name, c, dtype, lse):
    kernel = attention.row_lse_kernel if lse else attention.column_sums_kernel
    types = {"q_ptr": f"*{dtype[0]}", "k_ptr": f"*{dtype[0]}", "scale": "fp32"}
    types |= {"lse_ptr": "*fp32", "weight_ptr": "*fp32", "out_ptr": "*fp32"}
    types |= {"key_mask_ptr": "*u8", "query_mask_ptr": "*u8"}
    flags = dict.fromkeys(("CAUSAL", "WEIGHTED", "QUERY_MASK", "KEY_MASK"), True)
    name = f"attention-{'lse' if lse else 'sums'}-{name}-{dtype[0]}"
    return name, kernel, types, flags, attention.config(c, dtype[1])


def merge_case(name, c, dtype):
    types = {"x_ptr": f"*{dtype[0]}", "out_ptr": f"*{dtype[0]}", "size_ptr": "*fp32"}
    types |= {"order_ptr": "*i32", "start_ptr": "*i32", "new_size_ptr": "*fp32"}
    return f"merge-{name}-{dtype[0]}", merge.merge_kernel, types, {"SIZED": True}, merge.config(c)


def compact_case(name, width, word):
    types = {f"{p}{i}_ptr": f"*{word}" for p in ("x", "out") for i in range(4)}
    types |= {"keep_ptr": "*i64", "destination_ptr": "*i64"}
    flags = {"SCATTER": True, "FLAT": True}
    return f"compact-{name}-{word}", compact.compact_kernel, types, flags, compact.config(width)


CASES = [
    *(
        similarity_case(name, n, c, dtype, kind)
        for name, n, c, dtype in (
            ("64", 576, 64, BF16),
            ("128", 576, 128, BF16),
            ("1024", 576, 1024, BF16),
            ("1024", 576, 1024, FP32),
        )
        for kind in ("elu", "max")
    ),
    similarity_case("large", 4096, 1024, BF16, "elu"),
    *(
        attention_case(name, c, dtype, lse)
        for name, c, dtype in (
            ("64", 64, BF16),
            ("128", 128, BF16),
            ("256", 256, BF16),
            ("64", 64, FP32),
        )
        for lse in (True, False)
    ),
    merge_case("narrow", 64, BF16),
    merge_case("wide", 1024, FP32),
    compact_case("narrow", 64, "i64"),
    compact_case("wide", 1024, "i64"),
    (
        "merge-order",
        merge.order_kernel,
        {"group_ptr": "*i64", "order_ptr": "*i32", "start_ptr": "*i32"},
        {},
        {"KEY": tl.int32, "BLOCK": 64, "BLOCK_J": 64, "num_warps": 4},
    ),
    (
        "similarity-scale",
        similarity.scale_kernel,
        {"x_ptr": "*bf16", "scale_ptr": "*fp32"},
        {"BLOCK_N": 4, "BLOCK_C": 512},
        {},
    ),
    (
        "similarity-combine",
        similarity.combine_kernel,
        {"part_ptr": "*fp32", "part_index_ptr": "*i32", "out_ptr": "*fp32", "index_ptr": "*i64"},
        {"IS_MAX": True, "BLOCK_N": 256},
        {},
    ),
]


def build(kernel, types, flags, config, arch):
    """The compiled kernel for one architecture, as a launch specialises it at the usual widths.

    Pointers, row strides and widths are divisible by 16.
    """
    constants = {**flags, **{k: v for k, v in config.items() if not k.startswith("num_")}}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    options = {k: v for k, v in config.items() if k.startswith("num_")}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    aligned = [
        i
        for i, (name, t) in enumerate(signature.items())
        if t.startswith("*") or "stride" in name or name == "C"
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def resources(compiled, arch, folder):
    """Registers of a thread, spilled bytes, shared memory of a block, blocks per multiprocessor."""
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    assembler = "ptxas-blackwell" if arch >= 100 else "ptxas"
    path = folder / "kernel.ptx"
    path.write_text(compiled.asm["ptx"])
    target = re.search(r"\.target (\w+)", compiled.asm["ptx"])[1]
    command = [os.path.join(tools, assembler), "-v", f"--gpu-name={target}", str(path)]
    log = subprocess.run(
        [*command, "-o", str(folder / "kernel.cubin")], capture_output=True, text=True, check=True
    ).stderr
    registers = int(re.search(r"Used (\d+) registers", log)[1])
    spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log))
    threads = 32 * compiled.metadata.num_warps
    shared = compiled.metadata.shared
    granules = -(-registers // 8) * 8  # registers are handed out eight to a thread
    blocks = min(
        REGISTERS // (granules * threads),
        THREADS // threads,
        SHARED[arch] // (shared + 1024),
        BLOCKS,
    )
    return registers, spilled, shared, blocks


@pytest.mark.parametrize("arch", [80, 90, 100])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_two_blocks_of_every_kernel_fit_without_spills(case, arch, tmp_path, record_property):
    name, *parts = case
    compiled = build(*parts, arch)
    assert compiled.asm["cubin"][:4] == b"\x7fELF"
    registers, spilled, shared, blocks = resources(compiled, arch, tmp_path)
    print(f"{name} sm_{arch}: {registers} registers, {shared} bytes shared, {blocks} blocks")
    record_property("resources", (registers, spilled, shared, blocks))
    assert spilled == 0, f"{name} spills {spilled} bytes on sm_{arch}"
    assert blocks >= 2, f"{registers} registers and {shared} bytes leave {blocks} block"
