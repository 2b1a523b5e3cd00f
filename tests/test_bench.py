"""eval/bench: what the scripts write, on models of seconds."""

import json
import math
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


@pytest.mark.slow
def test_memory_of_our_side_alone(tmp_path):
    sizes = "--vocab 512 --layers 2 --batch 2 --prompt 8 --completion 8 --updates 1 --dtype float32".split()
    figures, shown = run("memory.py", tmp_path / "out.json", "--ours_only", *sizes)
    assert figures.keys() == {"ours_mb"}
    assert 1 < figures["ours_mb"] < 1000
    assert "ours:" in shown and "1 updates" in shown


@pytest.mark.slow
def test_planner_table(tmp_path):
    rows, shown = run(
        "planner.py", tmp_path / "out.json", "--quick", *"--batch 64 --prompt 64 --completion 64".split()
    )
    assert [(row["model"], row["trained"], row["checkpointing"]) for row in rows] == [
        ("1M", "LoRA", True),
        ("1M", "LoRA", False),
    ]
    for row in rows:
        assert row["predicted_mb"] > 100 and row["measured_mb"] > 100
        assert abs(row["predicted_mb"] / row["measured_mb"] - 1) < 0.15
    assert f"largest difference: {max(abs(row['off']) for row in rows):.1%}" in shown


def test_four_roles_are_stored_once(tmp_path):
    pytest.importorskip("bitsandbytes")
    figures, _ = run("roles.py", tmp_path / "out.json", "--shape", "1M")
    assert figures["ratio"] == pytest.approx(1, abs=1e-6)
    # Adam: two numbers for each weight of policy and value model, which are two of the four adapters
    assert figures["optimizer_mb"] == pytest.approx(figures["adapters_and_heads_mb"], rel=1e-2)


@pytest.mark.slow
def test_a_recipe_with_the_settings_of_a_card(tmp_path):
    (row,), shown = run("cards.py", tmp_path / "out.json", "tiny", "--stages", "sft")
    assert (row["card"], row["stage"], row["error"], row["used_gb"]) == ("tiny", "sft", "", None)  # no GPU
    assert 0.5 < row["predicted_gb"] / row["reserved_gb"] < 1.5
    assert f"{'tiny':<18} sft      {row['predicted_gb']:9.2f} {row['reserved_gb']:9.2f}         -" in shown


def test_a_reward_step_three_ways(tmp_path):
    figures, shown = run("reward_step.py", tmp_path / "out.json", "--quick")
    assert figures.keys() == {"ratio_vs_pairs", "ratio_vs_separate", "token_ratio", "seconds"}
    assert figures["token_ratio"] == 5 * 80 / (64 + 5 * 16)  # --quick sets K = 5, prompt 64 and completions 16
    assert {name: len(seconds) for name, seconds in figures["seconds"].items()} == dict(ours=3, separate=3, pairs=3)
    for name, tokens in (("ours", 144), ("separate", 400), ("pairs", 5 * 4 * 80)):
        assert f"{name:>8}  {tokens:6}  " in shown


def test_ppo_updates_with_and_without_pretraining_gradients(tmp_path):
    figures, shown = run("ppo_update.py", tmp_path / "out.json", "--quick", "--ours_only", "--updates", "2")
    assert figures.keys() == {"ours_episodes_per_s", "ours_ptx_episodes_per_s", "seconds", "parts"}
    assert figures["parts"]["ours"].keys() | {"pretraining, both"} == figures["parts"]["ours_ptx"].keys()
    for parts in figures["parts"].values():
        assert sum(parts.values()) == pytest.approx(1) and 0 < parts["rest"] < 0.5 and len(parts) >= 8
    for name in ("ours", "ours_ptx"):
        (seconds,) = figures["seconds"][name]  # the first of two is left out
        assert figures[f"{name}_episodes_per_s"] == pytest.approx(4 / seconds)
        assert f"{name:>8}  {seconds:8.2f}" in shown


@pytest.mark.slow
def test_growth_is_measured_and_drawn(tmp_path):
    rows, shown = run("scaling.py", tmp_path / "out.json", "--quick", "--png", str(tmp_path / "out.png"))
    assert [(row["step"], row["axis"], row["sizes"]) for row in rows] == [
        ("reward step", "k", [2, 4]),
        ("PPO update", "batch", [2, 4]),
    ]
    for row in rows:
        slopes = [math.log(row[name][1] / row[name][0]) / math.log(2) for name in ("seconds", "bytes")]
        assert [row["of_time"], row["of_memory"]] == pytest.approx(slopes)
        assert f"{slopes[0]:.2f} {slopes[1]:.2f}" in shown
    assert (tmp_path / "out.png").stat().st_size > 10_000
