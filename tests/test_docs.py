"""The documentation is true: its generated parts are current, and its worked example is followed as a reader would."""

import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import train_gpt as tg
from helpers import ROOT, TINY, built_once, clean_environment, fork_script, fork_server, knob_names, launch, run_command

sys.path.insert(0, str(ROOT / "tools"))
import docs  # noqa: E402
import runs  # noqa: E402
import site_pages as site  # noqa: E402

# ---------------------------------------------------------------------------------------------------- generated parts


def test_the_generated_parts_are_current():
    done = launch(ROOT / "tools" / "docs.py", {}, "--check")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), "`make docs` writes what is stale"


def test_every_knob_has_its_row_under_its_section():
    page = (ROOT / "docs" / "knobs.md").read_text()
    rows = re.findall(r"^\| `(\w+)`", page, flags=re.M)
    assert sorted(rows) == sorted(knob_names())
    assert rows == [f.name.upper() for fields in tg.knob_sections().values() for f in fields]
    titles = re.findall(r"^## (.+)$", page, flags=re.M)
    assert titles == list(tg.KNOB_SECTIONS) and "Optimizers" in titles
    assert page.index("## Optimizers") < page.index("| `MATRIX_LR`") < page.index("## Schedules")
    cells = next(line for line in page.splitlines() if "`MATRIX_LR`" in line).strip("| ").split(" | ")
    assert cells == [
        "`MATRIX_LR`",
        "float, from 0",
        "`0.04`",
        "demo `0.02`<br>record `0.026`<br>poly5 `0.025`<br>frontier `0.026`",
        "Muon's learning rate, for attention and MLP matrices",
        "trained weights",
    ]


def test_values_are_written_as_the_environment_takes_them():
    fields = {f.name.upper(): f for f in tg.dataclasses.fields(tg.Config)}
    for name, field in fields.items():
        if field.default != "":
            assert tg.parse_value(name, field.type, docs.plain(field.default), field.metadata) == field.default
    assert docs.code("") == "empty" and docs.plain(True) == "1" and docs.plain(0.999999) == "0.999999"


