"""A run knows what it is made of, and what lies in its directory is whole or not believed."""

import inspect
import json
import shutil
import signal
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import pytest
import torch

import currreft
from currreft import main
from runs import after_step, arguments, begun, letters, outcome, refused
from support.directory import RunDirectory, code_digest, differences, digests
from support.files import Digested, digest, joined, sync
from support.signals import Stopped, ending, signals
from support.tiny import tiny_checkpoint, tiny_image
from support.words import RunError

STAGES = ["--stages", "binary:4", "reject:3", "--save_every", "2"]
pytestmark = pytest.mark.usefixtures("learnable")


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """A whole run, one that was killed after three steps, and the outcome of the first."""
    whole, killed = (tmp_path_factory.mktemp("runs") / name for name in ("whole", "killed"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(currreft, "accuracy_reward", letters)
        main(arguments(base, whole, *STAGES))
        begun(arguments(base, killed, *STAGES))
    return whole, killed, outcome(whole)


@pytest.fixture
def undisturbed(runs):
    return runs[0], runs[2]


@pytest.fixture
def killed(runs):
    return runs[1]


def resumable(killed, base, tmp_path):
    """A copy of the killed run, and the arguments that resume it."""
    shutil.copytree(killed, tmp_path / "run", copy_function=shutil.copy2)
    return arguments(base, tmp_path / "run", *STAGES, "--resume")


# ---- What a run is made of ----

def lines(path, change):
    return lambda data: (data / path).write_text("\n".join(change((data / path).read_text().splitlines())) + "\n")


TRAIN, TEST, ASKED = "grpo_data/train/judge.jsonl", "grpo_data/test/open_id.jsonl", "SFT_data/reject/questions.jsonl"
CHANGES = {  # name: (what is done to the data, words of the sentence)
    "rows reversed": (lines(TRAIN, lambda rows: rows[::-1]), "data: grpo_data/train/judge.jsonl has changed"),
    "one truth": (lines(TRAIN, lambda rows: [rows[0].replace("yes", "no"), *rows[1:]]), "judge.jsonl has changed"),
    "test rows": (lines(TEST, lambda rows: rows[::-1]), "open_id.jsonl has changed"),
    "a split removed": (lambda data: (data / TEST).unlink(), "open_id.jsonl is gone"),
    "a split added": (lambda data: shutil.copy(data / TEST, data / "grpo_data/test/open_new.jsonl"),
                      "open_new.jsonl is new"),
    "an image": (lambda data: tiny_image(data / "images/a.png", (84, 56), "black"), "images: images/a.png has changed"),
    "questions": (lines(ASKED, lambda rows: rows[::-1]), "questions.jsonl has changed"),
    "train form": (lambda data: (data / TRAIN).rename(data / "grpo_data/train/binary.jsonl"), "binary.jsonl is new"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_the_data_is_named_and_refused_or_accepted_by_name(name, killed, base, tmp_path, capsys):
    shutil.copytree(base[1], data := tmp_path / "data", copy_function=shutil.copy2)
    resume = resumable(killed, (base[0], data), tmp_path)
    change, words = CHANGES[name]
    change(data)
    assert words in (said := refused(capsys, resume)) and "--allow_changes" in said
    if name != "one truth":
        return
    main([*resume, "--allow_changes"])
    assert "accepted: data: grpo_data/train/judge.jsonl has changed" in capsys.readouterr().err
    record = json.loads((tmp_path / "run" / "config.json").read_text())
    assert words in str(record["changes"]) and record["changes"][0]["after_step"] == 2
    assert len(outcome(tmp_path / "run")["metrics"]) == 7
    main(resume)      # what was accepted is what the run is made of now


def test_the_same_bytes_elsewhere_are_no_change(killed, undisturbed, base, tmp_path, monkeypatch):
    """Another place or spelling of data, base, images and --out, and other times of the files."""
    shutil.copytree(base[1], tmp_path / "moved" / "data", copy_function=shutil.copy)
    shutil.copytree(base[0], tmp_path / "moved" / "model", copy_function=shutil.copy)
    resume = resumable(killed, base, tmp_path)
    monkeypatch.chdir(tmp_path)
    main([*resume, "--data", "moved/data/", "--model", "./moved/model", "--out", "moved/../run",
          "--image_root", "moved/data/."])
    elsewhere = {"kept": None, "samples": None}  # they name files where they are
    assert outcome(tmp_path / "run") | elsewhere == undisturbed[1] | elsewhere


def test_images_elsewhere_of_one_name_are_told_apart_by_their_bytes(tmp_path):
    files = [tmp_path / folder / "1.png" for folder in "ab"]
    for file in files:
        file.parent.mkdir()
        file.write_bytes(b"same")
    before = digests(files, tmp_path / "data")
    files[0].write_bytes(b"other")
    assert before != digests(files, tmp_path / "data") == digests(files[::-1], tmp_path / "data")


def test_another_base_setting_or_code_is_named(killed, base, tmp_path, monkeypatch, capsys):
    shutil.copytree(base[0], model := tmp_path / "model")
    resume = resumable(killed, (model, base[1]), tmp_path)
    assert "--reject_samples was 2, is 3" in refused(capsys, [*resume, "--reject_samples", "3"])
    assert "--seed was 0, is 1" in refused(capsys, [*resume, "--seed", "1"])
    with monkeypatch.context() as patch:
        patch.setattr("support.directory.code_digest", lambda: code_digest() | {"packed.py": "of a fork"})
        assert "code: packed.py has changed\n" in refused(capsys, resume)
    tiny_checkpoint(model, seed=1)
    assert "model: model.safetensors has changed" in refused(capsys, resume)
    for harmless in (["--micro_batch", "2"], ["--judge_model", "x"], ["--save_every", "3"]):
        assert "model.safetensors" in (said := refused(capsys, [*resume, *harmless])) and harmless[0] not in said


@pytest.mark.parametrize("stages, words", [
    (["binary:6", "reject:3"], "finished as binary:4 reject:3, and --stages begins with binary:6 reject:3"),
    (["open:4", "reject:3"], "finished as binary:4 reject:3, and --stages begins with open:4 reject:3"),
    (["binary:4"], "finished as binary:4 reject:3, and --stages begins with binary:4.")])
def test_a_finished_stage_is_known_by_what_it_was(undisturbed, base, tmp_path, capsys, stages, words):
    shutil.copytree(undisturbed[0], out := tmp_path / "run")
    before = outcome(out)
    resume = [*arguments(base, out, "--resume", "--allow_changes"), "--stages", *stages]
    assert words in refused(capsys, resume) and outcome(out) == before
    if len(stages) == 1:    # a stage more is trained, and its row is its own
        main([*resume[:-len(stages)], "binary:4", "reject:3", "sft:1"])
        assert [row["name"] for row in outcome(out)["results"]] == ["base", "1-binary", "2-reject", "3-sft"]
        assert len(outcome(out)["metrics"]) == 8


def test_code_is_what_a_run_executes(tmp_path, monkeypatch):
    """A comment, a file that nothing imports: no change. What is imported on the way: one, by its name."""
    monkeypatch.setattr("support.directory.CODE", tmp_path)
    (tmp_path / "support").mkdir()
    for name, text in (("currreft", "from support import ranks\nimport os"), ("support/ranks", "def f():\n    import rows"),
                       ("rows", "x = 1"), ("scratch", "x = ")):
        (tmp_path / f"{name}.py").write_text(text)
    before = code_digest()
    (tmp_path / "scratch.py").unlink()
    (tmp_path / "rows.py").write_text("x = 1  # one\n")
    assert code_digest() == before and any(name.startswith("torch ") for name in before)
    (tmp_path / "rows.py").write_text("x = 2")
    assert differences({"made_of": {"code": before}}, {"made_of": {"code": code_digest()}}) == [
        "code: rows.py has changed"]


def test_stages_of_rejection_sampling_have_their_own_seeds(base, tmp_path, monkeypatch):
    sample, seeds = currreft.rejection_sample, []
    monkeypatch.setattr(currreft, "rejection_sample", lambda *args, seed, **more: (
        seeds.append(seed), sample(*args, seed=seed, **more))[1])
    main(arguments(base, tmp_path / "run", "--stages", "reject:1", "reject:1"))
    assert seeds == [currreft.seed_from(0, 0), currreft.seed_from(0, 1)]


# ---- Whole or not at all ----

DAMAGE = {
    "cut in half": lambda file: file.write_bytes(file.read_bytes()[:file.stat().st_size // 2]),
    "a byte flipped": lambda file: file.write_bytes(flipped(file.read_bytes(), file.stat().st_size // 2)),
    "zeros": lambda file: file.write_bytes(b"\0" * file.stat().st_size),
    "an empty object": lambda file: file.write_text("{}"),
    "another file's": lambda file: file.write_text('["a list"]'),
    "deleted": lambda file: file.unlink(),
}


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 0xd5]) + data[place + 1:]


CHECKPOINT = [f"checkpoints/0000002/{name}" for name in (
    "model.safetensors", "optimizer-0.pt", "state.json", "metrics.jsonl", "config.json", "tokenizer.json")]
FILES = ["config.json", "metrics.jsonl", "samples.jsonl", "results.json", "predictions/base.jsonl", *CHECKPOINT]


def resumed_from_damage(damage, names, killed, undisturbed, base, tmp_path, capsys):
    """Nothing is silently different: what is not whole is named, and the checkpoint before it is taken."""
    for number, name in enumerate(names):
        shutil.copytree(killed, out := tmp_path / str(number), copy_function=shutil.copy2)
        DAMAGE[damage](out / name)
        capsys.readouterr()
        try:
            main(arguments(base, out, *STAGES, "--resume"))
        except SystemExit as stop:
            said = capsys.readouterr().err
            assert stop.code in (1, 2) and "Traceback" not in said and Path(name).name in said, (name, said)
            continue
        said, found = capsys.readouterr().err, outcome(out)
        if name == "samples.jsonl":
            found["samples"] = undisturbed[1]["samples"]        # what was lost of it is no part of the run
        assert found == undisturbed[1], name
        if name.startswith("checkpoints"):
            assert Path(name).name in said and "starts again from the base model" in said, (name, said)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_gives_the_undisturbed_result_or_a_sentence(damage, killed, undisturbed, base, tmp_path, capsys):
    assert all((killed / name).exists() for name in FILES)
    resumed_from_damage(damage, FILES, killed, undisturbed, base, tmp_path, capsys)


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(killed, undisturbed, base, tmp_path, capsys):
    resumed_from_damage("cut in half", CHECKPOINT[:2], killed, undisturbed, base, tmp_path, capsys)


def test_what_is_damaged_in_an_end_of_a_stage_is_trained_again(undisturbed, base, tmp_path, capsys):
    shutil.copytree(undisturbed[0], out := tmp_path / "run", copy_function=shutil.copy2)
    shutil.rmtree(out / "checkpoints")
    DAMAGE["a byte flipped"](out / "stages" / "2-reject" / "model.safetensors")
    main(arguments(base, out, *STAGES, "--resume"))
    assert "2-reject is damaged (model.safetensors is not what was written)" in capsys.readouterr().err
    assert outcome(out) == undisturbed[1]


def test_damaged_checkpoints_take_no_place_and_a_strangers_files_stay(killed, base, tmp_path):
    """What is saved after a start from the base is kept, whatever later numbers lie there."""
    resume, points = resumable(killed, base, tmp_path), tmp_path / "run" / "checkpoints"
    for name in ("0000003", "0000009", "300-best"):
        shutil.copytree(points / "0000002", points / name)
    for point in points.iterdir():
        DAMAGE["zeros"](point / "model.safetensors")
    (points.parent / "rejected-2_old.jsonl").touch()
    begun(resume)
    assert {path.name for path in points.iterdir()} == {"0000002", "300-best"}
    assert (points.parent / "rejected-2_old.jsonl").exists()


def test_steps_skipped_before_a_kill_are_counted_after_it(base, tmp_path, monkeypatch):
    reduce, calls = currreft.ShardedAdamW.reduce_gradients, []

    def second_is_nan(self, most):
        calls.append(reduce(self, most))
        return float("nan") if len(calls) == 2 else calls[-1]
    monkeypatch.setattr(currreft.ShardedAdamW, "reduce_gradients", second_is_nan)
    main(begun(arguments(base, tmp_path / "run", "--stages", "binary:4", "--save_every", "2")))
    assert [row["skipped_steps"] for row in outcome(tmp_path / "run")["metrics"]] == [0, 1, 1, 1]


def test_a_checkpoint_rests_on_the_reference_of_its_stage(base, tmp_path, capsys):
    """Which a resumed run reads from the end of the stage before: damaged, it would be another KL."""
    resume = begun(arguments(base, tmp_path / "run", "--stages", "binary:2", "choice:3", "--save_every", "1"), at=4)
    DAMAGE["a byte flipped"](tmp_path / "run" / "stages" / "1-binary" / "model.safetensors")
    begun(resume, at=2)  # from the checkpoint before both
    said = capsys.readouterr().err
    assert "0000003 is damaged (stages/1-binary/model.safetensors is not what was written)" in said


def test_the_windows_at_the_start_are_closed(base, tmp_path, undisturbed):
    """Killed while config.json was written aside: the same command begins the run; leftovers of the dead go."""
    out = tmp_path / "run"
    out.mkdir()
    (out / ".writing-config.json").write_text("{")
    main(arguments(base, out, *STAGES))
    (out / "checkpoints" / ".writing-0000009").mkdir()
    torch.manual_seed(7)  # the seed of torch is no part of a run
    main(arguments(base, out, *STAGES, "--resume"))
    assert outcome(out) == undisturbed[1] and not list(out.rglob(".writing-*"))


def test_an_optimizer_is_hashed_while_it_is_written(tmp_path, monkeypatch):
    """53 GB at 3B. Blocks end within tensors, and writes within blocks; an empty file has a digest as well."""
    monkeypatch.setattr(inspect.getmodule(digest), "BLOCK", 1000)
    for state in ({"a": torch.randn(5000), "b": torch.ones(3)}, None):
        with Digested(tmp_path / "x.pt") as file:
            state and torch.save(state, file)
        assert joined(file.blocks) == digest(tmp_path / "x.pt")


def test_a_full_disk_ends_with_a_sentence_and_keeps_the_last_checkpoint(base, undisturbed, tmp_path, monkeypatch, capsys):
    original = torch.save

    def full(value, file):
        if "0000006" in str(file.name):  # as the kernel says it, within torch's own words for it
            monkeypatch.setattr(file, "write", mock.Mock(side_effect=OSError(28, "No space left on device")))
        original(value, file)
    monkeypatch.setattr(torch, "save", full)
    out = tmp_path / "run"
    said = refused(capsys, arguments(base, out, *STAGES), 1)
    assert "No space left" in said and "1-binary" in said and "checkpoints/0000002 in 0." in said, "each save says its time"
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["0000002"]
    monkeypatch.setattr(torch, "save", original)
    main(arguments(base, out, *STAGES, "--resume"))
    assert outcome(out) == undisturbed[1]


@pytest.mark.parametrize("code, path", [(22, None), (22, "a.json"), (28, "a.json"), (5, "")])
def test_a_disk_that_syncs_no_directories_will_do_and_other_errors_name_the_file(code, path, tmp_path, monkeypatch):
    (tmp_path / "a.json").touch()
    monkeypatch.setattr("os.fsync", mock.Mock(side_effect=OSError(code, "no")))
    with pytest.raises(OSError, match=str(tmp_path / (path or ""))) if path is not None else nullcontext():
        sync(tmp_path / (path or ""))


def test_a_signal_whose_save_failed_does_not_say_that_everything_is_saved(monkeypatch):
    monkeypatch.setattr(signals, "number", signal.SIGTERM)
    assert ending(RunError("it could not be written"), True) == ("stopped by SIGTERM; it could not be written", 143)
    assert ending(Stopped(signal.SIGINT), True)[0].startswith("stopped by SIGINT; everything is saved")


def test_weights_that_are_not_finite_are_never_saved(base, tmp_path, capsys):
    def spoil(run):
        next(run.policy.parameters()).data.view(-1)[0] = float("nan")
    with after_step(3, spoil):
        said = refused(capsys, arguments(base, tmp_path / "run", *STAGES), 1)
    assert "weights are not finite" in said and "0000002" in said
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["0000002"]
    assert not list((tmp_path / "run").glob("stages/*"))


def test_a_directory_has_one_run_at_a_time(killed, base, tmp_path, monkeypatch, capsys):
    """Whoever starts the second one, fresh or resumed; no lock outlives its process."""
    resume, fresh = resumable(killed, base, tmp_path), arguments(base, tmp_path / "new", *STAGES)
    said = []
    with after_step(5, lambda run: said.append(refused(capsys, resume))):
        main(resume)
    assert "another process runs in it" in said[0]
    holder = RunDirectory(tmp_path / "new", (), ())
    holder.out.mkdir()
    with holder:
        holder._take()
        assert "another process runs in it" in refused(capsys, fresh)
    load = currreft.Run.load_weights

    def meanwhile(run, path):  # another one is begun, and ends, while this one loads its weights
        monkeypatch.undo()
        main([*fresh, "--stages", "binary:1"])
        load(run, path)
    monkeypatch.setattr(currreft.Run, "load_weights", meanwhile)
    assert "another run has begun in it" in refused(capsys, fresh)
    assert len(outcome(tmp_path / "new")["metrics"]) == 1


# ---- What a person looks for first ----

def test_samples_hold_whole_groups_with_what_each_was_worth(undisturbed):
    (row,) = map(json.loads, (undisturbed[0] / "samples.jsonl").read_text().splitlines())
    assert row["step"] == 1 and len(row["completions"]) == 4 and ".jsonl:" in row["where"]
    assert abs(sum(c["advantage"] for c in row["completions"])) < 1e-3
    assert all(c["accuracy"] == letters(c["text"]) for c in row["completions"])
    assert {"reward_std", "entropy", "truncated"} <= undisturbed[1]["metrics"][0].keys()


def test_a_digest_of_blocks_is_that_of_the_whole_file(tmp_path, monkeypatch):
    monkeypatch.setattr("support.files.BLOCK", 10)
    (tmp_path / "a").write_bytes(bytes(range(95)))
    (tmp_path / "b").write_bytes(bytes(range(94)) + b"x")
    assert digest(tmp_path / "a") == digest(tmp_path / "a") != digest(tmp_path / "b")
