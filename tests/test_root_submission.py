"""The submission that this repository shows: its figures agree with its logs, and the README's table with both."""

import json
import sys

from helpers import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import check_submission  # noqa: E402


def test_the_shown_submission_has_no_disagreement(capsys):
    assert check_submission.main([str(ROOT)]) == 0
    lines = capsys.readouterr().out.splitlines()
    comparisons, disagreements = (int(word) for word in lines[-1].split()[::2][:2])
    assert comparisons > 100 and disagreements == 0


def test_it_says_what_it_was_run_on():
    s = json.loads((ROOT / "submission.json").read_text())
    assert s["seeds"] == [42, 0, 314] and set(s["seed_results"]) == {"42", "0", "314"}
    assert s["track"].startswith("non-record: 2 cores") and "built-in corpus" in s["dataset"]
    logs = sorted(path.name for path in (ROOT / "logs").glob("*_seed*"))
    assert logs == sorted(
        f"{kind}_seed{seed}.{suffix}"
        for seed in s["seeds"]
        for kind, suffix in (("train", "log"), ("metrics", "jsonl"), ("summary", "json"), ("config", "json"))
    )
