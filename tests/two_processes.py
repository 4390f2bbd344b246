"""Runs scripts in several processes on the CPU. As a module it is what torchrun starts in each of them."""

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SECONDS = 300  # a machine may be busy


def start(*command: str) -> subprocess.Popen:
    """torchrun with two processes of `command`, in a session of its own; a free port is found by torchrun."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [*LAUNCH, *command],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> str:
    """What it printed. When it takes too long, it and its workers are ended."""
    try:
        return process.communicate(timeout=SECONDS)[0]
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)  # torchrun ends its workers, with SIGKILL after 30 seconds
        raise AssertionError("too slow: " + process.communicate()[0]) from None


def run_jobs(jobs: list[tuple[str, list[str]]], fsdp2: dict[str, str] | None = None) -> str:
    """Run main(arguments) of each (module, arguments) in two processes; with the environment `fsdp2` shared out."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "jobs.json"
        path.write_text(json.dumps({"jobs": jobs, "fsdp2": fsdp2}))
        process = start("-m", "tests.two_processes", str(path))
        output = finish(process)
    assert process.returncode == 0, output
    return output


@contextmanager
def _fsdp2(environment: dict[str, str]) -> Iterator[None]:
    """FSDP2 on the CPU, where accelerate itself never turns it on."""
    from accelerate import DistributedType, FullyShardedDataParallelPlugin, PartialState
    from accelerate.state import AcceleratorState

    from wan.memory.sharding import is_sharded
    from wan.training import loop
    from wan.training import start as training_start

    os.environ.update(environment)
    original, original_run = training_start.build_accelerator, loop.Trainer.run

    def build(device):
        accelerator = original(device)
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
        for state in (accelerator.state, PartialState()):
            state.distributed_type = DistributedType.FSDP
        return accelerator

    def run(trainer):
        assert all(is_sharded(parameter) for parameter in trainer.job.dit.parameters())
        return original_run(trainer)

    training_start.build_accelerator, loop.Trainer.run = build, run
    try:
        yield
    finally:
        training_start.build_accelerator, loop.Trainer.run = original, original_run
        AcceleratorState._reset_state(reset_partial_state=False)
        PartialState().distributed_type = DistributedType.MULTI_CPU


def main(path: str) -> None:
    import torch

    torch.set_num_threads(1)
    given = json.loads(Path(path).read_text())
    for module, arguments in given["jobs"]:
        script = importlib.import_module(module)
        if given["fsdp2"] is None:
            script.main(arguments)
        else:
            with _fsdp2(given["fsdp2"]):
                script.main(arguments)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # an orderly exit aborts in about one of 100 processes: a thread of gloo outlives its group


if __name__ == "__main__":
    from utils import cli

    cli.run(lambda: main(sys.argv[1]))
