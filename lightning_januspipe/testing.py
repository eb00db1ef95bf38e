"""Prove that a module trains the same in a pipeline as in one process: for this project's tests and for users' own."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import random
import socket
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_januspipe.loader.microbatch import MicroBatches
from lightning_januspipe.loader.replica_balance import balance_replicas
from lightning_januspipe.loader.split import split_batches


@dataclass
class Record:
    """What a training run leaves to compare.

    Attributes:
        losses: loss of each optimizer step.
        gradients: gradients of each optimizer step, by parameter name; None where a parameter has none.
        parameters: trained parameters by name.
    """

    losses: list[float] = field(default_factory=list)
    gradients: list[dict[str, Tensor | None]] = field(default_factory=list)
    parameters: dict[str, Tensor] = field(default_factory=dict)


class RankError(AssertionError):
    """A function failed on one or more ranks; the message holds their tracebacks."""


class RankPool:
    """Processes on this machine that run functions as ranks of one job, over gloo on loopback.

    Starting Python and torch takes seconds, so one pool can run many jobs of different sizes.

    Args:
        size: number of processes.
        preload: modules that one more process imports, from which those of the pool are then forked; this saves the
            seconds whenever some are started, also after a failure. That process serves all pools that are given
            modules, and imports those of the first. Their import must not touch a GPU. None starts every process
            anew.

    Example:
        >>> with RankPool(2) as pool:
        ...     results = pool.run(function, "an argument")  # one result for each rank
    """

    def __init__(self, size: int, preload: Sequence[str] | None = None) -> None:
        self.size = size
        self._preload = preload
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(
        self, function: Callable[..., Any], *args: Any, world_size: int | None = None, timeout: float = 300.0
    ) -> list[Any]:
        """Call ``function(*args)`` on every rank of a job.

        Args:
            function: importable by name; torch.distributed's environment variables are set when it is called, and its
                process group is destroyed afterwards.
            args: picklable arguments.
            world_size: ranks of the job, by default all of the pool.
            timeout: seconds after which the pool's processes are killed.

        Returns:
            The results, by rank.

        Raises:
            RankError: a rank raised, died, or took too long.
        """
        num = world_size or self.size
        if not 1 <= num <= self.size:
            raise ValueError(f"world_size={num}, but the pool has {self.size} processes")
        self._start(num)
        with reserved_port() as port:
            for rank, pipe in enumerate(self._pipes[:num]):
                pipe.send((function, args, rank, num, port))
            return self._results(num, timeout)

    def _results(self, num: int, timeout: float) -> list[Any]:
        results: dict[int, tuple[bool, Any]] = {}
        pending = {self._pipes[r]: r for r in range(num)}
        while pending:
            ready = wait(list(pending), timeout)
            if not ready:
                self.close()
                raise RankError(f"ranks {sorted(pending.values())} did not finish within {timeout} s")
            for pipe in [p for p in pending if p in ready]:
                rank = pending.pop(pipe)
                try:
                    results[rank] = pipe.recv()
                except (EOFError, ConnectionResetError):
                    results[rank] = (False, f"rank {rank} died")
        failed = {r: text for r, (ok, text) in sorted(results.items()) if not ok}
        if failed:
            self.close()  # the processes' distributed state is unknown
            raise RankError("\n".join(f"rank {r}: {text}" for r, text in failed.items()))
        return [results[r][1] for r in range(num)]

    def close(self) -> None:
        """End the processes; the next job starts new ones."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []
        atexit.unregister(self.close)

    def _start(self, num: int) -> None:
        atexit.register(self.close)
        context: Any = multiprocessing.get_context("spawn" if self._preload is None else "forkserver")
        if self._preload is not None:
            context.set_forkserver_preload([__name__, *self._preload])
        while len(self._processes) < num:
            ours, theirs = context.Pipe()
            # Not daemonic: loaders with workers have to be able to start processes of their own.
            # How those start is as in this process, not as the pool's own.
            method = multiprocessing.get_start_method(allow_none=True)
            process = context.Process(target=_serve, args=(theirs, dict(os.environ), method))
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)


