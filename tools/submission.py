"""Makes a submission's folder from finished runs: submission.json, README.md with its tables, the script, the logs.

Every figure comes from the files of the runs. `tools/reproduce.py` calls this, and `tools/check_submission.py` compares
a folder with it.
"""

from __future__ import annotations

import datetime
import filecmp
import json
import math
import os
import re
import shlex
import shutil
import string
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import runs
import strangers
from runs import BUDGET_SECONDS, CAP_BYTES, LEVEL, MARGIN_NATS, Run, UserError
from strangers import markdown, visible

TEMPLATE = Path(__file__).with_name("submission.md")
OFFICIAL_DOCUMENTS = 50_000  # in the challenge's validation set of FineWeb
RULES = {
    "train_within_600s": "training within 600 s",
    "eval_within_600s": "evaluation within 600 s",
    "artifact_within_16000000_bytes": "artifact within 16000000 bytes, code included",
    "every_target_scored_once": "every target scored once",
    "strictly_causal": "a score depends on the artifact and earlier tokens alone, not on where the text ends",
    "no_validation_document_in_training": "no validation document in the training shards",
    "three_seeds": "three seeds",
    "record_rule": "better than the baseline by 0.005 nats at p < 0.01",
}
SIGNS = {True: "yes", False: "no", None: "not applicable"}
PROVEN = {True: "not seen broken", False: "BROKEN", None: "not tried"}
# What a proof of tools/prove.py says.
RULE = strangers.record(
    dict(rule=strangers.TEXT, holds=strangers.FLAG, tried=strangers.TEXT, found=strangers.TEXT), ("rule", "tried")
)
PROOF = dict(
    form=strangers.TEXT,
    script_sha256=strangers.TEXT,
    artifact_sha256=strangers.TEXT,
    evaluations=strangers.COUNT,
    ranks=strangers.COUNT,
    compile=strangers.TEXT,
    remarks=strangers.list_of(strangers.TEXT, 100),
    rules=strangers.list_of(RULE, 100),
)
# Settings of a run, not of a configuration; they may differ between seeds.
PRIVATE = ("seed", "run_id", "artifact_dir", "mode")


@dataclass
class Finished:
    """A seed's run and its files."""

    seed: int
    folder: Path
    run: Run
    config: dict[str, Any]


def is_setting(value: Any) -> bool:
    """Whether a value of a config.json is one that a setting may have."""
    text = isinstance(value, str) and len(value) < 10_000 and "\0" not in value
    return text or isinstance(value, bool) or strangers.is_number(value)


# Variables that say what a process loads and where it writes, which no setting of a run may be.
RESERVED = re.compile(r"LD_.*|PYTHON.*|DYLD_.*|PATH|HOME|TMPDIR|LANG|SHELL|IFS|BASH_ENV|ENV")


def as_environment(settings: dict[str, Any]) -> dict[str, str]:
    """A run's settings as the variables of its environment."""
    named = {name.upper(): v for name, v in settings.items() if re.fullmatch(r"[A-Za-z_]\w*", name, re.A)}
    return {
        name: str(int(value) if isinstance(value, bool) else value)
        for name, value in named.items()
        if value is not None and not RESERVED.fullmatch(name)
    }


def read_settings(path: Path, inside: Path | None = None) -> dict[str, Any]:
    """The settings of a config.json. Errors: UserError for one that is no number, text or bool."""
    content = strangers.read_object(path, inside)
    for name, value in content.items():
        if not is_setting(value):
            raise UserError(f"{path}: {visible(name, 40)} must be a number, a text, true or false")
    return content


def stated(f: Finished, name: str) -> Any:
    """What a run says of itself. Errors: UserError where it does not."""
    value = getattr(f.run, name)
    if value is None:
        raise UserError(f"{f.folder}: does not say its run's {name}")
    return value


def finished(seed: int, folder: Path) -> Finished:
    """Reads a run's folder. Paths of its config.json become relative to the current folder: commands name them."""
    settings = read_settings(folder / "config.json")
    for name in ("data_path", "tokenizer_path"):
        given = str(settings.get(name) or "")
        if given and not os.path.isabs(given):
            settings[name] = os.path.relpath(strangers.recorded_path(given, folder))
    return Finished(seed, folder, runs.read_runs(folder)[0], settings)


