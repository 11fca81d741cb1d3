"""Builds, checks and times sealed_decode.cu on a Hopper GPU with nvcc: python sealed_decode.py."""

from __future__ import annotations

import ctypes
import json
import math
import subprocess
import sys
from pathlib import Path

import torch
import triton

DEVICE = "cuda"
H, G, D, W = 8, 4, 128, 128
NUM_TILES = 8  # column tiles of 16 columns
N = 16 * NUM_TILES
SIZES = {
    "k_codes": NUM_TILES * 512,
    "column_scale": 2 * N,
    "coef": 4 * D,
    "offset": 2 * D,
    "coef_scale": 16,
    "v_codes": 4096,
    "v_scale": 2 * W,
    "v_zero": 2 * W,
}
RECORD = sum(SIZES.values())
SPLITS = (4, 8, 16, 32, 64, 128)


def library() -> ctypes.CDLL:
    """Compile the kernel and load it."""
    source = Path(__file__).with_name("sealed_decode.cu")
    out = "/tmp/sealed_decode.so"
    arch = "-gencode=arch=compute_90a,code=sm_90a"
    options = ["-O3", "-std=c++17", arch, "-shared", "-Xcompiler", "-fPIC"]
    subprocess.check_call(["nvcc", *options, "-o", out, str(source)])
    return ctypes.CDLL(out)


def dct() -> torch.Tensor:
    """Four rows of the orthonormal DCT-II, `[4, W]`."""
    k, w = torch.arange(4, dtype=torch.float64), torch.arange(W, dtype=torch.float64) + 0.5
    basis = torch.cos(math.pi / W * k[:, None] * w[None]) * math.sqrt(2 / W)
    basis[0] /= math.sqrt(2)
    return basis


def basis_fragments() -> torch.Tensor:
    """A fragments of `[basis, 1]` twice (high and low part of what they are multiplied with)."""
    matrix = torch.zeros(W, 16)
    matrix[:, 0:4] = matrix[:, 8:12] = dct().T
    matrix[:, 4] = matrix[:, 12] = 1
    lane = torch.arange(32)
    out = torch.zeros(8, 32, 8, dtype=torch.half)
    for tile in range(8):
        for register, (row, column) in enumerate([(0, 0), (8, 0), (0, 8), (8, 8)]):
            for half in range(2):
                rows = tile * 16 + row + lane // 4
                columns = 2 * (lane % 4) + half + column
                out[tile, :, 2 * register + half] = matrix[rows, columns].half()
    return out.to(DEVICE)


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Codes `[n, 128, columns]` in fragment order, `[n, column tile, lane, 4]` int32."""
    n, _, columns = codes.shape
    tiles = columns // 16
    # row tile, row half, g, column tile, column half, t, pair
    c = codes.view(n, 8, 2, 8, tiles, 2, 4, 2).long()
    out = torch.zeros(n, tiles, 32, 4, dtype=torch.long, device=codes.device)
    for row_tile in range(8):
        for row in range(2):
            for column in range(2):
                for pair in range(2):
                    shift = 2 * (2 * (row_tile & 1) + row) + 8 * column + 16 * pair
                    bits = c[:, row_tile, row, :, :, column, :, pair].permute(0, 2, 1, 3)
                    out[..., row_tile // 2] |= bits.reshape(n, tiles, 32) << shift
    return (out - ((out >> 31) << 32)).int()


def random_pages(num_pages: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Pages `[num_pages, H * RECORD]` and what is in them, `[num_pages * H, ...]`."""
    n = num_pages * H
    generator = torch.Generator(device=DEVICE).manual_seed(0)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(n, *shape, device=DEVICE, generator=generator)

    parts = {
        "k_codes": (4 * uniform(W, N)).byte(),
        "column_scale": (0.5 * uniform(N) + 0.1).half(),
        "coef": (254 * uniform(4, D) - 127).round().to(torch.int8),
        "offset": (2 * uniform(D) - 1).half(),
        "coef_scale": (0.02 * uniform(4)).half(),
        "v_codes": (4 * uniform(D, W)).byte(),
        "v_scale": (0.3 * uniform(W) + 0.2).half(),
        "v_zero": (-uniform(W)).half(),
    }
    tiles = (NUM_TILES, 2, 4, 2)  # column tile, half, t, pair
    stored = {
        **parts,
        "k_codes": pack(parts["k_codes"]),
        "v_codes": pack(parts["v_codes"]),
        "column_scale": parts["column_scale"].view(n, *tiles).permute(0, 3, 1, 2, 4),
        "coef": (parts["coef"].view(torch.uint8) ^ 128)
        .view(n, 4, *tiles)
        .permute(0, 1, 4, 2, 3, 5),
        "offset": parts["offset"].view(n, *tiles).permute(0, 3, 1, 2, 4),
        "v_scale": parts["v_scale"].view(n, 8, 2, 8).permute(0, 3, 1, 2),
        "v_zero": parts["v_zero"].view(n, 8, 2, 8).permute(0, 3, 1, 2),
    }
    pages = torch.zeros(n, RECORD, dtype=torch.uint8, device=DEVICE)
    start = 0
    for name, size in SIZES.items():
        raw = stored[name].contiguous().view(n, -1).view(torch.uint8)
        pages[:, start : start + raw.shape[1]] = raw
        start += size
    return pages.view(num_pages, H * RECORD), parts


