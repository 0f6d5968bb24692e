"""The text encoder, which learns the meaning of captions before the UNet's training starts.

CLIP's text encoder was trained before Stable Diffusion's UNet, too.

Shapes: B captions, L = 77 tokens, D = 96 text width.
"""

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdbatch.shapes import world
from sdbatch.shapes.captions import write_caption
from sdbatch.shapes.world import Group, Scene
from training import scenes
from training.loop import Settings, train

SETTINGS = Settings(
    steps=4_000,
    batch=64,
    rate=1e-3,
    rate_schedule=((0, 0.0), (200, 1.0), (2_999, 1.0), (3_000, 0.3), (4_000, 0.0)),
)
# From this step on, captions name groups joined by "and" in reading order, which is the order of
# the attributes. With captions in any order, the encoder cannot tell which colour belongs to which
# shape.
READING_ORDER_FROM = 3_000
WIDTH = 96
ABSENT = "absent"  # the second shape of a scene with one group
# The attributes of a group and of a scene, in order, and the values of each.
GROUP_VALUES: tuple[Sequence[object], ...] = (
    (*world.SHAPES, ABSENT),
    list(world.COLOURS),
    range(1, world.MAX_COUNT + 1),
    list(world.RADII),
    world.TEXTURES,
)
POSITIONS = (None, *world.PLACES, "above", "left of")
SCENE_VALUES = (
    *GROUP_VALUES,
    *GROUP_VALUES,
    POSITIONS,
    list(world.COLOURS),
    world.BACKGROUND_TEXTURES,
)
IGNORE_INDEX = -100  # cross entropy skips this target
# Shapes x colours: whether the pair is held out. The loss does not count these pairs as wrong
# answers. Otherwise the encoder learns that a circle is never red, and misreads captions that say
# it is.
HELD_OUT_PAIRS = torch.tensor(
    [
        [
            shape != ABSENT and world.is_held_out(Group(shape=str(shape), colour=colour))
            for colour in world.COLOURS
        ]
        for shape in GROUP_VALUES[0]
    ]
)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return a small version of Stable Diffusion's text encoder."""
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
    # As large as the output of attention. Smaller embeddings vanish in the mean of all words.
    torch.nn.init.normal_(encoder.get_input_embeddings().weight, std=0.5)
    return encoder


def train_text_encoder(tokenizer: CLIPTokenizer, folder: Path, settings: Settings) -> CLIPTextModel:
    """Train the text encoder to predict a scene's attributes from its caption; return it.

    Linear heads predict the attributes from the mean of the end-of-text tokens, and are discarded
    afterwards. These tokens have seen the whole caption, and the UNet attends mostly to them.
    """
    torch.manual_seed(settings.seed)
    encoder = build_text_encoder(tokenizer)
    heads = torch.nn.ModuleList(torch.nn.Linear(WIDTH, len(values)) for values in SCENE_VALUES)

    def loss(step: int) -> torch.Tensor:
        rng = random.Random(f"text-{settings.seed}-{step}")
        batch = [scenes.random_scene(rng) for _ in range(settings.batch)]
        reading_order = step >= READING_ORDER_FROM
        captions = [write_caption(scene, rng, reading_order=reading_order) for scene in batch]
        ids = tokenize(tokenizer, captions)
        text = encoder(ids).last_hidden_state
        is_end = (ids == tokenizer.eos_token_id)[..., None]
        embedding = (text * is_end).sum(1) / is_end.sum(1)
        targets = torch.tensor([attribute_indices(scene) for scene in batch])
        return _attribute_loss([head(embedding) for head in heads], targets)

    train(torch.nn.ModuleList([encoder, heads]), loss, settings, folder)
    return encoder


def _attribute_loss(logits: list[torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    """Return the sum of the attributes' cross entropies.

    Args:
        logits: (B, values) for each attribute; entries of held-out pairs are replaced.
        targets: (B, attributes), indices of the values.
    """
    for shape in (0, len(GROUP_VALUES)):
        colour = shape + 1
        # An absent shape has no colour and uses index 0 here; ABSENT itself is never masked.
        shape_mask = HELD_OUT_PAIRS[:, targets[:, colour].clamp(min=0)].T
        logits[shape] = logits[shape].masked_fill(shape_mask, -torch.inf)
        logits[colour] = logits[colour].masked_fill(HELD_OUT_PAIRS[targets[:, shape]], -torch.inf)
    losses = map(torch.nn.functional.cross_entropy, logits, targets.unbind(1))
    return torch.stack(list(losses)).sum()


def tokenize(tokenizer: CLIPTokenizer, prompts: list[str]) -> torch.Tensor:
    """Return the token ids of `prompts`; (B, 77)."""
    ids: torch.Tensor = tokenizer(
        prompts, padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def attribute_indices(scene: Scene) -> list[int]:
    """Return the index of each attribute's value in SCENE_VALUES.

    Of two groups, the upper or left one is first.
    """
    groups, position = list(scene.groups), scene.place
    if scene.relation in ("below", "right of"):
        groups.reverse()
    if scene.relation is not None:
        position = "above" if scene.relation in ("above", "below") else "left of"
    first, second = (*groups, None)[:2]
    attributes = (position, scene.background, scene.background_texture)
    pairs = zip(SCENE_VALUES[-3:], attributes, strict=True)
    return [
        *_group_indices(first),
        *_group_indices(second),
        *(list(values).index(value) for values, value in pairs),
    ]


def _group_indices(group: Group | None) -> list[int]:
    if group is None:
        return [GROUP_VALUES[0].index(ABSENT), *(IGNORE_INDEX for _ in GROUP_VALUES[1:])]
    attributes = (group.shape, group.colour, group.count, group.size, group.texture)
    return [values.index(value) for values, value in zip(GROUP_VALUES, attributes, strict=True)]
