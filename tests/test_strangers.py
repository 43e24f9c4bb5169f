"""Strangers' folders: nothing of them is run without consent, nothing hangs, memory is bounded, text stays text."""

import contextlib
import json
import os
import re
import shutil
import socket
import sys
import unicodedata
from pathlib import Path

import pytest

import check_submission
import confined
import fuzz
import generate
import processes
import prove
import report
import run_submission
import runs
import strangers
import submission
from confined import Limits
from helpers import ROOT, snapshot
from strangers import MIB, UserError

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A good folder of every kind of file. Not to be changed."""
    return fuzz.good_folder(tmp_path_factory.mktemp("good") / "folder")


@pytest.fixture
def folder(good, tmp_path):
    """A copy to spoil."""
    return Path(shutil.copytree(good, tmp_path / "folder"))


def check(folder, capsys, *arguments):
    """(exit code, disagreements, notes, all that was printed)."""
    code = check_submission.main([str(folder), *map(str, arguments)])
    captured = capsys.readouterr()
    assert not captured.err
    lines = captured.out.splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    assert code in ((1,) if errors else (0, 3))
    return code, errors, [line for line in lines if line.startswith("note: ")], captured.out


@pytest.fixture
def usual(good, capsys):
    """What is found in the good folder, whose script is not the one that ran."""
    return set(check(good, capsys)[1])


# --------------------------------------------------------------------------------------------------- files of all kinds


def fifo(path, folder):
    os.mkfifo(path)


def a_socket(path, folder):
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as one, contextlib.chdir(path.parent):
        one.bind(path.name)


def a_folder(path, folder):
    path.mkdir()


def device(path, folder):
    path.symlink_to("/dev/zero")


def memory(path, folder):
    path.symlink_to("/proc/self/mem")


def link_out(path, folder):
    (folder.parent / "secret").write_text('{"a": "secret"}')
    path.symlink_to("../secret")


def link_up(path, folder):
    path.symlink_to("..")


def loop(path, folder):
    path.symlink_to(path.name)


def dangling(path, folder):
    path.symlink_to("nothing")


def huge(path, folder):
    with open(path, "wb") as file:
        file.truncate(1 << 40)  # no blocks on the disk


KINDS = {
    fifo: "is a FIFO",
    a_socket: "is a socket",
    a_folder: "is a folder",
    device: "is a link that leads out of its folder",
    memory: "is a link that leads out of its folder",
    link_out: "is a link that leads out of its folder",
    link_up: "is a link that leads out of its folder",
    loop: "cannot be read (Too many levels of symbolic links)",
    dangling: "cannot be read (No such file or directory)",
    huge: "has 1099511627776 bytes, more than the",
}
NAMES = (
    "README.md",
    "submission.json",
    "train_gpt.py",
    "train_seed0.log",
    "metrics_seed0.jsonl",
    "summary_seed0.json",
    "config_seed0.json",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_what_is_no_plain_file_is_named_and_passed_over(kind, name, folder, capsys):
    (folder / name).unlink()
    kind(folder / name, folder)
    before = snapshot(folder) if kind not in (huge, memory, device) else None
    code, errors, _, printed = check(folder, capsys)
    assert code == 1 and any(error.startswith(f"{name}: {KINDS[kind]}") for error in errors), errors
    assert "secret" not in printed and (before is None or snapshot(folder) == before)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_other_tools_do_not_wait_for_it_either(kind, folder, tmp_path, capsys):
    for name in ("run/summary.json", "run/config.json", "run/metrics.jsonl", "data/manifest.json", "proof.json"):
        (folder / name).unlink()
        kind(folder / name, folder)
    (folder / "run/model.pgolf").unlink(missing_ok=True)
    kind(folder / "run/model.pgolf", folder)
    options = generate_options(folder / "run")
    for reader in (
        lambda: submission.finished(42, folder / "run"),
        lambda: submission.manifest(folder / "data"),
        lambda: prove.read_said(folder / "run/summary.json"),
        lambda: prove.read_settings(folder / "run/config.json"),
        lambda: generate.load(options),
        lambda: report.read([str(folder / "run")]),
    ):
        with pytest.raises((UserError, prove.Refused)):
            reader()
    problems = []
    report.read([str(folder)], problems)
    assert any("run" in text for text in problems)


def generate_options(folder):
    class Options:
        artifact, tokenizer, device = folder, None, "cpu"

    return Options


def test_other_entries_are_named_and_everything_else_is_still_checked(folder, capsys, usual):
    fifo(folder / "train_seed7.log", folder)
    fifo(folder / "notes", folder)
    link_out(folder / "model_seed0.pgolf", folder)
    (folder / "logs").symlink_to("/")
    _, errors, notes, _ = check(folder, capsys)
    assert set(errors) - usual == {
        "train_seed7.log: is a FIFO",
        "model_seed0.pgolf: is a link that leads out of its folder",
        "logs: is a link that leads out of its folder",
    }
    assert "note: notes: is a FIFO" in notes


def test_an_unreadable_file_is_named(folder, capsys, monkeypatch):
    real = os.open

    def refuse(path, *more, **options):
        if str(path).endswith("summary_seed0.json"):
            raise PermissionError(13, "Permission denied")
        return real(path, *more, **options)

    monkeypatch.setattr(os, "open", refuse)
    assert "summary_seed0.json: cannot be read (Permission denied)" in check(folder, capsys)[1]


@pytest.mark.parametrize("swap", [fifo, a_folder, dangling])
def test_a_file_that_is_replaced_while_it_is_opened_is_passed_over(swap, folder, monkeypatch):
    path = folder / "README.md"
    real = os.open

    def late(name, *more, **options):
        if str(name).endswith("README.md"):
            path.unlink()
            swap(path, folder)
        return real(name, *more, **options)

    monkeypatch.setattr(os, "open", late)
    with pytest.raises(strangers.Unreadable):
        strangers.read_bytes(path, "page", folder)


def test_a_file_that_grows_while_it_is_read_ends_at_the_limit(tmp_path, monkeypatch):
    path = tmp_path / "README.md"
    path.write_text("x")
    monkeypatch.setattr(os, "read", lambda handle, count: b"x" * count)
    with pytest.raises(strangers.Unreadable, match="more than the 1048576 bytes"):
        strangers.read_bytes(path, "page")


@LINUX
def test_memory_is_bounded_whatever_the_files_hold(folder):
    """The tool reads files at their limits in half a GiB."""
    (folder / "submission.json").write_bytes(b'{"seed_results": {' + b'"1": {},' * 400_000 + b'"2": {}}}')
    (folder / "config_seed0.json").write_bytes(b"[" + b"{}," * (MIB) + b"{}]")
    (folder / "train_seed0.log").write_bytes(
        b"step:1/2 train_loss:1 train_time:1ms\n" * (16 * MIB // 37) + b"x" * 40 * MIB
    )
    (folder / "metrics_seed42.jsonl").write_bytes(b'{"step": 1, "train_loss": 1}\n' * 900_000)
    (folder / "README.md").write_bytes(b"| 1.2345 " * 100_000)
    huge(folder / "train_seed9.log", folder)
    with confined.scratch() as place:
        command = [sys.executable, str(ROOT / "tools" / "check_submission.py"), str(folder)]
        done = confined.run(command, place, Limits(600, 512 * MIB), {"PYTHONPATH": str(ROOT / "tools")})
    assert (done.ended, done.code, done.errors) == ("", 1, b"")
    assert (
        b"train_seed9.log: has 1099511627776 bytes" in done.out
        and b"submission.json: has the key '1' twice" in done.out
    )
    assert b"train_seed0.log: log: has more than 200000 lines" in done.out


def test_a_folder_of_very_many_files_is_read_in_part(folder, capsys, monkeypatch):
    monkeypatch.setattr(strangers, "ENTRIES", 30)
    for place in range(60):
        (folder / f"a{place}").touch()
    _, _, notes, _ = check(folder, capsys)
    assert any("has more than 30 entries; the rest is passed over" in note for note in notes)


def test_a_folder_of_loops_ends(folder):
    (folder / "run" / "again").symlink_to("..")
    (folder / "deep").mkdir()
    (folder / "deep" / "self").symlink_to(".")
    (folder / "deep" / "up").symlink_to("../..")
    nest = folder / "nest"
    for _ in range(30):
        nest = nest / "n"
    nest.mkdir(parents=True)
    shutil.copy(folder / "train_seed0.log", nest / "log.txt")  # deeper than is looked
    names = [run.name for run in runs.read_runs(folder)]
    assert names == ["folder/train_seed0", "folder/train_seed314", "folder/train_seed42", "run"]


# -------------------------------------------------------------------------------------------------------- what they say

RAW = {
    "deep": (b"[" * 200_000, "is not JSON (more than 32 nested values)"),
    "deep objects": (b'{"a":' * 200_000, "is not JSON (more than 32 nested values)"),
    "deep and closed": (b"[" * 500 + b"]" * 500, "is not JSON (more than 32 nested values)"),
    "a list": (b"[]", "must hold a JSON object"),
    "not UTF-8": (b'{"a": "\xff"}', "is not JSON ('utf-8' codec can't decode byte 0xff"),
    "NUL": (b"\0" * 100, "is not JSON"),
    "a byte-order mark": (b"\xef\xbb\xbf{}", "is not JSON"),
    "a key twice": (b'{"name": "a", "name": "b"}', "has the key 'name' twice"),
    "empty": (b"", "is not JSON"),
}


@pytest.mark.parametrize("name", RAW)
def test_a_json_file_of_another_form_is_one_finding(name, folder, capsys):
    content, words = RAW[name]
    (folder / "submission.json").write_bytes(content)
    _, errors, _, printed = check(folder, capsys)
    assert f"submission.json: {words}" in "\n".join(errors) and len(printed) < 20_000


def planted(folder, change, name="submission.json"):
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


FIELDS = {
    "a number of 400 digits": (lambda s: s.update(val_bpb=10**400), "val_bpb must be a finite number, and is inf"),
    "a number of 100,000 digits": (None, "val_bpb must be a finite number, and is inf"),
    "nan": (lambda s: s.update(val_bpb=float("nan")), "val_bpb must be a finite number, and is nan"),
    "a bool": (lambda s: s.update(val_bpb=True), "val_bpb must be a finite number, and is true"),
    "null": (lambda s: s.update(val_bpb=None), "val_bpb must be a finite number, and is null"),
    "a text": (lambda s: s.update(bytes_total="1"), "bytes_total must be a whole number of at least 0, and is '1'"),
    "negative": (lambda s: s.update(bytes_total=-1), "bytes_total must be a whole number of at least 0, and is -1"),
    "a list": (lambda s: s["seed_results"]["0"].update(steps=[1]), "seed_results 0: steps must be a whole number"),
    "zero bytes": (
        lambda s: s["seed_results"]["0"].update(val_bytes=0),
        "val_bytes must be a whole number of at least 1",
    ),
    "other digits": (lambda s: s["seed_results"].update({"١٢": {}}), "seed_results '١٢' is no seed"),
    "a negative seed": (lambda s: s["seed_results"].update({"-1": {}}), "seed_results '-1' is no seed"),
    "a seed of many digits": (lambda s: s["seed_results"].update({"9" * 5000: {}}), "is no seed"),
    "seed 0 again": (lambda s: s["seed_results"].update({"00": {"val_bpb": 1.0}}), "seed_results has seed 0 twice"),
    "a million rows": (
        lambda s: s.update(seed_results={str(i): {} for i in range(100_000)}),
        "seed_results has 100000 rows; those after 100 are passed over",
    ),
    "no rules": (lambda s: s["proof"].update(rules=3), "proof: rules must be a list"),
    "baseline": (lambda s: s["baseline"].update(val_bpb=[1]), "baseline: val_bpb must be an object, each a finite"),
    "significance": (lambda s: s["significance"].update(p_value="0"), "significance: p_value must be a finite number"),
    "compliance": (lambda s: s.update(compliance=[]), "compliance must be an object"),
    "a date": (lambda s: s.update(date=20260101), "date must be text, and is 20260101"),
}


@pytest.mark.parametrize("name", FIELDS)
def test_a_field_of_a_wrong_kind_is_a_finding(name, folder, capsys):
    change, words = FIELDS[name]
    if change:
        planted(folder, change)
    else:
        text = (folder / "submission.json").read_text()
        (folder / "submission.json").write_text(
            re.sub(r'"val_bpb": [\d.]+', f'"val_bpb": {"1" * 100_000}', text, count=1)
        )
    assert words in "\n".join(check(folder, capsys)[1])


@pytest.mark.parametrize(
    "line, words",
    [
        ("seed: " + "1" * 5000, "the figure 11111"),
        (f"step:{'9' * 30}/1 train_loss:1", "is impossible: step:999"),
        ("step:5/8 train_loss:1.0 train_time:-5ms", "the figure -5 is impossible"),
        (f"artifact  {'1' * 400} bytes (code 1 + model 1)", "is impossible"),
        ("seconds  train 1, x; in all 3", "is impossible"),
        ("seconds  train 1e400; in all 3", "is impossible"),
        ("total_eval_time:1" + "0" * 400 + "s", "is impossible"),
    ],
)
def test_an_impossible_figure_of_a_log_is_a_finding(line, words, folder, capsys):
    with open(folder / "train_seed0.log", "a") as file:
        file.write(line + "\n")
    assert any(e.startswith("train_seed0.log: log: the figure ") and words in e for e in check(folder, capsys)[1])


SLOW_LINES = (
    "a" * 8000,
    "a " * 4000 + "val_loss:",
    "a" + " " * 8000 + "val_loss:1",
    "step:1/2 train_loss:" + "1" * 8000 + "x",
    "1/2 train_loss" + "a/" * 4000,
    "x  " + "rank  {" * 1100 + "}x",
    "stopping_early: " + "train_time:1ms step:1 " * 350,
    "val_loader:" + "tokens: " * 1000,
    "Code size" + ":" * 8000,
    "seconds " + "; in al" * 1000,
)


def test_no_line_of_a_log_takes_long(tmp_path):
    """A hundred lines of each kind that is slow for a regular expression with two ways to match a text."""
    path = tmp_path / "a.log"
    path.write_text("".join(f"{line}\n" for line in SLOW_LINES for _ in range(100)) + "seed: 5\n")
    assert runs.read_log(path).seed == 5


def test_a_page_of_numbers_is_compared_in_time(folder, capsys):
    """A stranger's page of our kind: every number is looked for among all figures."""
    planted(folder, lambda s: s.update(extra=[i + 0.5 for i in range(100_000)]))
    (folder / "README.md").write_text(f"{check_submission.MARKER} -->\n" + "12345.678 " * 50_000)
    assert any("12345.678 is in no other file" in error for error in check(folder, capsys)[1])


