"""Sealed pages in vLLM's tiers below the GPU's memory."""
