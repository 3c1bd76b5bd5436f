"""The folder that `python -m hub` writes, loaded by Hugging Face's `kernels` beside the package."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import pytest

from hub.__main__ import ROOT, main

try:
    version("kernels")
except PackageNotFoundError:
    pytest.skip("kernels is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("hub")
    main(["--out", str(out)])
    return out


def run(folder, code, **environment):
    """Runs code in a process of its own, where `kernels` is not the folder of this repository."""
    start = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from kernels import get_local_kernel\n"
        f"kernel = get_local_kernel(Path({str(folder)!r}), backend='cpu', trust_remote_code=True)\n"
    )
    paths = {"PYTHONPATH": environment.pop("package", ""), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", start + code],
        cwd=folder,
        env=os.environ | paths | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[-2]


ATTENTION = """
layout = kernel.PrefixLayout.from_lengths([9], [[4, 5]])
q, k, v = (torch.randn(18, heads, 8, requires_grad=True) for heads in (4, 2, 2))
kernel.prefix_attention(q, k, v, layout).sum().backward()
assert q.grad.norm() > 0
"""
MODELS = """
from transformers import Qwen3Config, Qwen3ForCausalLM
torch.manual_seed(0)
def model():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=50, hidden_size=32, intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8))
prefix = torch.randint(50, (1, 9)).expand(3, 9)
ids = torch.cat([prefix, torch.randint(50, (3, 4))], 1)
right = model()(ids, use_cache=False).logits
"""


def test_kernel_runs_without_the_package(folder):
    code = ATTENTION + (
        "print([m for m in sys.modules if m.startswith(('prefix_attn', 'transformers'))],"
        " hasattr(torch.ops.prefix_attn, 'forward'), kernel.supports_flash_attn)"
    )
    assert run(folder, code) == "[] False True"


def test_enabled_model_is_exact_beside_one_of_the_package(folder):
    code = MODELS + (
        "import prefix_attn\n"
        "mine, theirs = kernel.enable(model()), prefix_attn.enable(model())\n"
        "for m, package in ((mine, kernel), (theirs, prefix_attn)):\n"
        "    assert (m(ids, use_cache=False).logits - right).abs().max() < 1e-5\n"
        "    assert package.stats(m).tokens_run == 9 + 3 * 4, package.stats(m)\n"
        "assert mine.config._attn_implementation != theirs.config._attn_implementation\n"
        "assert torch.ops.prefix_attn.forward is not None\n"
        "print(type(kernel.losses).__name__, kernel.stats(mine).packed_calls)"
    )
    assert run(folder, ATTENTION + code, package=str(ROOT)) == "module 1"


def test_transformers_takes_it_for_an_attention(folder):
    """An organization's kernel is named like one, and loaded from a folder here."""
    code = MODELS + (
        "from transformers.integrations import hub_kernels\n"
        # transformers may ask for a version of `kernels` that is not out yet.
        "from kernels import get_kernel\n"
        "hub_kernels.get_kernel_hub = get_kernel\n"
        "hub_kernels.is_kernels_available = lambda *_: True\n"
        "mine = model()\n"
        "mine.set_attn_implementation('me/prefix-attn', allow_all_kernels=True)\n"
        "assert (mine(ids, use_cache=False).logits - right).abs().max() < 1e-5\n"
        "print(mine.config._attn_implementation)"
    )
    assert run(folder, code, LOCAL_KERNELS=f"me/prefix-attn={folder}") == "me/prefix-attn"


def test_no_import_and_no_registered_name_is_that_of_the_package(folder):
    for path in folder.rglob("*.py"):
        lines = path.read_text().splitlines()
        assert not [x for x in lines if re.match(r"\s*(from|import) prefix_attn", x)], path
        assert not [x for x in lines if "prefix_attn::" in x.replace("_prefix_attn_", "")], path


def test_what_is_imported_besides_is_what_the_page_says(folder):
    """The standard library, PyTorch, NumPy; Triton and transformers where they are used."""
    found = set()
    for path in folder.rglob("*.py"):
        found |= set(re.findall(r"^\s*(?:from|import) (\w+)", path.read_text(), re.MULTILINE))
    others = found - set(sys.stdlib_module_names)
    assert others <= {"torch", "numpy", "triton", "transformers", "packaging"}, others
