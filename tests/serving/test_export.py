"""`tokenflex export`: what is written gives the model's results, or nothing is written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, SiglipVisionConfig

from tests.dropin.processors import stock_processor
from tests.dropin.tiny import KINDS, stock_model
from tests.models.tiny import IMAGE, picture, pixels, tiny_model
from tokenflex import TokenFlexConfig, TokenFlexForConditionalGeneration, replace_projector
from tokenflex.cli import main
from tokenflex.cli.extras import PACKAGES
from tokenflex.digits.processor import digits_processor
from tokenflex.models.loading import load_checkpoint
from tokenflex.serving.export import run as export_run
from tokenflex.serving.export.manifest import preprocessing, tile_size
from tokenflex.serving.export.parts import Part, language_parts, vision_parts
from tokenflex.serving.export.targets import TARGETS
from tokenflex.serving.export.tracing import _of_real_tokens, largest_error

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples/onnx_without_torch.py"
COUNTS = {"4": 4, "2x3": (2, 3)}
NEW_TOKENS = 4


def save_small(folder: Path, **changes: Any) -> Path:
    """Save a model of one layer of each kind, and its processor."""
    layer = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    vision = SiglipVisionConfig(
        **layer, num_attention_heads=2, image_size=32, patch_size=4, vision_use_head=False
    )
    text = {"vocab_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    text |= {"initializer_range": 0.15, "tie_word_embeddings": True, "eos_token_id": None}
    config = TokenFlexConfig(
        vision, Qwen2Config(**layer, **text), image_token_id=IMAGE, num_image_tokens=4, **changes
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        TokenFlexForConditionalGeneration(config).save_pretrained(folder)
    digits_processor(4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return save_small(tmp_path_factory.mktemp("export") / "checkpoint")


class Exported:
    """A written folder: its manifest, and functions that run its graphs."""

    def __init__(self, folder: Path, target: str) -> None:
        self.folder, self.target = folder, target
        self.manifest = json.loads((folder / "manifest.json").read_text())
        self.graphs = {**self.manifest["graphs"], **self.manifest["projectors"]}
        self._open: dict[str, Callable[..., Any]] = {}

    def run(self, name: str, *inputs: torch.Tensor) -> list[torch.Tensor]:
        if name not in self._open:
            self._open[name] = open_graph(self.target, self.folder, self.graphs[name])
        return self._open[name](*inputs)

    def generate(
        self, ids: torch.Tensor, mask: torch.Tensor, tokens: torch.Tensor, *, shared: bool = False
    ) -> torch.Tensor:
        """Answer as a program without PyTorch would, with the keys and values of former tokens.

        Each row has one image; with ``shared`` its tokens have the position of the last.
        """
        inputs = self.graphs["language"]["inputs"]
        states = [torch.zeros(len(ids), s[1], 0, s[3]) for s in [*inputs.values()][3:]]
        answer: list[torch.Tensor] = []
        for _ in range(NEW_TOKENS):
            [embeds] = self.run("embedding", ids)
            embeds = embeds.clone()
            embeds[ids == IMAGE] = tokens.flatten(0, 1) if not answer else embeds[ids == IMAGE]
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :].contiguous()
            if shared:
                last = positions.masked_fill(ids != IMAGE, 0).amax(1, keepdim=True)
                positions = torch.where(ids == IMAGE, last, positions)
            logits, *states = self.run("language", embeds, mask, positions, *states)
            logits = logits.clone()
            logits[..., IMAGE] = -torch.inf
            ids = logits[:, -1:].argmax(-1)
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            answer.append(ids)
        return torch.cat(answer, 1)


def open_graph(target: str, folder: Path, entry: dict[str, Any]) -> Callable[..., Any]:
    """Open a file with its own runtime, by the names in the manifest alone."""
    path, names = folder / entry["file"], [*entry["outputs"]]
    if target == "pt2":
        module = torch.export.load(path).module()

        def run(*inputs: torch.Tensor) -> Any:
            outputs = module(*inputs)
            return outputs if isinstance(outputs, tuple) else [outputs]

        return run
    if target == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)

        def compute(feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            return session.run(names, feeds)
    else:
        import openvino

        compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

        def compute(feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            outputs = compiled(feeds)
            return [outputs[name].copy() for name in names]

    def run_arrays(*inputs: torch.Tensor) -> list[torch.Tensor]:
        arrays = [tensor.numpy() for tensor in inputs]
        feeds = dict(zip(entry["inputs"], arrays, strict=True))
        return [torch.from_numpy(array) for array in compute(feeds)]

    return run_arrays


@pytest.fixture(scope="module", params=["pt2", "onnx", "openvino"])
def exported(request, checkpoint, tmp_path_factory) -> Exported:
    for package in TARGETS[request.param].packages:
        pytest.importorskip(package, reason=f"{package} is not installed: the extra [export]")
    folder = tmp_path_factory.mktemp("exported") / request.param
    lines: list[str] = []
    export_run.export(checkpoint, folder, request.param, [4, (2, 3), (2, 2)], report=lines.append)
    assert len(lines) == 5
    for line in lines:
        assert re.fullmatch(r"[\w-]+\.\w+  batches of 1, 3, 5  max error \d\.\de[-+]\d\d", line)
        assert float(line.split()[-1]) < 1e-5
    return Exported(folder, request.param)


def test_graphs_give_the_models_vision_tokens(exported, checkpoint):
    model, _ = load_checkpoint(checkpoint)
    for tiles in (1, 3, 5):
        pictures = pixels(tiles, seed=tiles)
        [features] = exported.run("encoder", pictures)
        for name, count in COUNTS.items():
            [tokens] = exported.run(name, features)
            expected = model.get_image_features(pictures, num_image_tokens=count).pooler_output
            torch.testing.assert_close(tokens, torch.stack(expected), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("positions", ["sequential", "shared"])
@pytest.mark.parametrize("rows", [1, 3, 5])
def test_graphs_answer_as_the_model(exported, checkpoint, rows, positions):
    model, processor = load_checkpoint(checkpoint)
    model.config.image_positions = positions  # the graphs are the same: they take positions
    words = ("odd", "read r1c1", "odd majority read r2c3")
    inputs = processor(
        images=[picture(seed) for seed in range(rows)],
        text=[f"<image> {words[row % 3]}" for row in range(rows)],
        num_image_tokens=(2, 3),
    )
    [features] = exported.run("encoder", inputs["pixel_values"])
    [tokens] = exported.run("2x3", features)
    prompt = inputs["input_ids"], inputs["attention_mask"]
    answers = exported.generate(*prompt, tokens, shared=positions == "shared")
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    assert answers.tolist() == expected[:, -NEW_TOKENS:].tolist()


def test_the_manifest_tells_what_a_program_needs(exported, checkpoint):
    manifest = exported.manifest
    assert manifest["target"] == exported.target
    assert manifest["tokens"] == {"image": IMAGE, "eos": [], "pad": 0}
    assert manifest["preprocess"] == {
        "size": [32, 32],
        "resize": {"height": 32, "width": 32},
        "resample": "bicubic",
        "center_crop": None,
        "rescale": 1 / 255,
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
    }
    assert [*manifest["projectors"]] == ["4", "2x3"]  # 2x2 is 4
    assert manifest["projectors"]["2x3"]["outputs"] == {"vision_tokens": ["batch", 6, 32]}
    assert manifest["graphs"]["language"]["outputs"]["logits"] == ["batch", "length", 64]
    files = {entry["file"] for entry in exported.graphs.values()}
    assert files <= {path.name for path in exported.folder.iterdir()}
    assert (exported.folder / "tokenizer.json").exists()
    assert [*exported.folder.parent.iterdir()] == [exported.folder]  # nothing temporary is left


def test_graphs_hold_no_ops_of_ours(exported):
    if exported.target != "pt2":
        pytest.skip("other runtimes would not have loaded them")
    for entry in exported.graphs.values():
        program = torch.export.load(exported.folder / entry["file"])
        assert not [node for node in program.graph.nodes if "tokenflex" in str(node.target)]


def run_example(folder: Path, image: Path, count: str) -> subprocess.CompletedProcess[str]:
    """Run the example in a process in which torch and our packages cannot be imported."""
    picture(3).save(image)
    blocked = """
