"""The real script, from shards to a score, in seconds: the files that a run leaves, and that it can be repeated."""

import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

import processes
import train_gpt as tg
from helpers import (
    HANG_SECONDS,
    RECORD_LIKE,
    ROOT,
    SCRIPT,
    TINY,
    built_once,
    clean_environment,
    fork_script,
    free_port,
    knob_names,
    launch,
    make_documents,
    run_script,
    snapshot,
    strings,
)

SUMMARY = {
    "val_bpb_pre_quant",
    "val_bpb_quantized",
    "val_bpb_ttt",
    "val_bpb",
    "val_tokens",
    "val_bytes",
    "code_bytes",
    "model_bytes",
    "artifact_bytes",
    "parameters",
    "steps",
    "train_tokens",
    "tokens_per_second",
    "seconds",
    "peak_memory_bytes",
    "versions",
    "strictly_causal",
    "hardware",
    "evaluation_seconds",
    "evaluation_seconds_with_compilation",
    "seconds_over_limit",
}
STEP = r"step:(\d+)/\d+ train_loss:(\d+\.\d+) train_time:(\d+)ms step_avg:(\d+\.\d+)ms"
VALIDATION = r"val_loss:(\d+\.\d+) val_bpb:(\d+\.\d+)"
RUN = dict(TINY, ITERATIONS=30, VAL_LOSS_EVERY=15, TRAIN_LOG_EVERY=10, WARMUP_STEPS=1, RUN_ID="run")


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory, data):
    """The folder of one run of the script with MODE=all, shared by the tests below; its output is in out.json."""

    def build(folder):
        done = run_script(dict(RUN, DATA_PATH=data, MATRIX_LRR=1), cwd=folder)
        (folder / "out.json").write_text(json.dumps([done.returncode, done.stdout, done.stderr]))

    return built_once(tmp_path_factory, "whole_run", build)


def output(folder):
    return json.loads((folder / "out.json").read_text())


def summary_of(folder, name="summary.json"):
    return json.loads((folder / name).read_text())


def test_the_script_succeeds_and_leaves_its_files(whole_run):
    code, out, errors = output(whole_run)
    assert code == 0 and errors == "", errors
    assert {p.name for p in (whole_run / "logs" / "run").iterdir()} == {
        "log.txt",
        "metrics.jsonl",
        "config.json",
        "model.pgolf",
        "summary.json",
        "tokenizer.model",
    }
    assert (whole_run / "logs" / "run" / "log.txt").read_text() == out  # what is printed is what is logged


