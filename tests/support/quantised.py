"""Writes a toy model's linear layers as checkpoints of quantised weights do: one writer a format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

GROUP = 64  # inputs that share a scale, in the 4-bit formats
NIBBLES = 8  # in an int32
AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]

Tensors = dict[str, torch.Tensor]


def quantise(source: Path, folder: Path, name: str) -> Path:
    """Write the model of `source` with weights of format `name` below `folder`; returns its folder."""
    path = folder / f"{source.name}-{name}"
    if path.exists():
        return path
    path.mkdir()
    write, settings = FORMATS[name]
    tensors: Tensors = {}
    for key, tensor in load_file(source / "model.safetensors").items():
        if key.endswith("_proj.weight"):
            prefix = key.removesuffix("weight")
            tensors |= {prefix + k: v.contiguous() for k, v in write(tensor).items()}
        else:
            tensors[key] = tensor
    save_file(tensors, path / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return path


def pack(nibbles: torch.Tensor) -> torch.Tensor:
    """`[..., 8 n]` values of 4 bits as `[..., n]` int32, the first one lowest."""
    groups = nibbles.reshape(*nibbles.shape[:-1], -1, NIBBLES).long()
    words = (groups << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def symmetric(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of 4 bits around 8, `[out, in]`, and scales `[out, in / GROUP]`."""
    groups = weight.unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True) / 7
    return (groups / scale).round().add(8).clamp(0, 15).flatten(1), scale.squeeze(-1)


def int8(weight: torch.Tensor) -> Tensors:
    scale = weight.abs().amax(1, keepdim=True) / 127
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def fp8(weight: torch.Tensor) -> Tensors:
    scale = weight.abs().amax(1, keepdim=True) / 448
    return {"weight": (weight / scale).to(torch.float8_e4m3fn), "weight_scale": scale}


def w4a16(weight: torch.Tensor) -> Tensors:
    codes, scale = symmetric(weight)
    shape = torch.tensor(weight.shape)
    return {"weight_packed": pack(codes), "weight_scale": scale, "weight_shape": shape}


def gptq(weight: torch.Tensor) -> Tensors:
    codes, scale = symmetric(weight)
    return {
        "qweight": pack(codes).T,
        "qzeros": pack(torch.full(scale.T.shape, 7)),  # one less than the zero point
        "scales": scale.T.half(),
        "g_idx": (torch.arange(weight.shape[1]) // GROUP).int(),
    }


def awq(weight: torch.Tensor) -> Tensors:
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scale = (high - low) / 15
    zero = (-low / scale).round().clamp(0, 15)
    codes = (groups / scale + zero).round().clamp(0, 15).flatten(1)

    def ordered(x: torch.Tensor) -> torch.Tensor:
        return pack(x.unflatten(1, (-1, NIBBLES))[:, :, AWQ_ORDER].flatten(1))

    return {
        "qweight": ordered(codes.T),
        "qzeros": ordered(zero.squeeze(-1).T),
        "scales": scale.squeeze(-1).T.half(),
    }


def compressed_tensors(
    layout: str, weights: dict[str, Any], activations: dict[str, Any] | None
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


def numbers(kind: str, bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    same = {"symmetric": True, "dynamic": strategy == "token"}
    return {"type": kind, "num_bits": bits, "strategy": strategy} | same | more


# name of the format: what it writes for a weight, and what the model's config says of it
FORMATS: dict[str, tuple[Callable[[torch.Tensor], Tensors], dict[str, Any]]] = {
    "int8": (
        int8,
        compressed_tensors(
            "int-quantized", numbers("int", 8, "channel"), numbers("int", 8, "token")
        ),
    ),
    "fp8": (
        fp8,
        compressed_tensors(
            "float-quantized", numbers("float", 8, "channel"), numbers("float", 8, "token")
        ),
    ),
    "w4a16": (
        w4a16,
        compressed_tensors("pack-quantized", numbers("int", 4, "group", group_size=GROUP), None),
    ),
    "gptq": (
        gptq,
        dict(quant_method="gptq", bits=4, group_size=GROUP, desc_act=False, sym=True),
    ),
    "awq": (
        awq,
        dict(quant_method="awq", bits=4, group_size=GROUP, zero_point=True, version="gemm"),
    ),
}
