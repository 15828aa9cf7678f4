# Licensed under the Apache License, Version 2.0 (the "License"); you may not use this file except in compliance with
# the License. You may obtain a copy of the License at http://www.apache.org/licenses/LICENSE-2.0
"""Model cards of trained side branches, from the `training.json` of the run; what that does not state, they do not."""

import importlib.util
import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from benchmarks.tables import markdown
from read_weights import read_json

RUN_FILE, CARD_FILE, PLOT_FILE = "training.json", "README.md", "loss.png"
MERGED = ("LORA", "LN_TUNING")  # what `from_llava` merges for sure; PEFT cannot merge IA3 beside a side branch
UNNAMED = 'name = "path/to/this/folder"  # or its Hub id'  # in the card of a converted folder
LICENSE = ("license", "license_name", "license_link")

CARD = """\
---
{front_matter}
---

# {title}

{what} of DPVR-LF (dual-path vision routing with late fusion, arXiv 2606.09131) for {base}: vision tokens leave the
decoder at layer {saturation_layer}, {way}, and meet the text again in the last layers.{others}

## How to load

{load}{training}{plot}{results}
"""

TRAINING = """
## Training

{facts}
"""

LOAD_ADAPTER = """\
```python
from peft import PeftModel
from transformers import AutoModel, AutoProcessor

base = AutoModel.from_pretrained("{base}", trust_remote_code=True, dtype="auto")
processor = AutoProcessor.from_pretrained("{base}", trust_remote_code=True)
model = PeftModel.from_pretrained(base, "{name}"{subfolder})
```

PEFT does not see whether the base is the right one; `training.adapters.load_adapter` of the DPVR repository does.
"""

LOAD_ON_LLAVA = """\
With the code of the DPVR repository, straight on the LLaVA checkpoint, without a conversion:

```python
from training.adapters import from_llava, processor_from_llava

model = from_llava("{base}", adapter="{name}"{adapter_kwargs})
processor = processor_from_llava("{base}")
```
"""

LOAD_BESIDE_LLAVA = """\
With the code of the DPVR repository, straight on the LLaVA checkpoint, without a conversion:

```python
from training.adapters import from_llava, load_adapter, processor_from_llava

model = load_adapter(from_llava("{base}", saturation_layer={saturation_layer}), "{name}"{subfolder})
processor = processor_from_llava("{base}")
```
"""

LOAD_CHECKPOINT = """\
```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{name}", trust_remote_code=True, dtype="auto")
processor = AutoProcessor.from_pretrained("{name}", trust_remote_code=True)
```
"""


def is_hub_id(name: str | None) -> bool:
    return bool(name) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def read_license(base: str | Path) -> dict[str, str]:
    """What the model card of a folder or a Hub id says of its licence; nothing if there is none that can be read. A
    link into the base's own files is left out."""
    try:
        stated = ModelCard.load(Path(base, CARD_FILE) if Path(base).is_dir() else str(base)).data.to_dict()
    except Exception:  # YAML by anyone's hand, of any encoding, and networks
        return {}
    found = {name: stated[name] for name in LICENSE if isinstance(stated.get(name), str)}
    if not found.get("license_link", "https:").startswith("http"):
        del found["license_link"]
    return found


def make_card(
    run: dict,
    name: str = "path/to/this/folder",
    *,
    is_adapter: bool = True,
    subfolder: str | None = None,
    has_plot: bool = False,
) -> str:
    """README.md of an adapter or a checkpoint with its side branch trained.

    Args:
        run: `training.json` of the run. Used where it has them: `base_model`, `base_type` (`"dpvr"` or `"llava"`),
            `saturation_layer`, `num_side_layers`, `data`, `rows`, `bad_rows`, `eval_data`, `eval_rows`, `loss`,
            `trains`, `peft_type`, `parameters`, `trainable_parameters`, `hyperparameters`, `training_seconds`,
            `versions`, `command`, `license`, `license_name`, `license_link`, `loss_curve`, `eval_loss_curve` and
            `held_out` (`{model: {kind of question: {"questions", "accuracy", "wilson_95"}}}`).
        name: Hub id, or folder.
        is_adapter: whether it is an adapter; a whole checkpoint otherwise.
        subfolder: of the repository, where the adapter lies.
        has_plot: whether `loss.png` lies beside it.
    """
    base = run.get("base_model", "its base model")
    is_public = is_hub_id(base)
    data = ModelCardData(
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag="image-text-to-text",
        **{name: run.get(name) for name in LICENSE},
        base_model=base if is_public else None,
        base_model_relation=("adapter" if is_adapter else "finetune") if is_public else None,
        tags=["dpvr", "llava", *([] if is_adapter else ["custom_code"])],
    )
    if "trains" in run:
        what = f"A trained {run['trains']}" + ("" if is_adapter else ", merged into a whole checkpoint,")
        others = f" All other\nweights are those of {base}, frozen."
    else:
        what, others = "An adapter" if is_adapter else "A checkpoint", ""
    return CARD.format(
        front_matter=data.to_yaml().strip(),
        title=name.rstrip("/").split("/")[-1],
        what=what,
        way="wait as they are" if run.get("num_side_layers") == 0 else "pass the side branch",
        others=others,
        base=base,
        saturation_layer=run.get("saturation_layer", "S"),
        load=_load(run, base, name, is_adapter, subfolder),
        training=TRAINING.format(facts=markdown(["", ""], facts)) if (facts := _facts(run)) else "",
        plot=f"\n![Loss by step]({PLOT_FILE})\n" if has_plot else "",
        results=_results(run),
    )