# ------------------------------------------------------------------------------------------------------- what was run


def dataset(data: Path) -> dict[str, Any]:
    """Counts of the validation shards, and their origin as their manifest states it."""
    shards = runs.validation_shards(data)
    if not shards:
        raise UserError(f"DATA_PATH={data}: holds no fineweb_val_*.bin to describe the dataset from")
    tokens = runs.shard_tokens(shards)
    documents = sum(int((np.fromfile(s, "<u2", offset=1024) == 1).sum()) for s in shards)
    sources = manifest(data).get("source")
    origin = "; ".join(map(source_words, sources)) if sources else "origin not recorded (no source in a manifest.json)"
    return dict(
        tokens=tokens,
        documents=documents,
        text=f"{data.name}: {origin}; validation set of {documents} documents, {tokens} tokens",
    )


def manifest(data: Path) -> dict[str, Any]:
    """Of a data folder's manifest.json, what is shown: `source`, and `val_bytes` of its validation text.

    Errors: UserError for a manifest of another form.
    """
    file, problems = data / "manifest.json", []
    if not strangers.is_there(file):
        return {}
    fields = dict(source=strangers.list_of(SOURCE, 1000), splits=strangers.OBJECT)
    content = strangers.checked(strangers.read_json(file, kind="study"), fields, str(file), problems)
    splits = strangers.checked(content.pop("splits", {}), dict(val=strangers.OBJECT), f"{file}: splits", problems)
    val = strangers.checked(splits.get("val", {}), dict(bytes=strangers.COUNT), f"{file}: splits.val", problems)
    if problems:
        raise UserError(problems[0])
    return content | ({"val_bytes": val["bytes"]} if "bytes" in val else {})


BUILTIN = strangers.record(dict(builtin=strangers.map_of(strangers.TEXT)), ("builtin",))
SOURCE = strangers.either(BUILTIN, strangers.either(strangers.OBJECT, strangers.TEXT))


def source_words(source: Any) -> str:
    """One source of a manifest in words."""
    if isinstance(source, dict) and isinstance(source.get("builtin"), dict):
        return "built-in corpus, the documentation of " + ", ".join(f"{n} {v}" for n, v in source["builtin"].items())
    return visible(source.get("path", source) if isinstance(source, dict) else source, 1000)


def track(results: list[Finished], data: dict[str, Any]) -> str:
    """The challenge's track where hardware, time and text are its own; otherwise what they were."""
    hardware = sorted({stated(f, "hardware") for f in results})
    longest = max(stated(f, "train_seconds") for f in results)
    if (
        all(h.startswith("8 x ") and "H100" in h for h in hardware)
        and longest < BUDGET_SECONDS + 1
        and data["documents"] == OFFICIAL_DOCUMENTS
    ):
        return "10min_16mb"
    return f"non-record: {'; '.join(hardware)}; {longest:.1f} s of training; {data['text'].split('; validation')[0]}"


def techniques(c: dict[str, Any]) -> str:
    """A description of the model and its training, from the settings alone."""
    words = [
        f"{c['num_layers']} layer{'s' if c['num_layers'] > 1 else ''} of width {c['model_dim']}, "
        f"{c['num_heads']} heads ({c['num_kv_heads']} for keys and values), MLP x{c['mlp_mult']:g}, "
        f"{c['vocab_size']} tokens, {'tied' if c['tie_embeddings'] else 'untied'} embedding"
    ]
    switches = {
        "num_loops": f"layers {c['loop_start']}-{c['loop_end']} repeated {c['num_loops']} more times",
        "xsa_last_n": f"XSA on the last {c['xsa_last_n']} layers",
        "smear_gate_enabled": "SmearGate",
        "skip_gates_enabled": "gated U-Net skips",
        "sparse_attn_gate_enabled": "sparse attention head gates",
        "gated_attn_enabled": "attention head gates",
        "attn_out_gate_enabled": "attention output gates",
        "key_offset": "partial key offset",
        "gated_xsa": "gated XSA",
        "value_residual": "value residual",
        "asym_logit_rescale": "two learned softcaps",
        "neftune_alpha": "NEFTune",
        "bigram_signs": "signed bigram embeddings",
        "prefix_loss_weight": "prefix token loss",
        "mtp_weights": "multi-token prediction",
        "normuon_beta2": "NorMuon",
        "z_loss_weight": "z-loss",
        "ema_decay": f"EMA {c['ema_decay']:g}",
    }
    words += [text for name, text in switches.items() if c.get(name)]
    words += ["parallel residual streams"] if c["parallel_start_layer"] >= 0 else []
    words += [
        f"Muon ({c['muon_coefficients']}) and AdamW",
        f"{c['quantizer']} GPTQ in {c['matrix_bits']} bits, embedding in {c['embed_bits']}",
    ]
    words += [
        text for name, text in dict(lqer_enabled="LQER", rvq_enabled="quantized residuals").items() if c.get(name)
    ]
    words += [f"{c['compressor']} compression"]
    words += [f"{c['ttt_mode']} test-time training, score first"] if c["ttt_mode"] != "none" else []
    words += ["hints from repetition, weighed by what was scored before"] if c.get("hint_enabled") else []
    return "; ".join(words) + "."


