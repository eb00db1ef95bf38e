"""Defines the arguments of the strategy, as one dataclass that validates itself and explains itself on command lines.

A field is all that a new argument needs: values are validated by the field's type, and command lines print its
docstring. If an error needs more words than the type has, ``metadata["expected"]`` has them.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import itertools
import textwrap
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass, field, fields
from datetime import timedelta
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from lightning_januspipe.capture import StageOrigin
from lightning_januspipe.graph.half_rows import ExchangeDtype
from lightning_januspipe.loader.replica_balance import Balance
from lightning_januspipe.mesh import Size
from lightning_januspipe.runtime.pipeline import ExpertOrder, MessageDtype
from lightning_januspipe.runtime.planner import is_searched, is_unfolded
from lightning_januspipe.schedule.build_schedule import ScheduleName
from lightning_januspipe.schedule.state_actions import ShardLevel

_Constructor = TypeVar("_Constructor", bound=Callable[..., None])


@dataclass(frozen=True)
class StrategyOptions:
    """Holds the arguments of the strategy. Integers have to be at least 1, other numbers positive.

    Raises:
        ValueError: A value is of another type or out of its range.
    """

    pipeline_size: Size = "auto"
    """Number of ranks in a pipeline, each with a share of the layers. "auto": the number of processes over
    data_size × graph_size."""

    data_size: Size = "auto"
    """Number of replicas of the pipeline, each with batches of its own. "auto": 1 if pipeline_size is "auto" too, else
    the number of processes over pipeline_size × graph_size."""

    graph_size: int = 1
    """Number of ranks that share the atoms of each micro-batch, for structures that do not fit into one rank's memory.
    More than 1 needs a potential that can be traced, or parts that call ``with_halo``."""

    num_microbatches: Size = "auto"
    """Number of micro-batches that each batch is split into; a batch with fewer samples has fewer. The gradient is that
    of gradient accumulation over the micro-batches. "auto": twice pipeline_size, and 1 without a pipeline."""

    schedule: ScheduleName = "wavek-zb"
    """Order of the phases. "wavek-zb" is the fastest, "wavek" is the paper's; "1f1b-fold" and "gpipe" are simpler;
    "1f1b-2nd" and "hanayo-2nd" are unfolded baselines to compare with."""

    wave_size: Size = "auto"
    """Number of micro-batches in a wave of "wavek" and "wavek-zb", which is also the most that a rank holds at once:
    fewer take less memory and more time. "auto": up to twice pipeline_size."""

    potential: str | None = None
    """Dotted name of the submodule that differentiates the energy, such as "model.potential". None: the strategy finds
    it."""

    compile: bool | Literal["auto"] = field(default=False, metadata={"expected": "True, False or 'auto'"})
    """Whether to compile the phases of stages with torch's inductor when training starts, which takes minutes for a new
    model. "auto": training begins with eager phases, other processes of low priority compile, and all ranks change over
    between the same two steps; nothing is compiled if training is too short to pay for it. In one process and in
    replicas without a pipeline the potential is captured then too. Stages that cannot be compiled run eagerly, and the
    start line says why."""

    activation: Literal["auto", "keep", "pointwise", "recompute", "offload"] = "auto"
    """Which tensors of a micro-batch are kept between its phases. "keep" keeps all that later phases need, "pointwise"
    computes cheap operations again, in compiled phases only, and "recompute" keeps only what stages send each other
    (compiled, also what graph ranks do). "offload" keeps these tensors in the host's memory, from which they come back
    while the action before the one that reads them runs. "auto": "pointwise" in compiled phases, "keep" in eager ones,
    and with memory_limit "recompute", or on GPUs "offload", for stages where that is the faster way to keep within
    it."""

    shard: ShardLevel | Literal["auto"] = "auto"
    """What the ranks that hold the same stages (replicas and graph ranks) share, instead of holding all of it each.
    "optimizer": each has the reduced gradients and the optimizer state of its part of the parameters. "parameters":
    each also keeps this part of the parameters only, and they are gathered for each step. "none": nothing is shared.
    "auto": "none", and with memory_limit the fastest of these that keeps within it."""

    expert_size: int = 1
    """Number of ranks, among those that hold the same stages (data_size × graph_size), that share the experts of these
    stages: each holds the parameters, gradients and optimizer state of its own experts, to which rows of atoms and
    edges travel. It needs weights that only grouped_linear reads, as ElementExperts has them. 1: all ranks hold all
    experts."""

    expert_placement: ExpertOrder = "order"
    """Which experts a rank has with expert_size > 1. "order": consecutive ones. "load": those with which the ranks get
    about equal numbers of rows, by the steps so far and the one to come; experts move, with their optimizer state, as
    soon as rows that wait for another rank have cost as much as the move. "replicate": those of "load", and where this
    costs less than it saves, experts with many rows are also on other ranks for one step, which share their rows."""

    save_distributed_checkpoint: bool = False
    """Whether to save checkpoints as folders of torch.distributed.checkpoint, into which each rank writes its part,
    instead of single files. Either kind is loaded, whatever the value."""

    process_group_backend: str | None = None
    """Backend of torch.distributed, such as "nccl" or "gloo". None: the default of the device."""

    timeout: timedelta | float = field(
        default=timedelta(minutes=30), metadata={"expected": "a time > 0, in seconds or as a timedelta"}
    )
    """How long a rank waits for another one, in messages, collectives and checkpoints, in seconds or as
    hours:minutes:seconds (in Python, a timedelta). It has to be longer than the capture of the potential, the writing
    of a checkpoint, and whatever else one rank does alone."""

    memory_limit: float | None = field(default=None, metadata={"expected": "a number of bytes > 0, or None"})
    """The most bytes that parameters, gradients, optimizer state and saved tensors of micro-batches may take on a rank,
    between phases. To keep within it "wavek" and "wavek-zb" hold fewer micro-batches, activation="auto" keeps less of
    them, and with shard="auto" ranks share their state; the fastest way is taken, by the measured times and bytes of
    the stages. In one process and in replicas without a pipeline the potential is captured then too. None: no limit."""

    stages: StageOrigin = "auto"
    """Where the stages come from: "captured" traces the potential, "explicit" takes the stages that the potential
    declares as lightning_januspipe.ExplicitStages. "auto": the first of these that works."""

    message_dtype: MessageDtype | None = None
    """"bf16" rounds the features that stages send each other, and the gradients of these features, to bfloat16 on the
    way: half the bytes of float32, and parameter gradients with a relative error of 1e-3 to 1e-2 (januspipe bench
    messages measures it). Energies and forces are never rounded. None: nothing is rounded."""

    exchange_dtype: ExchangeDtype | None = None
    """"fp16" or "bf16" rounds the rows of atoms and edges that graph ranks and ranks with experts send each other, and
    the gradients of these rows, on the way, with one scale for each type of atoms: half the bytes of float32. Energies
    and forces follow from rounded rows, in training and in validation; januspipe bench exchanges measures the error of
    the parameter gradient. None: nothing is rounded."""

    balance: Balance = "auto"
    """Which samples may share a micro-batch: "microbatches" balances the micro-batches of each replica; "replicas"
    deals the samples of all replicas' batches anew, so that no replica waits for one with more work. "auto": "replicas"
    if the dataset knows the costs of its samples, else "microbatches"."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for option in fields(self):
            value = getattr(self, option.name)
            if not _is_valid(value, hints[option.name]):
                raise ValueError(f"{option.name}={value!r}; expected {_expected(value, option, hints[option.name])}")
        self._check_compile()
        self._check_experts()
        self._check_exchanges()
        if self.wave_size != "auto" and not is_searched(self.schedule):
            warnings.warn(
                f"wave_size={self.wave_size} has no effect: schedule={self.schedule!r} has no waves", stacklevel=5
            )

    def _check_experts(self) -> None:
        if self.expert_size == 1:
            if self.expert_placement != "order":
                raise ValueError(
                    f"expert_placement={self.expert_placement!r} needs ranks that share experts, but expert_size=1 "
                    "leaves all experts on every rank. Use expert_size=2 or more, or expert_placement='order'."
                )
            return
        if self.stages == "explicit":
            raise ValueError(
                f"expert_size={self.expert_size} is not available with stages='explicit': exchanges of rows are put "
                "into captured stages only. Use stages='captured', or expert_size=1."
            )

    def _check_exchanges(self) -> None:
        if self.exchange_dtype is None:
            return
        if self.graph_size == self.expert_size == 1:
            raise ValueError(
                f"exchange_dtype={self.exchange_dtype!r}, but with graph_size=1 and expert_size=1 no rows travel "
                "between ranks. Leave it out; message_dtype rounds what the stages of a pipeline send each other."
            )

    def _check_compile(self) -> None:
        if not self.compile and self.activation == "pointwise":
            raise ValueError(
                "activation='pointwise' needs compile=True: eager phases keep all tensors, or boundaries only. Use "
                "compile=True, or activation='keep', 'recompute' or 'offload'."
            )
        if self.activation in ("recompute", "offload") and is_unfolded(self.schedule):
            raise ValueError(
                f"activation={self.activation!r} is not available with schedule={self.schedule!r}, which runs the "
                "phases of a stage on two ranks. Use a folded schedule, such as 'wavek-zb', or activation='keep'."
            )
        if self.compile is True and is_unfolded(self.schedule):
            raise ValueError(
                f"compile=True is not available with schedule={self.schedule!r}, which runs the phases of a stage on "
                "two ranks. Use a folded schedule, such as 'wavek-zb', or compile=False."
            )

    @property
    def message_timeout(self) -> timedelta:
        """Returns the timeout of messages as a timedelta."""
        return self.timeout if isinstance(self.timeout, timedelta) else timedelta(seconds=self.timeout)


