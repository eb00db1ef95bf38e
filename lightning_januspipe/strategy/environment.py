"""Checks what surrounds a run before any process is started: variables, the port, and the script itself."""

from __future__ import annotations

import errno
import os
import socket
import sys
from collections.abc import Mapping
from typing import Any


def check_variables(environment: Any, num_processes: int, num_nodes: int, variables: Mapping[str, str]) -> None:
    """Raises an error if variables of the environment contradict the Trainer, so that ranks would wait for nobody.

    Args:
        environment: The Trainer's ClusterEnvironment.
        num_processes: ``Trainer(devices=...)``.
        num_nodes: ``Trainer(num_nodes=...)``.
        variables: The environment variables.

    Raises:
        ValueError: A variable is left over or impossible; the message names it and the way out.
    """
    kind, world = type(environment).__name__, num_processes * num_nodes
    asked = f"Trainer(devices={num_processes}, num_nodes={num_nodes})"
    if kind == "SLURMEnvironment":
        _check_slurm(num_processes, num_nodes, asked, variables)
    elif kind == "LightningEnvironment":
        node = next((name for name in ("NODE_RANK", "GROUP_RANK") if name in variables), "NODE_RANK")
        _check_index(node, num_nodes, "machines", asked, variables)
        _check_index("LOCAL_RANK", num_processes, "processes on a machine", asked, variables)
        _check_number("MASTER_PORT", variables)
        if "LOCAL_RANK" in variables and world > 1:
            _check_started_outside(world, asked, variables)


def _check_slurm(num_processes: int, num_nodes: int, asked: str, variables: Mapping[str, str]) -> None:
    out = (
        f"Start the script with `srun --nodes={num_nodes} --ntasks-per-node={num_processes}`. In an interactive shell, "
        "`unset SLURM_NTASKS` lets the Trainer start its processes itself"
    )
    world, tasks = num_processes * num_nodes, _check_number("SLURM_NTASKS", variables)
    if tasks is not None and tasks != world:
        raise ValueError(f"SLURM_NTASKS={tasks}, but {asked} needs {world} tasks. {out}.")
    missing = [name for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID") if name not in variables]
    if missing:
        raise ValueError(f"SLURM_NTASKS={tasks} is set, but {missing[0]} is not: srun did not start this. {out}.")
    for name, size, what in (
        ("SLURM_PROCID", world, "tasks"),
        ("SLURM_LOCALID", num_processes, "tasks on a machine"),
        ("SLURM_NODEID", num_nodes, "machines"),
    ):
        _check_index(name, size, what, asked, variables)


def _check_started_outside(world: int, asked: str, variables: Mapping[str, str]) -> None:
    """Raises an error if LOCAL_RANK says that processes are started from outside, and the rest contradicts it."""
    found = f"LOCAL_RANK={variables['LOCAL_RANK']} is set, so that the Trainer starts no processes"
    out = (
        "If it is left over, `unset LOCAL_RANK WORLD_SIZE`, and the Trainer starts its processes itself; to start them "
        "from outside, use torchrun"
    )
    size = _check_number("WORLD_SIZE", variables)
    if size is not None and size != world:
        raise ValueError(f"WORLD_SIZE={size}, but {asked} has {world} processes, and {found}. {out}.")
    if "MASTER_PORT" not in variables:
        raise ValueError(f"{found}, but MASTER_PORT is not, so that ranks cannot find each other. {out}.")


def _check_index(name: str, size: int, what: str, asked: str, variables: Mapping[str, str]) -> None:
    index = _check_number(name, variables)
    if index is not None and index >= size:
        raise ValueError(
            f"{name}={index}, but {asked} has {size} {what}, counted from 0. If the variable is left over, "
            f"`unset {name}`; otherwise give the Trainer the number of {what}."
        )


def _check_number(name: str, variables: Mapping[str, str]) -> int | None:
    """Returns the value of a variable that has to be a number of at least 0; None where it is not set."""
    if name not in variables:
        return None
    if not variables[name].isdecimal():
        raise ValueError(f"the environment variable {name}={variables[name]!r} is no number; `unset {name}` or mend it")
    return int(variables[name])


def check_joined(num_started: int, world: int) -> None:
    """Raises an error if this process belongs to a run with another number of processes.

    Raises:
        ValueError: The numbers differ.
    """
    if num_started != world:
        raise ValueError(
            f"this process is one of {num_started} that an earlier Trainer of the script started, but this Trainer has "
            f"{world}. All Trainers of a script need the same devices and num_nodes, or devices=1 for one that runs in "
            "each process by itself: run the two parts as two scripts."
        )


def check_script(main: Any, argv: list[str]) -> None:
    """Raises an error if other processes cannot run this program again, which is how the Trainer starts them.

    Args:
        main: The module ``__main__``.
        argv: ``sys.argv``.

    Raises:
        ValueError: The program is no file: it came from standard input, ``python -c``, a notebook or a prompt.
    """
    out = "Save it as a file and run `python FILE`, or use torchrun; devices=1 needs no other process"
    if not os.path.isfile(getattr(main, "__file__", None) or "") or hasattr(sys, "ps1"):
        raise ValueError(
            "the Trainer starts a process for each further rank by running the script again, but this program is no "
            f"file: it came from standard input, `python -c`, a notebook or a prompt. {out}."
        )
    if main.__spec__ is None and not os.path.isfile(argv[0]):
        raise ValueError(
            "the Trainer starts a process for each further rank by running the script again, but sys.argv[0]="
            f"{argv[0]!r} is no file in {os.getcwd()}: the script has changed sys.argv or the folder. Make the Trainer "
            "before that, or use torchrun."
        )


def listen(address: str, port: int) -> socket.socket:
    """Returns a socket that listens at an address of this machine.

    Args:
        address: The address; an empty one for all.
        port: The port; 0 for any that is free.

    Raises:
        ValueError: The port is in use.
    """
    family = socket.AF_INET6 if address == "" and socket.has_dualstack_ipv6() else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        what = "in use on this machine" if error.errno == errno.EADDRINUSE else "one that only root may use"
        raise ValueError(
            f"MASTER_PORT={port} is {what}, so that the ranks cannot meet there. `unset MASTER_PORT`, and the Trainer "
            "takes a free one, or set it to another number (on all machines alike)."
        ) from error
    return listener
