"""The text encoder: learns what captions ask for, as CLIP's had learnt it before the UNet began.

# B = captions, L = 77 tokens, D = 96 text width.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdbatch.shapes import captions, world
from sdbatch.shapes.world import Group, Scene
from training import scenes
from training.loop import Settings, train

SETTINGS = Settings(
    steps=4_000,
    batch=64,
    rate=1e-3,
    course=((0, 0.0), (200, 1.0), (2_999, 1.0), (3_000, 0.3), (4_000, 0.0)),
)
# From this step on things joined by "and" are said in the order in which it reads them: as said
# before, it could not tell which colour was whose.
IN_ORDER_FROM = 3_000
WIDTH = 96
ABSENT = "absent"  # second shape of a scene that has one group
# What there is to tell of a scene, in this order, and its values.
GROUP: tuple[Sequence[object], ...] = (
    (*world.SHAPES, ABSENT),
    list(world.COLOURS),
    range(1, world.MOST + 1),
    list(world.RADII),
    world.TEXTURES,
)
PLACES = (None, *world.PLACES, "above", "left of")
VALUES = (*GROUP, *GROUP, PLACES, list(world.COLOURS), world.BACKGROUND_TEXTURES)
UNTOLD = -100  # what cross entropy leaves out
# By shape and colour. Without the pairs that training never shows as wrong answers, or the encoder
# learns that a circle is not red, and does not believe a caption that says so.
HELD_OUT = torch.tensor(
    [
        [
            shape != ABSENT and world.is_held_out(Group(shape=str(shape), colour=colour))
            for colour in world.COLOURS
        ]
        for shape in GROUP[0]
    ]
)


def build(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return Stable Diffusion's text encoder in small."""
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            projection_dim=WIDTH,
            intermediate_size=4 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    # As large as what attention adds to them, or each word is drowned in the mean of all.
    torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=0.5)
    return encoder


def fit(tokenizer: CLIPTokenizer, folder: Path, settings: Settings) -> CLIPTextModel:
    """Train the text encoder to tell a scene's attributes from its caption; return it.

    What follows a caption's end has read all of it, and is most of what the UNet attends to: the
    attributes are read off its mean, by layers that are thrown away.
    """
    torch.manual_seed(settings.seed)
    encoder = build(tokenizer)
    readers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, len(values)) for values in VALUES)

    def loss(step: int) -> torch.Tensor:
        chance = random.Random(f"text-{settings.seed}-{step}")
        imagined = [scenes.imagine(chance) for _ in range(settings.batch)]
        in_order = step >= IN_ORDER_FROM
        said = [captions.say(scene, chance, in_order=in_order) for scene in imagined]
        ids = tokens(tokenizer, said)
        text = encoder(ids).last_hidden_state
        after = (ids == tokenizer.eos_token_id)[..., None]
        read = (text * after).sum(1) / after.sum(1)
        asked = torch.tensor([attributes(scene) for scene in imagined])
        return _difference([reader(read) for reader in readers], asked)

    train(torch.nn.ModuleList([encoder, readers]), loss, settings, folder)
    return encoder


def _difference(found: list[torch.Tensor], asked: torch.Tensor) -> torch.Tensor:
    """Return the cross entropy of what was found (each (B, values)) and asked (B, attributes)."""
    for shape in (0, len(GROUP)):
        colour = shape + 1
        of_colour = HELD_OUT[:, asked[:, colour].clamp(min=0)].T  # an absent shape is never one
        found[shape] = found[shape].masked_fill(of_colour, -torch.inf)
        found[colour] = found[colour].masked_fill(HELD_OUT[asked[:, shape]], -torch.inf)
    losses = map(torch.nn.functional.cross_entropy, found, asked.unbind(1))
    return torch.stack(list(losses)).sum()


def tokens(tokenizer: CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
    """Return the tokens of `prompts`; (B, 77)."""
    ids: torch.Tensor = tokenizer(
        prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def attributes(scene: Scene) -> list[int]:
    """Return the number of each attribute's value; of two groups the upper or left one first."""
    groups, where = list(scene.groups), scene.place
    if scene.relation in ("below", "right of"):
        groups.reverse()
    if scene.relation is not None:
        where = "above" if scene.relation in ("above", "below") else "left of"
    first, second = (*groups, None)[:2]
    rest = (where, scene.background, scene.background_texture)
    told = zip(VALUES[-3:], rest, strict=True)
    return [*_told(first), *_told(second), *(list(values).index(value) for values, value in told)]


def _told(group: Group | None) -> list[int]:
    if group is None:
        return [GROUP[0].index(ABSENT), *(UNTOLD for _ in GROUP[1:])]
    told = (group.shape, group.colour, group.count, group.size, group.texture)
    return [values.index(value) for values, value in zip(GROUP, told, strict=True)]
