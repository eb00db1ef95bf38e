"""Makes stages whose phase graphs run operation by operation, to measure what each activation keeps and costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from lightning_januspipe.compiled.compiler import StageCompiler
from lightning_januspipe.compiled.joint import Joint
from lightning_januspipe.compiled.minimum_cut import Activation

_Sizes = tuple[Mapping[str, int], Mapping[str, int]]


def interpreted_factories(
    activations: Sequence[Activation], device: str, defer: bool
) -> dict[str, Callable[[_Sizes], StageCompiler]]:
    """Returns for each activation what makes its stages, which are traced once for all of them.

    A stage that cannot be traced runs eagerly, as it will in training.

    Args:
        activations: what stages keep, the fastest first.
        device: type of the device that the stages run on.
        defer: leave what only parameters wait for to WF and WE.
    """
    joints: dict[int, Joint] = {}
    return {
        name: partial(StageCompiler, device=device, activation=name, defer=defer, interprets=True, joints=joints)
        for name in activations
    }
