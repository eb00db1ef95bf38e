"""Potentials with mixtures of experts, and what the ranks that share experts run in tests."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import checkpoint_workers
import torch
import torch.distributed as dist
from capture_models import DTYPE, Batch, Layer, Potential, make_batch
from graph_models import SIZES, Data, Module
from lightning.pytorch.callbacks import Callback
from matris_models import matris
from plain_modules import collate
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_januspipe import JanusPipeStrategy
from lightning_januspipe.expert_ranks import (
    RowExchange,
    bounds_of,
    plan_rows,
    return_rows,
    row_exchange,
    send_rows,
    step_plans,
)
from lightning_januspipe.expert_ranks.expert_costs import ExpertCosts, RowCost
from lightning_januspipe.expert_ranks.expert_placement import ExpertPlacement, Guest, Guests, best_guests
from lightning_januspipe.experts import ElementExperts, GroupedLinear, grouped_linear
from lightning_januspipe.runtime import build_pipeline, expert_times
from lightning_januspipe.runtime.chosen_state import ChosenState, choose_state
from lightning_januspipe.runtime.expert_shards import ExpertShards
from lightning_januspipe.runtime.optimizer_shards import OptimizerShards
from lightning_januspipe.strategy.whole_parameters import whole_parameters
from lightning_januspipe.testing import RunRecord, quiet_trainer, train_in_pipeline

NUM_EXPERTS = 5
FREE = RowCost(0, 0)


class _ExpertLayer(Layer):
    """Makes the messages by wide experts of the receiving atom, and updates atoms by narrow ones with biases."""

    def __init__(self, top_k: int, width: int, filter_network: nn.Module | None = None) -> None:
        super().__init__(width, filter_network)
        sizes = (3, NUM_EXPERTS, width, width, top_k)
        self.messages = ElementExperts(*sizes, hidden_features=9, bias=False).to(DTYPE)
        self.updates = ElementExperts(*sizes, has_shared=True).to(DTYPE)

    def mixed(self, h: Tensor, radial: Tensor, edges: Tensor, species: Tensor) -> Tensor:
        messages = self.messages(h[edges[0]] * self.filter(radial), species[edges[1]])
        return h + self.updates(self.aggregate(h, edges[1], messages), species)


class Experts(Potential):
    """A potential with two mixtures of experts in each layer."""

    def __init__(self, top_k: int, num_layers: int = 2) -> None:
        self.layer: Any = partial(_ExpertLayer, top_k)
        super().__init__(num_layers)

    def features(self, batch: Batch, vectors: Tensor) -> Tensor:
        distance = (vectors * vectors).sum(-1, keepdim=True).sqrt()
        radial = torch.exp(-((distance / 4.0 - torch.arange(4, dtype=DTYPE)) ** 2))
        h = self.embedding(batch["species"])
        for layer in self.layers:
            h = layer.mixed(h, radial, batch["edges"], batch["species"])
        return h


def experts(top_k: int = 2, chosen: int | None = None, num_layers: int = 2) -> Any:
    """Returns a module with experts.

    Args:
        top_k: experts of each element; with less than two, some of the five experts have no rows.
        chosen: an expert that all elements choose before others.
        num_layers: layers, with two mixtures each.
    """
    module = Module(Experts(top_k, num_layers))
    if chosen is not None:
        for part in module.modules():
            if isinstance(part, ElementExperts):
                part.logits.data[:, chosen] += 9.0
    return module


class FewElements(Data):
    """The structures of :class:`Data`, of which one alone has the second element, and none the third."""

    def train_dataloader(self) -> Any:
        samples: Any = [make_batch((size,), seed) for seed, size in enumerate(SIZES)]
        for size, sample in zip(SIZES, samples, strict=True):
            sample["species"] = sample["species"] % 2 if size == max(SIZES) else torch.zeros_like(sample["species"])
        return DataLoader(samples, batch_size=4, collate_fn=collate)


def experts_and_more(top_k: int, chosen: int | None = None) -> Any:
    """Returns the module of :func:`experts` with one layer, and a mixture that nothing reads."""
    module: Any = experts(top_k, chosen, num_layers=1)
    module.potential.unread = GroupedLinear(NUM_EXPERTS, 3, 3).to(DTYPE)
    for parameter in module.potential.unread.parameters():
        nn.init.constant_(parameter, 0.1)  # the same in all processes
    return module


def frozen() -> Any:
    """Returns a module some of whose experts are not trained."""
    module = experts()
    module.potential.layers[0].messages.core.requires_grad_(False)
    module.potential.layers[1].updates.gate.requires_grad_(False)
    return module


class _Saving(Module):
    """Saves a checkpoint, and looks at whole parameters, between the backward pass and the optimizer step."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        with TemporaryDirectory() as folder:
            self.trainer.save_checkpoint(f"{folder}/saved.ckpt")
        with whole_parameters(self):
            weights = [p for n, p in self.named_parameters() if p.dim() == 3 and "shared" not in n]
            assert weights and all(len(p) == NUM_EXPERTS for p in weights)