def significance(ours: list[float], theirs: list[float], nats_per_bpb: float) -> dict[str, Any]:
    """Welch's one-sided tests in nats per token: that ours is lower, and lower by the challenge's margin."""
    a, b = ([bpb * nats_per_bpb for bpb in values] for values in (ours, theirs))
    gain = sum(b) / len(b) - sum(a) / len(a)
    p_rule = runs.welch(a, b, MARGIN_NATS)
    return dict(
        test="one-sided Welch t-test of nats per token",
        margin_nats=MARGIN_NATS,
        level=LEVEL,
        gain_nats=gain,
        p_value=runs.welch(a, b),
        p_value_margin=p_rule,
        holds=None if p_rule is None else gain >= MARGIN_NATS and p_rule < LEVEL,
    )


# ------------------------------------------------------------------------------------------------------ the baseline


def baseline_figures(path: Path) -> dict[str, float]:
    """Each seed's val_bpb of a baseline: from a submission.json, its folder, or runs and logs. Errors: UserError."""
    file = path / "submission.json" if path.is_dir() else path
    if strangers.is_there(file) and file.suffix == ".json":
        return figures_of_json(file, runs.read_json(file))
    found = [(str(run.seed), run.final.bpb) for run in runs.read_runs(path) if run.final]
    figures = dict(found)
    if not found or len(figures) != len(found) or "None" in figures or not all(map(is_score, figures.values())):
        raise UserError(f"{path}: must hold scored runs of different seeds")
    return figures


def is_score(value: Any) -> bool:
    """Whether a value can be bits per byte."""
    return strangers.is_number(value) and 0 < value < 1000


def figures_of_json(file: Path, content: Any) -> dict[str, float]:
    """Each seed's val_bpb from a submission.json, or from a file {"42": val_bpb, ...}. Errors: UserError."""
    rows = content.get("seed_results", content) if isinstance(content, dict) else None
    if isinstance(rows, list):
        rows = {str(row.get("seed", place)): row for place, row in enumerate(rows) if isinstance(row, dict)}
    pairs = rows.items() if isinstance(rows, dict) else ()
    figures: dict[str, Any] = {seed: row.get("val_bpb") if isinstance(row, dict) else row for seed, row in pairs}
    if not 0 < len(figures) <= 1000 or not all(map(is_score, figures.values())):
        raise UserError(f"{file}: must hold seed_results with each seed's val_bpb")
    return {seed: float(value) for seed, value in figures.items()}


# --------------------------------------------------------------------------------------------------- submission.json


def seed_row(f: Finished, data: dict[str, Any]) -> dict[str, Any]:
    """A seed's figures."""
    run = f.run
    return dict(
        val_loss=stated(f, "final").loss,
        val_bpb=stated(f, "final").bpb,
        pre_quant_val_bpb=run.stages["pre_quant"].bpb,
        quantized_val_bpb=run.stages["quantized"].bpb,
        **runs.before_hints(run),
        artifact_bytes=run.artifact_bytes,
        steps=run.steps,
        step_avg_ms=round(stated(f, "step_avg_ms"), 3),
        train_wallclock_ms=round(1000 * stated(f, "train_seconds")),
        calibration_time_s=round(runs.calibration_seconds(run) or 0.0, 3),
        eval_time_s=round(stated(f, "eval_seconds"), 3),
        val_tokens=data["tokens"],
        target_tokens=run.targets,
        val_bytes=run.val_bytes,
        code_bytes=run.code_bytes,
        model_bytes=run.model_bytes,
        shared_documents=run.shared_documents,
        strictly_causal=run.strictly_causal,
        **(dict(resumed=run.resumed) if run.resumed else {}),  # how often the run was cut off and went on
    )


