"""Accelerate shards models (FSDP2) on accelerators alone. Told that CPUs are such, it does so by its own code."""

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def take_cpus_for_gpus() -> None:
    """To be called in each of the processes that `torch.distributed.run` starts, before anything asks accelerate."""

    def use_cpu(state: PartialState) -> None:
        state.device = torch.device("cpu")

    PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = use_cpu
