# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""
Makes a DPVR checkpoint from a LLaVA checkpoint: the same weights under transformers 5's names, and a side branch.

The output folder appears complete or not at all, and every tensor in it was read back and compared with its source by
checksum. A conversion that was killed goes on with the last shard if it is asked for again. Stored weights are passed
on in pieces of a few megabytes, whatever the size of the model; one that is made is in memory as a whole. Pickled
weights are read by torch's `weights_only` loader, which runs no code. For POSIX systems: two conversions to one folder
are kept apart by `flock`.
"""

import argparse
import dataclasses
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from transformers import GenerationConfig, LlavaConfig

from benchmarks.accounting import cache_bytes, decoder_flops, dense_config, prefill_loads
from configuration_dpvr import AUTO_MAP, DPVRConfig, proportional_layer
from read_llava import EMBEDDINGS, Checkpoint, base_weights, check_names, find_tensors, read_checkpoint, refusing
from read_weights import ConversionError, MadeTensor, StoredTensor, Weight, read_json, reason, version_of
from scripts.output import interrupted_by_sigterm, say
from scripts.publish import explain
from scripts.push_to_hub import push_to_hub
from side_branch_weights import (
    adapter_file,
    adapter_saturation_layer,
    adapter_weights,
    check_adapter_fits,
    side_branch_weights,
)
from training.card import UNNAMED, read_license
from write_checkpoint import (
    Staging,
    check_apart,
    check_disk,
    check_empty,
    check_output,
    link_files,
    plan_shards,
    staged,
    was_renamed,
    write_index,
    write_json,
    write_shards,
)

HERE = Path(__file__).resolve().parent
CODE_FILES = ("configuration_dpvr.py", "modeling_dpvr.py", "processing_dpvr.py")
SIDE_BRANCH_FILE = "model-side-branch.safetensors"
MODEL_CLASS = "DPVRForConditionalGeneration"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


# ---------------------------------------------------------------------------------------------- output folder


def make_dpvr_config(config: LlavaConfig, routing: dict[str, int]) -> DPVRConfig:
    """Without a dtype, which the weights may have to tell."""
    fields = config.to_dict()
    for part in (fields, fields["text_config"], fields["vision_config"]):
        for name in ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"):
            part.pop(name, None)
    fields.pop("transformers_weights", None)  # the name of a file of the source's
    fields |= {"architectures": [MODEL_CLASS], "auto_map": AUTO_MAP, **routing}
    del fields["model_type"]
    try:
        return DPVRConfig(**fields)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConversionError(reason(error)) from error


def make_generation_config(checkpoint: Checkpoint) -> dict:
    """The source's own, if it has one; its tokens are set where the source had no `<pad>`."""
    path, text = checkpoint.folder / "generation_config.json", checkpoint.config.text_config
    fields = read_json(path) if path.is_file() else {"bos_token_id": text.bos_token_id}
    fields.setdefault("eos_token_id", text.eos_token_id)
    if "mm_vision_tower" in checkpoint.fields or fields.get("pad_token_id") is None:
        fields["pad_token_id"] = checkpoint.processor.tokenizer.pad_token_id
    with refusing(f"{path} is no generation config that transformers can read"):
        GenerationConfig.from_dict(fields)
    return fields


@dataclass(frozen=True)
class Plan:
    """What becomes of the weights.

    Attributes:
        shards: files to write, the side branch's last.
        linked: files of the source to link to, by their names in the output.
        tensors: of the linked files, with their keys there.
        dtype: of all that is written.
    """

    shards: dict[str, list[Weight]]
    linked: dict[str, Path]
    tensors: list[StoredTensor]
    dtype: torch.dtype

    def sources(self) -> dict[str, tuple[int, int, int]]:
        """Every file that is read or linked to, and its version when its header was read."""
        sources = [weight.source for shard in self.shards.values() for weight in shard]
        stored = [source.read if isinstance(source, MadeTensor) else source for source in sources]
        return {str(tensor.path): tensor.version for tensor in [*stored, *self.tensors] if tensor}

    def request(self) -> dict:
        """All that decides about the bytes of the weights, as JSON."""
        sources, linked = self.sources(), {str(path) for path in self.linked.values()}
        # A file may be written over with its time kept, which the time of that tells; a hard link changes it too
        touched = {path: [Path(path).stat().st_ctime_ns] for path in sources.keys() - linked}
        return {
            "sources": {path: [*version, *touched.get(path, [])] for path, version in sources.items()},
            "linked": {name: str(path) for name, path in self.linked.items()},
            "dtype": str(self.dtype),
            "shards": {
                name: [[weight.name, list(weight.shape), weight.origin] for weight in shard]
                for name, shard in self.shards.items()
            },
        }


