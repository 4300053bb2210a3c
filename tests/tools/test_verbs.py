"""The program `lpl`: its verbs, their flags in one style, and names that are not known answered by the nearest ones."""

import argparse
import collections
import contextlib
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import lpl_jax
from lpl_jax import stopping, tools
from lpl_jax.tools import cli, config_file, sweep, verbs

ROOT = Path(lpl_jax.__file__).parents[1]


def parsers():
    """Words behind `lpl` -> parser: of all verbs, and of what they have verbs for themselves."""
    found = {}
    for name in verbs.VERBS:
        found[name] = parser = verbs.load(name).parser()
        found |= {f"{name} {each}": below for each, below in (parser.verbs.choices if parser.verbs else {}).items()}
    return found


def flags_of(parser):
    """Flag -> its action."""
    return {flag: action for action in parser._actions for flag in action.option_strings if flag.startswith("--")}


PARSERS = parsers()


def call(argv, capsys):
    """(exit status, what was printed) of the program in this process."""
    with pytest.raises(SystemExit) as caught:
        cli.run_main(verbs.main, argv)
    return caught.value.code, capsys.readouterr()


def refused(argv, capsys):
    """The one line that a mistake ends with."""
    status, output = call(argv, capsys)
    assert (status, output.out) == (2, "")
    assert output.err.startswith("error: ") and output.err.count("\n") == 1
    return output.err