def saving() -> Any:
    """Returns a module with experts that saves between the backward pass and the optimizer step."""
    return _Saving(Experts(2))


def broken(name: str) -> Any:
    """Returns a module that trains with one fault of the exchange of experts."""
    made, fault = experts(), _fault(name)
    fault.start()
    made.teardown = lambda stage: fault.stop()
    return made


def _fault(name: str) -> Any:
    if name == "raw collective as derivative":

        def raw(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, None]:
            (given,) = gradients
            returned = None if given is None else row_exchange._ReturnRows.apply(given, ctx.exchange, ctx.num_rows)
            return None if returned is None else returned.detach(), None

        return patch.object(row_exchange._SendRows, "backward", staticmethod(raw))
    if name == "two experts exchanged on one rank":
        keep_own = ExpertShards.keep_own

        def swapped(self: ExpertShards) -> None:
            was_whole = self.are_whole
            keep_own(self)
            if was_whole and self._mesh.expert_rank == 0:
                for parameter in self.parameters:
                    parameter.data = parameter.data.flip(0)

        return patch.object(ExpertShards, "keep_own", swapped)
    if name == "sum instead of mean over replicas":
        reduce = ExpertShards.reduce_gradients

        def summed(self: ExpertShards) -> None:
            reduce(self)
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad *= 2

        return patch.object(ExpertShards, "reduce_gradients", summed)
    routes = ElementExperts.routes

    def detached(self: ElementExperts) -> tuple[Tensor, Tensor]:
        gates, chosen = routes(self)
        return gates.detach(), chosen

    return patch.object(ElementExperts, "routes", detached)


@contextmanager
def moving(has_state: bool = True) -> Iterator[None]:
    """Lets experts move before every step: where that makes loads more even, or each by one place.

    Args:
        has_state: whether their optimizer state moves too, as it has to.
    """
    moves: list[int] = []
    place, see = ExpertShards.place, ExpertPlacement.see

    def eager(self: ExpertPlacement, load: Any, has_guests: bool = False) -> bool:
        self.costs = ExpertCosts(FREE, FREE)
        if not see(self, load, has_guests):
            self.order = [*self.order[1:], self.order[0]]
        return True

    def noted(self: ExpertShards, orders: Any) -> None:
        moves.append(len(orders))
        self.optimizers = self.optimizers if has_state else []
        place(self, orders)

    with (
        patch.object(step_plans.ExpertAxis, "_knows_costs", lambda *_: True),
        patch.object(ExpertPlacement, "see", eager),
        patch.object(ExpertShards, "place", noted),
    ):
        yield
    assert len(moves) > 1, "experts have not moved twice"


def train_moving(*arguments: Any, has_state: bool = True) -> RunRecord:
    """Trains with experts that move before every step."""
    with moving(has_state):
        return train_in_pipeline(*arguments)


def train_without_others_updates(*arguments: Any) -> RunRecord:
    """Trains with owners of experts that do not get the parts which the other owners update."""
    spread = OptimizerShards.spread_updates

    def of_others(self: OptimizerShards) -> None:
        if self._holders.ranks == tuple(range(dist.get_world_size())):  # those of a stage, without experts
            spread(self)

    with patch.object(OptimizerShards, "spread_updates", of_others):
        return train_in_pipeline(*arguments)


@dataclass
class LimitedRecord(RunRecord):
    """Holds also what was chosen within a memory limit.

    Attributes:
        level: What ranks share.
        activations: What stages keep.
    """

    level: str = ""
    activations: set[str] = field(default_factory=set)


def train_within_limit(*arguments: Any) -> LimitedRecord:
    """Trains within a memory limit."""
    chosen: list[ChosenState] = []

    def noted(*given: Any) -> ChosenState:
        chosen.append(choose_state(*given))
        return chosen[-1]

    with patch.object(build_pipeline, "choose_state", noted):
        record = train_in_pipeline(*arguments)
    chosen = chosen or [ChosenState("none", (), None, {}, {})]  # the first rank chooses
    kept = chosen[0].activations
    return LimitedRecord(**vars(record), level=chosen[0].level, activations=set(kept.names) if kept else set())


def error_within_limit(*arguments: Any) -> str:
    """Returns the error of a training within a memory limit."""
    try:
        train_in_pipeline(*arguments)
    except ValueError as error:
        return str(error)
    return ""


