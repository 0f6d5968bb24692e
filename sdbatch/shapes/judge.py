"""Compares a picture with its prompt, attribute by attribute."""

from collections.abc import Iterable

from sdbatch.shapes.parse import parse_prompt
from sdbatch.shapes.picture import Pixels
from sdbatch.shapes.vision import DetectedShape, PictureContent, read_picture
from sdbatch.shapes.world import PLACES, RELATIONS, Group, Scene

ATTRIBUTES = ("background", "colour", "shape", "count", "position", "size", "texture")
MIN_OFFSET = 0.08  # of the picture: the least distance that counts as "above" or "left of"

# Maps each attribute to whether it holds, or to None if the prompt leaves it open.
Verdict = dict[str, bool | None]


def judge_picture(prompt: str, picture: Pixels) -> Verdict | None:
    """Return for each attribute whether the picture shows what the prompt asks for.

    An attribute holds only if it holds for everything that the prompt says about it. The result is
    None if the prompt names no known shape.
    """
    scene = parse_prompt(prompt)
    return None if scene is None else compare_scene(scene, read_picture(picture))


def fidelity(verdict: Verdict) -> float:
    """Return the fraction of the requested attributes that hold, 0 to 1."""
    results = [holds for holds in verdict.values() if holds is not None]
    return sum(results) / len(results)


def compare_scene(scene: Scene, content: PictureContent) -> Verdict:
    """Compare the scene that a prompt requests with the content of a picture."""
    assignment = _assign_shapes(scene.groups, content.shapes)
    pairs = list(zip(scene.groups, assignment, strict=True))
    return {
        "background": _all_equal(scene.background, [content.background]),
        "colour": _combine(_all_equal(g.colour, [s.colour for s in shapes]) for g, shapes in pairs),
        "shape": _combine(_all_equal(g.shape, [s.shape for s in shapes]) for g, shapes in pairs),
        "count": _combine(None if g.count is None else len(s) == g.count for g, s in pairs),
        "position": _position_holds(scene, assignment),
        "size": _combine(_all_equal(g.size, [s.size for s in shapes]) for g, shapes in pairs),
        "texture": _combine(
            [
                _all_equal(scene.background_texture, [content.background_texture]),
                *(_all_equal(g.texture, [s.texture for s in shapes]) for g, shapes in pairs),
            ]
        ),
    }


def _assign_shapes(
    groups: tuple[Group, ...], shapes: tuple[DetectedShape, ...]
) -> list[list[DetectedShape]]:
    """Assign each shape to the group that it resembles most; a tie goes to the first group."""
    assignment: list[list[DetectedShape]] = [[] for _ in groups]
    for shape in shapes:
        similarity = [
            2 * (shape.colour == group.colour)
            + 2 * (shape.shape == group.shape)
            + (shape.size == group.size)
            for group in groups
        ]
        assignment[similarity.index(max(similarity))].append(shape)
    return assignment


def _all_equal(target: str | None, values: list[str]) -> bool | None:
    return None if target is None else bool(values) and all(value == target for value in values)


def _combine(results: Iterable[bool | None]) -> bool | None:
    """Return whether all results hold, ignoring None; None if there is no other result."""
    decisive = [holds for holds in results if holds is not None]
    return all(decisive) if decisive else None


def _position_holds(scene: Scene, assignment: list[list[DetectedShape]]) -> bool | None:
    if scene.place is None and scene.relation is None:
        return None
    if not all(assignment):
        return False
    if scene.place is not None:
        left, top, right, bottom = PLACES[scene.place]
        return all(left <= s.x <= right and top <= s.y <= bottom for s in assignment[0])
    (x0, y0), (x1, y1) = (([s.x for s in shapes], [s.y for s in shapes]) for shapes in assignment)
    # One offset for each relation, in the order of RELATIONS.
    offsets = (min(y1) - max(y0), min(y0) - max(y1), min(x1) - max(x0), min(x0) - max(x1))
    return dict(zip(RELATIONS, offsets, strict=True))[str(scene.relation)] >= MIN_OFFSET