def test_the_summary_holds_every_field(whole_run, validation_texts, data):
    folder = whole_run / "logs" / "run"
    s = summary_of(folder)
    assert set(s) >= SUMMARY
    assert s["val_bytes"] == sum(len(t.encode()) for t in validation_texts)
    assert s["val_tokens"] == sum((p.stat().st_size - 1024) // 2 for p in data.glob("fineweb_val_*")) - 1
    assert s["model_bytes"] == (folder / "model.pgolf").stat().st_size
    assert s["artifact_bytes"] == s["code_bytes"] + s["model_bytes"] and 0 < s["code_bytes"] <= SCRIPT.stat().st_size
    assert (s["steps"], s["train_tokens"]) == (30, 30 * 768)
    assert s["parameters"] == tg.parameter_count(tg.config_from_env(strings(TINY), False)[0])
    assert s["val_bpb_ttt"] is None and s["val_bpb"] == s["val_bpb_quantized"]
    assert abs(s["val_bpb_quantized"] - s["val_bpb_pre_quant"]) < 0.02 < s["val_bpb"] < 2.5
    assert s["tokens_per_second"] > 0 and 2**20 < s["peak_memory_bytes"] < 2**36
    stages = {"data", "setup", "warmup", "train", "validate", "calibrate", "quantize", "pack", "unpack", "evaluate"}
    assert stages <= set(s["seconds"]) and all(seconds >= 0 for seconds in s["seconds"].values())
    spent = sum(s["seconds"].get(stage, 0) for stage in tg.EVALUATION_STAGES)
    assert s["evaluation_seconds"] == s["evaluation_seconds_with_compilation"] == pytest.approx(spent)  # none compiled
    assert s["versions"]["torch"] == torch.__version__ and "core" in s["hardware"]


def test_the_log_can_be_parsed_as_the_fields_scripts_do(whole_run):
    log = (whole_run / "logs" / "run" / "log.txt").read_text()
    steps = re.findall(STEP, log)
    assert {int(s[0]) for s in steps} >= {10, 20, 30}
    for step, loss, time, average in steps:
        assert 0 < float(loss) < 7 and float(time) / int(step) == pytest.approx(float(average), abs=1)
    assert float(steps[-1][1]) < float(steps[0][1]) - 1
    validations = re.findall(r"step:(\d+)/30 " + VALIDATION, log)
    assert [int(v[0]) for v in validations] == [0, 15, 30]
    assert len(re.findall(VALIDATION, log)) == 5  # these, and before and after quantization
    assert "warning: MATRIX_LRR=1 has no effect: did you mean MATRIX_LR?" in log
    assert re.search(r"peak memory \d+ MiB", log) and re.search(r"artifact +\d+ bytes \(code \d+ \+ model \d+\)", log)
    assert "eta:" in log and "2.5000 xz -9" in log


def test_metrics_are_json_lines_and_agree_with_the_summary(whole_run):
    folder = whole_run / "logs" / "run"
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    s = summary_of(folder)
    scores = {m["stage"]: m["val_bpb"] for m in metrics if "stage" in m}
    assert scores == {"pre_quant": s["val_bpb_pre_quant"], "quantized": s["val_bpb_quantized"]}
    losses = {m["step"]: m["train_loss"] for m in metrics if "train_loss" in m}
    assert losses[30] < losses[10] and all(math.isfinite(x) for x in losses.values())
    assert [m["tokens"] for m in metrics if "train_loss" in m] == [768 * step for step in losses]


def test_the_summary_says_what_each_section_of_the_artifact_takes(whole_run):
    s, (_, out, _) = summary_of(whole_run / "logs" / "run"), output(whole_run)
    rows = {row["section"]: row for row in s["sections"]}
    codes = {name: row for name, row in rows.items() if name.endswith(".codes")}
    assert {name.split(".")[0] for name in codes} == {*tg.BANKS, "embedding"} - {"kv_bank"}  # which is too small
    assert 0 < s["model_bytes"] - sum(row["bytes"] for row in rows.values()) < 2000  # prefix and header
    for name, row in codes.items():
        assert row["unpacked_bytes"] == row["elements"] and row["bits"] == (8 if name == "embedding.codes" else 6)
        assert row["packed_bits"] == 8 * row["bytes"] / row["elements"] > 0 and 0 < row["relative_error"] < 0.02
        assert row["entropy"] <= row["bits"]
        assert re.search(
            rf"^{name} +{row['elements']} +{row['bits']} +{row['entropy']:.4f} .*{row['bytes']}", out, re.M
        )


def test_the_saved_configuration_is_the_runs(whole_run):
    saved = summary_of(whole_run / "logs" / "run", "config.json")
    assert {name.lower() for name in knob_names()} == set(saved)
    for name, value in RUN.items():
        assert saved[name.lower()] == type(saved[name.lower()])(value), name


def test_the_scored_model_is_the_one_in_the_file(whole_run, data):
    """Unpacked and scored again, here: the same number."""
    s = summary_of(whole_run / "logs" / "run")
    c = tg.config_from_env(strings(dict(RUN, DATA_PATH=data)), False)[0]
    run = tg.Run(0, 1, 1, torch.device("cpu"))
    model, c = tg.load_artifact((whole_run / "logs" / "run" / "model.pgolf").read_bytes(), c, set(), run.device)
    assert tg.Evaluator(c, run)(model).bpb == s["val_bpb"]


def call(values, folder, capfd, monkeypatch, *arguments):
    """main() in this process, in a folder: exit code, output, errors."""
    monkeypatch.chdir(folder)
    capfd.readouterr()
    code = tg.main(list(arguments), strings(values))
    return code, *capfd.readouterr()


def validation_only(data, folder):
    """A data folder with what an evaluation may read."""
    folder.mkdir()
    for path in data.iterdir():
        if "train" not in path.name:
            shutil.copy(path, folder)
    return folder


def test_training_and_evaluating_apart_give_the_score_of_both_together(whole_run, data, tmp_path):
    """Two processes; the second one has no training shards and no config.json."""
    first = fork_script(dict(RUN, DATA_PATH=data), "--mode", "train", cwd=tmp_path)
    folder = tmp_path / "logs" / "run"
    assert first.returncode == 0 and "val_bpb_quantized" not in summary_of(folder)
    together = summary_of(whole_run / "logs" / "run")
    assert summary_of(folder)["val_bpb_pre_quant"] == together["val_bpb_pre_quant"]
    assert (folder / "model.pgolf").read_bytes() == (whole_run / "logs" / "run" / "model.pgolf").read_bytes()
    for path in folder.iterdir():
        if path.name != "model.pgolf":
            path.unlink()
    kept = ("PRESET", "RUN_ID", "CPU_THREADS", "DEVICE", "COMPUTE_DTYPE", "VAL_BATCH_SIZE")
    here = {name: RUN[name] for name in kept}
    shards = validation_only(data, tmp_path / "data")
    second = fork_script(dict(here, MODE="eval", DATA_PATH=shards), cwd=tmp_path)
    assert second.returncode == 0 and not second.stderr
    apart = summary_of(folder, "eval_summary.json")
    same = ("val_bpb", "val_bpb_quantized", "val_tokens", "val_bytes", "model_bytes", "artifact_bytes", "parameters")
    assert {name: apart[name] for name in same} == {name: together[name] for name in same}
    assert {p.name for p in folder.iterdir()} == {
        "model.pgolf",
        "eval_log.txt",
        "eval_metrics.jsonl",
        "eval_config.json",
        "eval_summary.json",
    }


def test_evaluation_leaves_the_trainings_files_alone(whole_run, data, tmp_path, capfd, monkeypatch):
    shutil.copytree(whole_run / "logs", tmp_path / "logs")
    before = snapshot(tmp_path)
    values = dict(RUN, MODE="eval", DATA_PATH=data)
    code, out, errors = call(values, tmp_path, capfd, monkeypatch)
    assert code == 0 and not errors and re.search(VALIDATION, out)
    after = snapshot(tmp_path)
    assert {name: after[name] for name in before} == before
    assert all("eval_" in name for name in set(after) - set(before))


def test_other_evaluation_settings_change_the_score_and_not_the_bytes(whole_run, data, tmp_path, capfd, monkeypatch):
    shutil.copytree(whole_run / "logs", tmp_path / "logs")
    plain = summary_of(tmp_path / "logs" / "run")
    code, _, _ = call(dict(RUN, MODE="eval", DATA_PATH=data, EVAL_STRIDE=4), tmp_path, capfd, monkeypatch)
    other = summary_of(tmp_path / "logs" / "run", "eval_summary.json")
    assert code == 0 and 0 < abs(other["val_bpb"] - plain["val_bpb"]) < 0.1
    assert all(other[name] == plain[name] for name in ("val_tokens", "val_bytes", "model_bytes"))


def test_a_knob_that_contradicts_the_artifact_is_refused(whole_run, data, tmp_path, capfd, monkeypatch):
    shutil.copytree(whole_run / "logs", tmp_path / "logs")
    code, out, errors = call(dict(RUN, MODE="eval", DATA_PATH=data, NUM_LAYERS=5), tmp_path, capfd, monkeypatch)
    assert code == 2 and errors == "error: NUM_LAYERS=5: the artifact was made with 3\n"


def test_a_damaged_artifact_is_refused(whole_run, data, tmp_path, capfd, monkeypatch):
    shutil.copytree(whole_run / "logs", tmp_path / "logs")
    path = tmp_path / "logs" / "run" / "model.pgolf"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    code, out, errors = call(dict(RUN, MODE="eval", DATA_PATH=data), tmp_path, capfd, monkeypatch)
    assert code == 2 and errors.startswith("error: artifact: is damaged") and len(errors.splitlines()) == 1


@pytest.mark.parametrize("mode", ["all", "eval"])
def test_an_artifact_over_the_limit_is_an_error(mode, whole_run, data, tmp_path, capfd, monkeypatch):
    if mode == "eval":
        shutil.copytree(whole_run / "logs", tmp_path / "logs")
    values = dict(RUN, ITERATIONS=2, MODE=mode, DATA_PATH=data, ARTIFACT_LIMIT_BYTES=1000)
    code, out, errors = call(values, tmp_path, capfd, monkeypatch)
    prefix = "eval_" if mode == "eval" else ""
    size = summary_of(tmp_path / "logs" / "run", prefix + "summary.json")["artifact_bytes"]
    assert code not in (0, 2) and f"{size - 1000} bytes over ARTIFACT_LIMIT_BYTES=1000" in out + errors


def test_training_alone_also_holds_its_artifact_against_the_limit(data, tmp_path, capfd, monkeypatch):
    """The artifact is finished then, and so is its size: known, in the summary, and an error where it is too much."""
    values = dict(RUN, ITERATIONS=2, MODE="train", DATA_PATH=data, ARTIFACT_LIMIT_BYTES=1000)
    code, out, errors = call(values, tmp_path, capfd, monkeypatch)
    s = summary_of(tmp_path / "logs" / "run")
    assert s["artifact_bytes"] == s["code_bytes"] + s["model_bytes"]
    assert code not in (0, 2) and f"{s['artifact_bytes'] - 1000} bytes over ARTIFACT_LIMIT_BYTES=1000" in out + errors


@pytest.mark.parametrize("log_every", [0, 1])
def test_a_run_that_diverges_ends_with_one_clear_line(log_every, data, tmp_path, capfd, monkeypatch):
    rates = dict.fromkeys(("MATRIX_LR", "SCALAR_LR", "TIED_EMBED_LR"), 1e30)
    values = dict(RUN, **rates, ITERATIONS=6, VAL_LOSS_EVERY=0, TRAIN_LOG_EVERY=log_every, DATA_PATH=data)
    code, out, errors = call(values, tmp_path, capfd, monkeypatch)
    assert code == 2 and len(errors.splitlines()) == 1 and errors.startswith("error: ") and "MATRIX_LR" in errors
    assert not (tmp_path / "logs" / "run" / "model.pgolf").exists()


def test_an_artifact_of_exactly_the_limit_is_allowed(whole_run, data, tmp_path, capfd, monkeypatch):
    shutil.copytree(whole_run / "logs", tmp_path / "logs")
    size = summary_of(tmp_path / "logs" / "run")["artifact_bytes"]
    for limit, expected in ((size, 0), (size - 1, 1)):
        values = dict(RUN, MODE="eval", DATA_PATH=data, ARTIFACT_LIMIT_BYTES=limit)
        assert call(values, tmp_path, capfd, monkeypatch)[0] == expected


def test_a_manifest_that_disagrees_stops_the_run_before_it_starts(data, tmp_path, capfd, monkeypatch):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    manifest = summary_of(folder, "manifest.json")
    manifest["splits"]["val"]["bytes"] += 1
    (folder / "manifest.json").write_text(json.dumps(manifest))
    code, out, errors = call(dict(RUN, DATA_PATH=folder), tmp_path, capfd, monkeypatch)
    assert code == 2 and "manifest.json" in errors and len(errors.splitlines()) == 1
    assert not (tmp_path / "logs").exists()


def test_the_same_seed_gives_the_same_artifact_and_another_seed_another(brief, tmp_path, capfd, monkeypatch):
    results = {}
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        values = dict(
            RECORD_LIKE, ITERATIONS=4, DATA_PATH=brief, RUN_ID=name, SEED=seed, COMPRESSOR="brotli", WARMUP_STEPS=1
        )
        code, _, errors = call(values, tmp_path, capfd, monkeypatch)
        assert code == 0 and not errors
        folder = tmp_path / "logs" / name
        results[name] = (folder / "model.pgolf").read_bytes(), summary_of(folder)["val_bpb"]
    assert results["a"] == results["b"] and results["a"][0] != results["c"][0] and results["a"][1] != results["c"][1]


def scores_in(folder, prefix=""):
    """The arrays of EVAL_SCORES in a run's folder, by stage."""
    return {p.stem.removeprefix(f"{prefix}scores_"): np.load(p) for p in folder.glob(f"{prefix}scores_*")}


def test_two_ranks_end_to_end(whole_run, data, tmp_path):
    """The same run on two processes: one log, and the score of one process."""
    done = run_script(dict(RUN, DATA_PATH=data, EVAL_SCORES=1), ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    folder = tmp_path / "logs" / "run"
    one, two = summary_of(whole_run / "logs" / "run"), summary_of(folder)
    assert "2 ranks" in two["hardware"] and two["steps"] == 30
    assert abs(one["val_bpb"] - two["val_bpb"]) < 0.03 and one["val_bytes"] == two["val_bytes"]
    log = (folder / "log.txt").read_text()
    assert len(re.findall(r"step:30/30 " + VALIDATION, log)) == 1 and len(re.findall(r"^quantized ", log, re.M)) == 1
    written = scores_in(folder)
    assert set(written) == {"pre_quant", "quantized"}  # of the stages that report a score, not of those in between
    names = {f"scores_{stage}.npy" for stage in written}
    assert {p.name for p in folder.iterdir()} == names | {p.name for p in (whole_run / "logs" / "run").iterdir()}
    for stage, nll in written.items():
        assert nll.dtype == np.float32 and nll.shape == (two["val_tokens"],)
        assert nll.sum(dtype=np.float64) / math.log(2) / two["val_bytes"] == pytest.approx(two[f"val_bpb_{stage}"])


def test_every_stage_writes_its_scores_whatever_the_ranks(whole_run, data, tmp_path):
    """MODE=eval writes files of its own; one rank and two agree up to what the rounding of their sums gives."""
    found = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks) / "logs" / "run"
        folder.mkdir(parents=True)
        shutil.copy(whole_run / "logs" / "run" / "model.pgolf", folder)
        phased = dict(TTT_MODE="phased", TTT_BASELINE=1, TTT_LORA_RANK=4, TTT_EVAL_SEQ_LEN=48)
        values = dict(RUN, **phased, MODE="eval", DATA_PATH=data, EVAL_SCORES=1, PHASED_TTT_PREFIX_DOCS=8)
        done = fork_script(values, ranks=ranks, cwd=tmp_path / str(ranks))
        assert done.returncode == 0, done.stderr[-2000:]
        assert not scores_in(folder)  # the names of a training's files
        summary, found[ranks] = summary_of(folder, "eval_summary.json"), scores_in(folder, "eval_")
        assert set(found[ranks]) == {"quantized", "ttt_baseline", "ttt"}
        for stage, nll in found[ranks].items():
            assert nll.shape == (summary["val_tokens"],)
            assert nll.sum(dtype=np.float64) / math.log(2) / summary["val_bytes"] == pytest.approx(
                summary[f"val_bpb_{stage}"]
            )
    for stage, nll in found[1].items():
        if stage != "ttt":
            assert np.array_equal(nll, found[2][stage])
        np.testing.assert_allclose(nll, found[2][stage], rtol=1e-3, atol=1e-3)


def test_two_machines_share_no_folder(data, tmp_path, capfd, monkeypatch):
    """Two launchers, each in a folder of its own, over loopback: the artifact reaches the one that did not write it."""
    values = dict(RUN, DATA_PATH=data, COMPUTE_DTYPE="float32", ITERATIONS=6)
    (tmp_path / "one").mkdir()
    assert call(values, tmp_path / "one", capfd, monkeypatch)[0] == 0
    port = free_port()
    nodes = []
    for node in (0, 1):
        (tmp_path / f"node{node}").mkdir()
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nnodes=2",
            f"--node_rank={node}",
            "--nproc_per_node=1",
            "--master_addr=127.0.0.1",
            f"--master_port={port}",
            str(SCRIPT),
        ]
        nodes.append(
            processes.start(
                command,
                env=clean_environment(values),
                cwd=tmp_path / f"node{node}",
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    for node in nodes:
        out, _ = node.communicate(timeout=HANG_SECONDS)
        assert node.returncode == 0, out[-2000:]
    one, two = (summary_of(tmp_path / name / "logs" / "run") for name in ("one", "node0"))
    assert one["val_bpb"] == pytest.approx(two["val_bpb"], abs=1e-3)
    assert not (tmp_path / "node1" / "logs").exists()


def test_two_ranks_refuse_with_one_line(data, tmp_path):
    done = run_script(dict(RUN, DATA_PATH=data, VOCAB_SIZE=300), ranks=2, cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode != 0 and len(lines) == 1 and "VOCAB_SIZE=300" in lines[0]
    assert "train_gpt.ConfigError" not in done.stderr and not (tmp_path / "logs").exists()


def test_every_compute_type_and_gate_runs_through(brief, tmp_path, capfd, monkeypatch):
    """All stages for the other switches; each gives a score of its own."""
    scores = set()
    variants = (
        dict(COMPUTE_DTYPE="float32"),
        dict(COMPUTE_DTYPE="float64"),
        dict(TIE_EMBEDDINGS=0),
        dict(ATTENTION="sdpa"),
        dict(GATED_ATTN_ENABLED=1),
        dict(ATTN_OUT_GATE_ENABLED=1),
        dict(COMPRESSOR="lzma", MATRIX_BITS=4),
        dict(NUM_LAYERS=1),
        dict(WARMDOWN_FRAC=0, WARMDOWN_ITERS=2),
        dict(EMBED_BITS=2),
    )
    for number, knobs in enumerate(variants):
        values = dict(RUN, ITERATIONS=3, VAL_LOSS_EVERY=0, DATA_PATH=brief, RUN_ID=f"v{number}")
        code, out, errors = call({**values, **knobs}, tmp_path, capfd, monkeypatch)
        assert code == 0 and not errors, (knobs, errors)
        scores.add(summary_of(tmp_path / "logs" / f"v{number}")["val_bpb"])
    assert len(scores) == len(variants)


@pytest.mark.skipif(not tg.cpu_compiler(), reason="torch.compile needs a C++ compiler and Python's headers on CPUs")
def test_a_compiled_run_scores_like_an_eager_one(data, tmp_path, capfd, monkeypatch):
    """And compiles nothing after the warmup: a graph for training, one for late QAT, which acts, one for scores."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("torch._inductor.config.cpp.vec_isa_ok", True)  # what /proc/cpuinfo says is not compiled first
    scores, losses = {}, {}
    for name, knobs in dict(
        eager={}, compiled=dict(COMPILE=1, COMPILE_CACHE=1), unrounded=dict(LATE_QAT_THRESHOLD=0)
    ).items():
        values = dict(
            RUN,
            NUM_LAYERS=1,
            ITERATIONS=12,
            VAL_LOSS_EVERY=0,
            COMPUTE_DTYPE="float32",
            DATA_PATH=data,
            COMPILE=0,
            RUN_ID=name,
            LATE_QAT_THRESHOLD=0.9,
            MATRIX_BITS=3,
            TRAIN_LOG_EVERY=1,
        )
        code, out, errors = call({**values, **knobs}, tmp_path, capfd, monkeypatch)
        assert code == 0, errors
        scores[name] = summary_of(tmp_path / "logs" / name)["val_bpb"]
        losses[name] = [float(loss) for _, loss, *_ in re.findall(STEP, out)]
        graphs = re.findall(r"^(?:warmup:.* |recompiled: )(\d+) graphs", out, re.M)
        assert graphs == (["3", "0", "0"] if name == "compiled" else ["0"])
    assert scores["compiled"] == pytest.approx(scores["eager"], abs=2e-3)
    assert losses["compiled"] == pytest.approx(losses["eager"], abs=2e-3)
    assert losses["unrounded"][:5] == losses["eager"][:5]
    assert abs(losses["unrounded"][-1] - losses["eager"][-1]) > 0.01
    check_compile_cache(tmp_path, capfd, monkeypatch, dict(DATA_PATH=data, RUN_ID="compiled"))


def check_compile_cache(tmp_path, capfd, monkeypatch, knobs):
    """A later evaluation, without torch's own cache, finds the graph of the scores in the run's folder."""
    summary = summary_of(tmp_path / "logs" / "compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "another"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    values = dict(RUN, **knobs, NUM_LAYERS=1, COMPUTE_DTYPE="float32", COMPILE=1, COMPILE_CACHE=1, MODE="eval")
    code, out, errors = call(values, tmp_path, capfd, monkeypatch)
    assert code == 0, errors
    assert int(re.search(r"^compile cache: (\d+) entries read", out, re.M)[1]) > 0
    assert torch._dynamo.utils.counters["aot_autograd"]["autograd_cache_hit"] == 1
    evaluated = json.loads((tmp_path / "logs" / "compiled" / "eval_summary.json").read_text())
    assert evaluated["val_bpb"] == summary["val_bpb"]
    assert evaluated["evaluation_seconds"] < evaluated["evaluation_seconds_with_compilation"]
    seconds = evaluated["seconds"]
    assert seconds["compile"] > 0 and "warmup" not in seconds


SMALL_POLY5 = dict(
    PRESET="poly5",
    RUN_ID="poly",
    VOCAB_SIZE=384,
    NUM_LAYERS=4,
    MODEL_DIM=32,
    NUM_HEADS=4,
    NUM_KV_HEADS=2,
    ROPE_DIMS=4,
    BIGRAM_VOCAB_SIZE=64,
    BIGRAM_DIM=8,
    VE_DIM=8,
    VE_LAYERS="2,3",
    TRAIN_SEQ_LEN=32,
    TRAIN_BATCH_TOKENS=256,
    MICRO_BATCH_TOKENS=128,
    ITERATIONS=16,
    WARMDOWN_ITERS=12,
    MAX_WALLCLOCK_SECONDS=0,
    SWA_EVERY=1,
    WARMUP_STEPS=1,
    VAL_LOSS_EVERY=0,
    VAL_BATCH_SIZE=4096,
    GPTQ_CALIBRATION_BATCHES=1,
    DEVICE="cpu",
    CPU_THREADS=1,
    COMPUTE_DTYPE="float32",
)


def test_poly5_runs_small_through_every_stage(data, tmp_path, capfd, monkeypatch):
    """All that the preset names acts: stages of depth, late QAT, both averages, residuals, chunk TTT."""
    values = dict(SMALL_POLY5, DATA_PATH=data, TTT_CHUNK_TOKENS=4000, TTT_LR=0.05, ARTIFACT_LIMIT_BYTES=10**6)
    code, out, errors = call(values, tmp_path, capfd, monkeypatch)
    assert code == 0 and not errors, errors
    s = summary_of(tmp_path / "logs" / "poly")
    for line in (
        "step:0 training layers 0-0 of 4",
        r"step:\d+ training layers 0-1 of 4",
        r"step:\d+ training layers 0-3 of 4",
        r"step:\d+ late QAT enabled: attention rounded to \d bits, MLP to \d bits",
        r"swa: [2-9] weights averaged",
        r"data stall: \d+\.\d\d% of step time",
        r"rvq:(\d+) of 25 matrices have a residual, [1-9]\d* bytes",
    ):
        assert len(re.findall(line, out)) == 1, (line, out)
    assert "not complete" not in out and "no effect" not in out
    assert s["artifact_bytes"] <= 10**6 and s["val_bpb_ttt"] < s["val_bpb_quantized"] < 3.5
    model, c = tg.load_artifact(
        (tmp_path / "logs" / "poly" / "model.pgolf").read_bytes(),
        tg.config_from_env(strings(values), False)[0],
        set(),
        torch.device("cpu"),
    )
    learned = dict(model.named_parameters())
    for name in ("bigram.table", "value_embeds.projection", "smear.weight"):
        assert learned[name].abs().max() > 1e-3, name


# ------------------------------------------------------------------------------------------------ commands of the field

# A published command for the record's script, as its authors give it.
PEERS = """SEED=42 CASEOPS_ENABLED=1 VOCAB_SIZE=8192 ITERATIONS=20000 MAX_WALLCLOCK_SECONDS=600 NEFTUNE_ALPHA=5.0
Z_LOSS_WEIGHT=1e-4 EMBED_BITS=7 MATRIX_LR=0.026 MIN_LR=0.1 MLP_CLIP_SIGMAS=11.5 ATTN_CLIP_SIGMAS=13.0
EMBED_CLIP_SIGMAS=14.0 GRAD_CLIP_NORM=0.3 WARMUP_STEPS=20 WARMDOWN_FRAC=0.85 BETA2=0.99 MUON_BACKEND_STEPS=5
SPARSE_ATTN_GATE_ENABLED=1 SPARSE_ATTN_GATE_SCALE=0.5 GATE_WINDOW=12 SMEAR_GATE_ENABLED=1 GATED_ATTN_QUANT_GATE=1
LQER_ENABLED=1 LQER_ASYM_ENABLED=1 LQER_RANK=4 LQER_FACTOR_BITS=4 LQER_ASYM_GROUP=64 LQER_TOP_K=3 FUSED_CE_ENABLED=1
COMPRESSOR=pergroup"""
SMALL_SIZES = dict(
    PRESET="record",
    VOCAB_SIZE=384,
    MODEL_DIM=32,
    NUM_HEADS=4,
    NUM_KV_HEADS=2,
    MLP_MULT=2,
    ROPE_DIMS=4,
    TRAIN_SEQ_LEN=32,
    TRAIN_BATCH_TOKENS=256,
    MICRO_BATCH_TOKENS=64,
    ITERATIONS=6,
    WARMUP_STEPS=1,
    GATE_WINDOW=12,
    GPTQ_CALIBRATION_BATCHES=1,
    VAL_LOSS_EVERY=0,
    VAL_BATCH_SIZE=1024,
    CPU_THREADS=1,
    DEVICE="cpu",
    LQER_SELECT="norm",
    RUN_ID="peers",
)


@pytest.fixture(scope="module")
def caseops_data(tmp_path_factory):
    """Shards of transformed text with their byte counts, made by data/prepare.py."""

    def build(folder):
        texts = [text.title() if number % 3 else text.upper() for number, text in enumerate(make_documents(5, 200))]
        (folder / "texts.jsonl").write_text("".join(json.dumps(dict(text=text)) + "\n" for text in texts))
        done = launch(
            ROOT / "data" / "prepare.py",
            {},
            folder / "texts.jsonl",
            "--out",
            folder / "data",
            "--caseops",
            "--vocab-size",
            384,
            "--val-fraction",
            0.2,
            "--quiet",
        )
        assert done.returncode == 0, done.stderr

    return built_once(tmp_path_factory, "caseops", build) / "data"


def test_a_published_command_runs_with_small_sizes_added(caseops_data, tmp_path):
    """Two ranks train by it; every variable of it is one of ours; the score counts the original text's bytes."""
    command = dict(word.split("=") for word in PEERS.split())
    assert set(command) <= set(knob_names())
    values = {**command, **SMALL_SIZES, "DATA_PATH": caseops_data}
    done = fork_script(values, "--mode", "train", cwd=tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    assert "has no effect" not in done.stdout + done.stderr
    for line in ("by the shards' sidecar", "lqer:", "fused_ce:1", "loops enabled: layer order ["):
        assert line in done.stdout, line
    folder = tmp_path / "logs" / "peers"
    header, _ = tg.read_header((folder / "model.pgolf").read_bytes())
    assert "pergroup" in {section.codec for section in header.sections}
    scored = fork_script({**values, "MODE": "eval"}, cwd=tmp_path)
    summary = summary_of(folder, "eval_summary.json")
    manifest = json.loads((caseops_data / "manifest.json").read_text())
    assert scored.returncode == 0, scored.stderr
    assert summary["val_bytes"] == manifest["splits"]["val"]["bytes"] and 0 < summary["val_bpb"] < 10


# The same authors' second command scores again what the first one left; neither names a run.
AGAIN = """SEED=42 CASEOPS_ENABLED=1 VOCAB_SIZE=8192 TTT_EVAL_ONLY=1 PHASED_TTT_ENABLED=1 PHASED_TTT_PREFIX_DOCS=3000
PHASED_TTT_NUM_PHASES=4 TTT_LORA_RANK=128 TTT_CHUNK_SIZE=48"""


def test_both_published_commands_run_with_small_sizes_on_a_root_of_data_sets(caseops_data, tmp_path):
    """DATA_PATH and TOKENIZER_PATH are folders of several; the size and CASEOPS_ENABLED tell which are meant."""
    marked = "sp384_lossless_caps_caseops_v1_reserved"
    sets, tokenizers = tmp_path / "data" / "datasets", tmp_path / "data" / "tokenizers"
    shutil.copytree(caseops_data, sets / f"fineweb10B_{marked}", ignore=shutil.ignore_patterns("tokenizer.model"))
    (sets / "fineweb10B_sp384").mkdir()
    (sets / "fineweb10B_sp384" / "fineweb_val_000000.bin").write_bytes(b"another one")
    tokenizers.mkdir()
    shutil.copy(caseops_data / "tokenizer.model", tokenizers / f"fineweb_{marked}_bpe.model")
    (tokenizers / "fineweb_sp384_bpe.model").write_bytes(b"another one")
    small = {name: value for name, value in SMALL_SIZES.items() if name != "RUN_ID"}
    small |= dict(
        NUM_LAYERS=4, TTT_LORA_RANK=4, TTT_CHUNK_SIZE=48, GLOBAL_TTT_CHUNK_TOKENS=2048, COMPUTE_DTYPE="float32"
    )
    small |= dict(DATA_PATH=tmp_path / "data", TOKENIZER_PATH=tokenizers)
    first = fork_script({**dict(word.split("=") for word in PEERS.split()), **small}, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    (folder,) = (tmp_path / "logs").iterdir()
    trained = summary_of(folder)
    second = fork_script({**dict(word.split("=") for word in AGAIN.split()), **small}, cwd=tmp_path)
    assert second.returncode == 0, second.stderr
    scored = summary_of(folder, "eval_summary.json")
    assert list((tmp_path / "logs").iterdir()) == [folder]  # it opened no run of its own
    assert scored["val_bpb_quantized"] == pytest.approx(trained["val_bpb_quantized"], rel=1e-6)
    assert 0 < scored["val_bpb_ttt"] != scored["val_bpb_quantized"]
    assert f"ARTIFACT_DIR=logs/{folder.name}" in second.stdout and "has no effect:" not in second.stdout
    assert f"fineweb10B_{marked}" in first.stdout and "by the shards' sidecar" in first.stdout