def test_many_findings_are_kept_in_part(capsys):
    findings = check_submission.Findings()
    for place in range(100_000):
        findings.error(f"{place}")
    assert len(findings.errors) == check_submission.FINDINGS and findings.dropped == 100_000 - check_submission.FINDINGS


@pytest.mark.parametrize(
    "header", [dict(shape=(1 << 60,)), dict(shape=(3, 3)), dict(descr="|O"), dict(descr="<i4"), None]
)
def test_scores_of_another_form_are_refused(header, tmp_path):
    from numpy.lib import format

    path = tmp_path / "scores_a.npy"
    with open(path, "wb") as file:
        if header is None:
            file.write(b"\x93NUMPY\x09\x09")
        else:
            format.write_array_header_1_0(file, dict(dict(shape=(2,), descr="<f4", fortran_order=False), **header))
            file.write(b"\0" * 8)
    with pytest.raises(prove.Refused):
        prove.read_scores(path)


def test_no_setting_of_a_stranger_says_what_a_process_loads():
    names = ("ld_preload", "PYTHONPATH", "path", "Home", "a=b", "x\0", "matrix_lr", "tie")
    values = dict.fromkeys(names, "/evil.so") | dict(matrix_lr=0.5, tie=True)
    assert submission.as_environment(values) == dict(MATRIX_LR="0.5", TIE="1")


