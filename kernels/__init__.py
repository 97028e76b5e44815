"""Triton kernels and their launchers. They know tensors and grids, nothing of fastppo: `fastppo.ops` calls them.

They install as `fastppo.kernels`. With the checkout's root on sys.path this folder is also what `import kernels` finds, and that is the
name of Hugging Face's package, which Transformers looks for. So under that name the installed package is loaded in place of this
one. Where it is not installed, an empty module older than any of its releases stands in: an ImportError would say more, but Transformers
(5.17) imports whatever can be found, without expecting it to fail.
"""

if __name__ == "kernels":
    import sys
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec
    from pathlib import Path

    _root = Path(__file__).resolve().parents[1]
    _spec = PathFinder.find_spec(__name__, [entry for entry in sys.path if Path(entry).resolve() != _root])
    if _spec is not None and _spec.origin is not None:  # a folder without __init__.py has no origin
        sys.modules[__name__] = module_from_spec(
            _spec
        )  # what an import returns when its module puts another in its place
        _spec.loader.exec_module(sys.modules[__name__])
    else:
        __version__ = "0"
        __path__ = []  # no submodule can be imported under the borrowed name
