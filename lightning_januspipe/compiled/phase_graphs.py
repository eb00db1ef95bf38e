"""Cuts the joint graph of a stage into one graph for each of its phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from lightning_januspipe.compiled import graphs
from lightning_januspipe.compiled.exchanges import chain_exchanges, exchanges_of
from lightning_januspipe.compiled.joined_slices import join_slices
from lightning_januspipe.compiled.joint import Joint
from lightning_januspipe.compiled.levels import (
    BEFORE,
    ORDER,
    Levels,
    assign_phases,
    drop_repetitions,
    returned_in,
    seeds_of_gradients,
    split_sums,
    without_mutations,
)
from lightning_januspipe.compiled.minimum_cut import Activation, kept_values
from lightning_januspipe.compiled.ports import FREE, GIVEN, Kind, Port
from lightning_januspipe.compiled.sizes import StageSizes
from lightning_januspipe.compiled.torch_internals import FakeTensorMode
from lightning_januspipe.schedule.actions import Phase


@dataclass(frozen=True)
class PhaseSignature:
    """Describes one phase of a stage as a function of tensors: ``(inputs) -> (*results, *kept)``.

    Attributes:
        phase: which phase it is.
        inputs: names of its inputs, which are inputs of the joint graph or values that earlier phases kept.
        results: what the phase returns to the engine.
        seeds: for each result the inputs of the joint graph that decide whether it exists; None for always.
        kept: names of the values that it computes for later phases.
    """

    phase: Phase
    inputs: tuple[str, ...]
    results: tuple[Port, ...]
    seeds: tuple[frozenset[Port] | None, ...]
    kept: tuple[str, ...]


@dataclass(frozen=True)
class StagePhases:
    """Describes the phases of one stage, without their operations.

    Attributes:
        signatures: of each phase.
        ports: what each input of the joint graph is, by its name.
        sizes: the sizes that the graphs take, and for which they are right.
        readers: the phases that read each kept value or input that arrives for a phase.
        activation: what the phases keep.
        num_bytes: bytes of each of the values that phases read, in the example call.
    """

    signatures: Mapping[Phase, PhaseSignature]
    ports: Mapping[str, Port]
    sizes: StageSizes
    readers: Mapping[str, frozenset[Phase]]
    activation: Activation
    num_bytes: Mapping[str, int]

    @property
    def is_deferred(self) -> bool:
        """Tells whether WF and WE are phases of their own."""
        return Phase.WF in self.signatures or Phase.WE in self.signatures

    def held_bytes(self, after: Phase) -> int:
        """Returns the bytes that a micro-batch keeps after a phase, in the example call.

        Args:
            after: a phase; all before it have run too, and BE before WF.
        """
        done = set(ORDER[: ORDER.index(after) + 1])
        return sum(
            self.num_bytes[name]
            for name, readers in self.readers.items()
            if not readers <= done and self.arrives(name) in done and not self.is_free(name)
        )

    def arrives(self, name: str) -> Phase:
        """Returns the phase with which a value is at hand."""
        port = self.ports.get(name)
        if port is not None:
            return GIVEN[port.kind]
        return next(phase for phase, own in self.signatures.items() if name in own.kept)

    def is_free(self, name: str) -> bool:
        """Tells whether a value is at hand in every phase."""
        return name in self.ports and self.ports[name].kind in FREE


@dataclass(frozen=True)
class PhaseGraphs:
    """Holds the phases of one stage with their operations.

    Attributes:
        phases: the signatures of the graphs.
        modules: the graph of each phase.
        mode: the mode that their tensors belong to.
    """

    phases: StagePhases
    modules: Mapping[Phase, fx.GraphModule]
    mode: FakeTensorMode


def phase_graphs(joint: Joint, activation: Activation = "pointwise", defer: bool = False) -> PhaseGraphs:
    """Cuts a joint graph into phases: ``(joint graph, activation, defer) -> phase graphs``.

    These are the passes, in their order:

    1. :func:`~.levels.without_mutations`: ``joint -> joint`` in which no operation writes to its input;
    2. :func:`~.levels.drop_repetitions`: ``joint -> joint`` without repetitions;
    3. :func:`~.levels.split_sums`: ``joint -> joint`` with parameter gradients in summands;
    4. :func:`~.joined_slices.join_slices`: ``joint -> joint`` with concatenations for sums of slices;
    5. :func:`~.levels.assign_phases`: ``joint -> levels``, the first phase of each operation;
    6. :func:`~.minimum_cut.kept_values`, after each phase: ``what later phases need -> what is kept``;
    7. :func:`~.graphs.part`, for each phase: ``kept values and inputs -> results and newly kept values``;
    8. :func:`verify_phases`: refuses phases that repeat or leave out what must run once;
    9. :func:`~.exchanges.chain_exchanges`, for each phase: exchanges keep their order whatever a compiler does.

    Args:
        joint: the joint graph, which stays as it is.
        activation: what phases keep.
        defer: leave what only parameters wait for to WF and WE.
    """
    joint = join_slices(split_sums(drop_repetitions(without_mutations(joint))))
    levels = assign_phases(joint, defer)
    found = _Cutter(joint, levels, activation).run()
    verify_phases(joint, found)
    for module in found.modules.values():
        chain_exchanges(module)
    return found


class _Cutter:
    """Cuts the joint graph after each phase, and collects what the phases compute."""

    def __init__(self, joint: Joint, levels: Levels, activation: Activation) -> None:
        self._joint, self._levels, self._activation = joint, levels, activation
        self._wanted = joint.wanted
        self._ends = returned_in(joint, levels)
        self._seeds = seeds_of_gradients(joint)
        self._ports = joint.ports_of
        self._free = {n for n, port in self._ports.items() if port.kind in FREE}
        self._of_weight_force = {n for n, level in levels.items() if level is Phase.WF}
        self._kept: dict[Phase, list[fx.Node]] = {}
        self._signatures: dict[Phase, PhaseSignature] = {}
        self._modules: dict[Phase, fx.GraphModule] = {}

    def run(self) -> PhaseGraphs:
        """Cuts out all phases in order."""
        # BF of a last stage may return nothing, and still has what BE and WF both need.
        chain = ORDER[:4] if set(self._ends) - {Phase.FE, Phase.FF} else ORDER[:2]
        order = [p for p in ORDER if p in chain or p in self._ends]
        for phase in order:
            held = {n for p in BEFORE[phase] for n in self._kept.get(p, ())}
            self._kept[phase] = self._found(phase, [p for p in order if phase in BEFORE[p]], held)
            self._add(phase, held)
        readers: dict[str, set[Phase]] = {}
        for phase, signature in self._signatures.items():
            for name in signature.inputs:
                readers.setdefault(name, set()).add(phase)
        phases = StagePhases(
            signatures=self._signatures,
            ports={node.name: port for node, port in self._ports.items()},
            sizes=self._joint.sizes,
            readers={name: frozenset(found) for name, found in readers.items()},
            activation=self._activation,
            num_bytes={n.name: graphs.num_bytes(n) for n in self._joint.graph.nodes if n.name in readers},
        )
        return PhaseGraphs(phases, self._modules, self._joint.mode)

    def _found(self, phase: Phase, after: list[Phase], held: set[fx.Node]) -> list[fx.Node]:
        """Returns what is kept after a phase, for the results of all phases after it."""
        needed = {node for (node, _), end in zip(self._wanted, self._ends, strict=True) if end in after}
        other = self._of_weight_force if phase is Phase.BE else set()
        region = graphs.closure(needed, held | self._free | other)
        free = self._free
        if phase is Phase.WF:  # BE has kept what else WE needs, and both have run before WE
            needed = {
                n for n in region & self._of_weight_force if any(self._levels.get(u) is Phase.WE for u in n.users)
            }
            free = free | set(self._kept.get(Phase.BE, ()))
            region = graphs.closure(needed, held | free)
        by_now = {phase, *BEFORE[phase]}

        def is_early(node: fx.Node) -> bool:
            return self._levels[node] in by_now

        return kept_values(region, needed, is_early, held, free, self._activation)

    def _add(self, phase: Phase, held: set[fx.Node]) -> None:
        """Adds the graph of one phase, which also computes what is newly kept after it."""
        here = [i for i, end in enumerate(self._ends) if end is phase]
        results = [self._wanted[i] for i in here]
        fresh = [n for n in self._kept[phase] if n not in held and n.op != "placeholder"]
        wanted = [*(node for node, _ in results), *fresh]
        if not wanted:
            return
        body = graphs.closure(wanted, held | self._free)
        body |= self._sizes_in_shapes([n for n in body if n.op == "placeholder" or n in held])
        nodes = [n for n in self._joint.graph.nodes if n in body]
        module = graphs.part(self._joint.root, nodes, held | self._free, wanted)
        self._modules[phase] = module
        self._signatures[phase] = PhaseSignature(
            phase=phase,
            inputs=tuple(n.name for n in graphs.placeholders(module.graph)),
            results=tuple(port for _, port in results),
            seeds=tuple(self._seeds[i] for i in here),
            kept=tuple(n.name for n in fresh),
        )

    def _sizes_in_shapes(self, inputs: Sequence[fx.Node]) -> set[fx.Node]:
        """Returns the sizes n of inputs with n + 1 rows, for example, from whose shapes inductor does not find n."""
        shapes = [n.meta["val"].shape for n in inputs if isinstance(n.meta.get("val"), Tensor)]
        found = [s.node.expr for shape in shapes for s in shape if isinstance(s, torch.SymInt)]
        names = {str(symbol) for size in found if not size.is_Symbol for symbol in size.free_symbols}
        ports = self._ports.items()
        return {n for n, port in ports if port.kind is Kind.SIZE and str(n.meta["val"].node.expr) in names}


def verify_phases(joint: Joint, found: PhaseGraphs) -> None:
    """Asserts that every phase has its inputs, and that every exchange runs once.

    Graph ranks have to run the same exchanges in the same order, so each phase has to have them in the joint graph's.
    """
    order = {n.name: i for i, n in enumerate(joint.graph.nodes)}
    phases = found.phases
    exchanges: list[str] = []
    for phase, signature in phases.signatures.items():
        known = {name for name, port in phases.ports.items() if GIVEN[port.kind] in (phase, *BEFORE[phase])}
        known |= {name for p in BEFORE[phase] if p in phases.signatures for name in phases.signatures[p].kept}
        missing = [name for name in signature.inputs if name not in known]
        assert not missing, f"{phase.value} reads {missing[:3]}, which no earlier phase keeps"
        own = [n.name for n in exchanges_of(found.modules[phase].graph)]
        assert own == sorted(own, key=order.__getitem__), f"{phase.value} has its exchanges in another order"
        exchanges += own
    assert len(exchanges) == len(set(exchanges)), "an exchange between graph ranks runs in two phases"
    missing = [n.name for n in exchanges_of(joint.graph) if n.name not in exchanges]
    assert not missing, f"no phase runs the exchanges {missing[:3]} between graph ranks"