import runpy, sys
for name in ("torch", "transformers", "tokenflex", "tokenflex_kernels", "onnx"):
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
    return subprocess.run(
        [sys.executable, "-c", blocked, str(EXAMPLE), str(folder), str(image), count, "read r2c3"],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def answer_of_model(checkpoint: Path, positions: str = "sequential") -> tuple[Any, list[str]]:
    """Return what the model generates for the example's question: ids, and new words."""
    model, processor = load_checkpoint(checkpoint)
    model.config.image_positions = positions
    inputs = processor(images=picture(3), text="<image> read r2c3", num_image_tokens=(2, 3))
    ids = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    return ids, processor.tokenizer.convert_ids_to_tokens(ids[0, -NEW_TOKENS:])


def test_the_example_needs_no_torch(exported, checkpoint, tmp_path):
    if exported.target != "onnx":
        pytest.skip("the example runs ONNX files")
    assert len(EXAMPLE.read_text().splitlines()) <= 42
    result = run_example(exported.folder, tmp_path / "picture.png", "2x3")
    assert result.returncode == 0, result.stderr
    expected, answer = answer_of_model(checkpoint)
    assert result.stdout.split()[:NEW_TOKENS] == answer

    ends = tmp_path / "ends"  # the same graphs, where the model's last new word is the end
    shutil.copytree(exported.folder, ends)
    tokens = {**exported.manifest["tokens"], "eos": [int(expected[0, -1])]}
    (ends / "manifest.json").write_text(json.dumps({**exported.manifest, "tokens": tokens}))
    before = answer[: answer.index(answer[-1])]
    result = run_example(ends, tmp_path / "picture.png", "2x3")
    assert result.stdout == "".join(f"{word}\n" for word in before)


def test_the_example_gives_shared_positions(exported, checkpoint, tmp_path):
    if exported.target != "onnx":
        pytest.skip("the example runs ONNX files")
    folder = tmp_path / "shared"  # the graphs are the same: they take positions
    shutil.copytree(exported.folder, folder)
    (folder / "manifest.json").write_text(
        json.dumps({**exported.manifest, "image_positions": "shared"})
    )
    result = run_example(folder, tmp_path / "picture.png", "2x3")
    answer = answer_of_model(checkpoint, "shared")[1]
    assert answer != answer_of_model(checkpoint)[1]
    assert result.stdout.split()[:NEW_TOKENS] == answer


def test_the_example_names_the_exported_counts(exported, tmp_path):
    if exported.target != "onnx":
        pytest.skip("the example runs ONNX files")
    result = run_example(exported.folder, tmp_path / "picture.png", "25")
    assert result.returncode == 1
    assert result.stderr == "exported counts are 4, 2x3, got 25\n"


# ---- the language model alone

LOAD_ALONE = """
import json, sys
for name in ("tokenflex", "tokenflex_kernels"):
    sys.modules[name] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
embeds = torch.load(sys.argv[2])
answers = [
    model.generate(inputs_embeds=e[None], attention_mask=torch.ones(1, len(e)), do_sample=False,
                   max_new_tokens=4)[0].tolist()
    for e in embeds
]
print(json.dumps([type(model).__name__, tokenizer("<image>").input_ids, answers]))
"""


def test_the_language_model_is_loaded_and_answers_without_tokenflex(checkpoint, tmp_path, capsys):
    folder = tmp_path / "language"
    words = [str(checkpoint), "--to", "language-model", "--counts", "4", "--output", str(folder)]
    assert main(["export", *words]) == 0
    assert "max error 0.0e+00" in capsys.readouterr().out
    texts = {path.name: path.read_text() for path in folder.glob("*.json")}
    assert not [name for name, text in texts.items() if "tokenflex" in text.lower()]
    assert json.loads(texts["generation_config.json"])["suppress_tokens"] == [IMAGE]

    model, processor = load_checkpoint(checkpoint)
    prompts = ["<image> read r1c1", "<image> odd"]
    inputs = processor(images=[picture(1), picture(2)], text=prompts, num_image_tokens=[4, (2, 3)])
    torch.save(model.merged_embeddings(**inputs), tmp_path / "embeds.pt")
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS)
    result = subprocess.run(
        [sys.executable, "-c", LOAD_ALONE, str(folder), str(tmp_path / "embeds.pt")],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    name, ids, answers = json.loads(result.stdout.splitlines()[-1])
    assert (name, ids) == ("Qwen2ForCausalLM", [IMAGE])
    assert answers == expected[:, -NEW_TOKENS:].tolist()


@pytest.mark.parametrize("tied", [True, False])
def test_the_language_model_keeps_dtype_and_head(tmp_path, tied):
    model = tiny_model()
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 2)
        model.config.tie_word_embeddings = False
        model.config.text_config.tie_word_embeddings = False
    model.bfloat16().save_pretrained(tmp_path / "model")
    digits_processor(4).save_pretrained(tmp_path / "model")
    export_run.export(tmp_path / "model", tmp_path / "out", "language-model", report=str)
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert ("lm_head.weight" in tensors) != tied
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is tied


