"""Recipe: a published method as data, and how its fields are changed by name."""

import ast
from dataclasses import dataclass, field, fields, is_dataclass, replace

from lowbit.distribution import Distribution
from lowbit.errors import InputError
from lowbit.flattening import Flattening
from lowbit.formats import QuantFormat
from lowbit.rounding import GPTQ, RTN, Rounder
from lowbit.training import Training
from lowbit.transforms import FoldNorms, LearnMap, LearnRotation, Rotate, Scale


@dataclass(frozen=True)
class Calibration:
    """Random windows of a text: `samples` of `length` tokens each."""

    samples: int = 128
    length: int = 2048


@dataclass(frozen=True)
class Recipe:
    """Transforms in order, how weights are rounded, clip ratios of the dynamic quantizers.

    reproduces  (source, method) or (source, method, weight_method): the rows it stands for of
                lowbit/data/published_tables.csv
    training    how learned rotations are learned
    flattening  how maps are learned, scales further, and clips of weights, inputs and KV, which
                take the place of the recipe's clips; for rounders that take grids
    tensor_parallel  how many ranks may share out the model: what is rotated or scaled online stays
                inside the slice of each
    The clips map a bit width to a ratio; widths not named keep the whole range (1.0).
    """

    name: str
    summary: str
    source: str
    rounding: Rounder
    transforms: tuple[FoldNorms | Rotate | LearnRotation | LearnMap | Scale, ...] = ()
    activation_clip: dict[int, float] = field(default_factory=dict)
    kv_clip: dict[int, float] = field(default_factory=dict)
    calibration: Calibration = Calibration()
    training: Training | Distribution | None = None
    flattening: Flattening | None = None
    tensor_parallel: int = 1
    reproduces: tuple[tuple[str, ...], ...] = ()

    def __post_init__(self):
        if self.tensor_parallel < 1:
            raise InputError(f"tensor_parallel must be at least 1, got {self.tensor_parallel}")
        if self.flattening is None and any(isinstance(t, LearnMap) for t in self.transforms):
            raise InputError(f"recipe {self.name} has a LearnMap: flattening must be given")
        if self.flattening is not None and not isinstance(self.rounding, RTN | GPTQ):
            raise InputError(
                "flattening learns the ranges of weights: rounding must be RTN, GPTQ, GPTAQ or "
                f"Qronos, got {type(self.rounding).__name__}"
            )

    def clips(self, format: QuantFormat) -> tuple[float, float]:
        """(activation clip, KV clip) for a format."""
        bits = [None if f is None else f.bits for f in (format.activation, format.kv)]
        return self.activation_clip.get(bits[0], 1.0), self.kv_clip.get(bits[1], 1.0)

    @property
    def scales(self) -> tuple[Scale, ...]:
        return tuple(t for t in self.transforms if isinstance(t, Scale))


FIXED = ("name", "summary", "source", "reproduces")  # what a recipe is called, not what it does


def overridden(recipe: Recipe, settings: list[str]) -> Recipe:
    """The recipe with fields changed: "rounding.damp=0.05", "transforms.0.fit.alpha=0.7".

    A part of a path is a field, an index of `transforms` or a bit width of a clip. Values are
    Python literals, or words. An unknown field is an InputError that lists the known ones, a value
    of another type one that names the type.
    """
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise InputError(f"--set must be FIELD=VALUE, got {setting!r}")
        recipe = _changed(recipe, path.strip().split("."), _value(text.strip()), setting)
    return recipe


def overridden_where_known(recipes: list[Recipe], settings: list[str]) -> list[Recipe]:
    """Each with the settings it has a field for; one that none has is the first recipe's error."""
    for setting in settings:
        path = setting.partition("=")[0]
        having = [path in settings_of(recipe) for recipe in recipes]
        having[0] |= not any(having)
        recipes = [
            overridden(recipe, [setting]) if has else recipe
            for recipe, has in zip(recipes, having, strict=True)
        ]
    return recipes


def settings_of(recipe: Recipe) -> dict:
    """Every field that `overridden` changes, by its path."""

    def leaves(owner, path: str):
        children = _children(owner)
        if not children and not isinstance(owner, dict | tuple):
            yield path, owner
        for name, child in children.items():
            yield from leaves(child, f"{path}.{name}" if path else name)

    return dict(leaves(recipe, ""))


def _value(text: str):
    try:
        return ast.literal_eval({"true": "True", "false": "False"}.get(text, text))
    except (ValueError, SyntaxError):
        return text


def _changed(owner, path: list[str], value, setting: str):
    """`owner` with what `path` leads to replaced."""
    name, *rest = path
    children = _children(owner)
    if name not in children and isinstance(owner, dict) and name.isdigit():
        children[name] = 1.0  # a clip for a bit width that had none
    if name not in children:
        known = ", ".join(children) or f"nothing inside a {type(owner).__name__}"
        raise InputError(f"--set {setting}: unknown field {name!r}, expected one of {known}")
    old = children[name]
    new = _changed(old, rest, value, setting) if rest else _checked(old, value, setting)
    if isinstance(owner, dict):
        return {**owner, int(name): new}
    if isinstance(owner, tuple):
        return tuple(new if str(i) == name else item for i, item in enumerate(owner))
    return replace(owner, **{name: new})


def _children(owner) -> dict:
    if isinstance(owner, dict):
        return {str(key): value for key, value in owner.items()}
    if isinstance(owner, tuple):
        return {str(i): value for i, value in enumerate(owner)}
    if is_dataclass(owner):
        names = [f.name for f in fields(owner) if f.name not in FIXED]
        return {name: getattr(owner, name) for name in names}
    return {}


def _checked(old, value, setting: str):
    if old is None:  # the class of the owner says what may be there
        return value
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(old) or _children(old):
        wanted = "a field of it" if _children(old) else f"a {type(old).__name__}"
        raise InputError(f"--set {setting}: expected {wanted}, got {value!r}")
    return value
