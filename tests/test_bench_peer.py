"""bench/peer.py: what the compared systems share, runs that are kept, equal seconds, and the table's differences."""

import argparse
import dataclasses
import json
import sys

import pytest

from helpers import ROOT, tg

sys.path.append(str(ROOT / "bench"))
import lab_ideas as ideas  # noqa: E402
import peer  # noqa: E402

SIZE = ideas.SIZES[0]


def options(folder):
    return argparse.Namespace(folder=folder, data=folder / "data", seeds=[1, 2, 3])


def figures(score, size=1000):
    return dict.fromkeys(peer.FIGURES, 2.0) | dict(val_bpb=score, bytes=size, steps=256)


def config_of(system, folder):
    return tg.config_from_env(peer.environment(system, SIZE, 5, options(folder)), False)[0]


def test_the_systems_differ_in_what_their_presets_decide_and_in_nothing_else(tmp_path):
    original, ours = config_of(peer.PEER, tmp_path), config_of(peer.OURS, tmp_path)
    assert original.original and not ours.original and (original.preset, ours.preset) == ("record", "frontier")
    decided = set(tg.ORIGINALS["record"]) | {
        name for name, value in tg.PRESETS["frontier"].items() if tg.PRESETS["record"].get(name) != value
    }
    length_order = {name.lower() for name in peer.strict.ORDERS["length"]} | {"phased_ttt_prefix_tokens"}
    differ = {f.name for f in dataclasses.fields(tg.Config) if getattr(original, f.name) != getattr(ours, f.name)}
    assert differ - {"preset", "original"} - length_order <= decided
    assert {"quantizer", "data_order", "normuon_beta2", "ttt_order", "hint_enabled"} <= differ
    in_rows = dataclasses.asdict(config_of(peer.IN_ROWS, tmp_path))
    assert in_rows == dataclasses.asdict(original) | dict(data_order="rows")


def test_a_finished_run_is_read_and_an_error_has_the_scripts_last_lines(tmp_path, capsys):
    folder = tmp_path / f"peer-rows-{SIZE.name}-1"
    folder.mkdir()
    summary = {key: 1.5 for key in peer.FIGURES.values()} | dict(steps=7)
    (folder / tg.SUMMARY_FILE).write_text(json.dumps(summary))
    found = peer.run_of(peer.IN_ROWS, SIZE, 1, options(tmp_path))
    assert found == dict.fromkeys(peer.FIGURES, 1.5) | dict(steps=7)
    with pytest.raises(RuntimeError, match=r"peer, 0.7M, seed 1: (?s:.*)DATA_PATH"):
        peer.run_of(peer.PEER, SIZE, 1, options(tmp_path))


@pytest.mark.parametrize(("ratios", "more"), [([1.1, 1.1, 1.1], [233]), ([0.99, 1.0, 1.01], [])])
def test_ours_gets_the_bytes_of_the_smaller_peer_and_the_steps_of_equal_seconds(monkeypatch, tmp_path, ratios, more):
    asked = []

    def run_of(system, size, seed, options, **knobs):
        asked.append((system, knobs))
        return figures(2.0, {peer.PEER: 900, peer.IN_ROWS: 800}.get(system, 700))

    monkeypatch.setattr(peer, "run_of", run_of)
    monkeypatch.setattr(peer, "ratio_of", lambda *_: ratios)
    found = peer.measure(SIZE, argparse.Namespace(seeds=[4]))
    assert asked[:3] == [(peer.PEER, {}), (peer.IN_ROWS, {}), (peer.OURS, dict(TARGET_BYTES=800))]
    assert asked[3:] == [(peer.IN_TIME, dict(TARGET_BYTES=800, ITERATIONS=steps)) for steps in more]
    assert len(found["runs"][peer.IN_TIME]) == 1


def test_differences_are_paired_and_have_their_standard_errors(tmp_path):
    scores = {peer.PEER: [2.0, 2.2, 2.4], peer.IN_ROWS: [1.9, 1.9, 1.9]}
    scores |= {system: [1.8, 1.98, 2.22] for system in (peer.OURS, peer.IN_TIME)}
    runs = {system: [figures(score) for score in column] for system, column in scores.items()}
    text = peer.report([dict(size="0.7M", ratios=[1.0, 1.1, 1.2], runs=runs)], options(tmp_path))
    # Less the peer's: -0.2, -0.22, -0.18; their standard error is 0.02 / sqrt(3), and half the interval 4.303 of them.
    assert "| 0.7M | frontier | 2.0000 ± 0.5235 |" in text and "| -0.2000 ± 0.0497, 17 standard errors |" in text
    assert "- 0.7M: 1.100 (1.000 to 1.200)" in text
    assert "| 0.7M | peer | 2.2000 ± 0.4969 |" in text


def test_a_failing_run_ends_the_command(monkeypatch, tmp_path, capsys):
    def fail(*_):
        raise RuntimeError("peer, 0.7M, seed 1: out of memory")

    monkeypatch.setattr(peer, "measure", fail)
    assert peer.main(["--folder", str(tmp_path)]) == 2
    assert "error: peer, 0.7M, seed 1: out of memory" in capsys.readouterr().err
