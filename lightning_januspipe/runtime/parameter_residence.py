"""Parameters of other stages leave a rank's memory, if the module is made in ``configure_model``.

A rank's stages are known only after capture, for which the first rank needs the whole module on its device. The other
ranks keep it in host memory until then, or on the meta device, if it was made there. Afterwards a rank has on its
device the parameters that it trains and the parameters that several ranks train; the others are on the meta device,
with names, shapes and identity, but without values.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_januspipe.distributed import waiting
from lightning_januspipe.mesh import Mesh
from lightning_januspipe.runtime.initial_values import give_values, make_room, take_values
from lightning_januspipe.runtime.paged_parameters import ParameterFile
from lightning_januspipe.runtime.parameters import PlacedParameters

_COPYING = "copying of parameters between stages"


class ParameterResidence:
    """Moves the parameters of a module between a rank's device, its host memory and the meta device.

    Args:
        module: The LightningModule, the same on all ranks.
        mesh: This rank's process groups.
        absent: Names of the parameters that are on the meta device on some ranks other than the first, which has all
            values; the same on all ranks.
        is_paged: Whether the first rank has these values in a file instead of memory; the same on all ranks.
        file: This file, on the first rank.

    Attributes:
        absent: These parameters.
        is_paged: See above.
    """

    def __init__(
        self,
        module: nn.Module,
        mesh: Mesh,
        absent: Collection[str] = (),
        is_paged: bool = False,
        file: ParameterFile | None = None,
    ) -> None:
        self._module, self._mesh, self.is_paged, self._file = module, mesh, is_paged, file
        self.absent = [p for n, p in module.named_parameters() if n in absent]
        self._gone: dict[nn.Parameter, int] = {}
        self._stale: dict[nn.Parameter, int] = {}
        self._is_released = False

    @property
    def is_partial(self) -> bool:
        """Tells whether parameters were freed, here or on other ranks of the pipeline."""
        return self._is_released and bool(self._gone)

    def wait_for_stages(self) -> None:
        """Moves the module to the device, but its parameters on the first rank only, unless they are in a file."""
        device = self._mesh.device
        if self._mesh.rank == 0 and not self.is_paged:
            self._module.to(device)
        else:
            make_room(self._module.buffers(), device)
            self._module._apply(lambda t: t if isinstance(t, nn.Parameter) else t.to(device))

    def place(self, parameters: PlacedParameters) -> None:
        """Moves the parameters that this rank's stages and the steps read to its device; the others stay."""
        self._fill_absent(parameters)
        ranks = parameters.ranks_of
        # Gradients of a parameter with several holders are summed over all ranks.
        self._gone = {p: parameters.owner(p) for p in self._module.parameters() if len(ranks[p]) == 1}
        # Ranks that do not hold such a parameter have its values of before training.
        self._stale = {p: parameters.owner(p) for p in parameters.partly_held() if p not in self._gone}
        for parameter in self._module.parameters():
            if _is_needed(parameters, parameter):
                parameter.data = parameter.data.to(self._mesh.device)
            elif self._mesh.rank != 0 and not parameter.is_meta:
                parameter.data = parameter.data.cpu()

    def _fill_absent(self, parameters: PlacedParameters) -> None:
        """Sends absent parameters from global rank 0 to the ranks that need them, one after the other."""
        if not self.absent:
            return
        wanted = [i for i, p in enumerate(self.absent) if p.is_meta and _is_needed(parameters, p)]
        of_ranks = self._mesh.gathered(wanted, "agreement on the parameters of stages")
        for index in sorted({i for of_rank in of_ranks for i in of_rank}):
            parameter = self.absent[index]
            device = self._mesh.device
            if self._mesh.rank == 0:
                values = self._values(parameter).to(device).contiguous()
            else:
                values = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            with waiting("copying of parameters from global rank 0"):
                dist.broadcast(values, 0)
            if index in wanted:
                give_values(parameter, values)

    def _values(self, parameter: nn.Parameter) -> Tensor:
        """Returns the values of a parameter on the first rank."""
        if not parameter.is_meta:
            return parameter.detach()
        assert self._file is not None
        return self._file.values(parameter)

    def release(self, parameters: PlacedParameters) -> None:
        """Frees the parameters of other stages."""
        self._is_released = True
        for parameter in self._gone:
            if not parameters.holds(parameter):
                parameter.grad = None
                take_values(parameter)

    def restore(self) -> None:
        """Brings all parameters back, those of other stages into host memory; every rank of a pipeline takes part.

        If the module was made on the meta device, only global rank 0 gets those of other stages, if need be into its
        file.
        """
        self._fetch(keep=not self.absent or self._mesh.rank == 0, file=self._file)
        self._gone, self._stale, self._is_released = {}, {}, False

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Fetches the values of all parameters to the device inside; every rank of a pipeline takes part."""
        fetched = self._fetch(keep=True, on_device=True)
        try:
            yield
        finally:
            _forget(fetched)

    @contextmanager
    def whole_on_first_rank(self) -> Iterator[None]:
        """Gives global rank 0 the values of all parameters, in host memory, until the ``with`` block ends.

        Tensors that were taken from the parameters inside the block stay valid after it.
        """
        fetched = self._fetch(keep=self._mesh.rank == 0) if self._mesh.data_rank == 0 else []
        try:
            yield
        finally:
            _forget(fetched)

    def _fetch(
        self, keep: bool, on_device: bool = False, file: ParameterFile | None = None
    ) -> list[tuple[nn.Parameter, Tensor]]:
        """Returns the parameters that were elsewhere, on the meta device or in host memory, as they were there."""
        fetched = []
        for parameter, owner in self._stale.items():
            values = parameter.detach().contiguous()
            with waiting(_COPYING, self._mesh.pipeline_group):
                dist.broadcast(values, self._mesh.pipeline_ranks[owner], group=self._mesh.pipeline_group)
            parameter.data.copy_(values)
        for parameter, owner in self._gone.items():
            is_elsewhere = parameter.device.type != self._mesh.device.type
            buffer = torch.empty_like(parameter, device=self._mesh.device) if is_elsewhere else parameter.data
            buffer = buffer.detach().contiguous()
            with waiting(_COPYING, self._mesh.pipeline_group):
                dist.broadcast(buffer, self._mesh.pipeline_ranks[owner], group=self._mesh.pipeline_group)
            if parameter.is_meta and file is not None:
                file.write(parameter, buffer)
            elif is_elsewhere and keep:
                fetched.append((parameter, parameter.data))
                give_values(parameter, buffer if on_device else buffer.cpu())
        return fetched

    def leave_device(self) -> None:
        """Moves what there is to host memory; what is on the meta device stays there."""
        self._module._apply(lambda t: t if t.is_meta else t.cpu())


def _is_needed(parameters: PlacedParameters, parameter: nn.Parameter) -> bool:
    return parameters.holds(parameter) or len(parameters.ranks_of[parameter]) > 1


def _forget(fetched: list[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, before in fetched:
        give_values(parameter, before)
