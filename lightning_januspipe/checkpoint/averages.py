"""Finds averages of parameters: tensors that follow the parameters of a module one by one, such as moving averages.

A rank of a pipeline trains the parameters of its own stages, so the averages that it keeps are right for these only.
Before averages are saved, each tensor is taken from a rank that trains its parameter, as the parameter itself is.

Nobody has to declare averages. A tensor on the LightningModule or on a callback is taken for the average of a parameter
if it is

- in a submodule that is a copy of the module, or of a part with the whole potential (as ``AveragedModel`` makes it),
- in a list as long as all parameters of such a part (as NequIP's buffers and the lists of ``torch_ema`` are),
- or in a dict under the parameter's name.

A tensor that is taken for an average by mistake keeps its values: all ranks of a pipeline have the same ones, because
they compute the same steps.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

Pairs = list[tuple[nn.Parameter, Tensor]]
Place = tuple[str, str]
"""The place that holds a tensor, and the name of the parameter that it follows; both are the same on every rank."""


def followers(
    module: nn.Module, holders: Sequence[object], trained: Collection[nn.Parameter]
) -> dict[Place, tuple[nn.Parameter, Tensor]]:
    """Returns the tensors that follow parameters, each with its parameter.

    Args:
        module: The LightningModule.
        holders: Objects beside it that may hold averages, such as callbacks.
        trained: The parameters that only some ranks train.
    """
    chosen = set(trained)
    if not chosen:
        return {}
    names = {p: n for n, p in module.named_parameters()}
    wholes = [m for m in module.modules() if chosen <= set(m.parameters())]
    found: dict[Place, tuple[nn.Parameter, Tensor]] = {}
    seen: set[int] = set()
    for place, pairs in _pairs(wholes, [module, *holders], chosen):
        for parameter, tensor in pairs:
            if parameter in chosen and tensor not in chosen and id(tensor) not in seen:
                seen.add(id(tensor))
                found[place, names[parameter]] = parameter, tensor
    return found


def held_by_all(of_ranks: Sequence[Collection[Place]], num_trained: int) -> set[Place]:
    """Returns the places that all ranks have; tensors that a rank holds for its own parameters only are no averages.

    Args:
        of_ranks: The places that each rank of a pipeline found.
        num_trained: Number of parameters that only some ranks train. A place with tensors for all of them is an
            average; if a rank lacks it, a warning says so.
    """
    held = [Counter(place for place, _ in places) for places in of_ranks]
    whole = {place for counts in held for place, num in counts.items() if num == num_trained}
    alone = sorted(place for place in whole if not all(place in counts for counts in held))
    if alone:
        warnings.warn(
            f"only some ranks of the pipeline keep an average or another copy of the parameters: {', '.join(alone)}. "
            "It follows the parameters of these ranks' stages only. Keep it on every rank, without rank_zero_only and "
            "without a condition on the rank.",
            stacklevel=2,
        )
    return set.intersection(*map(set, of_ranks))


def _pairs(wholes: list[nn.Module], holders: list[Any], chosen: set[nn.Parameter]) -> Iterator[tuple[str, Pairs]]:
    """Yields places, each with the pairs of a parameter and a tensor there."""
    named_holders: dict[str, Any] = {}
    for holder in holders:  # named by class and index, because some ranks may have more callbacks
        kind = type(holder).__qualname__
        named_holders[f"{kind}{sum(type(h) is type(holder) for h in named_holders.values()) or ''}"] = holder
    modules = {f"{n}.{at}": m for n, h in named_holders.items() for at, m in _modules(h).items()}
    copies = {n: m for n, m in modules.items() if chosen.isdisjoint(m.parameters())}
    for whole in wholes:
        named, every = dict(whole.named_parameters()), list(whole.parameters())
        for place, copy in copies.items():
            yield place, _by_name(named, dict(copy.named_parameters()))
        for order in (every, [p for p in every if p.requires_grad]):
            for place, owner in modules.items():
                yield place, _in_order(order, list(owner.buffers(recurse=False)))
            for name, holder in named_holders.items():
                for at, tensors in _collections(holder):
                    if isinstance(tensors, Mapping):
                        yield f"{name}{at}", [(p, tensors[n]) for n, p in named.items() if _fits(p, tensors.get(n))]
                    else:
                        yield f"{name}{at}", _in_order(order, tensors)


def _by_name(named: Mapping[str, nn.Parameter], copy: Mapping[str, Tensor]) -> Pairs:
    """Returns pairs with the parameters of a copy, if all names and shapes are the same."""
    if named.keys() != copy.keys() or not all(_fits(p, copy[n]) for n, p in named.items()):
        return []
    return [(p, copy[n]) for n, p in named.items()]


def _in_order(parameters: Sequence[nn.Parameter], tensors: Sequence[Any]) -> Pairs:
    if len(parameters) != len(tensors) or not all(map(_fits, parameters, tensors)):
        return []
    return list(zip(parameters, tensors, strict=True))


def _fits(parameter: nn.Parameter, value: Any) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _modules(holder: Any) -> dict[str, nn.Module]:
    """Returns the submodules of a module, or of modules among the attributes of another object and of its parts."""
    if isinstance(holder, nn.Module):
        return dict(holder.named_modules())
    own = dict(vars(holder))
    for name, value in vars(holder).items():
        if not isinstance(value, (nn.Module, type)):
            own.update({f"{name}.{n}": v for n, v in getattr(value, "__dict__", {}).items()})
    return {f"{n}.{at}": m for n, v in own.items() if isinstance(v, nn.Module) for at, m in v.named_modules()}


def _collections(holder: Any, at: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yields lists and dicts among the attributes of an object and of its parts, and those inside them."""
    for name, value in list(getattr(holder, "__dict__", {}).items()):
        place = f"{at}.{name}"
        if isinstance(value, (list, tuple, Mapping)):
            yield place, value
            inside = value.items() if isinstance(value, Mapping) else enumerate(value)
            yield from [(f"{place}[{k!r}]", v) for k, v in inside if isinstance(v, (list, tuple, Mapping))]
        elif depth == 0 and not isinstance(value, (nn.Module, Tensor, type)):
            yield from _collections(value, place, depth + 1)
