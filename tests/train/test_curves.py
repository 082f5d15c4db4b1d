"""TensorBoard's own reader finds the points, and those of a resumed run instead of what came after its set."""

from hpcpar.train.curves import Curves


def points(folder, name):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder)).Reload()
    return [(point.step, point.value) for point in read.Scalars(name)]


def test_points_are_there_at_once_and_a_resume_replaces_what_came_after(tmp_path):
    first = Curves(tmp_path / "tensorboard", 1)
    for step in (1, 2, 3, 4):
        first.add(step, loss=step / 2, lr=0.25)
    assert points(tmp_path / "tensorboard", "loss") == [(1, 0.5), (2, 1.0), (3, 1.5), (4, 2.0)]
    second = Curves(tmp_path / "tensorboard", 3)
    second.add(3, loss=8.0)
    assert points(tmp_path / "tensorboard", "loss") == [(1, 0.5), (2, 1.0), (3, 8.0)]
    assert points(tmp_path / "tensorboard", "lr") == [(1, 0.25), (2, 0.25)]
    first.close()
    second.close()
