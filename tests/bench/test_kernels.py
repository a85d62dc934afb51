"""Kernels by their names: those of a GPU as profilers have shown them, those of this CPU by running them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megapix.bench.kernels import REGION, Kernels, forward, kind, read, traced
from tests.support.launch import succeed

FLASH = (
    "Flash_fwd_kernel_traits<128, 128, 64, 4, false, false, cutlass::bfloat16_t, Flash_kernel_traits<128, 128, 64> >"
)
NAMES = [
    (f"void pytorch_flash::flash_fwd_kernel<{FLASH}, false>(pytorch_flash::Flash_fwd_params)", "attention", "flash"),
    ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<>()", "attention", None),
    ("void pytorch_flash::flash_bwd_dot_do_o_kernel<true, >()", "attention", None),
    ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<>>>()", "attention", "flash"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1", "attention", "cudnn"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x128_1x1x1", "attention", None),
    ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80(PyTorchMemEffAttention::Params)", "attention", "efficient"),
    ("fmha_cutlassB_bf16_aligned_128x128_k128_sm80(PyTorchMemEffAttention::Params)", "attention", None),
    # Inductor's names list the operators around a kernel.
    ("triton_poi_fused__scaled_dot_product_flash_attention_add_mul_permute_stack_3", "triton", None),
    ("triton_red_fused__to_copy_mm_mul_sum_12", "triton", None),
    ("norm_modulate_forward", "fused", None),
    ("tail_backward", "fused", None),
    ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "matmuls", None),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_cublas", "matmuls", None),
    ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8>()", "matmuls", None),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>()", "matmuls", None),
    ("void gemv2T_kernel_val<int, int, __nv_bfloat16>()", "matmuls", None),
    ("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "collectives", None),
    ("Memcpy HtoD (Pinned -> Device)", "copies", None),
    ("Memset (Device)", "copies", None),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>()", "others", None),
    ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float>>()", "others", None),
]


@pytest.mark.parametrize(("name", "what", "attention"), NAMES, ids=[name[:60] for name, *_ in NAMES])
def test_a_gpus_kernels_are_known_by_their_names(name: str, what: str, attention: str | None) -> None:
    assert (kind(name), forward(name)) == (what, attention)


def test_a_step_of_a_gpu_by_hand() -> None:
    """A kernel says more than the operator that launched it; passes are forward kernels, of two sorts here."""
    operators = ["aten::_scaled_dot_product_flash_attention"] * 3 + ["aten::mm"] * 9
    operators += [
        f"{REGION}0/0",
        f"{REGION}0/0",
        f"{REGION}0/1",
        f"{REGION}1/0",
        "megapix::tail",
        "megapix::tail_backward",
    ]
    kernels = [NAMES[0][0]] * 3 + [NAMES[1][0]] * 2 + [NAMES[4][0]] + [NAMES[8][0]] * 4 + [NAMES[-1][0]]
    found = read(operators, kernels)
    assert found == Kernels({"flash": 3, "cudnn": 1}, 3, 2, {"attention": 6, "triton": 4, "others": 1})
    assert found.text() == (
        "attention flash x 3, cudnn x 1; 3 compiled graphs; fused pixel kernels x 2; "
        "11 launches: 6 attention, 4 triton, 1 others"
    )


def test_without_kernels_the_operators_say_it() -> None:
    """A driver may let no profiler see its kernels; and math within a graph has no name of its own."""
    assert read(["aten::_scaled_dot_product_cudnn_attention"], []).attention == {"cudnn": 1}
    inlined = read([f"{REGION}0/0"], [NAMES[9][0]])
    assert inlined.attention == {"math": 0}
    assert inlined.text() == "attention math; 1 compiled graph; plain pixel kernels; 1 launches: 1 triton"


@pytest.mark.parametrize(
    ("backend", "expected"),
    [(SDPBackend.FLASH_ATTENTION, {"flash for CPUs": 2}), (SDPBackend.MATH, {"math": 2})],
)
def test_what_this_cpu_runs(backend: SDPBackend, expected: dict[str, int]) -> None:
    q = torch.randn(2, 3, 5, 8, requires_grad=True)

    def step() -> None:
        with sdpa_kernel(backend):
            for _ in range(2):
                F.scaled_dot_product_attention(q, q, q).sum().backward()

    assert traced(step) == Kernels(expected, 0, 0, {})


def test_compiled_graphs_that_run_are_counted() -> None:
    """Two functions, one of them for two sizes; a third graph of the first, made before, does not run in the step."""
    torch.compiler.reset()
    functions: list[Callable[[torch.Tensor], torch.Tensor]] = [lambda x: (x * 2).sin(), lambda x: (x + 1).cos()]
    first, second = (torch.compile(function, backend="eager", dynamic=False) for function in functions)
    first(torch.ones(7))

    def step() -> None:
        for _ in range(2):
            first(torch.ones(3))
            first(torch.ones(5))
            second(torch.ones(3))

    assert traced(step).graphs == 3
    torch.compiler.reset()


def test_steps_of_engines_one_after_another() -> None:
    """The program asserts which kernels run, and that each engine is gone when the next is made."""
    succeed(1, "tests.programs.engines_in_turn", [])
