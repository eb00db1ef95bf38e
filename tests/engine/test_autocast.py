"""Casts: what is on now, what is made inside a block, and that nothing is left behind."""

from __future__ import annotations

import torch

from lightning_januspipe.engine.autocast import OFF, Autocast, autocast_as, forget_casts

BF16 = Autocast((("cpu", torch.bfloat16),))


def product_dtype() -> torch.dtype:
    return torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype


def test_current() -> None:
    assert Autocast.current() == OFF == Autocast()
    with torch.autocast("cpu", torch.bfloat16):
        assert Autocast.current() == BF16
        with torch.autocast("cpu", enabled=False):
            assert Autocast.current() == OFF


def test_blocks_make_the_casts_that_are_wanted_and_restore_the_others() -> None:
    for wanted, dtype in ((BF16, torch.bfloat16), (OFF, torch.float32)):
        for around in (BF16, OFF):
            with autocast_as(around):
                with autocast_as(wanted):
                    assert Autocast.current() == wanted and product_dtype() == dtype
                assert Autocast.current() == around
    assert Autocast.current() == OFF and product_dtype() == torch.float32


def test_changed() -> None:
    both = BF16.changed("cuda", torch.float16)
    assert both.dtypes == (("cpu", torch.bfloat16), ("cuda", torch.float16))
    assert both.changed("cuda", None) == BF16 and BF16.changed("cpu", None) == OFF
    assert BF16.dtypes == (("cpu", torch.bfloat16),), "is not changed itself"


def test_kept_casts_are_forgotten() -> None:
    """Autocast keeps a parameter's cast, with its graph, for as long as its block lasts."""
    weight = torch.nn.Parameter(torch.ones(2, 2))

    def cast() -> object:
        return torch.mm(weight, weight).grad_fn.next_functions[0][0]  # type: ignore[union-attr]

    with torch.autocast("cpu", torch.bfloat16):
        assert cast() is cast()
        kept = cast()
        forget_casts()
        assert cast() is not kept