def plan_links(checkpoint: Checkpoint, base: list[Weight], branch: list[Weight], dtype: torch.dtype) -> Plan:
    """The files of the source as they are, and one more for the side branch.

    Raises:
        ConversionError: if transformers would not load from those files what a full conversion writes.
    """
    if "mm_vision_tower" in checkpoint.fields:
        raise ConversionError(
            f"--link: {checkpoint.name} has the original layout, whose names and vocabulary transformers cannot load; "
            "convert without --link."
        )
    for tensor in (weight.source for weight in base):
        if tensor.path.suffix == ".bin":
            raise ConversionError(f"--link: {tensor.path} is no safetensors file; convert without --link.")
        if tensor.dtype != dtype:
            raise ConversionError(
                f"--link: {tensor.key} in {tensor.path} is stored as {tensor.stated_dtype}, but {dtype} is asked for; "
                "a link cannot be cast."
            )
    check_names(checkpoint, base)
    # transformers looks for model.safetensors before an index
    names = {weight.source.path: weight.source.path.name for weight in base}
    names = {path: "model-base.safetensors" if name == "model.safetensors" else name for path, name in names.items()}
    if len({*names.values(), SIDE_BRANCH_FILE}) <= len(names):
        raise ConversionError(
            f"--link: {checkpoint.folder} has files named as those to be written, model-base.safetensors or "
            f"{SIDE_BRANCH_FILE}; convert without --link."
        )
    linked = {name: path for path, name in names.items()}
    return Plan({SIDE_BRANCH_FILE: branch} if branch else {}, linked, [weight.source for weight in base], dtype)


def write_weights(staging: Staging, plan: Plan, progress: bool) -> None:
    """Weights and their index."""
    link_files(staging, plan.linked)
    write_shards(staging, plan.shards, plan.dtype, progress)
    for path, version in plan.sources().items():
        if (now := version_of(Path(path).stat())) != version:
            raise ConversionError(
                f"{path} was changed while it was read: it had {version[0]} bytes, now it has {now[0]}, or was "
                "written again."
            )
    files = {path: name for name, path in plan.linked.items()}
    entries = [
        (tensor.key, files[tensor.path], torch.Size(tensor.shape).numel(), tensor.dtype.itemsize)
        for tensor in plan.tensors
    ]
    for name, shard in plan.shards.items():
        entries += [(weight.name, name, weight.numel, plan.dtype.itemsize) for weight in shard]
    write_index(staging.folder, entries)


def what_was_noted(staging: Staging, plan: Plan) -> dict:
    """Fields of the summary that are known once the weights are written: which files were copied where links were
    asked for, and why, and how many numbers are not finite, by file and key of the source."""
    nonfinite = {}
    for name, shard in plan.shards.items():
        for weight in shard:
            if count := staging.finished[name]["nonfinite"].get(weight.name):
                is_stored = isinstance(weight.source, StoredTensor)  # twice, where a side layer is a copy
                where = (str(weight.source.path), weight.source.key) if is_stored else (name, weight.name)
                nonfinite[where] = count
    return {
        "copied": {name: staging.finished[name]["reason"] for name in plan.linked if name in staging.finished},
        "nonfinite": tuple((*where, count) for where, count in nonfinite.items()),
    }


def write_folder(
    staging: Staging,
    checkpoint: Checkpoint,
    config: DPVRConfig,
    generation_config: dict,
    plan: Plan,
    summary: "ConversionSummary",
    progress: bool,
) -> None:
    """Everything that the output holds."""
    folder = staging.folder
    write_weights(staging, plan, progress)
    try:
        checkpoint.processor.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # tokenizers has no type of its own for a full disk
        raise ConversionError(f"The processor cannot be written: {reason(error)}.") from error
    config.to_json_file(folder / "config.json")
    write_json(folder / "generation_config.json", generation_config)
    for name in CODE_FILES:
        (folder / name).write_bytes((HERE / name).read_bytes())
    (folder / "README.md").write_text(model_card(checkpoint, summary), encoding="utf-8")


