"""A profile names the operations of the training step, and leaves the run as it was."""

import pytest

from imgcls.config import to_json
from imgcls.errors import UserError
from imgcls.profile import profile
from imgcls.run.workdir import claim, write_json
from imgcls.train import train_and_evaluate
from tests.helpers import small_config


def files(workdir):
    return {
        path: path.read_bytes()
        for path in workdir.rglob("*")
        if path.is_file() and path.name != ".lock" and "profile" not in path.parts
    }


def test_a_profile_of_a_finished_run_changes_nothing_in_it(tmp_path, capsys):
    train_and_evaluate(small_config(train__epochs=1), tmp_path / "run")
    before = files(tmp_path / "run")
    operations = profile(tmp_path / "run", steps=2)
    assert files(tmp_path / "run") == before
    sources = [source for _, source, _ in operations]
    for part in ("jvp(CNN)/Conv_0", "transpose(jvp(CNN))/Conv_0", "jvp(CNN)/BatchNorm_0"):
        assert any(part in source for source in sources), part
    spent = [t for _, _, t in operations]
    assert spent == sorted(spent, reverse=True) and spent[-1] >= 0 < spent[0]
    output = capsys.readouterr().out
    assert operations[0][0] in output and len(list(tmp_path.rglob("perfetto_trace.json.gz"))) == 1


def test_a_run_without_a_checkpoint_is_profiled_from_its_start(tmp_path):
    write_json(tmp_path / "config.json", to_json(small_config()))
    assert profile(tmp_path, steps=1)
    assert not any((tmp_path / "checkpoints").iterdir())


@pytest.mark.slow
def test_of_a_frozen_run_the_step_of_the_last_layer_is_profiled(tmp_path):
    config = small_config(train__epochs=1, optim__backbone_ratio=0.0)
    train_and_evaluate(config, tmp_path, test=False)
    sources = [source for _, source, _ in profile(tmp_path, steps=1)]
    assert any("LastLayer" in source for source in sources)
    assert not any("Conv_0" in source for source in sources)


def test_what_is_no_run_or_is_under_way_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        profile(tmp_path / "nothing", steps=1)
    write_json(tmp_path / "config.json", to_json(small_config()))
    with claim(tmp_path), pytest.raises(UserError, match="in use by process"):
        profile(tmp_path, steps=1)
