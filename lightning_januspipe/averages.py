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

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

Followers = list[tuple[nn.Parameter, Tensor]]


def followers(module: nn.Module, holders: Sequence[object], trained: Collection[nn.Parameter]) -> Followers:
    """Tensors that follow parameters, each with its parameter.

    Args:
        module: the LightningModule.
        holders: objects beside it that may hold averages, such as callbacks.
        trained: parameters that only some ranks train.
    """
    chosen = set(trained)
    if not chosen:
        return []
    wholes = [m for m in module.modules() if chosen <= set(m.parameters())]
    found: dict[int, tuple[nn.Parameter, Tensor]] = {}
    for pairs in _pairs(wholes, [module, *holders], chosen):
        for parameter, tensor in pairs:
            if parameter in chosen and tensor not in chosen:
                found.setdefault(id(tensor), (parameter, tensor))
    return list(found.values())


def _pairs(wholes: list[nn.Module], holders: list[Any], chosen: set[nn.Parameter]) -> Iterator[Followers]:
    modules = [m for h in holders for m in _modules(h)]
    copies = [m for m in modules if chosen.isdisjoint(m.parameters())]
    for whole in wholes:
        named, every = dict(whole.named_parameters()), list(whole.parameters())
        for copy in copies:
            yield _by_name(named, dict(copy.named_parameters()))
        for order in (every, [p for p in every if p.requires_grad]):
            for owner in modules:
                yield _in_order(order, list(owner.buffers(recurse=False)))
            for holder in holders:
                for tensors in _collections(holder):
                    if isinstance(tensors, Mapping):
                        yield [(p, tensors[n]) for n, p in named.items() if _fits(p, tensors.get(n))]
                    else:
                        yield _in_order(order, tensors)


def _by_name(named: Mapping[str, nn.Parameter], copy: Mapping[str, Tensor]) -> Followers:
    """The parameters of a copy, if all names and shapes are the same."""
    if named.keys() != copy.keys() or not all(_fits(p, copy[n]) for n, p in named.items()):
        return []
    return [(p, copy[n]) for n, p in named.items()]


def _in_order(parameters: Sequence[nn.Parameter], tensors: Sequence[Any]) -> Followers:
    if len(parameters) != len(tensors) or not all(map(_fits, parameters, tensors)):
        return []
    return list(zip(parameters, tensors, strict=True))


def _fits(parameter: nn.Parameter, value: Any) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape


def _modules(holder: Any) -> Iterable[nn.Module]:
    """Submodules of a module, or modules that are attributes of another object, with theirs."""
    own = [holder] if isinstance(holder, nn.Module) else [v for v in vars(holder).values() if isinstance(v, nn.Module)]
    return dict.fromkeys(m for o in own for m in o.modules())


def _collections(holder: Any, depth: int = 0) -> Iterator[Any]:
    """Lists and dicts among the attributes of an object, and of objects that it holds."""
    for value in list(getattr(holder, "__dict__", {}).values()):
        if isinstance(value, (list, tuple, Mapping)):
            yield value
        elif depth == 0 and not isinstance(value, (nn.Module, Tensor, type)):
            yield from _collections(value, depth + 1)
