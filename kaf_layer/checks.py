"""Checks of arguments, with messages that name them.

They look at types and shapes only, except for ``raise_where``. None makes a GPU wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Annotated, NoReturn

import torch
from torch import Tensor, nn

from kaf_layer.keypoints import Keypoints

__all__ = [
    "check_counts",
    "check_features",
    "check_floats",
    "check_keypoints",
    "check_precision",
    "check_tensors",
    "check_tokens",
    "raise_torchscript_error",
    "raise_where",
]


def check_tensors(**tensors: Tensor) -> None:
    """Checks that arguments are tensors of real numbers.

    Raises:
        TypeError: if one is not a tensor.
        ValueError: if one is complex.
        RuntimeError: under ``torch.jit.trace``, which would freeze sizes and positions.

    Example:
        >>> check_tensors(features=None)
        Traceback (most recent call last):
            ...
        TypeError: features must be a tensor, got NoneType
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        raise_torchscript_error()
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
        if value.is_complex():
            raise ValueError(f"{name} must be real, got {value.dtype}")


def raise_torchscript_error() -> NoReturn:
    """Says what to call instead.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "torch.jit can neither trace nor script keypoints, nor can torch.onnx.export(dynamo=False): use "
        "torch.export.export, or torch.onnx.export(dynamo=True)"
    )


def check_floats(**tensors: Tensor) -> None:
    """Checks that arguments are tensors of floating-point numbers.

    Raises:
        TypeError: if one is not a tensor.
        ValueError: if one has another type.
    """
    check_tensors(**tensors)
    for name, value in tensors.items():
        if not value.is_floating_point():
            raise ValueError(f"{name} must be floating point (call .float()), got {value.dtype}")


def check_precision(module: nn.Module, **tensors: Tensor) -> None:
    """Checks that tensors have the type of a module's weights, or that autocast converts them to it.

    Raises:
        TypeError: if one is not a tensor.
        ValueError: if one has another type.
    """
    check_floats(**tensors)
    # The first weight stands for all: a submodule may have been replaced by one that hides its weights.
    weight = next((weight for weight in module.parameters() if weight.is_floating_point()), None)
    for name, value in tensors.items():
        if weight is not None and value.dtype != weight.dtype and not _autocasts(value, weight):
            raise ValueError(
                f"{name} must be of the weights' type {weight.dtype} (call .to(), or the module within "
                f"torch.autocast), got {value.dtype}"
            )


def _autocasts(value: Tensor, weight: Tensor) -> bool:
    """Whether autocast converts a value and weights to one type: not double precision, nor the other half precision."""
    device = value.device.type
    if not torch.is_autocast_enabled(device) or weight.dtype == torch.float64:
        return False
    return value.dtype in (torch.float32, torch.get_autocast_dtype(device))


def raise_where(bad: Annotated[Tensor, "B *"], message: str, *, of: str = "samples") -> None:
    """Raises if any value is bad. Unlike the other checks it looks at values, but no accelerator waits for it.

    Args:
        bad: (B, ...) bool.
        message: what is wrong, and what to do.
        of: what the first axis counts.

    Raises:
        ValueError: on the CPU, with the numbers of the samples. On CUDA the message comes as a device-side
            assertion, and in compiled code as a RuntimeError, both without the numbers.

    Example:
        >>> raise_where(torch.tensor([False, True]), "embeddings must be finite")
        Traceback (most recent call last):
            ...
        ValueError: embeddings must be finite, got other values in samples [1]
    """
    if bad.device.type == "cpu" and not torch.compiler.is_compiling():
        if bad.any():
            raise ValueError(f"{message}, got other values in {of} {sorted(set(bad.nonzero()[:, 0].tolist()))}")
    elif bad.device.type in ("cpu", "cuda"):  # other devices know no asynchronous assertion
        torch._assert_async(~bad.any(), message)


def check_counts(*, least: int = 1, **numbers: int) -> None:
    """Checks that options are whole numbers of at least a given size.

    Raises:
        ValueError: if one is not.

    Example:
        >>> check_counts(depth=-1, least=0)
        Traceback (most recent call last):
            ...
        ValueError: depth must be a whole number, 0 or more, got depth=-1
    """
    for name, value in numbers.items():
        if not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name} must be a whole number, {least} or more, got {name}={value!r}")


def check_keypoints(**keypoints: Keypoints) -> None:
    """Checks that arguments are batches of keypoints.

    Raises:
        TypeError: if one is not ``Keypoints``, or does not hold tensors.
        ValueError: if one has no batch axis.
    """
    for name, value in keypoints.items():
        if not isinstance(value, Keypoints):
            raise TypeError(f"{name} must be Keypoints, got {type(value).__name__}")
        for field in (value.positions, value.valid):
            if not isinstance(field, Tensor):
                raise TypeError(f"{name} must hold tensors, got {type(field).__name__} for its positions or valid")
        if torch.finfo(value.positions.dtype).eps * max(value.image_size) > 0.5:
            raise ValueError(
                f"{name} must have positions that tell pixels apart, in float32 (did something cast them? FSDP2 does "
                f"unless MixedPrecisionPolicy(cast_forward_inputs=False)), got {value.positions.dtype} for an image "
                f"of {tuple(value.image_size)}"
            )
        if value.positions.ndim != 3:
            raise ValueError(f"{name} must be a batch, positions (B, N, D), got {value.positions.shape=}")


def check_tokens(
    tokens: Annotated[Tensor, "B N C"],
    keypoints: Keypoints,
    *,
    channels: int | None = None,
    side: str = "",
) -> None:
    """Checks that there is a token for every slot of the keypoints.

    Args:
        tokens: the tokens of the keypoints.
        keypoints: a batch of keypoints.
        channels: the number of channels that the tokens must have; any number if None.
        side: a suffix of the arguments' names in messages, such as "_a".

    Raises:
        TypeError: if an argument has another type.
        ValueError: if shapes or types of numbers do not fit.
    """
    check_floats(**{f"tokens{side}": tokens})
    check_keypoints(**{f"keypoints{side}": keypoints})
    if tokens.ndim != 3 or tokens.shape[:2] != keypoints.valid.shape:
        raise ValueError(
            f"tokens{side} must be (B, N, C), one for each slot of the keypoints, "
            f"got {tokens.shape=} and {keypoints.valid.shape=}"
        )
    if channels is not None and tokens.shape[2] != channels:
        raise ValueError(f"tokens{side} must have {channels} channels, got {tokens.shape=}")


def check_features(features: Annotated[Tensor, "B C *S"], keypoints: Keypoints) -> None:
    """Checks that a feature map can belong to the image that the keypoints were detected on.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if the numbers of axes or the batch sizes differ, or if an axis of the map is
            not the image's, divided or multiplied by a whole number and rounded up or down. Under a
            compiler sizes are not compared.
    """
    check_tensors(features=features)
    check_keypoints(keypoints=keypoints)
    size, image_size = features.shape[2:], keypoints.image_size
    if len(size) != len(image_size):
        raise ValueError(
            f"features must be (B, C, *S) with the {len(image_size)} spatial axes of the keypoints' image, "
            f"got {features.shape=} and {keypoints.image_size=}"
        )
    if features.shape[0] != keypoints.positions.shape[0]:  # len() would make the batch size a constant under export
        raise ValueError(
            "features and keypoints must have the same batch size, "
            f"got {features.shape=} and {keypoints.positions.shape=}"
        )
    # Under a compiler sizes may be symbols, and each comparison would specialise the graph.
    if torch.compiler.is_compiling():
        return
    if not _is_scaled(image_size, size) and not _is_scaled(size, image_size):
        raise ValueError(
            "features must be a map of the keypoints' image, each axis divided by a whole stride "
            "(are H and W swapped, or does a convolution lack padding?), "
            f"got {features.shape=} and {keypoints.image_size=}"
        )


def _is_scaled(large: Sequence[int], small: Sequence[int]) -> bool:
    """Whether each axis of ``small`` is that of ``large`` divided by a whole number, rounded up or down."""
    return all(
        s > 0 and any(abs(a - s * stride) < stride for stride in (a // s, a // s + 1) if stride)
        for a, s in zip(large, small, strict=True)
    )