# ---------------------------------------------------------------------------------------------------- text stays text

HOSTILE = (
    "\x1b[2J\x1b]8;;http://evil\x07click\x1b]8;;\x07\r\b\u202e|`<script>alert(1)</script>![x](http://evil)$\\frac{$_x"
)


def shows_as_it_is(text):
    wrong = [c for c in text if c != "\n" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")]
    return not wrong


def test_what_strangers_write_is_printed_as_escapes(folder, capsys):
    planted(folder, lambda s: s.update(author=HOSTILE, track=HOSTILE + "10min", hardware=HOSTILE, seeds=[HOSTILE]))
    planted(folder, lambda s: s["seed_results"].update({HOSTILE: {}}))
    planted(folder, lambda s: s["proof"]["rules"].append(dict(rule=HOSTILE, holds=False, tried="x", found=HOSTILE)))
    planted(folder, lambda c: c.update(seed=HOSTILE), "config_seed0.json")
    shutil.copy(folder / "train_seed0.log", folder / "train\x1b[31m\n\u202e.log")
    (folder / "train_gpt.py").write_text(f'"{chr(27)}[31m" + = 3')
    _, errors, _, printed = check(folder, capsys)
    assert shows_as_it_is(printed) and "\\x1b[2J" in printed and len(errors) > 3


def test_a_users_error_is_one_line_without_control_codes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["check_submission.py", f"{tmp_path}/\x1b[31m\u202e\n"])
    assert runs.command_line(check_submission.main) == 2
    errors = capsys.readouterr().err
    assert shows_as_it_is(errors) and len(errors.splitlines()) == 1


