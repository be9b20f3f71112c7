from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from minifoundation.model.attention import Backend, Chunks, attend, candidates, documents_for, keys_and_values, resolve, rows_for
from minifoundation.model.kernels import flash4, language
from minifoundation.model.rope import positions_within
from tests.model.part import Part


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return causal grouped-query attention from its formula, one query at a time."""
    _, T, H, h = q.shape
    share = H // k.shape[2]
    out = torch.zeros_like(q)
    for head in range(H):
        for t in range(T):
            scores = (k[:, : t + 1, head // share] * q[:, t, None, head]).sum(-1) / math.sqrt(h)
            out[:, t, head] = (scores.softmax(-1)[..., None] * v[:, : t + 1, head // share]).sum(1)
    return out


@pytest.mark.parametrize("kernel", ["auto", "math"])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_values_and_gradients_are_those_of_the_formula(kernel: Backend, heads: int, kv_heads: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 9, heads, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 9, kv_heads, 8, dtype=torch.float64, requires_grad=True) for _ in "kv")
    out, expected = attend(q, k, v, kernel), written_out(q, k, v)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    torch.testing.assert_close(
        torch.autograd.grad((out * weight).sum(), (q, k, v)), torch.autograd.grad((expected * weight).sum(), (q, k, v))
    )


@pytest.mark.filterwarnings("default:flex_attention called without torch.compile")  # which is what makes it the oracle of its kernel
@pytest.mark.parametrize("length", [9, 130])  # within a block of FlexAttention, and beyond one
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2)])
def test_flex_is_attention(length: int, heads: int, kv_heads: int) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, n, 16) for n in (heads, kv_heads, kv_heads))
    torch.testing.assert_close(attend(q, k, v, "flex", rows_for("flex", q[..., 0, 0])), attend(q, k, v, "math"))
    torch.testing.assert_close(attend(q, k, v, "flex"), attend(q, k, v, "math"))
    ends = [0, 3, length, length + 1, 2 * length - 2, 2 * length]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32)
    positions = positions_within(cu_seqlens, 2, length)
    found, expected = (attend(q, k, v, kernel, documents_for(kernel, cu_seqlens, positions, q.dtype)) for kernel in ("flex", "math"))
    torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("default")  # torch's own, while it compiles
def test_flex_within_documents_is_compiled_once_for_any_documents() -> None:
    """Traced alone, forward: the kernel itself, and its gradients, need a GPU."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    compiled = torch.compile(attend, dynamic=False, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 40, n, 16) for n in (4, 2, 2))
    for ends in ([0, 40, 80], [0, 7, 40, 51, 80], [*range(0, 81, 2)]):
        cu_seqlens = torch.tensor(ends, dtype=torch.int32)
        positions = positions_within(cu_seqlens, 2, 40)
        out = compiled(q, k, v, "flex", documents_for("flex", cu_seqlens, positions, q.dtype))
        torch.testing.assert_close(out, attend(q, k, v, "math", documents_for("math", cu_seqlens, positions, q.dtype)))
    assert counters["stats"]["unique_graphs"] == 1


