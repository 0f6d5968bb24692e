"""The driver of a run, without Ray: how it counts when it is interrupted, or loses its Liveness."""

from sdbatch.batch.liveness import Liveness
from sdbatch.report.progress import SilentDisplay
from tests.fakes import FakeEngine
from tests.finished import LocalLiveness
from tests.wait import wait_until
from tests.without_ray import draw


class TwiceInterrupted(SilentDisplay):
    """Presses Ctrl-C when receipts were written that no driver has seen, and then once more."""

    def __init__(self, folder, receipts):
        self._folder, self._receipts = folder, receipts
        self._pressed = 0
        self.reports = []

    def show(self, progress):
        if (self._folder / "job.yaml").exists() and self._pressed < 2:
            wait_until(lambda: len(list(self._folder.glob("receipts/*"))) >= self._receipts)
            self._pressed += 1
            raise KeyboardInterrupt

    def close(self, report):
        self.reports.append(report)


class Patient(FakeEngine):
    """Never draws the prompt "wait"."""

    def submit(self, request):
        future = super().submit(request.updated(prompt="anything"))
        return type(future)() if request.prompt == "wait" else future


def test_the_report_counts_what_is_committed_after_ctrl_c_was_pressed_twice(
    make_job, prompts, tmp_path
):
    job = make_job(
        prompts={"path": prompts("dog", "cat", "wait")},
        sampling={"height": 8, "width": 8},
        output={"images_per_shard": 1},
    )
    display = TwiceInterrupted(tmp_path / "out", 2)
    report = draw(job, make_engine=Patient, display=display)
    assert (report.stopped, report.exit_code, report.images) == ("interrupted", 1, 2)
    assert report.drawn_now == 2
    assert display.reports == [report]
    assert len(list((tmp_path / "out" / "receipts").iterdir())) == 2


class Restarting(SilentDisplay):
    """Lets the Liveness lose all that it knows, as Ray restarts it, once images are drawn."""

    def __init__(self, monkeypatch):
        self._state = None
        self.seen = []
        begin = LocalLiveness.__init__

        def remember(liveness, actors=None):
            begin(liveness, actors)
            self._liveness = liveness

        monkeypatch.setattr(LocalLiveness, "__init__", remember)

    def show(self, progress):
        if progress.drawn and not self.seen:
            self._liveness.state = Liveness(1)
        if progress.drawn:
            self.seen.append(progress)


def test_rate_and_eta_survive_the_death_of_the_liveness_actor(make_job, tmp_path, monkeypatch):
    display = Restarting(monkeypatch)
    job = make_job(sampling={"height": 8, "width": 8}, output={"images_per_shard": 1})
    report = draw(job, make_engine=lambda: FakeEngine(delay=0.4), display=display)
    assert (report.images, report.exit_code) == (6, 0)
    assert len(display.seen) > 1
    assert all(progress.images_per_s > 0 for progress in display.seen)
    assert all(progress.eta_seconds is not None for progress in display.seen)


class OnDevice(FakeEngine):
    """Says that it draws on a device."""

    def __init__(self, name):
        super().__init__()
        facts = {"kind": "cpu", "instructions": "AVX2", "onednn": True, "environment": {}}
        self.device = {"name": name, **facts}


def test_a_resume_on_another_kind_of_device_says_so_once_and_in_its_report(
    make_job, tmp_path, caplog
):
    job = make_job(sampling={"height": 8, "width": 8}, output={"images_per_shard": 1})
    assert draw(job, make_engine=lambda: OnDevice("an A")).devices == {"an A (AVX2)": 6}
    for shard in (1, 3):
        (tmp_path / f"out/receipts/{shard:06d}.json").unlink()
    caplog.clear()
    report = draw(job, make_engine=lambda: OnDevice("a B"))

    (note,) = (record.message for record in caplog.records if "draws with" in record.message)
    assert note.startswith(
        "Note: this run draws with a B (AVX2), and what the output holds was drawn by an A (AVX2). "
    )
    assert report.devices == {"an A (AVX2)": 4, "a B (AVX2)": 2}


def test_a_resume_on_the_same_kind_of_device_says_nothing(make_job, tmp_path, caplog):
    job = make_job(sampling={"height": 8, "width": 8}, output={"images_per_shard": 1})
    draw(job, make_engine=lambda: OnDevice("an A"))
    (tmp_path / "out/receipts/000001.json").unlink()
    caplog.clear()
    draw(job, make_engine=lambda: OnDevice("an A"))
    assert [record.message for record in caplog.records if "draws with" in record.message] == []
