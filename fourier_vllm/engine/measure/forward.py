"""Runs the engine's own model over a text, on all its workers, as its runner would without a cache."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from vllm.distributed import get_pp_group, get_tp_group
from vllm.forward_context import set_forward_context
from vllm.sequence import IntermediateTensors

ROWS_AT_ONCE = 256  # of logits, which are as wide as the vocabulary


class Model:
    """The model of an engine whose weights are loaded.

    Parameters
    ----------
    module : torch.nn.Module
        What vLLM's runner calls: this worker's part of the model.
    vllm_config : vllm.config.VllmConfig
    """

    def __init__(self, module: Any, vllm_config: Any) -> None:
        self.module, self.config = module, vllm_config
        self.device: torch.device = vllm_config.device_config.device

    def hidden_states(self, ids: Tensor) -> Tensor | None:
        """Hidden states `[T, hidden]` in front of the head of a text's token ids `[T]`.

        All workers have to call it with the same text. None but on the last pipeline stage.
        """
        stages, ranks = get_pp_group(), get_tp_group()
        ids = ids.to(self.device)
        positions = torch.arange(len(ids), device=self.device)
        if self.config.model_config.uses_mrope:
            positions = positions.expand(3, -1)
        received = embedded = None
        if not stages.is_first_rank:
            received = IntermediateTensors(stages.recv_tensor_dict(all_gather_group=ranks))
        elif self.config.model_config.is_multimodal_model:
            embedded = self.module.embed_input_ids(ids)
        with set_forward_context(
            None, self.config, num_tokens=len(ids), skip_compiled=True
        ):  # fmt: skip
            output = self.module(
                input_ids=ids if embedded is None else None,
                positions=positions,
                intermediate_tensors=received,
                inputs_embeds=embedded,
            )
        if not stages.is_last_rank:
            stages.send_tensor_dict(output.tensors, all_gather_group=ranks)
            return None
        return output

    def divergence(self, exact: Tensor, found: Tensor) -> float:
        """KL divergence of predictions from hidden states `[T, hidden]`, nats, summed over the tokens.

        Infinite where an activation is not finite. All ranks of the stage have to call it.
        """
        total = 0.0
        for a, b in zip(exact.split(ROWS_AT_ONCE), found.split(ROWS_AT_ONCE), strict=True):
            logp, logq = (self.module.compute_logits(x).float().log_softmax(-1) for x in (a, b))
            # Padding of the vocabulary has a probability of zero in both.
            nats = torch.where(logp == -torch.inf, 0, logp.exp() * (logp - logq))
            total += float(nats.sum(dtype=torch.float64))
        return total if math.isfinite(total) else math.inf