def checkpoints_moving(*arguments: Any) -> dict[str, Any]:
    """Trains and saves with experts that move before every step."""
    with moving():
        return checkpoint_workers.train(*arguments)


@contextmanager
def having_guests(moves: bool, fault: str = "") -> Iterator[None]:
    """Lets ranks hold experts of other ranks too in every step, each some of their rows.

    Args:
        moves: whether experts move before every step, too.
        fault: "gradients" loses those of guests, "values" copies those of the first step.
    """
    steps: list[int] = []
    copy, give_back, drop = ExpertShards.copy_guests, ExpertShards.return_guests, ExpertShards.drop_guests
    first: dict[nn.Parameter, Tensor] = {}

    def forced(load: Any, order: Any, num_ranks: int, _: RowCost) -> Guests:
        found = best_guests(load, order, num_ranks, FREE).guests
        if not found:  # loads are even: the first rank's largest expert is on all others too
            largest = max(order[: bounds_of(len(order), num_ranks)[1]], key=lambda e: load[e])
            rows = load[largest] // num_ranks
            found = tuple(Guest(largest, rank, rows) for rank in range(1, num_ranks)) if rows else ()
        return Guests(found, 0)

    def noted(self: ExpertShards, held: Any) -> None:
        steps.append(len(held))
        now = {p: p.data for p in held}
        if fault == "values":
            for parameter in held:
                parameter.data = first.setdefault(parameter, parameter.data.clone())
        copy(self, held)
        for parameter, values in now.items():
            parameter.data[: len(values)] = values

    def returned(self: ExpertShards, sums: Any) -> None:
        assert self._guests, "no expert is on several ranks in this step"
        if fault != "gradients":
            give_back(self, sums)
        for parameter in self._guests:
            total = sums.take(parameter)
            sums.add([parameter], [total[: len(total) - sum(self._guests[parameter][1])]])
        drop(self)

    with (
        moving() if moves else patch.object(ExpertPlacement, "see", lambda *_: False),
        patch.object(step_plans.ExpertAxis, "_knows_costs", lambda *_: True),
        patch.object(step_plans, "best_guests", forced),
        patch.object(ExpertShards, "copy_guests", noted),
        patch.object(ExpertShards, "return_guests", returned),
    ):
        yield
    assert steps, "no expert was on several ranks"


def train_with_guests(*arguments: Any, moves: bool = False, fault: str = "") -> RunRecord:
    """Trains with experts that are on several ranks in every step."""
    with having_guests(moves, fault):
        return train_in_pipeline(*arguments)


def checkpoints_with_guests(*arguments: Any) -> dict[str, Any]:
    """Trains and saves with experts that are on several ranks in every step, and move before it."""
    with having_guests(moves=True):
        return checkpoint_workers.train(*arguments)


def scaled_steps(strategy: dict[str, Any], overflows: int | None = None) -> dict[str, Any]:
    """Trains a MatRIS-MoE for three steps in 16-mixed; returns scales, the first gradients and the last parameters.

    Args:
        strategy: arguments of the strategy.
        overflows: a rank on which the gradient of an own expert becomes infinite in the second step.
    """
    from lightning.pytorch.plugins.precision import MixedPrecision

    from lightning_januspipe.data import EMTDataModule

    module, replicas = matris().float(), strategy.get("data_size", 1)
    data = EMTDataModule(
        num_train=16, num_val=2, num_test=2, sizes=(4,), dtype="float32", batch_size=4 // replicas, shuffle=False
    )
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))  # type: ignore[arg-type]
    scales, gradients = list[float](), list[dict[str, Tensor]]()

    class Look(Callback):
        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            if trainer.global_step == 1 and trainer.global_rank == overflows:
                weight = next(p for n, p in pl_module.named_parameters() if is_of_experts(n, pl_module))
                weight.grad[0, 0, 0] = math.inf

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            names = {p: n for n, p in pl_module.named_parameters()}
            found = trainer.strategy.runner.parameters.gradients()
            gradients.append({names[p]: g.clone() for p, g in found.items() if g is not None})

        def on_train_batch_end(self, *_: Any) -> None:
            scales.append(float(plugin.scaler.get_scale()))  # type: ignore[union-attr]

    more = {"max_steps": 3, "limit_val_batches": 0, "use_distributed_sampler": True}
    quiet_trainer(strategy, plugins=[plugin], callbacks=[Look()], **more).fit(module, data)
    return {"scales": scales, "gradients": gradients[0], "parameters": dict(module.state_dict())}


