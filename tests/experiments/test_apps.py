"""What a mistake on the command line is answered with."""

import pytest
from absl import flags
from ml_collections import config_flags

from configs import digits
from experiments.shared import apps

CONFIG = f"--config={digits.__file__}"


@pytest.fixture
def answer(monkeypatch):
    """The last words of a program with these arguments."""

    def parse(*arguments):
        values = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=values)
        monkeypatch.setattr(flags, "FLAGS", values)
        monkeypatch.setattr("sys.argv", ["program", *arguments])
        with pytest.raises(SystemExit) as ended:
            apps._parse(["program", *arguments])
        return ended.value.code

    return parse


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            [CONFIG, "--config.local.learning_rat=1"],
            "error: unknown field of config.local: 'learning_rat'. Did you mean 'learning_rate'?",
        ),
        (["--config", digits.__file__, "--config.roundz", "3"], "Did you mean 'rounds'?"),
        ([CONFIG, "--config.rounds.more=3"], "config.rounds is no group of fields"),
        ([CONFIG, "--config.rounds=x"], "error: flag --config.rounds=x: invalid literal"),
        (
            [CONFIG + ":methd=fedit"],
            "error: unknown config argument 'methd'. Did you",
        ),
        (["--config=nowhere.py", "--config.rounds=3"], "nowhere.py"),
        ([CONFIG, "--confg.rounds=3"], "error: Unknown command line flag 'confg.rounds'"),
    ],
)
def test_a_mistake_is_one_line(answer, arguments, message):
    said = answer(*arguments)
    assert message in said and said.startswith("error: ") and "Traceback" not in said


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (FileNotFoundError(2, "No such file", "x/y"), "x/y: No such file"),
        (FileExistsError(17, "File exists", "x"), "x: File exists: a directory is wanted"),
        (ValueError("plain"), "plain"),
    ],
)
def test_reasons(error, message):
    assert apps._reason(error) == message
