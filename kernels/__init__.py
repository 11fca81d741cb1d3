"""GPU and CPU kernels of fourier_vllm (import as fourier_vllm.kernels)."""

if (
    __name__ == "kernels"
):  # a process started in the repository root: step aside for PyPI's `kernels`
    import importlib.machinery as _m
    import importlib.util as _u
    import os as _o
    import sys as _s

    _root = _o.path.dirname(_o.path.dirname(_o.path.abspath(__file__)))
    _path = [p for p in _s.path if _o.path.abspath(p or ".") != _root]
    _spec = _m.PathFinder.find_spec("kernels", _path)
    if _spec is not None and _spec.loader is not None:
        _s.modules["kernels"] = _mod = _u.module_from_spec(_spec)
        _spec.loader.exec_module(_mod)
