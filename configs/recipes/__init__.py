"""Recipe files that ship with fourier_vllm (import as fourier_vllm.recipes)."""