# ---- converted stock models


def save_converted(folder: Path, name: str, **changes: Any) -> Path:
    model, processor = stock_model(name), stock_processor(name)
    replace_projector(model, processor, num_image_tokens=16)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_a_converted_model_is_exported(tmp_path):
    from tokenflex.dropin import from_pretrained

    save_converted(tmp_path / "llava", "llava")
    lines: list[str] = []
    export_run.export(tmp_path / "llava", tmp_path / "out", "pt2", [(2, 3)], report=lines.append)
    assert [line.split(".pt2")[0] for line in lines] == [
        "encoder",
        "projector-2x3",
        "embedding",
        "language",
    ]
    exported = Exported(tmp_path / "out", "pt2")
    model, _ = from_pretrained(tmp_path / "llava")
    pictures = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    [features] = exported.run("encoder", pictures)
    [tokens] = exported.run("2x3", features)
    expected = model.eval().base_model.get_image_features(pictures, num_image_tokens=(2, 3))
    torch.testing.assert_close(tokens, torch.stack(expected.pooler_output))


def test_vision_alone_is_exported_where_the_language_side_is_special(tmp_path):
    save_converted(tmp_path / "gemma", "gemma3")
    lines: list[str] = []
    export_run.export(tmp_path / "gemma", tmp_path / "out", "pt2", [4], report=lines.append)
    assert re.search("no language model: .*bidirectional", lines[-1])
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert [*manifest["graphs"]] == ["encoder"]
    assert "bidirectional" in manifest["no_language"]