def test_the_list_of_verbs_needs_neither_jax_nor_numpy():
    code = (
        "import sys\nfrom lpl_jax.tools import verbs\nassert verbs.main([]) == verbs.main(['--help']) == 0\n"
        "assert not {'jax', 'numpy', 'ml_collections', 'absl'} & set(sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name, verb in verbs.VERBS.items():
        assert printed.count(f"  {name:13}  {verb.help}\n") == 2


def test_version(capsys):
    assert verbs.main(["--version"]) == 0
    assert capsys.readouterr().out == f"lpl_jax {lpl_jax.__version__}\n"


@pytest.mark.parametrize("words", PARSERS)
def test_help_has_all_flags_with_their_defaults_and_an_example(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    status, output = call([*words.split(), "--help"], capsys)
    shown = " ".join(output.out.split())
    assert status == 0 and shown.startswith(f"usage: lpl {words} ") and f" lpl {words}" in shown[11:]
    for flag, action in flags_of(PARSERS[words]).items():
        assert flag in shown and action.help, flag
        if action.type is not None and action.default is not None:
            assert f"(default: {action.default})" in shown, flag


@pytest.mark.parametrize("words", PARSERS)
def test_examples_of_the_help_can_be_called(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    examples = re.findall(r"^    lpl (.+?)(?:\s{3,}.*)?$", PARSERS[words].description, re.M)
    assert examples
    for example in examples:
        verb, *argv = shlex.split(example)
        if verb == "sweep":
            argv, _ = sweep._split(argv)
        args = verbs.load(verb).parser().parse_args(argv)
        if getattr(args, "config", None):
            config_file.find(args.config.partition(":")[0])


@pytest.mark.parametrize("words", PARSERS)
def test_flags_are_kebab_case(words):
    assert all(re.fullmatch("--[a-z0-9]+(-[a-z0-9]+)*", flag) for flag in flags_of(PARSERS[words]))


def test_a_flag_is_the_same_in_all_verbs_that_have_it():
    """One type, but that some verbs take several values with commas between them, and one wording."""
    meanings = collections.defaultdict(set)
    for parser in PARSERS.values():
        for flag, action in flags_of(parser).items():
            metavar = (action.metavar or "").removesuffix("[,...]")
            help = action.help.partition(" (default: ")[0]
            meanings[flag].add((getattr(action.type, "kind", action.type), metavar, help))
    assert {flag: found for flag, found in meanings.items() if len(found) > 1} == {}


def misspelt(name):
    """A name with two of its inner letters in the other order, or one letter left out."""
    place = max(2, len(name) // 2)
    swapped = name[:place] + name[place : place + 2][::-1] + name[place + 2 :]
    return swapped if swapped != name else name[:place] + name[place + 1 :]


@pytest.mark.parametrize("words", PARSERS)
def test_misspelt_flags_are_answered_by_the_right_ones(words, capsys):
    for flag in flags_of(PARSERS[words]):
        for wrong in {f"--{misspelt(flag[2:])}", flag.replace("-", "_").replace("__", "--", 1), flag[1:]} - {flag}:
            answer = refused([*words.split(), f"{wrong}=1"], capsys)
            assert answer == f"error: unknown flag {wrong} (did you mean {flag}?)\n"


@pytest.mark.parametrize("words", PARSERS)
def test_misspelt_verbs_are_answered_by_the_right_ones(words, capsys):
    *above, name = words.split()
    assert f"has no verb {misspelt(name)!r} (did you mean {name}?)" in refused([*above, misspelt(name)], capsys)


def test_names_that_are_like_no_other_are_answered_by_all():
    assert cli.answer("x", ["one", "two"]) == "; possible: one, two"
    assert cli.answer("threee", ["one", "three"]) == " (did you mean three?)"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("prepare --source photos --resolution 64 --out s --crop randm_crop", "did you mean random_crop?"),
        ("export --workdir w --out o --layout difusers", "did you mean diffusers?"),
        ("eval --images i --features inceptoin", "did you mean inception?"),
        ("sample --workdir w --count 0", "--count 0: must be 1 to 10,000"),
        ("sample --workdir w --seed=x", "--seed x: must be a whole number"),
        ("sample --workdir w --guidance high", "--guidance high: must be a number"),
        ("eval --workdir w --guidance 1,high", "--guidance high: must be a number"),
        ("sample --workdir=", "--workdir is empty"),
        ("sample --workdir ftp://host/run", "--workdir path=ftp://host/run: possible are local paths, gs://"),
        ("compile-check --json s3://bucket/x", "--json s3://bucket/x is remote; path takes local paths only"),
        ("sample", "missing --workdir; lpl sample --help shows all flags"),
        ("train --config quickstart --workdir w --config.train.steps 5", "--config.train.steps=VALUE"),
        ("sample --workdir w --config.train.steps=5", "unknown flag --config.train.steps; possible: "),
        ("eval --workdir w spare", "unrecognized arguments: spare"),
        ("--wrokdir w train", "lpl has no verb '--wrokdir'; possible: train, eval"),
    ],
)
def test_mistakes_are_one_line(argv, message, capsys):
    assert message in refused(argv.split(), capsys)


ABSURD = ("nan", "inf", "-inf", "1e30", "-1", str(2**63), "9" * 5000, "x", "", "1e", "0x10")


def types_of(parser):
    """(action, its type or that of each of its values) of all that take a value."""
    for action in parser._actions:
        if action.nargs != 0 and not isinstance(action, argparse._SubParsersAction):
            yield action, getattr(action.type, "kind", action.type)


@pytest.mark.parametrize("words", PARSERS)
def test_every_number_has_a_range_and_every_text_an_end(words):
    for action, kind in types_of(PARSERS[words]):
        if action.metavar == "PART":
            continue  # compared with a list of names
        assert isinstance(kind, cli.Number) or (callable(kind) and kind not in (int, float, str)), action.dest
        absurd = ABSURD if isinstance(kind, cli.Number) else ("x" * 2**20, "a\nb", "a\0b")
        for value in absurd:
            with pytest.raises(argparse.ArgumentTypeError) as caught:
                action.type(value)
            assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_lists_of_values_have_an_end():
    with pytest.raises(argparse.ArgumentTypeError, match="1,001 values: at most 1,000"):
        cli.Several(cli.whole(0, 1))("0," * 1000 + "0")


def test_values_may_look_like_flags():
    args = PARSERS["sample"].parse_args(["--workdir", "w", "--prompt", "-a cat- on a mat", "--prompt=--steps"])
    assert args.prompt == ["-a cat- on a mat", "--steps"]


VERB_OF = {"lpl_jax.tools.evaluate": "eval", "lpl_jax.tools.parity.program": "parity", "lpl_jax.tools.cli": "VERB"}


def say_what_is_called(names):
    """Modules that are run as programs: none does nothing and exits with 0."""
    processes = {
        name: subprocess.Popen(
            [sys.executable, "-m", name, "--help"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for name in names
    }
    for name, process in processes.items():
        out, err = process.communicate()
        assert (process.returncode, out) == (2, "") and "call lpl " in err, name


def test_modules_are_no_programs_and_say_what_is():
    say_what_is_called(VERB_OF)
    for name, verb in VERB_OF.items():
        assert verbs.verb_of(["python", "-m", name]) == verb


@pytest.mark.slow
def test_no_module_is_a_program():
    names = [module.name for module in pkgutil.walk_packages(tools.__path__, "lpl_jax.tools.")]
    assert {f"lpl_jax.tools.{verb.module}" for verb in verbs.VERBS.values()} < set(names)
    say_what_is_called(names)


@pytest.fixture
def released():
    """The program catches signals, in this process."""
    yield
    stopping.release()


@pytest.mark.usefixtures("released")
@pytest.mark.parametrize("program", ["train.py", "eval.py"])
def test_the_programs_at_the_top_are_two_of_the_verbs(program, monkeypatch, capsys):
    expected = call([program.removesuffix(".py"), "--help"], capsys)
    monkeypatch.setattr(sys, "argv", [program, "--help"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(str(ROOT / program), run_name="__main__")
    assert (caught.value.code, capsys.readouterr()) == expected


@pytest.mark.usefixtures("released")
def test_an_interruption_ends_the_process_at_once(monkeypatch, capfd):
    """XLA may be compiling in a thread: a regular end of the interpreter crashed."""
    ended = []

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(verbs, "main", interrupted)
    monkeypatch.setattr(verbs.os, "_exit", ended.append)
    monkeypatch.setattr("sys.argv", ["lpl", "sample"])
    with contextlib.suppress(SystemExit):
        verbs.run()
    assert ended == [130] and capfd.readouterr().err == "lpl sample: stopped; to go on: lpl sample\n"
