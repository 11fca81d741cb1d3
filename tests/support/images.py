"""Questions about images to a tiny Qwen2-VL: `python -m tests.support.images FOLDER` prints the answers.

A process of its own: transformers looks for torchvision once, when it is imported.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from PIL import Image

from tests.support.engine import LOSSLESS, engine
from tests.support.toys import COMMON, byte_tokenizer, save_random

SPECIAL = ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>", "<|video_pad|>"]
HEIGHT, WIDTH, PATCH = 168, 224, 28  # pixels; a patch is one token
IMAGE_TOKENS = (HEIGHT // PATCH) * (WIDTH // PATCH)
PAGE = LOSSLESS["page_size"]
TEXT = PAGE + 8, 60  # tokens in front of the picture and behind it


def make_qwen2_vl(path: Path) -> list[int]:
    """Write a toy Qwen2-VL with its processor; returns the ids of the tokens that stand for an image."""
    tokenizer = byte_tokenizer(SPECIAL)
    start, image, end, video = tokenizer.convert_tokens_to_ids(SPECIAL)
    rope = dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6])
    vision = dict(
        depth=2, embed_dim=64, num_heads=2, mlp_ratio=2, hidden_size=COMMON["hidden_size"]
    )
    config = transformers.Qwen2VLConfig(
        text_config=COMMON | dict(rope_parameters=rope),
        vision_config=vision,
        vision_start_token_id=start,
        vision_end_token_id=end,
        image_token_id=image,
        video_token_id=video,
        dtype="float32",
    )
    save_random(transformers.Qwen2VLForConditionalGeneration, config, path)
    pixels = dict(shortest_edge=PATCH**2, longest_edge=HEIGHT * WIDTH)
    transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(size=pixels),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(size=pixels),
    ).save_pretrained(path)
    return [start, image, end]


def picture(seed: int) -> Image.Image:
    colours = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    return Image.fromarray(colours)


def answers(llm: Any, image_ids: list[int]) -> list[tuple[list[int], int]]:
    """Tokens and tokens found in the prefix cache, request by request."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=12, detokenize=False, ignore_eos=True)
    words = random.Random(0)
    before, after = ([words.randrange(3, 250) for _ in range(n)] for n in TEXT)
    found = []

    def ask(*questions: tuple[list[int], list[int]]) -> None:
        """Pictures and text behind them, a request each; all at once."""
        prompts = [
            dict(
                prompt_token_ids=before + image_ids * len(seeds) + text,
                multi_modal_data={"image": [picture(seed) for seed in seeds]},
            )
            for seeds, text in questions
        ]
        for output in llm.generate(prompts, params, use_tqdm=False):
            found.append((list(output.outputs[0].token_ids), output.num_cached_tokens))

    ask(([1], after))
    ask(([2], after))  # the same text about another picture
    ask(([1], after), ([2], after), ([3], after))
    ask(([1], after + found[0][0] + [7, 8, 9]))  # a second turn
    ask(([1, 2], after), ([1, 3], after))  # two pictures, the first one known
    ask(([1, 2], after), ([2, 1], after))
    return found


def main(folder: Path) -> None:
    model = folder / "qwen2-vl"
    image_ids = make_qwen2_vl(model)
    options: dict[str, Any] = dict(
        skip_tokenizer_init=False, limit_mm_per_prompt={"image": 2, "video": 0}
    )
    results = {}
    with engine(model, block_size=PAGE, **options) as llm:
        results["stock"] = answers(llm, image_ids)
    for name, fourier in (("lossless", LOSSLESS), ("derived", LOSSLESS | {"target": "balanced"})):
        with engine(model, fourier, **options) as llm:
            results[name] = answers(llm, image_ids)
    print(json.dumps(results))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
