"""The draw stage: no row is lost, shards in flight share one engine, deaths are counted."""

import asyncio
import hashlib
import io
import re
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import MappingProxyType

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from sdbatch import schema
from sdbatch.batch.blocks import pack, unpack
from sdbatch.batch.drawing_actor import MOST_DEATHS
from sdbatch.engine.request import Request
from sdbatch.errors import ModelError
from sdbatch.output.image_file import read_parameters
from sdbatch.stages.base import facts_of, shard_of, with_shard
from tests.batch import engines
from tests.fakes import FakeEngine
from tests.finished import (
    HERE,
    LocalLiveness,
    at_once,
    block,
    draw,
    draw_rows,
    drawing_actor,
    planned,
    requests,
)
from tests.wait import wait_until

PROMPTS = ("a red dog", "fail", "a blue dog", "fail", "a green dog")
FAULT = "ValueError: this prompt cannot be drawn"


class Listing(FakeEngine):
    """Keeps the prompts of its requests."""

    def __init__(self):
        super().__init__()
        self.prompts = []

    def submit(self, request):
        self.prompts.append(request.prompt)
        return super().submit(request)


class Meeting(FakeEngine):
    """Draws a little later; notes which prompts were being drawn at the same time."""

    def __init__(self):
        super().__init__()
        self._open, self.met = set(), {}

    def submit(self, request):
        self._open.add(request.prompt)
        for prompt in self._open:
            self.met.setdefault(prompt, set()).update(self._open)
        future = Future()
        asyncio.get_running_loop().call_later(0.02, self._finish, request, future)
        return future

    def _finish(self, request, future):
        self._open.remove(request.prompt)
        future.set_result(super().submit(request).result())


class Refusing(FakeEngine):
    """Cannot go on after the prompt "refuse"."""

    def submit(self, request):
        if request.prompt != "refuse":
            return super().submit(request)
        future = Future()
        future.set_exception(ModelError("engine = out of memory: must fit into it."))
        return future


class Listening(LocalLiveness):
    """Keeps the calls of the drawing actors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def _call(self, method, *arguments):
        self.calls.append((method, *arguments))
        return super()._call(method, *arguments)

    def met(self):
        """Return for each shard those that were drawn at the same time."""
        together, met = set(), {}
        for method, *arguments in self.calls:
            if method == "begin":
                together.add(arguments[0])
                for each in together:
                    met.setdefault(each, set()).update(together)
            elif method == "end":
                together.remove(arguments[0])
        return met


def died(*shards):
    """Return a liveness in which each of `shards` was begun and never ended."""
    liveness = Listening()
    for shard in shards:
        liveness.state.begin(shard, HERE)
    return liveness


def request_of(rows, at):
    """Return what row `at` asks of the engine."""
    return Request(**{field.name: rows[field.name][at].as_py() for field in schema.SAMPLING})


def test_draw_keeps_every_row_in_order_when_some_fail():
    request_rows = requests(PROMPTS, tags=pa.array([["a"], [], None, ["b", "c"], ["d"]]))
    (rows,) = draw_rows(block(PROMPTS, tags=request_rows["tags"]))

    assert rows.schema == schema.failed(pa.schema([request_rows.schema.field("tags")]))
    unchanged = [name for name in rows.column_names if name in request_rows.column_names]
    unchanged.remove("error")
    assert rows.select(unchanged).equals(request_rows.select(unchanged))
    assert rows["error"].to_pylist() == [None, FAULT, None, FAULT, None]


def test_draw_gives_a_failed_row_no_image_and_a_drawn_row_all_of_it():
    (rows,) = draw_rows(block(PROMPTS))

    for row in rows.to_pylist():
        learned = [row["prompt_tokens"], row["prompt_truncated"], row["sha256"]]
        if row["error"]:
            assert (row["image"], learned) == (None, [None, None, None])
        else:
            file = row["image"]["bytes"]
            assert learned == [3, False, hashlib.sha256(file).hexdigest()]
            assert row["image"]["path"] == f"{row['key']}.jpg"
            assert read_parameters(file)["prompt"] == row["prompt"]


def test_draw_encodes_the_image_that_the_engine_drew():
    (rows,) = draw_rows(block(PROMPTS), image_format="png")

    for at in (0, 2, 4):
        drawn = FakeEngine().submit(request_of(rows, at)).result()
        file = io.BytesIO(rows["image"][at]["bytes"].as_py())
        assert np.array_equal(np.asarray(Image.open(file)), drawn.image)


def test_draw_submits_no_row_that_has_an_error():
    engine = Listing()
    (rows,) = draw_rows(
        block(PROMPTS, errors={0: "bad height", 3: "no prompt"}), engine=lambda: engine
    )

    assert engine.prompts == ["fail", "a blue dog", "a green dog"]
    assert rows["error"].to_pylist() == ["bad height", FAULT, None, "no prompt", None]


def test_draw_keeps_a_row_whose_values_are_no_request():
    """Reading leaves null where a value of the table was no number at all."""
    request_rows = requests(
        ("a dog", "a cat"), errors={0: "height = 'tall': must be a whole number"}
    )
    at = request_rows.schema.get_field_index("height")
    request_rows = request_rows.set_column(
        at, request_rows.schema.field("height"), pa.array([None, 8], pa.int32())
    )
    (rows,) = draw_rows(pack(with_shard(request_rows, planned(0))))

    assert rows["height"].to_pylist() == [None, 8]
    assert rows["error"].is_null().to_pylist() == [False, True]


def test_draw_fails_one_row_alone_when_its_image_cannot_be_encoded():
    """A row key from the table may be longer than a JPEG's segments can hold."""
    request_rows = requests(("a dog", "a cat"))
    at = request_rows.schema.get_field_index("row_key")
    request_rows = request_rows.set_column(
        at, request_rows.schema.field("row_key"), pa.array(["k" * 70_000, "1"])
    )
    (rows,) = draw_rows(pack(with_shard(request_rows, planned(0))))

    assert rows.num_rows == 2
    assert rows["error"][1].as_py() is None


