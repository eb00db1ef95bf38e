"""Which rank says what when a run fails, with a store and without processes."""

from __future__ import annotations

import sys
import threading
from typing import Any

import pytest
import torch.distributed as dist

from lightning_januspipe.distributed import is_copy, on_first_rank
from lightning_januspipe.errors import PipelineError, RankLostError
from lightning_januspipe.strategy import failure
from lightning_januspipe.strategy.failure import FailureReport, is_echo, short_traceback


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def printed(errors: list[BaseException], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> list[str]:
    """Returns what the ranks print that end with these errors, which they note in their order."""
    monkeypatch.setattr(failure, "WAIT", 0.5)
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.delenv("JANUSPIPE_DEBUG", raising=False)
    store = dist.HashStore()
    reports = [FailureReport(r, len(errors), store, None, 1, sys.__excepthook__) for r in range(len(errors))]
    for report, error in zip(reports, errors, strict=True):
        report.note(error)
    ends = [
        threading.Thread(target=report._hook, args=(type(error), error, error.__traceback__))
        for report, error in zip(reports, errors, strict=True)
    ]
    for end in ends:
        end.start()
    for end in ends:
        end.join()
    return list(capsys.readouterr().err.splitlines())


def test_the_cause_comes_last(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lost = RankLostError("global rank 0 waited for global rank 1")
    lines = printed([raised(lost), raised(KeyError("a")), raised(ValueError("b"))], monkeypatch, capsys)
    assert sorted(lines[:2]) == [
        "[rank 0] ended because rank 1 has failed",
        "[rank 2] ended because rank 1 has failed, after ValueError: b",
    ]
    assert lines[2] == "[rank 1] failed, and the other ranks have ended:" and lines[-1] == "KeyError: 'a'"


def test_one_error_of_all_is_printed_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed([raised(ValueError("no energy")) for _ in range(3)], monkeypatch, capsys)
    assert lines[-1] == "ValueError: no energy" and sum("no energy" in line for line in lines[-2:]) == 1
    assert not any(line.startswith("[rank") for line in lines)


def test_an_error_of_the_first_rank_has_its_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The others raise a copy without a traceback, which says nothing, also if it is noted first."""
    sent: list[bytes] = []

    def users_line() -> None:
        raise KeyError("energies")

    def broadcast(content: bytes) -> bytes:
        sent.append(content)
        return sent[0]

    errors = []
    for rank in (0, 1):
        with pytest.raises(KeyError) as caught:
            on_first_rank(users_line, rank, broadcast)
        errors.append(caught.value)
    assert [is_copy(error) for error in errors] == [False, True]
    lines = printed(errors[::-1], monkeypatch, capsys)
    assert lines[-1] == "KeyError: 'energies'" and lines.count(lines[-1]) == 1
    assert 'raise KeyError("energies")' in "".join(lines[-3:])
    assert not any(line.startswith("[rank") for line in lines)


def test_a_rank_that_nobody_hears_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    lines = printed([raised(RankLostError("global rank 0 waited 6 s for global rank 1"))], monkeypatch, capsys)
    assert lines == ["[rank 0] global rank 0 waited 6 s for global rank 1"]


def test_echoes() -> None:
    assert is_echo(RankLostError("global rank 1 did not come"))
    assert is_echo(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"))
    assert not is_echo(PipelineError("the ranks hold different batches")) and not is_echo(ValueError("Connection"))


def test_short_tracebacks() -> None:
    def mine() -> None:
        import torch

        torch.zeros(2).view(3)

    with pytest.raises(RuntimeError) as caught:
        mine()
    lines = list(short_traceback(caught.value))
    assert "torch.zeros(2).view(3)" in lines[-2] and lines[-1].startswith("RuntimeError: shape")
    with pytest.raises(ValueError, match="schedul") as caught_value:
        import lightning_januspipe

        lightning_januspipe.JanusPipeStrategy(schedule="none")
    lines = list(short_traceback(caught_value.value))
    assert lines[0] == "(calls inside libraries are left out; JANUSPIPE_DEBUG=1 prints all)" and len(lines) == 4
    assert not any("strategy/options.py" in line for line in lines)
