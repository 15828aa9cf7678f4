#!/usr/bin/env python
# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Find where vision saturates in a LLaVA: measure it layer by layer, recommend a saturation layer, write a report.

The metrics, their formulas and sources: `scripts/saturation_metrics.py`; the rule: `scripts/saturation_rule.py`. What
is measured goes to OUTPUT/samples.jsonl, a line for each sample; the same command goes on where it was interrupted,
and one with more samples adds to them. At the end come OUTPUT/saturation.json (means, intervals, recommendation,
cost), plots and OUTPUT/report.html.
"""

import argparse
import hashlib
import json
import math
import os
import random
import resource
import shlex
import sys
from collections import defaultdict
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from benchmarks.command import check_numbers, given_path, lock_record, release_records, usable_device, write_record
from configuration_dpvr import BACKBONES, attention_window
from processing_dpvr import CHAT_TEMPLATE
from read_llava import check_name, own_template
from read_weights import ConversionError
from scripts.output import interrupted_by_sigterm, names_file, written_whole
from scripts.saturation_metrics import METRICS, Decoder, Prompt, StateRecorder, first_fusion_layer, measure, num_passes
from scripts.saturation_report import PLOTS, read_summary, write_report
from scripts.saturation_rule import KL_THRESHOLD, AnalysisError, summarize
from training.data import BadRowError, read_picture, read_turn
from training.data import read_rows as read_conversations

PICTURES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
DTYPES = ("auto", "bfloat16", "float16", "float32")


# ------------------------------------------------------------------------------------------------------------- data


class SampleError(AnalysisError):
    """A sample that cannot be measured."""


@dataclass(frozen=True)
class Sample:
    """A question about images; `images` are paths or PIL images, `answer` may be unknown."""

    id: str
    images: tuple
    question: str
    answer: str | None = None

    def digest(self) -> str:
        """Of all that is shown and asked, and the answer."""
        digest = hashlib.sha256(json.dumps([self.question, self.answer]).encode())
        for image in self.images:
            digest.update(image.tobytes() if isinstance(image, Image.Image) else image.read_bytes())
        return digest.hexdigest()[:16]


def embedded_samples(per_kind: int, seed: int) -> list[Sample]:
    """Questions about held-out digits, the task of `examples/tiny-llava`."""
    import digits as task

    pairs = task.make_questions(seed, per_kind, "test")
    return [Sample(str(i), (grid.image,), q.text, q.answer) for i, (grid, q) in enumerate(pairs)]


def folder_samples(folder: Path, question: str) -> list[Sample]:
    """Every picture of a folder; NAME.txt beside NAME.jpg holds its question, else it is `question`."""
    samples = []
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES):
        text = path.with_suffix(".txt")
        try:
            asked = text.read_text(encoding="utf-8").strip() if text.is_file() else question
        except UnicodeDecodeError as error:
            raise AnalysisError(f"{text} is not UTF-8: {error}. Save it as UTF-8.") from error
        samples.append(Sample(path.name, (path,), asked))
    return samples


def read_entries(path: Path) -> list:
    try:
        return read_conversations(path)
    except ValueError as error:
        raise AnalysisError(str(error)) from error


def read_entry(entry: dict) -> tuple[list[str], str, str | None]:
    """The images of an entry's first question, that question, and its answer if the next turn is one.

    Raises:
        BadRowError: there is no question, or an image or a turn is not what the format says.
    """
    names = entry["image"] if isinstance(entry["image"], list) else [entry["image"]]
    if not all(isinstance(name, str) for name in names):
        raise BadRowError("malformed", "an image is no path")
    turns = entry.get("conversations") or [{"from": "human", "value": entry["text"]}]
    if not isinstance(turns, list):
        raise BadRowError("malformed", "its conversations are no list")
    messages = [read_turn(turn, number) for number, turn in enumerate(turns)]
    while messages and messages[0]["role"] != "user":
        messages.pop(0)
    if not messages:
        raise BadRowError("no conversation", "no turn is the human's")
    texts = [message["content"][-1]["text"] for message in messages]
    counts = [len(message["content"]) - 1 for message in messages]
    is_answered = len(messages) > 1 and messages[1]["role"] == "assistant"
    names = names[: counts[0]] if sum(counts) == len(names) else names  # the others belong to later turns
    return names, texts[0], texts[1] if is_answered else None


def llava_samples(path: Path, images: Path) -> tuple[list[Sample], list[str]]:
    """Samples of LLaVA's training format (`conversations`, whose first question counts) or of its questions (`text`),
    and a sentence for each reason for which entries are left out."""
    samples, left_out = [], defaultdict(list)
    for index, entry in enumerate(read_entries(path)):
        where = f"{path}, entry {index}"
        if not isinstance(entry, dict):
            raise AnalysisError(f"{where} is a {type(entry).__name__}, not an object.")
        if not entry.get("image"):
            left_out["have no image"].append(index)
            continue
        if not entry.get("conversations") and "text" not in entry:
            raise AnalysisError(f"{where} has neither conversations nor text.")
        try:
            names, question, answer = read_entry(entry)
        except BadRowError as error:
            left_out[f"are malformed ({error.detail})"].append(index)
            continue
        paths = [images / name for name in names]
        if not paths:
            left_out["have no image in their first turn"].append(index)
        elif not all(each.is_file() for each in paths):
            left_out[f"name images that are no files in {images}"].append(index)
        else:
            name = str(entry.get("id", entry.get("question_id", index)))
            samples.append(Sample(f"{index}:{name}", tuple(paths), question, answer))
    return samples, [
        f"{len(indices)} entries of {path}, first entry {indices[0]}, {reason} and are left out."
        for reason, indices in left_out.items()
    ]


def choose_samples(args: argparse.Namespace) -> list[Sample]:
    """The samples to measure and, behind the first `--samples`, those that stand in for what cannot be measured.

    Raises:
        AnalysisError: there is none, or with --answers one has no answer.
    """
    if args.data is None:
        samples = embedded_samples(args.questions, args.seed)
    else:
        if args.data.is_dir():
            samples = folder_samples(args.data, args.question)
        else:
            samples, left_out = llava_samples(args.data, args.image_folder or args.data.parent)
            print("".join(f"{sentence}\n" for sentence in left_out), end="", file=sys.stderr)
        random.Random(args.seed).shuffle(samples)
    if not samples:
        raise AnalysisError(f"{args.data} holds no question about an image.")
    if args.answers:
        for sample in samples[: args.samples]:
            if not sample.answer:
                raise AnalysisError(f"Sample {sample.id} has no answer, which --answers needs.")
    return samples


# ------------------------------------------------------------------------------------------------------------ model


def load_model(args: argparse.Namespace):
    """Model and processor, the model on its device and in evaluation mode."""
    options = {"trust_remote_code": args.trust_remote_code, "revision": args.revision}
    check_name(args.model)
    try:
        config = AutoConfig.from_pretrained(args.model, **options)
        dtype = args.dtype
        is_cpu = args.device == "cpu"
        if dtype == "auto" and is_cpu and config.dtype in (torch.float16, None):
            dtype = "float32"  # CPUs compute float16 slowly and round more
        model = AutoModelForImageTextToText.from_pretrained(
            args.model, dtype=dtype, attn_implementation={"text_config": args.attention}, **options
        )
        processor = AutoProcessor.from_pretrained(args.model, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in reason:
            reason = "it holds code of its own. Read it, then pass --trust-remote-code."
        raise AnalysisError(f"{args.model} cannot be loaded: {reason}") from error
    text_config = getattr(config, "text_config", None)
    if getattr(text_config, "model_type", None) not in BACKBONES:
        raise AnalysisError(f"{args.model} has no backbone that DPVR routes: {', '.join(BACKBONES)}.")
    stack = getattr(getattr(model, "model", None), "language_model", None)
    if not hasattr(stack, "layers") or not hasattr(model.config, "image_token_id"):
        raise AnalysisError(f"{args.model} is a {type(model).__name__}, not a LLaVA: it has no model.language_model.")
    return model.to(args.device).eval(), processor


def fingerprint(model) -> str:
    """Tells checkpoints apart: a hash of the first numbers of every weight."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(name.encode())
        digest.update(weight.detach().flatten()[:64].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def render(processor, sample: Sample) -> tuple[str, str | None]:
    """The prompt up to where the answer begins, and the prompt with the answer if there is one."""
    content = [*({"type": "image"} for _ in sample.images), {"type": "text", "text": sample.question}]
    messages = [{"role": "user", "content": content}]
    has_own = getattr(processor, "chat_template", None)
    own = None if has_own else own_template(processor) or CHAT_TEMPLATE
    template = {} if has_own else {"chat_template": own["default"] if isinstance(own, dict) else own}
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, **template)
    if sample.answer is None:
        return prompt, None
    messages.append({"role": "assistant", "content": [{"type": "text", "text": sample.answer}]})
    return prompt, processor.apply_chat_template(messages, **template)


