"""Messages: what is packed is what is unpacked, for all dtypes and shapes, here and between two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_workers import connect_all, exchange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_januspipe.engine import p2p
from lightning_januspipe.engine.p2p import pack, packed_size, unpack
from lightning_januspipe.testing import RankPool

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex128,
)
SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


def _tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    values = torch.randint(0, 256, (torch.Size(shape).numel(),), generator=torch.Generator().manual_seed(seed))
    return (values % 2 == 0 if dtype is torch.bool else values).to(dtype).reshape(shape)


def _same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert [(t.shape, t.dtype) for t in found] == [(t.shape, t.dtype) for t in expected]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@settings(deadline=None, max_examples=200)
@given(st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), max_size=6))
def test_round_trip(shapes: list[tuple[tuple[int, ...], torch.dtype]]) -> None:
    tensors = [_tensor(s, d, i) for i, (s, d) in enumerate(shapes)]
    buffer = pack(tensors)
    assert buffer.dtype == torch.uint8 and buffer.dim() == 1
    assert buffer.numel() == packed_size(shapes)
    _same(unpack(buffer, shapes), tensors)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 70), st.sampled_from(DTYPES))
def test_size_of_a_single_tensor(num: int, dtype: torch.dtype) -> None:
    assert pack([torch.zeros(num, dtype=dtype)]).numel() == packed_size([((num,), dtype)])


def test_tensors_of_any_layout() -> None:
    tensors = [torch.arange(12.0).view(3, 4).t(), torch.arange(3).expand(2, 3), torch.ones(2, requires_grad=True)[::2]]
    found = unpack(pack(tensors), [(tuple(t.shape), t.dtype) for t in tensors])
    _same(found, [t.detach() for t in tensors])
    assert not any(t.requires_grad for t in found)


def test_unpacked_tensors_start_where_any_kernel_can_read_them() -> None:
    shapes: list[tuple[tuple[int, ...], torch.dtype]] = [
        ((3,), torch.uint8),
        ((5,), torch.float64),
        ((1,), torch.bool),
        ((2,), torch.float64),
    ]
    offsets = [t.data_ptr() for t in unpack(torch.zeros(packed_size(shapes), dtype=torch.uint8), shapes)]
    assert all((o - offsets[0]) % 16 == 0 for o in offsets)


@pytest.mark.parametrize("through_host", [False, True])
def test_channel_between_two_ranks(pool: RankPool, through_host: bool) -> None:
    messages = [
        [_tensor((3, 4), torch.float64, 1)],
        [],
        [_tensor((5,), torch.float32, 2), _tensor((0, 3), torch.float64, 3), _tensor((), torch.int64, 4)],
        [torch.empty(0, 7)],
        [_tensor((1,), torch.bool, 5), _tensor((300, 100), torch.float64, 6)],
    ]
    results = pool.run(exchange, messages, through_host, world_size=2)
    sizes = [packed_size([(tuple(t.shape), t.dtype) for t in m]) for m in messages]
    assert sizes[1] == sizes[3] == 0
    for received, bytes_sent in results:
        assert len(received) == len(messages)
        for found, expected in zip(received, messages, strict=True):
            _same(found, expected)
        assert bytes_sent == sum(sizes)


@pytest.mark.parametrize(
    ("device", "config", "expected"),
    [("cuda", "cpu:gloo,cuda:gloo", True), ("cuda", "cpu:gloo,cuda:nccl", False), ("cpu", "cpu:gloo,cuda:gloo", False)],
)
def test_messages_of_a_gpu_go_through_the_host_with_gloo(
    monkeypatch: pytest.MonkeyPatch, device: str, config: str, expected: bool
) -> None:
    monkeypatch.setattr(p2p.dist, "get_backend_config", lambda group: config)
    group: Any = None
    assert p2p.needs_host(group, torch.device(device)) is expected


def test_connections_before_their_first_message(pool: RankPool) -> None:
    """Whatever order the pairs are given in; what is sent later is not mixed up with it."""
    assert pool.run(connect_all, world_size=4) == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]


@pytest.mark.parametrize("num", [0, 1, 2])
def test_buffer_of_empty_tensors_is_empty(num: int) -> None:
    assert pack([torch.empty(0, 3)] * num).numel() == packed_size([((0, 3), torch.float32)] * num) == 0