def test_draw_ends_the_shard_when_the_engine_cannot_go_on():
    liveness = LocalLiveness()

    with pytest.raises(ModelError, match="engine = out of memory"):
        draw(block(["a dog", "refuse", "a cat"]), engine=Refusing, liveness=liveness)
    assert liveness.state.deaths(0) == []  # ended, and no death


def test_draw_says_why_when_its_engine_cannot_be_loaded():
    liveness = LocalLiveness()

    def refuse():
        raise ModelError("model.path = a dog: must be a model.")

    with pytest.raises(ModelError, match="must be a model"):
        drawing_actor(refuse, liveness=liveness)
    assert liveness.state.snapshot([]).rejected == "model.path = a dog: must be a model."
    assert liveness.state.snapshot([]).loaded_at == 0


def test_draw_lets_ray_try_again_when_loading_its_engine_fails_in_another_way():
    liveness = LocalLiveness()

    def fail():
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        drawing_actor(fail, liveness=liveness)
    assert liveness.state.snapshot([]).rejected is None


def test_draw_says_that_its_engine_is_ready():
    liveness = LocalLiveness()
    drawing_actor(liveness=liveness)

    assert liveness.state.snapshot([]).loaded_at > 0


class OpensLate(LocalLiveness):
    """Lets drawing begin at the third question of the actor; keeps the names of all calls."""

    def __init__(self):
        super().__init__(1)
        self.calls = []

    def _call(self, method, *arguments):
        self.calls.append(method)
        if self.calls.count("may_draw") == 3:
            self.state.open()
        return super()._call(method, *arguments)


def test_draw_begins_no_shard_before_the_output_is_ready():
    liveness = OpensLate()
    actor = drawing_actor(liveness=liveness)
    at_once(actor, [block(["a dog"], 0)])

    before = liveness.calls[: liveness.calls.index("begin")]
    assert before == ["loading", "loaded", *["may_draw"] * 3, "deaths"]
    at_once(actor, [block(["a cat"], 1)])
    assert liveness.calls.count("may_draw") == 3  # it asks no more


