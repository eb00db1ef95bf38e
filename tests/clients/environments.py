"""Make a virtual environment for each client package, with this project in it, and run the package's tests there.

    python tests/clients/environments.py nequip schnetpack --folder /some/folder --run

An environment that is complete is used again. A package that cannot be installed is reported, with the last lines of
pip, and the others go on. The exit code is 1 if tests failed, 2 for wrong arguments, and 0 otherwise.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TORCH = "torch==2.13.0"
COMMON = ("ase==3.29.0", "torchmetrics==1.9.0", "pytest>=8", "pytest-timeout>=2.3")
COMPLETE = "complete.txt"


@dataclass(frozen=True)
class Client:
    """A package and what it needs.

    Attributes:
        packages: what pip installs after torch, with the versions that the tests were tried with.
        alone: packages that are installed before, without their dependencies.
        without_lightning: this project's dependencies are left out: the package brings ``pytorch_lightning`` only.
    """

    packages: tuple[str, ...]
    alone: tuple[str, ...] = ()
    without_lightning: bool = False

    def installs(self) -> list[list[str]]:
        """Returns arguments of ``pip install``, in order."""
        project = ["-e", str(ROOT)]
        return [
            [TORCH],
            *([["--no-deps", *self.alone]] if self.alone else []),
            [*self.packages, TORCH, *COMMON, *([] if self.without_lightning else ["lightning==2.6.6", *project])],
            *([["--no-deps", *project]] if self.without_lightning else []),
        ]


CLIENTS = {
    "nequip": Client(("nequip==0.19.1",)),
    # It pins an older sympy than torch needs; these are its other dependencies.
    "schnetpack": Client(
        (
            *("pytorch-lightning==2.6.6", "hydra-core==1.3.8", "hydra-colorlog==1.2.0", "matscipy==1.3.1"),
            *("h5py==3.16.0", "tensorboard==2.21.0", "tensorboardX==2.6.5", "matplotlib>=3.7"),
            *("torch-ema==0.3", "dirsync==2.2.6", "fasteners==0.20", "progressbar==2.5", "pyyaml", "rich", "tqdm"),
            *("e3nn>=0.5", "jsonargparse[signatures]>=4.40"),  # of this project
        ),
        alone=("schnetpack==2.1.1",),
        without_lightning=True,
    ),
    "matgl": Client(("matgl==4.1.2", "torch-geometric==2.8.1")),
    "mace": Client(("mace-torch==0.3.16",)),
    "matris": Client(("matris==0.1.0",)),
    # It pins packages for GPUs of some gigabytes; these are its other dependencies.
    "fairchem": Client(
        (
            *("ase-db-backends==0.11.0", "lmdb==3.0.0", "monty==2026.10.21", "huggingface-hub==2.4.0"),
            *("hydra-core==1.3.8", "numba==0.68.1", "orjson==3.13.0", "submitit==1.5.4", "torchtnt==0.2.4"),
            *("backoff==2.2.1", "clusterscope==0.0.18", "websockets==17.4", "setuptools<81", "e3nn>=0.5"),
        ),
        alone=("fairchem-core==2.24.0", "nvalchemi-toolkit-ops==0.5.0", "warp-lang==1.19.0"),
    ),
    "sevennet": Client(("sevenn==0.13.0",)),
    "orb": Client(("orb-models==0.5.5",)),
    "allegro": Client(("nequip-allegro==0.8.3", "nequip==0.19.1")),
    "torchmdnet": Client(("torchmd-net==3.1.0",)),
    "aimnet": Client(("aimnet==0.2.5", "nvalchemi-toolkit-ops==0.5.0", "warp-lang==1.19.0")),
    "pet": Client(("metatrain==2026.4.1",)),
    "pyg": Client(("torch-geometric==2.8.1",)),
    "chgnet": Client(("pymatgen==2026.10.24", "nvidia-ml-py3==7.352.0"), alone=("chgnet==0.4.2",)),
    # It pins packages for phonons and for clouds; these are its other dependencies.
    "mattersim": Client(
        (
            *("torch-geometric==2.8.1", "pymatgen==2026.10.24", "scikit-learn==1.9.1", "Deprecated==1.3.1"),
            *("e3nn==0.5.6", "opt-einsum-fx==0.1.4", "torch-runstats==0.2.0", "loguru==0.7.3", "torch-ema==0.3"),
            "azure-storage-blob==12.31.1",
        ),
        alone=("mattersim==1.2.3",),
    ),
    # It pins an older e3nn; these are its other dependencies.
    "graphpes": Client(
        (
            *("pytorch-lightning==2.6.6", "dacite==1.9.2", "locache==4.0.2", "load-atoms==0.3.10"),
            *("data2objects==0.1.0", "vesin==0.6.2", "scikit-learn==1.9.1", "e3nn==0.6.0"),
            *("rich==15.0.0", "wandb==0.31.0"),
        ),
        alone=("graph-pes==1.0.2",),
    ),
    "so3krates": Client(("So3krates-torch==0.2.1",)),
    "torchani": Client(("torchani==2.9.0",)),
    # Its models need neither torch-scatter nor torch-cluster, which it asks for.
    "newtonnet": Client(("torch-geometric==2.8.1",), alone=("newtonnet==2.0.1",)),
    # Importing its model for torch imports JAX, and its calculator more of it.
    "nequix": Client(
        (
            *("torch-geometric==2.8.1", "e3nn==0.6.0", "jax==0.10.2", "jraph==0.0.6.dev0", "equinox==0.13.8"),
            *("e3nn-jax==0.21.0", "optax==0.2.8", "matscipy==1.3.1", "cloudpickle==3.1.3", "h5py==3.16.0"),
        ),
        alone=("nequix==0.4.5",),
    ),
}


def python_of(environment: Path) -> Path:
    """Returns the interpreter of a virtual environment."""
    return environment / ("Scripts" if os.name == "nt" else "bin") / "python"


def make(name: str, environment: Path) -> str:
    """Makes the environment of a package, if it is not complete.

    Args:
        name: of the package.
        environment: its folder; what an earlier, incomplete attempt left there is removed.

    Returns:
        Why it cannot be made; empty if it is there.
    """
    installs = CLIENTS[name].installs()
    mark, made_with = environment / COMPLETE, "\n".join(" ".join(arguments) for arguments in installs)
    if mark.is_file() and mark.read_text() == made_with:
        return ""
    if environment.exists() and not (environment / "pyvenv.cfg").is_file():
        return f"{environment} is there, and is no virtual environment"
    shutil.rmtree(environment, ignore_errors=True)
    venv.create(environment, with_pip=True)
    for arguments in installs:
        # Bytecode is made when a module is imported; that of whole packages takes most of the time of an installation.
        command = [str(python_of(environment)), "-m", "pip", "install", "--quiet", "--no-compile", *arguments]
        print(f"{name}: pip install {' '.join(arguments)}", flush=True)
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            return f"pip install {' '.join(arguments)}:\n" + "\n".join(done.stdout.splitlines()[-10:])
    mark.write_text(made_with)
    return ""


def test(name: str, environment: Path) -> bool:
    """Runs the tests of a package in its environment, and tells whether they passed."""
    file = f"tests/clients/test_{name}.py"
    command = [str(python_of(environment)), "-m", "pytest", "-m", "slow", file]
    print(f"{name}: python -m pytest -m slow {file}", flush=True)
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(command, cwd=ROOT, env={**variables, "OMP_NUM_THREADS": "1"}).returncode == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Makes environments, runs tests if asked to, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", metavar="PACKAGE", help=f"one or more of {', '.join(CLIENTS)}")
    parser.add_argument("--folder", type=Path, required=True, help="the environments are FOLDER/PACKAGE")
    parser.add_argument("--run", action="store_true", help="run tests/clients/test_PACKAGE.py in each")
    args = parser.parse_args(arguments)
    unknown = [name for name in args.packages if name not in CLIENTS]
    if unknown:
        parser.error(f"unknown package {', '.join(unknown)}; expected {', '.join(CLIENTS)}")
    if args.folder.exists() and not args.folder.is_dir():
        parser.error(f"--folder {args.folder} is a file; expected a folder")

    results = {}
    for name in dict.fromkeys(args.packages):
        environment = args.folder.resolve() / name
        missing = make(name, environment)
        if missing:
            results[name] = f"not installed: {missing}"
        elif args.run:
            results[name] = "tests passed" if test(name, environment) else "TESTS FAILED"
        else:
            results[name] = f"ready: {environment}"
    print("\n".join(f"{name}: {result}" for name, result in results.items()))
    return int("TESTS FAILED" in results.values())


if __name__ == "__main__":
    sys.exit(main())