def _is_valid(value: Any, hint: Any) -> bool:
    """Returns whether a value has a type, and is in the range of that type."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_is_valid(value, choice) for choice in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if hint in (int, float):
        is_number = isinstance(value, int if hint is int else (int, float)) and not isinstance(value, bool)
        return is_number and value > 0
    return isinstance(value, hint) and (hint is not timedelta or value > timedelta(0))


def _expected(value: Any, option: Field[Any], hint: Any) -> str:
    """Returns the valid values of an option in words, with the one that was probably meant."""
    if "expected" in option.metadata:
        return str(option.metadata["expected"])
    words: list[str] = []
    names: list[str] = []
    for choice in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        if get_origin(choice) is Literal:
            names += get_args(choice)
            words += map(repr, get_args(choice))
        else:
            words.append({int: "a positive integer", str: "a string", bool: "True or False"}.get(choice, "None"))
    listed = words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
    return listed + _did_you_mean(str(value), names)


def _did_you_mean(given: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def options_of(*args: Any, **kwargs: Any) -> StrategyOptions:
    """Returns the options that a strategy was given.

    Raises:
        TypeError: An argument has no such name.
        ValueError: An argument is of another type or out of its range.
    """
    known = [option.name for option in fields(StrategyOptions)]
    for name in kwargs.keys() - known:
        raise TypeError(f"JanusPipeStrategy has no argument {name!r}{_did_you_mean(name, known)}")
    return StrategyOptions(*args, **kwargs)


def takes_options(constructor: _Constructor) -> _Constructor:
    """Gives a constructor the signature of :class:`StrategyOptions`, for command lines and editors."""
    first = list(inspect.signature(constructor).parameters.values())[:1]
    options = inspect.signature(StrategyOptions, eval_str=True).parameters.values()
    vars(constructor)["__signature__"] = inspect.Signature([*first, *options])
    return constructor


def arguments_section() -> str:
    """Returns the ``Args:`` section of the strategy's docstring, made of the docstrings under the fields."""
    try:
        source = textwrap.dedent(inspect.getsource(StrategyOptions))
    except OSError:  # a Python without source files has no help texts
        return ""
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    lines = ["Args:"]
    for option, text in itertools.pairwise(definition.body):
        if isinstance(option, ast.AnnAssign):
            assert isinstance(option.target, ast.Name) and isinstance(text, ast.Expr)
            lines.append(f"    {option.target.id}: {' '.join(ast.literal_eval(text.value).split())}")
    return "\n".join(lines)