@pytest.fixture
def root(tmp_path):
    """A root folder with a README.md that has a place for results, and current knobs."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "tools").mkdir()
    for name in ("docs/knobs.md", "docs/variables.md", "tools/variables.tsv"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "README.md").write_text(f"# Title\n\n{docs.BEGIN}\nold\n{docs.END}\n\nThe rest.\n")
    return tmp_path


def submission(**changes):
    rows = {
        str(seed): dict(
            val_bpb=1.5 + i / 1000,
            val_loss=3.0,
            pre_quant_val_bpb=1.6 + i / 1000,
            quantized_val_bpb=1.61 + i / 1000,
            artifact_bytes=15_000_000 + i,
            steps=800 + i,
            train_wallclock_ms=110_000 + i,
            eval_time_s=20.25 + i,
        )
        for i, seed in enumerate((42, 0, 314))
    }
    return dict(
        dict(
            seed_results=rows,
            hardware="2 cores of Some Chip, 1 rank",
            dataset="text: of 3 documents",
            date="2026-11-20",
        ),
        **changes,
    )


def test_results_are_the_submissions_figures(root):
    (root / "submission.json").write_text(json.dumps(submission()))
    text = docs.stale(root)["README.md"]
    assert text.startswith("# Title\n\n" + docs.BEGIN) and text.endswith(docs.END + "\n\nThe rest.\n")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [
        "Seed",
        "val_bpb pre-quantization",
        "quantized",
        "after TTT",
        "artifact bytes",
        "steps",
        "training s",
        "evaluation s",
    ]
    assert cells[2] == ["42", "1.6000", "1.6100", "1.5000", "15000000", "800", "110.0", "20.2"]
    assert cells[-1] == [
        "mean ± sample deviation",
        "1.6010 ± 0.0010",
        "1.6110 ± 0.0010",
        "1.5010 ± 0.0010",
        "15000001 ± 1",
        "801 ± 1",
        "110.0 ± 0.0",
        "21.2 ± 1.0",
    ]
    assert "\n\n2 cores of Some Chip, 1 rank; text: of 3 documents; 2026-11-20.\n" in text
    (root / "README.md").write_text(text)
    assert docs.stale(root) == {}


@pytest.mark.parametrize("before", [1.55, None])
def test_results_with_hints_have_a_column_for_them(root, before):
    content = submission()
    for row in content["seed_results"].values():
        row["ttt_val_bpb"] = before
    (root / "submission.json").write_text(json.dumps(content))
    lines = [line for line in docs.stale(root)["README.md"].splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0][2:-4] == ["quantized", *(["after TTT"] if before else []), "with hints"]
    assert cells[2][2:-4] == ["1.6100", *(["1.5500"] if before else []), "1.5000"]


def test_readmes_picture_shows_the_runs_of_the_submission(root):
    """A curve for each log, its mean score, and what a compressor needs for the same text."""
    for name in ("submission.json", "logs"):
        (shutil.copytree if name == "logs" else shutil.copy)(ROOT / name, root / name)
    shutil.copy(root / "logs" / "train_seed0.log", root / "logs" / "mine.log")  # a run of the user's own
    picture = docs.stale(root)["docs/demo.svg"]
    assert picture == (ROOT / "docs" / "demo.svg").read_text()
    drawing = ElementTree.fromstring(picture)
    curves = [node for node in drawing.iter() if node.get("class") == "curve"]
    places = [[tuple(map(float, place.split(","))) for place in curve.get("points").split()] for curve in curves]
    assert len(curves) == 3 and all(curve == sorted(curve) for curve in places)
    shown = json.loads((ROOT / "submission.json").read_text())
    steps = [seed["steps"] for seed in shown["seed_results"].values()]
    assert sorted(map(len, places)) == sorted(n // 100 + 1 for n in steps)  # a point every 100 steps, and the last one
    assert all(58 <= x <= 700 and 50 <= y <= 282 for curve in places for x, y in curve)
    words = [node.text for node in drawing.iter() if node.tag.endswith("text")]
    assert (
        f"score: {shown['val_bpb']:.3f}" in words
        and "xz -9: 1.873" in words
        and "prefers-color-scheme: dark" in picture
    )
    assert "(docs/demo.svg)" in (ROOT / "README.md").read_text()
    shutil.rmtree(root / "logs")
    assert "docs/demo.svg" not in docs.stale(root)


def test_without_test_time_training_its_column_is_empty_and_one_seed_has_no_deviation():
    content = submission()
    content["seed_results"] = {"42": dict(content["seed_results"]["42"], val_bpb=1.61)}
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in docs.results(content).splitlines()
        if line.startswith("|")
    ]
    assert rows[2][:4] == ["42", "1.6000", "1.6100", ""] and rows[3][1:4] == ["1.6000", "1.6100", ""]


def test_without_a_submission_the_readme_is_left_alone(root):
    assert docs.stale(root) == {}
    (root / "docs" / "knobs.md").write_text("old\n")
    assert docs.stale(root) == {"docs/knobs.md": (ROOT / "docs" / "knobs.md").read_text()}


@pytest.mark.parametrize(
    "page, content, wrong",
    [
        ("no markers", submission(), "README.md: must hold one line"),
        (f"{docs.END}\n{docs.BEGIN}\n", submission(), "README.md: must hold one line"),
        (f"{docs.BEGIN}\n{docs.BEGIN}\n{docs.END}\n", submission(), "README.md: must hold one line"),
        (None, {"seed_results": {}}, "submission.json: is not a submission.json"),
        (None, [], "submission.json: is not a submission.json"),
        (None, submission(seed_results={"42": dict(val_bpb="1.5")}), "submission.json: is not a submission.json"),
    ],
)
def test_what_cannot_be_filled_in_is_named(page, content, wrong, root):
    (root / "submission.json").write_text(json.dumps(content))
    if page is not None:
        (root / "README.md").write_text(page)
    with pytest.raises(runs.UserError, match=wrong):
        docs.stale(root)


# ----------------------------------------------------------------------------------------------------------- the pages

PAGES = sorted((ROOT / "docs").glob("*.md"))
GENERATED = ("knobs.md", "variables.md")
SOURCES = (
    "train_gpt.py",
    "golf.py",
    "tests/test_config.py",
    "tests/test_knobs.py",
    "tests/test_legality.py",
    "bench/quantize.py",
    "bench/faults/kinds.py",
    "tools/first_hour.py",
    "tools/first_hour_report.py",
    "Makefile",
    "bench/budget.py",
    "bench/cost_model.py",
    "bench/lab_ideas.py",
    "data/hub.py",
    "data/prepare.py",
    "data/published.py",
    "tools/check_submission.py",
    "tools/generate.py",
    "tools/sweep.py",
    "tools/configuration.py",
    "tools/trackers.py",
)


def test_the_site_has_every_page_and_every_file_that_one_links_to(tmp_path):
    files = {path.relative_to(ROOT) for path in site.collect(tmp_path)}
    assert {page.relative_to(ROOT) for page in PAGES} <= files and Path("README.md") in files
    assert Path("docs/architecture.svg") in files and Path("bench/results/lab.md") in files
    for page in tmp_path.rglob("*.md"):
        links = [link for _, _, link, _ in site.LINK.findall(page.read_text())]
        assert [link for link in links if not (page.parent / link).is_file()] == []
    menu = re.findall(r": ((?:docs/)?[\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.M)
    assert {Path(name) for name in menu} == {page.relative_to(ROOT) for page in PAGES} | {Path("README.md")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_files_that_a_page_names_exist(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    named = re.findall(r"\b(?:tools|bench|tests|data|docs)/[\w/]+\.(?:py|md|svg)\b", text)
    assert links + named or page.name == "credits.md"
    assert [link for link in links if not (page.parent / link).exists()] == []
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_whole(page):
    """A blank line ends a table: rows behind it are shown as text. So a table begins with its head and its rule."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.M)
    assert [table for table in tables if not re.match(r"\|.*\n\|[-:| ]+\|\n", table)] == []
    assert not re.match(r"# .*\n\n\n", page.read_text())


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in GENERATED], ids=lambda page: page.name)
def test_what_a_page_names_exists(page):
    """Words in backticks are knobs, variables of torchrun and others that the script reads, or names in the sources."""
    text, blocks = page.read_text(), "".join(re.findall(r"```.*?```", page.read_text(), flags=re.S))
    words = set(re.findall(r"`([A-Za-z_][\w.]*)(?:=[^`]*)?`", re.sub(r"```.*?```", "", text, flags=re.S)))
    known = blocks + " ".join(knob_names()) + "".join((ROOT / name).read_text() for name in SOURCES)
    assert words or page.name in ("credits.md", "code.md")
    assert sorted(w for w in words if not all(re.search(rf"\b{part}\b", known) for part in w.split("."))) == []


