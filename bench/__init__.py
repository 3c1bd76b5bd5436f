"""Benchmarks of shared-prefix attention against repeating the prefix."""

import os

# The profiler, which counts bytes on the CPU, otherwise logs on every start: before torch loads.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
