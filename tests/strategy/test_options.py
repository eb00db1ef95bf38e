"""The arguments of the strategy: validated at once, explained on command lines, the same for every Lightning."""

from __future__ import annotations

import inspect
import re
import warnings
from dataclasses import fields
from datetime import timedelta

import pytest
import torch

import lightning_januspipe
from lightning_januspipe.strategy.options import StrategyOptions, arguments_section
from lightning_januspipe.strategy.registry import NAMESPACES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pipeline_size": 0}, "pipeline_size=0; expected a positive integer or 'auto'"),
        ({"data_size": 1.5}, "data_size=1.5; expected a positive integer or 'auto'"),
        ({"graph_size": 0}, "graph_size=0; expected a positive integer"),
        ({"graph_size": True}, "graph_size=True; expected a positive integer"),
        ({"graph_size": "auto"}, "graph_size='auto'; expected a positive integer"),
        ({"num_microbatches": 0}, "num_microbatches=0; expected a positive integer or 'auto'"),
        (
            {"schedule": "1f1b-flod"},
            "schedule='1f1b-flod'; expected 'gpipe', '1f1b-fold', '1f1b-2nd', 'hanayo-2nd', 'wavek' or 'wavek-zb'; did "
            "you mean '1f1b-fold'?",
        ),
        ({"wave_size": "all"}, "wave_size='all'; expected a positive integer or 'auto'"),
        ({"potential": 3}, "potential=3; expected a string or None"),
        ({"compile": "later"}, "compile='later'; expected True, False or 'auto'"),
        ({"activation": "host"}, "activation='host'; expected 'auto', 'keep', 'pointwise', 'recompute' or 'offload'"),
        ({"activation": "pointwise"}, "activation='pointwise' needs compile=True: eager phases keep all tensors"),
        (
            {"activation": "recompute", "schedule": "1f1b-2nd"},
            "activation='recompute' is not available with schedule='1f1b-2nd'",
        ),
        (
            {"compile": True, "schedule": "1f1b-2nd"},
            "compile=True is not available with schedule='1f1b-2nd', which runs the phases of a stage on two ranks",
        ),
        ({"expert_size": 0}, "expert_size=0; expected a positive integer"),
        ({"expert_size": 2, "stages": "explicit"}, "expert_size=2 is not available with stages='explicit'"),
        ({"exchange_dtype": "bf16"}, "exchange_dtype='bf16', but with graph_size=1 and expert_size=1 no rows travel"),
        ({"expert_placement": "load"}, "expert_placement='load' needs ranks that share experts, but expert_size=1"),
        (
            {"expert_size": 2, "expert_placement": "even"},
            "expert_placement='even'; expected 'order', 'load' or 'replicate'",
        ),
        ({"save_distributed_checkpoint": "yes"}, "save_distributed_checkpoint='yes'; expected True or False"),
        ({"timeout": 0}, "timeout=0; expected a time > 0, in seconds or as a timedelta"),
        ({"timeout": timedelta(0)}, "timeout=datetime.timedelta(0); expected a time > 0"),
        ({"memory_limit": -1.0}, "memory_limit=-1.0; expected a number of bytes > 0, or None"),
        ({"stages": "declared"}, "stages='declared'; expected 'auto', 'captured' or 'explicit'"),
        ({"message_dtype": "fp8"}, "message_dtype='fp8'; expected 'bf16' or None"),
        ({"balance": "even"}, "balance='even'; expected 'auto', 'microbatches' or 'replicas'"),
    ],
)
def test_an_error_names_the_argument_what_was_given_and_what_is_expected(
    arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        lightning_januspipe.JanusPipeStrategy(**arguments)


def test_unknown_arguments() -> None:
    with pytest.raises(TypeError, match="JanusPipeStrategy has no argument 'num_stages'; did you mean 'stages'"):
        lightning_januspipe.JanusPipeStrategy(num_stages=2)
    with pytest.raises(TypeError, match="no argument 'pipline_size'; did you mean 'pipeline_size'"):
        lightning_januspipe.JanusPipeStrategy(pipline_size=2)


def test_values_of_every_kind() -> None:
    strategy = lightning_januspipe.JanusPipeStrategy(2, 2, num_microbatches=8, timeout=90, memory_limit=10**9)
    assert (strategy.options.pipeline_size, strategy.options.data_size, strategy.num_microbatches()) == (2, 2, 8)
    assert strategy.options.message_timeout == timedelta(seconds=90)


def test_experts_are_shared_evenly() -> None:
    strategy = lightning_januspipe.JanusPipeStrategy(pipeline_size=1, data_size=2, graph_size=2, expert_size=3)
    strategy.parallel_devices = [torch.device("cpu")] * 4
    with pytest.raises(ValueError, match="expert_size=3; expected a divisor of data_size × graph_size = 2 × 2 = 4"):
        _ = strategy.mesh_shape


def test_a_wave_size_without_waves() -> None:
    with pytest.warns(UserWarning, match="wave_size=3 has no effect: schedule='gpipe'") as caught:
        lightning_januspipe.JanusPipeStrategy(wave_size=3, schedule="gpipe")
    assert caught[0].filename == __file__, "the warning points at the user's line"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lightning_januspipe.JanusPipeStrategy(wave_size=3)


@pytest.mark.parametrize("namespace", NAMESPACES)
def test_the_signature_is_that_of_the_options(namespace: str) -> None:
    pytest.importorskip(namespace)
    found = inspect.signature(lightning_januspipe.strategy_class(namespace)).parameters
    assert [(p.name, p.default) for p in found.values()] == [(f.name, f.default) for f in fields(StrategyOptions)]
    assert not any(isinstance(p.annotation, str) for p in found.values())


def test_every_option_is_explained() -> None:
    _, *lines = arguments_section().splitlines()
    assert [line.split(":")[0].strip() for line in lines] == [f.name for f in fields(StrategyOptions)]
    assert all(len(line.split()) > 5 for line in lines)
