"""``accelerate launch`` on a CPU."""

from __future__ import annotations


def accelerate(processes: int) -> tuple[str, ...]:
    """Arguments of Python that start several processes on gloo; the program's own follow."""
    gloo = (
        "--multi_gpu",
        f"--num_processes={processes}",
        "--num_machines=1",
        "--main_process_port=0",
    )
    return (
        "-m",
        "accelerate.commands.launch",
        *gloo,
        "--mixed_precision=no",
        "--dynamo_backend=no",
    )