def read_run(folder: Path) -> dict:
    """The record of the training that wrote `folder`, empty if there is none."""
    return read_json(folder / RUN_FILE) if (folder / RUN_FILE).is_file() else {}


def has_own_card(folder: Path) -> bool:
    """Whether somebody wrote the card in `folder`, or changed the one that training wrote, which its `training.json`
    gives again."""
    if not (folder / CARD_FILE).is_file():
        return False
    card = (folder / CARD_FILE).read_text(encoding="utf-8", errors="replace")  # of any encoding, if somebody wrote it
    title = re.search(r"^# (.+)$", card, re.MULTILINE)
    return title is None or card != make_card(read_run(folder), title[1], has_plot=(folder / PLOT_FILE).is_file())


def _load(run: dict, base: str, name: str, is_adapter: bool, subfolder: str | None) -> str:
    if not is_adapter:
        return LOAD_CHECKPOINT.format(name=name)
    inside = f', subfolder="{subfolder}"' if subfolder else ""
    if run.get("base_type") == "llava" and run.get("peft_type", "LORA") not in MERGED:
        layer = run.get("saturation_layer")
        return LOAD_BESIDE_LLAVA.format(base=base, name=name, saturation_layer=layer, subfolder=inside)
    if run.get("base_type") == "llava":
        kwargs = f', adapter_kwargs={{"subfolder": "{subfolder}"}}' if subfolder else ""
        return LOAD_ON_LLAVA.format(base=base, name=name, adapter_kwargs=kwargs)
    return LOAD_ADAPTER.format(base=base, name=name, subfolder=inside)


def _facts(run: dict) -> list[list[str]]:
    stated = ("base_model", "data", "rows", "bad_rows", "eval_data", "eval_rows", "loss")
    rows = [(key.replace("_", " "), run[key]) for key in stated if key in run]
    if {"trainable_parameters", "parameters"} <= run.keys():
        trained, total = run["trainable_parameters"], run["parameters"]
        rows.append(("trained parameters", f"{trained:,} of {total:,} ({trained / total:.2%})"))
    for key, value in run.get("hyperparameters", {}).items():
        if type(value) is float:
            # Warm-up of less than a step is to the Trainer a share of all steps
            value = f"{value:.4g}{' of all steps' if key == 'warmup_steps' and 0 < value < 1 else ''}"
        rows.append((key.replace("_", " "), value))
    if run.get("loss_curve"):
        losses = [loss for _, loss in run["loss_curve"]]
        rows.append(("loss, first and last logged", f"{losses[0]:.4g}, {losses[-1]:.4g}"))
    if run.get("eval_loss_curve"):
        rows.append(("held-out loss, last", f"{run['eval_loss_curve'][-1][1]:.4g}"))
    if "training_seconds" in run:
        rows.append(("time", f"{run['training_seconds']:,} s"))
    rows += [(f"version of {key}", value) for key, value in run.get("versions", {}).items()]
    if "command" in run:
        rows.append(("command", _as_code(run["command"])))
    return [[key, f"{value:,}" if type(value) is int else str(value)] for key, value in rows]


def _as_code(text: str) -> str:
    """Code of Markdown, between more backticks than the text has in a row."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    return f"{'`' * (longest + 1)}{' ' * bool(longest)}{text}{' ' * bool(longest)}{'`' * (longest + 1)}"


def _results(run: dict) -> str:
    """Measured accuracy, by model and kind of question."""
    held_out = run.get("held_out")
    if not held_out:
        return "\nAccuracy was not measured in this run.\n"
    models = list(held_out)
    rows = []
    for kind, first in held_out[models[0]].items():
        cells = [held_out[model][kind] for model in models]
        rows.append([kind, f"{first['questions']:,}", *(_share(cell) for cell in cells)])
    table = markdown(["question", "number", *models], rows)
    return f"\n## Measured accuracy\n\nOn questions held out of the training, with 95 % Wilson intervals:\n\n{table}\n"


def _share(cell: dict) -> str:
    low, high = cell["wilson_95"]
    return f"{cell['accuracy']:.1%} [{low:.1%}, {high:.1%}]"


def plot_losses(run: dict, path: Path) -> bool:
    """Draws the loss curves of a run into `path`, a PNG; False if it has none, or matplotlib is not installed."""
    curves = {"training": run.get("loss_curve"), "held out": run.get("eval_loss_curve")}
    if not any(curves.values()) or importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel=f"loss ({run['loss']})" if "loss" in run else "loss")
    for label, curve in curves.items():
        if curve:
            axes.plot(*zip(*curve, strict=True), label=label, marker="o" if len(curve) < 30 else None, markersize=3)
    axes.legend()
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return True
