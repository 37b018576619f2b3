"""Answer without PyTorch: onnx_without_torch.py EXPORTED_FOLDER digits.png 9 'read r2c3'."""

import json
import sys
from functools import cache
from pathlib import Path

import numpy as np
from onnxruntime import InferenceSession
from PIL import Image, ImageOps


def run(graph: dict, *inputs: np.ndarray) -> list[np.ndarray]:
    feeds = dict(zip(graph["inputs"], inputs, strict=True))
    return session(f"{folder}/{graph['file']}").run([*graph["outputs"]], feeds)


folder, picture, count, prompt = sys.argv[1:]
manifest = json.loads(Path(folder, "manifest.json").read_text())
graphs, counts, images, tokens = map(manifest.get, ("graphs", "projectors", "preprocess", "tokens"))
projector = counts.get(count) or sys.exit(f"exported counts are {', '.join(counts)}, got {count}")
vocabulary = json.loads(Path(folder, "tokenizer.json").read_text())["model"]["vocab"]  # words
words = {token: word for word, token in vocabulary.items() if token not in tokens["eos"]}
session = cache(InferenceSession)
picture = ImageOps.exif_transpose(Image.open(picture)).convert("RGB")
picture = picture.resize(images["size"][::-1], Image.Resampling[images["resample"].upper()])
pixels = (np.asarray(picture) * images["rescale"] - images["mean"]) / images["std"]
[features] = run(graphs["encoder"], pixels.transpose(2, 0, 1)[None].astype(np.float32))
[vision] = run(projector, features)  # the encoder serves any number of counts
ids = np.array([[tokens["image"]] * len(vision[0]) + [vocabulary[w] for w in prompt.split()]])
shapes = [*graphs["language"]["inputs"].values()][3:]  # of the keys and values of each layer
seen, past = 0, [np.zeros((1, heads, 0, width), np.float32) for _, heads, _, width in shapes]
while seen < 64 and ids[0, -1] not in tokens["eos"]:
    [embeds] = run(graphs["embedding"], ids)
    embeds[ids == tokens["image"]] = vision[0] if seen == 0 else 0
    mask, positions = np.ones((1, seen + ids.size), int), np.arange(seen, seen + ids.size)[None]
    if manifest["image_positions"] == "shared":  # by all tokens of the image, which comes first
        positions[ids == tokens["image"]] = len(vision[0]) - 1
    logits, *past = run(graphs["language"], embeds, mask, positions, *past)
    logits[..., tokens["image"]] = -np.inf  # a placeholder is no answer
    seen, ids = seen + ids.size, logits[:, -1:].argmax(-1)
    sys.stdout.writelines(f"{words[token]}\n" for token in ids[0] if token in words)