def commands(page):
    """The command lines of a page's sh blocks, without comments."""
    blocks = "".join(re.findall(r"^```sh\n(.*?)^```$", (ROOT / "docs" / page).read_text(), flags=re.M | re.S))
    lines = (re.sub(r"(^|\s+)#.*", "", line) for line in blocks.replace("\\\n", " ").splitlines())
    return [line for line in lines if line.strip()]


def test_the_commands_for_gpus_are_accepted(capfd):
    """Each line's settings and ranks, as a dry run: known names, allowed values, a batch that the ranks divide."""
    lines = [line for line in commands("gpus.md") if "train_gpt.py" in line]
    for line in lines:
        settings, ranks = dict(re.findall(r"([A-Z_]+)=(\S+)", line)), 1
        # This machine may have no GPU. A dry run is meant for such machines too.
        assert ("--dry-run" in line) == (settings.pop("DEVICE", "auto") != "cuda")
        for count in re.findall(r"--(?:nnodes|nproc_per_node)=(\d+)", line):
            ranks *= int(count)
        assert tg.main(["--dry-run"], {"WORLD_SIZE": str(ranks), **settings}) == 0
        out, warnings = capfd.readouterr()
        assert warnings == "" and json.loads(out)["batch_layout"]["world"] == int(settings.get("WORLD_SIZE", ranks))
    assert len(lines) == 6 and any("WORLD_SIZE" in line for line in lines)


