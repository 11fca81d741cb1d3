"""lm-evaluation-harness through the plugin, on a task of local documents: nothing is downloaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fourier_vllm.evaluation.text import documents

pytest.importorskip("lm_eval")

ANSWERS = ("4815162", "3421997", "2718281")
NEEDLE = "One of the special magic numbers for violin is: "
TASK = """
task: local_needle
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 12, do_sample: false}}
filter_list:
  - name: number
    filter:
      - {{function: regex, regex_pattern: '(\\d{{7}})'}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""


def write_task(folder: Path) -> None:
    """Three documents of about 1,500 tokens, each with a number to be found."""
    rows = []
    for text, answer in zip(documents(len(ANSWERS), 7000), ANSWERS, strict=True):
        place = text.index("\n", 2500) + 1
        body = f"{text[:place]}{NEEDLE}{answer}.\n{text[place:6000]}"
        question = "\n\nQuestion: what is the special magic number for violin?\nAnswer: "
        rows.append({"prompt": f"{body}{question}{NEEDLE.strip()}", "answer": answer})
    data = folder / "data.jsonl"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (folder / "local_needle.yaml").write_text(TASK.format(data=data))


def test_local_task(smollm2: Path, root: Path, tmp_path: Path) -> None:
    write_task(tmp_path)
    arguments = {
        "pretrained": str(smollm2),
        "attention_backend": "fourier",
        "max_length": "4096",
        "dtype": "bfloat16",
        "enforce_eager": "True",
        "kv_cache_memory_bytes": str(256 << 20),
    }
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "vllm"),
        *("--model_args", ",".join(f"{name}={value}" for name, value in arguments.items())),
        *("--tasks", "local_needle", "--include_path", str(tmp_path)),
        *("--output_path", str(tmp_path / "out")),
    ]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"HF_DATASETS_OFFLINE": "1", "PYTHONPATH": path}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "fourier: recipe balanced" in run.stdout + run.stderr
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())["results"]["local_needle"]
    assert results["exact_match,number"] == 1
