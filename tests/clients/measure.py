"""Captures a package's model in this process, and prints what it takes: a line of the table in the docs.

    python tests/clients/measure.py fairchem_models make_esen crystals

The line tells the number of operations, the seconds of the trace, the bytes for each atom at the cut of two stages,
the largest error of the parameter gradient against the module itself, and whether atoms can be sharded.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "programs"))

from lightning_januspipe.capture import capture_module
from lightning_januspipe.capture.trees import copied
from lightning_januspipe.errors import CaptureError
from lightning_januspipe.graph.sharding import verify_sharding
from lightning_januspipe.loader.examples import example_batches


def main() -> int:
    """Prints the line; the exit code is 1 where capture was refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("factories", help="a module in tests/clients/programs")
    parser.add_argument("module", help="its function that makes the LightningModule")
    parser.add_argument("data", help="its function that makes the data")
    parser.add_argument("--graph_size", type=int, default=2, help="graph ranks that the model is traced for")
    parser.add_argument("--trace", action="store_true", help="print the traceback of a refusal")
    args = parser.parse_args()
    factories = importlib.import_module(args.factories)
    module, data = getattr(factories, args.module)(), getattr(factories, args.data)()
    data.prepare_data()
    data.setup("fit")
    traced, other = example_batches(data.train_dataloader(), 1)

    def step(batch: Any) -> Any:
        return module.training_step(batch, 0)

    name = f"{args.factories}.{args.module} {args.data}"
    try:
        loss = step(copied(other))
        expected = torch.autograd.grad(loss, [p for p in module.parameters() if p.requires_grad], allow_unused=True)
        scale = max(float(g.abs().max()) for g in expected if g is not None)
        cpu = time.process_time()
        found = capture_module(module, step, traced, other, [(0, 1)], graph_size=args.graph_size)
        potential = found.potential
        atoms = potential.inputs(module.get_submodule(potential.path))
        print(f"{name}: loss {float(loss):.3g}, gradient {scale:.3g}; {found.describe()}", flush=True)
        cpu = time.process_time() - cpu
        print(f"  {found.describe_capture()}")
        print(f"  boundary bytes {potential.boundary_bytes}, {cpu:.1f} s of CPU; {atoms is not None}")
    except Exception as error:
        print(f"{name}: REFUSED {type(error).__name__}: {error}", flush=True)
        if args.trace or not isinstance(error, CaptureError):
            traceback.print_exc()
        elif error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        return 1
    try:
        verify_sharding(potential, module, step, other, args.graph_size)
        print("  graph ranks: exact", flush=True)
    except Exception as error:
        print(f"  graph ranks: REFUSED {type(error).__name__}: {error}", flush=True)
        if args.trace or not isinstance(error, CaptureError):
            traceback.print_exc()
    return 0


if __name__ == "__main__":
    sys.exit(main())
