"""What only a GPU can show: kernels against float64, compiled bf16 training against fp32 on the CPU, 8-bit moments."""

from __future__ import annotations

import json
from itertools import accumulate, pairwise, product
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F

from minifoundation import cli, config, runtime
from minifoundation.checkpoint import load_checkpoint
from minifoundation.config import ModelConfig, RunConfig, TrainConfig
from minifoundation.data.batch import Batch
from minifoundation.distributed import World
from minifoundation.errors import Stopped
from minifoundation.model.attention import Backend, attend, documents_for, resolve, rows_for
from minifoundation.model.loss import token_losses
from minifoundation.model.matrix import weight_gradient
from minifoundation.model.rope import positions_within
from minifoundation.model.size import memory_bytes
from minifoundation.model.training import TrainingModel
from minifoundation.model.transformer import Transformer
from minifoundation.train import loop, step
from minifoundation.train.finder import steps_fit, with_batch_size
from minifoundation.train.kernels import milliseconds, usable_kernels
from minifoundation.train.optimizer import adamw
from minifoundation.train.run import run
from minifoundation.train.step import train_step
from minifoundation.train.trial import trial
from tests.model.part import Part

# Triton, torch.compile and flash-attn-4 warn about themselves, each version differently; a GPU's tests are about numbers.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
SMALL: dict[str, Any] = {
    "vocab_size": 1024,
    "d_model": 256,
    "n_layer": 2,
    "n_head": 4,
    "n_kv_head": 2,
    "d_ff": 512,
    "original_seq_len": 256,
}


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).detach().norm() / b.detach().double().norm())