def test_draw_shares_one_engine_among_all_shards_in_flight():
    engine = Meeting()
    prompts = [[f"{shard}, {at}" for at in range(3)] for shard in range(4)]
    shards = draw_rows(*map(block, prompts, range(4)), engine=lambda: engine)

    assert [rows["prompt"].to_pylist() for rows in shards] == prompts
    every = {prompt for shard in prompts for prompt in shard}
    assert engine.met == dict.fromkeys(every, every)


def test_draw_gives_the_same_rows_when_a_shard_has_company():
    blocks = [block([f"{shard}, {at}" for at in range(3)], shard) for shard in range(4)]
    alone = [draw_rows(one)[0] for one in blocks]

    assert draw_rows(*blocks) == alone
    assert draw_rows(*reversed(blocks), engine=Meeting) == alone[::-1]


@pytest.mark.parametrize(
    ("dead", "together"),
    [
        ((2,), ["01", "2", "34"]),
        ((2,) * (MOST_DEATHS - 1), ["01", "2", "34"]),
        ((1, 2), ["0", "1", "2", "34"]),
        ((0, 4), ["0", "123", "4"]),
    ],
)
def test_draw_gives_a_shard_no_company_when_an_actor_died_during_it(dead, together):
    liveness = died(*dead)
    liveness.calls.clear()
    blocks = [block([f"{shard}, {at}" for at in range(3)], shard) for shard in range(5)]
    draw(*blocks, liveness=liveness)

    groups = [{int(shard) for shard in group} for group in together]
    assert liveness.met() == {shard: group for group in groups for shard in group}


def test_draw_lets_others_in_again_when_a_shard_alone_has_ended_with_an_error():
    stage = drawing_actor(Refusing, liveness=died(0))
    with pytest.raises(ModelError, match="out of memory"):
        at_once(stage, [block(["refuse"], 0)])

    assert len(at_once(stage, [block(["a dog"], 1)])) == 1


@pytest.mark.parametrize("image_format", ["jpg", "png"])
def test_draw_gives_the_same_rows_when_an_actor_died_during_a_shard(image_format):
    shard = block(PROMPTS, 3, errors={1: "bad height"})

    assert draw_rows(shard, liveness=died(3), image_format=image_format) == draw_rows(
        shard, image_format=image_format
    )


def test_draw_fails_a_row_alone_when_it_ends_its_process():
    (rows,) = draw_rows(block(["a dog", "a cat", "die"]), liveness=died(0))
    error = "Drawing this row ended its process with exit code 7."

    assert rows["error"].to_pylist() == [None, None, error]
    undisturbed = draw_rows(block(["a dog", "a cat", "a cow"]))[0]
    assert rows.slice(0, 2).equals(undisturbed.slice(0, 2))


def test_draw_ends_the_run_when_actors_died_too_often_during_a_shard_and_no_row_is_the_cause():
    with pytest.raises(
        ModelError, match=r"^Shard 000012: 10 drawing actors died during it, but no"
    ) as caught:
        draw(block(PROMPTS, 12), liveness=died(*[12] * MOST_DEATHS))
    assert "run the same command again to resume" in str(caught.value)


def test_draw_ends_a_child_when_the_run_has_stopped(tmp_path):
    liveness = died(0)

    def stop():
        wait_until((tmp_path / "began").exists)
        liveness.state.close()

    with ThreadPoolExecutor(1) as thread:
        thread.submit(stop)
        with pytest.raises(ModelError, match="The run has stopped"):
            draw(block(["stuck"]), engine=partial(engines.Stuck, tmp_path), liveness=liveness)


def test_draw_isolates_no_shard_when_the_node_of_its_dead_actor_is_gone():
    liveness = LocalLiveness()
    liveness.state.begin(0, "a node that is gone")
    (drawn,) = draw(block(PROMPTS), liveness=liveness)
    facts = facts_of(unpack(drawn))

    assert facts["attempt"] == 2
    assert "isolated" not in facts


def test_draw_reports_how_the_images_of_a_shard_ended():
    liveness = LocalLiveness()
    draw(block(PROMPTS, 0, errors={0: "bad height"}), block(PROMPTS, 1), liveness=liveness)
    snapshot = liveness.state.snapshot([])

    assert (snapshot.drawn, snapshot.failed) == (2 + 3, 3 + 2)
    assert liveness.state.deaths(0) == liveness.state.deaths(1) == []