def _serve(pipe: Connection, environment: dict[str, str], start_method: str | None) -> None:
    os.environ.clear()  # a forked process has that of the one that it was forked from
    os.environ.update(environment)
    multiprocessing.set_start_method(start_method, force=True)
    np.random.seed()
    torch.set_num_threads(1)
    while True:
        try:
            function, args, rank, num, port = pipe.recv()
        except (EOFError, OSError):
            return
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            GROUP_RANK="0",
            WORLD_SIZE=str(num),
            LOCAL_WORLD_SIZE=str(num),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            TORCHELASTIC_RUN_ID="januspipe-testing",
        )
        dtype = torch.get_default_dtype()
        try:
            answer = (True, function(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        finally:
            torch.set_default_dtype(dtype)
            if torch.distributed.is_initialized():
                torch.distributed.destroy_process_group()
        pipe.send(answer)


@contextmanager
def reserved_port() -> Iterator[int]:
    """A free TCP port on loopback that nobody else is given in the block.

    It is below those that the system gives to who asks for any, and its UDP namesake is held, which is asked for first.
    """
    numbers = random.SystemRandom()
    while True:
        port = numbers.randrange(20_000, 32_000)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as guard, socket.socket() as probe:
            try:
                guard.bind(("127.0.0.1", port))
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the ranks' store has it
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            probe.close()
            yield port
            return


def assert_matches_single_process(
    module_factory: Callable[[], Any],
    datamodule_factory: Callable[[], Any],
    *,
    devices: int,
    strategy: dict[str, Any] | None = None,
    steps: int = 3,
    rtol: float = 1e-9,
    trainer: dict[str, Any] | None = None,
    pool: RankPool | None = None,
) -> None:
    """Train in a pipeline and in one process, and compare losses, gradients and parameters of every step.

    The reference is the undivided module under a plain Trainer, differentiating the mean loss of the same micro-batches
    of all replicas. Use a float64 module: in float32 the two differ by rounding.

    Args:
        module_factory: importable function that makes the LightningModule, the same at every call (seed it).
        datamodule_factory: importable function that makes a LightningDataModule.
        devices: number of processes.
        strategy: arguments of :class:`~lightning_januspipe.JanusPipeStrategy`.
        steps: optimizer steps.
        rtol: largest difference, relative to the largest entry of the same tensor.
        trainer: further arguments of both Trainers, for example ``{"gradient_clip_val": 1.0}``.
        pool: processes to use; by default new ones.

    Raises:
        AssertionError: something differs; the message names it.

    Example:
        >>> assert_matches_single_process(make_module, make_data, devices=2, strategy={"num_microbatches": 4})
    """
    own = pool or RankPool(devices)
    arguments = (module_factory, datamodule_factory, strategy or {}, steps, trainer or {})
    try:
        ranks = own.run(train_in_pipeline, *arguments, world_size=devices)
        (reference,) = own.run(train_undivided, *arguments, devices, world_size=1)
    finally:
        if pool is None:
            own.close()
    compare_records(reference, ranks, rtol)


def compare_records(reference: Record, ranks: Sequence[Record], rtol: float) -> None:
    """Compare the records of all ranks with that of one process.

    Args:
        reference: of the undivided module.
        ranks: of every rank; gradients only of the parameters that it trains.
        rtol: largest difference, relative to the largest entry of the same tensor.

    Raises:
        AssertionError: something differs.
    """
    assert reference.losses, "the reference made no step"
    for rank, record in enumerate(ranks):
        assert len(record.losses) == len(reference.losses), f"rank {rank} made {len(record.losses)} steps"
        for step, (a, b) in enumerate(zip(reference.losses, record.losses, strict=True)):
            assert abs(a - b) <= rtol * abs(a), f"rank {rank}: the loss of step {step} is {b!r} instead of {a!r}"
    for step, expected_gradients in enumerate(reference.gradients):
        seen: set[str] = set()
        for rank, record in enumerate(ranks):
            for name, found in record.gradients[step].items():
                expected_gradient = expected_gradients[name]
                what = f"rank {rank}: the gradient of {name} in step {step}"
                assert (found is None) == (expected_gradient is None), f"{what} is {found}, not {expected_gradient}"
                if found is not None and expected_gradient is not None:
                    _assert_close(what, expected_gradient, found, rtol)
                seen.add(name)
        missing = set(expected_gradients) - seen
        assert not missing, f"no rank trains {sorted(missing)}"
    for rank, record in enumerate(ranks):
        for name, expected in reference.parameters.items():
            _assert_close(f"rank {rank}: parameter {name}", expected, record.parameters[name], rtol)


def _assert_close(what: str, expected: Tensor, found: Tensor, rtol: float) -> None:
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    error = float((expected - found).abs().max()) if expected.numel() else 0.0
    # Entries that vanish by symmetry are rounding noise on both sides.
    assert error <= rtol * scale + 1e-14, f"{what} differs by {error:.3e} at a scale of {scale:.3e}"


def train_in_pipeline(
    module_factory: Callable[[], Any],
    datamodule_factory: Callable[[], Any],
    strategy: dict[str, Any],
    steps: int,
    trainer_arguments: dict[str, Any],
) -> Record:
    """One rank's part of a pipelined training run; run it in a :class:`RankPool`."""
    import lightning_januspipe

    module, data = module_factory(), datamodule_factory()
    bound = lightning_januspipe.strategy_class(_namespace(module))(**strategy)
    world = int(os.environ["WORLD_SIZE"])
    trainer = _trainer(module, steps, trainer_arguments, strategy=bound, devices=world)
    replica = bound.mesh_shape.coordinates(int(os.environ["RANK"]))[1]
    loader = _ordered_loader(_train_loader(data), bound.mesh_shape.data, replica)
    recorder = _recorder(module, lambda p: bound.runner.holds(p))
    trainer.callbacks.insert(0, recorder)
    trainer.fit(module, loader)
    recorder.record.parameters = {n: p.detach().cpu().clone() for n, p in module.named_parameters()}
    return recorder.record  # type: ignore[no-any-return]


def train_undivided(
    module_factory: Callable[[], Any],
    datamodule_factory: Callable[[], Any],
    strategy: dict[str, Any],
    steps: int,
    trainer_arguments: dict[str, Any],
    devices: int,
) -> Record:
    """The reference: one process, plain Trainer, the mean loss of all micro-batches of all replicas."""
    import lightning_januspipe

    module, data = module_factory(), datamodule_factory()
    bound = lightning_januspipe.strategy_class(_namespace(module))(**strategy)
    bound.parallel_devices = [torch.device("cpu")] * devices
    shape, num_microbatches = bound.mesh_shape, bound.num_microbatches()
    loaders = []
    for replica in range(shape.data):
        loader = _ordered_loader(_train_loader(data), shape.data, replica)
        loader = split_batches(loader, num_microbatches, required=False)
        balance = (strategy or {}).get("balance", "auto")
        if shape.data > 1 and balance != "microbatches":
            balance_replicas(
                loader,
                num_microbatches,
                shape.data,
                replica,
                required=balance == "replicas",
                tell=lambda known: known,
                is_teller=True,
            )
        loaders.append(loader)
    step = module.training_step

    def mean_step(batch: tuple[Any, ...], batch_idx: int) -> Tensor:
        replicas = [b.batches if isinstance(b, MicroBatches) else [b] for b in batch]
        outputs = [[step(m, batch_idx) for m in micro] for micro in replicas]
        means = [torch.stack([o["loss"] if isinstance(o, dict) else o for o in micro]).mean() for micro in outputs]
        return torch.stack(means).mean()

    module.training_step = mean_step
    module.log = lambda *_, **__: None
    trainer = _trainer(module, steps, trainer_arguments, strategy="auto", devices=1)
    recorder = _recorder(module, lambda p: True)
    trainer.callbacks.insert(0, recorder)
    trainer.fit(module, _Zipped(loaders))
    recorder.record.parameters = {n: p.detach().cpu().clone() for n, p in module.named_parameters()}
    return recorder.record  # type: ignore[no-any-return]


class _Zipped:
    """Loaders of all replicas, side by side."""

    def __init__(self, loaders: list[Any]) -> None:
        self._loaders = loaders

    def __iter__(self) -> Any:
        return zip(*self._loaders, strict=True)

    def __len__(self) -> int:
        return len(self._loaders[0])


def _train_loader(data: Any) -> Any:
    data.prepare_data()
    data.setup("fit")
    return data.train_dataloader()


def _ordered_loader(loader: Any, num_replicas: int, replica: int) -> Any:
    """A loader over the same dataset in its order, with one replica's share of the samples, without workers."""
    sampler: DistributedSampler[Any] = DistributedSampler(
        loader.dataset, num_replicas=num_replicas, rank=replica, shuffle=False
    )
    return DataLoader(loader.dataset, batch_size=loader.batch_size, sampler=sampler, collate_fn=loader.collate_fn)


def _namespace(module: Any) -> str:
    names = [c.__module__.split(".")[0] for c in type(module).__mro__]
    return "lightning" if "lightning" in names else "pytorch_lightning"


def _library(module: Any) -> Any:
    import importlib

    return importlib.import_module("lightning.pytorch" if _namespace(module) == "lightning" else "pytorch_lightning")


def _trainer(module: Any, steps: int, arguments: dict[str, Any], **fixed: Any) -> Any:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "max_steps": steps,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "use_distributed_sampler": False,
    }
    return _library(module).Trainer(**{**defaults, **arguments, **fixed})


def _recorder(module: Any, holds: Callable[[nn.Parameter], bool]) -> Any:
    class Recorder(_library(module).Callback):  # type: ignore[misc]
        """Keeps losses and the gradients that the optimizer sees."""

        def __init__(self) -> None:
            self.record = Record()

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.record.gradients.append(
                {
                    n: None if p.grad is None else p.grad.detach().cpu().clone()
                    for n, p in pl_module.named_parameters()
                    if p.requires_grad and holds(p)
                }
            )

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            loss = outputs["loss"] if isinstance(outputs, dict) else outputs
            self.record.losses.append(float(trainer.strategy.reduce(loss.detach().clone(), reduce_op="mean")))

    return Recorder()