def make_prompt(model, processor, sample: Sample, with_answer: bool) -> Prompt:
    """The sample as the model takes it.

    Raises:
        SampleError: naming the sample, if an image cannot be read, no vision token or no text behind it is there,
            or the prompt is longer than the backbone's sliding window.
    """
    try:
        images = [read_picture(image) for image in sample.images]
        prompt, full = render(processor, sample)
        if with_answer and not sample.answer:
            raise ValueError("it has no answer, which --answers needs")
        inputs = processor(images=images, text=prompt, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        if with_answer:
            ids = inputs["input_ids"][0]
            inputs = processor(images=images, text=full, return_tensors="pt")
            same = ids == inputs["input_ids"][0, :length]
            length = int(same.long().cumprod(0).sum())  # a token may span the border
        inputs = {
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in inputs.items()
            if name not in ("attention_mask", "mm_token_type_ids")  # no padding; a dense LLaVA takes no types
        }
        made = Prompt(inputs, inputs["input_ids"][0] == model.config.image_token_id, length)
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise SampleError(f"Sample {sample.id}: {error}") from error
    window = attention_window(model.config.text_config)
    if window and len(made.is_vision) > window:
        raise SampleError(
            f"Sample {sample.id}: {len(made.is_vision)} tokens exceed text_config.sliding_window={window}, which the "
            "layers are not measured beyond."
        )
    return made


@torch.no_grad()
def check_backbone(model, prompt: Prompt) -> None:
    """Refuses a backbone whose layers need more than states, a causal mask and rotary positions: run apart from the
    model, its first layer would give something else."""
    decoder = Decoder(model)
    with StateRecorder(decoder.stack, prompt) as record:
        model(**prompt.inputs, use_cache=False, logits_to_keep=1)
    positions = torch.arange(len(prompt.is_vision), device=model.device)
    first, expected = decoder.run(record.states[0], positions, 0, 1).float(), record.states[1].float()
    difference, scale = (first - expected).abs().max().item(), expected.abs().max().item()
    if not difference <= 1e-2 * scale:
        raise AnalysisError(
            f"Layer 0 of {type(decoder.stack).__name__}, run alone, differs by {difference:.3g} from its output in "
            f"the model (largest value {scale:.3g}): this backbone cannot be measured layer by layer."
        )


def picture_of(prompt: Prompt, processor) -> np.ndarray | None:
    """`(H, W, 3)` uint8, the picture as the vision tower sees it, if the prompt has one whose tokens form a square."""
    pixels = prompt.inputs["pixel_values"].float().cpu()
    side = math.isqrt(int(prompt.is_vision.sum()))
    if pixels.ndim != 4 or len(pixels) != 1 or side * side != int(prompt.is_vision.sum()):
        return None
    images = processor.image_processor
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (images.image_mean, images.image_std))
    return ((pixels[0] * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


# ---------------------------------------------------------------------------------------------------------- results


def read_rows(path: Path) -> list[dict]:
    """The samples measured so far. A last line that was cut off when the run was killed is removed from the file.

    Raises:
        AnalysisError: another line is none of a sample, or the file no text.
    """
    if not path.is_file():
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except UnicodeDecodeError as error:
        raise AnalysisError(f"{path} is no text. Choose another --output, or --restart to discard it.") from error
    if lines and not lines[-1].endswith("\n"):
        cut = lines.pop()
        os.truncate(path, path.stat().st_size - len(cut.encode()))  # not written anew: a full disk would keep nothing
    return [read_row(path, number, line) for number, line in enumerate(lines, 1)]


def read_row(path: Path, number: int, line: str) -> dict:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict) or not {"sample", "question", "digest"} <= row.keys():
        raise AnalysisError(
            f"{path}, line {number}: {line.strip()[:100]!r} is no result of a sample. Remove the line, "
            "and the sample is measured anew; or choose another --output, or --restart to discard all results."
        )
    return row


def append_row(path: Path, row: dict) -> None:
    with names_file(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def check_settings(path: Path, settings: dict) -> None:
    """Refuses to mix results of another model, or measured otherwise, with those of this run.

    Raises:
        AnalysisError: naming the setting and its two values, or `path` if it holds no settings.
    """
    if not path.is_file():
        write_record(path, settings)
        return
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        stored = None
    if not isinstance(stored, dict):
        raise AnalysisError(f"{path} holds no settings. Choose another --output, or --restart to discard its results.")
    for name in settings.keys() | stored.keys():
        if stored.get(name) != settings.get(name):
            raise AnalysisError(
                f"{path} was made with {name}={stored.get(name)!r}, but this run has {settings.get(name)!r}. Choose "
                "another --output, or --restart to discard its results."
            )


def discard(folder: Path) -> None:
    """Removes the results and plots of an earlier run, and nothing else."""
    plots = [f"{name}.{ending}" for name in PLOTS for ending in ("png", "svg")]
    results = ("settings.json", "samples.jsonl", "saturation.json", "report.html", "overview.png", "maps.png")
    for path in [folder / name for name in (*results, *plots)]:
        path.unlink(missing_ok=True)
    for path in (folder / "maps").glob("*.npz"):
        path.unlink()


def make_settings(args: argparse.Namespace, model) -> dict:
    """All that decides what a row of the results holds."""
    config = model.config
    return {
        "format": 3,  # of the rows
        "model": shown(args.model),
        "model_type": config.model_type,
        "fingerprint": fingerprint(model),
        "num_hidden_layers": config.text_config.num_hidden_layers,
        "first_fusion_layer": first_fusion_layer(config, args.num_fusion_layers),
        "saturation_layer": getattr(config, "saturation_layer", None),
        "num_side_layers": getattr(config, "num_side_layers", 1),
        "text_config": config.text_config.to_diff_dict(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": args.attention,
        "data": "embedded digit task" if args.data is None else str(args.data),
        "image_folder": str(args.image_folder) if args.image_folder else None,
        "question": args.question if args.data is not None and args.data.is_dir() else None,
        "seed": args.seed,
        "answers": args.answers,
        "metrics": sorted(args.metrics),
        "layers": args.layers,
        "versions": {name: metadata.version(name) for name in ("torch", "transformers")},
    }


def check_row(row: dict, sample: Sample, path: Path) -> None:
    """Raises AnalysisError if a row of the sample's name is about another question, image or answer."""
    if row["question"] != sample.question:
        raise AnalysisError(
            f"{path} has sample {sample.id} with the question {row['question']!r}, but the data now ask "
            f"{sample.question!r}. Choose another --output, or --restart to discard its results."
        )
    if row["digest"] != sample.digest():
        raise AnalysisError(
            f"{path} has sample {sample.id} with other images or another answer than the data now have. Choose "
            "another --output, or --restart to discard its results."
        )


def check_layers(args: argparse.Namespace, config) -> None:
    """Raises AnalysisError if a layer is not in the decoder, or there are other fusion layers than a DPVR has."""
    num_layers = config.text_config.num_hidden_layers
    for option, layers in (("--layers", args.layers), ("--map-layers", args.map_layers)):
        if layers and layers[-1] >= num_layers:
            raise AnalysisError(f"{option} names layer {layers[-1]}, but the decoder has {num_layers}, from 0 on.")
    given, own = args.num_fusion_layers, getattr(config, "num_fusion_layers", None)
    if (given or 1) >= num_layers:
        raise AnalysisError(f"--num-fusion-layers {given or 1} leaves no other of {num_layers} layers.")
    if None not in (given, own) and given != own:
        raise AnalysisError(f"--num-fusion-layers {given}, but {args.model} is a DPVR with {own}. Leave it out.")


def map_path(args: argparse.Namespace, number: int) -> Path:
    return args.output / "maps" / f"{number:04}.npz"


def add_map(args: argparse.Namespace, model, processor, sample: Sample, number: int) -> None:
    """Makes the map of a sample that was measured with a smaller `--maps`, by a pass of its own."""
    path = map_path(args, number)
    if number >= args.maps or "attention" not in args.metrics or path.is_file():
        return
    prompt = make_prompt(model, processor, sample, args.answers)
    picture = picture_of(prompt, processor)
    if picture is not None:
        save_maps(path, sample, measure(model, prompt, ["attention"])[1], picture)


def run(args: argparse.Namespace, samples: list[Sample]) -> tuple[dict, list[dict]]:
    """Measures the samples that OUTPUT lacks; returns settings and the rows of all, in order. For a sample that cannot
    be measured the next one stands in, as far as there are more than `--samples`.

    Raises:
        AnalysisError: no sample can be measured, or what was measured before is not of this model or data.
        SystemExit: another run measures for the same folder.
    """
    model, processor = load_model(args)
    num_layers = model.config.text_config.num_hidden_layers
    check_layers(args, model.config)
    settings, path = make_settings(args, model), args.output / "samples.jsonl"
    (args.output / "maps").mkdir(parents=True, exist_ok=True)
    lock_record(path)
    if args.restart:
        discard(args.output)
        args.restart = False  # done: what comes after an interrupt must not do it again
    check_settings(args.output / "settings.json", settings)
    rows = {row["sample"]: row for row in read_rows(path)}
    chosen, is_checked, wanted = [], False, min(args.samples or len(samples), len(samples))
    passes = num_passes(args.metrics, range(num_layers) if args.layers is None else args.layers)
    with tqdm(total=wanted * passes, unit="pass", disable=None) as bar:
        for sample in samples:
            if len(chosen) == wanted:
                break
            bar.set_description(f"sample {sample.id}")
            try:
                if (row := rows.get(sample.id)) is not None:
                    check_row(row, sample, path)
                    add_map(args, model, processor, sample, len(chosen))
                    chosen.append(row)
                    bar.update(passes)
                    continue
                prompt = make_prompt(model, processor, sample, args.answers)
            except (SampleError, OSError) as error:
                tqdm.write(f"left out: {error}", file=sys.stderr)
                continue
            if not is_checked:
                check_backbone(model, prompt)
                is_checked = True
            values, maps = measure(model, prompt, args.metrics, args.layers, args.num_fusion_layers, bar.update)
            vision_tokens = int(prompt.is_vision.sum())
            tokens = {"vision_tokens": vision_tokens, "text_tokens": prompt.length - vision_tokens}  # no answer's
            if maps is not None and len(chosen) < args.maps:
                save_maps(map_path(args, len(chosen)), sample, maps, picture_of(prompt, processor))
            row = {"sample": sample.id, "question": sample.question, "digest": sample.digest(), **tokens, **values}
            append_row(path, row)
            chosen.append(row)
    if not chosen:
        raise AnalysisError(f"None of {len(samples)} samples can be measured.")
    return settings, chosen


def save_maps(path: Path, sample: Sample, maps: torch.Tensor, picture: np.ndarray | None) -> None:
    """Attention of the prompt's last token to the picture, by layer, and the picture; complete or not there."""
    if picture is None:
        return
    with written_whole(path) as new, new.open("wb") as file:
        np.savez_compressed(file, maps=maps.numpy(), picture=picture, question=np.array(sample.question))


# ---------------------------------------------------------------------------------------------------------- command


def shown(path: str | Path) -> str:
    """A path as it is written into results: relative to this repository if it lies there. A Hub id stays as it is."""
    resolved = Path(path).resolve()
    return str(resolved.relative_to(ROOT)) if resolved.exists() and resolved.is_relative_to(ROOT) else str(path)


def command_of(args: argparse.Namespace) -> str:
    """The command that measures the same, wherever it is run."""
    parts = ["python", "scripts/analyze_saturation.py", shown(args.model)]
    defaults = vars(make_parser().parse_args([]))
    hidden = {"model", "output", "restart", "compare", "device", "map_layers", "label"}
    for name, value in vars(args).items():
        if name in hidden or value == defaults[name]:
            continue
        parts.append(f"--{name.replace('_', '-')}")
        if value is not True:
            parts.append(",".join(map(str, value)) if isinstance(value, list) else str(value))
    return shlex.join(parts)


def format_number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 0.01 else f"{value:.3f}"


def summary_text(summary: dict) -> str:
    """The table and the recommendation that the command ends with."""
    names = ("attention", "cosine_next_vision", "cosine_next_text", "contribution", "withdrawal", "routing")
    curves = {name: summary["curves"][name]["mean"] for name in names if name in summary["curves"]}
    cost = {entry["saturation_layer"]: entry for entry in summary["cost"]}
    lines = ["layer" + "".join(f"{name:>20}" for name in curves) + f"{'FLOPs':>8}{'KV':>8}"]
    for layer in range(summary["settings"]["num_hidden_layers"]):
        cells = "".join(f"{format_number(values[layer]):>20}" for values in curves.values())
        shares = [f"{cost[layer][name]:.1%}" if layer in cost else "-" for name in ("flops_ratio", "cache_ratio")]
        lines.append(f"{layer:5}{cells}{shares[0]:>8}{shares[1]:>8}")
    chosen = summary["recommendation"]
    lines += ["", f"recommended saturation layer: {chosen['saturation_layer']}", chosen["reason"]]
    if chosen.get("interval_95"):
        low, high = chosen["interval_95"]
        lines.append(f"95 % interval over {summary['samples']} samples: layer {low} to {high}")
    return "\n".join(lines)


MOST_LAYERS = 10_000  # that a list may name: one of a mistyped range would fill the memory


def layer_list(text: str) -> list[int]:
    """`0,4,8-12` as a list of layers."""
    layers: set[int] = set()
    try:
        for part in text.split(","):
            first, _, last = part.partition("-")
            span = range(int(first), int(last or first) + 1)
            if not span or span.stop > MOST_LAYERS:
                raise ValueError
            layers.update(span)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers such as 0,4,8-12") from error
    return sorted(layers)


def metric_list(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in METRICS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(METRICS)}")
    return names


EXAMPLES = """\
examples:
  python scripts/analyze_saturation.py                                        the embedded LLaVA on its digit task
  python scripts/analyze_saturation.py llava-hf/llava-1.5-7b-hf --data llava_v1_5_mix665k.json \\
      --image-folder images --samples 100 --answers --output saturation-7b    LLaVA's data format
  python scripts/analyze_saturation.py ./llava --data ./photos --question "What is this?"
  python scripts/analyze_saturation.py ./llava --data ./photos --layers 8-31 --metrics attention,hidden,withdrawal
  python scripts/analyze_saturation.py dpvr-tiny --trust-remote-code --output saturation-dpvr --compare saturation
then:
  python convert_llava_to_dpvr.py ./llava ./dpvr --saturation-layer auto --analysis saturation
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    tiny = str(ROOT / "examples" / "tiny-llava")
    add = parser.add_argument
    add("model", nargs="?", default=tiny, help="Hub id or folder of a LLaVA or DPVR (default: examples/tiny-llava)")
    add("--output", type=given_path, default=Path("saturation"), help="folder of results (default: %(default)s)")
    add("--data", type=given_path, help="LLaVA's .json or .jsonl or a folder of pictures (default: the embedded task)")
    add("--image-folder", type=given_path, help="where the images of --data lie (default: beside it)")
    add("--question", default="Describe this image.", help="about pictures of a folder (default: %(default)s)")
    add("--questions", type=int, default=50, help="of each kind of the embedded task (default: %(default)s)")
    add("--samples", type=int, help="so many, if there are that many (default: all)")
    add("--answers", action="store_true", help="measure KL at the tokens of the data's answers, not the next alone")
    add("--metrics", type=metric_list, default=list(METRICS), help=f"of {','.join(METRICS)} (default: all)")
    add("--layers", type=layer_list, help="for the KL metrics, such as 0,4,8-12 (default: all)")
    add("--num-fusion-layers", type=int, help="of the DPVR to be made (default: 1, or those that a DPVR has)")
    add("--kl-threshold", type=float, default=KL_THRESHOLD, help="in nats (default: %(default)s)")
    add("--maps", type=int, default=4, help="samples whose attention is drawn over the picture (default: %(default)s)")
    add("--map-layers", type=layer_list, help="layers drawn there (default: six of them)")
    add("--compare", type=given_path, metavar="DIR", help="draw the results of another run into the same plots")
    add("--label", help="name of this run in the plots (default: the model's)")
    add("--seed", type=int, default=0, help="of the questions or of the order of --data (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="auto", help="default: the checkpoint's; float32 for float16 on a CPU")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", type=usable_device, default=device, help="default: %(default)s")
    add("--attention", choices=("sdpa", "eager"), default="sdpa", help="default: %(default)s")
    add("--revision", help="branch, tag or commit of a model on the Hub")
    add("--trust-remote-code", action="store_true", help="run the code in the model's folder, as a DPVR needs")
    add("--restart", action="store_true", help="discard the results in --output")
    return parser


def analyze(args: argparse.Namespace) -> dict:
    """Measures, recommends and writes all files; returns the summary."""
    other = read_summary(args.compare) if args.compare else None
    samples = choose_samples(args)
    settings, rows = run(args, samples)
    summary = summarize(settings, rows, args.kl_threshold, command_of(args))
    summary["label"] = args.label or Path(settings["model"]).name
    write_record(args.output / "saturation.json", summary, indent=1)
    write_report(args.output, summary, other, args.map_layers)
    return summary


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(arguments)
    given = (name for name in ("questions", "num_fusion_layers", "samples") if getattr(args, name) is not None)
    check_numbers(parser, args, 1, *given)
    check_numbers(parser, args, 0, "seed", "maps")
    if not args.kl_threshold >= 0:
        parser.error(f"--kl-threshold {args.kl_threshold} must be at least 0")
    is_restart = args.restart
    with interrupted_by_sigterm():
        try:
            print(summary_text(analyze(args)))
        except (AnalysisError, ConversionError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            where = f"goes on from {args.output / 'samples.jsonl'}"
            if args.restart:
                where = "starts anew: nothing was discarded yet"
            elif is_restart:
                where = f"without --restart {where}"
            print(f"interrupted; the same command {where}", file=sys.stderr)
            return 130
        finally:
            release_records()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {peak:.2f} GiB\n{args.output / 'report.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
