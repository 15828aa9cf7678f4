# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Transformers' Trainer for a model of which a few percent train: its checkpoints hold these, not the whole model."""

import atexit
import contextlib
import json
import os
import pickle
import sys
import threading
import time
from dataclasses import fields
from pathlib import Path
from typing import NoReturn

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerState
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from read_weights import is_finite, reason
from training.adapters import check_trained_for, describe_training, plain_name
from training.staged import IGNORED, predicts

TRAINED_WEIGHTS = "trained.safetensors"


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights that train, by names that wrappers of FSDP and of checkpointing do not change."""
    return {plain_name(name): weight for name, weight in model.named_parameters() if weight.requires_grad}


def count_trainable(model: nn.Module) -> tuple[int, int, str]:
    """Weights that train, weights in all, and a line that says so. Full copies that an adapter keeps of modules count
    once, where they train."""
    trained = sum(weight.numel() for weight in trainable(model).values())
    copied = {
        name.split(".ln_tuning_layers.")[0] for name, _ in model.named_parameters() if ".ln_tuning_layers." in name
    }
    frozen = sum(
        weight.numel()
        for name, weight in model.named_parameters()
        if not (weight.requires_grad or ".original_module." in name or name.split(".base_layer.")[0] in copied)
    )
    total = trained + frozen
    return trained, total, f"{trained:,} of {total:,} parameters train ({trained / total:.2%})"


def end_process(status: int) -> NoReturn:
    """Ends the process of a command that is done. Where a launcher started it as one of several, the end of the
    interpreter is left out: torch's caches keep device meshes, these their process groups, and so threads of gloo that
    may want the interpreter when it is half gone, which aborts a run that is done (pytorch/pytorch#190489). What an
    error ends, ends as ever."""
    if "WORLD_SIZE" not in os.environ:
        sys.exit(status)
    threading._shutdown()  # waits for threads that are no daemons, as the interpreter does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def last_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that was finished: its state is written last."""
    finished = []
    for path in Path(output).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            state = json.loads((path / TRAINER_STATE_NAME).read_text())
            if isinstance(state, dict) and type(state.get("global_step")) is int:
                finished.append((int(path.name.split("-")[-1]), path))
        except (OSError, ValueError):
            continue  # the run was killed while it wrote
    return max(finished)[1] if finished else None


def damaged(checkpoint: str | Path, why: str) -> ValueError:
    return ValueError(
        f"{checkpoint} is damaged: {why}. Delete that folder: --resume then goes on from the checkpoint before it, if "
        "there is one."
    )


@contextlib.contextmanager
def as_damaged(checkpoint: str | Path):
    """What comes of reading a file of a checkpoint that was cut off, or is gone, as a sentence.

    Raises:
        ValueError
    """
    try:
        yield
    except (SafetensorError, RuntimeError, EOFError, pickle.UnpicklingError, FileNotFoundError) as error:
        if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):  # no fault of the file
            raise
        raise damaged(checkpoint, reason(error)) from error


def stated_facts(checkpoint: str | Path) -> dict[str, str]:
    """What a checkpoint states of its run."""
    with as_damaged(checkpoint), safe_open(Path(checkpoint, TRAINED_WEIGHTS), framework="pt") as file:
        return file.metadata() or {}


def check_state(checkpoint: str | Path) -> None:
    """
    Raises:
        ValueError: the Trainer does not know a field of the checkpoint's state, or the loss curve so far is missing.
    """
    path = Path(checkpoint, TRAINER_STATE_NAME)
    stated = json.loads(path.read_text()).keys()
    if "log_history" not in stated:
        raise damaged(checkpoint, f"its {TRAINER_STATE_NAME} has no log_history")
    if unknown := stated - {field.name for field in fields(TrainerState)}:
        raise ValueError(
            f"{path} has a field {min(unknown)}, which transformers {transformers.__version__} does not know. Resume "
            "with the version that wrote it, or delete that folder: --resume then goes on from the checkpoint before "
            "it, if there is one."
        )