# ---------------------------------------------------------------------------------------------- summary and card


@dataclass(frozen=True)
class ConversionSummary:
    """What a conversion did.

    Attributes:
        source, output: as given; `output` is None after a dry run.
        saturation_layer, saturation_reason: the layer, and why it was chosen.
        roles: decoder layers by role, such as `{"joint": "0..17", "side branch": "1 layer, identity"}`.
        dtype: name of the weights' type.
        num_parameters, num_trainable: of the whole model, and of its side branch.
        side_branch: `"identity"`, `"copy"`, `"random"` or `"trained"`.
        vision_tokens, text_tokens: the prompt of the two ratios.
        flops_ratio: decoder FLOPs of reading that prompt, to the source's.
        cache_ratio, cache_mib: KV cache after that prompt, to the source's and in MiB.
        linked: files of the source that the output links to, by their names in the output.
        copied: those of them that the file system could only copy, and why.
        nonfinite: file, key and number of NaNs and infinities, for every weight that has any; not known of linked
            files, which are not read.
    """

    source: str
    output: Path | None
    saturation_layer: int
    saturation_reason: str
    roles: dict[str, str]
    dtype: str
    num_parameters: int
    num_trainable: int
    side_branch: str
    vision_tokens: int
    text_tokens: int
    flops_ratio: float
    cache_ratio: float
    cache_mib: float
    linked: dict[str, Path] = dataclasses.field(default_factory=dict)
    copied: dict[str, str] = dataclasses.field(default_factory=dict)
    nonfinite: tuple[tuple[str, str, int], ...] = ()

    def __str__(self) -> str:
        share = self.num_trainable / self.num_parameters
        prompt = f"{self.vision_tokens} vision + {self.text_tokens} text tokens"
        where = "nothing, this was a dry run" if self.output is None else str(self.output)
        rows = [
            ("source", self.source),
            ("saturation", f"layer {self.saturation_layer}: {self.saturation_reason}"),
            *((role, layers) for role, layers in self.roles.items()),
            ("parameters", f"{self.num_parameters:,} ({self.dtype}), {self.num_trainable:,} trainable ({share:.2%})"),
            ("decoder FLOPs", f"{self.flops_ratio:.1%} of the source's, prefill of {prompt}"),
            ("KV cache", f"{self.cache_ratio:.1%} of the source's, {self.cache_mib:,.1f} MiB after {prompt}"),
            ("written", where),
        ]
        if links := len(self.linked) - len(self.copied):
            rows.append(("linked", f"{links} of the source's weight files, unread; what changes one changes both"))
        rows += [("copied", f"{name}, for it cannot be linked: {why}") for name, why in self.copied.items()]
        rows += [
            ("warning", f"{count:,} of the numbers of {key} in {file} are NaN or infinite")
            for file, key, count in self.nonfinite
        ]
        lines = [f"{name:15}{value}" for name, value in rows]
        if self.output is not None:
            lines += ["", *load_lines(json.dumps(str(self.output), ensure_ascii=False))]
        return "\n".join(lines)


def load_lines(name: str) -> list[str]:
    """Python that loads a checkpoint; `name` is an expression."""
    return [
        f"processor = AutoProcessor.from_pretrained({name}, trust_remote_code=True)",
        f'model = AutoModelForImageTextToText.from_pretrained({name}, trust_remote_code=True, dtype="auto")',
    ]


def _layer_range(first: int, end: int) -> str:
    return "none" if first == end else f"{first}..{end - 1}" if end - first > 1 else str(first)


