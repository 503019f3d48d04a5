"""The sampling settings in a graph of ComfyUI, in the API form that it writes into its images as `prompt`.

From the only sampler node, links are followed to the texts, the size, the seed and the model. What cannot be followed
is named; nothing is guessed.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MAX_NODES = 5_000
MAX_LINKS = 100
"""Links that are followed from one input."""
LARGEST_NUMBER = 2**64
"""No seed or other number of a graph is as large."""
TEXT_INPUTS = ("text", "prompt", "string", "value")
"""Inputs that hold the text of a node, the first that a node has."""

Node = dict[str, Any]


class UnreadableError(Exception):
    """A value of the graph that cannot be read, with the reason."""


@dataclass
class Sampling:
    """What a graph says of how its image was drawn."""

    fields: dict[str, Any] = field(default_factory=dict)
    """prompt, negative, seed, steps, cfg, width, height and shift, as far as they can be read."""
    unread: dict[str, str] = field(default_factory=dict)
    """Field that cannot be read -> why."""
    notes: list[str] = field(default_factory=list)
    sampler: str | None = None
    scheduler: str | None = None
    model: str | None = None
    loras: list[tuple[str, str]] = field(default_factory=list)
    """Name and strength of each."""


def read_sampling(text: str) -> Sampling:
    """Return the sampling settings in the graph `text`.

    Raises:
        UnreadableError: it is no graph, or has not exactly one sampler.
    """
    graph = _Graph(text)
    sampler = graph.only_sampler()
    # The parts of ComfyUI's custom sampling; a KSampler has all of their inputs itself.
    guider = graph.linked(sampler, "guider") or sampler
    noise = graph.linked(sampler, "noise") or sampler
    schedule = graph.linked(sampler, "sigmas") or sampler
    sampling = Sampling()

    def read(name: str, getter: Callable[[], Any]) -> None:
        try:
            sampling.fields[name] = getter()
        except UnreadableError as error:
            sampling.unread[name] = str(error)

    has_cfg = "cfg" in guider["inputs"]
    positive = "positive" if "positive" in guider["inputs"] else "conditioning"
    read("prompt", lambda: graph.prompt_text(guider, positive))
    read("negative", lambda: graph.prompt_text(guider, "negative") if "negative" in guider["inputs"] else "")
    read("seed", lambda: graph.whole(noise, "noise_seed" if "noise_seed" in noise["inputs"] else "seed"))
    read("steps", lambda: graph.whole(schedule, "steps"))
    read("cfg", lambda: graph.number(guider, "cfg") if has_cfg else 1.0)
    read("size", lambda: graph.size(sampler))
    sampling.fields |= dict(zip(("width", "height"), sampling.fields.pop("size", ()), strict=False))
    _read_model(graph, guider if "model" in guider["inputs"] else sampler, sampling)
    chosen = graph.linked(sampler, "sampler") or sampler
    name = chosen["inputs"].get("sampler_name")
    sampling.sampler = name if isinstance(name, str) else None
    scheduler = schedule["inputs"].get("scheduler")
    sampling.scheduler = scheduler if isinstance(scheduler, str) else None
    denoise = schedule["inputs"].get("denoise", 1)
    if denoise != 1:
        made = f"it has denoise {str(denoise)[:20]}, so it was made from another image"
        sampling.notes.append(f"{made}, and is drawn from noise here")
    return sampling


def _read_model(graph: "_Graph", node: Node, sampling: Sampling) -> None:
    """Read the LoRAs, the shift and the file of the model that the input `model` of `node` leads to."""
    for _ in range(MAX_LINKS):
        linked = graph.linked(node, "model")
        if linked is None:
            return
        node = linked
        inputs = node["inputs"]
        if isinstance(inputs.get("lora_name"), str):
            strength = inputs.get("strength_model", 1.0)
            sampling.loras.append((inputs["lora_name"], f"{strength:g}" if _is_number(strength) else "?"))
        shift = inputs.get("shift")
        if "ModelSampling" in node["class_type"] and _is_number(shift) and "shift" not in sampling.fields:
            sampling.fields["shift"] = float(shift)  # the last before the sampler counts
        for key in ("unet_name", "ckpt_name", "model_name"):
            if isinstance(inputs.get(key), str):
                sampling.model = inputs[key]


class _Graph:
    """The nodes of a graph by their number, and the links between them."""

    def __init__(self, text: str) -> None:
        try:
            nodes = json.loads(text)
        except (ValueError, RecursionError):
            raise UnreadableError("it is not the JSON of a graph of ComfyUI") from None
        if not isinstance(nodes, dict) or len(nodes) > MAX_NODES:
            raise UnreadableError("it is not a graph of ComfyUI")
        self.nodes: dict[str, Node] = {}
        for number, node in nodes.items():
            if (
                isinstance(node, dict)
                and isinstance(node.get("class_type"), str)
                and isinstance(node.get("inputs"), dict)
            ):
                self.nodes[number] = node
        if not self.nodes:
            raise UnreadableError("it is not a graph of ComfyUI")

    def only_sampler(self) -> Node:
        """Return the only node that draws latents.

        Raises:
            UnreadableError: there is none, or there are several.
        """
        found: dict[str, Node] = {}
        for number, node in self.nodes.items():
            inputs = node["inputs"].keys()
            if "latent_image" in inputs and inputs & {"positive", "guider"} and inputs & {"steps", "sigmas"}:
                found[number] = node
        if not found:
            raise UnreadableError("the graph has no sampler node that is known here")
        if len(found) > 1:
            raise UnreadableError(f"the graph has {len(found)} samplers (nodes {', '.join(list(found)[:5])})")
        return next(iter(found.values()))

    def linked(self, node: Node, name: str) -> Node | None:
        """Return the node that an input is linked to, or None if it is no link."""
        link = node["inputs"].get(name)
        is_link = isinstance(link, list) and len(link) == 2 and isinstance(link[0], str | int)
        return self.nodes.get(str(link[0])) if is_link else None

    def prompt_text(self, node: Node, name: str) -> str:
        """Return the text of the conditioning that an input is linked to."""
        for _ in range(MAX_LINKS):
            link, linked = node["inputs"].get(name), self.linked(node, name)
            if linked is None:
                raise UnreadableError(f"{self._name(node)} has no link to a text as its {name}")
            inputs = linked["inputs"]
            if linked["class_type"] == "ConditioningZeroOut" and name == "negative":
                return ""
            key = next((key for key in TEXT_INPUTS if key in inputs), None)
            if key is not None:
                return self.text(linked, key)
            if "conditioning" in inputs:
                node, name = linked, "conditioning"
            elif {"positive", "negative"} <= inputs.keys():  # such as a ControlNet, whose outputs are these two
                node, name = linked, "negative" if link[1] == 1 else "positive"
            else:
                raise UnreadableError(f"{self._name(linked)} makes it, which cannot be followed")
        raise UnreadableError("its links have no end")

    def text(self, node: Node, name: str) -> str:
        """Return the text of an input, or of the node that it is linked to."""
        for _ in range(MAX_LINKS):
            value, linked = node["inputs"].get(name), self.linked(node, name)
            if isinstance(value, str):
                return value
            keys = [key for key in TEXT_INPUTS if linked is not None and key in linked["inputs"]]
            if linked is None or not keys:
                raise UnreadableError(f"{self._name(linked or node)} makes it, which cannot be followed")
            node, name = linked, keys[0]
        raise UnreadableError("its links have no end")

    def number(self, node: Node, name: str) -> float:
        """Return the number of an input, or that of the node to which it is linked."""
        for _ in range(MAX_LINKS):
            value, linked = node["inputs"].get(name), self.linked(node, name)
            if _is_number(value):
                return value
            if linked is None:
                raise UnreadableError(f"{self._name(node)} has no number as its {name}")
            inputs = linked["inputs"]
            keys = [key for key in (name, "value", "seed") if key in inputs]
            numbers = [key for key, other in inputs.items() if _is_number(other)]
            if not keys and len(numbers) == 1:
                keys = numbers
            if not keys:
                raise UnreadableError(f"{self._name(linked)} makes it, which cannot be followed")
            node, name = linked, keys[0]
        raise UnreadableError("its links have no end")

    def whole(self, node: Node, name: str) -> int:
        """Return the whole number of an input; see `number`."""
        value = self.number(node, name)
        if value % 1 != 0:
            raise UnreadableError(f"{self._name(node)} has {value:g} as its {name}")
        return int(value)

    def size(self, sampler: Node) -> tuple[int, int]:
        """Return width and height of the empty latents that a sampler begins with."""
        node, name = sampler, "latent_image"
        for _ in range(MAX_LINKS):
            linked = self.linked(node, name)
            if linked is None:
                break
            if {"width", "height"} <= linked["inputs"].keys():
                return self.whole(linked, "width"), self.whole(linked, "height")
            if "samples" not in linked["inputs"]:
                raise UnreadableError(f"{self._name(linked)} makes its latents, which cannot be followed")
            node, name = linked, "samples"
        raise UnreadableError("the sampler has no link to empty latents")

    def _name(self, node: Node) -> str:
        number = next(number for number, other in self.nodes.items() if other is node)
        kind = "".join(char if char.isprintable() else " " for char in node["class_type"][:60])
        return f"node {number[:20]} ({kind})"


def _is_number(value: Any) -> bool:
    if isinstance(value, int):  # a whole number may be too large for a float, and for `isfinite`
        return not isinstance(value, bool) and abs(value) < LARGEST_NUMBER
    return isinstance(value, float) and math.isfinite(value)
