"""Paired differences over subjects: by hand, and by the signed-rank test's definition."""

import json
from itertools import product
from math import nan

import pytest

comparison = pytest.importorskip("examples.protocol.results.comparison", reason="the extra train is not here")
from examples.protocol import comparison as command  # noqa: E402  # after the skip


def result(fold: int, scores: list[tuple[float, ...]], *, seed: int = 0, method: str = "a", labelled: int = 1) -> dict:
    rows = [[f"subject{i}", *row] for i, row in enumerate(scores)]
    return {"method": method, "fold": fold, "seed": seed, "M": labelled, "scores": rows}


def test_scores_are_means_over_seeds_of_means_over_classes() -> None:
    results = [
        result(0, [(0.2, 0.4), (nan, 0.8)]),
        result(0, [(0.4, 0.6), (nan, 0.6)], seed=1),
        result(1, [(0.1, nan)]),
    ]
    expected = {(0, "subject0"): 0.4, (0, "subject1"): 0.7, (1, "subject0"): 0.1}
    assert comparison.subject_scores(results) == pytest.approx(expected)


def test_volumes_of_one_subject_count_as_one() -> None:
    """Eight volumes that are all ahead, of two subjects, are no more than two subjects ahead: p = 2 / 4."""
    ours, theirs = result(0, [(0.6,)] * 4 + [(0.5,)] * 4), result(0, [(0.4,)] * 4 + [(0.2,)] * 4)
    for run in (ours, theirs):
        for number, row in enumerate(run["scores"]):
            row[0] = f"subject{number // 4}"
    d = comparison.difference([ours], [theirs])
    assert (d.dice, d.p) == (pytest.approx(0.25), 0.5)


def test_the_p_value_is_that_of_all_signs() -> None:
    """Under the null hypothesis each difference has either sign; ranks of one sign are as uneven in this share."""
    ours = [(0.5,), (0.62,), (0.7,), (0.41,), (0.9,)]
    theirs = [(0.4,), (0.6,), (0.75,), (0.2,), (0.6,)]
    d = comparison.difference(
        [result(0, ours[:3]), result(1, ours[3:])], [result(0, theirs[:3]), result(1, theirs[3:])]
    )
    assert d.dice == pytest.approx((0.1 + 0.02 - 0.05 + 0.21 + 0.3) / 5)
    assert (d.ahead, d.folds) == (2, 2)
    ranks = [3, 1, 2, 4, 5]  # of the sizes .1 .02 .05 .21 .3
    sums = [sum(r for r, s in zip(ranks, signs, strict=True) if s) for signs in product([0, 1], repeat=5)]
    ours_sum = 3 + 1 + 4 + 5
    assert d.p == pytest.approx(sum(abs(s - 7.5) >= abs(ours_sum - 7.5) for s in sums) / len(sums))


def test_only_shared_subjects_are_compared() -> None:
    ours, theirs = [result(0, [(0.5,)]), result(1, [(0.9,)])], [result(1, [(0.9,)]), result(2, [(0.1,)])]
    assert comparison.difference(ours, theirs) == comparison.Difference(0.0, 1.0, 0, 1)
    with pytest.raises(ValueError, match="share no subject: run both on the same folds"):
        comparison.difference(ours[:1], theirs[1:])


def test_the_table_names_who_is_ahead() -> None:
    scores = {"a": 0.6, "b": 0.5}
    results = [result(0, [(value,)] * 3, method=name) for name, value in scores.items()]
    lines = comparison.compare(results, "a", {"a": "Ours", "b": "Theirs"})
    assert lines[0].startswith("Ours ahead of")
    assert lines[-1] == "| Theirs | +0.100, p = 0.25, 1 of 1 |"


def test_a_file_of_results_is_compared(tmp_path, capsys) -> None:
    """Of two seeds and two folds; one method lacks a number of labelled subjects."""
    dice = {("a", 1): [0.6, 0.4, 0.8, 0.6], ("b", 1): [0.5, 0.5, 0.5, 0.5], ("a", 2): [0.9] * 4}
    results = [
        result(fold, [(value,)] * 3, seed=seed, method=method, labelled=labelled) | {"dice": value}
        for (method, labelled), values in dice.items()
        for (fold, seed), value in zip(product(range(2), repeat=2), values, strict=True)
    ]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(results))
    command.main([str(path), "--reference", "a"])
    lines = capsys.readouterr().out.splitlines()
    assert "| b | 0.500 ± 0.000 | 3 of 4 |" in lines
    assert "| a | 0.600 ± 0.141 | 0 of 4 |" in lines  # over folds, of means over seeds
    # Six subjects, of which three are level, as their seeds cancel.
    assert lines[-1].startswith("| b | +0.100, p = 0.25, 1 of 2 | ")
    assert lines[-1].endswith("|  |")
    command.main([str(path), "--reference", "a", "--labelled", "1", "--folds", "1", "--seeds", "0"])
    assert "| b | 0.500 | 1 of 1 |" in capsys.readouterr().out.splitlines()
    levels = [run | {"settings": {"levels": 3 + 2 * run["seed"]}} for run in results]
    path.write_text(json.dumps(levels))
    command.main([str(path), "--reference", "a", "--labelled", "1", "--levels", "5"])  # seed 1
    assert "| a | 0.500 ± 0.141 | 0 of 2 |" in capsys.readouterr().out.splitlines()
    with pytest.raises(ValueError, match=r"--reference must be among .* got 'c'"):
        command.main([str(path), "--reference", "c"])