def summarize(
    checkpoint: Checkpoint,
    config: DPVRConfig,
    base: list[Weight],
    branch: list[Weight],
    dtype: str,
    init: str,
    why: str,
) -> ConversionSummary:
    """The summary of a dry run."""
    num_trainable = sum(weight.numel for weight in branch)
    saturation, fusion = config.saturation_layer, config.first_fusion_layer
    prompt = (config.image_seq_length, 64)
    both = (dense_config(config), config)
    flops = [decoder_flops(each, prefill_loads(each, *prompt)) for each in both]
    caches = [sum(cache_bytes(each, *prompt, itemsize=DTYPES[dtype].itemsize).values()) for each in both]
    return ConversionSummary(
        source=checkpoint.name,
        output=None,
        saturation_layer=saturation,
        saturation_reason=why,
        roles={
            "joint": _layer_range(0, saturation),
            "side branch": f"{config.num_side_layers} layer{'s' if config.num_side_layers > 1 else ''}, {init}"
            if branch
            else "none",
            "text-only": _layer_range(saturation, fusion),
            "fusion": _layer_range(fusion, config.text_config.num_hidden_layers),
        },
        dtype=dtype,
        num_parameters=sum(weight.numel for weight in base) + num_trainable,
        num_trainable=num_trainable,
        side_branch=init,
        vision_tokens=prompt[0],
        text_tokens=prompt[1],
        flops_ratio=flops[1] / flops[0],
        cache_ratio=caches[1] / caches[0],
        cache_mib=caches[1] / 2**20,
    )


CARD = """\
---
{front_matter}
---

# {title}

{source} with dual-path vision routing (DPVR-LF, arXiv 2606.09131): vision tokens leave the decoder at layer
{saturation_layer} and meet the text again in the fusion layers. {status}

| tokens that pass | decoder layers |
|---|---|
{table}

{num_parameters:,} parameters, of which the side branch has {num_trainable:,} ({share:.2%}). By count, not by
measurement: reading {vision_tokens} vision and {text_tokens} text tokens takes {flops_ratio:.1%} of the source's
decoder FLOPs and leaves {cache_ratio:.1%} of its KV cache.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

{unnamed}
{load}

content = [{{"type": "image", "image": "picture.jpg"}}, {{"type": "text", "text": "What is in this picture?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, model.dtype)
tokens = model.generate(**inputs, max_new_tokens=64)
print(processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
```

Every weight outside `model.side_branch` is that of {source}, in {dtype}. Made by `convert_llava_to_dpvr.py`; the code
in this folder runs with `trust_remote_code=True`. Use, limits and licence of the weights are those of {source}.
"""


def model_card(checkpoint: Checkpoint, summary: ConversionSummary) -> str:
    """README.md of the converted checkpoint. A folder's name stands for a source that is no Hub repository."""
    is_local = Path(checkpoint.name).is_dir()
    source = checkpoint.folder.name if is_local else checkpoint.name
    stated = {"license": "other", **read_license(checkpoint.folder)}
    if stated["license"] == "other":
        stated.setdefault("license_name", "that-of-the-source")
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        **stated,
        base_model=None if is_local else source,
        tags=["custom_code", "dpvr", "llava"],
    )
    worse = f"expect worse answers about images than {source}'s until it is trained."
    if not summary.num_trainable:
        status = f"There is no side branch on the way, and **the fusion is untrained**: {worse}"
    elif summary.side_branch == "trained":
        status = "On the way they pass the side branch, which is trained."
    else:
        init = f"{summary.side_branch} initialisation"
        status = f"On the way they pass the side branch. **It is untrained** ({init}): {worse}"
    return CARD.format(
        front_matter=data.to_yaml().strip(),
        title=f"DPVR of {source.split('/')[-1]}",
        source=source,
        status=status,
        table="\n".join(f"| {role} | {layers} |" for role, layers in summary.roles.items()),
        share=summary.num_trainable / summary.num_parameters,
        unnamed=UNNAMED,
        load="\n".join(load_lines("name")),
        **{name: getattr(summary, name) for name in summary.__dataclass_fields__ if name != "source"},
    )


# ---------------------------------------------------------------------------------------------- conversion