BF16, FP32 = torch.bfloat16, torch.float32
A100, H100, B200, T4 = (8, 0), (9, 0), (10, 0), (7, 5)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "capability", "masked", "expected"),
    [
        (BF16, 64, H100, False, ["flash4", "cudnn", "flash", "flex", "efficient", "math"]),
        (BF16, 64, A100, False, ["flash", "cudnn", "flex", "efficient", "math"]),
        (BF16, 96, A100, False, ["flash", "cudnn", "efficient", "math"]),
        (BF16, 64, T4, False, ["efficient", "math"]),
        (FP32, 64, H100, False, ["efficient", "math"]),
        (BF16, 64, A100, True, ["flash", "flex", "math"]),
        (FP32, 64, A100, True, ["math"]),
    ],
)
def test_candidates(
    dtype: torch.dtype, head_dim: int, capability: tuple[int, int], masked: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash4, "INSTALLED", True)
    monkeypatch.setattr(language, "INSTALLED", True)
    found = candidates("cuda", dtype=dtype, head_dim=head_dim, capability=capability, masked=masked)
    assert list(found) == expected
    assert found[0] == resolve("auto", "cuda", dtype=dtype, head_dim=head_dim, capability=capability, masked=masked)[0]


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "head_dim", "capability", "kernel", "reason"),
    [
        ("auto", "cpu", BF16, 64, (0, 0), "auto", None),
        ("math", "cpu", BF16, 64, (0, 0), "math", None),
        ("flash", "cpu", BF16, 64, (0, 0), "auto", "flash needs a CUDA GPU and this is cpu; using torch's own choice"),
        ("auto", "cuda", BF16, 64, (9, 0), "cudnn", None),
        ("auto", "cuda", BF16, 64, (8, 0), "flash", None),
        ("auto", "cuda", BF16, 64, (7, 5), "efficient", None),
        ("auto", "cuda", FP32, 64, (9, 0), "efficient", None),
        ("auto", "cuda", torch.float64, 64, (9, 0), "math", None),
        ("auto", "cuda", BF16, 256, (9, 0), "flash", None),
        ("auto", "cuda", BF16, 12, (9, 0), "math", None),
        ("math", "cuda", BF16, 64, (9, 0), "math", None),
        ("flash", "cuda", BF16, 64, (9, 0), "flash", None),
        ("efficient", "cuda", FP32, 64, (9, 0), "efficient", None),
        ("flash", "cuda", FP32, 64, (9, 0), "efficient", "flash needs bf16 or fp16, not torch.float32; using efficient"),
        ("cudnn", "cuda", BF16, 64, (7, 5), "efficient", "cudnn needs compute capability 8.0, not 7.5; using efficient"),
        ("flash4", "cpu", BF16, 64, (0, 0), "auto", "flash4 needs a CUDA GPU and this is cpu; using torch's own choice"),
        ("flash4", "cuda", BF16, 64, (9, 0), "cudnn", "flash4 needs the package flash-attn-4; using cudnn"),
        ("flex", "cpu", BF16, 64, (0, 0), "auto", "flex needs a CUDA GPU and this is cpu; using torch's own choice"),
        ("flex", "cuda", BF16, 64, (8, 0), "flash", "flex needs Triton; using flash"),
        ("flash", "cuda", BF16, 20, (9, 0), "math", "flash needs a head width that is a multiple of 8 up to 256, not 20; using math"),
    ],
)
def test_resolve(
    backend: Backend,
    device: str,
    dtype: torch.dtype,
    head_dim: int,
    capability: tuple[int, int],
    kernel: str,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flash4, "INSTALLED", False)
    monkeypatch.setattr(language, "INSTALLED", False)
    assert resolve(backend, device, dtype=dtype, head_dim=head_dim, capability=capability) == (kernel, reason)


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "head_dim", "capability", "kernel", "reason"),
    [
        ("auto", "cpu", BF16, 64, (0, 0), "auto", None),
        ("auto", "cuda", BF16, 64, (9, 0), "flash", None),
        ("auto", "cuda", FP32, 64, (9, 0), "math", None),
        ("auto", "cuda", BF16, 64, (7, 5), "math", None),
        ("math", "cuda", BF16, 64, (9, 0), "math", None),
        ("cudnn", "cuda", BF16, 64, (9, 0), "flash", "cudnn cannot stay within documents; using flash"),
        ("efficient", "cuda", FP32, 64, (9, 0), "math", "efficient cannot stay within documents; using math"),
    ],
)
def test_resolve_within_documents(
    backend: Backend, device: str, dtype: torch.dtype, head_dim: int, capability: tuple[int, int], kernel: str, reason: str | None
) -> None:
    assert resolve(backend, device, dtype=dtype, head_dim=head_dim, capability=capability, masked=True) == (kernel, reason)


@pytest.mark.parametrize(
    ("backend", "dtype", "head_dim", "capability", "masked", "kernel", "reason"),
    [
        ("auto", BF16, 64, (9, 0), False, "flash4", None),
        ("auto", torch.float16, 128, (10, 0), False, "flash4", None),
        ("flash4", BF16, 64, (9, 0), False, "flash4", None),
        ("cudnn", BF16, 64, (9, 0), False, "cudnn", None),
        ("auto", BF16, 64, (8, 0), False, "flash", None),
        ("auto", BF16, 64, (12, 0), False, "cudnn", None),
        ("auto", BF16, 192, (9, 0), False, "flash", None),
        ("auto", BF16, 64, (9, 0), True, "flash", None),
        ("flash4", BF16, 64, (8, 0), False, "flash", "flash4 needs compute capability 9.x or 10.x, not 8.0; using flash"),
        ("flash4", FP32, 64, (9, 0), False, "efficient", "flash4 needs bf16 or fp16, not torch.float32; using efficient"),
        ("flash4", BF16, 64, (9, 0), True, "flash", "flash4 cannot stay within documents; using flash"),
        ("flash4", BF16, 192, (9, 0), False, "flash", "flash4 needs a head width that is a multiple of 8 up to 128, not 192; using flash"),
    ],
)
def test_resolve_where_flash_attention_4_is_installed(
    backend: Backend,
    dtype: torch.dtype,
    head_dim: int,
    capability: tuple[int, int],
    masked: bool,
    kernel: str,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flash4, "INSTALLED", True)
    assert resolve(backend, "cuda", dtype=dtype, head_dim=head_dim, capability=capability, masked=masked) == (kernel, reason)


