#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Train the side branch of a DPVR, all else frozen, and save it as a PEFT adapter.

MODEL is a DPVR checkpoint or a LLaVA in the layout of llava-hf, whose weights are then read as they are. DATA is
LLaVA's JSON of conversations, or a folder (or parquet file) of the `datasets` library with images and chat messages;
the loss is on the answers alone. Rows that cannot be trained on are listed in OUTPUT/bad_rows.jsonl.

Everything else is transformers' Trainer: every option of its TrainingArguments is taken too (--max_steps, --bf16,
--per_device_train_batch_size, --gradient_accumulation_steps, --gradient_checkpointing, --learning_rate, --eval_steps,
...), and `torchrun` or `accelerate launch` in the place of `python` trains on several devices (DDP, FSDP2; tested with
processes on CPUs, not with several GPUs).
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from accelerate.utils import patch_environment
from peft import PeftConfig
from safetensors import SafetensorError
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModel, AutoProcessor, HfArgumentParser, TrainingArguments, set_seed

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.command import given_path, lock_record, release_records
from read_llava import check_name
from scripts.output import interrupted_by_sigterm, names_file
from training.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    add_adapter,
    base_name,
    from_llava,
    processor_from_llava,
    read_config,
    refuse_missing,
    save_adapter,
    train_in_float32,
)
from training.card import CARD_FILE, PLOT_FILE, RUN_FILE, has_own_card, make_card, plot_losses, read_license
from training.data import BadRows, Collator, ConversationDataset, read_rows
from training.features import CachedFeatures, CacheError, cache_features, digest
from training.staged import LOSSES, StagedModel, collate_rows
from training.trainer import (
    SideBranchTrainer,
    check_facts,
    check_finite,
    check_state,
    count_trainable,
    end_process,
    last_checkpoint,
    stated_facts,
    trainable,
)

DEFAULTS = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,  # a share of all steps
    "num_train_epochs": 1.0,
    "logging_steps": 10,
    "logging_nan_inf_filter": False,  # it logs a training that has diverged as one whose loss is 0
    "save_steps": 500,
    "save_total_limit": 2,
    "max_grad_norm": 1.0,
}
# Options of TrainingArguments that a run must go on with: a schedule or an order of rows goes on from where it was
KEPT = (
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "weight_decay",
    "max_grad_norm",
    "seed",
    "data_seed",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "bf16",
    "fp16",
)
# Options of TrainingArguments that the command sets itself
OWN = {"remove_unused_columns": "False", "label_names": "labels", "prediction_loss_only": "True"}
# Options of TrainingArguments that would do harm, or nothing, and why
REFUSED = {
    "label_smoothing_factor": "is for the Trainer's own loss; here the loss is that of --loss",
    "neftune_noise_alpha": "is noise for embeddings that train; these are frozen",
    "bf16_full_eval": "would round the weights that train",
    "fp16_full_eval": "would round the weights that train",
    "push_to_hub": "would publish checkpoints and records of rows, not the adapter: use scripts/push_to_hub.py",
    "save_only_model": "would leave the optimizer out of checkpoints, and --resume would begin it anew",
    "resume_from_checkpoint": "is --resume here, which goes on from the last checkpoint of --output",
}


