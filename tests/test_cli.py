"""The command line as a user meets it: results on standard output, two lines when it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moescope import cli
from moescope.errors import ExitCode
from tests.tiny import tiny_checkpoint

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_checkpoint("olmoe", tmp_path_factory.mktemp("cli")))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.run(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def check_error(code: int, out: str, err: str, expected: ExitCode, *words: str) -> None:
    """One line, one `Try:` line at most, nothing on standard output, no control byte, no stack."""
    assert code == expected, err
    assert out == ""
    lines = err.splitlines()
    assert lines[0].startswith("moescope: ") and len(lines) <= 2
    assert len(lines) == 1 or lines[1].startswith("Try: ")
    assert "Traceback" not in err and err.replace("\n", "").isprintable()
    for word in words:
        assert word in err


class TestGenerate:
    def test_json_holds_what_the_design_promises(self, capsys, model) -> None:
        code, out, _ = run(
            capsys, "generate", model, "--prompt", "Hi", "--max-new-tokens", "5", "--json"
        )
        document = json.loads(out)
        assert code == 0
        assert out.isascii() and out.count("\n") == 1
        assert document["prompt_ids"] == [72, 105]
        assert len(document["token_ids"]) == 5
        assert set(document) >= {"text", "timings", "variant", "finish_reason", "schema"}

    def test_prompt_forms_agree(self, capsys, model, monkeypatch) -> None:
        import io

        common = ("--max-new-tokens", "4", "--json")
        documents = [json.loads(run(capsys, "generate", model, "--prompt", "Hi", *common)[1])]
        ids = run(capsys, "generate", model, "--prompt-ids", "72,105", *common)[1]
        documents.append(json.loads(ids))
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hi"))
        documents.append(json.loads(run(capsys, "generate", model, "--prompt", "-", *common)[1]))
        assert len({tuple(document["token_ids"]) for document in documents}) == 1

    def test_chat_applies_the_template(self, capsys, model, tmp_path) -> None:
        file = tmp_path / "messages.json"
        file.write_text('[{"role": "user", "content": "Hi"}]')
        common = ("--max-new-tokens", "2", "--json")
        chat = json.loads(run(capsys, "generate", model, "--chat", "--prompt", "Hi", *common)[1])
        filed = json.loads(run(capsys, "generate", model, "--messages", str(file), *common)[1])
        assert chat["prompt_ids"] == filed["prompt_ids"]
        assert len(chat["prompt_ids"]) > 2

    def test_text_holds_no_control_byte(self, capsys, model) -> None:
        code, out, _ = run(capsys, "generate", model, "--prompt", "Hi", "--max-new-tokens", "40")
        assert code == 0
        assert out.replace("\n", "").isprintable()

    def test_a_seed_repeats(self, capsys, model) -> None:
        options = ("--temperature", "1.5", "--max-new-tokens", "12", "--json")
        texts = [
            json.loads(
                run(capsys, "generate", model, "--prompt", "Hi", "--seed", seed, *options)[1]
            )["token_ids"]
            for seed in ("7", "7", "8")
        ]
        assert texts[0] == texts[1] != texts[2]


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "code", "words"),
        [
            (("generate", "no/such/folder", "--prompt", "x"), ExitCode.CHECKPOINT, "no/such"),
            (("inspect", "/dev/null"), ExitCode.CHECKPOINT, "null"),
            (("convert", "no.moetrace", "x.csv"), ExitCode.TRACE, "no.moetrace"),
            (("variants", "no/such\x1b]0;t\x07"), ExitCode.CHECKPOINT, "no/such"),
        ],
    )
    def test_wrong_paths(self, capsys, arguments, code, words) -> None:
        check_error(*run(capsys, *arguments), code, words)

    @pytest.mark.parametrize(
        ("extra", "word"),
        [
            ((), "no prompt"),
            (("--prompt", "a", "--prompt-ids", "1"), "--prompt-ids"),
            (("--prompt-ids", "1,x"), "--prompt-ids"),
            (("--prompt-ids", "999999"), "999999"),
            (("--prompt", "x", "--variant", "softmax_over_selectd"), "softmax_over_selectd"),
            (("--prompt", "x", "--variant", "num_experts_per_tok=99"), "num_experts_per_tok"),
            (("--messages", "absent.json"), "absent.json"),
        ],
    )
    def test_usage(self, capsys, model, extra, word) -> None:
        check_error(*run(capsys, "generate", model, *extra), ExitCode.USAGE, word)

    @pytest.mark.parametrize("value", ["nan", "-1", "inf", "x"])
    def test_numbers_are_checked(self, capsys, model, value) -> None:
        arguments = ("generate", model, "--prompt", "x", f"--temperature={value}")
        check_error(*run(capsys, *arguments), ExitCode.USAGE, "--temperature", "0 to 1e+06")

    def test_an_unknown_option_is_two_lines(self, capsys) -> None:
        check_error(*run(capsys, "doctor", "--no-such"), ExitCode.USAGE, "--no-such")

    def test_nothing_is_written_over_a_file(self, capsys, model, tmp_path) -> None:
        target = tmp_path / "kept"
        target.write_text("mine")
        arguments = ("trace", model, "--prompt", "x", "--max-new-tokens", "1", "-o", str(target))
        check_error(*run(capsys, *arguments), ExitCode.OUTPUT, "kept")
        assert target.read_text() == "mine"

    def test_a_bug_of_ours_is_a_report_not_a_stack(self, capsys, monkeypatch, tmp_path) -> None:
        monkeypatch.setenv("MOESCOPE_STATE", str(tmp_path))

        def broken(*_: object) -> None:
            raise ZeroDivisionError("sec" + "ret")

        monkeypatch.setattr(cli, "_dispatch", broken)
        check_error(*run(capsys, "doctor"), ExitCode.BUG, "ZeroDivisionError")
        (report,) = (tmp_path / "reports").iterdir()
        assert "broken" in report.read_text()
        assert "secret" not in report.read_text()
        assert report.stat().st_mode & 0o777 == 0o600


class TestTraces:
    def test_shadow_variants_are_summed_up(self, capsys, model, tmp_path) -> None:
        path = tmp_path / "a.moetrace"
        options = ("--prompt", "Hi", "--max-new-tokens", "4", "-o", str(path), "--json")
        shadows = ("--shadow", "softmax_over_selected", "--shadow", "num_experts_per_tok=1")
        code, out, err = run(capsys, "trace", model, *options, *shadows)
        found = json.loads(out)["shadows"]
        assert code == 0 and "softmax_over_selected: the same experts in 100.0% of 24" in err
        assert found["softmax_over_selected"]["same_experts"] == 1.0
        assert found["softmax_over_selected"]["mean_score_sum"] == pytest.approx(1.0)
        fewer = found["num_experts_per_tok=1"]
        assert (fewer["same_experts"], fewer["common_picks"]) == (0.0, 1.0)
        assert "num_experts_per_tok=1: 100.0% of the picks in common (24 decisions)" in err

    def test_a_command_that_fails_at_once_leaves_no_file(self, capsys, model, tmp_path) -> None:
        path = tmp_path / "a.moetrace"
        options = ("--prompt", "Hi", "--max-new-tokens", "1", "-o", str(path))
        code, _, err = run(capsys, "trace", model, *options, "--shadow", "top_k_of_nothing")
        assert code == 2 and "top_k_of_nothing" in err and list(tmp_path.iterdir()) == []
        assert run(capsys, "trace", model, *options)[0] == 0

    def test_trace_convert_and_back(self, capsys, model, tmp_path) -> None:
        first, table, again = (tmp_path / name for name in ("a.moetrace", "a.jsonl", "b.moetrace"))
        arguments = ("--prompt", "Hi", "--max-new-tokens", "6", "--json", "-o", str(first))
        code, out, _ = run(capsys, "trace", model, *arguments)
        assert code == 0
        assert run(capsys, "convert", str(first), str(table))[0] == 0
        assert run(capsys, "convert", str(table), str(again))[0] == 0
        from moescope.trace.store import TraceReader

        with TraceReader.open(first) as a, TraceReader.open(again) as b:
            assert a.count == b.count == 2 + 6
            written = json.loads(out)
            ids = written["prompt_ids"] + written["token_ids"]
            assert [frame.token_id for frame in a.frames()] == ids
            for one, other in zip(a.frames(), b.frames(), strict=True):
                assert (one.expert_ids == other.expert_ids).all()
                assert (one.weights == other.weights).all()

    def test_compare_names_the_first_divergence(self, capsys, model) -> None:
        code, out, _ = run(
            capsys,
            *("compare", model, "--variant", "trained", "--variant", "softmax_over_selected"),
            *("--prompt", "Hello there", "--max-new-tokens", "24", "--json"),
        )
        document = json.loads(out)
        assert code == 0
        (found,) = document["comparisons"]
        assert found["first_divergence"]["layer"] >= 1, "the first router sees the same input"
        assert found["same_ids"]["all"]["score_sum_b"] == pytest.approx(1.0, abs=1e-5)
        assert found["same_ids"]["all"]["score_sum_a"] < 0.99

    def test_variants_and_inspect_answer_in_json(self, capsys, model) -> None:
        listed = json.loads(run(capsys, "variants", model, "--json")[1])["variants"]
        by_name = {row["name"]: row for row in listed}
        assert by_name["trained"]["equal"]
        assert by_name["softmax_over_selected"]["applies"]
        facts = json.loads(run(capsys, "inspect", model, "--json")[1])
        assert facts["num_experts"] == 8
        assert facts["parameters"] > facts["active_parameters"] > 0

    def test_inspect_needs_only_a_config(self, capsys, model, tmp_path) -> None:
        (tmp_path / "config.json").write_bytes((Path(model) / "config.json").read_bytes())
        facts = json.loads(run(capsys, "inspect", str(tmp_path), "--json")[1])
        assert facts["weights_bytes"] is None and facts["num_experts_per_tok"] == 3

    def test_doctor(self, capsys) -> None:
        facts = json.loads(run(capsys, "doctor", "--json")[1])
        assert facts["packages"]["textual"] == "8.2.8"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "moescope", *arguments]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_output_that_takes_no_more_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command("variants"), stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
    assert done.returncode == ExitCode.OUTPUT
    assert done.stderr == "moescope: output: no space left on device\n"


def test_a_recording_that_stopped_is_an_exit_code(capsys, model, tmp_path, monkeypatch) -> None:
    from moescope.errors import MoescopeError
    from moescope.trace.store import TraceWriter

    def full(*_: object) -> None:
        raise MoescopeError("run.moetrace: disk full", code=ExitCode.OUTPUT)

    monkeypatch.setattr(TraceWriter, "extend", full)
    for verb in (("trace",), ("compare", "--variant", "softmax_over_selected")):
        options = ("--prompt", "Hi", "--max-new-tokens", "3", "-o", str(tmp_path / verb[0]))
        code, out, err = run(capsys, verb[0], model, *verb[1:], *options)
        assert code == ExitCode.OUTPUT and "run.moetrace: disk full" in err
        assert out.strip(), "the text is written all the same"


def test_a_full_context_is_told(capsys, model) -> None:
    options = ("--prompt", "Hi", "--max-context", "6", "--variant", "logits_bf16")
    assert "the context is full" in run(capsys, "compare", model, *options)[1]
    assert "the context is full" in run(capsys, "generate", model, *options)[2]


@pytest.mark.parametrize("arguments", [(), ("replay",), ("demo",)])
def test_without_a_terminal_there_is_no_screen(capsys, monkeypatch, arguments) -> None:
    monkeypatch.delenv("TEXTUAL_DRIVER", raising=False)
    check_error(*run(capsys, *arguments), ExitCode.USAGE, "the screen needs a terminal")


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("generat", ExitCode.USAGE, ("there is no such command", "Try: moescope generate")),
        ("no/such/folder", ExitCode.CHECKPOINT, ("no such file or folder",)),
        ("no-such-org/name", ExitCode.CHECKPOINT, ("not in the Hub cache", "hf download")),
    ],
)
def test_a_word_that_names_nothing_is_told_before_the_terminal(capsys, name, code, words) -> None:
    check_error(*run(capsys, name), code, *words)


def test_a_closed_output_is_told_by_what_only_prints(capsys, monkeypatch, model, tmp_path) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    assert cli.run(["variants"]) == ExitCode.OUTPUT
    monkeypatch.setattr(sys, "stdout", None)
    path = tmp_path / "a.moetrace"
    options = ("--prompt", "Hi", "--max-new-tokens", "1", "-o", str(path))
    assert cli.run(["trace", model, *options]) == 0 and path.stat().st_size
    sys.stdout.close()
    assert "standard output is closed" in capsys.readouterr().err


def test_ctrl_c_is_ignored_once_everything_is_written() -> None:
    script = (
        "import signal, sys; from moescope import supervisor; "
        "code = supervisor.main(['variants']); signal.raise_signal(signal.SIGINT); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=ROOT, text=True)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout


def test_a_closed_pipe_ends_quietly(model) -> None:
    line = " ".join(command("variants", model)) + " | head -1"
    done = subprocess.run(
        line, shell=True, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False
    )
    assert done.stderr == ""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_commits_the_trace(model, tmp_path, name) -> None:
    path = tmp_path / "run.moetrace"
    options = ("--prompt", "Hi", "--max-new-tokens", "8000", "-o", str(path))
    process = subprocess.Popen(
        command("trace", model, *options, "--max-context", "8192"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.send_signal(getattr(signal, name))
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + getattr(signal, name)
    assert b"Traceback" not in err
    from moescope.trace.store import TraceReader

    with TraceReader.open(path) as reader:
        assert reader.count >= 3
    assert not path.with_name(path.name + "-wal").exists()


def test_help_names_every_verb(capsys) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    for verb in cli.VERBS:
        assert verb in out
        assert run(capsys, verb, "--help")[0] == 0


def test_version() -> None:
    done = subprocess.run(
        [*command("--version")], capture_output=True, text=True, timeout=30, cwd=ROOT
    )
    assert done.stdout.startswith("moescope ")