def test_a_report_of_hostile_names_shows_them_as_they_are(folder, tmp_path, capsys):
    name = HOSTILE.replace("/", "")
    shutil.copytree(folder / "run", folder / name)
    planted(
        folder, lambda s: s.update(hardware=HOSTILE, sections=[dict(section="$x_{", bytes=5)]), f"{name}/summary.json"
    )
    planted(folder, lambda s: s.update(name=HOSTILE, objective="$y^{", variables=["$z", "LR"]), "sweep/study.json")
    planted(folder, lambda s: s["trials"][2].update(error=HOSTILE, state="\x1b[1m"), "sweep/study.json")
    out = tmp_path / "out"
    report.main(
        [f"{folder / name}", f"$\\frac{{$={folder}", str(folder / "sweep"), "--out", str(out), "--title", HOSTILE]
    )
    printed = capsys.readouterr()
    page, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    for shown in (printed.out, printed.err, page, text):
        assert shows_as_it_is(shown) and ("\\x1b" in shown or shown == printed.err)
    assert "<script" not in page and "&lt;script&gt;" in page
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count(" | ") for line in tables[:1]} == {re.sub(r"\\.", "", line).count(" | ") for line in tables[2:6]}
    body = re.sub(r"\\.", "", text)  # without what is escaped
    assert "<script" not in body and "](http" not in body and "`" not in body
    assert {p.name for p in out.iterdir()} == {f"{n}.png" for n in ("loss", "stages", "bytes", "sweep", "best")} | {
        "report.md",
        "report.html",
    }


