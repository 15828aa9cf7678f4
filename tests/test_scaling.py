"""The model in pieces: offloaded, quantized, and split over processes. The same logits as one whole model gives."""

import importlib.util

import pytest
import torch
from conftest import ROOT
from processes import run_script
from tiny import DPVRForConditionalGeneration, make_batch, make_dpvr, make_llava, text_config
from transformers import BitsAndBytesConfig, QuantoConfig, TorchAoConfig

ROWS = ["ttItt", "tt", "tI"]
SIDE, DECODER = "model.side_branch.layers.0.mlp.up_proj", "model.language_model.layers.3.mlp.up_proj"
PACKAGES = {"optimum": "optimum-quanto"}


def needs(package):
    found = importlib.util.find_spec(package) is not None
    return pytest.mark.skipif(not found, reason=f"pip install {PACKAGES.get(package, package)}")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, large enough in every dimension for quantized kernels."""
    path = tmp_path_factory.mktemp("whole")
    make(0).save_pretrained(path)
    return path


def make(seed):
    return make_dpvr(seed, text_config(hidden_size=128, intermediate_size=256, initializer_range=0.07))


@pytest.fixture(scope="module")
def logits(folder):
    with torch.no_grad():
        return DPVRForConditionalGeneration.from_pretrained(folder).eval()(**make_batch(ROWS)).logits


# --- offloading ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_disk", ["model.side_branch", "model.language_model.layers.3", "model.vision_tower"])
def test_parts_offloaded_to_disk_give_the_same_logits(folder, logits, tmp_path, on_disk):
    parts = ["model.vision_tower", "model.multi_modal_projector", "model.side_branch", "lm_head"]
    parts += ["model.language_model.embed_tokens", "model.language_model.norm", "model.language_model.rotary_emb"]
    parts += [f"model.language_model.layers.{i}" for i in range(6)]
    device_map = {part: "disk" if part == on_disk else "cpu" for part in parts}
    model = DPVRForConditionalGeneration.from_pretrained(folder, device_map=device_map, offload_folder=tmp_path)
    assert next(model.get_submodule(on_disk).parameters()).is_meta
    assert torch.equal(model.eval()(**make_batch(ROWS)).logits, logits)


def test_an_automatic_device_map_gives_the_same_logits_and_splits_no_layer(folder, logits, tmp_path):
    size = sum(weight.numel() * 4 for weight in make(0).parameters())
    model = DPVRForConditionalGeneration.from_pretrained(
        folder, device_map="auto", max_memory={"cpu": size // 2}, offload_folder=tmp_path
    )
    assert "disk" in model.hf_device_map.values()
    assert not any("side_branch.layers.0." in part or ".mlp" in part for part in model.hf_device_map)
    assert torch.equal(model.eval()(**make_batch(ROWS)).logits, logits)


# --- quantization --------------------------------------------------------------------------------------------------


def quanto(bits, skipped):
    return QuantoConfig(weights=f"int{bits}", modules_to_not_convert=skipped)


def torchao(bits, skipped):
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=skipped)


def bitsandbytes(bits, skipped):
    return BitsAndBytesConfig(load_in_8bit=bits == 8, load_in_4bit=bits == 4, llm_int8_skip_modules=skipped)


@pytest.mark.parametrize("skip_side_branch", [False, True])
@pytest.mark.parametrize(
    ("make_config", "bits"),
    [
        pytest.param(quanto, 8, marks=needs("optimum")),
        pytest.param(quanto, 4, marks=needs("optimum")),
        pytest.param(torchao, 8, marks=needs("torchao")),
        pytest.param(bitsandbytes, 8, marks=needs("bitsandbytes")),
        pytest.param(bitsandbytes, 4, marks=needs("bitsandbytes")),
    ],
)
def test_quantized_weights_follow_the_whole_model(folder, logits, make_config, bits, skip_side_branch):
    """With the side branch in and out; off by no more than rounding to so few bits takes."""
    skipped = ["lm_head", "model.vision_tower", "model.multi_modal_projector"]  # these too small for some kernels
    skipped += ["model.side_branch"] if skip_side_branch else []
    model = DPVRForConditionalGeneration.from_pretrained(
        folder, quantization_config=make_config(bits, skipped), dtype=torch.float32
    ).eval()
    plain = torch.nn.Linear, torch.nn.Parameter

    def is_plain(name):
        module = model.get_submodule(name)
        return (type(module), type(module.weight)) == plain

    assert not is_plain(DECODER)
    assert is_plain(SIDE) == skip_side_branch
    actual = model(**make_batch(ROWS)).logits.float()
    error = (actual - logits).norm() / logits.norm()
    assert 0 < error < (0.05 if bits == 8 else 0.5)


@needs("optimum")
def test_a_quantized_cache_gives_the_tokens_that_llava_gives_with_one():
    text = text_config(hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=2)
    dpvr = make_dpvr(0, text, 5, random_branch=False)
    llava = make_llava(0, text)
    llava.load_state_dict(dpvr.state_dict(), strict=False)
    batch = make_batch(["ttItt", "tt"])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "cache_implementation": "quantized"}
    options["cache_config"] = {"backend": "quanto", "nbits": 4, "q_group_size": 16, "residual_length": 4}
    expected = llava.generate(**{k: v for k, v in batch.items() if k != "mm_token_type_ids"}, **options)
    assert torch.equal(dpvr.generate(**batch, **options), expected)


# --- several processes ---------------------------------------------------------------------------------------------

SPLIT = """
import sys
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import conftest, torch
from tiny import DPVRForConditionalGeneration, make_batch
from training.trainer import end_process
from transformers.distributed import DistributedConfig

kind, folder, output = sys.argv[1:]
if kind == "accelerate":
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate_on_cpu import take_cpus_for_gpus

    take_cpus_for_gpus()
    wrap = {{"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["LlamaDecoderLayer"]}}
    accelerator = Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, **wrap))
split = {{"tp": {{"tp_plan": "auto"}}, "fsdp": {{"distributed_config": DistributedConfig(fsdp_size=2)}}}}
options = split.get(kind, {{}})
model = DPVRForConditionalGeneration.from_pretrained(folder, **options).eval()
if kind == "accelerate":
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters()))  # it takes no model alone
batch = {{name: tensor.to(next(model.parameters()).device) for name, tensor in make_batch({rows!r}).items()}}
with torch.no_grad():
    logits = model(**batch).logits.cpu()
shapes = {{name: tuple(p.to_local().shape) for name, p in model.named_parameters() if hasattr(p, "to_local")}}
rank = torch.distributed.get_rank()
torch.save((logits, shapes), f"{{output}}.{{rank}}")
torch.distributed.destroy_process_group()
end_process(0)
"""


@pytest.mark.parametrize("kind", ["tp", "fsdp", "accelerate"])
def test_two_processes_give_the_logits_of_one(folder, logits, tmp_path, kind):
    """Tensor parallelism and FSDP2 by the plans that the model declares, and FSDP2 as accelerate wraps it: the side
    branch is split like the decoder."""
    program = tmp_path / "split.py"
    program.write_text(SPLIT.format(root=str(ROOT), rows=ROWS))
    run_script(program, kind, folder, tmp_path / "out", num_processes=2)
    whole = dict(make(0).named_parameters())
    for rank in range(2):
        split, shapes = torch.load(tmp_path / f"out.{rank}")
        torch.testing.assert_close(split, logits, atol=1e-4, rtol=0)
        for name in (f"{SIDE}.weight", f"{DECODER}.weight"):
            assert shapes[name] == (whole[name].shape[0] // 2, whole[name].shape[1]), name
