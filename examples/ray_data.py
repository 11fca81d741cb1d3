"""Answer a file of requests with replicas on Ray Data: killed and started again, it goes on.

    python examples/ray_data.py [--model MODEL] [--replicas 1] [--folder FOLDER]

Needs `pip install 'fourier-vllm[ray]'`. From a shell: `fourier-vllm batch MODEL --input FILE --output DIR`.
Without `--model`: SmolLM2-135M-Instruct, fetched; it runs on a CPU too.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

COUNTRIES = ("Russia", "Germany", "Japan", "France", "Italy", "Spain", "Egypt", "India")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="Hugging Face folder or Hub id")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, default=Path("ray_data"), help="of input and answers"
    )
    args = parser.parse_args()

    import torch

    from fourier_vllm.demo.fetch import fetch
    from fourier_vllm.distributed.batch import Options, run

    args.folder.mkdir(parents=True, exist_ok=True)
    source = args.folder / "requests.jsonl"
    with source.open("w") as lines:
        for country in COUNTRIES:
            chat = [{"role": "user", "content": f"What is the capital of {country}?"}]
            lines.write(json.dumps({"id": country, "messages": chat}) + "\n")
    vllm_args = ["--max-model-len", "2048", "--kv-cache-memory-bytes", "128M"]
    if not torch.cuda.is_available():
        vllm_args.append("--enforce-eager")  # compiling takes minutes on a CPU
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # replicas share the cores
    run(
        Options(
            model=args.model or str(fetch("smollm2")),
            input=source,
            output=args.folder,
            replicas=args.replicas,
            batch_size=4,
            max_tokens=24,
            vllm_args=vllm_args,
        )
    )
    for file in sorted((args.folder / "answers").glob("*.json")):
        for row in map(json.loads, file.read_text().splitlines()):
            print(f"{row['id']}: {row['text']}")


if __name__ == "__main__":
    main()