@pytest.mark.parametrize("backend", [b for b in get_args(Backend) if b != "math"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_kernel_is_attention(backend: Backend, dtype: torch.dtype) -> None:
    kernel, warning = resolve(backend, "cuda", dtype=dtype, head_dim=64, capability=torch.cuda.get_device_capability())
    if warning:
        pytest.skip(warning)
    q, k, v = (torch.randn(2, 300, heads, 64, device="cuda", dtype=dtype, requires_grad=True) for heads in (6, 2, 2))
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    weight = torch.randn(2, 300, 6, 64, device="cuda")
    out = attend(q, k, v, kernel)
    (out * weight).sum().backward()
    scores = torch.einsum("bqhd,bkhd->bhqk", exact[0], exact[1].repeat_interleave(3, 2)) / 8
    scores = scores.masked_fill(torch.ones(300, 300, device="cuda").triu(1).bool(), float("-inf"))
    reference = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), exact[2].repeat_interleave(3, 2))
    (reference * weight).sum().backward()
    assert relative(out, reference) < 1e-2
    for ours, theirs in zip((q, k, v), exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None and relative(ours.grad, theirs.grad) < 1e-2


@pytest.mark.parametrize("kernel", ["flash", "flex", "math"])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("lengths", [[300, 300], [1, 299, 130, 2, 1, 167], [2] * 300], ids=["rows", "few", "many"])
def test_attention_within_documents_is_that_of_the_documents_apart(kernel: Backend, heads: tuple[int, int], lengths: list[int]) -> None:
    """Two rows against each document alone in float64; keys and values are slices of a wider tensor, as in the model."""
    many, few = heads
    q = torch.randn(2, 300, many, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    kv = torch.randn(2, 300, 2 * few, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    exact = [x.detach().double().requires_grad_() for x in (q, kv)]
    weight = torch.randn(2, 300, many, 64, device="cuda")
    ends = [0, *accumulate(lengths)]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device="cuda")
    documents = documents_for(kernel, cu_seqlens, positions_within(cu_seqlens, 2, 300), q.dtype)
    k, v = kv.split(few, dim=2)
    out = attend(q, k, v, kernel, documents)
    (out * weight).sum().backward()
    exact_q, exact_k, exact_v = (x.flatten(0, 1)[None] for x in (exact[0], *exact[1].split(few, dim=2)))
    parts = [attend(exact_q[:, a:b], exact_k[:, a:b], exact_v[:, a:b], "math") for a, b in pairwise(ends)]
    reference = torch.cat(parts, dim=1).view_as(weight)
    (reference * weight).sum().backward()
    assert relative(out, reference) < 1e-2
    for ours, theirs in zip((q, kv), exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None and relative(ours.grad, theirs.grad) < 1e-2


@pytest.mark.parametrize("lengths", [[300, 300], [1, 299, 130, 2, 1, 167], [2] * 300], ids=["rows", "few", "many"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kernel", [b for b in get_args(Backend) if b != "auto"])
def test_chunks_of_rows_are_as_in_whole_rows(kernel: Backend, masked: bool, lengths: list[int]) -> None:
    """As three processes read two rows together, one after the other: outputs, and gradients summed over them, against float64."""
    if not masked and lengths != [300, 300]:
        pytest.skip("rows have no documents")
    dtype = torch.float32 if kernel == "efficient" else torch.bfloat16
    capability = torch.cuda.get_device_capability()
    warning = resolve(kernel, "cuda", dtype=dtype, head_dim=64, capability=capability, masked=masked, chunked=True)[1]
    if warning:
        pytest.skip(warning)
    q = torch.randn(2, 300, 6, 64, device="cuda", dtype=dtype, requires_grad=True)
    kv = torch.randn(2, 300, 4, 64, device="cuda", dtype=dtype, requires_grad=True)
    exact = [x.detach().double().requires_grad_() for x in (q, kv)]
    weight = torch.randn(2, 300, 6, 64, device="cuda")
    ends = [0, *accumulate(lengths)]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device="cuda")
    k, v = kv.split(2, dim=2)
    out = torch.zeros_like(q)
    for part in (Part(rank, 3) for rank in range(3)):
        places = torch.cat([torch.arange(first, end, device="cuda") for first, end in part.chunks(300)])
        whole = documents_for(kernel, cu_seqlens, positions_within(cu_seqlens, 2, 300), dtype, part)
        mask = whole if masked else rows_for(kernel, torch.empty(2, 100, device="cuda"), part)
        out = out.index_add(1, places, attend(q[:, places], k, v, kernel, mask))
    (out * weight).sum().backward()
    exact_q, exact_k, exact_v = (x.flatten(0, 1)[None] for x in (exact[0], *exact[1].split(2, dim=2)))
    parts = [attend(exact_q[:, a:b], exact_k[:, a:b], exact_v[:, a:b], "math") for a, b in pairwise(ends)]
    reference = torch.cat(parts, dim=1).view_as(weight)
    (reference * weight).sum().backward()
    assert relative(out, reference) < 1e-2
    for ours, theirs in zip((q, kv), exact, strict=True):
        assert ours.grad is not None and theirs.grad is not None and relative(ours.grad, theirs.grad) < 1e-2


def test_every_kernel_that_can_run_is_timed_at_the_shape_of_the_run() -> None:
    for masked in (False, True):
        settings, machine = run_config(Path("unused"), data={"mask_documents": masked}), runtime.machine()
        usable = usable_kernels(settings, machine)
        assert {"flash", "flex", "math"} <= set(usable)
        assert all(0 < ms < 1000 for ms in milliseconds(usable, settings, machine).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_loss_and_its_gradients_in_half_precision(dtype: torch.dtype) -> None:
    hidden = torch.randn(1000, 128, device="cuda", dtype=dtype, requires_grad=True)
    head = (torch.randn(5000, 128, device="cuda") * 0.1).requires_grad_()
    targets = torch.randint(5000, (1000,), device="cuda")
    sums = token_losses(hidden, head, targets, z_loss=1e-3, chunk=384)
    sums.total.backward()  # not divided by the tokens: in fp16 the scaler keeps gradients in range
    h, w = hidden.detach().double().requires_grad_(), head.detach().double().requires_grad_()
    logits = h @ w.T
    total = F.cross_entropy(logits, targets, reduction="sum") + 1e-3 * logits.logsumexp(-1).square().sum()
    total.backward()
    assert float(sums.total) == pytest.approx(float(total), rel=2e-3)
    assert hidden.grad is not None and head.grad is not None and h.grad is not None and w.grad is not None
    assert relative(hidden.grad, h.grad) < 2e-2 and relative(head.grad, w.grad) < 2e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_multiplies_a_gradient_is_not_rounded_to_half_precision(dtype: torch.dtype) -> None:
    """1/3 is 0.2% more in bf16."""
    hidden, targets = torch.randn(1000, 128, device="cuda", dtype=dtype), torch.randint(5000, (1000,), device="cuda")
    head = torch.randn(5000, 128, device="cuda") * 0.1
    norms = []
    for part in (1, 3):
        leaf = hidden.clone().requires_grad_()
        (token_losses(leaf, head.clone().requires_grad_(), targets, z_loss=1e-3, chunk=384).total / part).backward()
        assert leaf.grad is not None
        norms.append(float(leaf.grad.double().norm()))
    assert norms[0] / norms[1] == pytest.approx(3, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_a_weight_is_not_rounded_to_half_precision(dtype: torch.dtype) -> None:
    x, d_out = (torch.randn(1000, width, device="cuda").to(dtype) for width in (96, 160))
    assert relative(weight_gradient(d_out, x), d_out.double().T @ x.double()) < 1e-5


@pytest.mark.parametrize("optimizer_states", ["fp32", "int8"])
def test_copies_follow_the_weights_through_steps(optimizer_states: str) -> None:
    """The optimizers change weights in kernels of their own, which autograd does not see."""
    if optimizer_states == "int8":
        pytest.importorskip("torchao")
    transformer = Transformer(ModelConfig.model_validate(SMALL), dtype=torch.bfloat16)
    transformer.initialise(0)
    transformer.cuda()
    optimizer = adamw(
        dict(transformer.named_parameters()), TrainConfig.model_validate({"tokens": 1, "lr": 0.1, "optimizer_states": optimizer_states})
    )
    tokens = torch.arange(64, device="cuda")[None]
    for _ in range(2):
        transformer(tokens).sum().backward()
        optimizer.step()
    transformer(tokens)
    assert all(m.copy is not None and torch.equal(m.copy, m.weight.bfloat16()) for m in transformer.matrices)


def losses(
    device: str,
    dtype: torch.dtype,
    *,
    compile: bool,
    checkpointing: str = "none",
    states: str = "fp32",
    masked: bool = False,
    steps: int = 30,
    **changes: Any,
) -> list[float]:
    transformer = Transformer(ModelConfig.model_validate({**SMALL, "checkpointing": checkpointing, **changes}), dtype=dtype)
    transformer.initialise(0)
    transformer.to(device)
    model = TrainingModel(transformer, z_loss=1e-4, chunk=512)
    if compile:
        torch._dynamo.reset()
        transformer.compile_blocks()
    optimizer = adamw(dict(transformer.named_parameters()), TrainConfig.model_validate({"tokens": 1, "optimizer_states": states}))
    scaler = torch.amp.GradScaler(device, enabled=dtype == torch.float16)
    found = []
    for seed in range(steps):
        rows = torch.randint(100, (4, 257), generator=torch.Generator().manual_seed(seed))
        micro = [Batch.of_rows(part.numpy(), mask_documents=masked).to(torch.device(device)) for part in rows.chunk(2)]
        stats = train_step(model, optimizer, scaler, micro, lr=1e-3, grad_clip=1.0, tokens=1024, world=World())
        found.append(stats.read()[0])
    return found


def test_training_in_half_precision_follows_fp32_on_the_cpu() -> None:
    exact = losses("cpu", torch.float32, compile=False)
    assert exact[-1] < exact[0] - 1
    for dtype, compile, checkpointing in (
        (torch.float32, False, "none"),
        (torch.bfloat16, True, "none"),
        (torch.bfloat16, True, "attention"),
        (torch.bfloat16, True, "full"),
        (torch.bfloat16, False, "attention"),
        (torch.bfloat16, False, "offload"),
        (torch.float16, True, "none"),
    ):
        found = losses("cuda", dtype, compile=compile, checkpointing=checkpointing)
        # fp16 skips its first steps until the loss scale has come down
        assert found[-1] == pytest.approx(exact[-1], abs=0.15 if dtype == torch.float16 else 0.03), (dtype, compile, checkpointing)


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm": True},
        {"qk_norm": True, "head_dim": 128},
        {"head_dim": 32, "attention": "flex"},
        {"tie_embeddings": False},
        {"attention": "cudnn"},
        {"attention": "flex"},
        {"attention": "flash4"},
    ],
    ids=str,
)
def test_every_layout_of_the_model_trains_like_fp32_on_the_cpu(changes: dict[str, Any]) -> None:
    head_dim = changes.get("head_dim", 64)
    _, warning = resolve(changes.get("attention", "auto"), "cuda", head_dim=head_dim, capability=torch.cuda.get_device_capability())
    if warning:
        pytest.skip(warning)
    exact = losses("cpu", torch.float32, compile=False, **changes)
    for checkpointing in ("none", "attention", "offload"):
        found = losses("cuda", torch.bfloat16, compile=True, checkpointing=checkpointing, **changes)
        assert found[-1] == pytest.approx(exact[-1], abs=0.03), checkpointing


def test_a_compiled_block_keeps_what_the_prediction_counts() -> None:
    """Bytes alive after the forward of 16 blocks, less those of 8, against ``memory_bytes``; activations prevail in both."""
    sizes = {**SMALL, "d_model": 512, "n_head": 8, "d_ff": 1536}
    tokens, alive = torch.zeros(4, 1024, dtype=torch.int64, device="cuda"), []
    for n_layer in (8, 16):
        torch._dynamo.reset()
        with torch.device("cuda"):
            transformer = Transformer(ModelConfig.model_validate({**sizes, "n_layer": n_layer}), dtype=torch.bfloat16)
        transformer.cuda().compile_blocks()
        with torch.no_grad():
            for weight in transformer.parameters():
                weight.normal_(0, 0.02)
        transformer(tokens).sum().backward()  # compiles
        transformer.zero_grad()
        before = torch.cuda.memory_allocated()
        hidden = transformer(tokens)
        alive.append(torch.cuda.memory_allocated() - before)
        del hidden
    predicted = [
        memory_bytes(
            ModelConfig.model_validate({**sizes, "n_layer": n_layer}),
            batch_size=4,
            seq_len=1024,
            grad_accum=1,
            precision="bf16",
            optimizer_states="fp32",
            ema=False,
            loss_chunk=512,
        )["activations"]
        for n_layer in (8, 16)
    ]
    assert alive[1] - alive[0] == pytest.approx(predicted[1] - predicted[0], rel=0.05)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_selective_checkpointing_keeps_two_tensors_of_a_block(qk_norm: bool) -> None:
    """Its input and what attention mixed, with one factor and a logsumexp a head: whatever holds more shows in what is alive."""
    sizes = {**SMALL, "d_model": 512, "n_head": 8, "d_ff": 1536, "checkpointing": "attention", "qk_norm": qk_norm}
    tokens, alive = torch.zeros(4, 1024, dtype=torch.int64, device="cuda"), []
    for n_layer in (8, 16):
        with torch.device("cuda"):
            transformer = Transformer(ModelConfig.model_validate({**sizes, "n_layer": n_layer}), dtype=torch.bfloat16)
        transformer.cuda().initialise(0)
        transformer(tokens).sum().backward()
        transformer.zero_grad()
        before = torch.cuda.memory_allocated()
        hidden = transformer(tokens)
        alive.append(torch.cuda.memory_allocated() - before)
        del hidden
    assert alive[1] - alive[0] == pytest.approx(8 * tokens.numel() * (2 * (512 + 512) + 4 * (8 + 1)), rel=0.03)


def test_training_within_documents_follows_fp32_on_the_cpu_and_compiles_once() -> None:
    from torch._dynamo.utils import counters

    exact = losses("cpu", torch.float32, compile=False, masked=True)
    ways = ((False, "none"), (True, "none"), (True, "attention"), (True, "full"), (False, "attention"))
    for attention, (compile, checkpointing) in product(("flash", "flex"), ways):
        way: dict[str, Any] = {"compile": compile, "checkpointing": checkpointing, "attention": attention}
        counters.clear()
        losses("cuda", torch.bfloat16, masked=True, steps=3, **way)  # the rows of the third are a document each: flex has a mask for these
        graphs = counters["stats"]["unique_graphs"]
        counters.clear()
        found = losses("cuda", torch.bfloat16, masked=True, **way)
        assert found[-1] == pytest.approx(exact[-1], abs=0.03), way
        assert counters["stats"]["unique_graphs"] <= graphs, f"{way}: the number of documents differs from step to step, the graphs do not"


def test_8_bit_moments_train_and_come_back_from_a_checkpoint(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    exact = losses("cuda", torch.bfloat16, compile=False, steps=30)
    assert losses("cuda", torch.bfloat16, compile=False, states="int8", steps=30)[-1] == pytest.approx(exact[-1], abs=0.1)


def run_config(folder: Path, **sections: dict[str, Any]) -> RunConfig:
    """Return a run of twenty steps on verse in ``folder``."""
    text = Path(__file__).parents[2] / "examples" / "shakespeare.txt"
    values: dict[str, Any] = {
        "out_dir": str(folder / "run"),
        "model": SMALL,
        "tokenizer": {"vocab_size": 1024},
        "data": {"source": str(text), "shards_dir": str(folder / "shards"), "max_document_bytes": 4096, "held_out": 0.05},
        "train": {"tokens": 256 * 4 * 20, "seq_len": 256, "batch_size": 4, "precision": "bf16", "save_every": 10},
    }
    return config.build(RunConfig, config.merged(values, sections), "test")


def test_a_resumed_run_repeats_the_choice_of_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run(run_config(tmp_path), resume=None, dry_run=False)
    assert path is not None
    said = capsys.readouterr().err
    chosen = load_checkpoint(path).kernels["attention"]
    assert f"attention: {chosen}, " in said and "forward and backward of a block at 4 x 256" in said
    path.unlink()
    monkeypatch.setattr("minifoundation.train.kernels.milliseconds", lambda *_: pytest.fail("measured again"))
    path = run(run_config(tmp_path), resume="auto", dry_run=False)
    assert path is not None and load_checkpoint(path).kernels["attention"] == chosen
    assert f"attention: {chosen}, as in the checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_steady_steps_never_wait_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, masked: bool) -> None:
    """A whole run, of which steps 5 to 14 fail at anything that has Python wait for the GPU: step, feed and figures."""
    real, steps = step.train_step, 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps in (5, 15):
            torch.cuda.set_sync_debug_mode("error" if steps == 5 else "default")
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", counted)
    train = {"precision": precision, "save_every": 1000, "grad_accum": 2, "batch_size": 2}
    try:
        run(run_config(tmp_path, train=train, data={"mask_documents": masked}), resume=None, dry_run=False)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps == 20


def test_auto_goes_down_when_real_steps_run_out_of_memory(tmp_path: Path) -> None:
    """On a GPU that gives this process less than it says it has."""
    machine, said = runtime.machine(), list[str]()
    sizes = {"d_model": 512, "n_head": 8, "n_layer": 8, "d_ff": 1536, "original_seq_len": 1024}
    asked = run_config(tmp_path, model=sizes, train={"batch_size": "auto", "grad_accum": 64, "seq_len": 1024, "compile": True})
    torch.cuda.set_per_process_memory_fraction(3 * 2**30 / machine.memory_bytes)
    try:
        chosen = with_batch_size(asked, machine, lambda one: steps_fit(one, machine, World(), said.append))
        again = trial(chosen, machine, steps=1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        machine.forget()
    rows = chosen.train.batch_size
    assert isinstance(rows, int) and 1 <= rows < 64 and rows * chosen.train.grad_accum == 64
    assert said[0] == f"train.batch_size: 64 rows predicted to fit {machine.name} did not; trying fewer"
    assert again.peak_bytes < 3 * 2**30


def test_bench_measures_and_recommends(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    yaml, path = tmp_path / "small.yaml", tmp_path / "bench.json"
    yaml.write_text(
        json.dumps({"model": {**SMALL, "d_model": 1024, "n_head": 16, "n_kv_head": 4, "d_ff": 3072}, "train": {"seq_len": 256}}),
        encoding="utf-8",
    )
    assert cli.main(["bench", "--config", str(yaml), "--steps", "3", "--grad_accum", "32", "--json", str(path)]) == 0
    said, figures = capsys.readouterr().out, json.loads(path.read_text(encoding="utf-8"))
    assert figures["settings"]["recommended"] in said
    assert set(figures["settings"]["tried"]) == {"none", "attention", "full"}
    assert {"flash", "flex", "efficient", "math"} <= set(figures["attention_ms"])
    step = figures["step"]
    assert step["graphs_after_warm_up"] == 0 and step["batch_size"] * step["grad_accum"] == 32
    assert {"matrix products", "attention", "optimizer", "loss", "norms"} <= set(step["profile"]["ms"])
    assert 0.1 * step["ms_per_step"] < sum(step["profile"]["ms"].values()) < 1.1 * step["ms_per_step"]  # launches bind so small a model


def test_a_run_with_8_bit_moments_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchao")
    interrupted = run_config(tmp_path, train={"optimizer_states": "int8"})
    real, steps = step.train_step, 0

    def dies(*args: Any, **kwargs: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 15:
            raise Stopped("as if killed")
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", dies)
    with pytest.raises(Stopped):
        run(interrupted, resume=None, dry_run=False)
    monkeypatch.undo()
    path = run(interrupted, resume="auto", dry_run=False)
    assert path is not None and load_checkpoint(path).progress["step"] == 20


@pytest.mark.parametrize("head_dim", [None, 128])
def test_a_run_in_8_bits_follows_bf16(tmp_path: Path, head_dim: int | None) -> None:
    if obstacle := runtime.fp8_obstacle(runtime.machine()):
        pytest.skip(obstacle)
    bits = {}
    for precision in ("bf16", "fp8"):
        settings = run_config(tmp_path / precision, train={"precision": precision, "eval_every": 20}, model={"head_dim": head_dim})
        path = run(settings, resume=None, dry_run=False)
        assert path is not None
        found = load_checkpoint(path)
        bits[precision] = found.progress["held_out_bits_per_byte"]
        assert found.progress["skipped"] == []
    assert bits["fp8"] == pytest.approx(bits["bf16"], abs=0.05)
