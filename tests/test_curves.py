"""eval/curves.py: what was logged is drawn, and a wrong folder is one line."""

import json
import sys

import curves
import matplotlib.image
import pytest


def write_state(folder, log) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}), encoding="utf-8")


def test_curve_takes_numbers_only():
    log = [{"step": 1, "loss": 2.0}, {"step": 2}, {"step": 3, "loss": float("nan")}, {"step": 4, "loss": 1}]
    assert curves.curve(log, "loss") == ([1, 4], [2.0, 1])


def test_a_picture_of_what_was_logged(tmp_path, monkeypatch, capsys):
    log = [{"step": i, "loss": 3.0, "objective/scores": 0.1 * i, "objective/kl": i} for i in range(1, 9)]
    log += [{"step": 8, "eval_objective/scores": 0.5, "eval_completions/mean_length": 7.0}]
    write_state(tmp_path / "run", log)
    assert curves.draw(log, tmp_path / "x.png") == ["objective/scores", "objective/kl", "completions/mean_length"]
    monkeypatch.setattr(sys, "argv", ["curves.py", str(tmp_path / "run")])
    curves.main()
    assert str(tmp_path / "run" / "curves.png") in capsys.readouterr().out
    picture = matplotlib.image.imread(tmp_path / "run" / "curves.png")
    assert picture.shape[1] > 1200 and len({tuple(pixel) for row in picture[::7, ::7] for pixel in row.tolist()}) > 3


@pytest.mark.parametrize(
    "log, expected", [(None, "expected the output folder"), ([{"step": 1}], "none of the metrics")]
)
def test_a_wrong_folder_is_one_line(tmp_path, monkeypatch, log, expected):
    if log is not None:
        write_state(tmp_path, log)
    monkeypatch.setattr(sys, "argv", ["curves.py", str(tmp_path)])
    with pytest.raises(SystemExit, match=expected):
        curves.main()
    assert not (tmp_path / "curves.png").exists()
