"""KAFBackbone: a network with KAF layers behind some of its submodules."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Collection, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_unflatten

from kaf_layer.checks import check_keypoints, raise_torchscript_error
from kaf_layer.detection import KeypointDetector
from kaf_layer.interop.forms import Form, TokenGrid, find_map
from kaf_layer.interop.submodules import check_names, find_image, find_submodules, layer_key, signature_of
from kaf_layer.keypoints import Keypoints
from kaf_layer.layer import KAFLayer

__all__ = ["KAFBackbone"]


class KAFBackbone(nn.Module):
    """A network with KAF layers behind some of its submodules; [attach][kaf_layer.interop.attach.attach] makes it.

    Call it like the network: it takes the same arguments and returns the same output. With ``keypoints=...`` it
    does not detect them. ``inspect.signature(model.forward)`` is the network's own, plus ``keypoints=None``. Any number
    of threads may call one model, and ``nn.DataParallel`` may replicate it.

    Everything else of the network, such as ``config``, is an attribute of ``model.backbone``. This includes
    ``save_pretrained``, which saves the network without its layers and warns about it. Called directly,
    ``model.backbone`` is the network without layers, and ``model.backbone.load_state_dict`` takes a checkpoint of the
    network. The state dict of the model has the network's weights under ``backbone.`` and the layers' under
    ``layers.``, where dots in the submodules' names become underscores. To train only the layers, freeze
    ``model.backbone``.

    ``torch.utils.checkpoint`` may wrap the whole model, or parts of the network without a layer. Around a layer it
    would not know the keypoints. For the layers' own activations use ``recompute=True``.

    Args:
        backbone: the network.
        layers: the layers by the names of their submodules, each with ``fusion="add"``.
        detector: finds keypoints in the image.
        image: the name of the argument of ``backbone.forward`` that is the image; None means its first argument that
            is a tensor.
        channels_last: the names of the submodules whose maps are (B, *S, C).
        tokens: the layout of tokens in the image, by name, for submodules that return tokens (B, N, C).
        outputs: the index or key of the map, by name, for submodules that return several.

    Raises:
        ValueError: in the cases of [attach][kaf_layer.interop.attach.attach]; and in a call, if a submodule does not
            return a map of the image or does not run exactly once, if there is no image, or if the keypoints belong to
            another image.
        RuntimeError: if the network calls itself, runs a submodule again in the backward pass, or is traced by
            ``torch.jit``.

    Example:
        >>> from kaf_layer import GridDetector, Keypoints
        >>> backbone = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, padding=1), torch.nn.Conv2d(8, 2, 3, stride=2))
        >>> model = KAFBackbone(backbone, {"0": KAFLayer(8, fusion="add")}, detector=GridDetector(8))
        >>> keypoints = Keypoints(torch.rand(1, 5, 2) * 24, torch.ones(1, 5, dtype=torch.bool), (24, 32))
        >>> model(torch.rand(1, 1, 24, 32), keypoints=keypoints).shape
        torch.Size([1, 2, 11, 15])
    """

    def __init__(
        self,
        backbone: nn.Module,
        layers: Mapping[str, KAFLayer],
        *,
        detector: KeypointDetector,
        image: str | None = None,
        channels_last: Collection[str] = (),
        tokens: Mapping[str, TokenGrid] | None = None,
        outputs: Mapping[str, int | str] | None = None,
    ) -> None:
        super().__init__()
        self._arguments = list(signature_of(backbone, image).parameters)
        modules = find_submodules(backbone, list(layers))
        tokens, outputs = tokens or {}, outputs or {}
        check_names(layers, channels_last=channels_last, tokens=tokens, outputs=outputs)
        self.backbone = backbone
        self.layers = nn.ModuleDict({layer_key(name): layer for name, layer in layers.items()}).train(backbone.training)
        self.detector = detector
        self.image = image
        self.training = backbone.training
        self._pass = _Pass()
        self._handles = []
        for name, module in modules.items():
            form = Form(channels_last=name in channels_last, tokens=tokens.get(name), output=outputs.get(name))
            self._handles.append(module.register_forward_hook(_FusionHook(name, form, self._pass)))
        if hasattr(type(backbone), "save_pretrained"):
            vars(backbone)["save_pretrained"] = _SaveAlone(backbone)
        self.__class__ = _like(type(self), backbone)

    def forward(self, *args: Any, keypoints: Keypoints | None = None, **kwargs: Any) -> Any:
        """Calls the backbone with its own arguments, and with layers.

        Args:
            args: positional arguments of the backbone.
            keypoints: the keypoints of the image; None detects them.
            kwargs: keyword arguments of the backbone.

        Returns:
            The backbone's output.
        """
        if self._pass.keypoints is not None:
            raise RuntimeError("another forward pass is under way around this one: the network must not call itself")
        if torch.jit.is_tracing():  # type: ignore[attr-defined]
            raise_torchscript_error()
        found = find_image(self.image, self._arguments, args, kwargs)
        if keypoints is None:
            if found is None:
                raise ValueError(
                    f"there is no image to detect keypoints in: give {self.image or 'image'}= or keypoints="
                )
            _check_image(found)
            keypoints = self.detector(found)
        else:
            check_keypoints(keypoints=keypoints)
            if found is not None and not torch.compiler.is_compiling():
                _check_size(found, keypoints)
        self._pass.keypoints, self._pass.layers, self._pass.fused = keypoints, self.layers, ()
        try:
            output = self.backbone(*args, **kwargs)
            if len(self._pass.fused) != len(self.layers):
                raise ValueError(f"each submodule with a layer must run, but only {list(self._pass.fused)} did")
        finally:
            self._pass.keypoints = self._pass.layers = None
        return output

    def remove_layers(self) -> nn.Module:
        """Removes the hooks and returns the original backbone."""
        for handle in self._handles:
            handle.remove()
        vars(self.backbone).pop("save_pretrained", None)
        return self.backbone

    def __getattr__(self, name: str) -> Any:
        """Finds modules and parameters; for other attributes of the backbone the error says where they are."""
        try:
            return super().__getattr__(name)
        except AttributeError as error:
            if name.startswith("_") or not hasattr(self.__dict__.get("_modules", {}).get("backbone"), name):
                raise
            message = f"{type(self).__name__!r} has no attribute {name!r}; the network's own is model.backbone.{name}"
            raise AttributeError(message) from error

    def __prepare_scriptable__(self) -> NoReturn:
        raise_torchscript_error()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles like any module, through a class that can be imported."""
        return _blank, (type(self).__mro__[1],), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__class__ = _like(type(self), self.backbone)


