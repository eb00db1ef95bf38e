"""Tests that a potential can be trained with pipelines, replicas and graph ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

from lightning_januspipe.loader.sample_fields import sample_cost
from lightning_januspipe.testing.interpreted import train_interpreted
from lightning_januspipe.testing.parity import compare_records
from lightning_januspipe.testing.pool import RankPool
from lightning_januspipe.testing.runs import RunRecord, train_in_pipeline, train_reference

_SIZES = ("pipeline_size", "data_size", "graph_size")
_REFERENCE = ("data_size", "num_microbatches", "balance")
"""The arguments of the strategy on which the plain Trainer's run depends."""


class PotentialConformance:
    """Tests that a LightningModule trains on every mesh of ranks as it does under a plain Trainer.

    Inherit this class in a test file, name what makes the module and its data, and run pytest. Each test trains a few
    steps on one kind of structures with one strategy, and compares losses, the gradients of all parameters, and the
    trained parameters with those of a plain Trainer, at 1e-9 in float64: in one process, or for replicas in as many
    processes under Lightning's DDP.

    The factories run in other processes: define them at the top level of a file that can be imported. They have to make
    the same module and data at every call.

    Attributes:
        make_module: Makes the LightningModule, in float64, with seeded parameters.
        datamodules: Functions that make a LightningDataModule, by the kind of its structures. Give a periodic kind
            and a molecular kind, as far as the model takes both. Batches need at least four structures of unequal
            sizes, and the training data two such batches for each of two replicas.
        strategies: Arguments of :class:`~lightning_januspipe.JanusPipeStrategy`, by a name for each test. Mesh sizes
            are 1 where they are left out; ``num_microbatches`` has to be there. Add strategies with
            ``{**PotentialConformance.strategies, "three-stages": {"pipeline_size": 3, "num_microbatches": 4}}``.
        interprets: Runs the phases of strategies with ``compile=True`` operation by operation, which tests the same
            graphs without the minutes that compiling takes. False compiles them.
        eager_reason: A part of the reason for which no stage of this model can be compiled; with it, stages have to run
            eagerly with ``compile=True``, and without it, they must not.
        steps: Optimizer steps of each run.
        rtol: The largest difference, relative to the largest entry of the same tensor.
        trainer: Further arguments of the Trainers, such as ``{"gradient_clip_val": 1.0}``.
        preload: Modules to import once for all ranks, which then start within a fraction of a second (see
            :class:`~lightning_januspipe.testing.RankPool`).
        timeout: Seconds that one run may take.
        pool: The processes to use; by default the class starts its own, and ends them.

    Example:
        >>> class TestMyPotential(PotentialConformance):
        ...     make_module = my_package.factories.make_module
        ...     datamodules = {"crystals": my_package.factories.crystals, "molecules": my_package.factories.molecules}
    """

    make_module: ClassVar[Callable[[], Any]]
    datamodules: ClassVar[Mapping[str, Callable[[], Any]]]
    strategies: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "one-stage": {"num_microbatches": 1},
        "one-stage-4-microbatches": {"num_microbatches": 4},
        "two-stages": {"pipeline_size": 2, "num_microbatches": 1},
        "two-stages-4-microbatches": {"pipeline_size": 2, "num_microbatches": 4},
        "two-replicas": {"data_size": 2, "num_microbatches": 2},
        "two-graph-ranks": {"graph_size": 2, "num_microbatches": 1},
        "two-stages-of-two-graph-ranks": {"pipeline_size": 2, "graph_size": 2, "num_microbatches": 4},
        "one-stage-compiled": {"num_microbatches": 1, "compile": True},
        "two-stages-compiled": {"pipeline_size": 2, "num_microbatches": 4, "compile": True},
    }
    interprets: ClassVar[bool] = True
    eager_reason: ClassVar[str] = ""
    steps: ClassVar[int] = 2
    rtol: ClassVar[float] = 1e-9
    trainer: ClassVar[Mapping[str, Any]] = {}
    preload: ClassVar[Sequence[str] | None] = None
    timeout: ClassVar[float] = 300.0
    pool: ClassVar[RankPool | None] = None

    _own_pool: ClassVar[RankPool | None] = None
    _references: ClassVar[dict[tuple[Any, ...], RunRecord]]

    def pytest_generate_tests(self, metafunc: Any) -> None:
        """Makes one test for each kind of structures and each strategy; pytest calls it."""
        cls = type(self)
        for name in ("make_module", "datamodules"):
            if not getattr(cls, name, None):
                raise ValueError(f"{cls.__name__} has no {name}; see {PotentialConformance.__name__} for what it is")
        for name, strategy in cls.strategies.items():
            if "num_microbatches" not in strategy:
                raise ValueError(f"{cls.__name__}.strategies[{name!r}] = {dict(strategy)} has no num_microbatches")
        for argument, names in (("structures", cls.datamodules), ("strategy", cls.strategies)):
            if argument in metafunc.fixturenames:
                metafunc.parametrize(argument, list(names))

    @classmethod
    def setup_class(cls) -> None:
        """Forgets the runs of a class that this one inherits from; pytest calls it."""
        cls._references = {}

    @classmethod
    def teardown_class(cls) -> None:
        """Ends the processes that the class has started; pytest calls it."""
        if cls._own_pool is not None:
            cls._own_pool.close()
            cls._own_pool = None

    @classmethod
    def _ranks(cls) -> RankPool:
        if cls.pool is not None:
            return cls.pool
        if cls._own_pool is None:
            cls._own_pool = RankPool(max(_devices(_complete(s)) for s in cls.strategies.values()), cls.preload)
        return cls._own_pool

    def test_structures_differ_in_size(self, structures: str) -> None:
        """Checks the data: faults with micro-batches of unequal sizes show only where sizes are unequal."""
        (costs,) = self._run(1, _costs, type(self).datamodules[structures])
        assert len(set(costs)) > 1, (
            f"all {len(costs)} structures of {type(self).__name__}.datamodules[{structures!r}] are equally large: take "
            "structures with unequal numbers of atoms or edges"
        )

    def test_trains_as_plain_lightning(self, structures: str, strategy: str) -> None:
        """Compares losses, gradients and parameters with those of a plain Trainer."""
        cls = type(self)
        arguments = _complete(cls.strategies[strategy])
        devices = _devices(arguments)
        is_compiled = bool(arguments.get("compile"))
        train = train_interpreted if is_compiled and cls.interprets else train_in_pipeline
        try:
            found = self._run(devices, train, *self._run_of(structures, arguments))
            compare_records(self._reference(structures, arguments), found, cls.rtol)
        except AssertionError as error:
            raise AssertionError(
                f"{cls.__name__} on {structures}: JanusPipeStrategy({_written(arguments)}) on {devices} rank(s) does "
                f"not train as a plain Trainer does: {error}"
            ) from None
        if is_compiled:
            self._require_compiled([reason for record in found for reason in record.eager])
            num = len(found[0].losses) * arguments["num_microbatches"]
            assert max(record.num_misfits for record in found) < num, (
                f"{cls.__name__} on {structures}: all {num} micro-batches ran eagerly in a compiled stage, whose "
                "graphs are right for other sizes only, so that nothing was tested: give structures of more sizes"
            )

    def _require_compiled(self, reasons: Sequence[str]) -> None:
        """Compares the reasons for which stages ran eagerly with the reason that the class gives."""
        name, expected = type(self).__name__, type(self).eager_reason
        if not expected:
            assert not reasons, (
                f"{name}: not all stages could be compiled: {'; '.join(reasons)}. If nothing can be done about it, set "
                f"{name}.eager_reason to a part of that"
            )
        else:
            assert reasons, f"{name}: all stages could be compiled, though eager_reason = {expected!r}: remove it"
            others = [reason for reason in reasons if expected not in reason]
            assert not others, f"{name}: expected that stages run eagerly for {expected!r}: {'; '.join(others)}"

    def _reference(self, structures: str, arguments: Mapping[str, Any]) -> RunRecord:
        """Returns the record of a plain Trainer, which runs once for all strategies of the same micro-batches."""
        needed = _complete({name: arguments[name] for name in _REFERENCE if name in arguments})
        key = (structures, *sorted(needed.items()))
        if key not in self._references:
            run = self._run_of(structures, needed)
            replicas = _devices(needed)
            self._references[key] = self._run(replicas, train_reference, *run, replicas)[0]
        return self._references[key]

    def _run(self, num_ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        return self._ranks().run(function, *arguments, world_size=num_ranks, timeout=type(self).timeout)

    def _run_of(self, structures: str, arguments: Mapping[str, Any]) -> tuple[Any, ...]:
        cls = type(self)
        return cls.make_module, cls.datamodules[structures], dict(arguments), cls.steps, dict(cls.trainer)


def _complete(strategy: Mapping[str, Any]) -> dict[str, Any]:
    return {**dict.fromkeys(_SIZES, 1), **strategy}


def _devices(arguments: Mapping[str, Any]) -> int:
    return int(arguments["pipeline_size"] * arguments["data_size"] * arguments["graph_size"])


def _written(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def _costs(datamodule_factory: Callable[[], Any]) -> list[float]:
    """Returns how much work each structure of the training data is."""
    data = datamodule_factory()
    data.prepare_data()
    data.setup("fit")
    dataset = data.train_dataloader().dataset
    return [sample_cost(dataset[index]) for index in range(len(dataset))]