def differences(page, preset):
    """Ours and the public script's, (knob, value) each, by the rows of a preset's table in docs/presets.md."""
    part = re.search(rf"^## `{preset}`.*?(?=^## )", page, flags=re.M | re.S)[0]
    return re.findall(r"^\| [^|]+ \| `(\w+)=(\S+)` \| `(\w+)=(\S+)` \| \S[^|]+ \|$", part, flags=re.M)


@pytest.mark.parametrize("preset", tg.ORIGINALS)
def test_the_page_of_the_presets_names_every_difference(preset):
    page = (ROOT / "docs" / "presets.md").read_text()
    rows = differences(page, preset)
    fields = {f.name: f for f in tg.dataclasses.fields(tg.Config)}
    assert [name for name, *_ in rows] == [name for *_, name, _ in rows] == [n.upper() for n in tg.ORIGINALS[preset]]
    assert len(rows) == re.search(rf"^## `{preset}`.*?(?=^## )", page, flags=re.M | re.S)[0].count("\n| ") - 1
    for name, ours, _, theirs in rows:
        f = fields[name.lower()]
        values = [tg.parse_value(name, str(f.type), text, f.metadata) for text in (ours, theirs)]
        assert values == [tg.PRESETS[preset].get(f.name, f.default), tg.ORIGINALS[preset][f.name]], name
    assert f"ORIGINAL=1 PRESET={preset}" in page and set(tg.PRESETS) <= set(re.findall(r"`(\w+)`", page))


@pytest.mark.parametrize("page", ["gpus.md", "technique.md"])
def test_make_knows_every_target_of_a_page(page):
    targets = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), flags=re.M)[1].split()
    text = "\n".join((*commands(page), *re.findall(r"`(make .*?)`", (ROOT / "docs" / page).read_text())))
    named = re.findall(r"\bmake ([a-z0-9-]+)", text)
    assert len(named) > 2 and set(named) <= {*targets}


def test_the_drawing_is_the_record_presets():
    """Layers in their order, sizes, and what the presets' settings say in words."""
    drawing = (ROOT / "docs" / "architecture.svg").read_text()
    ElementTree.fromstring(drawing)
    c = tg.config_from_env({"PRESET": "record"}, False)[0]
    visits = [int(layer) for layer in re.findall(r'class="b visit"[^>]*>layer (\d+)<', drawing)]
    assert visits == tg.execution_order(c, True)
    assert drawing.count('class="skip" marker-end') == sum(call.skip is not None for call in tg.layer_schedule(c, True))
    assert drawing.count('class="lanes"') == sum(call.parallel for call in tg.layer_schedule(c, True))
    half = c.num_layers // 2
    for words in (
        f"{tg.parameter_count(c):,} parameters: {c.num_layers} layers of width {c.model_dim}, {c.num_heads} "
        f"heads of {c.head_dim} ({c.num_kv_heads} for keys and values), {c.vocab_size} tokens",
        f"embedding {c.vocab_size} × {c.model_dim}",
        f"softcap {c.logit_softcap:g} · tanh(z/30)",
        f"{c.model_dim} → {c.kv_dim}",
        f"{c.model_dim} → {c.hidden_dim}",
        f"{c.hidden_dim} → {c.model_dim}",
        f"rotary on {c.rotary_dims} of {c.head_dim}",
        f"n[:{c.gate_window}]",
        f"{c.enable_looping_at:.0%}",
        f"q × gain, {c.qk_gain_init:g} at first",
        f"leaky_relu(·, {c.leaky_relu_slope:g})²",
        f"0–{half - 1} | {half}–{c.num_layers - 1}",
        f"layers 0–{c.parallel_start_layer - 1}, one lane",
        f"Hessians of {c.gptq_calibration_batches} batches",
        f"≤ {c.artifact_limit_bytes:,} bytes",
    ):
        assert words in drawing, words