def _blank(kind: type[KAFBackbone]) -> KAFBackbone:
    return kind.__new__(kind)


def _like(kind: type[KAFBackbone], backbone: nn.Module) -> type[KAFBackbone]:
    """A class whose ``forward`` has the backbone's signature.

    Frameworks decide by it which columns of a dataset to keep and which are labels, some on the instance, some on the
    class.
    """

    def forward(self: KAFBackbone, *args: Any, keypoints: Keypoints | None = None, **kwargs: Any) -> Any:
        return kind.forward(self, *args, keypoints=keypoints, **kwargs)

    signature = signature_of(backbone)
    own = list(signature.parameters.values())
    last = [own.pop()] if own and own[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    keypoints = inspect.Parameter(
        "keypoints", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="Keypoints | None"
    )
    this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    forward.__signature__ = signature.replace(parameters=[this, *own, keypoints, *last])  # type: ignore[attr-defined]
    forward.__doc__ = kind.forward.__doc__
    return type(kind.__name__, (kind,), {"forward": forward, "__doc__": kind.__doc__, "__module__": kind.__module__})


def _check_image(image: Tensor) -> None:
    if image.ndim < 4:
        raise ValueError(
            f"images must be a batch (B, C, *S) to detect keypoints in, got shape {tuple(image.shape)}; if the network "
            "takes a list of images, attach to the part of it that takes a batch, as in "
            "net.backbone = attach(net.backbone, ...)"
        )


def _check_size(image: Tensor, keypoints: Keypoints) -> None:
    """Checks that keypoints belong to the image that the network gets; tensors with other axes are not compared."""
    seen = image.shape[0], *image.shape[2:]
    given = keypoints.positions.shape[0], *keypoints.image_size
    if len(seen) == len(given) and seen != given:
        raise ValueError(
            f"keypoints must be of the images that the network gets, {seen[0]} of {seen[1:]} pixels, got {given[0]} "
            f"of {given[1:]} pixels. In a sliding window give none: each window has its own. Found in "
            "the same image at another size: keypoints.resize(size)"
        )


class _Pass(threading.local):
    """The state of a thread's forward pass, which its hooks share; copies and pickles start empty."""

    def __init__(self) -> None:  # is called in every thread
        self.keypoints: Keypoints | None = None
        self.layers: nn.ModuleDict | None = None  # of the replica that runs
        self.fused: tuple[str, ...] = ()

    def __reduce__(self) -> tuple[type[_Pass], tuple[()]]:
        return _Pass, ()


class _SaveAlone:
    """Hugging Face's ``save_pretrained`` of a network with layers: it knows the network alone, and says so."""

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("state_dict") is None:
            warnings.warn(
                "save_pretrained saves the network without its KAF layers: save the state_dict() of what attach "
                "returned as well, and load it into a network to which the same layers are attached again",
                stacklevel=2,
            )
        return type(self.backbone).save_pretrained(self.backbone, *args, **kwargs)  # type: ignore[attr-defined]


class _FusionHook:
    """A forward hook that fuses a submodule's map; a class, since closures cannot be pickled."""

    def __init__(self, name: str, form: Form, state: _Pass) -> None:
        self.name, self.form, self.state = name, form, state

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        keypoints, layers = self.state.keypoints, self.state.layers
        if keypoints is None or layers is None:
            if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() >= 0:
                raise RuntimeError(
                    f"{self.name!r} is run again in the backward pass, by activation checkpointing around it, where "
                    "the keypoints are no longer known: checkpoint the whole network, or parts without a KAF layer"
                )
            return output
        if self.name in self.state.fused:
            raise ValueError(f"{self.name!r} runs more than once in a forward pass: name what runs once")
        self.state.fused = (*self.state.fused, self.name)
        leaves, spec, index = find_map(self.name, output, self.form)
        try:
            features = self.form.to_map(leaves[index], keypoints.image_size)
            fused = layers[layer_key(self.name)](features, keypoints).features
        except ValueError as error:
            raise ValueError(f"{self.name!r} must return a map of the image {self.form.describe()}: {error}") from error
        leaves[index] = self.form.from_map(fused, leaves[index])
        return tree_unflatten(leaves, spec)
