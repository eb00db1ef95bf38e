"""Helps NequIP 0.19, and packages built on it, through capture: keeps models from compiling themselves.

With ``compile_mode: compile`` a model traces and compiles itself for minutes when it is first called, and calls
``torch.autograd.grad`` while it does. The stages of a pipeline do not run what it compiles.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

from torch import nn

from lightning_januspipe.capture.adapters.capture_adapter import Adapter
from lightning_januspipe.capture.patches import patched


class NequIPAdapter(Adapter):
    """Adapts ``nequip.nn.CompileGraphModel``, which is a ``GraphModel`` with the same parameters."""

    def capturing(self, module: nn.Module) -> AbstractContextManager[None]:
        """Returns a context in which every model runs the forward of ``GraphModel``."""
        return _not_compiled(module)


@contextmanager
def _not_compiled(module: nn.Module) -> Iterator[None]:
    from nequip.nn import GraphModel

    with ExitStack() as stack:
        for part in module.modules():
            if getattr(part, "is_compile_graph_model", False):
                stack.enter_context(patched(part, "forward", partial(GraphModel.forward, part)))
        yield
