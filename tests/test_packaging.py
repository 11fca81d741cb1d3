"""The package is whole however it is run, and `kernels/` never poses as PyPI's `kernels`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import fourier_vllm

FIND_EVERYTHING = """
import fourier_vllm.engine, fourier_vllm.kernels, fourier_vllm.recipes
from importlib.resources import files
assert files("fourier_vllm.recipes").joinpath("probe.json").is_file(), "recipe not found"
print(fourier_vllm.__file__)
"""


def python(code: str, cwd: Path, *path: Path) -> str:
    """Run `code` in a Python without site-packages, as in `python -c` started in `cwd`."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env["PYTHONPATH"] = os.pathsep.join(map(str, path))
    run = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.fixture(scope="module")
def source(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged, with one recipe to look for."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("fourier_vllm", "kernels", "configs"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(root / name, copy / name, symlinks=True, ignore=ignore)
    for name in ("pyproject.toml", "LICENSE"):
        shutil.copy(root / name, copy)
    (copy / "README.md").touch()
    (copy / "configs/recipes/probe.json").write_text("{}")
    return copy


def build(source: Path, kind: str) -> Path:
    """Build a wheel ("wheel") or an editable wheel ("editable") with the backend itself."""
    out = source / f"out-{kind}"
    out.mkdir()
    code = f"from setuptools.build_meta import build_{kind} as b; b({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    return build(source, "wheel")


@pytest.fixture(scope="module")
def regular(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a regular install leaves in site-packages."""
    site = tmp_path_factory.mktemp("regular")
    zipfile.ZipFile(wheel).extractall(site)
    return site


def test_in_tree(source: Path) -> None:
    assert python(FIND_EVERYTHING, source) == str(source / "fourier_vllm/__init__.py")


def test_regular_install(regular: Path, tmp_path: Path) -> None:
    found = python(FIND_EVERYTHING, tmp_path, regular)
    assert found == str(regular / "fourier_vllm/__init__.py")


def test_regular_install_run_from_the_repository(regular: Path, source: Path) -> None:
    assert python(FIND_EVERYTHING, source, regular) == str(source / "fourier_vllm/__init__.py")


def test_editable_install(source: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(build(source, "editable")).extractall(site)
    found = python(f"import site; site.addsitedir({str(site)!r})" + FIND_EVERYTHING, tmp_path)
    assert found == str(source / "fourier_vllm/__init__.py")


def test_wheel_holds_every_file_once(wheel: Path, source: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    assert not [name for name in names if name.startswith(("kernels/", "configs/", "tests/"))]
    packaged = {
        *(p for p in source.glob("fourier_vllm/**/*.py")),
        *(p for p in source.glob("fourier_vllm/kernels/*.py")),
        *(p for p in source.glob("fourier_vllm/calibration/texts/*")),
    }
    expected = {p.relative_to(source).as_posix() for p in packaged}
    assert expected | {"fourier_vllm/recipes/probe.json", "fourier_vllm/py.typed"} <= set(names)


def test_kernels_steps_aside_for_the_package_of_that_name(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "kernels"
    other.mkdir()
    (other / "__init__.py").write_text("CUDAProperties = 'the other one'\n")
    (other / "utils.py").write_text("here = __name__\n")
    code = "import kernels, kernels.utils as u; print(kernels.CUDAProperties, u.here)"
    assert python(code, root, tmp_path) == "the other one kernels.utils"


def test_kernels_alone_is_harmless(root: Path) -> None:
    """transformers looks for `kernels.__version__` and must not find one."""
    code = "import kernels, sys; print(hasattr(kernels, '__version__'), 'torch' in sys.modules)"
    assert python(code, root) == "False False"


def test_our_kernels_survive_the_package_of_that_name(root: Path, tmp_path: Path) -> None:
    (tmp_path / "kernels.py").touch()
    code = "import kernels, fourier_vllm.kernels as k; print(k.__file__)"
    assert python(code, root, tmp_path) == str(root / "fourier_vllm/kernels/__init__.py")


def test_entry_module_is_light() -> None:
    """Every vLLM process imports it, `vllm --help` too."""
    code = (
        "import sys, time; start = time.perf_counter(); import fourier_vllm; "
        "took = time.perf_counter() - start; "
        "print(took, *{'torch', 'vllm', 'numpy', 'pydantic'} & set(sys.modules))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        for _ in range(3)
    ]
    fastest, *imported = min((run.stdout.split() for run in runs), key=lambda out: float(out[0]))
    assert not imported
    assert float(fastest) < 0.050


def test_metadata() -> None:
    (plugin,) = metadata.entry_points(group="vllm.general_plugins", name="fourier")
    assert plugin.value == "fourier_vllm:register"
    assert metadata.version("fourier-vllm") == fourier_vllm.__version__


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_requirements_name_no_index(root: Path, kind: str) -> None:
    """Which index to use is the user's choice."""
    assert "://" not in (root / f"requirements/{kind}.txt").read_text()