def test_the_language_model_of_a_converted_model_never_answers_with_the_placeholder(tmp_path):
    save_converted(tmp_path / "llava", "llava")
    export_run.export(tmp_path / "llava", tmp_path / "out", "language-model", report=str)
    language_model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(language_model).__name__ == "LlamaForCausalLM"
    assert language_model.generation_config.suppress_tokens == [50]


NO_GRAPH = {
    *("aria", "cohere_compass", "cosmos3_edge", "cosmos3_omni", "dots3_note", "ernie4_5_vl_moe"),
    *("exaone4_5", "gemma4", "glm46v", "glm4v", "glm4v_moe", "glm5_next", "glm_ocr", "glmga"),
    *("hyperclovax_vision_v2", "idefics3", "kimi_k25", "lfm2_vl", "lfm3_vl", "lighton_ocr"),
    *("llava-pixtral", "minicpm_ocr", "minicpmv4_6", "minimax_m3_vl", "mistral3", "muse_glimmer"),
    *("mistral3-mistral4", "mistral_large4", "muse_spark", "paddleocr_vl", "smolvlm"),
    *("granite_docling", "inkling2", "perception_lm", "video_llama_3"),
}
"""Their encoders take images of any size, or several inputs."""


@pytest.mark.parametrize("name", KINDS)
def test_the_encoder_and_projectors_of_each_family(name):
    """Those of the page's list are refused; the others give the converted model's tokens."""
    model = replace_projector(stock_model(name), num_image_tokens=16).requires_grad_(False)
    if name in NO_GRAPH or name.startswith("qwen"):
        with pytest.raises(ValueError, match="graph of pixels of one size"):
            vision_parts(model, tile_size(model, None), [4])
        return
    encoder, projector = vision_parts(model, tile_size(model, None), [(2, 1)])
    tiles = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    inputs = {"image_sizes": [[64, 64]] * 3} if name.startswith("llava_") else {}
    expected = model.base_model.get_image_features(tiles, num_image_tokens=(2, 1), **inputs)
    tokens = projector.module(encoder.module(tiles))
    torch.testing.assert_close(tokens, torch.stack(expected.pooler_output))


# ---- mistakes


