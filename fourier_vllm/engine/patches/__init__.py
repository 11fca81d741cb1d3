"""Patches of vLLM where it has no hook: one file each, with a test that fails when upstream moves."""
