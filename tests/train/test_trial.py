"""Trial steps: the figures against arithmetic by hand, and that a trial is a step of training."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from minifoundation.config import RunConfig
from minifoundation.model.size import flops_per_token
from minifoundation.runtime import Machine
from minifoundation.train.breakdown import KINDS, kind_of
from minifoundation.train.plan import predicted_memory
from minifoundation.train.trial import trial

CPU = Machine(torch.device("cpu"), "CPU", 2**34, 1e9)
Make = Callable[..., RunConfig]


@pytest.mark.parametrize("masked", [False, True])
def test_the_figures_of_a_trial(settings: Make, masked: bool) -> None:
    config = settings(data={"mask_documents": masked}, train={"ema": 0.9})
    found = trial(config, CPU, steps=3, warm_up=2, profiled=True)
    assert found.tokens_per_step == 2 * 2 * 32 and len(found.seconds) == 3 and min(found.seconds) > 0
    median = sorted(found.seconds)[1]
    assert found.tokens_per_second == pytest.approx(128 / median)
    assert found.mfu == pytest.approx(128 * flops_per_token(config.model, 32) / median / 1e9)
    assert found.losses[0] == pytest.approx(math.log(512), abs=0.1), "random weights guess"
    assert found.losses[1] < found.losses[0] + 0.1 and found.graphs_after_warm_up == 0
    assert found.predicted == predicted_memory(config) and found.peak_bytes > 0
    assert found.breakdown is not None
    assert {"matrix products", "attention", "optimizer"} <= found.breakdown.milliseconds.keys()
    assert sum(found.breakdown.milliseconds.values()) < 60_000
    figures = found.figures()
    assert figures["tokens_per_second"] == round(found.tokens_per_second)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("nvjet_sm90_tst_192x192_64x3_2x1_v_bz_coopB_NNN", "matrix products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x64x64", "attention"),
        ("triton_tem_fused_flex_attention_0", "attention"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<at::native::(anonymous n", "optimizer"),
        ("triton_per_fused__to_copy__unsafe_view_add_div_expand_mul_pow_sum_4", "norms"),
        ("Memcpy HtoD (Pinned -> Device)", "data"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("_losses", "loss"),
        ("_gradients", "SwiGLU"),
        ("_rounded_gradients", "SwiGLU"),
        ("_norm_gradients", "norms"),
        ("_normed", "norms"),
        ("_rotate", "rotation"),
        ("_round", "rounding to 8 bits"),
        ("aten::mm", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("void at::native::something_nobody_named", "rest"),
    ],
)
def test_kinds_of_kernels_by_the_names_that_were_seen(kernel: str, kind: str) -> None:
    assert kind_of(kernel) == kind and (kind in KINDS or kind == "rest")