@pytest.fixture
def refused(capsys, tmp_path):
    def run(*words: object) -> str:
        capsys.readouterr()  # what wrote the model
        try:
            code = main(["export", *map(str, words)])
        except SystemExit as stop:
            code = stop.code
        assert code == 2
        [line] = capsys.readouterr().err.splitlines()
        assert sorted(path.name for path in tmp_path.glob(".*")) == []
        return line

    return run


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ("5", "perfect square.*got 5"),
        ("0", "at least 1"),
        ("-4", "at least 1|expected one argument"),
        ("4,nine", "got 'nine'"),
        ("81", "at most 8x8, the patches of an image, got 81"),
        ("1x9", "at most 8x8, the patches of an image, got 1x9"),
        ("", "got ''"),
    ],
)
def test_a_count_that_is_none_is_refused(refused, checkpoint, tmp_path, counts, words):
    output = tmp_path / "out"
    arguments = (checkpoint, "--to", "pt2", "--counts", counts, "--output", output)
    assert re.search(words, refused(*arguments))
    assert not output.exists()


def test_an_unknown_target_is_refused(refused, checkpoint, tmp_path):
    line = refused(checkpoint, "--to", "tensorrt", "--output", tmp_path / "out")
    assert "'tensorrt'" in line
    for name in (*TARGETS, "language-model"):
        assert name in line
    with pytest.raises(ValueError, match=r"one of onnx, pt2, openvino, language-model, got 'x'"):
        export_run.export(checkpoint, tmp_path / "out", "x")


def test_a_missing_package_is_named_with_its_extra(refused, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(TARGETS["onnx"], "packages", ("no_such_package",))
    monkeypatch.setitem(PACKAGES, "export", ("no_such_package",))
    line = refused(checkpoint, "--to", "onnx", "--output", tmp_path / "out")
    assert line == "tokenflex: export needs no_such_package; pip install 'tokenflex[export]'"


@pytest.mark.parametrize("target", ["pt2", "language-model"])
def test_an_existing_output_is_never_touched(refused, checkpoint, tmp_path, target):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine.txt").write_text("mine")
    line = refused(checkpoint, "--to", target, "--output", tmp_path / "out")
    assert line.endswith("out exists; name one that does not")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_a_stock_model_is_refused(refused, tmp_path):
    stock_model("llava").save_pretrained(tmp_path / "llava")
    line = refused(tmp_path / "llava", "--to", "pt2", "--output", tmp_path / "out")
    assert "holds a stock llava: convert it first" in line


def test_a_plain_language_model_cannot_share_positions(refused, tmp_path):
    positions = {"projector_position": "normalized", "image_positions": "shared"}
    folder = save_small(tmp_path / "checkpoint", **positions)
    line = refused(folder, "--to", "language-model", "--output", tmp_path / "out")
    assert "--to language-model needs a model with image_positions='sequential', got 'sh" in line
    assert not (tmp_path / "out").exists()


def test_no_model_is_refused(refused, tmp_path):
    line = refused(tmp_path / "none", "--to", "pt2", "--output", tmp_path / "out")
    assert "does not exist" in line


@pytest.mark.parametrize(
    ("name", "target", "words"),
    [
        ("qwen2_5_vl", "pt2", "vision encoder of qwen2_5_vl cannot be .*has no image_size"),
        ("qwen2_vl", "language-model", r"language model of qwen2_vl .*M-RoPE"),
        ("gemma3", "language-model", "language model of gemma3 .*bidirectional"),
        ("mistral3", "pt2", "vision encoder of mistral3 cannot be a graph.*image_sizes"),
    ],
)
def test_a_conversion_that_cannot_be_exported_is_refused(
    refused, tmp_path, monkeypatch, name, target, words
):
    model = replace_projector(stock_model(name), num_image_tokens=16)
    monkeypatch.setattr(export_run, "load_model", lambda source: (model, None))
    line = refused(tmp_path / name, "--to", target, "--output", tmp_path / "out")
    assert re.search(words, line)
    assert not (tmp_path / "out").exists()


def test_an_encoder_of_patches_is_refused(refused, tmp_path):
    tiny_model(vision="siglip2").save_pretrained(tmp_path / "model")
    digits_processor(4).save_pretrained(tmp_path / "model")
    line = refused(tmp_path / "model", "--to", "pt2", "--output", tmp_path / "out")
    assert "takes patches" in line


@pytest.mark.parametrize("broken", ["encoder", "projector-4"])
def test_a_graph_that_differs_leaves_nothing(refused, checkpoint, tmp_path, monkeypatch, broken):
    """As if a runtime computed something else."""
    load = TARGETS["pt2"].load

    def load_wrong(path, part):
        run = load(path, part)
        if part.name != broken:
            return run

        def run_wrong(inputs):
            first, *others = run(inputs)
            first = first.clone()
            first[-1] += 1e-2 * first.abs().max()
            return [first, *others]

        return run_wrong

    monkeypatch.setattr(TARGETS["pt2"], "load", load_wrong)
    line = refused(checkpoint, "--to", "pt2", "--counts", "4", "--output", tmp_path / "out")
    assert re.search(rf"{broken} differs from the model by .*nothing was written", line)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2e-4])