# ---------------------------------------------------------------------------------------------- the score of each token


def test_the_example_that_reads_scores_runs(data, tmp_path):
    """The page's script, on a tiny run: its shares are of all targets, and it names documents."""
    page = (ROOT / "docs" / "evaluation.md").read_text()
    script = re.search(r"^```python\n(.*?)^```$", page, flags=re.M | re.S)[1]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "builtin_sp4096").symlink_to(data)
    for mode in ("train", "eval"):
        values = dict(TINY, DATA_PATH=data, MODE=mode, EVAL_SCORES=1, RUN_ID="demo")
        done = fork_script(values, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    done = run_command([sys.executable, "-c", script], cwd=tmp_path, env=clean_environment({}))
    assert done.returncode == 0, done.stderr
    targets = [int(n) for n in re.findall(r"^places .*: (\d+) targets", done.stdout, flags=re.M)]
    assert sum(targets) == summary(tmp_path / "logs" / "demo", "eval_")["val_tokens"]
    assert len(re.findall(r"^document \d+: ", done.stdout, flags=re.M)) == 3


# ------------------------------------------------------------------------------------------------ length of sentences


def prose_sentences(text):
    """The sentences of a page, without code blocks, tables, headings, generated results and the list of credits.

    A code span and the address of a link count as one word.
    """
    text = re.sub(r"^```.*?^```$|^<!-- results.*?^<!-- end of results -->$", "", text, flags=re.M | re.S)
    text = re.sub(r"`[^`]*`", "code", text.partition("\n## Credits\n")[0])
    text = re.sub(r"\]\([^)]*\)", "]", text)
    paragraphs = [""]
    for line in text.splitlines():
        if not line.strip() or line.startswith(("#", "|", "<!--", "![")):
            paragraphs.append("")
        elif item := re.match(r"\s*(?:[-*]|\d+\.) (.*)", line):
            paragraphs.append(item[1])
        else:
            paragraphs[-1] += " " + line.strip()
    parts = (re.split(r"(?<=[.!?])[*)]*\s+", paragraph.strip()) for paragraph in paragraphs)
    return [sentence for part in parts for sentence in part if sentence]


def word_count(sentence):
    return len(re.findall(r"\S*\w\S*", sentence))


FIRST_PAGES = [
    "README.md",
    *(f"docs/{n}.md" for n in ("getting-started", "data", "artifact", "ttt", "record", "reviewing", "results", "code")),
]


@pytest.mark.parametrize("pages", [FIRST_PAGES, ["docs/gpus.md"], ["docs/technique.md"]], ids=lambda pages: pages[0])
def test_sentences_are_short(pages):
    sentences = [s for page in pages for s in prose_sentences((ROOT / page).read_text())]
    assert [sentence for sentence in sentences if word_count(sentence) > 40] == []
    whole = [word_count(sentence) for sentence in sentences if re.search(r"[.!?:)]\W*$", sentence)]  # no list fragments
    assert len(whole) > 40
    assert sum(whole) / len(whole) <= 16


def test_sentences_are_found():
    text = (
        "# A title of words\n\nOne `code = span` here. Two\nlines, [a link](a b c)!\n\n- An item\n2. Another\n  one.\n"
    )
    blocks = "```sh\nno sentence. none\n```\n| a | row |\n<!-- results: x -->\nA result.\n<!-- end of results -->\n"
    found = prose_sentences(text + blocks + "\nThe end.\n\n## Credits\n\nA list of credits.\n")
    assert found == ["One code here.", "Two lines, [a link]!", "An item", "Another one.", "The end."]
    assert [word_count(sentence) for sentence in found] == [3, 4, 2, 2, 2]


# ------------------------------------------------------------------------------------------------- the worked example

COPIED = ("train_gpt.py", "pyproject.toml", "README.md", "bench", "data", "docs", "tests", "tools")
PAGE = (ROOT / "docs" / "technique.md").read_text()
COMMANDS = re.search(r"^```sh\n(.*?)^```$", PAGE, flags=re.M | re.S)[1]  # of the first block


def give(command, folder, environment):
    """Runs a command of the page; a script of the project's is forked from a process that has imported torch."""
    words = re.fullmatch(r"((?:\w+=\S+ )*)\.venv/bin/python (\w+/)?(\w+\.py)", command)
    if not words:
        return run_command(["bash", "-c", "set -eo pipefail\n" + command], cwd=folder, env=environment)
    values = dict(word.split("=") for word in words[1].split())
    return fork_server().run(folder / (words[2] or "") / words[3], environment | values, cwd=folder)


@pytest.fixture(scope="module")
def followed(tmp_path_factory, data):
    """A copy of the repository in which the page's first commands were given, one by one, as they stand there."""

    def build(folder):
        def ignored(where, names):
            scripts_alone = Path(where) == ROOT / "data"
            return [n for n in names if n == "__pycache__" or scripts_alone and not n.endswith(".py")]

        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name, ignore=ignored)
            else:
                shutil.copy(ROOT / name, folder / name)
        python = folder / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True)
        python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
        python.chmod(0o755)
        environment = clean_environment(dict(TINY, DATA_PATH=data, GIT_CEILING_DIRECTORIES=folder.parent))
        for name in ("GIT_DIR", "PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"):
            environment.pop(name, None)
        for command in re.split(r"\n(?!    )", COMMANDS.strip()):
            done = give(command, folder, environment)
            assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"

    return built_once(tmp_path_factory, "technique", build)