@pytest.mark.parametrize("figure", ["nan", "1e400", "1e17", "-1e17", "0"])
def test_curves_of_any_figures_are_drawn(figure, tmp_path, capsys):
    lines = [f"step:{step}/9 train_loss:{figure} train_time:{step}ms" for step in range(4)]
    lines += [f"step:9/9 val_loss:{figure} val_bpb:{figure}", f"quantized val_loss:{figure} val_bpb:{figure}"]
    (tmp_path / "a.log").write_text("\n".join([*lines, "step:5/9 train_loss:2.0 train_time:5ms", "Code size: 0 bytes"]))
    assert report.main([str(tmp_path / "a.log"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "loss.png").is_file()


def test_generated_text_keeps_its_letters_and_loses_control_codes():
    assert strangers.without_controls("é\n\t日本 \U0001f468\u200d\U0001f469") == "é\n\t日本 \U0001f468\u200d\U0001f469"
    assert strangers.without_controls("a\x1b[31m\u202eb\x07\x9b") == "a\\x1b[31m\\u202eb\\x07\\x9b"


# --------------------------------------------------------------------------------------------------- their code, apart


@pytest.fixture
def scripted(folder, capsys):
    """Checks the folder with a script of these lines and an artifact of seed 42."""

    def run(source, *arguments):
        (folder / "train_gpt.py").write_text(source)
        (folder / "model_seed42.pgolf").write_bytes(b"x")
        _, errors, notes, _ = check(folder, capsys, *arguments)
        ignored = ("proof: ", "train_gpt.py: has", "train_gpt.py: is not the script", "model_seed42.pgolf: its bytes")
        return [error for error in errors if not error.startswith(ignored)], notes

    return run


def test_nothing_is_run_without_consent(scripted, tmp_path):
    source = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    errors, notes = scripted(source)
    assert not errors and not (tmp_path / "ran").exists()
    assert "note: script: not run without --run, so no artifact was loaded and no seed was trained again" in notes
    with pytest.raises(UserError, match="--rerun 42: .* only with --run"):
        scripted(source, "--rerun", 42)
    assert not (tmp_path / "ran").exists()
    scripted(source, "--run")
    assert (tmp_path / "ran").exists()


def test_a_script_gets_nothing_of_the_caller(scripted, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "x")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    said = tmp_path / "said"
    source = f"""
import json, os, site, sys
stdin = os.readlink("/proc/self/fd/0") if os.path.exists("/proc/self/fd/0") else "/dev/null"
open({str(said)!r}, "w").write(json.dumps([dict(os.environ), sys.path, os.getcwd(), stdin, site.ENABLE_USER_SITE]))
def load_artifact(): pass
"""
    scripted(source, "--run")
    environment, path, place, stdin, user_site = json.loads(said.read_text())
    assert set(environment) == {"PATH", "HOME", "TMPDIR", "LANG", "PYTHONSAFEPATH", "PYTHONNOUSERSITE"}
    home = Path(environment["HOME"])
    assert home.name == "home" and home.parent.name.startswith("confined.") and not home.parent.exists()
    assert Path(place) == home.parent / "work" and stdin == "/dev/null" and not user_site
    assert not {"", ".", place, str(tmp_path), str(ROOT), str(ROOT / "tools")} & set(path)


@pytest.mark.parametrize(
    "source, words",
    [
        ("print(12345)\nimport os\nos._exit(0)", "0 answers came for 1 artifacts, so none counts as loaded"),
        ("print(12345)\nimport sys\nsys.exit()", "0 answers came for 1 artifacts, so none counts as loaded"),
        ('print(\'{"artifact": "model_seed42.pgolf"}\')\nraise SystemExit', "0 answers came for 1 artifacts"),
        ("import os\nos.fork()\n", "0 answers"),
        (
            "raise ValueError('\\x1b[31m no')",
            "cannot be imported to load artifacts: ValueError: \\x1b[31m no (exit code 1)",
        ),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "(exit code -11)"),
    ],
)
def test_what_a_script_prints_is_no_answer(source, words, scripted):
    errors, notes = scripted(source + ("\ndef load_artifact(): pass" if "fork" in source else ""), "--run")
    assert len(errors) == 1 and (words in errors[0] or "fork" in source), errors
    assert not any("artifacts: loaded" in note for note in notes)


def test_a_script_without_a_loader_is_a_note(scripted):
    errors, notes = scripted("print(12345)", "--run")
    assert not errors and "note: artifacts: the script has no load_artifact, so none was loaded" in notes


@pytest.mark.parametrize(
    "line, counts",
    [
        ('{"artifact": "a", "parameters": 5, "error": null}', True),
        ('{"artifact": "a", "parameters": null, "error": "no"}', True),
        ('{"artifact": "a", "parameters": true, "error": null}', False),
        ('{"artifact": "a", "parameters": -5, "error": null}', False),
        ('{"artifact": "a", "parameters": 5.0, "error": null}', False),
        ('{"artifact": "a", "parameters": 5, "error": "no"}', False),
        ('{"artifact": "a", "parameters": 5, "error": null, "more": 1}', False),
        ('{"parameters": 5, "artifact": "a", "error": null}', False),
        ('{"artifact": "a", "artifact": "a", "parameters": 5, "error": null}', False),
        ('{"artifact": 5, "parameters": 5, "error": null}', False),
        ("12345", False),
        ("[" * 10_000, False),
    ],
)
def test_answers_are_read_strictly(line, counts):
    assert bool(run_submission.answers(f"5\nmark {line}\n".encode(), "mark")) is counts
    for other in (f"5\nmark{line}\n", f" mark {line}", f"other {line}", line):
        assert run_submission.answers(other.encode(), "mark") == []


@pytest.mark.parametrize(
    "source, words",
    [
        ("import time\ntime.sleep(1000)", "it did not end within 2 s"),
        ("while True: print('x' * 1000)", "it printed more than 1048576 bytes"),
        ("import sys\nwhile True: sys.stderr.write('x' * 1000)", "it printed more than 1048576 bytes"),
        ("import os, time\nos.close(1)\nos.close(2)\ntime.sleep(1000)", "it did not end within 2 s"),
        (
            "import signal, time\nfor n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)\ntime.sleep(1000)",
            "it did not end within 2 s",
        ),
    ],
)
def test_a_script_at_a_limit_is_one_finding(source, words, scripted):
    errors, _ = scripted(source, "--run", "--run-seconds", 2)
    assert errors == [f"train_gpt.py: was ended while it loaded artifacts: {words}"]


@LINUX
def test_a_script_of_very_many_processes_is_one_finding(scripted):
    others = set(processes.children(os.getpid()))
    errors, _ = scripted("import os, time\nfor _ in range(10): os.fork()\ntime.sleep(1000)", "--run")
    assert errors == ["train_gpt.py: was ended while it loaded artifacts: it started more than 512 processes"]
    assert set(processes.children(os.getpid())) <= others


def test_a_script_that_takes_memory_is_one_finding(scripted):
    errors, _ = scripted("x = [bytearray(b'x' * (1 << 20)) for _ in range(4000)]", "--run", "--run-memory", 256)
    assert len(errors) == 1 and ("MemoryError" in errors[0] or "MiB of memory" in errors[0]), errors


CHILDREN = """
import os, signal, sys, time
for n in (1, 2, 15): signal.signal(n, signal.SIG_IGN)
def remember():
    with open({pids!r}, "a") as file: file.write(f"{{os.getpid()}}\\n")
remember()
for new_session in (False, True):
    if os.fork() == 0:
        if new_session: os.setsid()
        if os.fork() == 0:
            remember()
            time.sleep(1000)
        os._exit(0)
while len(open({pids!r}).readlines()) < 3: time.sleep(0.01)
{last}
"""


@LINUX
@pytest.mark.parametrize(
    "last",
    [
        "os._exit(0)",
        "time.sleep(1000)",
        "os.kill(os.getppid(), signal.SIGKILL); time.sleep(1000)",
        "os.kill(os.getppid(), signal.SIGSTOP); time.sleep(1000)",
    ],
)
def test_nothing_that_a_script_started_lives_on(last, scripted, tmp_path):
    pids = tmp_path / "pids"
    others = set(processes.children(os.getpid()))
    scripted(CHILDREN.format(pids=str(pids), last=last), "--run", "--run-seconds", 3)
    started = [int(word) for word in pids.read_text().split()]
    assert len(started) == 3 and not [pid for pid in started if alive(pid)]
    assert set(processes.children(os.getpid())) <= others


def alive(pid):
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_scratch_folder_of_any_depth_is_removed():
    with confined.scratch() as place:
        inner = place
        with contextlib.chdir(place):
            for _ in range(2000):
                os.mkdir("d")
                os.chdir("d")
        (place / "closed").mkdir()
        (place / "closed" / "x").touch()
        (place / "closed").chmod(0)
    assert not inner.exists()


@pytest.mark.parametrize(
    "source, words",
    [
        ("x = " + "(" * 300 + ")" * 300, "too many nested parentheses"),
        ("x = " + "-" * 100_000 + "1", "Error"),
        ("x" + ".y" * 200_000, "Error"),
        ("\0", "null bytes"),
        ("# coding: nothing\n", "unknown encoding"),
    ],
)
def test_a_source_that_crashes_compilers_does_not_compile(source, words, scripted):
    errors, _ = scripted(source)
    assert len(errors) <= 1 and all(error.startswith("train_gpt.py: does not compile: ") for error in errors)
    assert not errors or words in errors[0] or "exit" in errors[0] or "no message" in errors[0]