def within_limit(spent: float, last_step_ms: float) -> bool:
    """Whether seconds of training, calibration and tuning are within the limit. The last step may end after it."""
    return spent - last_step_ms / 1000 <= BUDGET_SECONDS


def over_limits(f: Finished) -> list[str]:
    """What of a seed is over the challenge's limits, a sentence for each; tools/check_submission.py finds the same.

    Calibration and tuning count as training. Its last step may end after the limit.
    """
    run, found = f.run, []
    spent = stated(f, "train_seconds") + (runs.calibration_seconds(run) or 0.0)
    if not within_limit(spent, stated(f, "step_avg_ms")):
        found.append(f"{spent:.1f} s of training, calibration and tuning are over {BUDGET_SECONDS:.0f}")
    if stated(f, "eval_seconds") > BUDGET_SECONDS:
        found.append(f"{stated(f, 'eval_seconds'):.1f} s of evaluation are over {BUDGET_SECONDS:.0f}")
    if (run.artifact_bytes or 0) > CAP_BYTES:
        found.append(f"the artifact of {run.artifact_bytes} bytes is over {CAP_BYTES}")
    return found


COMPLIANCE_NEEDS = (
    "train_wallclock_ms",
    "step_avg_ms",
    "eval_time_s",
    "artifact_bytes",
    "target_tokens",
    "val_tokens",
)


def compliance(rows: list[dict[str, Any]], test: dict[str, Any] | None) -> dict[str, bool | None]:
    """The rules that figures can verify. The last step of a training may end after the time limit, calibration may not.

    Older runs have no figure for shared documents, or do not say whether they are strictly causal.
    """
    shared, causal = ([r.get(name) for r in rows] for name in ("shared_documents", "strictly_causal"))
    return dict(
        train_within_600s=all(
            within_limit(r["train_wallclock_ms"] / 1000 + (r.get("calibration_time_s") or 0.0), r["step_avg_ms"])
            for r in rows
        ),
        eval_within_600s=all(r["eval_time_s"] <= BUDGET_SECONDS for r in rows),
        artifact_within_16000000_bytes=all(r["artifact_bytes"] <= CAP_BYTES for r in rows),
        every_target_scored_once=all(r["target_tokens"] == r["val_tokens"] - 1 for r in rows),
        strictly_causal=None if None in causal else all(causal),
        no_validation_document_in_training=None if None in shared else not any(shared),
        three_seeds=len(rows) >= 3,
        record_rule=test["holds"] if test else None,
    )


def submission(
    results: list[Finished], who: dict[str, str], data: dict[str, Any], baseline: tuple[str, dict[str, float]] | None
) -> dict[str, Any]:
    """The content of submission.json."""
    rows = {str(f.seed): seed_row(f, data) for f in results}
    bpb, loss = ([r[name] for r in rows.values()] for name in ("val_bpb", "val_loss"))
    (mean, deviation), (mean_loss, deviation_loss) = runs.mean_and_deviation(bpb), runs.mean_and_deviation(loss)
    first, run = next(iter(rows.values())), results[0].run
    per_bpb = math.log(2) * first["val_bytes"] / first["target_tokens"]
    test = theirs = None
    if baseline:
        theirs = sum(baseline[1].values()) / len(baseline[1])
        test = significance(bpb, list(baseline[1].values()), per_bpb)
    sizes = [r["artifact_bytes"] for r in rows.values()]
    newest = max((f.folder / "summary.json").stat().st_mtime for f in results)

    def together(values) -> str:
        return "; ".join(sorted({str(v) for v in values}))

    return dict(
        **who,
        date=datetime.datetime.fromtimestamp(newest, datetime.UTC).date().isoformat(),
        track=track(results, data),
        val_loss=mean_loss,
        val_bpb=mean,
        val_loss_std=deviation_loss,
        val_bpb_std=deviation,
        seeds=[f.seed for f in results],
        seed_results=rows,
        comparison_baseline_bpb=theirs,
        delta_vs_leaderboard_bpb=None if theirs is None else mean - theirs,
        delta_vs_leaderboard_nats=None if theirs is None else (mean - theirs) * per_bpb,
        baseline=dict(source=baseline[0], val_bpb=baseline[1]) if baseline else None,
        significance=test,
        artifact_bytes_mean=sum(sizes) / len(sizes),
        artifact_bytes_max=max(sizes),
        bytes_total=max(sizes),
        hardware=together(f.run.hardware for f in results),
        pytorch_version=run.versions.get("torch"),
        cuda_version=run.versions.get("cuda"),
        attention_backend=together(f.run.attention for f in results),
        dataset=data["text"],
        technique_summary=techniques(results[0].config),
        compliance=compliance(list(rows.values()), test),
    )


