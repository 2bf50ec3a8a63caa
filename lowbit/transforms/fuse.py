"""Applying fitted transforms to a model: whole, or one block at a time as the executor does."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lowbit.errors import InputError
from lowbit.models.spaces import SPACES, Adapter
from lowbit.transforms.cost import Costs
from lowbit.transforms.learned import LearnedRotation, LearnRotation
from lowbit.transforms.maps import LearnMap, Map
from lowbit.transforms.norms import centre_embedding, centre_writer, fold
from lowbit.transforms.online import OnlineTransform
from lowbit.transforms.rotation import Rotate, Rotation
from lowbit.transforms.scale import Ones, Scale


@dataclass(frozen=True)
class FoldNorms:
    """Fold the gain of every norm, and what else a LayerNorm does, into the tensors around it
    (lowbit/transforms/norms.py); the gain becomes 1."""


@dataclass(frozen=True)
class FittedTransforms:
    """The transforms of a recipe that take no calibration, fitted to one model; and its scales and
    maps, which the executor fits block by block, the maps as they begin.

    left_out  what the architecture cannot have of the recipe's transforms, and why
    """

    adapter: Adapter
    fold_norms: bool
    rotations: tuple[Rotation | LearnedRotation, ...]
    scales: tuple[Scale, ...] = ()
    maps: tuple[Map, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def learned(self) -> dict[str, LearnedRotation]:
        """The rotations that are learned, by space."""
        return {r.space: r for r in self.rotations if isinstance(r, LearnedRotation)}

    def with_learned(self, learned: dict[str, LearnedRotation]) -> "FittedTransforms":
        """With these in place of its own."""
        return replace(
            self,
            rotations=tuple(
                learned[r.space] if isinstance(r, LearnedRotation) else r for r in self.rotations
            ),
        )

    @property
    def input_transforms(self) -> dict[str, OnlineTransform]:
        """linear -> the online transform in front of it."""
        online = replace(self, rotations=(*self.rotations, *self.maps))._online(0)
        return {name: rotation.base for name, rotation in online.items()}

    @property
    def query_key(self) -> OnlineTransform | None:
        rotation = self.query_key_at(0)
        return rotation and rotation.base

    def query_key_at(self, index: int) -> Rotation | None:
        """The rotation of q and k in block `index`."""
        return next((r.at(index) for r in self.rotations if r.space == "query_key"), None)

    def learned_matrices(self, index: int) -> dict[str, tuple[Tensor, ...]]:
        """What lowbit.nn.OnlineMap.assign takes in block `index`: by linear, and for q and k by the
        name of the attention."""
        online = self._online(index)
        rotation = self.query_key_at(index)
        if rotation is not None:
            online[self.adapter.attention] = rotation
        return {name: rotation.learned for name, rotation in online.items() if rotation.learned}

    def _online(self, index: int) -> dict[str, Rotation]:
        """linear -> the rotation in front of it, in block `index`."""
        spaces = self.adapter.spaces
        return {
            reader: rotation.at(index)
            for rotation in self.rotations
            if not spaces[rotation.space].writers
            for reader in spaces[rotation.space].readers
        }

    def hook_online(self, block: nn.Module, index: int) -> list:
        """Forward pre-hooks that rotate linears' inputs in the still unquantized block `index`;
        their handles."""
        return [
            block.get_submodule(name).register_forward_pre_hook(_rotate_input(rotation))
            for name, rotation in self._online(index).items()
        ]

    def fuse_block(self, block: nn.Module, index: int):
        """Fuse into the tensors of block `index`, in place, computing in fp64."""
        if self.fold_norms:
            for norm in self.adapter.norms:
                fold(block, norm)
            if self.adapter.layer_norms:
                for name in self.adapter.spaces["residual"].writers:
                    centre_writer(block.get_submodule(name))
        for rotation in self.rotations:
            space = self.adapter.spaces[rotation.space]
            for name in space.fused_readers if space.writers else space.readers:
                rotation.at(index).fuse_reader(block.get_submodule(name))
            for name in space.writers:
                rotation.at(index).fuse_writer(block.get_submodule(name), space)

    def fuse_ends(self, model: nn.Module):
        """Fuse into the embedding, the final norm and the head; unties a tied head first."""
        if not (self.fold_norms or self.rotations):
            return
        untie(model)
        if self.fold_norms:
            fold(model, self.adapter.final_norm)
            if self.adapter.layer_norms:
                embedding = self.adapter.spaces["residual"].embedding
                centre_embedding(model.get_submodule(embedding))
        for rotation in self.rotations:
            space = self.adapter.spaces[rotation.space]
            if space.embedding:
                rotation.at(0).fuse_embedding(model.get_submodule(space.embedding))
            if space.head:
                rotation.at(0).fuse_reader(model.get_submodule(space.head))

    def apply(self, model: nn.Module):
        """To a float model, in place: same function, rotated insides; what is online runs in
        forward pre-hooks. For tests and figures: the executor does the same block by block."""
        self.fuse_ends(model)
        for index, block in enumerate(model.get_submodule(self.adapter.block_path)):
            self.fuse_block(block, index)
            self.hook_online(block, index)

    def report(self) -> list[str]:
        folded = ["norms folded into the linears that read them"] if self.fold_norms else []
        fitted = [str(transform) for transform in (*self.rotations, *self.scales, *self.maps)]
        return [*folded, *fitted, *self.left_out]


def fit(
    transforms: tuple, adapter: Adapter, seed: int, costs: Costs | None = None
) -> FittedTransforms:
    """Fit a recipe's transforms; random choices come from `seed` alone. costs: of what is learned
    and runs online, where that was measured."""
    transforms = tuple(each for transform in transforms for each in _each(transform, adapter))
    reasons = [(transform, _why_not(transform, adapter)) for transform in transforms]
    transforms = tuple(t for t, reason in reasons if reason is None)
    left_out = tuple(
        f"{t.space}: {type(t).__name__} left out, {reason}" for t, reason in reasons if reason
    )
    generator = torch.Generator().manual_seed(seed)
    rotations = []
    for transform in transforms:
        if isinstance(transform, Rotate):
            rotations.append(transform.fit(adapter.of_rank(transform.space), generator))
        if isinstance(transform, LearnRotation):
            rotations.append(transform.fit(adapter.of_rank(transform.space), generator, costs))
    fold_norms = any(isinstance(t, FoldNorms) for t in transforms)
    if not fold_norms and any(r.space == "residual" for r in rotations):
        raise InputError("a rotation of the residual stream needs FoldNorms before it")
    scales = tuple(t for t in transforms if isinstance(t, Scale))
    fitted = FittedTransforms(adapter, fold_norms, tuple(rotations), scales)
    rotated = fitted.input_transforms.keys()
    for scale in scales:
        both = rotated & set(adapter.spaces[scale.space].readers)
        if both:
            raise InputError(
                f"a scale of {scale.space} cannot be fused behind the online rotation of "
                f"{', '.join(sorted(both))}'s input: leave out one of the two"
            )
    maps = tuple(t.fit(adapter.of_rank(t.space)) for t in transforms if isinstance(t, LearnMap))
    taken = set(rotated)
    for start in maps:
        space = adapter.spaces[start.space]
        readers = set() if space.writers else set(space.readers)
        if taken & readers:
            raise InputError(
                f"a map of {start.space} would run online in front of "
                f"{', '.join(sorted(taken & readers))}, where something else does: leave out one"
            )
        taken |= readers
    return replace(fitted, maps=maps, left_out=left_out)


def _each(transform, adapter: Adapter) -> tuple:
    """What a recipe asks for by the name of a space, of the spaces that the adapter has by it."""
    if isinstance(transform, FoldNorms):
        return (transform,)
    if transform.space not in SPACES:
        raise InputError(f"space must be one of {', '.join(SPACES)}, got {transform.space!r}")
    return tuple(replace(transform, space=space) for space in adapter.each(transform.space))


def _why_not(transform, adapter: Adapter) -> str | None:
    """What keeps an architecture from having this transform; None: nothing."""
    if isinstance(transform, FoldNorms):
        return None
    space = adapter.spaces.get(transform.space)
    if space is None:
        return "the architecture has no such space"
    if isinstance(transform, Scale) and not space.scale_writers:
        return "nothing that writes it can be divided"
    if isinstance(transform, Scale) and not (space.readers or isinstance(transform.fit, Ones)):
        raise InputError(
            f"a scale of {transform.space} is learned, not fitted: fit must be Ones, got "
            f"{transform.fit}"
        )
    return None


def untie(model: nn.Module):
    """Give a tied head a weight of its own: folding and rotating change the two differently."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(embedding.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = False


def _rotate_input(rotation: Rotation):
    return lambda module, args: (rotation.apply(args[0]), *args[1:])


def rotate(model: nn.Module, transforms: tuple, adapter: Adapter, seed: int) -> FittedTransforms:
    """Fit a recipe's transforms and apply them to a float model, in place."""
    fitted = fit(transforms, adapter, seed)
    fitted.apply(model)
    return fitted