class Step:
    """One decode step: random queries against `pages` through a random block table."""

    def __init__(self, lib: ctypes.CDLL, pages: torch.Tensor, num_pages: torch.Tensor, splits: int):
        B = len(num_pages)
        self.lib, self.pages, self.num_pages, self.splits = lib, pages, num_pages, splits
        self.table = torch.randperm(len(pages), device=DEVICE).view(B, -1).int()
        generator = torch.Generator().manual_seed(1)
        self.column_dim = torch.randint(0, D, (N,), generator=generator).sort()[0].to(DEVICE)
        self.q = (0.05 * torch.randn(B, H, G, D, device=DEVICE)).half()
        self.q_columns = self.q[..., self.column_dim].contiguous()
        self.basis = basis_fragments()
        self.out = torch.empty(B, H, G, splits, D, device=DEVICE)
        self.lse = torch.empty(B, H, G, splits, device=DEVICE)

    def __call__(self) -> None:
        tensors = (self.q, self.pages, self.table, self.num_pages, self.basis, self.q_columns)
        pointers = [ctypes.c_void_p(x.data_ptr()) for x in (*tensors, self.out, self.lse)]
        self.lib.launch(
            *pointers,
            ctypes.c_int(self.table.stride(0)),
            ctypes.c_int(len(self.q)),
            ctypes.c_int(H),
            ctypes.c_long(H * RECORD),
            ctypes.c_int(self.splits),
            ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )


def check(lib: ctypes.CDLL) -> float:
    """Worst relative RMS against float64 over two requests of different length."""
    pages, parts = random_pages(12)
    step = Step(lib, pages, torch.tensor([6, 5], device=DEVICE, dtype=torch.int32), 4)
    step()
    part = {k: v.view(12, H, *v.shape[1:]).double() for k, v in parts.items()}
    worst = 0.0
    for b, n in enumerate(step.num_pages.tolist()):
        p = {k: v[step.table[b, :n].long()] for k, v in part.items()}
        q, q_columns = step.q[b].double(), step.q_columns[b].double()
        columns = p["k_codes"] * p["column_scale"][:, :, None]
        s = torch.einsum("phwn,hgn->phgw", columns, q_columns)
        coef = p["coef"] * p["coef_scale"][..., None]
        s += torch.einsum("phmd,hgd,mw->phgw", coef, q, dct().half().double().to(DEVICE))
        s += torch.einsum("phd,hgd->phg", p["offset"], q)[..., None]
        v = p["v_codes"] * p["v_scale"][:, :, None] + p["v_zero"][:, :, None]
        weights = torch.softmax((s * math.log(2)).permute(1, 2, 0, 3).flatten(2), -1)
        expected = torch.einsum("hgpw,phdw->hgd", weights.view(H, G, n, W), v)
        share = torch.softmax(step.lse[b].double() * math.log(2), -1)[..., None]
        found = (step.out[b].double() * share).sum(-2)
        assert not found.isnan().any()
        worst = max(worst, ((found - expected).norm() / expected.norm()).item())
    return worst


def main() -> None:
    lib = library()
    error = check(lib)
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    ms = triton.testing.do_bench(lambda: target.copy_(source), return_mode="median")
    bandwidth = 2 * len(source) / ms / 1e3  # bytes/us
    rows = []
    for batch, context in ((8, 32768), (32, 32768), (1, 131072), (128, 4096)):
        per_request = context // W
        some, _ = random_pages(min(batch * per_request, 2048))
        repeats = -(-batch * per_request // len(some))
        pages = some.repeat(repeats, 1)[: batch * per_request].contiguous()
        counts = torch.full((batch,), per_request, device=DEVICE, dtype=torch.int32)
        times = {}
        for splits in SPLITS:
            if splits <= per_request and batch * H * splits >= 400:
                step = Step(lib, pages, counts, splits)
                times[splits] = 1e3 * triton.testing.do_bench(step, return_mode="median")
        splits = min(times, key=lambda x: times[x])
        rows.append(
            {
                "batch": batch,
                "context": context,
                "splits": splits,
                "us": round(times[splits], 1),
                "floor_us": round(pages.numel() / bandwidth, 1),
                "bf16_floor_us": round(4 * batch * context * H * D / bandwidth, 1),
            }
        )
        print(rows[-1], flush=True)
    machine = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    machine["copy_tb_s"] = round(bandwidth / 1e6, 3)
    result = {"machine": machine, "relative_rms": error, "rows": rows}
    Path(sys.argv[1] if len(sys.argv) > 1 else "sealed_decode.json").write_text(
        json.dumps(result, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
