"""For tests of Triton kernels: none of them where Triton is not to be had."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("triton") else ["test_triton_*.py"]
