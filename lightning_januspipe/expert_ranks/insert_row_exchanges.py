"""Inserts exchanges of rows into a captured program where rows are multiplied by the matrices of their experts.

A weight with an entry for each expert that ``grouped_linear`` alone reads is spread: each rank holds the entries of its
own experts. Rows go to the ranks of their experts before the product, and results come back after it. Operations
between two products that take each row by itself run on the ranks of the experts too, so that rows of the experts'
inner width, which may be much larger than that of the features, do not travel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lightning_januspipe.capture.stages.captured import CapturedPotential
from lightning_januspipe.capture.trace.graph_walks import ancestors, descendants, readers
from lightning_januspipe.capture.trace.operators import is_pointwise, operator_of
from lightning_januspipe.capture.trace.program import Node, Ref, replace_refs
from lightning_januspipe.engine.specs import TensorSpec
from lightning_januspipe.errors import CaptureError
from lightning_januspipe.expert_ranks.row_exchange import bounds_of, return_rows, send_rows
from lightning_januspipe.expert_ranks.traced_rows import PotentialWithExperts, RowExchangeSpec

GROUPED_LINEAR = "januspipe.grouped_linear"


@dataclass(frozen=True)
class Mixture:
    """Names experts that are on one rank together.

    Attributes:
        num_experts: K.
        parameters: names inside the potential of the weights with an entry for each expert.
        sites: names of the values with the expert of each row.
    """

    num_experts: int
    parameters: tuple[str, ...]
    sites: tuple[str, ...]


@dataclass(frozen=True)
class SpreadExperts:
    """Holds a captured potential whose experts are spread over ranks.

    Attributes:
        potential: with exchanges; its inputs end with one exchange for each of ``sites``, and then one tensor with the
            expert of each received row for each of them.
        parameters: names inside the potential of the weights that are spread, and their numbers of experts.
        sites: names of the values with the expert of each row, and for each the stage that reads it and the number of
            experts.
        mixtures: each of the weights and each of the sites is in one of them.
    """

    potential: PotentialWithExperts
    parameters: dict[str, int]
    sites: dict[str, tuple[int, int]]
    mixtures: tuple[Mixture, ...]


def spread_experts(
    captured: CapturedPotential, num_ranks: int, rank: int = 0, has_guests: bool = False
) -> SpreadExperts:
    """Returns a copy of a captured potential with exchanges of rows inserted.

    Args:
        captured: The potential, possibly with exchanges between graph ranks; it stays as it is.
        num_ranks: X, the number of ranks that share the experts.
        rank: index of this rank.
        has_guests: Whether ranks may hold experts of other ranks too during a step.

    Raises:
        CaptureError: No weight can be spread, there are fewer experts than ranks, or the experts of rows follow from
            what another stage computes.
    """
    return _ExchangeInserter(captured, num_ranks, rank, has_guests).run()


class _ExchangeInserter:
    def __init__(self, captured: CapturedPotential, num_ranks: int, rank: int, has_guests: bool) -> None:
        self._captured, self._program = captured, captured.program
        self._num_ranks, self._rank, self._has_guests = num_ranks, rank, has_guests
        self._stage_of = {n: stage for stage, body in enumerate(captured.cut.bodies) for n in body}
        self._repeated = {n for names in captured.cut.replicated for n in names}
        self._new: dict[str, list[Node]] = {}
        self._nodes = {node.name: node for node in self._program.nodes}
        self._there: dict[str, tuple[str, str, int]] = {}  # value -> the same at the experts, site and stage
        self._sent: dict[tuple[str, str, int], str] = {}
        self._sites: dict[str, tuple[int, int]] = {}
        self._together: list[set[str]] = []  # weights and sites that one product reads, or several with one in common

    def run(self) -> SpreadExperts:
        program = self._program
        weights = self._weights()
        if not weights:
            raise CaptureError(
                "expert_size > 1 is not possible: no parameter of the potential is read by grouped_linear alone, with "
                "experts that follow from inputs and parameters of one stage. Use ElementExperts or GroupedLinear of "
                "lightning_januspipe.experts, or expert_size=1."
            )
        for node in program.operations:
            if operator_of(node) == GROUPED_LINEAR and node.args[1].name in weights:
                self._spread(node, weights[node.args[1].name])
            elif is_pointwise(node):
                self._move(node)
        parameters = {program.parameters[name]: num for name, num in weights.items()}
        mixtures = self._mixtures(weights)
        return SpreadExperts(self._result(weights, mixtures), parameters, self._sites, mixtures)

    def _mixtures(self, weights: Mapping[str, int]) -> tuple[Mixture, ...]:
        found = []
        for names in self._together:
            own = [name for name in weights if name in names]
            sites = tuple(name for name in self._sites if name in names)
            found.append(Mixture(weights[own[0]], tuple(self._program.parameters[n] for n in own), sites))
        return tuple(found)

    def _weights(self) -> dict[str, int]:
        """Returns the weights that can be spread, by their placeholders, with their numbers of experts."""
        program = self._program
        stages, read_by = self._captured.parameter_stages(), readers(program)
        moving = descendants(program, program.coordinates)
        found = {}
        for placeholder, name in program.parameters.items():
            nodes = [program.by_name[n] for n in read_by[placeholder]]
            fits = [
                operator_of(n) == GROUPED_LINEAR
                and n.args[1] == Ref(placeholder)
                and n.inputs().count(placeholder) == 1
                and n.args[0] != Ref(placeholder)
                and n.name not in self._repeated
                and n.args[2].name not in moving
                for n in nodes
            ]
            is_alone = list(program.parameters.values()).count(name) == 1
            if not nodes or not all(fits) or not is_alone or len(stages[name]) != 1:
                continue
            num = program.spec(placeholder).shape[0]
            assert isinstance(num, int)
            if num < self._num_ranks:
                raise CaptureError(
                    f"expert_size={self._num_ranks}, but {name!r} has {num} experts; expected at least one for each "
                    f"rank. Use expert_size={num} or less."
                )
            for node in nodes:
                self._require_known(node, node.args[2].name)
            found[placeholder] = num
        return found

    def _require_known(self, node: Node, group: str) -> None:
        """Refuses experts that follow from values of other stages, or of other ranks: the plan needs them before."""
        stage = self._stage_of[node.name]
        if ancestors(self._program, [group]) & set(self._captured.received(stage)):
            raise CaptureError(
                f"expert_size > 1 is not possible with this cut: stage {stage} gets the experts of rows ({group}) from "
                "the stage before, and cannot plan exchanges without it. Use another pipeline_size, or expert_size=1."
            )

    def _spread(self, node: Node, num_experts: int) -> None:
        """Multiplies rows on the ranks of their experts."""
        x, weight, group = node.args
        stage = self._stage_of[node.name]
        site = self._sites.setdefault(group.name, (stage, num_experts))
        if site != (stage, num_experts):
            raise CaptureError(
                f"expert_size > 1 is not possible: the same indices ({group.name}) choose among {site[1]} experts of "
                f"stage {site[0]} and among {num_experts} of stage {stage}. Use expert_size=1."
            )
        joined = [names for names in self._together if weight.name in names or group.name in names]
        self._together = [names for names in self._together if names not in joined]
        self._together.append({weight.name, group.name}.union(*joined))
        there = self._at_experts(node, x.name, group.name, stage)
        product = replace(node, name=f"{node.name}__there", args=(Ref(there), weight, Ref(_experts(group.name))))
        self._computed_there(node, product, group.name, stage)

    def _move(self, node: Node) -> None:
        """Runs a pointwise operation on the ranks of the experts, if all rows that it reads are there."""
        given = node.inputs()
        there = [self._there[name] for name in given if name in self._there]
        stage = self._stage_of.get(node.name)
        if len(there) < len(given) or not there or node.name in self._repeated or node.spec is None:
            return
        if len({(site, of) for _, site, of in there}) > 1 or there[0][2] != stage:
            return
        rank = len(node.spec.shape)
        specs = [self._program.by_name[name].spec for name in given]
        if any(spec is None or len(spec.shape) != rank for spec in specs):
            return  # broadcasting would give rows another meaning

        def moved(name: str) -> Ref:
            return Ref(self._there[name][0])

        copy = replace(node, name=f"{node.name}__there", args=replace_refs(node.args, moved))
        copy.kwargs = replace_refs(node.kwargs, moved)
        self._computed_there(node, copy, there[0][1], stage)

    def _computed_there(self, node: Node, copy: Node, site: str, stage: int) -> None:
        """Lets the ranks of the experts compute a value, which comes back if anything else reads it."""
        self._new.setdefault(node.name, []).append(copy)
        self._there[node.name] = copy.name, site, stage
        back = (Ref(copy.name), Ref(_input(site)), Ref(site))
        self._nodes[node.name] = Node(node.name, "call_function", return_rows, back, {}, node.spec)

    def _at_experts(self, node: Node, name: str, site: str, stage: int) -> str:
        """Returns the name of a value at the ranks of the experts, to which it is sent once."""
        if self._there.get(name, ("", "", -1))[1:] == (site, stage):
            return self._there[name][0]
        key = (name, site, stage)
        if key not in self._sent:
            self._sent[key] = f"{name}__to_{site}"
            sent = (Ref(name), Ref(_input(site)))
            extra = Node(self._sent[key], "call_function", send_rows, sent, {}, self._program.by_name[name].spec)
            self._new.setdefault(node.name, []).append(extra)
        return self._sent[key]

    def _result(self, weights: Mapping[str, int], mixtures: Sequence[Mixture]) -> PotentialWithExperts:
        program, captured = self._program, self._captured
        exchanges = {_input(site): self._exchange(site, num) for site, (_, num) in self._sites.items()}
        experts = {_experts(s.site): TensorSpec((s.received,), torch.int64) for s in exchanges.values()}
        nodes = [n for n in program.nodes if n.is_placeholder]
        nodes += [Node(name, "placeholder", name, (), {}, None) for name in exchanges]
        nodes += [Node(name, "placeholder", name, (), {}, spec) for name, spec in experts.items()]
        for node in program.operations:
            nodes += [*self._new.get(node.name, []), self._nodes[node.name]]

        def longer(names: Sequence[str]) -> list[str]:
            return [n for name in names for n in (*(new.name for new in self._new.get(name, ())), name)]

        own = {}
        site_of = {parameter: m.sites[0] for m in mixtures for parameter in m.parameters}
        for name, num in weights.items():
            held = exchanges[_input(site_of[program.parameters[name]])].held if self._has_guests else self._num_own(num)
            own[name] = replace(program.spec(name), shape=(held, *program.spec(name).shape[1:]))
        changed = {
            "program": replace(program, nodes=nodes, inputs=[*program.inputs, *exchanges, *experts]),
            "regions": replace(captured.regions, body=longer(captured.regions.body)),
            "cut": replace(captured.cut, bodies=[longer(body) for body in captured.cut.bodies]),
        }
        same = {f.name: getattr(captured, f.name) for f in fields(CapturedPotential)}
        return PotentialWithExperts(**{**same, **changed}, given=captured, added={**exchanges, **experts}, own=own)

    def _exchange(self, site: str, num_experts: int) -> RowExchangeSpec:
        num_held = self._num_own(num_experts) if self._has_guests else None
        return RowExchangeSpec(site, self._program.spec(site).shape[0], num_held)

    def _num_own(self, num_experts: int) -> int:
        """Returns how many experts of a mixture this rank owns."""
        begin, end = bounds_of(num_experts, self._num_ranks)[self._rank : self._rank + 2]
        return end - begin


def _input(site: str) -> str:
    """Returns the name of the input with the exchange for the rows of a site."""
    return f"rows_{site}"


def _experts(site: str) -> str:
    """Returns the name of the input with the expert of each row that this rank receives for a site."""
    return f"experts_{site}"


def num_rows_of(expert: Tensor, num_experts: int) -> Tensor:
    """Returns (K,) the number of rows of each expert."""
    return expert.new_zeros(num_experts).index_add(0, expert, expert.new_ones(expert.shape))
