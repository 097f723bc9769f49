"""Whatever call fails, is cut short, hangs or is the process's last: nothing is lost."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.faults import ACTIONS, Faults
from tests.helpers import flags_of, small_config
from tests.test_faults import final_arrays

# Of the about 210 calls of the run below, evenly spread; each action in turn.
POINTS = int(os.environ.get("IMGCLS_FAULT_POINTS", 40))
RUN = small_config(
    data__train="train[:80]",
    data__validation="train[80:120]",
    data__test="test[:20]",
    model__widths=(2,),
    model__dense_widths=(),
    model__cpu_kernels="off",
    train__log_every_steps=2,
)
FLAGS = ["--config=configs/digits.py", *flags_of(RUN)]

pytestmark = pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler")


@pytest.mark.slow
def test_a_call_that_goes_wrong_is_counted_and_seen(tmp_path):
    with Faults(tmp_path) as faults:
        code, calls, _ = faults.run(FLAGS, tmp_path / "run", 1, "kill")
        assert code == -9 and not calls
        code, _, printed = faults.run(FLAGS, tmp_path / "run", 20, "full")
        assert code == 4 and "free some space" in printed.splitlines()[-1]


@pytest.mark.slow
def test_the_same_command_ends_in_the_undisturbed_result_whatever_went_wrong(tmp_path):
    with Faults(tmp_path) as one, Faults(tmp_path) as other:
        code, calls, printed = one.run(FLAGS, tmp_path / "undisturbed")
        assert code == 0 and calls > 100, printed
        undisturbed = final_arrays(tmp_path / "undisturbed")

        def check(faults, points):
            wrong = []
            for point in points:
                action, number = ACTIONS[point % len(ACTIONS)], 1 + point * calls // POINTS
                workdir = tmp_path / f"{action}-{number}"
                code, _, printed = faults.run(FLAGS, workdir, number, action)
                second, _, again = faults.run(FLAGS, workdir)
                last = (printed.splitlines() or [""])[-1]
                clear = code in (0, -9) or (code == 4 and last.startswith("error: "))
                same = second == 0 and final_arrays(workdir) == undisturbed
                if not (clear and same) or "Traceback" in printed:
                    wrong.append(f"{workdir.name}: {code}, then {second}\n{printed}\n{again}")
                shutil.rmtree(workdir)
            return wrong

        with ThreadPoolExecutor(2) as pool:
            halves = pool.map(check, (one, other), (range(0, POINTS, 2), range(1, POINTS, 2)))
            wrong = [text for half in halves for text in half]
    assert not wrong, "\n\n".join(wrong)
