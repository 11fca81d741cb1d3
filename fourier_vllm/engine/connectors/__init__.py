"""vLLM's KV connectors over sealed pages: memory below the GPU's, and engines that prefill for others."""