def test_draw_reports_what_is_drawn_while_a_shard_is_still_being_drawn():
    """The last image is drawn only once a heartbeat has told of the others."""
    last = Future()

    class Waiting(FakeEngine):
        def submit(self, request):
            return last if request.prompt == "last" else super().submit(request)

    class Releasing(Listening):
        def _call(self, method, *arguments):
            if method == "beat" and arguments[1:3] == (2, 1) and not last.done():
                last.set_result(FakeEngine().submit(request_of(requests(["last"]), 0)).result())
            return super()._call(method, *arguments)

    liveness = Releasing()
    (rows,) = draw_rows(
        block(["a dog", "fail", "a cat", "last"], 7), engine=Waiting, liveness=liveness
    )

    assert rows["error"].is_null().to_pylist() == [True, False, True, True]
    assert ("beat", 7, 2, 1, 3) in liveness.calls


def test_draw_says_where_when_and_on_which_attempt_a_shard_was_drawn():
    (drawn,) = draw(block(PROMPTS, 5), liveness=died(5, 5))
    rows = unpack(drawn)
    facts = facts_of(rows)

    assert (drawn.num_rows, shard_of(rows).shard) == (1, 5)
    assert (facts["attempt"], facts["isolated"]) == (3, True)
    assert facts["host"]
    for name in ("began", "ended"):
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", facts[name])
    assert facts["began"] <= facts["ended"]


class DecodesAgain(FakeEngine):
    """Decodes "a" again."""

    def _draw(self, request):
        return replace(super()._draw(request), decoded_again=request.prompt == "a")


@pytest.mark.parametrize("deaths", [(), (5,)])
def test_rows_and_facts_say_which_images_were_decoded_again(deaths):
    shard = block(("a", "fail", "b", "a"), 5)
    (drawn,) = draw(shard, engine=DecodesAgain, liveness=died(*deaths))
    rows = unpack(drawn)
    assert rows["decoded_again"].to_pylist() == [True, None, False, True]
    assert facts_of(rows)["decoded_again"] == 2


def test_facts_of_a_shard_say_how_many_lanes_drew_it_and_how_its_engine_was_used():
    (drawn,) = draw(block(("a", "fail", "b")))
    facts = facts_of(unpack(drawn))
    assert facts["lanes"] == {"2": 2}
    assert facts["engine"]["ticks"] == 3
    assert {"seconds", "idle_seconds", "rows", "filled", "shrunk"} <= facts["engine"].keys()


def test_facts_of_a_shard_say_which_device_drew_it():
    class Known(FakeEngine):
        device = MappingProxyType({"kind": "cpu", "name": "a processor"})

    (drawn,) = draw(block(PROMPTS), engine=Known)
    assert facts_of(unpack(drawn))["device"] == {"kind": "cpu", "name": "a processor"}


def test_draw_reports_what_the_engine_of_a_child_does():
    liveness = died(0)
    (drawn,) = draw(block(PROMPTS), liveness=liveness)

    assert facts_of(unpack(drawn))["engine"]["ticks"] == len(PROMPTS)
    beats = [arguments for method, *arguments in liveness.calls if method == "beat"]
    assert beats[-1] == [0, 3, 2, len(PROMPTS)]


def test_draw_counts_no_death_when_the_engine_accepts_no_request():
    class Closed(FakeEngine):
        def submit(self, request):
            raise ModelError("The engine is closed and accepts no more requests.")

    liveness = LocalLiveness()
    with pytest.raises(ModelError, match="The engine is closed"):
        draw(block(["a dog"]), engine=Closed, liveness=liveness)
    assert liveness.state.deaths(0) == []


def test_draw_ends_with_the_error_when_its_results_fit_no_column():
    class Odd(FakeEngine):
        def _draw(self, request):
            return replace(super()._draw(request), prompt_tokens=2**40)

    with pytest.raises((pa.ArrowInvalid, OverflowError), match="too large to fit"):
        draw(block(["a dog"]), engine=Odd)
