"""The generated tables in the pages are those of the files that they come from."""

import csv

import pytest

from bench import publish


@pytest.mark.parametrize("page", publish.PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_their_files(page):
    text = page.read_text()
    assert "<!-- bench:begin" in text
    assert publish.filled(text) == text, "run python -m bench.publish"


def test_gpu_table_names_the_device_and_leaves_gaps(tmp_path):
    row = {
        "prefix": 2048, "suffix": 512, "group": 16, "heads_q": 32, "heads_kv": 8, "head_dim": 128,
        "provider": "prefix_attn", "fwd_ms": 1.5, "fwd_tflops": 400.2, "bwd_ms": "",
        "bwd_tflops": "", "total_ms": "", "total_speedup": "", "ideal": 3.5, "share_of_ideal": "",
        "peak_mib": 100.0, "device": "a GPU", "driver": "1.2", "threads": 8, "dtype": "bfloat16",
        "torch": "2.11", "triton": "3.6.0", "commit": "c",
    }  # fmt: skip
    path = tmp_path / "gpu.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        writer.writerow(row)
    text = publish.markdown(path)
    cells = "2048, 512, 16, 32/8, 128 | prefix_attn | 1.500 | 400 | - | - | - | - | 3.50 | - | 100"
    assert cells in text
    assert "a GPU, driver 1.2, bfloat16, torch 2.11, Triton 3.6.0, commit c" in text


def test_run_without_a_marker_is_refused(tmp_path, capsys, monkeypatch):
    (tmp_path / "bench.csv").write_text("a\n")
    monkeypatch.setattr(publish, "RESULTS", tmp_path / "results")
    assert publish.main(["no-such-name", "--run", str(tmp_path)]) == 1
    assert "no page has the marker" in capsys.readouterr().err