def check_finite(weights: dict[str, torch.Tensor], step: int) -> None:
    """
    Raises:
        ValueError: naming the first weight that is no longer a number.
    """
    for name, weight in weights.items():
        if not is_finite(weight.detach()):
            raise ValueError(
                f"{name} holds NaN or infinite values at step {step}: the training has diverged, and what it would "
                "write is of no use. Checkpoints of earlier steps are kept. Train into another folder, with a lower "
                "--learning_rate."
            )


def check_facts(checkpoint: str | Path, stated: dict[str, str], facts: dict[str, str]) -> None:
    """Compares what a checkpoint states of its run, as far as it does, with this run's.

    Raises:
        ValueError: naming the first that differs and both values.
    """
    path = Path(checkpoint, TRAINED_WEIGHTS)
    for name, value in facts.items():
        if stated.get(name, value) != value:
            raise ValueError(
                f"{path} was trained with {name}={stated[name]}, but this run has {value}. Resume with the options "
                "that the run began with, or train into another folder."
            )


class GroupedByLength(LengthGroupedSampler):
    """Its order follows from seed and epoch alone, so that a run that goes on takes the rows that it has not taken."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


class SideBranchTrainer(Trainer):
    """Saves and loads what trains; optimizer, schedule, random states and progress as the Trainer does.

    The Trainer itself would write the whole model, 14 GB for 7B, into each checkpoint.

    Attributes:
        facts: what checkpoints state of the run, by name. A run that goes on must have the same.
        seconds: how long runs that this one goes on with have trained.
        evaluated: `(2,)`, the sum of the loss of this process's part of an evaluation, and its answers' tokens.
        evaluated_at: the step of the last evaluation that this process has made, if any.
    """

    facts: dict[str, str]
    evaluated_at: int | None = None
    seconds = 0.0
    sampler: GroupedByLength | None = None

    def __init__(self, *args, facts: dict[str, str], **kwargs):
        super().__init__(*args, **kwargs)
        self.facts, self.begin = facts, time.monotonic()

    def seconds_trained(self) -> float:
        return self.seconds + time.monotonic() - self.begin

    def _get_train_sampler(self, train_dataset=None):
        """Rows are grouped by the lengths that the dataset tells; the Trainer would load them all to see."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(dataset, "lengths"):
            return super()._get_train_sampler(train_dataset)
        # All rows of a step, however they are spread: a run may go on with another number of processes
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.sampler = GroupedByLength(batch_size, dataset.lengths(), seed)
        return self.sampler

    def _get_eval_sampler(self, eval_dataset):
        """In order: to group rows, the Trainer would load them all."""
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def get_train_dataloader(self):
        """As the Trainer does. Accelerate tells a sampler the epoch, in several processes, if it was given it so."""
        loader = super().get_train_dataloader()
        if self.sampler is not None and hasattr(loader, "set_sampler"):
            loader.set_sampler(self.sampler)
        return loader

    def evaluation_loop(self, *args, **kwargs):
        """As the Trainer's, but for the loss: the mean over all answers' tokens, as in training. The Trainer's is the
        mean of the batches' means, which depends on how many rows a batch has."""
        self.evaluated, self.evaluated_at = torch.zeros(2, device=self.args.device), self.state.global_step
        output = super().evaluation_loop(*args, **kwargs)
        loss, count = self.accelerator.reduce(self.evaluated, "sum").tolist()
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics[f"{prefix}_loss"] = loss / max(count, 1)
        return output

    def prediction_step(self, model: nn.Module, inputs: dict, prediction_loss_only: bool, ignore_keys=None) -> tuple:
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        num_own = self._num_own(len(labels))
        if 0 < num_own < len(labels):
            inputs["labels"] = torch.cat([labels[:num_own], torch.full_like(labels[num_own:], IGNORED)])
            if inputs.get("teacher_states") is not None:  # of the answers' tokens, row after row
                inputs["teacher_states"] = inputs["teacher_states"][: predicts(inputs["labels"]).sum()]
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = model(**inputs)["loss"]
        count = predicts(inputs["labels"]).sum() * (num_own > 0)
        self.evaluated += torch.stack([loss * count, count])
        return loss, None, None

    def _num_own(self, num_rows: int) -> int:
        """Of this process's batch, the first rows, which no other counts: where there are not enough for all
        processes, accelerate fills the last batches with the first rows of all."""
        state = self.accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder < 1:
            return num_rows
        return min(max(state.remainder - self.args.process_index * num_rows, 0), num_rows)

    def _save_checkpoint(self, *args, **kwargs) -> None:
        """As the Trainer does.

        Raises:
            OSError: the disk is full, or refuses. `last_checkpoint` passes by what was written.
        """
        try:
            super()._save_checkpoint(*args, **kwargs)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have no type for a full disk
            raise OSError(
                f"The checkpoint of step {self.state.global_step} cannot be written below {self.args.output_dir}: "
                f"{error}. Those before it are kept: go on with --resume, once there is room if that is what lacks."
            ) from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        weights = {}
        for name, weight in trainable(self.model).items():  # every process: a sharded weight is gathered from all
            weight = weight.full_tensor() if isinstance(weight, DTensor) else weight
            # A copy: of a weight that FSDP has gathered, the storage goes with the next state_dict
            weights[name] = weight.detach().cpu().clone(memory_format=torch.contiguous_format)
        check_finite(weights, self.state.global_step)
        metadata = {"format": "pt", **self.facts, **describe_training(self.model.base)}
        metadata["seconds"] = str(self.seconds_trained())
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(weights, folder / TRAINED_WEIGHTS, metadata)

    def _init_training_state(self, max_steps: int, *args) -> tuple[int, int]:
        """As the Trainer does, but for how often a run that goes on logs, evaluates and saves, which is as its own
        options have it, and for its best checkpoint, whose folder may have been moved."""
        trained = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        best = Path(self.args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}")
        if best.is_dir():
            self.state.best_model_checkpoint = str(best)
        return trained

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.seconds = float(self._load_trained(resume_from_checkpoint, model).get("seconds", 0))

    def _load_trained(self, checkpoint: str, model: nn.Module | None = None) -> dict[str, str]:
        """Returns what the checkpoint states."""
        path = Path(checkpoint, TRAINED_WEIGHTS)
        expected = trainable(model or self.model)
        with as_damaged(checkpoint), safe_open(path, framework="pt") as file:
            stored = set(file.keys())
            if stored != set(expected):
                differing = sorted(stored ^ set(expected))
                raise ValueError(
                    f"{path} holds {len(stored)} weights, but {len(expected)} train in this run; {differing[0]} is in "
                    "only one of the two. Resume with the --whole-fusion, --lora or --peft-config of its beginning."
                )
            stated = file.metadata() or {}
            check_trained_for(path, stated, self.model.base)
            check_facts(checkpoint, stated, self.facts)
            for name, weight in expected.items():
                shape = tuple(file.get_slice(name).get_shape())
                if shape != tuple(weight.shape):
                    raise ValueError(
                        f"{path}: {name} has shape {shape} there, but {tuple(weight.shape)} in this run. Resume with "
                        "the options that the run began with, or train into another folder."
                    )
            with torch.no_grad():
                for name, weight in expected.items():
                    value = file.get_tensor(name).to(weight.device, weight.dtype)
                    if isinstance(weight, DTensor):
                        value = distribute_tensor(value, weight.device_mesh, weight.placements)
                    weight.copy_(value)
        return stated

    def _run_epoch(self, *args, **kwargs) -> None:
        """As the Trainer does, but for a run that goes on at its end, which would train one step more."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _load_best_model(self) -> None:
        self._load_trained(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer does, which would begin anew what is missing.

        Raises:
            ValueError
        """
        for pattern in ("optimizer*", SCHEDULER_NAME) if checkpoint else ():
            if not any(Path(checkpoint).glob(pattern)):
                raise damaged(checkpoint, f"it has no {pattern}")
        with as_damaged(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with as_damaged(checkpoint):
            super()._load_rng_state(checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_fsdp_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        from accelerate.utils import save_fsdp_optimizer  # the Trainer would write the frozen shards along with it

        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))
