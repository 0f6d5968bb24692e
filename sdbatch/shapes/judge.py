"""Compares what a picture shows with what its prompt asks for, attribute by attribute."""

from collections.abc import Iterable

from sdbatch.shapes.parse import asked
from sdbatch.shapes.picture import Pixels
from sdbatch.shapes.vision import Sight, Thing, look
from sdbatch.shapes.world import PLACES, RELATIONS, Group, Scene

ATTRIBUTES = ("background", "colour", "shape", "count", "position", "size", "texture")
AHEAD = 0.08  # of the picture: so far the middle of what is above, or left of, another must be

Verdict = dict[str, bool | None]  # None: the prompt leaves it open


def judge(prompt: str, picture: Pixels) -> Verdict | None:
    """Say for each attribute whether the picture has what the prompt asks for.

    An attribute holds if it holds for everything the prompt says about it. None as a whole if the
    prompt names no shape of the world.
    """
    scene = asked(prompt)
    return None if scene is None else compare(scene, look(picture))


def fidelity(verdict: Verdict) -> float:
    """Return the part of the asked attributes that hold, 0 to 1."""
    held = [right for right in verdict.values() if right is not None]
    return sum(held) / len(held)


def compare(scene: Scene, sight: Sight) -> Verdict:
    """Compare a scene that was asked for with what was seen."""
    shares = _share_out(scene.groups, sight.things)
    pairs = list(zip(scene.groups, shares, strict=True))
    return {
        "background": _same(scene.background, [sight.background]),
        "colour": _all(_same(group.colour, [t.colour for t in share]) for group, share in pairs),
        "shape": _all(_same(group.shape, [t.shape for t in share]) for group, share in pairs),
        "count": _all(
            None if group.count is None else len(share) == group.count for group, share in pairs
        ),
        "position": _position(scene, shares),
        "size": _all(_same(group.size, [t.size for t in share]) for group, share in pairs),
        "texture": _all(
            [
                _same(scene.background_texture, [sight.background_texture]),
                *(_same(group.texture, [t.texture for t in share]) for group, share in pairs),
            ]
        ),
    }


def _share_out(groups: tuple[Group, ...], things: tuple[Thing, ...]) -> list[list[Thing]]:
    """Give each thing to the group that it is most like; to the first of equals."""
    shares: list[list[Thing]] = [[] for _ in groups]
    for thing in things:
        likeness = [
            2 * (thing.colour == group.colour)
            + 2 * (thing.shape == group.shape)
            + (thing.size == group.size)
            for group in groups
        ]
        shares[likeness.index(max(likeness))].append(thing)
    return shares


def _same(wanted: str | None, seen: list[str]) -> bool | None:
    return None if wanted is None else bool(seen) and all(value == wanted for value in seen)


def _all(parts: Iterable[bool | None]) -> bool | None:
    said = [part for part in parts if part is not None]
    return all(said) if said else None


def _position(scene: Scene, shares: list[list[Thing]]) -> bool | None:
    if scene.place is None and scene.relation is None:
        return None
    if not all(shares):
        return False
    if scene.place is not None:
        left, top, right, bottom = PLACES[scene.place]
        return all(left <= t.x <= right and top <= t.y <= bottom for t in shares[0])
    (x0, y0), (x1, y1) = (([t.x for t in share], [t.y for t in share]) for share in shares)
    gaps = (min(y1) - max(y0), min(y0) - max(y1), min(x1) - max(x0), min(x0) - max(x1))
    return dict(zip(RELATIONS, gaps, strict=True))[str(scene.relation)] >= AHEAD
