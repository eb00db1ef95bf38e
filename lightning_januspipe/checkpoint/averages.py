"""Tensors that follow the parameters of a module one by one: exponential averages, and weights put aside meanwhile.

A rank of a pipeline trains its own stages' parameters, so an average that it keeps is right for these alone. Before the
averages are saved, each of their tensors comes from a rank that trains its parameter, as the parameter itself does.

Nobody has to declare averages. A tensor that is no trained parameter is taken for one that follows it, if it is

- in a submodule that is a copy of the module or of a part with the whole potential (as ``AveragedModel`` makes it),
- in a list as long as all parameters of such a part (as NequIP's buffers and the lists of ``torch_ema`` are),
- or in a dict under the parameter's name,

on the LightningModule or on a callback. What is taken for one by mistake is not changed: it is the same on all ranks of
a pipeline, because they compute the same steps.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

Pairs = list[tuple[nn.Parameter, Tensor]]
Place = tuple[str, str]
"""Where a tensor is held, and the name of the parameter that it follows: the same on every rank."""


def followers(
    module: nn.Module, holders: Sequence[object], trained: Collection[nn.Parameter]
) -> dict[Place, tuple[nn.Parameter, Tensor]]:
    """Tensors that follow parameters, each with its parameter.

    Args:
        module: the LightningModule.
        holders: objects beside it that may hold averages, such as callbacks.
        trained: parameters that only some ranks train.
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
    """The places that all ranks have.

    What each rank holds of its own parameters alone, such as their gradients, is no average.

    Args:
        of_ranks: the places that each rank of a pipeline found.
        num_trained: how many parameters only some ranks train; tensors for all of these at one place are an average,
            and a warning says so where a rank has none there.
    """
    held = [Counter(place for place, _ in places) for places in of_ranks]
    whole = {place for counts in held for place, num in counts.items() if num == num_trained}
    alone = sorted(place for place in whole if not all(place in counts for counts in held))
    if alone:
        warnings.warn(
            f"only some ranks of the pipeline keep an average (or another copy) of the parameters: {', '.join(alone)}. "
            "There it follows the parameters of these ranks' stages alone. Keep it on every rank: without "
            "rank_zero_only, and without a condition on the rank.",
            stacklevel=2,
        )
    return set.intersection(*map(set, of_ranks))


def _pairs(wholes: list[nn.Module], holders: list[Any], chosen: set[nn.Parameter]) -> Iterator[tuple[str, Pairs]]:
    """Places, and pairs of parameters and tensors there."""
    named_holders: dict[str, Any] = {}
    for holder in holders:  # by class and number, as some ranks may have a callback more
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
    """The parameters of a copy, if all names and shapes are the same."""
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
    """Submodules of a module, or modules that are attributes of another object or of what it holds, with theirs."""
    if isinstance(holder, nn.Module):
        return dict(holder.named_modules())
    own = dict(vars(holder))
    for name, value in vars(holder).items():
        if not isinstance(value, (nn.Module, type)):
            own.update({f"{name}.{n}": v for n, v in getattr(value, "__dict__", {}).items()})
    return {f"{n}.{at}": m for n, v in own.items() if isinstance(v, nn.Module) for at, m in v.named_modules()}


def _collections(holder: Any, at: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Lists and dicts among the attributes of an object, and of objects that it holds, and those inside these."""
    for name, value in list(getattr(holder, "__dict__", {}).items()):
        place = f"{at}.{name}"
        if isinstance(value, (list, tuple, Mapping)):
            yield place, value
            inside = value.items() if isinstance(value, Mapping) else enumerate(value)
            yield from [(f"{place}[{k!r}]", v) for k, v in inside if isinstance(v, (list, tuple, Mapping))]
        elif depth == 0 and not isinstance(value, (nn.Module, Tensor, type)):
            yield from _collections(value, place, depth + 1)
