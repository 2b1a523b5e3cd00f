"""eval/bench: what the scripts write, on models of seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "eval" / "bench"


def run(script: str, out: Path, *flags: str) -> tuple[dict | list, str]:
    command = [sys.executable, str(BENCH / script), "--json", str(out), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(out.read_text(encoding="utf-8")), done.stdout


def test_memory_of_our_side_alone(tmp_path):
    sizes = "--vocab 512 --layers 2 --batch 2 --prompt 8 --completion 8 --updates 1 --dtype float32".split()
    figures, shown = run("memory.py", tmp_path / "out.json", "--ours_only", *sizes)
    assert figures.keys() == {"ours_mb"}
    assert 1 < figures["ours_mb"] < 1000
    assert "ours:" in shown and "1 updates" in shown


def test_planner_table(tmp_path):
    rows, shown = run(
        "planner.py", tmp_path / "out.json", "--quick", *"--batch 64 --prompt 64 --completion 64".split()
    )
    assert [(row["model"], row["trained"], row["checkpointing"]) for row in rows] == [
        ("1M", "LoRA", True),
        ("1M", "LoRA", False),
    ]
    for row in rows:
        assert row["predicted_mb"] > 200 and row["measured_mb"] > 200
        assert abs(row["predicted_mb"] / row["measured_mb"] - 1) < 0.15
    assert f"largest difference: {max(abs(row['off']) for row in rows):.1%}" in shown


def test_four_roles_are_stored_once(tmp_path):
    pytest.importorskip("bitsandbytes")
    figures, _ = run("roles.py", tmp_path / "out.json", "--shape", "1M")
    assert figures["ratio"] == pytest.approx(1, abs=1e-6)
    # Adam: two numbers for each weight of policy and value model, which are two of the four adapters
    assert figures["optimizer_mb"] == pytest.approx(figures["adapters_and_heads_mb"], rel=1e-2)
