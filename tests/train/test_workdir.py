import pytest

from cogvideox_jax.core.errors import InputError
from cogvideox_jax.train import metrics, workdir


def test_only_what_matters_counts_as_a_difference():
    stored = {"mesh": {"data": 1}, "log_steps": 5, "optimizer": {"b1": 0.9}, "seed": 0}
    given = {"mesh": {"data": 8}, "log_steps": 7, "optimizer": {"b1": 0.8}, "seed": 0, "more": True}
    assert workdir.differences(stored, given) == ["more was None, is now True", "optimizer.b1 was 0.9, is now 0.8"]


def test_a_second_process_is_refused(tmp_path):
    first = workdir.claim(tmp_path / "run", {"seed": 0})
    with pytest.raises(InputError, match="in use by another process"):
        workdir.claim(tmp_path / "run", {"seed": 0})
    first.close()
    workdir.claim(tmp_path / "run", {"seed": 0}).close()


def test_a_stored_config_keeps_its_tuples(tmp_path):
    workdir.claim(tmp_path, {"model": {"channels": [8, 16]}}).close()
    assert workdir.read_config(tmp_path, made_by="nobody") == {"model": {"channels": (8, 16)}}
    with pytest.raises(InputError, match=r"none/config\.json is missing: run the baker first"):
        workdir.read_config(tmp_path / "none", made_by="the baker")


def test_metrics_after_the_resumed_step_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    writer = metrics.MetricsWriter(path)
    for step in (10, 20, 30):
        writer.write(step, {"loss": step / 10})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 40, "lo')  # killed while writing
    writer = metrics.MetricsWriter(path, resume_step=20)
    writer.write(30, {"loss": 9})
    writer.close()
    assert [(row["step"], row["loss"]) for row in metrics.read_metrics(path)] == [(10, 1), (20, 2), (30, 9)]


def test_durations():
    assert [metrics.duration(s) for s in (0.4, 59, 61, 3599, 7501)] == [
        "0 s",
        "59 s",
        "1 min 01 s",
        "59 min 59 s",
        "2 h 05 min",
    ]