def parse_args(arguments: list[str] | None = None) -> tuple[argparse.Namespace, TrainingArguments]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="examples:\n"
        "  python scripts/train_side_branch.py dpvr-7b --data llava_v1_5_mix665k.json --image-folder images \\\n"
        "      --output adapter --bf16 --per_device_train_batch_size 8 --gradient_accumulation_steps 2\n"
        "  python scripts/train_side_branch.py llava-hf/llava-1.5-7b-hf --data my-dataset --output adapter \\\n"
        "      --cache-features features --num_train_epochs 3 --bf16\n"
        "  torchrun --nproc-per-node 8 scripts/train_side_branch.py dpvr-7b --data chats.json --output adapter\n"
        "  python scripts/train_side_branch.py ... --resume     goes on after a kill, from the last whole checkpoint\n"
        "\nexit status: 0 when trained, 1 when model, data, cache or adapter cannot be used, 2 for wrong options",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="folder or Hub id of a DPVR, or of a LLaVA")
    parser.add_argument("--data", type=given_path, required=True, help="conversations to train on")
    parser.add_argument(
        "--image-folder",
        type=given_path,
        help="what image paths start from (default: DATA if that is a folder, else its folder; so for --eval-data)",
    )
    parser.add_argument("--output", type=given_path, required=True, help="folder for adapter, checkpoints and records")
    parser.add_argument("--eval-data", type=given_path, help="conversations to evaluate on while training")
    parser.add_argument("--eval-rows", type=int, default=0, help="without --eval-data: hold back this many of DATA")
    parser.add_argument("--loss", choices=list(LOSSES), default="answer", help="default: %(default)s")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--whole-fusion", action="store_true", help="train all of the fusion layers as well")
    what.add_argument("--lora", choices=["fusion"], help="train LoRA on the fusion layers as well")
    what.add_argument("--peft-config", type=given_path, help="folder of an adapter_config.json to train as well")
    parser.add_argument("--saturation-layer", type=int, help="of a LLaVA that is no DPVR yet")
    parser.add_argument(
        "--cache-features", type=given_path, metavar="DIR", help="compute the frozen part once, keep it here"
    )
    parser.add_argument("--max-length", type=int, help="most tokens of a row (default: the tokenizer's, at most 2048)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of OUTPUT")
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="of the frozen weights (default: that of --bf16 or --fp16, else float32)",
    )
    parser.add_argument("--base", help="Hub id of the base model, for adapter and card (default: MODEL)")
    options, rest = parser.parse_known_args(arguments)
    trainer_parser = HfArgumentParser(TrainingArguments, prog=parser.prog, add_help=False)
    trainer_parser.set_defaults(
        **DEFAULTS, report_to="tensorboard" if importlib.util.find_spec("tensorboard") else "none"
    )
    if options.eval_data or options.eval_rows:
        rest = ["--eval_strategy", "steps", *rest]  # the last one given counts
    own = {"output_dir": str(options.output.resolve()), **OWN}
    for name, value in own.items():
        if any(argument.split("=")[0].replace("-", "_") == f"__{name}" for argument in rest):
            parser.error(f"--{name} is set by this command, to {value}: leave it out")
    rest += [part for name, value in own.items() for part in (f"--{name}", value)]
    try:
        (training_arguments,) = trainer_parser.parse_args_into_dataclasses(rest)
    except (ValueError, ImportError) as error:  # options that exclude each other, or that this machine does not have
        parser.error(str(error))
    if options.eval_data and options.eval_rows:
        parser.error("--eval-rows holds back rows of DATA, which --eval-data stands in for: give one of the two")
    if options.eval_rows < 0:
        parser.error(f"--eval-rows {options.eval_rows}: give a number of rows")
    if not (options.eval_data or options.eval_rows):  # which the Trainer would miss once the model is loaded
        for name, off in (("eval_strategy", "no"), ("eval_on_start", False)):
            if getattr(training_arguments, name) != off:
                parser.error(f"--{name} needs rows to evaluate on: give --eval-data or --eval-rows")
    if options.max_length is not None and options.max_length < 1:
        parser.error(f"--max-length {options.max_length}: give at least 1 token, or leave it out")
    if training_arguments.max_steps < 1 and training_arguments.max_steps != -1:  # the default: as the epochs have it
        parser.error(f"--max_steps {training_arguments.max_steps}: give at least 1, or leave it out")
    if training_arguments.max_steps == -1 and not training_arguments.num_train_epochs > 0:  # nothing would train
        parser.error(f"--num_train_epochs {training_arguments.num_train_epochs}: give more than 0, or leave it out")
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(training_arguments, name) < 1:
            parser.error(f"--{name} {getattr(training_arguments, name)}: give at least 1")
    for name in ("data", "image_folder", "eval_data", "peft_config"):
        path = getattr(options, name)
        if path is not None and not path.exists():  # now, and not once the model is loaded
            parser.error(f"--{name.replace('_', '-')} {path} does not exist")
    if options.peft_config and not (options.peft_config / CONFIG_FILE).is_file():
        parser.error(f"--peft-config {options.peft_config}: give a folder that holds an {CONFIG_FILE}")
    if (options.output / "config.json").exists():
        parser.error(
            f"--output {options.output} holds a model, which would load with the adapter from then on: give "
            "another folder"
        )
    is_resumable = last_checkpoint(options.output) is not None
    if is_resumable and not options.resume:
        parser.error(
            f"--output {options.output} holds checkpoints of an earlier run: pass --resume, or another folder"
        )
    if (options.output / WEIGHTS_FILE).exists() and not is_resumable:
        parser.error(
            f"--output {options.output} holds an adapter and no checkpoint to go on from: give another folder"
        )
    if training_arguments.metric_for_best_model not in (None, "loss", "eval_loss"):  # an error once it is evaluated
        parser.error(
            f"--metric_for_best_model {training_arguments.metric_for_best_model}: only the loss is evaluated; give "
            "eval_loss, or leave it out"
        )
    for name, why in REFUSED.items():
        if getattr(training_arguments, name):
            parser.error(f"--{name} {why}")
    if (training_arguments.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        parser.error("--gradient_checkpointing_kwargs: use_reentrant needs inputs that train; leave it out")
    if training_arguments.n_gpu > 1:  # the Trainer would spread each batch by torch's DataParallel
        parser.error(
            f"one process would train on {training_arguments.n_gpu} GPUs: use torchrun --nproc-per-node "
            f"{training_arguments.n_gpu} in the place of python, or let CUDA_VISIBLE_DEVICES name one"
        )
    if training_arguments.fp16 and training_arguments.device.type == "cpu":
        parser.error("--fp16 needs a GPU: pass --bf16, or neither")
    return options, training_arguments


def load_processor(options: argparse.Namespace, arguments: TrainingArguments):
    """The processor, which the rows are checked with before the model is loaded. What kind of model that is and its
    licence are noted in `options`."""
    check_name(options.model)
    config = AutoConfig.from_pretrained(options.model, trust_remote_code=True)
    # Now, and not between the last step and the adapter: the Hub may take its time
    options.license = read_license(options.model) if arguments.process_index == 0 else {}
    options.from_llava = config.model_type != "dpvr"
    if options.from_llava:
        return processor_from_llava(options.model)
    if options.saturation_layer not in (None, config.saturation_layer):
        raise ValueError(
            f"{options.model} is routed at layer {config.saturation_layer}, not at {options.saturation_layer}: "
            "convert it anew, or give its LLaVA."
        )
    return AutoProcessor.from_pretrained(options.model, trust_remote_code=True)


def frozen_dtype(options: argparse.Namespace, arguments: TrainingArguments) -> str:
    return options.dtype or ("bfloat16" if arguments.bf16 else "float16" if arguments.fp16 else "float32")


def load_model(options: argparse.Namespace, arguments: TrainingArguments):
    dtype = frozen_dtype(options, arguments)
    if not options.from_llava:
        model, loaded = AutoModel.from_pretrained(
            options.model, trust_remote_code=True, dtype=dtype, output_loading_info=True
        )
        refuse_missing(loaded, options.model)
    else:
        # The side branch is in no file, and the processes that leave reading to the first would not make it
        with patch_environment(fsdp_cpu_ram_efficient_loading="false"):
            model = from_llava(options.model, saturation_layer=options.saturation_layer, dtype=dtype)
    if model.dtype != torch.float32 and not (arguments.bf16 or arguments.fp16):
        raise ValueError(
            f"--dtype {options.dtype}: the frozen weights are {model.dtype}, but what trains is float32. Pass --bf16 "
            "or --fp16 as well, so that both compute in one type, or leave --dtype out."
        )
    return model.to(arguments.device)


def wrap(model, options: argparse.Namespace, lora: str | PeftConfig | None) -> StagedModel:
    """The model with what trains in it, which is in float32."""
    model = add_adapter(model, lora, whole_fusion=options.whole_fusion)
    train_in_float32(model)
    return StagedModel(model, options.loss)


def make_datasets(options, processor, fresh: bool) -> tuple[Dataset, Dataset | None]:
    """Training and evaluation rows."""
    max_length = options.max_length or min(processor.tokenizer.model_max_length, 2048)

    def read(path: Path, name: str) -> ConversationDataset:
        folder = options.image_folder or (path if path.is_dir() else path.parent)
        bad_rows = BadRows(options.output / name, fresh)
        data = ConversationDataset(read_rows(path), processor, folder, bad_rows, max_length)
        print(f"{path}: {len(data):,} of {len(data.rows):,} rows; {bad_rows.summary()}", flush=True)
        return data

    train, evaluation = read(options.data, "bad_rows.jsonl"), None
    if options.eval_data:
        evaluation = read(options.eval_data, "bad_rows_eval.jsonl")
    elif options.eval_rows:
        evaluation = train.hold_back(options.eval_rows)
    for data in (train, evaluation) if evaluation else (train,):
        data[0]  # where no row can be loaded, the run ends now and not at its first evaluation
    return train, evaluation


def trained_parts(options: argparse.Namespace, model: StagedModel) -> str:
    parts = ["side branch"] if model.config.num_side_layers else []
    if options.whole_fusion:
        parts.append("fusion layer")
    elif options.lora or options.peft_config:
        config = model.model.active_peft_config
        parts.append("LoRA" if config.peft_type == "LORA" else config.peft_type.value)
        parts += sorted(set(config.modules_to_save or ()) - {"side_branch"})
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last


def facts_of(options: argparse.Namespace, arguments: TrainingArguments, data: ConversationDataset) -> dict[str, str]:
    """What a run must have in common with the one that it goes on with. How many steps or epochs is free, and over how
    many processes a batch is spread."""
    peft_config = "none"
    if options.peft_config:
        peft_config = digest((options.peft_config / CONFIG_FILE).read_bytes())
    facts = {
        "loss": options.loss,
        "data": f"{options.data.name} of {len(data)} rows",
        "max_length": data.max_length,
        "dtype": frozen_dtype(options, arguments),
        "cached_features": options.cache_features is not None,
        "peft_config": peft_config,
        "total_batch_size": total_batch_size(arguments, arguments.per_device_train_batch_size),
    }
    facts |= {name: getattr(arguments, name) for name in KEPT}
    return {name: str(getattr(value, "value", value)) for name, value in facts.items()}


def total_batch_size(arguments: TrainingArguments, batch_size: int) -> int:
    return batch_size * arguments.gradient_accumulation_steps * arguments.world_size


def record_of(options, arguments: TrainingArguments, trainer, model, data, held_out) -> dict:
    """What a model card and a reader need to know of the run. No path of this machine."""
    trained, total, _ = count_trainable(model)
    # Which --auto_find_batch_size may have made smaller
    batch_size = total_batch_size(arguments, trainer._train_batch_size)
    history = trainer.state.log_history
    evaluation = {}
    if held_out:
        evaluation = {"eval_data": (options.eval_data or options.data).name, "eval_rows": held_out.num_rows()}
    # Of a step that was evaluated twice, as by a run that goes on at its end, the last
    evaluated = {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}
    return {
        "base_model": base_name(options.base or options.model),
        "base_type": "llava" if options.from_llava else "dpvr",
        **options.license,
        "data": options.data.name,
        "rows": data.num_rows(),
        "bad_rows": data.bad_rows.summary().split(", listed")[0],
        **evaluation,
        "loss": options.loss,
        "trains": trained_parts(options, model),
        "peft_type": model.model.active_peft_config.peft_type.value,
        "saturation_layer": model.config.saturation_layer,
        "num_side_layers": model.config.num_side_layers,
        "num_fusion_layers": model.config.num_fusion_layers,
        "trainable_parameters": trained,
        "parameters": total,
        "hyperparameters": {
            "learning_rate": arguments.learning_rate,
            "lr_scheduler_type": str(arguments.lr_scheduler_type.value),
            "warmup_steps": arguments.warmup_steps,
            "weight_decay": arguments.weight_decay,
            "batch_size": batch_size,
            "epochs": trainer.state.epoch,
            "steps": trainer.state.global_step,
            "seed": arguments.seed,
            "precision": "bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "fp32",
            "max_grad_norm": arguments.max_grad_norm,
        },
        "loss_curve": [[entry["step"], entry["loss"]] for entry in history if "loss" in entry],
        "eval_loss_curve": [[step, loss] for step, loss in evaluated.items()],
        "training_seconds": round(trainer.seconds_trained()),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }


def run(options: argparse.Namespace, arguments: TrainingArguments) -> dict:
    """Trains, and writes adapter and records to OUTPUT. The record of the run."""
    set_seed(arguments.seed)
    checkpoint = last_checkpoint(options.output) if options.resume else None
    if options.resume and checkpoint is None and arguments.process_index == 0:
        print(f"{options.output} holds no whole checkpoint to go on from: the training starts anew", flush=True)
    lora = read_config(options.peft_config) if options.peft_config else options.lora
    processor = load_processor(options, arguments)
    if arguments.process_index == 0:
        options.output.mkdir(parents=True, exist_ok=True)
        lock_record(options.output / RUN_FILE)
    with arguments.main_process_first():
        data, held_out = make_datasets(options, processor, fresh=checkpoint is None and arguments.process_index == 0)
    if arguments.dataloader_drop_last and len(data) < arguments.train_batch_size * arguments.world_size:
        raise ValueError(
            f"--dataloader_drop_last leaves out all of {len(data)} rows, which are fewer than a batch of "
            f"{arguments.train_batch_size} for each of {arguments.world_size} process(es)."
        )
    facts = facts_of(options, arguments, data)
    if checkpoint:
        check_state(checkpoint)
        check_facts(checkpoint, stated_facts(checkpoint), facts)  # before the model is loaded for nothing
    model = wrap(load_model(options, arguments), options, lora)
    if arguments.process_index == 0:
        print(count_trainable(model)[2], flush=True)
    rows, evaluation, collate = data, held_out, Collator(processor.tokenizer.pad_token_id)
    if options.cache_features:
        rows = cached(options.cache_features / "train", model, data, arguments)
        evaluation = held_out and cached(options.cache_features / "eval", model, held_out, arguments)
        collate = collate_rows
    # What a layer before the fusion trains may be of no use to a batch, as one without an image
    arguments.ddp_find_unused_parameters = not model.features_frozen
    trainer = SideBranchTrainer(model, arguments, collate, train_dataset=rows, eval_dataset=evaluation, facts=facts)
    with names_file(options.output):  # for the logs of TensorBoard
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    is_evaluated = trainer.evaluated_at == trainer.state.global_step and not arguments.load_best_model_at_end
    if evaluation is not None and not is_evaluated:
        trainer.evaluate()
    record = record_of(options, arguments, trainer, model, data, held_out)
    finish(options, trainer, model, record)
    if arguments.world_size > 1:  # one that ends earlier would take down the one that writes
        trainer.accelerator.wait_for_everyone()
        torch.distributed.destroy_process_group()
    return record


def cached(folder: Path, model: StagedModel, data: ConversationDataset, arguments: TrainingArguments):
    """The rows of `data` as features on disk, computed where they are missing, each process its share."""
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else None
    cache_features(
        folder,
        model,
        data,
        dtype=dtype,
        batch_size=arguments.per_device_train_batch_size,
        num_workers=arguments.dataloader_num_workers,
        rank=arguments.process_index,
        world_size=arguments.world_size,
    )
    if arguments.world_size > 1:
        torch.distributed.barrier()
    return CachedFeatures(folder)


def finish(options, trainer, model: StagedModel, record: dict) -> None:
    state, weights = None, trainable(model.model)
    if trainer.is_fsdp_enabled:
        state = trainer.accelerator.get_state_dict(trainer.model)
        state = {name.removeprefix("model."): weight for name, weight in state.items()}
        weights = {name: weight for name, weight in state.items() if name in weights}
    check_finite(weights, trainer.state.global_step)
    if trainer.args.should_save:
        try:
            write_results(options, model, record, state)
        except (OSError, SafetensorError) as error:  # safetensors has a type of its own for a full disk
            raise OSError(
                f"The adapter cannot be written into {options.output}: {error}. Checkpoints are kept: go on with "
                "--resume, once there is room if that is what lacks."
            ) from error


def write_results(options, model: StagedModel, record: dict, state: dict | None) -> None:
    """Adapter, records and card, which are all there before the first gets its name."""
    output = options.output
    for left in output.glob(".results-*"):  # by a run that was killed here
        shutil.rmtree(left, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".results-", dir=output) as made:
        staging = Path(made)
        save_adapter(model.model, staging, options.base or options.model, state_dict=state)
        (staging / RUN_FILE).write_text(json.dumps(record, indent=2) + "\n")
        has_plot = plot_losses(record, staging / PLOT_FILE)
        if has_own_card(output):
            print(f"{output / CARD_FILE} was not written by a training and stays as it is", flush=True)
        else:
            card = make_card(record, output.resolve().name, has_plot=has_plot)
            (staging / CARD_FILE).write_text(card, encoding="utf-8")
            (output / CARD_FILE).unlink(missing_ok=True)  # beside another record it would look like somebody's own
        for name in (CONFIG_FILE, RUN_FILE, PLOT_FILE, CARD_FILE, WEIGHTS_FILE):  # these last: then all is there
            if (staging / name).exists():
                os.replace(staging / name, output / name)


def main(arguments: list[str] | None = None) -> int:
    options, training_arguments = parse_args(arguments)
    # Of several processes one may wait for another, and cannot clean up: a launcher ends them at once
    is_alone = training_arguments.world_size == 1
    try:
        with interrupted_by_sigterm() if is_alone else contextlib.nullcontext():
            record = run(options, training_arguments)
    except (ValueError, CacheError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"\ninterrupted; with --resume a run goes on from the last checkpoint in {options.output}", file=sys.stderr
        )
        return 130
    finally:
        release_records()
    if training_arguments.process_index == 0:
        losses = [loss for _, loss in record["loss_curve"]]
        if losses:
            print(f"loss {losses[0]:.4g} at first, {losses[-1]:.4g} at last")
        print(record["bad_rows"])
        print(f"{options.output}: adapter of {record['trainable_parameters']:,} weights")
    return 0


if __name__ == "__main__":
    end_process(main())