def costs_of_steps(strategy: dict[str, Any]) -> list[list[ExpertCosts]]:
    """Returns after each of three steps what experts of each mixture cost, if later ranks are slower."""
    seen: list[list[ExpertCosts]] = []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen.append([placement.costs for placement in trainer.strategy.runner._experts.placements])

    def seconds(function: Any, device: Any) -> float:
        function()
        return 1e-6 * (1 + dist.get_rank())

    with patch.object(expert_times, "_seconds", seconds):
        train_in_pipeline(partial(experts, 2), Data, strategy, 3, {"callbacks": [Look()]})
    return seen


def force_loss(sizes: list[int]) -> dict[str, list[Tensor]]:
    """Returns gradients of a loss on derivatives, with rows that travel, and the same in one process.

    Args:
        sizes: number of rows of each rank.
    """
    dist.init_process_group("gloo")
    rank, num_ranks = dist.get_rank(), dist.get_world_size()
    bounds = bounds_of(NUM_EXPERTS, num_ranks)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(sizes), 3, generator=generator, dtype=DTYPE)
    weights = torch.randn(NUM_EXPERTS, 3, 3, generator=generator, dtype=DTYPE)
    of_rows = torch.randint(0, NUM_EXPERTS - 1, (sum(sizes),), generator=generator)  # the last expert has no rows
    counts = torch.stack([torch.bincount(part, minlength=NUM_EXPERTS) for part in of_rows.split(sizes)])
    mine = of_rows.split(sizes)[rank]
    exchange = plan_rows(mine, counts, bounds, rank, dist.group.WORLD)
    x = rows.split(sizes)[rank].clone().requires_grad_()
    own = weights[bounds[rank] : bounds[rank + 1]].clone().requires_grad_()

    def energy(x: Tensor, weight: Tensor, given: RowExchange | None) -> Tensor:
        for _ in range(2):
            if given is None:
                x = torch.tanh(grouped_linear(x, weight, of_rows))
            else:
                there = grouped_linear(send_rows(x, given), weight, given.experts)
                x = return_rows(torch.tanh(there), given, mine)
        return (x**3).sum()

    def gradients(x: Tensor, weight: Tensor, given: RowExchange | None) -> list[Tensor]:
        (force,) = torch.autograd.grad(energy(x, weight, given), x, create_graph=True)
        return [force.detach(), *torch.autograd.grad((force**2).sum(), [x, weight])]

    found = gradients(x, own, exchange)
    expected = gradients(rows.requires_grad_(), weights.requires_grad_(), None)
    expected = [
        *(value.split(sizes)[rank] for value in expected[:2]),
        expected[2][bounds[rank] : bounds[rank + 1]],
    ]
    dist.destroy_process_group()
    return {"found": found, "expected": expected}


class _Bytes(Callback):
    """Notes bytes of parameters, gradients and moments of experts, of all others, and of both, after the last step."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        (optimizer,) = trainer.optimizers
        names = {p: n for n, p in pl_module.named_parameters()}
        kinds: dict[str, list[Tensor]] = {"experts": [], "others": [], "all": []}
        of_leaves = {leaf: p for s in trainer.strategy.runner.parameters.shards for leaf, p in s.parameter_of.items()}
        # Parts of parameters that are in shards are in the optimizer's groups.
        leaves = [p for g in optimizer.param_groups for p in g["params"]]
        for leaf in dict.fromkeys([*leaves, *names]):
            name = names[of_leaves.get(leaf, leaf)]
            gradient = leaf.grad if any(leaf is p for p in leaves) else None
            moments = [t for t in optimizer.state.get(leaf, {}).values() if t.dim() > 0]
            found = [leaf, *moments] if gradient is None else [leaf, gradient, *moments]
            kinds["experts" if is_of_experts(name, pl_module) else "others"] += found
            kinds["all"] += found
        for kind, tensors in kinds.items():
            # Parts of several parameters may have one memory.
            storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
            self.seen[kind] = sum(storages.values())
        self.seen["num"] = len(names)


def is_of_experts(name: str, module: nn.Module) -> bool:
    """Returns whether a parameter has an entry for each expert."""
    owner, _, own_name = name.rpartition(".")
    return isinstance(module.get_submodule(owner), GroupedLinear) and own_name == "weight"


def bytes_of_experts(strategy: dict[str, Any]) -> dict[str, int]:
    """Returns the bytes that one rank holds of experts, of other parameters and of both, with gradients and moments."""
    import tiny

    callback = _Bytes()
    shape = int(strategy.get("data_size", 1)) * int(strategy.get("graph_size", 1))
    trainer = quiet_trainer(
        strategy=JanusPipeStrategy(**strategy), devices=shape, max_steps=2, limit_val_batches=0, callbacks=[callback]
    )
    trainer.fit(matris(), tiny.data(num_train=16, batch_size=4))
    return callback.seen
