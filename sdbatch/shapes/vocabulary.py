"""The words for each part of a scene.

The first name of each list is the most common one in training captions.
"""

SHAPES = {  # in the singular; see `plural`
    "circle": ("circle", "disc", "ball", "dot"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "heart": ("heart",),
    "diamond": ("diamond", "rhombus"),
    "cross": ("cross", "plus sign", "plus"),
    "ring": ("ring", "donut", "doughnut"),
    "moon": ("moon", "crescent", "crescent moon", "half moon"),
}
COLOURS = {
    "red": ("red",),
    "orange": ("orange",),
    "yellow": ("yellow",),
    "green": ("green",),
    "cyan": ("cyan", "turquoise", "light blue"),
    "blue": ("blue",),
    "purple": ("purple", "violet"),
    "pink": ("pink",),
    "black": ("black",),
    "white": ("white",),
    "gray": ("gray", "grey"),
}
COUNTS = {
    1: ("one", "a single", "1"),
    2: ("two", "a pair of", "2"),
    3: ("three", "3"),
    4: ("four", "4"),
    5: ("five", "5"),
}
SIZES = {
    "small": ("small", "little", "tiny"),
    "medium": ("medium", "medium-sized"),
    "large": ("large", "big", "huge"),
}
TEXTURES = {
    "plain": ("plain", "solid"),
    "striped": ("striped", "stripy"),
    "spotted": ("spotted", "dotted", "polka-dot"),
    "checked": ("checked", "checkered", "chequered"),
}
# Phrases that follow the noun, instead of an adjective before it.
TEXTURE_SUFFIXES = {"striped": ("with stripes",), "spotted": ("with spots", "with dots")}
BACKGROUNDS = ("background", "backdrop")
PLACES = {
    "top left": ("top left", "upper left", "top left corner", "upper left corner"),
    "top": ("top", "upper part", "top edge"),
    "top right": ("top right", "upper right", "top right corner", "upper right corner"),
    "left": ("left", "left side", "left-hand side"),
    "center": ("center", "middle", "centre"),
    "right": ("right", "right side", "right-hand side"),
    "bottom left": ("bottom left", "lower left", "bottom left corner", "lower left corner"),
    "bottom": ("bottom", "lower part", "bottom edge"),
    "bottom right": ("bottom right", "lower right", "bottom right corner", "lower right corner"),
}
RELATIONS = {
    "above": ("above", "over", "on top of"),
    "below": ("below", "under", "beneath", "underneath"),
    "left of": ("to the left of", "left of", "on the left of"),
    "right of": ("to the right of", "right of", "on the right of"),
}
RELATION_PLACES = {  # the places of two groups that express their relation
    "above": ("top", "bottom"),
    "below": ("bottom", "top"),
    "left of": ("left", "right"),
    "right of": ("right", "left"),
}
OPENINGS = ("a picture of", "an image of", "a drawing of", "picture of", "there is", "show me")


def plural(name: str) -> str:
    """Return the plural of a shape's name: it adds "es" after s and x, otherwise "s"."""
    return name + ("es" if name.endswith(("s", "x")) else "s")