def analyzed_layer(folder: str | Path, num_layers: int, num_fusion_layers: int) -> tuple[int, str]:
    """The saturation layer that `scripts/analyze_saturation.py` recommends in its folder of results, and why.

    Raises:
        ConversionError: there are no results, they recommend none, or are those of a decoder of another depth or with
            other fusion layers.
    """
    path = Path(folder) / "saturation.json"
    results = read_json(path)
    try:
        analyzed, fusion = (results["settings"][key] for key in ("num_hidden_layers", "first_fusion_layer"))
        layer = results["recommendation"]["saturation_layer"]
        why, num_samples = results["recommendation"]["reason"], results["samples"]
    except KeyError as error:
        raise ConversionError(f"{path} is not a result of analyze_saturation.py: it has no {error}.") from error
    except TypeError as error:
        raise ConversionError(f"{path} is not a result of analyze_saturation.py.") from error
    if analyzed != num_layers:
        raise ConversionError(f"{path} is about a decoder of {analyzed} layers, but the source has {num_layers}.")
    if fusion != num_layers - num_fusion_layers:
        raise ConversionError(
            f"{path} is about fusion from layer {fusion} on, but with num_fusion_layers={num_fusion_layers} it is "
            f"from layer {num_layers - num_fusion_layers} on."
        )
    if layer is None:
        raise ConversionError(f"{path} recommends no layer: {why}")
    if type(layer) is not int or not 1 <= layer <= fusion:
        raise ConversionError(f"{path} recommends {layer!r:.80}, which is no layer from 1 to {fusion}.")
    return layer, f"by the analysis of {num_samples} samples in {folder}: {why}"


def choose_saturation_layer(
    given: int | str | None,
    num_layers: int,
    num_fusion_layers: int,
    adapter: Path | None,
    analysis: str | Path | None = None,
) -> tuple[int, str]:
    """The saturation layer and why: the one given, for `"auto"` that of the analysis, else the adapter's, else the
    paper's proportion, 18 of 32."""
    if (given == "auto") != (analysis is not None):
        raise ConversionError(
            "--saturation-layer auto and --analysis DIR, with DIR of analyze_saturation.py, go together."
        )
    why = "as asked for"
    if given == "auto":
        given, why = analyzed_layer(analysis, num_layers, num_fusion_layers)
    stated = adapter_saturation_layer(adapter) if adapter else None
    if given is not None and stated not in (None, given):
        raise ConversionError(f"{adapter} was trained with saturation layer {stated}, but {given} was asked for.")
    if given is not None:
        return given, why
    if stated is not None:
        return stated, "the adapter was trained there"
    layer = proportional_layer(num_layers, num_fusion_layers)
    return layer, f"18 of 32 layers in the paper, {layer} of {num_layers} here"


def choose_dtype(asked: str, checkpoint: Checkpoint) -> str:
    """The type asked for; for `auto` the config's, else that of the embeddings in the source."""
    fields, name = checkpoint.fields, asked
    if asked == "auto":
        text = fields["text_config"] if isinstance(fields.get("text_config"), dict) else {}
        stated = [part.get(key) for part in (fields, text) for key in ("dtype", "torch_dtype")]
        embeddings = checkpoint.tensors.get(EMBEDDINGS)
        stored = str(embeddings.dtype).removeprefix("torch.") if embeddings else None
        name = next((each for each in [*stated, stored] if each), None)
    if not isinstance(name, str) or name not in DTYPES:
        raise ConversionError(
            f"dtype {name!r:.80} of {checkpoint.name} is none of {', '.join(DTYPES)}; choose with --dtype."
        )
    return name


