"""Finds the shapes of what a potential's own parts return, as functions of the sizes of its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_januspipe.capture.find.grad_call import PotentialCall
from lightning_januspipe.capture.stages.explicit import (
    ENERGY,
    ExplicitPotential,
    ExplicitStages,
    declared_stages,
    named_inputs,
    returned_tensors,
)
from lightning_januspipe.engine.autocast import Autocast
from lightning_januspipe.engine.specs import TensorSpec
from lightning_januspipe.errors import CaptureError, quoted


def explicit_potential(potential: nn.Module, first: PotentialCall, second: PotentialCall) -> ExplicitPotential:
    """Returns a potential with each of its parts as a stage.

    Args:
        potential: an ``nn.Module`` with :class:`~lightning_januspipe.capture.stages.explicit.ExplicitStages`.
        first: a call of the potential.
        second: a call with other numbers of structures, atoms and edges: dimensions that differ are sizes, others are
            constant.

    Raises:
        CaptureError: a part, or the outputs, do not do what :class:`ExplicitStages` asks for.
    """
    declared = declared_stages(potential)
    parts = _parts(declared, first.path)
    names = {p: n for n, p in potential.named_parameters()}
    foreign = [i for i, part in enumerate(parts) if any(p not in names for p in part.parameters())]
    if foreign:
        raise CaptureError(f"part {foreign[0]} of {quoted(first.path)} has parameters that the potential does not have")
    trainable = {n: p for n, p in potential.named_parameters() if p.requires_grad}
    runs = [_run(declared, parts, call, trainable) for call in (first, second)]
    (inputs, features, outputs, derived), (other_inputs, other_features, _, _) = runs
    if list(inputs) != list(other_inputs):
        raise CaptureError(
            f"stage_inputs of {quoted(first.path)} returned the entries {list(inputs)} for one batch and "
            f"{list(other_inputs)} for another; expected the same"
        )
    symbols: dict[str, tuple[int, int]] = {}
    known: dict[tuple[int, int], str] = {}
    for position, name in enumerate(inputs):
        for dim, pair in enumerate(zip(inputs[name].shape, other_inputs[name].shape, strict=True)):
            if pair[0] != pair[1] and pair not in known:
                known[pair] = f"s{len(known)}"
                symbols[known[pair]] = position, dim

    def spec(what: str, a: Tensor, b: Tensor) -> TensorSpec:
        if a.dim() != b.dim() or a.dtype != b.dtype:
            raise CaptureError(f"{what} of {quoted(first.path)} has another rank or dtype for another batch")
        return TensorSpec(tuple(_size(what, first.path, p, known) for p in zip(a.shape, b.shape, strict=True)), a.dtype)

    return ExplicitPotential(
        path=first.path,
        bounds=tuple(range(len(parts) + 1)),
        inputs_by_name={n: spec(f"input {n!r}", inputs[n], other_inputs[n]) for n in inputs},
        features=tuple(
            {n: spec(f"feature {n!r} of part {i}", a[n], b[n]) for n in a}
            for i, (a, b) in enumerate(zip(features, other_features, strict=True))
        ),
        symbols=symbols,
        coordinates=tuple(declared.stage_coordinates),
        parameters=tuple(tuple(dict.fromkeys(names[p] for p in part.parameters())) for part in parts),
        part_bytes=tuple(sum(x.numel() * x.element_size() for x in of_part.values()) for of_part in other_features),
        outputs=tuple(range(outputs)),
        derived=derived,
        autocast=Autocast.current(),
    )


def _parts(potential: ExplicitStages, path: str) -> list[nn.Module]:
    parts = list(potential.stage_parts())
    wrong = [type(p).__name__ for p in parts if not isinstance(p, nn.Module)]
    if wrong or not parts:
        raise CaptureError(
            f"stage_parts of the potential {quoted(path)} returned {wrong or 'nothing'}; expected nn.Modules, called "
            "as part(inputs, features) -> features. The modules tell which parameters a stage reads."
        )
    return parts


def _run(
    potential: ExplicitStages, parts: Sequence[nn.Module], call: PotentialCall, trainable: Mapping[str, nn.Parameter]
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], int, tuple[int, ...]]:
    """Runs all parts; returns inputs, features after each part, and number and derived ones of the returned tensors."""
    given = named_inputs(potential, call.path, call.args, call.kwargs)
    inputs = {n: x.detach() for n, x in given.items()}
    found: list[dict[str, Tensor]] = []
    features: Mapping[str, Tensor] = {}
    with torch.enable_grad():
        for index, part in enumerate(parts):
            features = part(inputs, features)
            if not isinstance(features, Mapping) or not all(isinstance(x, Tensor) for x in features.values()):
                raise CaptureError(
                    f"part {index} ({type(part).__name__}) of the potential {quoted(call.path)} returned "
                    f"{type(features).__name__}; expected a dict of tensors"
                )
            found.append({n: x.detach() for n, x in features.items()})
    if ENERGY not in found[-1]:
        raise CaptureError(
            f"the last part of the potential {quoted(call.path)} returned {list(found[-1])}; expected {ENERGY!r} among"
            " them"
        )
    gradients = {n: torch.zeros_like(inputs[n]).requires_grad_() for n in potential.stage_coordinates}
    with torch.enable_grad():
        returned = returned_tensors(potential.stage_outputs(inputs, found[-1], gradients))
        _refuse_parameters(trainable, returned, call.path)
    derived = tuple(i for i, x in enumerate(returned) if x.requires_grad)
    return inputs, found, len(returned), derived


def _refuse_parameters(trainable: Mapping[str, nn.Parameter], returned: Sequence[Tensor], path: str) -> None:
    values = [x.sum() for x in returned if x.requires_grad]
    if not values or not trainable:
        return
    found = torch.autograd.grad(values, list(trainable.values()), allow_unused=True, retain_graph=True)
    read = [n for n, g in zip(trainable, found, strict=True) if g is not None]
    if read:
        raise CaptureError(
            f"stage_outputs of the potential {quoted(path)} reads the parameters {', '.join(read[:3])}; only parts may "
            "read parameters. Apply them in the last part."
        )


def _size(what: str, path: str, pair: tuple[int, int], known: Mapping[tuple[int, int], str]) -> int | str:
    """Returns a dimension, from its two values, as a constant, a size symbol, or a multiple of a size symbol."""
    if pair[0] == pair[1]:
        return pair[0]
    if pair in known:
        return known[pair]
    for (a, b), symbol in known.items():
        if a and pair[0] % a == 0 and (pair[0] // a) * b == pair[1]:
            return f"{pair[0] // a}*{symbol}"
    raise CaptureError(
        f"{what} of the potential {quoted(path)} has a dimension of {pair[0]} for one batch and {pair[1]} for another, "
        "which is no size of an input (atoms, edges, structures) and no multiple of one. Pad it, or keep it inside a"
        " part."
    )
