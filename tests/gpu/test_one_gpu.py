"""One GPU: every activation and precision, eager and compiled, and two ranks of a pipeline that share the GPU."""

from __future__ import annotations

from typing import Any

import lightning
import pytest
import tiny
import torch
from gpu_workers import SharedGPU
from lightning.pytorch.plugins import MixedPrecision
from parity_check import check_parity
from torch import Tensor

from lightning_januspipe.data import EMTDataModule
from lightning_januspipe.engine.host_memory import KeptStorage
from lightning_januspipe.testing import RankPool, quiet_trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU that torch can use"),
]

EAGER, COMPILED = ("keep", "offload", "recompute"), ("keep", "pointwise", "offload", "recompute")
KINDS = [
    *({"activation": activation} for activation in EAGER),
    *({"activation": activation, "compile": True} for activation in COMPILED),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_activations(pool: RankPool, kind: dict[str, Any]) -> None:
    check_parity(pool, 1, trainer={"accelerator": "gpu"}, num_microbatches=2, **kind)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_two_ranks_of_a_pipeline_on_one_gpu(pool: RankPool, kind: dict[str, Any]) -> None:
    """NCCL refuses two ranks on one GPU, so that messages go through the host."""
    trainer = {"accelerator": SharedGPU()}
    check_parity(pool, 2, trainer=trainer, num_microbatches=4, process_group_backend="gloo", **kind)


@pytest.mark.parametrize("kind", [{}, {"compile": True}], ids=["eager", "compiled"])
@pytest.mark.parametrize(
    ("precision", "matmul", "tolerance"),
    [
        ("32-true", "highest", 1e-5),
        ("32-true", "high", 1e-2),  # TF32
        ("bf16-mixed", "highest", 0.05),
        ("16-mixed", "highest", 0.05),
    ],
)
def test_precisions(kind: dict[str, Any], precision: str, matmul: str, tolerance: float) -> None:
    """The first step's gradients are those of plain Lightning, to a few units of rounding."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul)
    try:
        expected, found = first_gradients(None, precision), first_gradients(kind, precision)
    finally:
        torch.set_float32_matmul_precision(before)
    scale = max(float(g.abs().max()) for g in expected.values())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float((found[name] - gradient).abs().max()) <= tolerance * scale, name


def first_gradients(strategy: dict[str, Any] | None, precision: str) -> dict[str, Tensor]:
    """Returns the gradients of the first optimizer step; scalers begin with a small scale, so that none is infinite."""
    module = tiny.module().float()
    torch.set_default_dtype(torch.float32)
    found: dict[str, Tensor] = {}

    class Keep(lightning.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, *_: Any) -> None:
            found.update({n: p.grad.double().cpu() for n, p in module.named_parameters() if p.grad is not None})

    data = EMTDataModule(num_train=8, num_val=4, sizes=(4, 8, 16), dtype="float32", batch_size=8, shuffle=False)
    arguments: dict[str, Any] = {"max_steps": 1, "limit_val_batches": 0, "callbacks": [Keep()]}
    if precision == "16-mixed":
        scaler = torch.amp.GradScaler("cuda", init_scale=16.0)
        arguments["plugins"] = [MixedPrecision("16-mixed", "cuda", scaler)]
    else:
        arguments["precision"] = precision
    quiet_trainer(strategy, accelerator="gpu", **arguments).fit(module, data)
    return found


def test_values_are_in_pinned_memory_and_leave_the_gpu() -> None:
    value = torch.arange(1 << 20, device="cuda", dtype=torch.float32)
    kept = KeptStorage(value.untyped_storage())
    expected, allocated = value.cpu(), torch.cuda.memory_allocated()
    del value
    kept.to_host()
    torch.cuda.synchronize()
    assert kept.on_host is not None and kept.on_host.is_pinned()
    assert torch.cuda.memory_allocated() <= allocated - expected.nbytes
    kept.fetch()
    kept.on_device_now()
    assert kept.on_device is not None and torch.equal(kept.on_device.view(torch.float32).cpu(), expected)