# --------------------------------------------------------------------------------------------------------- README.md


def seed_table(s: dict[str, Any]) -> str:
    """The per-seed table with its mean and sample deviation; a column for TTT where hints follow it."""
    hinted = all(row.get("ttt_val_bpb") is not None for row in s["seed_results"].values())
    head = [
        "Seed",
        "val_bpb",
        "val_loss",
        "pre-quant bpb",
        "quantized bpb",
        *(["TTT bpb"] if hinted else []),
        "artifact bytes",
        "steps",
        "ms/step",
        "train s",
        "eval s",
    ]
    keys = dict(
        val_bpb=".6f",
        val_loss=".6f",
        pre_quant_val_bpb=".6f",
        quantized_val_bpb=".6f",
        **(dict(ttt_val_bpb=".6f") if hinted else {}),
        artifact_bytes="d",
        steps="d",
        step_avg_ms=".2f",
    )
    rows = [
        [
            seed,
            *(format(r[k], f) for k, f in keys.items()),
            f"{r['train_wallclock_ms'] / 1000:.1f}",
            f"{r['eval_time_s']:.1f}",
        ]
        for seed, r in s["seed_results"].items()
    ]
    blank = [""] * (len(head) - 3)
    rows.append(["**mean**", f"{s['val_bpb']:.6f}", f"{s['val_loss']:.6f}", *blank])
    rows.append(["**std**", runs.shown(s["val_bpb_std"], ".6f"), runs.shown(s["val_loss_std"], ".6f"), *blank])
    resumed = {seed: row["resumed"] for seed, row in s["seed_results"].items() if row.get("resumed")}
    notes = [
        f"Seed {n} was cut off and resumed{f' {times} times' if times > 1 else ''}." for n, times in resumed.items()
    ]
    return "\n\n".join([runs.table([head, *rows], markdown=True), *notes])


def comparison(s: dict[str, Any]) -> str:
    """The paragraph that compares with the baseline."""
    if not s["baseline"]:
        return "No baseline was given."
    t, b = s["significance"], s["baseline"]
    figures = ", ".join(f"{value:.6f} (seed {seed})" for seed, value in b["val_bpb"].items())
    lines = [
        f"Baseline {b['source']}: mean val_bpb {s['comparison_baseline_bpb']:.6f}, of {figures}.",
        "",
        f"Difference {s['delta_vs_leaderboard_bpb']:+.6f} bpb, {s['delta_vs_leaderboard_nats']:+.6f} nats per "
        "token (negative is better).",
    ]
    if t["p_value"] is None:
        return "\n".join(lines + ["A test needs two seeds on both sides."])
    verdict = "holds" if t["holds"] else "does not hold"
    return "\n".join(
        lines
        + [
            f"{t['test']}: p = {t['p_value']:.3g} for better at all, p = {t['p_value_margin']:.3g} for "
            f"better by {t['margin_nats']} nats.",
            f"The challenge's rule (better by {t['margin_nats']} nats at p < {t['level']}) {verdict}.",
        ]
    )


def proof_section(s: dict[str, Any]) -> str:
    """The result of tools/prove.py as a table, with what the proof did otherwise than the run."""
    proof = s.get("proof")
    if not proof:
        return "No proof was made."
    rows = [["Rule", "Holds", "What was tried, or found"]]
    for rule in proof["rules"]:
        words = (rule.get("found") or rule["tried"]).replace("|", "/")  # of the script that was proven, in part
        rows.append([markdown(rule["rule"]), PROVEN[rule.get("holds")], markdown(words, 10_000)])
    lines = [
        f"`tools/prove.py` ran this script on the artifact of seed {markdown(s['seeds'][0])} in its "
        f"{markdown(proof['form'])} form: "
        f"{proof['evaluations']} evaluations of streams made for the purpose, with {proof['ranks']} ranks and "
        f"COMPILE={markdown(proof['compile'])}.",
        *(f"Remark: {markdown(remark)}." for remark in proof["remarks"]),
    ]
    return "\n\n".join([*lines, runs.table(rows, markdown=True)])