def convert(
    source: str | Path,
    output: str | Path,
    *,
    saturation_layer: int | str | None = None,
    analysis: str | Path | None = None,
    num_side_layers: int = 1,
    num_fusion_layers: int = 1,
    side_branch_init: str = "identity",
    adapter: str | Path | None = None,
    vision_tower: str | None = None,
    tokenizer: str | None = None,
    dtype: str = "auto",
    revision: str | None = None,
    seed: int = 0,
    link: bool = False,
    dry_run: bool = False,
    progress: bool = False,
) -> ConversionSummary:
    """Converts the LLaVA checkpoint `source` into the DPVR checkpoint `output`.

    Args:
        source: Hub id or folder.
        output: Folder to make; it must not exist or be empty.
        saturation_layer: S; default the adapter's, else the paper's proportion, `18 * num_hidden_layers // 32`.
            `"auto"` takes what `analysis` recommends.
        analysis: Folder of results of `scripts/analyze_saturation.py`, for `saturation_layer="auto"`.
        num_side_layers: Decoder layers of the side branch; 0 for none.
        num_fusion_layers: Last decoder layers, which see both streams again.
        side_branch_init: `"identity"` (layer S with output projections of zero), `"copy"` (layers S, S + 1, ...) or
            `"random"` (as the backbone initialises a layer, from `seed`).
        adapter: Trained side branch, a safetensors file or a folder with one; replaces the initialisation.
        vision_tower: Hub id or folder of the CLIP tower of an original checkpoint, instead of its `mm_vision_tower`.
            Weights of the tower that the checkpoint itself holds are taken from there.
        tokenizer: Hub id or folder of the tokenizer, instead of the one in the source.
        dtype: `"auto"` (the source's), `"bfloat16"`, `"float16"` or `"float32"`.
        revision: Branch, tag or commit of a source on the Hub.
        seed: For `side_branch_init="random"`.
        link: Make hard links to the source's weight files, and write only the side branch.
        dry_run: Check everything but the numbers of the weights, and write nothing.
        progress: Show a progress bar on a terminal.

    Raises:
        ConversionError: a ValueError, if source or options cannot be converted, or the disk refuses. Nothing is left
            behind. An interrupt leaves a folder beside `output` for the next call to go on with.
    """
    output = Path(output)
    if dtype not in ("auto", *DTYPES):
        raise ConversionError(f"dtype={dtype!r:.80} is none of auto, {', '.join(DTYPES)}.")
    trained = adapter_file(str(adapter)) if adapter is not None else None
    check_output(output, *(path.resolve() for path in (Path(source), trained) if path and path.exists()))
    if output.exists() and not was_renamed(output):
        check_empty(output)
    checkpoint = read_checkpoint(str(source), revision, tokenizer, vision_tower)
    check_apart(output, checkpoint.folder)  # in the Hub's cache
    num_layers = checkpoint.config.text_config.num_hidden_layers
    layer, why = choose_saturation_layer(saturation_layer, num_layers, num_fusion_layers, trained, analysis)
    routing = {
        "saturation_layer": layer,
        "num_side_layers": num_side_layers,
        "num_fusion_layers": num_fusion_layers,
    }
    config, generation_config = make_dpvr_config(checkpoint.config, routing), make_generation_config(checkpoint)
    find_tensors(checkpoint)
    config.dtype = dtype = choose_dtype(dtype, checkpoint)
    base = base_weights(checkpoint)
    branch = side_branch_weights(base, config, side_branch_init, seed)
    if trained:
        check_adapter_fits(trained, config, base, checkpoint.name)
        branch, side_branch_init = adapter_weights(trained, branch), "trained"
    if link:
        plan = plan_links(checkpoint, base, branch, DTYPES[dtype])
    else:
        plan = Plan(plan_shards(base, branch, DTYPES[dtype].itemsize), {}, [], DTYPES[dtype])
    summary = summarize(checkpoint, config, base, branch, dtype, side_branch_init, why)
    if dry_run:
        check_disk(output, plan.shards.values(), plan.dtype)
        return summary
    summary = dataclasses.replace(summary, output=output, linked=plan.linked)
    request = {
        **plan.request(),
        "config": config.to_json_string(use_diff=False),
        "generation_config": generation_config,
        "processor": checkpoint.processor.to_json_string(),
        "tokenizer": tokenizer,
        "chat_template": checkpoint.processor.chat_template,
    }
    with staged(output, request) as staging:
        if not staging.is_done:
            write_folder(staging, checkpoint, config, generation_config, plan, summary, progress)
        return dataclasses.replace(summary, **what_was_noted(staging, plan))


EXAMPLES = """\
examples:
  python convert_llava_to_dpvr.py                                            examples/tiny-llava into ./dpvr-tiny
  python convert_llava_to_dpvr.py llava-hf/llava-1.5-7b-hf dpvr-7b           from the Hub, an untrained side branch
  python convert_llava_to_dpvr.py liuhaotian/llava-v1.5-7b dpvr-7b           from the original layout
  python convert_llava_to_dpvr.py ./llava dpvr --adapter ./side-branch       with a trained side branch
  python convert_llava_to_dpvr.py ./llava dpvr --saturation-layer auto --analysis saturation
  python convert_llava_to_dpvr.py ./llava dpvr --link                        0.4 GB for 7B, hard links for the rest
  python convert_llava_to_dpvr.py ./llava dpvr --dry-run                     only check and count

exit codes: 0 converted, 1 refused with a sentence and nothing left behind, 2 wrong usage, 130 interrupted; after an
interrupt or a kill the same command goes on with the shard it was at. If only the upload of --push-to-hub fails, the
checkpoint stays, and the message says how to push it again
"""


