"""Real processes: ranks, kills, signals, terminals. Whatever ends a run, it says one sentence and loses nothing."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from runs import HERE, PROGRAM, approximately, arguments, assert_near, launch, metrics, outcome, start

from support.directory import RunDirectory

STAGES = ["--stages", "binary:4", "reject:3", "--save_every", "2"]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory):
    """{ranks: run directory} of runs that nobody disturbed."""
    runs, path = {}, tmp_path_factory.mktemp("whole")
    for ranks in (1, 2):
        code, said = launch(path, arguments(base, path / str(ranks), *STAGES), ranks)
        assert code == 0, said[-3000:]
        runs[ranks] = path / str(ranks)
    return runs


def test_two_ranks_take_the_steps_of_one(uninterrupted):
    one, two = metrics(uninterrupted[1]), metrics(uninterrupted[2])
    assert [approximately(row) for row in one] == two
    assert_near(*(uninterrupted[n] / "stages" / "2-reject" for n in (1, 2)), atol=1e-4, rtol=0)
    assert outcome(uninterrupted[1])["results"][0] == outcome(uninterrupted[2])["results"][0]


@pytest.mark.parametrize("ranks, kill", [(1, "step=6"), (2, "judged=3 rank=1")])
def test_a_killed_run_resumes_bit_for_bit(uninterrupted, base, tmp_path, ranks, kill):
    run = arguments(base, tmp_path / "run", *STAGES)
    assert launch(tmp_path, run, ranks, kill)[0] != 0
    code, said = launch(tmp_path, [*run, "--resume"], ranks)
    assert code == 0, said[-3000:]
    assert outcome(tmp_path / "run") == outcome(uninterrupted[ranks])


def test_a_run_of_one_rank_resumes_on_two(uninterrupted, base, tmp_path):
    run = arguments(base, tmp_path / "run", *STAGES)
    launch(tmp_path, run, 1, "step=3")
    code, said = launch(tmp_path, [*run, "--resume"], 2)
    assert code == 0, said[-3000:]
    assert [approximately(row) for row in metrics(uninterrupted[1])] == metrics(tmp_path / "run")


def test_a_signal_to_any_rank_ends_all_with_one_sentence(uninterrupted, base, tmp_path):
    """A node that is drained: the others have no signal of their own."""
    run = arguments(base, tmp_path / "run", *STAGES)
    code, said = launch(tmp_path, run, 2, f"step=3 rank=1 signal={signal.SIGTERM.value}")
    assert code == 143 and "Traceback" not in said and "currreft: stopped by SIGTERM; everything is saved" in said
    assert launch(tmp_path, [*run, "--resume"], 2)[0] == 0
    assert outcome(tmp_path / "run") == outcome(uninterrupted[2])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_signal_saves_says_so_and_has_a_code_of_its_own(number, uninterrupted, base, tmp_path):
    run = arguments(base, tmp_path / "run", *STAGES)
    code, said = launch(tmp_path, run, kill=f"step=3 signal={number.value}")
    assert code == 128 + number and "Traceback" not in said
    assert f"stopped by {number.name}; everything is saved, continue with --resume" in said.splitlines()[-1]
    assert RunDirectory(tmp_path / "run", (), ()).checkpoints()[0][0][1]["global_step"] == 3
    assert launch(tmp_path, [*run, "--resume"])[0] == 0
    assert outcome(tmp_path / "run") == outcome(uninterrupted[1])


def test_ranks_whose_launcher_is_gone_save_and_leave(base, tmp_path):
    def alive():
        return subprocess.run(["pgrep", "-f", str(tmp_path / "program.py")], capture_output=True).stdout
    run = arguments(base, tmp_path / "run", *STAGES, "--stages", "binary:4000")
    _, said = launch(tmp_path, run, 2, f"step=3 parent=1 signal={signal.SIGKILL.value}")
    assert "Traceback" not in said
    end = time.monotonic() + 60
    while time.monotonic() < end and alive():
        time.sleep(0.5)
    assert not alive(), "orphans"
    steps = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*"))
    assert steps and int(steps[-1]) >= 3


def test_a_stalled_rank_ends_the_run_with_a_sentence(base, tmp_path, monkeypatch):
    """No collective waits for ever: a rank that stops answering is given up after --timeout_minutes."""
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "2")
    code, said = launch(tmp_path, arguments(base, tmp_path / "run", *STAGES, "--timeout_minutes", "0.1"), 2,
                        f"step=3 rank=1 signal={signal.SIGSTOP.value}")
    assert code != 0 and "--timeout_minutes" in said and "--resume" in said


def test_an_error_on_one_rank_ends_all_with_its_sentence(base, tmp_path):
    """The others, which wait for it, are ended by torchrun within seconds; what the rank said comes first."""
    started = time.monotonic()
    code, said = launch(tmp_path, arguments(base, tmp_path / "run", *STAGES), 2, "step=3 rank=1 raise=disk-gone")
    assert code != 0 and time.monotonic() - started < 90  # not --timeout_minutes 30
    assert "currreft (rank 1): disk-gone; what was finished is kept, continue with --resume" in said


def test_a_mistake_that_all_ranks_see_is_said_once(base, tmp_path):
    code, said = launch(tmp_path, arguments(base, tmp_path / "run", *STAGES, "--prompts_per_step", "3"), 2)
    assert code != 0 and said.count("--prompts_per_step 3 is not a multiple of the 2 ranks") == 1


@pytest.mark.parametrize("shell", ["{run} | head -1", "PYTHONIOENCODING=ascii LC_ALL=C {run} 2>&-"])
def test_a_run_is_not_upset_by_its_terminal(shell, uninterrupted, base, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM.format(root=str(HERE.parent), tests=str(HERE)))
    command = " ".join(["KILL=", sys.executable, str(tmp_path / "program.py"),
                        *arguments(base, tmp_path / "run", *STAGES)])
    done = subprocess.run(["bash", "-c", "set -o pipefail; " + shell.format(run=command)], capture_output=True,
                          text=True, timeout=120, cwd=HERE.parent)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert outcome(tmp_path / "run") == outcome(uninterrupted[1])


def test_kills_at_random_moments_lose_nothing(uninterrupted, base, tmp_path):
    """KILLS=30 kills, or ends by another signal, as many lives."""
    rng, kills, out = random.Random(1), int(os.environ.get("KILLS", 4)), tmp_path / "run"
    for life in range(kills + 1):
        resume = ["--resume"] * (out / "config.json").exists()
        process = start(tmp_path, arguments(base, out, *STAGES, "--save_every", "1", *resume), rng.choice((1, 2)))
        number = rng.choice((signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)) if life < kills else None
        if number:
            time.sleep(rng.uniform(3, 9))
            os.killpg(process.pid, number)  # a zombie, too, has an id
        said = process.communicate(timeout=300)[1]
        assert "Traceback" not in said and process.returncode != 2 and (number or process.returncode == 0), said
        if process.returncode == 0:
            break
    assert [approximately(row) for row in metrics(uninterrupted[1])] == metrics(out)


def test_a_lost_connection_does_not_end_a_run_under_nohup(uninterrupted, base, tmp_path):
    run = arguments(base, tmp_path / "run", *STAGES)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        code, said = launch(tmp_path, run, 2, f"step=3 group=1 signal={signal.SIGHUP.value}")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert code == 0, said[-3000:]
    assert outcome(tmp_path / "run") == outcome(uninterrupted[2])