def settings(c: dict[str, Any], defaults: dict[str, Any]) -> list[list[str]]:
    """The settings that differ from the defaults, as name and value."""
    return [
        [f"`{name.upper()}`", markdown(value)]
        for name, value in c.items()
        if name not in PRIVATE and value != defaults.get(name, value)
    ]


def readme(
    s: dict[str, Any], config: dict[str, Any], defaults: dict[str, Any], command: str, template: Path = TEMPLATE
) -> str:
    """README.md from its template. Errors: UserError for a template with unknown placeholders."""

    def spread(value: float | None) -> str:
        return f"mean of {len(s['seeds'])} seeds, sample deviation {value:.6f}" if value is not None else "one seed"

    rules = [["Rule", "Holds"], *([RULES[name], SIGNS[v]] for name, v in s["compliance"].items())]
    values = {
        **s,
        "val_bpb": f"{s['val_bpb']:.6f}",
        "val_loss": f"{s['val_loss']:.6f}",
        "cap": CAP_BYTES,
        "spread": spread(s["val_bpb_std"]),
        "spread_loss": spread(s["val_loss_std"]),
        "command": command,
        "seed_table": seed_table(s),
        "comparison": comparison(s),
        "proof": proof_section(s),
        "rules": runs.table(rules, markdown=True),
        "settings": runs.table([["Setting", "Value"], *settings(config, defaults)], markdown=True),
    }
    try:
        return string.Template(strangers.read_text(template)).substitute(values)
    except (KeyError, ValueError) as error:
        raise UserError(f"{template}: its placeholder {error} is none of {', '.join(sorted(values))}") from None


# -------------------------------------------------------------------------------------------------------- the folder


def write_folder(
    out: Path, script: Path, results: list[Finished], s: dict[str, Any], text: str, artifacts: bool
) -> bool:
    """Writes a temporary folder and renames it. False if the same folder exists. Errors: UserError if it differs."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}."))
    try:
        os.chmod(temporary, 0o755)
        shutil.copyfile(script, temporary / "train_gpt.py")
        shutil.copyfile(runs.ROOT / "requirements.txt", temporary / "requirements.txt")
        (temporary / "submission.json").write_text(json.dumps(s, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (temporary / "README.md").write_text(text, encoding="utf-8")
        names = {
            "log.txt": "train_seed{}.log",
            "metrics.jsonl": "metrics_seed{}.jsonl",
            "summary.json": "summary_seed{}.json",
        }
        names |= {"model.pgolf": "model_seed{}.pgolf"} if artifacts else {}
        for f in results:
            for source, target in names.items():
                shutil.copyfile(f.folder / source, temporary / target.format(f.seed))
            (temporary / f"config_seed{f.seed}.json").write_text(json.dumps(f.config, indent=1) + "\n")
        if out.exists():
            if not same_folders(temporary, out):
                raise UserError(
                    f"--out {out}: already holds something else, which is not overwritten; choose another name"
                )
            return False
        os.rename(temporary, out)
        return True
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def same_folders(one: Path, other: Path) -> bool:
    """Whether two folders without subfolders hold the same files with the same bytes."""
    if not other.is_dir() or {p.name for p in one.iterdir()} != {p.name for p in other.iterdir()}:
        return False
    return not any(filecmp.cmpfiles(one, other, [p.name for p in one.iterdir()], shallow=False)[1:])


def shell_command(values: dict[str, str], ranks: int, seeds: list[int]) -> str:
    """Shell lines that run the folder's script for all seeds."""
    words = " ".join(f"{name}={shlex.quote(value)}" for name, value in values.items())
    return (
        f"for seed in {' '.join(map(str, seeds))}; do\n"
        f"    {words}{' ' if words else ''}SEED=$seed torchrun --standalone --nproc_per_node={ranks} "
        "train_gpt.py\ndone"
    )