def summary(folder, prefix=""):
    return json.loads((folder / f"{prefix}summary.json").read_text())


def stored(folder):
    return tg.unpack((folder / "model.pgolf").read_bytes())[1]


def test_the_example_travels_in_the_artifact(followed):
    """What was trained is packed, and the artifact alone gives the same score again."""
    folder = followed / "logs" / "bias"
    assert summary(folder, "eval_")["val_bpb"] == summary(folder)["val_bpb_quantized"]
    bias = stored(folder)["unigram_bias"]
    assert list(bias.codes.shape) == [TINY["VOCAB_SIZE"]] and bias.codes.any()
    assert summary(folder)["val_bpb"] != summary(followed / "logs" / "plain")["val_bpb"]
    assert summary(folder)["parameters"] == summary(followed / "logs" / "plain")["parameters"] + TINY["VOCAB_SIZE"]


def test_switched_off_the_example_leaves_every_bit_as_it_was(followed, data, tmp_path):
    done = fork_script(dict(TINY, DATA_PATH=data, RUN_ID="before"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    before, after = tmp_path / "logs" / "before", followed / "logs" / "plain"
    losses = [
        [
            row["train_loss"]
            for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
            if "train_loss" in row
        ]
        for folder in (before, after)
    ]
    assert losses[0] == losses[1] and len(losses[0]) > 3
    for name in ("parameters", "val_bpb_pre_quant", "val_bpb"):
        assert summary(before)[name] == summary(after)[name]
    one, other = stored(before), stored(after)
    assert list(one) == list(other)
    assert all(torch.equal(one[name].codes, other[name].codes) for name in one)


def test_the_example_is_in_the_documentation_afterwards(followed):
    assert "| `UNIGRAM_BIAS_ENABLED`† | 0 or 1 | `0` |" in (followed / "docs" / "knobs.md").read_text()
    assert "UNIGRAM_BIAS" not in (ROOT / "docs" / "knobs.md").read_text()


def test_a_diff_that_does_not_fit_is_refused(followed):
    """The page's first command is strict: a second time, its lines are no longer those of before."""
    first = next(line for line in COMMANDS.splitlines() if "git apply" in line)
    before = (followed / "train_gpt.py").read_bytes()
    environment = dict(os.environ, GIT_CEILING_DIRECTORIES=str(followed.parent))
    done = run_command(["bash", "-c", "set -o pipefail\n" + first], cwd=followed, env=environment)
    assert done.returncode and "does not apply" in done.stderr
    assert (followed / "train_gpt.py").read_bytes() == before
