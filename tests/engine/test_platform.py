"""The plugin's entry point: cheap, idempotent, inert until the backend is selected."""

from __future__ import annotations

import ast
import copy
import pickle
import subprocess
import sys

import pytest
import torch
from vllm.config import AttentionConfig
from vllm.platforms import current_platform
from vllm.platforms.interface import Platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import AttentionSelectorConfig

from fourier_vllm import register
from fourier_vllm.engine.platform import (
    BACKEND_PATH,
    NAME,
    is_selected,
    member,
)
from fourier_vllm.engine.startup import leave_sliding_windows
from tests.support.scheduling import LLAMA, engine_config

SELECTOR = AttentionSelectorConfig(
    head_size=64, dtype=torch.bfloat16, kv_cache_dtype="auto", block_size=None
)
GEMMA3 = LLAMA | dict(
    architectures=["Gemma3ForCausalLM"],
    model_type="gemma3_text",
    sliding_window=64,
    layer_types=["sliding_attention", "full_attention"],
)
on_cpu = pytest.mark.skipif(not current_platform.is_cpu(), reason="the wrapper is for CPUs")


@pytest.fixture(autouse=True)
def _registered():
    register()


def python(code: str) -> str:
    """Output of a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.strip()


def hooks() -> tuple:
    platform = type(current_platform)
    return tuple(
        vars(platform).get(name) for name in ("check_and_update_config", "get_attn_backend_cls")
    )


def test_registering_again_changes_nothing():
    before = hooks(), list(AttentionBackendEnum.__members__)
    register()
    register()
    assert (hooks(), list(AttentionBackendEnum.__members__)) == before
    assert list(AttentionBackendEnum.__members__).count(NAME) == 1


def test_only_the_platform_in_use_is_wrapped():
    assert "_fourier_installed" not in vars(Platform)
    assert "_fourier_installed" in vars(type(current_platform))


def test_member():
    assert member() is AttentionBackendEnum[NAME] is member()
    assert member().name == "FOURIER"
    assert member().value == BACKEND_PATH
    assert member().get_class().get_name() == NAME
    assert isinstance(member(), AttentionBackendEnum)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy], ids=lambda f: f.__name__)
def test_copies_are_the_member(copied):
    assert copied(member()) is member()
    assert copied({"backend": member()})["backend"] is member()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_as_the_member(protocol):
    assert pickle.loads(pickle.dumps(member(), protocol)) is member()


def test_unpickles_in_a_process_that_never_registered():
    """Spawned workers unpickle the configuration before they load plugins."""
    data = pickle.dumps([member(), AttentionConfig(backend="fourier")])
    code = (
        "import pickle, sys\n"
        "from vllm.v1.attention.backends.registry import AttentionBackendEnum as E\n"
        "assert 'FOURIER' not in E.__members__, 'loaded already'\n"
        f"backend, config = pickle.loads({data!r})\n"
        "assert backend is E['FOURIER'] is config.backend\n"
        "import fourier_vllm\n"
        "fourier_vllm.register()\n"
        "assert backend is E['FOURIER']\n"
        "assert 'fourier_vllm.engine.backend' not in sys.modules\n"
        "print(backend.get_path())"
    )
    assert python(code).splitlines()[-1] == BACKEND_PATH


def test_registering_is_cheap():
    """No kernels, no engine modules, no torch extension: every vLLM process pays for this."""
    code = (
        "import sys, vllm.platforms, vllm.v1.attention.backends.registry\n"
        "before = set(sys.modules)\n"
        "import fourier_vllm\n"
        "fourier_vllm.register()\n"
        "new = {m for m in sys.modules if m.startswith('fourier_vllm')} - before\n"
        "print(sorted(new))"
    )
    loaded = python(code).splitlines()[-1]
    assert ast.literal_eval(loaded) == [
        "fourier_vllm",
        "fourier_vllm._text",
        "fourier_vllm.engine",
        "fourier_vllm.engine.patches",
        "fourier_vllm.engine.patches.engine_args",
        "fourier_vllm.engine.patches.engine_startup",
        "fourier_vllm.engine.platform",
    ]


def test_entry_point_is_found_by_vllm():
    from importlib.metadata import entry_points

    (point,) = entry_points(group="vllm.general_plugins", name="fourier")
    assert point.load() is register


@pytest.mark.parametrize("name", ["fourier", "FOURIER", "FouRier"])
def test_any_case_is_accepted(name):
    assert AttentionConfig(backend=name).backend is member()


def test_is_selected(tmp_path):
    assert not is_selected(engine_config(tmp_path, max_model_len=512))
    assert is_selected(engine_config(tmp_path, max_model_len=512, attention_backend="fourier"))
    per_kind = {"backend_per_kind": {"full_attention": member()}}
    assert is_selected(engine_config(tmp_path, max_model_len=512, attention_config=per_kind))


def test_selected_configuration_survives_pickling(tmp_path):
    config = engine_config(tmp_path, max_model_len=512, attention_backend="fourier")
    again = pickle.loads(pickle.dumps(config))
    assert again.attention_config.backend is member()
    assert again.compute_hash() == config.compute_hash()
    assert copy.deepcopy(config).attention_config.backend is member()


def test_layers_with_sliding_windows_are_left_to_vllm(tmp_path):
    """What a GPU's platform does; the CPU runs them itself."""
    options = dict(max_model_len=512, attention_backend="fourier")
    config = engine_config(tmp_path, GEMMA3, **options)
    leave_sliding_windows(config)
    again = pickle.loads(pickle.dumps(config)).attention_config
    assert again.backend is None
    assert again.backend_per_kind == {"full_attention": member()}
    assert is_selected(config)
    config = engine_config(tmp_path, **options)
    leave_sliding_windows(config)
    assert config.attention_config.backend is member()


