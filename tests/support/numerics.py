"""Comparison of tensors, and an independent reading of the page format, for several test files.

`read_page` follows the text of page.py in NumPy and SciPy, float64, without the code it checks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.fft
import scipy.linalg
import torch

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def assert_close(name: str, ref: torch.Tensor, got: torch.Tensor, ratio: float) -> None:
    """Fail where `got` is not finite or its error exceeds `ratio` times the RMS of `ref`."""
    assert ref.shape == got.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(ref.shape)}"
    ref, got = ref.detach().double().cpu(), got.detach().double().cpu()
    bad = int((~got.isfinite()).sum())
    assert not bad, f"{name}: {bad} of {got.numel()} values are not finite"
    if not ref.numel():
        return
    error, size = (got - ref).square().mean().sqrt(), ref.square().mean().sqrt()
    found = float(error / size.clamp_min(1e-30))
    assert found <= ratio, f"{name}: relative RMS error {found:.3g} above {ratio:.3g}"


def rotation(head_size: int) -> np.ndarray:
    """The rotation of the token codec: DCT of the odd factor times Hadamard of the rest."""
    odd = head_size
    while odd % 2 == 0:
        odd //= 2
    power = head_size // odd
    dct = scipy.fft.dct(np.eye(odd), axis=0, norm="ortho")
    return np.kron(dct, scipy.linalg.hadamard(power) / np.sqrt(power))


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Codes `[..., n, k]` of bytes `[..., s, k]`: byte j holds the codes of tokens j, j + s, ...,
    lowest bits first."""
    packed, s = packed.astype(np.int64), packed.shape[-2]
    codes = np.zeros((*packed.shape[:-2], s * 8 // bits, packed.shape[-1]), np.int64)
    for j in range(s):
        for i in range(8 // bits):
            codes[..., j + i * s, :] = (packed[..., j, :] >> (i * bits)) % (1 << bits)
    return codes


def _plane(page: np.ndarray, plane: Any, dtype: torch.dtype) -> np.ndarray:
    raw = page[plane.offset : plane.offset + plane.nbytes].copy()
    if not raw.size:
        return np.zeros(plane.shape)
    values = torch.from_numpy(raw).view(dtype).reshape(plane.shape)
    return values.numpy() if dtype in (torch.uint8, torch.int8) else values.double().numpy()


def read_page(layout: Any, page: torch.Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Decode one page `[page_bytes]`.

    Returns
    -------
    dict
        `k`, `v` `[W, H, D]`; `k_low` the dequantised low-pass `[W, H, D]` (likewise `v_low` under
        the channel codec); `k_step` the quantisation step of each dim `[H, D]`, 0 without codes;
        `v_step` `[W, H]` under the token codec.
    """
    raw, out = page.numpy(), {}
    for name, planes in (("k", layout.k), ("v", layout.v)):
        if hasattr(planes, "coef"):
            out[name], out[name + "_low"], out[name + "_step"] = _channel(
                layout, planes, raw, dtype
            )
        else:
            out[name], out[name + "_step"] = _token(layout, planes, raw, dtype)
    return out


def _channel(layout: Any, planes: Any, raw: np.ndarray, dtype: torch.dtype) -> tuple:
    H, D, W = layout.num_kv_heads, layout.head_size, layout.page_size
    if planes.coef_scale is None:
        coef = _plane(raw, planes.coef, dtype)
    else:
        coef = _plane(raw, planes.coef, torch.int8).astype(np.float64)
        coef = coef * _plane(raw, planes.coef_scale, torch.float16)[..., None]
    padded = np.zeros((H, W, D))
    padded[:, : coef.shape[1]] = coef
    low = scipy.fft.idct(padded, axis=1, norm="ortho").transpose(1, 0, 2)  # [W, H, D]
    x, step = low.copy(), np.zeros((H, D))
    scale, zero = (_plane(raw, p, torch.float16) for p in (planes.scale, planes.zero))
    columns = iter(unpack(_plane(raw, planes.codes, torch.uint8).T, 2).T)
    for i, (row, bits) in enumerate(zip(planes.coded_dims, planes.coded_bits, strict=True)):
        h, d = divmod(row, D)
        codes = sum(next(columns) * 4**level for level in range(bits // 2))
        x[:, h, d] += codes * scale[i] + zero[i]
        step[h, d] = scale[i]
    assert next(columns, None) is None
    for i, row in enumerate(planes.raw_dims):
        x[:, row // D, row % D] = _plane(raw, planes.raw, dtype)[i]
    return x, low, step


def _token(layout: Any, planes: Any, raw: np.ndarray, dtype: torch.dtype) -> tuple:
    if planes.bits == 16:
        x = _plane(raw, planes.codes, dtype).transpose(1, 0, 2)
        return x, np.zeros(x.shape[:2])
    levels = unpack(_plane(raw, planes.codes, torch.uint8), 2)
    codes = sum(level * 4**i for i, level in enumerate(levels))
    if planes.bits == 3:
        codes = codes + 4 * unpack(_plane(raw, planes.high, torch.uint8), 1)
    scale, zero = (_plane(raw, p, torch.float16) for p in (planes.scale, planes.zero))
    x = (codes * scale[..., None] + zero[..., None]) @ rotation(layout.head_size).T
    return x.transpose(1, 0, 2), scale.T