def test_an_error_beyond_the_tolerance_is_refused(value):
    with pytest.raises(RuntimeError, match="encoder differs"):
        export_run._check("encoder", value, 0.5, 1e-4)


def test_an_error_is_relative_to_large_values():
    export_run._check("encoder", 2e-4, 3.0, 1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_graph_without_finite_values_has_an_infinite_error(value):
    part = Part(
        "part",
        torch.nn.Identity(),
        {"x": ("batch", 2)},
        {"y": ("batch", 2)},
        lambda batch: (torch.randn(batch, 2),),
    )
    assert largest_error(part, list)[0] == 0
    assert largest_error(part, lambda inputs: [inputs[0] * value])[0] == float("inf")
    with pytest.raises(RuntimeError, match=r"gives y of shape \[0, 2\] where .* \[1, 2\]"):
        largest_error(part, lambda inputs: [inputs[0][:0]])


def test_padding_is_not_compared():
    mask = torch.tensor([[0, 0, 1], [1, 1, 1]])

    def part_of(output: torch.Tensor) -> list[torch.Tensor]:
        part = Part("language", torch.nn.Identity(), {}, {}, lambda batch: ())
        return _of_real_tokens(part, (torch.empty(0), mask), output).tolist()

    assert part_of(torch.arange(4).view(2, 2, 1)) == [[1], [2], [3]]
    assert part_of(torch.arange(6).view(2, 1, 3, 1)) == [[[2]], [[3]], [[4]], [[5]]]


def test_counts_of_the_same_grid_are_one():
    assert export_run.distinct([4, (2, 2), (2, 3), 4]) == [4, (2, 3)]
    with pytest.raises(ValueError, match="at least one"):
        export_run.distinct([])


def test_the_default_counts_are_those_of_the_training():
    model = tiny_model(num_image_tokens=(2, 3))
    assert export_run._default_counts(model) == [(2, 3)]
    model.config.trained_num_image_tokens = [4, [1, 2]]
    assert export_run._default_counts(model) == [4, (1, 2)]
    converted = replace_projector(stock_model("llava"), num_image_tokens=9)
    assert export_run._default_counts(converted) == [9]


# ---- parts


def test_preprocessing_with_a_crop():
    from transformers import CLIPImageProcessor

    class Processor:
        image_processor = CLIPImageProcessor(size={"shortest_edge": 40}, crop_size=32)

    described = preprocessing(Processor(), (32, 32))
    assert described["resize"] == {"shortest_edge": 40}
    assert described["center_crop"] == {"height": 32, "width": 32}
    assert described["mean"][0] == pytest.approx(0.48145466)


def test_a_cache_of_more_than_keys_and_values_is_refused():
    from transformers import Lfm2Config, Lfm2ForCausalLM

    config = Lfm2Config(
        vocab_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["full_attention", "conv"],
    )
    with pytest.raises(ValueError, match="lfm2 cannot be a graph: its cache has a"):
        language_parts(Lfm2ForCausalLM(config).eval())


def test_a_plain_language_model_of_another_class_is_refused():
    from tokenflex.serving.export.language_model import plain_language_model

    model = tiny_model()
    model.config.text_config = LlamaConfig(**model.config.text_config.to_dict())
    with pytest.raises(ValueError, match=r"it is a Qwen2Model, and .* a LlamaModel"):
        plain_language_model(model)