def test_options_are_part_of_the_hash(tmp_path):
    """Compiled artefacts of one recipe must not serve another."""
    hashes = {
        engine_config(
            tmp_path,
            max_model_len=512,
            attention_backend="fourier",
            additional_config={"fourier": {"target": target}},
        ).compute_hash()
        for target in ("balanced", "quality")
    }
    assert len(hashes) == 2


@on_cpu
@pytest.mark.parametrize("backend", [None, "CPU_ATTN", "TRITON_ATTN", "FLASH_ATTN"])
def test_other_backends_pass_through(backend):
    """The CPU platform ignores them all; so must the wrapper."""
    selected = AttentionBackendEnum[backend] if backend else None
    path = type(current_platform).get_attn_backend_cls(selected, SELECTOR, num_heads=4)
    assert path == AttentionBackendEnum.CPU_ATTN.get_path()


@on_cpu
def test_fourier_is_honoured():
    path = type(current_platform).get_attn_backend_cls(member(), SELECTOR, num_heads=4)
    assert path == BACKEND_PATH


@on_cpu
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(use_mla=True), "MLA not supported"),
        (dict(has_sink=True), "attention sinks not supported"),
        (dict(attn_type="encoder"), "attention type encoder not supported"),
        (dict(use_dcp=True), "DCP not supported"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_layers_that_cannot_run_are_refused(changes, words):
    with pytest.raises(ValueError, match="attention backend fourier cannot run") as caught:
        type(current_platform).get_attn_backend_cls(
            member(), SELECTOR._replace(**changes), num_heads=4
        )
    assert words in str(caught.value)
    assert "leave out --attention-backend fourier" in str(caught.value)


@on_cpu
def test_layers_that_can_run_are_taken():
    for changes in (dict(has_sliding_window=True), dict(dtype=torch.float32), dict(head_size=80)):
        config = SELECTOR._replace(**changes)
        path = type(current_platform).get_attn_backend_cls(member(), config, num_heads=4)
        assert path == BACKEND_PATH