@pytest.mark.filterwarnings("default:flex_attention called without torch.compile")
@pytest.mark.parametrize("documents", [(), (5, 24, 31, 47)])
@pytest.mark.parametrize("kernel", ["auto", "math", "flex"])
def test_chunks_of_rows_are_as_in_whole_rows(kernel: Backend, documents: tuple[int, ...]) -> None:
    """Outputs, and gradients summed over the parts; against the plain formula, of documents one by one."""
    B, T, size = 2, 24, 3
    torch.manual_seed(0)
    q = torch.randn(B, T, 4, 16, dtype=torch.float64)
    k, v = torch.randn(2, B, T, 2, 16, dtype=torch.float64)
    inputs = [x.requires_grad_(kernel != "flex") for x in (q, k, v)]  # uncompiled, flex has no gradients
    cu_seqlens = torch.tensor(sorted({0, *documents, T, B * T}), dtype=torch.int32)
    flat = [x.flatten(0, 1)[None] for x in (q, k, v)]
    expected = torch.cat([written_out(*(x[:, a:b] for x in flat)) for a, b in itertools.pairwise(cu_seqlens.tolist())], 1).view_as(q)
    out = torch.zeros_like(q)
    for rank in range(size):
        part = Part(rank, size)
        places = torch.cat([torch.arange(first, end) for first, end in part.chunks(T)])
        mask = (
            documents_for(kernel, cu_seqlens, positions_within(cu_seqlens, B, T), q.dtype, part)
            if documents
            else rows_for(kernel, torch.empty(B, T // size), part)
        )
        out = out.index_add(1, places, attend(q[:, places], *keys_and_values(k, v, mask), kernel, mask))
    torch.testing.assert_close(out, expected)
    if kernel != "flex":
        weight = torch.randn_like(out)
        found, wanted = (torch.autograd.grad((x * weight).sum(), inputs) for x in (out, expected))
        torch.testing.assert_close(found, wanted)


def test_offsets_of_a_chunk_are_those_of_its_documents() -> None:
    """What FlashAttention's variable-length form is told, carried out by the formula: queries are the last of their document's keys."""
    B, T, size = 2, 24, 2
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, T, n, 8, dtype=torch.float64) for n in (4, 2, 2))
    cu_seqlens = torch.tensor([0, 3, 6, 7, 20, 24, 30, 47, 48], dtype=torch.int32)
    positions = positions_within(cu_seqlens, B, T)
    whole = attend(q, k, v, "math", documents_for("math", cu_seqlens, positions, q.dtype))
    for rank in range(size):
        mask = documents_for("flash", cu_seqlens, positions, q.dtype, Part(rank, size))
        assert isinstance(mask, Chunks)
        for first, end, offsets in mask.chunks:
            assert isinstance(offsets, Tensor) and offsets.dtype == torch.int32
            queries, keys = q[:, first:end].flatten(0, 1)[None], [x[:, :end].flatten(0, 1)[None] for x in (k, v)]
            found = []
            for (a, b), (c, d) in zip(*(itertools.pairwise(row.tolist()) for row in offsets), strict=True):
                assert b - a <= d - c
                if b > a:
                    padded = torch.cat((torch.zeros_like(queries[:, : d - c - (b - a)]), queries[:, a:b]), 1)
                    found.append(written_out(padded, *(x[:, c:d] for x in keys))[:, -(b - a) :])
            assert offsets[:, -1].tolist() == [B * (end - first), B * end]
            torch.testing.assert_close(torch.cat(found, 1)[0], whole[:, first:end].flatten(0, 1))


def test_gradients_summed_over_parts_in_half_precision_are_as_exact_as_of_whole_rows() -> None:
    """Each part rounds what it adds to the gradient of a key or a value: it has to add up to no more than what one kernel rounds."""
    T = 256
    torch.manual_seed(0)
    q, k, v, weight = (torch.randn(1, T, n, 64, dtype=torch.float64) for n in (4, 1, 1, 4))

    def gradients(dtype: torch.dtype, size: int) -> list[Tensor]:
        inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        total: list[Tensor] = [torch.zeros_like(x) for x in inputs]
        for part in (Part(rank, size) for rank in range(size)):
            places = torch.cat([torch.arange(first, end) for first, end in part.chunks(T)])
            mask = rows_for("auto", torch.empty(1, T // size), part)
            out = attend(inputs[0][:, places], inputs[1], inputs[2], "auto", mask)
            parts = torch.autograd.grad((out * weight[:, places].to(dtype)).sum(), inputs)
            total = [one + more for one, more in zip(total, parts, strict=True)]
        return total

    exact = gradients(torch.float64, 1)
    one, eight = ([float((g - e).norm() / e.norm()) for g, e in zip(gradients(BF16, size), exact, strict=True)] for size in (1, 8))
    assert all(several < 1.25 * alone for several, alone in zip(eight, one, strict=True)), (one, eight)