def layer_or_auto(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is neither a number nor auto") from error


def seed_number(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text} is no number from 0 to {2**32 - 1}")
    return int(text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Make a DPVR checkpoint from a LLaVA-1.5 checkpoint.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", nargs="?", help="Hub id or folder (default: examples/tiny-llava)")
    parser.add_argument("output", nargs="?", type=Path, help="folder to make (default: dpvr-tiny, without a source)")
    parser.add_argument(
        "--saturation-layer",
        type=layer_or_auto,
        metavar="N",
        help="a layer, or auto for that of --analysis (default: the paper's proportion, 18 of 32)",
    )
    parser.add_argument("--analysis", metavar="DIR", help="results of analyze_saturation.py, for auto")
    parser.add_argument(
        "--num-side-layers", type=int, default=1, metavar="N", help="of the side branch; 0 for none (default: 1)"
    )
    parser.add_argument(
        "--num-fusion-layers", type=int, default=1, metavar="N", help="last layers, which see all tokens (default: 1)"
    )
    parser.add_argument(
        "--side-branch-init",
        choices=("identity", "copy", "random"),
        default="identity",
        help="layer S with output projections of zero (default), layer S as it is, or new weights",
    )
    parser.add_argument("--adapter", metavar="PATH", help="trained side branch: a .safetensors file or its folder")
    parser.add_argument(
        "--vision-tower",
        metavar="NAME",
        help="CLIP of an original checkpoint, if not the one it names; weights of its own that it holds are kept",
    )
    parser.add_argument("--tokenizer", metavar="NAME", help="tokenizer, if not the source's")
    parser.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="default: the source's")
    parser.add_argument("--revision", help="branch, tag or commit of a source on the Hub")
    parser.add_argument("--seed", type=seed_number, help="for --side-branch-init random (default: 0)")
    parser.add_argument(
        "--link", action="store_true", help="make hard links to the source's weight files, write only the side branch"
    )
    parser.add_argument("--dry-run", action="store_true", help="check all but the weights' numbers, write nothing")
    parser.add_argument("--push-to-hub", metavar="REPO", help="upload the result")
    parser.add_argument("--private", action="store_true", help="make a private repository")
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options = vars(parser.parse_args(arguments))
    if options["source"] is None:
        options |= {"source": str(HERE / "examples" / "tiny-llava"), "output": Path("dpvr-tiny")}
    if options["output"] is None:
        parser.error("the following arguments are required: output")
    for name, value in options.items():
        if value == "":
            parser.error(f"{name if name in ('source', 'output') else '--' + name.replace('_', '-')} is empty")
    repo, private = options.pop("push_to_hub"), options.pop("private")
    if private and not repo:
        parser.error("--private is for --push-to-hub")
    if options["adapter"] and options["side_branch_init"] != "identity":
        parser.error("--side-branch-init is of a side branch that --adapter does not bring")
    if options["num_side_layers"] == 0 and options["side_branch_init"] != "identity":
        parser.error("--side-branch-init is of a side branch, and with --num-side-layers 0 there is none")
    if options["seed"] is not None and options["side_branch_init"] != "random":
        parser.error("--seed is for --side-branch-init random: nothing else is drawn at random")
    options["seed"] = options["seed"] or 0
    if repo:
        try:
            validate_repo_id(repo)
        except HFValidationError as error:
            parser.error(f"--push-to-hub: {error}")
    with interrupted_by_sigterm():
        try:
            summary = convert(**options, progress=True)
            say(str(summary))
            return try_to_push(summary.output, repo, private) if repo and summary.output else 0
        except (ConversionError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("interrupted; the same command goes on where this one was", file=sys.stderr)
            return 130


def try_to_push(folder: Path, repo: str, private: bool) -> int:
    """Pushes a checkpoint, which stays whatever becomes of that. Returns the exit code."""
    command = ["python", "scripts/push_to_hub.py", str(folder), repo, *(["--private"] if private else [])]
    again = f"{folder} is converted; push it again with `{shlex.join(command)}`"
    try:
        say(f"pushed to {push_to_hub(folder, repo, private=private)}")
    except KeyboardInterrupt:
        print(f"interrupted. {again}", file=sys.stderr)
        return 130
    except Exception as error:  # client and network fail in ways that have no common class
        print(f"error: {explain(error)}\n{again}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
