"""What a CPU cannot show: kernels, waits and memory of a GPU. Skipped where there is none."""

import copy
import json
import os
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file
from tiny import DPVRForConditionalGeneration, make_batch, make_dpvr, make_llava, text_config
from tiny_training import gradients, staged, training_batch
from transformers import DynamicCache, StaticCache

from training.trainer import TRAINED_WEIGHTS

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

GPU = "cuda:0"
ROWS = ["ttItt", "tttt", "ItIt", "I", "ttI", "t"]
NUM_NEW = 8
# Heads wide enough for the flash kernels
TEXT = text_config(hidden_size=128, intermediate_size=256, initializer_range=0.07)


@pytest.fixture(autouse=True)
def no_grad(request):
    with torch.set_grad_enabled("train" in request.node.name):
        yield


@pytest.fixture(scope="module")
def model():
    """On the CPU, where every test of the model is held against the oracle."""
    model = make_dpvr(0, TEXT)
    model.generation_config.eos_token_id = None
    return model


@pytest.fixture(scope="module")
def on_gpu(model):
    return copy.deepcopy(model).to(GPU)


def to(device, batch):
    return {name: value.to(device) for name, value in batch.items() if value is not None}


def step_after(batch):
    """One more token for each row."""
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
    return {"input_ids": torch.full((len(mask), 1), 7), "attention_mask": mask}


def prefill_and_step(model, batch):
    """Logits of the tokens of a prompt, padding left out, of one token after it, and of its last column alone, where
    the side branch, whose keys nobody keeps, runs beside the text-only layers."""
    given, following = (to(model.device, each) for each in (batch, step_after(batch)))
    outputs = model(**given, use_cache=True)
    step = model(**following, past_key_values=outputs.past_key_values).logits
    alone = model(**given, use_cache=False, logits_to_keep=1).logits.cpu()[batch["attention_mask"][:, -1].bool()]
    logits = [outputs.logits.cpu()[batch["attention_mask"].bool()], step.cpu()[:, 0], alone[:, 0]]
    return torch.cat(logits).float()


def generate(model, batch, **options):
    return model.generate(
        **to(model.device, batch), **{"max_new_tokens": NUM_NEW, "do_sample": False, **options}
    ).cpu()


@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_those_of_the_cpu(model, on_gpu, attention, side):
    batch = make_batch(ROWS, side)
    routed = copy.deepcopy(on_gpu)
    routed.set_attn_implementation({"text_config": attention, "vision_config": "sdpa"})
    torch.testing.assert_close(prefill_and_step(routed, batch), prefill_and_step(model, batch), atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
def test_half_precision_follows_fp32(model, on_gpu, dtype, attention):
    batch = make_batch(ROWS)
    half = copy.deepcopy(on_gpu).to(dtype)
    half.set_attn_implementation({"text_config": attention, "vision_config": "sdpa"})
    expected, actual = prefill_and_step(model, batch), prefill_and_step(half, batch)
    assert (actual - expected).norm() / expected.norm() < (0.05 if dtype == torch.bfloat16 else 0.01)


@pytest.mark.parametrize("rows", [ROWS, ["ttItt", "ttItt"], ["ttItt"]], ids=["ragged", "even", "one"])
def test_flash_kernels_give_the_logits_of_sdpa(monkeypatch, on_gpu, rows):
    """Those of FlashAttention 2 that torch carries, under the names of the flash_attn package."""
    from transformers import modeling_flash_attention_utils as flash

    calls = []

    def varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False, softmax_scale=None):
        calls.append(1)
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        cumulative = (x.to(torch.int32) for x in (cu_seqlens_q, cu_seqlens_k))
        sizes = int(max_seqlen_q), int(max_seqlen_k)
        return torch.ops.aten._flash_attention_forward(
            q, k, v, *cumulative, *sizes, 0.0, causal, False, scale=softmax_scale
        )[0]

    def dense(q, k, v, causal=False, softmax_scale=None):
        lengths = [torch.arange(len(x) + 1, dtype=torch.int32, device=x.device) * x.shape[1] for x in (q, k)]
        flat = [x.flatten(0, 1) for x in (q, k, v)]
        return varlen(*flat, *lengths, q.shape[1], k.shape[1], causal, softmax_scale).view_as(q)

    monkeypatch.setattr(flash, "_loaded_implementation", None)
    kernels = (dense, varlen, None, flash._pad_input, flash._unpad_input)
    monkeypatch.setattr(flash, "_lazy_imports", lambda *args, **kwargs: kernels)
    half = copy.deepcopy(on_gpu).to(torch.bfloat16)
    expected = prefill_and_step(half, make_batch(rows))
    half.model.language_model.config._attn_implementation = "flash_attention_2"
    half.config.text_config._attn_implementation = "flash_attention_2"
    actual = prefill_and_step(half, make_batch(rows))
    assert calls
    assert (actual - expected).norm() / expected.norm() < 0.02


def count_waits(function):
    """How often the host waited for the device, and what the function gave."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(warning.message) for warning in caught), result


@pytest.mark.parametrize("rows", [["ttItt", "tttItt"], ["ttItt", "ItttI"], ["ttItt"]], ids=["padded", "ragged", "one"])
def test_the_host_waits_for_the_device_no_more_often_than_in_llava(on_gpu, rows):
    batch, waits = make_batch(rows), []
    for model in (make_llava(0, TEXT).to(GPU), on_gpu):
        inputs = to(GPU, batch)
        features = {"image": model.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)}
        if model is not on_gpu:
            inputs.pop("mm_token_type_ids")
        step = to(GPU, step_after(batch))
        model(**inputs, mm_encoder_outputs=features)  # libraries start
        num_prefill, outputs = count_waits(lambda m=model, x=inputs, f=features: m(**x, mm_encoder_outputs=f))
        cache = outputs.past_key_values
        num_step, _ = count_waits(lambda m=model, s=step, c=cache: m(**s, past_key_values=c))
        waits.append((num_prefill, num_step))
    llava, dpvr = waits
    assert 0 < dpvr[0] <= llava[0]
    assert dpvr[1] <= llava[1]


def test_the_side_branch_beside_the_text_only_layers_gives_the_logits_of_one_after_the_other(monkeypatch):
    """In four threads and layers wide enough that both streams are busy: what one frees, another takes at once."""
    wide = text_config(hidden_size=1024, intermediate_size=4096, initializer_range=0.02)
    model = make_dpvr(0, wide).to(GPU)
    routing, used = sys.modules[type(model).__module__], []
    make_stream = routing.side_cuda_stream
    batches = [to(GPU, make_batch(["t" * 9 + "I" * 60, "tI" * 30 + "t"] * 4, seed=seed)) for seed in range(4)]

    def logits(batch):
        with torch.no_grad():
            return [model(**batch, use_cache=False, logits_to_keep=2).logits for _ in range(20)]

    monkeypatch.setattr(routing, "may_overlap", lambda *args: False)
    expected = [logits(batch)[0] for batch in batches]
    monkeypatch.undo()
    monkeypatch.setattr(routing, "side_cuda_stream", lambda device: used.append(device) or make_stream(device))
    with ThreadPoolExecutor(4) as pool:
        actual = list(pool.map(logits, batches))
    assert len(used) == 80
    for each, reference in zip(actual, expected, strict=True):
        assert all(torch.equal(other, reference) for other in each)


@pytest.mark.parametrize("cache", ["dynamic", "static", "offloaded"])
def test_generated_tokens_are_those_of_the_cpu(model, on_gpu, cache):
    """A static cache makes `generate` compile the decode step into CUDA graphs."""
    batch = make_batch(ROWS)
    expected = generate(model, batch)
    for _ in range(2):
        assert torch.equal(generate(on_gpu, batch, cache_implementation=cache), expected)


@pytest.mark.parametrize("kind", ["offloaded", "static"])
def test_a_cache_goes_on_over_turns_and_starts_again(model, on_gpu, kind):
    batch = make_batch(["ttItt"])
    caches = {
        "offloaded": lambda config: DynamicCache(config=config, offloading=True),
        "static": lambda config: StaticCache(config=config.text_config, max_cache_len=64),
    }
    answers = []
    for each, make_cache in ((model, lambda config: DynamicCache(config=config)), (on_gpu, caches[kind])):
        cache = make_cache(each.config)
        for _ in range(2):
            turn = generate(each, batch, past_key_values=cache, max_new_tokens=3)
            longer = make_batch(["ttItt" + "t" * 3 + "Itt"])
            longer["input_ids"][:, : turn.shape[1]] = turn
            longer["pixel_values"] = longer["pixel_values"][1:]
            answers.append((turn, generate(each, longer, past_key_values=cache)))
            cache.reset()
    for answer in answers[1:]:
        assert all(map(torch.equal, answer, answers[0]))


def test_threads_that_share_a_model_get_their_own_answers(on_gpu):
    batches = [make_batch(["ttItt"], seed=seed) for seed in range(4)]
    expected = [generate(on_gpu, batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda batch: generate(on_gpu, batch), batches))
    assert all(map(torch.equal, answers, expected))


def test_a_model_half_on_the_cpu_gives_the_same_logits(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    parts = ["model.vision_tower", "model.multi_modal_projector", "model.side_branch", "lm_head"]
    parts += ["model.language_model.embed_tokens", "model.language_model.norm", "model.language_model.rotary_emb"]
    parts += [f"model.language_model.layers.{i}" for i in range(6)]
    batch = make_batch(ROWS)
    expected = prefill_and_step(model, batch)
    for on_cpu in ("model.side_branch", "model.language_model.layers.3", "model.language_model.layers.5"):
        split = DPVRForConditionalGeneration.from_pretrained(
            tmp_path / "model", device_map={part: "cpu" if part == on_cpu else 0 for part in parts}
        ).eval()
        torch.testing.assert_close(prefill_and_step(split, batch), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("loss", ["answer", "distill"])
def test_train_gradients_are_those_of_the_cpu(loss):
    batch = training_batch()
    expected_loss, expected = gradients(staged(loss), batch)
    actual_loss, actual = gradients(staged(loss).to(GPU), to(GPU, batch))
    assert actual_loss == pytest.approx(expected_loss, abs=1e-4)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name].cpu(), gradient, atol=1e-4, rtol=1e-3)


# --- the training command, in processes of its own: accelerate keeps its state for the whole of one


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """LLaVA's data format, with pictures of noise."""
    folder, rows = tmp_path_factory.mktemp("data"), []
    for i in range(16):
        pixels = torch.randint(0, 256, (84, 84, 3), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
        human = {"from": "human", "value": "<image>\nWhat is in row 1?"}
        rows.append({"image": f"{i}.png", "conversations": [human, {"from": "gpt", "value": ["seven", "two"][i % 2]}]})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def train(rows, output, *options, launcher=()):
    """Trains for four steps of four rows, with a checkpoint after two: the losses."""
    command = [sys.executable, *launcher, ROOT / "scripts" / "train_side_branch.py"]
    command += [ROOT / "examples" / "tiny-llava", "--saturation-layer", 3]
    command += ["--data", rows, "--output", output, "--max_steps", 4, "--save_steps", 2, "--logging_steps", 1]
    command += ["--learning_rate", 2e-3, "--report_to", "none", *options]
    one = {} if launcher else {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]}
    result = subprocess.run(
        list(map(str, command)),
        env={**os.environ, **one},
        capture_output=True,
        text=True,
        check=False,
        cwd=output.parent,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert (output / "adapter_model.safetensors").exists()
    return [loss for _, loss in json.loads((output / "training.json").read_text())["loss_curve"]]


def checkpoint_time(output):
    return (output / "checkpoint-2" / TRAINED_WEIGHTS).stat().st_mtime_ns


def cut(output):
    """Leaves of a run what a kill after the third step does. When the checkpoint before that was written."""
    shutil.rmtree(output / "checkpoint-4")
    for path in output.iterdir():
        if path.is_file():
            path.unlink()
    return checkpoint_time(output)


BATCH = ("--per_device_train_batch_size", 4)


@pytest.mark.parametrize(
    "options",
    [("--bf16",), ("--fp16",), ("--bf16", "--loss", "distill", "--cache-features"), ("--fp16", "--lora", "fusion")],
    ids=" ".join,
)
def test_runs_in_half_precision_train_and_go_on_after_a_kill(rows, tmp_path, options):
    output = tmp_path / "adapter"
    options += (tmp_path / "features",) if "--cache-features" in options else ()
    whole = train(rows, output, *BATCH, *options)
    weights = load_file(output / "adapter_model.safetensors")
    learnt = [weight for name, weight in weights.items() if "down_proj" in name and "lora" not in name]
    assert learnt
    assert all(weight.isfinite().all() and weight.abs().max() > 0 for weight in learnt)  # zero at first
    before = cut(output)
    assert train(rows, output, *BATCH, *options, "--resume") == pytest.approx(whole, abs=1e-3)
    assert before == checkpoint_time(output)  # the second run began behind it


def test_accelerates_fsdp2_trains_and_resumes_as_one_process_does(rows, tmp_path, monkeypatch):
    """On two GPUs where there are as many; tests/test_training.py has two processes on the CPU."""
    num_processes = min(2, torch.cuda.device_count())
    expected = train(rows, tmp_path / "one", *BATCH)
    for name, value in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    options = ("--per_device_train_batch_size", 4 // num_processes)
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}")
    output = tmp_path / "sharded"
    losses = train(rows, output, *options, launcher=launcher)
    assert losses == pytest.approx(expected, abs=1e-3)
    before = cut(output)
    resumed = train(rows, output, *options, "--resume", launcher=launcher)
    assert resumed == pytest.approx(expected, abs=1e-3)
    assert before == checkpoint_time(output)
